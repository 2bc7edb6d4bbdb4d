//! Processes that leave in the middle of a call, and an agent that is killed in the middle of a trace.

use object::{Object as _, ObjectSegment as _, ObjectSymbol as _};
use rustix::process::Signal;
use std::os::unix::fs::FileExt as _;
use wasmscope::span::{Bound, Outcome, Role};
use wasmscope_tests::agent::Agent;
use wasmscope_tests::captured::Captured;
use wasmscope_tests::environment::{self, Kernel};
use wasmscope_tests::running::Running;
use wasmscope_tests::workload::{FOREVER, Workload};

/// Every trace is that of a call that never ended, and is told as such.
fn assert_unfinished(seen: &Captured, import: &str) {
    let [trace] = seen.traces.as_slice() else {
        panic!("{} traces", seen.traces.len())
    };
    assert_eq!(trace.root.outcome, Outcome::Unfinished);
    assert_eq!(trace.root.end_bound, Bound::Open);
    let last = trace.root.children.last().unwrap();
    let wasmscope::span::SpanKind::HostCall { import: Some(found) } = &last.kind else {
        panic!("{last:?}")
    };
    assert_eq!(found.name, import);
    assert_eq!((&last.outcome, last.end_bound), (&Outcome::Unfinished, Bound::Open));
}

#[test]
fn a_process_that_becomes_another_mid_call_ends_its_trace_unfinished() {
    let Some(_kernel) = Kernel::acquire() else { return };
    for mode in ["sync", "async"] {
        let workload = Workload::ready(&["--scenario", "exec-mid-call", "--mode", mode, "--threads", "3"]);
        let agent = Agent::json_of(&workload.pid());
        let counted = workload.run();
        let seen = agent.captured();
        assert_unfinished(&seen, "exec");
        let counts = seen.counts();
        assert_eq!(
            (counts.invocations, counts.host_calls),
            (counted.invocations, counted.host_calls),
            "{mode}"
        );
        assert_eq!(
            counts.syscalls_by_host_call["host.write"],
            counted.syscalls_by_host_call["host.write"]
        );
        assert_eq!(counts.syscalls_by_host_call["host.exec"]["write"], 1);
    }
}

#[test]
fn a_process_that_exits_mid_call_ends_its_trace_unfinished() {
    let Some(_kernel) = Kernel::acquire() else { return };
    for mode in ["sync", "async"] {
        let workload = Workload::ready(&["--scenario", "exit-mid-call", "--mode", mode, "--threads", "3"]);
        let agent = Agent::json_of(&workload.pid());
        let counted = workload.run();
        let seen = agent.captured();
        assert_unfinished(&seen, "exit");
        let counts = seen.counts();
        assert_eq!(
            (counts.invocations, counts.host_calls),
            (counted.invocations, counted.host_calls),
            "{mode}"
        );
        assert_eq!(counts.syscalls_by_host_call["host.exit"]["write"], 1);
    }
}

#[test]
fn a_process_that_is_killed_mid_call_ends_the_agent_and_its_open_calls_are_unfinished() {
    let Some(_kernel) = Kernel::acquire() else { return };
    for mode in ["sync", "async"] {
        let arguments = [&FOREVER[..], &["--mode", mode, "--tasks", "4"]].concat();
        let mut workload = Workload::ready(&arguments);
        let agent = Agent::json_of(&workload.pid());
        workload.0.send_line();
        beats(&workload.0, 3);
        workload.0.signal(Signal::KILL);
        workload.0.finish();
        let seen = agent.captured();
        let open: Vec<_> = seen
            .traces
            .iter()
            .filter(|trace| trace.root.outcome == Outcome::Unfinished)
            .collect();
        // In sync mode two tasks wait for a thread.
        let most = if mode == "sync" { 2 } else { 4 };
        assert!(!open.is_empty() && open.len() <= most, "{mode}: {} open", open.len());
        for trace in &seen.traces {
            let is_open = trace.root.outcome == Outcome::Unfinished;
            assert_eq!(trace.root.end_bound, if is_open { Bound::Open } else { Bound::Exact });
        }
        let finished = seen.traces.len() - open.len();
        assert!(finished > 0);
    }
}

#[test]
fn a_workload_runs_on_unprobed_after_its_agent_is_killed() {
    let Some(_kernel) = Kernel::acquire() else { return };
    let workload = environment::test_host("workload");
    let (offset, in_file) = probed_function(&workload);
    for mode in ["sync", "async"] {
        let mut workload = Workload::ready(&[&FOREVER[..], &["--mode", mode, "--tasks", "4"]].concat());
        let agent = Agent::json_of(&workload.pid());
        workload.0.send_line();
        beats(&workload.0, 3);
        let in_memory = || {
            let base = load_base(workload.0.pid());
            let mut bytes = vec![0; in_file.len()];
            let memory = std::fs::File::open(format!("/proc/{}/mem", workload.0.pid())).unwrap();
            memory.read_exact_at(&mut bytes, base + offset).unwrap();
            bytes
        };
        assert_ne!(in_memory(), in_file, "there is a probe while it is traced");
        agent.0.signal(Signal::KILL);
        drop(agent);
        wait_until(|| in_memory() == in_file);
        let before = beats(&workload.0, 2);
        let after = beats(&workload.0, 3);
        assert!(after > before, "{mode}: no host call since the agent was killed");
        assert!(workload.0.is_running());
    }
}

#[test]
fn an_interrupted_agent_leaves_the_workload_running_and_unprobed() {
    let Some(_kernel) = Kernel::acquire() else { return };
    let (offset, in_file) = probed_function(&environment::test_host("workload"));
    let mut workload = Workload::ready(&[&FOREVER[..], &["--tasks", "2"]].concat());
    let agent = Agent::json_of(&workload.pid());
    workload.0.send_line();
    beats(&workload.0, 3);
    agent.interrupt();
    let seen = agent.captured();
    assert!(seen.traces.iter().any(|trace| trace.root.outcome == Outcome::Ok));
    let unfinished = seen
        .traces
        .iter()
        .filter(|trace| trace.root.outcome == Outcome::Unfinished);
    assert!(unfinished.clone().count() <= 2);
    for trace in unfinished {
        let open = trace.root.walk().filter(|span| span.role() == Role::Invoke);
        assert!(open.count() == 1);
    }
    let mut bytes = vec![0; in_file.len()];
    let memory = std::fs::File::open(format!("/proc/{}/mem", workload.0.pid())).unwrap();
    memory
        .read_exact_at(&mut bytes, load_base(workload.0.pid()) + offset)
        .unwrap();
    assert_eq!(bytes, in_file);
    let before = beats(&workload.0, 2);
    assert!(beats(&workload.0, 3) > before);
    assert!(workload.0.is_running());
}

/// Waits for `count` more heartbeats and returns the last one's number of host calls.
fn beats(workload: &Running, count: usize) -> u64 {
    workload.wait_for_lines(workload.stdout_lines().len() + count);
    let lines = workload.stdout_lines();
    let number = |line: &String| line.strip_prefix("{\"heartbeat\":")?.strip_suffix('}')?.parse().ok();
    lines
        .iter()
        .rev()
        .find_map(number)
        .expect("the workload prints heartbeats")
}

/// Address (relative to where the program is loaded) and bytes of the function that swaps activations.
fn probed_function(program: &std::path::Path) -> (u64, Vec<u8>) {
    let bytes = std::fs::read(program).unwrap();
    let elf = object::File::parse(&*bytes).unwrap();
    let symbol = elf
        .symbols()
        .find(|symbol| {
            symbol
                .name()
                .is_ok_and(|name| name.contains("traphandlers3tls3raw7replace"))
        })
        .expect("the workload has symbols");
    let segment = elf
        .segments()
        .find(|segment| (segment.address()..segment.address() + segment.size()).contains(&symbol.address()))
        .unwrap();
    let start = (symbol.address() - segment.address()) as usize;
    let code = &segment.data().unwrap()[start..start + symbol.size() as usize];
    (symbol.address(), code.to_vec())
}

/// Where a position-independent program is loaded.
fn load_base(pid: u32) -> u64 {
    let maps = std::fs::read_to_string(format!("/proc/{pid}/maps")).unwrap();
    let executable = std::fs::read_link(format!("/proc/{pid}/exe")).unwrap();
    let first = maps
        .lines()
        .find(|line| line.ends_with(executable.to_str().unwrap()))
        .unwrap();
    u64::from_str_radix(first.split('-').next().unwrap(), 16).unwrap()
}

fn wait_until(mut condition: impl FnMut() -> bool) {
    let begun = std::time::Instant::now();
    while !condition() {
        assert!(
            begun.elapsed() < *wasmscope_tests::running::DEADLINE,
            "it did not happen in time"
        );
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
}
