//! Syscalls that the runtime moved to helper threads, and syscalls that do not return: whose they are, and that no time is counted twice.

use std::collections::BTreeSet;

use tempfile::tempdir;
use wasmscope::span::{Bound, Outcome, Role, Span, SpanKind};
use wasmscope_tests::agent::{Agent, run, wasmscope};
use wasmscope_tests::captured::{Captured, Trace, stack_names};
use wasmscope_tests::environment::Kernel;
use wasmscope_tests::workload::{Counts, Workload};

/// Attaches to a workload that is ready to go, and lets it go.
fn traced(arguments: &[&str]) -> (Captured, Counts) {
    let workload = Workload::ready(arguments);
    let agent = Agent::json_of(&workload.pid());
    let counted = workload.run();
    (agent.captured(), counted)
}

/// Those that the workload counts where it makes them. Handing work over takes others: helpers are started and woken.
fn deliberate(mut seen: Counts, counted: &Counts) -> Counts {
    seen.syscalls_by_host_call.retain(|host_call, syscalls| {
        let deliberate = counted.syscalls_by_host_call.get(host_call);
        syscalls.retain(|name, _| deliberate.is_some_and(|deliberate| deliberate.contains_key(name)));
        !syscalls.is_empty()
    });
    seen
}

fn helpers_of(trace: &Trace) -> impl Iterator<Item = &Span> {
    trace.root.walk().filter(|span| span.is_on_helper())
}

/// Threads that the guest's fiber was on.
fn threads_of(trace: &Trace) -> BTreeSet<u32> {
    let suspends = trace.root.suspends.iter();
    let resumed_on = suspends.filter_map(|suspend| suspend.to_tid);
    resumed_on.chain([trace.root.tid]).collect()
}

fn name_of(span: &Span) -> &str {
    match &span.kind {
        SpanKind::Syscall { name, .. } => name,
        SpanKind::HostCall { import: Some(import) } => &import.name,
        other => panic!("{other:?}"),
    }
}

/// Each nanosecond of the invocation is somebody's own, or it was suspended; helpers' are beside that.
fn assert_accounted_for(trace: &Trace) {
    let own: u64 = trace
        .root
        .walk()
        .filter(|span| !span.is_on_helper())
        .map(Span::self_ns)
        .sum();
    assert_eq!(own + trace.root.suspended_ns(), trace.root.duration_ns());
}

#[test]
fn syscalls_of_helper_threads_belong_to_the_host_call_that_waits_for_them() {
    let Some(_kernel) = Kernel::acquire() else { return };
    for (tasks, threads) in [("1", "2"), ("16", "4")] {
        let arguments = ["--scenario", "blocking", "--mode", "async", "--calls", "40"];
        let sizes = ["--tasks", tasks, "--threads", threads, "--repeat", "3"];
        let (seen, counted) = traced(&[&arguments[..], &sizes].concat());
        seen.assert_nothing_lost();
        seen.assert_well_formed();
        assert_eq!(deliberate(seen.counts(), &counted), counted);

        let guests_threads: BTreeSet<u32> = seen.traces.iter().flat_map(threads_of).collect();
        for trace in &seen.traces {
            assert_accounted_for(trace);
            for syscall in helpers_of(trace) {
                assert!(!guests_threads.contains(&syscall.tid), "{syscall:?}");
            }
            for call in &trace.root.children {
                let of_helpers = call.children.iter().filter(|child| child.is_on_helper());
                let mut of_helpers: Vec<_> = of_helpers.map(name_of).collect();
                of_helpers.retain(|name| ["openat2", "statx", "openat", "pread64", "close"].contains(name));
                of_helpers.sort_unstable();
                let expected: &[&str] = match name_of(call) {
                    "path_open" => &["openat2", "statx"],
                    "fd_read" => &["pread64"],
                    // On the guest's own thread.
                    "fd_close" => &[],
                    "read_elsewhere" => &["close", "openat", "pread64"],
                    "read_twice" => &["close", "close", "openat", "openat", "pread64", "pread64"],
                    other => panic!("{other}"),
                };
                assert_eq!(of_helpers, expected, "{}", name_of(call));
                for syscall in &call.children {
                    assert_eq!(stack_names(syscall), stack_names(call));
                }
            }
        }
    }
}

#[test]
fn a_thread_that_takes_over_a_workers_tasks_does_not_work_for_the_guest_that_blocks() {
    let Some(_kernel) = Kernel::acquire() else { return };
    let arguments = ["--scenario", "blocking-in-place", "--mode", "async", "--calls", "100"];
    let (seen, counted) = traced(&[&arguments[..], &["--tasks", "8", "--threads", "3"]].concat());
    seen.assert_nothing_lost();
    seen.assert_well_formed();
    assert_eq!(deliberate(seen.counts(), &counted), counted);
    for trace in &seen.traces {
        assert_eq!(helpers_of(trace).collect::<Vec<_>>(), Vec::<&Span>::new());
        assert_accounted_for(trace);
    }
}

#[test]
fn work_that_outlives_its_host_call_is_lost_and_not_the_next_ones() {
    let Some(_kernel) = Kernel::acquire() else { return };
    let arguments = ["--scenario", "blocking-detached", "--mode", "async", "--calls", "50"];
    let (seen, counted) = traced(&[&arguments[..], &["--threads", "3"]].concat());
    seen.assert_well_formed();
    assert_eq!(deliberate(seen.counts(), &counted), counted);
    // An `openat` and a `close` for each.
    assert_eq!(seen.lost("correlate", "helper_outlived_call"), 100);
    assert_eq!(seen.capture.losses.len(), 1, "{:?}", seen.capture.losses);
    assert_eq!(helpers_of(&seen.traces[0]).count(), 0);
}

/// The last syscall of the only trace, which has not returned.
fn open_syscall(seen: &Captured, host_call: &str) -> Span {
    let [trace] = seen.traces.as_slice() else {
        panic!("{} traces", seen.traces.len())
    };
    let call = trace.root.children.last().unwrap();
    assert_eq!((call.role(), name_of(call)), (Role::HostCall, host_call));
    assert_eq!(call.end_bound, Bound::Open);
    let open: Vec<_> = trace
        .root
        .walk()
        .filter(|span| span.role() == Role::Syscall && span.end_bound == Bound::Open)
        .collect();
    assert_eq!(open.len(), 1, "{open:?}");
    assert_eq!(call.children.last(), open.last().copied());
    assert_eq!(stack_names(open[0]), stack_names(call));
    assert_eq!(
        (open[0].start_bound, &open[0].outcome),
        (Bound::Exact, &Outcome::Unfinished)
    );
    open[0].clone()
}

/// The text diagram of a recording.
fn drawn(recording: &std::path::Path) -> String {
    let mut command = wasmscope();
    command.arg("replay").arg(recording).args(["--format", "text"]);
    run(command).succeeded().stdout.join("\n")
}

#[test]
fn the_syscall_that_ends_a_process_or_replaces_its_image_is_drawn_without_a_return() {
    let Some(_kernel) = Kernel::acquire() else { return };
    for (scenario, host_call, syscall) in [
        ("exit-mid-call", "exit", "exit_group"),
        ("exec-mid-call", "exec", "execve"),
    ] {
        for mode in ["sync", "async"] {
            let directory = tempdir().unwrap();
            let recording = directory.path().join("run.rec");
            let workload = Workload::ready(&["--scenario", scenario, "--mode", mode, "--threads", "3"]);
            let pid = workload.pid();
            let record = ["--format", "json", "--record", recording.to_str().unwrap()];
            let agent = Agent::watching(["--pid", &pid].iter().chain(&record));
            let counted = workload.run();
            let seen = agent.captured();
            let open = open_syscall(&seen, host_call);
            assert_eq!((name_of(&open), open.is_on_helper()), (syscall, false), "{mode}");
            assert_eq!(deliberate(seen.counts(), &counted), counted, "{mode}");
            let drawn = drawn(&recording);
            assert!(drawn.contains(syscall) && drawn.contains("does not return"), "{drawn}");
        }
    }
}

#[test]
fn a_syscall_in_flight_when_the_window_ends_is_drawn_open() {
    let Some(_kernel) = Kernel::acquire() else { return };
    for (mode, is_on_helper) in [("sync", false), ("async", true)] {
        let directory = tempdir().unwrap();
        let recording = directory.path().join("run.rec");
        let mut workload = Workload::ready(&["--scenario", "stall", "--mode", mode]);
        let pid = workload.pid();
        let record = ["--format", "json", "--record", recording.to_str().unwrap()];
        let agent = Agent::watching(["--pid", &pid].iter().chain(&record));
        workload.0.send_line();
        let tid = wait_for_read(&pid);
        agent.interrupt();
        let seen = agent.captured();

        let open = open_syscall(&seen, "stall");
        assert_eq!(
            (name_of(&open), open.is_on_helper(), open.tid),
            ("read", is_on_helper, tid),
            "{mode}"
        );
        let SpanKind::Syscall { args, .. } = &open.kind else {
            unreachable!()
        };
        assert_eq!((args[0], args[2]), (0, 16));
        assert_eq!(open.end_ns, seen.traces[0].root.end_ns);
        seen.assert_nothing_lost();
        assert_accounted_for(&seen.traces[0]);
        let drawn = drawn(&recording);
        assert!(drawn.contains("read fd 0, 16 B"), "{drawn}");
        assert_eq!(
            drawn.contains(&format!("on helper thread {tid}")),
            is_on_helper,
            "{drawn}"
        );
        assert!(drawn.contains("still running when the window ended"), "{drawn}");

        workload.0.send_line();
        workload.0.finish().succeeded();
    }
}

/// Waits until a thread reads 16 bytes from standard input, which only `stall` does.
fn wait_for_read(pid: &str) -> u32 {
    let begun = std::time::Instant::now();
    loop {
        for task in std::fs::read_dir(format!("/proc/{pid}/task")).unwrap() {
            let task = task.unwrap();
            let running = std::fs::read_to_string(task.path().join("syscall")).unwrap_or_default();
            let mut words = running.split(' ');
            if (words.next(), words.next(), words.nth(1)) == (Some("0"), Some("0x0"), Some("0x10")) {
                return task.file_name().to_str().unwrap().parse().unwrap();
            }
        }
        assert!(
            begun.elapsed() < *wasmscope_tests::running::DEADLINE,
            "it does not read"
        );
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
}

#[test]
fn a_replay_knows_what_helper_threads_did() {
    let Some(_kernel) = Kernel::acquire() else { return };
    let directory = tempdir().unwrap();
    let recording = directory.path().join("run.rec");
    let workload = Workload::ready(&[
        "--scenario",
        "blocking",
        "--mode",
        "async",
        "--tasks",
        "4",
        "--calls",
        "5",
    ]);
    let pid = workload.pid();
    let record = ["--format", "json", "--record", recording.to_str().unwrap()];
    let agent = Agent::watching(["--pid", &pid].iter().chain(&record));
    workload.run();
    let live = agent.captured();
    let mut command = wasmscope();
    command.arg("replay").arg(&recording).args(["--format", "json"]);
    let mut replayed = Captured::parse(&run(command).succeeded().stdout);
    let mut expected = live.traces;
    for traces in [&mut replayed.traces, &mut expected] {
        traces.sort_by(|a, b| a.trace_id.cmp(&b.trace_id));
    }
    assert!(expected.iter().all(|trace| helpers_of(trace).count() > 0));
    assert_eq!(replayed.traces, expected);
}
