//! What the kernel counts by itself: equal to what programs count, and to what a full trace of the same run counts.

use std::collections::BTreeMap;

use tempfile::tempdir;
use wasmscope_tests::agent::Agent;
use wasmscope_tests::captured::{Captured, is_counted};
use wasmscope_tests::environment::{self, Kernel};
use wasmscope_tests::samples::{self, Sample, sums};
use wasmscope_tests::workload::{Counts, Numbers, Workload};

use crate::traced_metrics;

/// One run of each kind: plain, on fibers that move between threads, nested, failing, components.
const RUNS: [&[&str]; 6] = [
    &["--tasks", "4", "--threads", "2", "--calls", "25", "--repeat", "4"],
    &[
        "--mode",
        "async",
        "--tasks",
        "8",
        "--threads",
        "2",
        "--calls",
        "25",
        "--repeat",
        "4",
    ],
    &["--scenario", "nested", "--calls", "5", "--repeat", "3"],
    &[
        "--scenario",
        "nested",
        "--mode",
        "async",
        "--tasks",
        "4",
        "--threads",
        "2",
        "--calls",
        "5",
    ],
    &["--scenario", "traps", "--calls", "4"],
    &["--scenario", "components", "--calls", "10"],
];

fn traced(python: &std::path::Path, arguments: &[&str], options: &[&str]) -> (Vec<Sample>, Vec<String>, Counts) {
    let directory = tempdir().unwrap();
    let file = directory.path().join("metrics.txt");
    let workload = Workload::ready(arguments);
    let pid = workload.pid();
    let words = [&["--pid", &pid, "--metrics-file", file.to_str().unwrap()], options].concat();
    let agent = Agent::watching(words);
    let counted = workload.run();
    let finished = agent.finish();
    (samples::read(python, &file), finished.stdout, counted)
}

/// By export alone, as the metrics have it.
pub(crate) fn by_export(invocations: &Numbers) -> Numbers {
    let mut exports = Numbers::new();
    for (name, count) in invocations {
        let export = name.split_once('/').map_or(name.as_str(), |(_, export)| export);
        *exports.entry(export.to_owned()).or_default() += count;
    }
    exports
}

fn counted_syscalls(samples: &[Sample]) -> Numbers {
    let mut syscalls = sums(samples, "wasm_syscalls_total", "syscall");
    syscalls.retain(|name, _| is_counted(name));
    syscalls
}

fn assert_counts(samples: &[Sample], counted: &Counts, what: &str) {
    assert_eq!(
        sums(samples, "wasm_invocations_total", "export"),
        by_export(&counted.invocations),
        "{what}"
    );
    assert_eq!(
        sums(samples, "wasm_host_calls_total", "import"),
        counted.host_calls,
        "{what}"
    );
    // Every one of them has begun and ended while the probes were there.
    for (counter, histogram, label) in [
        (
            "wasm_invocations_total",
            "wasm_invocation_duration_seconds_count",
            "export",
        ),
        (
            "wasm_host_calls_total",
            "wasm_host_call_duration_seconds_count",
            "import",
        ),
    ] {
        assert_eq!(sums(samples, histogram, label), sums(samples, counter, label), "{what}");
    }
}

#[test]
fn aggregates_without_events_are_what_the_workload_counted() {
    let Some(_kernel) = Kernel::acquire() else { return };
    let Some(python) = environment::python() else { return };
    for arguments in RUNS {
        let what = arguments.join(" ");
        let (samples, _, counted) = traced(python, arguments, &["--metrics-only"]);
        assert_counts(&samples, &counted, &what);
        let traps: u64 = counted.traps.values().sum();
        let outcomes = sums(&samples, "wasm_invocations_total", "outcome");
        let failed: u64 = ["trap", "host_error", "exit"]
            .iter()
            .filter_map(|word| outcomes.get(*word))
            .sum();
        assert_eq!(failed, traps, "{what}: {outcomes:?}");
        assert_eq!(
            sums(&samples, "wasmscope_events_lost_total", "reason"),
            BTreeMap::new(),
            "{what}"
        );
    }
}

#[test]
fn aggregates_beside_events_are_what_the_full_trace_counts() {
    let Some(_kernel) = Kernel::acquire() else { return };
    let Some(python) = environment::python() else { return };
    for arguments in RUNS {
        let what = arguments.join(" ");
        let (samples, lines, counted) = traced(python, arguments, &["--kernel-metrics", "--format", "json"]);
        assert_counts(&samples, &counted, &what);
        let traced = Captured::parse(&lines);
        traced.assert_nothing_lost();
        traced_metrics::assert_equal(
            &traced_metrics::served(&samples),
            &traced_metrics::traced(&traced.traces),
            &what,
        );
        let traced = traced.counts();
        assert_eq!(traced.invocations, counted.invocations, "{what}");
        assert_eq!(
            sums(&samples, "wasm_host_calls_total", "import"),
            traced.host_calls,
            "{what}"
        );
        assert_eq!(counted_syscalls(&samples), traced.syscalls(), "{what}");
    }
}

#[test]
fn aggregates_are_exact_while_the_ring_loses_events() {
    let Some(_kernel) = Kernel::acquire() else { return };
    let Some(python) = environment::python() else { return };
    let arguments = ["--scenario", "leave", "--calls", "200000", "--repeat", "2"];
    let options = ["--kernel-metrics", "--format", "json", "--ring-mib", "1"];
    let (samples, _, counted) = traced(python, &arguments, &options);
    let lost = sums(&samples, "wasmscope_events_lost_total", "reason");
    assert!(lost.get("ring_full").copied().unwrap_or(0) > 0, "{lost:?}");
    assert_counts(&samples, &counted, "flood");
    let records = |name: &str| {
        let found = samples.iter().find(|sample| sample.name == name);
        found.and_then(|sample| sample.value).map_or(0, |value| value as u64)
    };
    assert_eq!(
        records("wasmscope_records_emitted_total"),
        records("wasmscope_records_delivered_total") + lost["ring_full"],
        "{lost:?}"
    );
}

#[test]
fn syscalls_that_do_not_return_are_counted_as_they_are_traced() {
    let Some(_kernel) = Kernel::acquire() else { return };
    let Some(python) = environment::python() else { return };
    for (scenario, syscall) in [("exec-mid-call", "execve"), ("exit-mid-call", "exit_group")] {
        let arguments = ["--scenario", scenario];
        let (samples, lines, _) = traced(python, &arguments, &["--kernel-metrics", "--format", "json"]);
        let traced = Captured::parse(&lines).counts().syscalls();
        let counted = sums(&samples, "wasm_syscalls_total", "syscall");
        assert_eq!(traced.get(syscall), Some(&1), "{scenario}: {traced:?}");
        assert_eq!(counted.get(syscall), Some(&1), "{scenario}: {counted:?}");
        assert_eq!(counted_syscalls(&samples), traced, "{scenario}");
    }
}
