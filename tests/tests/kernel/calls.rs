//! Host calls and their syscalls, of guests called synchronously and asynchronously, on one thread and on several.

use tempfile::tempdir;
use wasmscope::span::{Outcome, Role, Span};
use wasmscope_tests::agent::Agent;
use wasmscope_tests::captured::{Captured, name_of, stack_names};
use wasmscope_tests::environment::{self, Kernel};
use wasmscope_tests::workload::{Counts, Workload};

/// What the workload runs, to the letter.
fn assert_equal(seen: &Captured, counted: &Counts) {
    seen.assert_nothing_lost();
    seen.assert_well_formed();
    assert_eq!(&seen.counts(), counted);
}

/// Every trace of `calls` is one invocation with so many rounds of its four host calls, in order, each with its own syscalls.
fn assert_each_is_one_invocation(seen: &Captured, rounds: usize, nap: &[&str]) {
    let of_a_round: [(&str, &[&str]); 4] = [
        ("add", &[]),
        ("write", &["write"]),
        ("nap", nap),
        ("read_file", &["openat", "pread64", "close"]),
    ];
    for trace in &seen.traces {
        let root = &trace.root;
        assert_eq!(function_of(root), "calls/start");
        assert_eq!(root.outcome, Outcome::Ok);
        assert_eq!(root.children.len(), rounds * of_a_round.len(), "{}", trace.trace_id);
        for (call, (import, syscalls)) in root.children.iter().zip(of_a_round.iter().cycle()) {
            assert_eq!((call.role(), import_of(call)), (Role::HostCall, *import));
            assert_eq!(call.outcome, Outcome::Ok);
            assert_eq!(stack_names(call), ["emit", "loop_emit", "start"]);
            assert_eq!(syscalls_of(call), *syscalls);
            for syscall in &call.children {
                assert_eq!(stack_names(syscall), ["emit", "loop_emit", "start"]);
            }
        }
    }
}

fn function_of(span: &Span) -> String {
    match &span.kind {
        wasmscope::span::SpanKind::Invoke { function } => name_of(function.as_deref()),
        other => panic!("{other:?} is no invocation"),
    }
}

fn import_of(span: &Span) -> &str {
    match &span.kind {
        wasmscope::span::SpanKind::HostCall { import: Some(import) } => &import.name,
        other => panic!("{other:?} is no host call with a name"),
    }
}

/// Those that the workload makes on purpose.
fn syscalls_of(span: &Span) -> Vec<&str> {
    let name = |span: &'_ Span| match &span.kind {
        wasmscope::span::SpanKind::Syscall { name, .. } => name.clone(),
        other => panic!("{other:?} is no syscall"),
    };
    let known = ["write", "openat", "pread64", "close", "nanosleep"];
    span.children
        .iter()
        .filter_map(|child| known.into_iter().find(|known| *known == name(child)))
        .collect()
}

/// Attaches to a workload that is ready to go, and lets it go.
fn traced(arguments: &[&str]) -> (Captured, Counts) {
    let workload = Workload::ready(arguments);
    let agent = Agent::json_of(&workload.pid());
    let counted = workload.run();
    (agent.captured(), counted)
}

#[test]
fn a_running_process_with_several_threads_is_seen_exactly() {
    let Some(_kernel) = Kernel::acquire() else { return };
    let arguments = [
        "--tasks",
        "8",
        "--threads",
        "4",
        "--calls",
        "50",
        "--repeat",
        "5",
        "--nap-us",
        "20",
    ];
    let (seen, counted) = traced(&arguments);
    assert_equal(&seen, &counted);
    assert_eq!(counted.invocations["calls/start"], 40);
    assert_each_is_one_invocation(&seen, 50, &["nanosleep"]);
}

#[test]
fn a_program_that_is_started_under_trace_is_seen_from_its_first_call() {
    let Some(_kernel) = Kernel::acquire() else { return };
    let directory = tempdir().unwrap();
    let output = directory.path().join("traces.json");
    let workload = environment::test_host("workload");
    let options = [
        "--format",
        "json",
        "-o",
        output.to_str().unwrap(),
        "--",
        workload.to_str().unwrap(),
    ];
    let arguments = ["--tasks", "4", "--threads", "2", "--calls", "20", "--repeat", "3"];
    let finished = Agent::watching(options.iter().chain(&arguments)).finish();
    let counted = Counts::of(&finished);
    let text = std::fs::read_to_string(output).unwrap();
    let seen = Captured::parse(&text.lines().collect::<Vec<_>>());
    assert_equal(&seen, &counted);
    assert_each_is_one_invocation(&seen, 20, &["nanosleep"]);
}

#[test]
fn fibers_that_move_between_threads_keep_their_calls() {
    let Some(_kernel) = Kernel::acquire() else { return };
    for allocator in [&[][..], &["--pooling"]] {
        let arguments = [
            &["--mode", "async", "--tasks", "16", "--threads", "4", "--calls", "100"][..],
            allocator,
        ]
        .concat();
        let (seen, counted) = traced(&arguments);
        assert!(counted.moves > 0, "{counted:?}");
        assert_eq!(counted.suspends, 1600);
        assert_equal(&seen, &counted);
        assert_each_is_one_invocation(&seen, 100, &[]);
        for trace in &seen.traces {
            assert_eq!(trace.root.suspends.len(), 100);
            for call in &trace.root.children {
                assert_eq!(call.suspends.len(), usize::from(import_of(call) == "nap"), "{call:?}");
            }
        }
    }
}

#[test]
fn ten_thousand_host_calls_on_four_threads_and_on_sixteen_fibers_are_each_seen_once() {
    let Some(_kernel) = Kernel::acquire() else { return };
    for arguments in [
        ["--mode", "sync", "--tasks", "4", "--threads", "4", "--calls", "625"],
        ["--mode", "async", "--tasks", "16", "--threads", "4", "--calls", "160"],
    ] {
        let (seen, counted) = traced(&arguments);
        assert!(counted.host_calls.values().sum::<u64>() >= 10_000, "{counted:?}");
        assert_equal(&seen, &counted);
    }
}

#[test]
fn code_compiled_ahead_of_time_and_mapped_from_a_file_is_seen_exactly() {
    let Some(_kernel) = Kernel::acquire() else { return };
    for (mode, nap) in [("sync", &["nanosleep"][..]), ("async", &[])] {
        let (seen, counted) = traced(&["--scenario", "cwasm", "--mode", mode, "--calls", "20", "--repeat", "3"]);
        assert_equal(&seen, &counted);
        assert_each_is_one_invocation(&seen, 20, nap);
    }
}

#[test]
fn two_invocations_never_share_a_trace_id() {
    let Some(_kernel) = Kernel::acquire() else { return };
    let (seen, counted) = traced(&[
        "--tasks",
        "2",
        "--threads",
        "2",
        "--calls",
        "1",
        "--repeat",
        "200",
        "--nap-us",
        "1",
    ]);
    assert_equal(&seen, &counted);
    let mut ids: Vec<_> = seen.traces.iter().map(|trace| &trace.trace_id).collect();
    ids.sort();
    ids.dedup();
    assert_eq!(ids.len(), 400);
}
