//! A host without symbols: its syscalls and whom they were made for, whatever else is learnt of it.

use std::path::PathBuf;

use tempfile::{TempDir, tempdir};
use wasmscope::span::{Role, SpanKind};
use wasmscope_tests::agent::Agent;
use wasmscope_tests::captured::{Captured, is_counted, name_of, stack_names};
use wasmscope_tests::environment::{self, Kernel};
use wasmscope_tests::workload::{Numbers, Workload, stripped};

fn stripped_workload() -> (TempDir, PathBuf) {
    let directory = tempdir().unwrap();
    let path = directory.path().join("workload");
    stripped(&environment::test_host("workload"), &path);
    (directory, path)
}

/// Syscalls by name, of those that were made for `emit`, below `calls/start`.
fn made_for_emit(seen: &Captured) -> Numbers {
    let mut numbers = Numbers::new();
    for trace in &seen.traces {
        let SpanKind::Invoke { function } = &trace.root.kind else {
            panic!("{:?}", trace.root)
        };
        assert_eq!(name_of(function.as_deref()), "calls/start");
        for span in trace.root.walk().filter(|span| span.role() == Role::Syscall) {
            assert_eq!(stack_names(span), ["emit", "loop_emit", "start"], "{span:?}");
            if let SpanKind::Syscall { name, .. } = &span.kind {
                *numbers.entry(name.clone()).or_default() += 1;
            }
        }
    }
    numbers.retain(|name, _| is_counted(name));
    numbers
}

#[test]
fn every_syscall_of_a_stripped_host_has_its_guest_functions() {
    let Some(_kernel) = Kernel::acquire() else { return };
    let (_directory, program) = stripped_workload();
    for mode in ["sync", "async"] {
        let arguments = [
            "--mode",
            mode,
            "--tasks",
            "6",
            "--threads",
            "3",
            "--calls",
            "50",
            "--repeat",
            "3",
        ];
        let workload = Workload::ready_as(&program, &arguments);
        let agent = Agent::json_of(&workload.pid());
        let counted = workload.run();
        let seen = agent.captured();
        assert_eq!(
            made_for_emit(&seen),
            counted.syscalls(),
            "{mode}; losses: {:?}",
            seen.capture.losses
        );
        seen.assert_lost_only_before_calibration();
    }
}

#[test]
fn a_stripped_host_that_compiles_under_trace_loses_only_what_is_counted() {
    let Some(_kernel) = Kernel::acquire() else { return };
    let (_directory, program) = stripped_workload();
    let arguments = [
        "--tasks",
        "4",
        "--threads",
        "2",
        "--calls",
        "50",
        "--repeat",
        "4",
        "--compile-after-wait",
    ];
    let workload = Workload::ready_as(&program, &arguments);
    let agent = Agent::json_of(&workload.pid());
    let counted = workload.run();
    let seen = agent.captured();
    let made = counted.syscalls();
    let found = made_for_emit(&seen);
    for (name, count) in &found {
        assert!(*count <= made[name], "{count} {name} seen, {} made", made[name]);
    }
    seen.assert_lost_only_before_calibration();
    let missing = made.values().sum::<u64>() - found.values().sum::<u64>();
    let lost = seen.lost("kernel", "uncalibrated");
    let losses = &seen.capture.losses;
    assert!(
        missing <= lost,
        "{missing} missing: {found:?} of {made:?}; losses: {losses:?}"
    );
    assert!(!found.is_empty());
}

#[test]
fn tier_0_of_a_host_with_symbols_sees_the_same_syscalls() {
    let Some(_kernel) = Kernel::acquire() else { return };
    let workload = Workload::ready(&["--tasks", "4", "--threads", "2", "--calls", "50"]);
    let agent = Agent::watching(["--pid", &workload.pid(), "--format", "json", "--tier", "0"]);
    let counted = workload.run();
    let seen = agent.captured();
    assert_eq!(
        made_for_emit(&seen),
        counted.syscalls(),
        "losses: {:?}",
        seen.capture.losses
    );
    seen.assert_nothing_lost();
}

#[test]
fn a_stripped_host_is_said_to_be_one() {
    let Some(_kernel) = Kernel::acquire() else { return };
    let (_directory, program) = stripped_workload();
    let workload = Workload::ready_as(&program, &["--calls", "5"]);
    let agent = Agent::json_of(&workload.pid());
    workload.run();
    let finished = agent.finish();
    let watching = finished
        .stderr
        .iter()
        .find(|line| line.starts_with("watching"))
        .unwrap();
    assert!(watching.contains("stripped"), "{watching}");
    let seen = Captured::parse(&finished.stdout);
    assert!(!seen.traces[0].process.limits.is_empty());
}
