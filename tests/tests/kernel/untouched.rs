//! Tracing changes nothing for the traced.

use std::collections::BTreeMap;

use tempfile::tempdir;
use wasmscope_tests::agent::Agent;
use wasmscope_tests::environment::{self, Kernel};
use wasmscope_tests::samples::{self, sums};
use wasmscope_tests::workload::{Counts, UNREACHABLE, Workload};

/// A minute: some 180 rounds of about a dozen naps of 25 ms.
const STEADY: [&str; 14] = [
    "--scenario",
    "steady",
    "--mode",
    "async",
    "--pooling",
    "--tasks",
    "16",
    "--threads",
    "4",
    "--calls",
    "10",
    "--nap-us",
    "25000",
    "--repeat=180",
];

#[test]
fn a_minute_of_full_tracing_changes_no_result_no_backtrace_and_no_exit_status() {
    let Some(_kernel) = Kernel::acquire() else { return };
    let Some(python) = environment::python() else { return };
    let directory = tempdir().unwrap();
    let file = directory.path().join("metrics.txt");
    let untraced = Workload::start(&STEADY);
    let traced = Workload::ready(&STEADY);
    let agent = Agent::watching([
        "--pid",
        &traced.pid(),
        "--format",
        "json",
        "-o",
        "/dev/null",
        "--metrics-file",
        file.to_str().unwrap(),
    ]);
    // Both end with success, or this fails.
    let seen = traced.run();
    let expected = Counts::of(&untraced.0.finish().succeeded());
    agent.finish();

    assert_eq!(seen.answers, expected.answers);
    // Three results, and backtraces of five depths.
    assert_eq!(expected.answers.len(), 3 + 5);
    assert_eq!(expected.answers.values().sum::<u64>(), 16 * 2 * 180);
    assert_eq!(seen.host_calls, expected.host_calls);
    assert_eq!(seen.syscalls(), expected.syscalls());
    assert_eq!(
        (seen.traps, seen.suspends, &seen.invocations),
        (expected.traps, expected.suspends, &expected.invocations)
    );

    let samples = samples::read(python, &file);
    assert_eq!(sums(&samples, "wasmscope_events_lost_total", "reason"), BTreeMap::new());
    assert_eq!(sums(&samples, "wasm_host_calls_total", "import"), expected.host_calls);
    assert_eq!(
        sums(&samples, "wasm_invocations_total", "export"),
        BTreeMap::from([("fail".to_owned(), 16 * 180), ("mix".to_owned(), 16 * 180)])
    );
    assert_eq!(
        sums(&samples, "wasm_traps_total", "code"),
        BTreeMap::from([(UNREACHABLE.to_owned(), 16 * 180)])
    );
}
