//! Processes that start to run wasm while the whole machine is watched.

use std::time::Instant;

use wasmscope::span::{Bound, Outcome, Role, Span, SpanKind};
use wasmscope_tests::agent::Agent;
use wasmscope_tests::captured::{Captured, NO_HOST_CALL, Trace, stack_names};
use wasmscope_tests::environment::Kernel;
use wasmscope_tests::http;
use wasmscope_tests::running::DEADLINE;
use wasmscope_tests::workload::{Counts, FOREVER, Numbers, Workload};

/// Watches the whole machine until the first host call of a process that compiled its guest after that.
fn noticed() -> Captured {
    let agent = Agent::watching(["--format", "json", "--metrics-listen", "127.0.0.1:0"]);
    agent.0.stderr_line(|line| line.starts_with("watching every process"));
    let line = agent.0.stderr_line(|line| line.starts_with("metrics on "));
    let arguments = [&FOREVER[..], &["--tasks", "2", "--calls", "5", "--compile-after-wait"]].concat();
    let mut workload = Workload::ready(&arguments);
    workload.0.send_line();
    let begun = Instant::now();
    while !http::get(&line["metrics on ".len()..]).contains("\nwasm_host_calls_total{process=\"workload\"") {
        assert!(begun.elapsed() < *DEADLINE, "no host call was seen");
    }
    agent.interrupt();
    agent.captured().of_process(workload.0.pid())
}

#[test]
fn a_process_that_compiles_after_tracing_began_is_seen_in_full_once_its_host_has_probes() {
    let Some(_kernel) = Kernel::acquire() else { return };
    let seen = noticed();
    let host_calls = seen
        .traces
        .iter()
        .flat_map(|trace| trace.root.walk())
        .filter(|span| span.role() == Role::HostCall);
    let first_ns = host_calls.map(|call| call.start_ns).min().expect("there was one");
    let is_complete = |trace: &&Trace| {
        trace.root.start_bound == Bound::Exact
            && trace.root.start_ns > first_ns
            && trace.root.outcome != Outcome::Unfinished
    };
    let complete: Vec<_> = seen.traces.iter().filter(is_complete).cloned().collect();
    assert!(!complete.is_empty());
    let complete = Captured {
        traces: complete,
        capture: seen.capture,
    };
    complete.assert_well_formed();
    let invocations = complete.traces.len() as u64;
    let counts = complete.counts();
    assert_eq!(counts.invocations, [("calls/start".to_owned(), invocations)].into());
    assert!(
        counts.host_calls.values().all(|calls| *calls == 5 * invocations),
        "{:?}",
        counts.host_calls
    );
    assert_eq!(counts.host_calls.len(), 4);
    let all = ["write", "openat", "pread64", "close", "nanosleep"].map(|name| (name.to_owned(), 5 * invocations));
    assert_eq!(counts.syscalls(), all.into());
    assert!(!counts.syscalls_by_host_call.contains_key(NO_HOST_CALL));
}

const COMPILES_LATE: [&str; 9] = [
    "--tasks",
    "2",
    "--threads",
    "2",
    "--calls",
    "50",
    "--repeat",
    "10",
    "--compile-after-wait",
];

/// How many of the syscalls `made` are in `seen`, those that the workload counts. None is there that was not made.
fn found(seen: &Captured, made: &Numbers) -> u64 {
    let found = seen.counts().syscalls();
    for (name, count) in &found {
        assert!(
            *count <= made.get(name).copied().unwrap_or(0),
            "{count} {name} seen of {made:?}"
        );
    }
    found.values().sum()
}

#[test]
fn syscalls_before_a_new_process_has_probes_have_their_guest_functions() {
    let Some(_kernel) = Kernel::acquire() else { return };
    let agent = Agent::watching(["--format", "json"]);
    agent.0.stderr_line(|line| line.starts_with("watching every process"));
    let mut workload = Workload::ready(&[&COMPILES_LATE[..], &["--hold"]].concat());
    workload.0.send_line();
    let counted = workload.0.stdout_line(|line| line.starts_with("{\"scenario\""));
    let made = Counts::among([counted.as_str()]).syscalls();
    agent.interrupt();
    let seen = agent.captured().of_process(workload.0.pid());
    for span in seen.traces.iter().flat_map(|trace| trace.root.walk()) {
        if let SpanKind::Syscall { .. } = span.kind {
            assert_eq!(stack_names(span), ["emit", "loop_emit", "start"], "{span:?}");
        }
    }
    let (found, made) = (found(&seen, &made), made.values().sum::<u64>());
    let (lost, losses) = (seen.lost("kernel", "uncalibrated"), &seen.capture.losses);
    assert!(
        found > 0 && found + lost >= made,
        "{found} seen + {lost} lost of {made}: {losses:?}"
    );
}

#[test]
fn a_process_that_is_gone_before_it_was_looked_at_is_accounted_for() {
    let Some(_kernel) = Kernel::acquire() else { return };
    let agent = Agent::watching(["--format", "json"]);
    agent.0.stderr_line(|line| line.starts_with("watching every process"));
    let workload = Workload::ready(&COMPILES_LATE);
    let pid = workload.0.pid();
    let made = workload.run().syscalls();
    agent.interrupt();
    let seen = agent.captured().of_process(pid);
    let (found, made) = (found(&seen, &made), made.values().sum::<u64>());
    let lost: u64 = seen.capture.losses.iter().map(|loss| loss.count).sum();
    assert!(
        found + lost >= made,
        "{found} seen + {lost} lost of {made}: {:?}",
        seen.capture.losses
    );
    let unnamed = |span: &&Span| matches!(span.kind, SpanKind::Syscall { .. }) && span.stack.len() < 3;
    let unnamed = seen
        .traces
        .iter()
        .flat_map(|trace| trace.root.walk())
        .filter(unnamed)
        .count() as u64;
    assert!(
        unnamed <= seen.lost("symbols", "frame_unresolved"),
        "{unnamed} without a stack: {:?}",
        seen.capture.losses
    );
}

#[test]
fn a_process_that_was_there_before_is_found() {
    let Some(_kernel) = Kernel::acquire() else { return };
    let workload = Workload::ready(&["--tasks", "2", "--threads", "2", "--calls", "20"]);
    let pid = workload.0.pid();
    let agent = Agent::watching(["--format", "json"]);
    agent.0.stderr_line(|line| line.starts_with("watching every process"));
    let counted = workload.run();
    agent.interrupt();
    let seen = agent.captured().of_process(pid);
    seen.assert_well_formed();
    assert_eq!(seen.counts(), counted);
}

#[test]
fn a_window_with_a_length_ends_by_itself() {
    let Some(_kernel) = Kernel::acquire() else { return };
    let mut workload = Workload::ready(&[&FOREVER[..], &["--tasks", "2"]].concat());
    workload.0.send_line();
    let agent = Agent::watching(["--pid", &workload.pid(), "--format", "json", "--duration", "0.5"]);
    let seen = agent.captured();
    assert!(seen.capture.end_ns - seen.capture.start_ns >= 500_000_000);
    assert!(!seen.traces.is_empty());
    assert!(workload.0.is_running());
}
