//! Tracing changes nothing for the traced.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::time::Duration;

use serde::Deserialize;
use tempfile::tempdir;
use wasmscope_tests::agent::Agent;
use wasmscope_tests::environment::{self, Kernel};
use wasmscope_tests::running::Finished;
use wasmscope_tests::samples::{self, sums};
use wasmscope_tests::workload::{Counts, UNREACHABLE, Workload};

/// What the issue calls a minute.
const LEAST: Duration = Duration::from_mins(1);
/// Rounds of about a dozen naps of 25 ms each, which last that long and a little more.
const ROUNDS: u64 = 210;
const REPEAT: &str = "--repeat=210";

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
    REPEAT,
];

#[derive(Deserialize)]
struct Run {
    elapsed_ns: u64,
}

/// How long a workload says that its tasks ran, and what it counted.
fn told(finished: &Finished) -> (Duration, Counts) {
    let line = finished.stdout.iter().find(|line| line.starts_with("{\"scenario\""));
    let run: Run = serde_json::from_str(line.expect("the workload prints its counts")).expect("counts are JSON");
    (Duration::from_nanos(run.elapsed_ns), Counts::of(finished))
}

#[test]
fn a_minute_of_full_tracing_changes_no_result_no_backtrace_and_no_exit_status() {
    let Some(_kernel) = Kernel::acquire() else { return };
    let Some(python) = environment::python() else { return };
    let directory = tempdir().unwrap();
    let file = directory.path().join("metrics.txt");
    assert_eq!(REPEAT, format!("--repeat={ROUNDS}"));
    // Probes are in a file, whoever runs it: the control runs from one of its own, which nobody watches.
    let host = environment::test_host("workload");
    let copy = directory.path().join("workload");
    fs::copy(&host, &copy).unwrap();
    assert_ne!(fs::metadata(&host).unwrap().ino(), fs::metadata(&copy).unwrap().ino());
    let mut untraced = Workload::ready_as(&copy, &STEADY);
    let mut traced = Workload::ready_as(&host, &STEADY);
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
    untraced.0.send_line();
    traced.0.send_line();
    let (elapsed, seen) = told(&traced.0.finish().succeeded());
    let (_, expected) = told(&untraced.0.finish().succeeded());
    agent.finish();

    assert!(elapsed >= LEAST, "not what this test is about: it ran only {elapsed:?}");
    assert_eq!(seen.answers, expected.answers);
    // Three results, and backtraces of five depths.
    assert_eq!(expected.answers.len(), 3 + 5);
    assert_eq!(expected.answers.values().sum::<u64>(), 16 * 2 * ROUNDS);
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
        BTreeMap::from([("fail".to_owned(), 16 * ROUNDS), ("mix".to_owned(), 16 * ROUNDS)])
    );
    assert_eq!(
        sums(&samples, "wasm_traps_total", "code"),
        BTreeMap::from([(UNREACHABLE.to_owned(), 16 * ROUNDS)])
    );
}
