//! Metrics, in a file and over HTTP.

use std::collections::BTreeMap;
use std::path::Path;

use tempfile::tempdir;
use wasmscope_tests::agent::{Agent, run, wasmscope};
use wasmscope_tests::environment::{self, Kernel};
use wasmscope_tests::http;
use wasmscope_tests::samples::{self, Sample, sums};
use wasmscope_tests::workload::{Numbers, Workload};

/// The syscalls that the workload counts.
fn counted_names(mut numbers: Numbers) -> Numbers {
    numbers.retain(|name, _| ["write", "openat", "pread64", "close", "nanosleep"].contains(&name.as_str()));
    numbers
}

/// Traces one run of the workload with `options` and `--metrics-file`.
fn metrics_of(python: &Path, arguments: &[&str], options: &[&str]) -> (Vec<Sample>, wasmscope_tests::workload::Counts) {
    let directory = tempdir().unwrap();
    let file = directory.path().join("metrics.txt");
    let workload = Workload::ready(arguments);
    let pid = workload.pid();
    let words = [&["--pid", &pid, "--metrics-file", file.to_str().unwrap()], options].concat();
    let agent = Agent::watching(words);
    let counted = workload.run();
    agent.finish();
    (samples::read(python, &file), counted)
}

#[test]
fn counters_in_the_metrics_file_are_what_the_workload_counted() {
    let Some(_kernel) = Kernel::acquire() else { return };
    let Some(python) = environment::python() else { return };
    let arguments = ["--tasks", "4", "--threads", "2", "--calls", "25", "--repeat", "4"];
    let (samples, counted) = metrics_of(python, &arguments, &["--format", "json"]);
    assert_eq!(
        sums(&samples, "wasm_invocations_total", "export"),
        BTreeMap::from([("start".to_owned(), 16)])
    );
    assert_eq!(sums(&samples, "wasm_host_calls_total", "import"), counted.host_calls);
    assert_eq!(
        counted_names(sums(&samples, "wasm_syscalls_total", "syscall")),
        counted.syscalls()
    );
    assert_eq!(
        sums(&samples, "wasm_invocation_duration_seconds_count", "export"),
        BTreeMap::from([("start".to_owned(), 16)])
    );
    let written = sums(&samples, "wasm_io_bytes_total", "direction");
    let lines = 17 * counted.syscalls()["write"];
    assert_eq!(
        written,
        BTreeMap::from([
            ("write".to_owned(), lines),
            ("read".to_owned(), 256 * counted.syscalls()["pread64"])
        ])
    );
    assert_eq!(sums(&samples, "wasmscope_events_lost_total", "reason"), BTreeMap::new());
}

#[test]
fn traps_in_the_metrics_file_are_what_the_workload_counted() {
    let Some(_kernel) = Kernel::acquire() else { return };
    let Some(python) = environment::python() else { return };
    let (samples, mut counted) = metrics_of(python, &["--scenario", "traps", "--calls", "4"], &["--format", "json"]);
    // An error of the host's is not a trap.
    counted.traps.remove("host_error");
    assert_eq!(sums(&samples, "wasm_traps_total", "code"), counted.traps);
}

#[test]
fn syscalls_counted_in_the_kernel_are_what_the_workload_counted() {
    let Some(_kernel) = Kernel::acquire() else { return };
    let Some(python) = environment::python() else { return };
    for mode in ["sync", "async"] {
        let arguments = [
            "--mode",
            mode,
            "--tasks",
            "4",
            "--threads",
            "2",
            "--calls",
            "50",
            "--repeat",
            "4",
        ];
        let (samples, counted) = metrics_of(python, &arguments, &["--metrics-only"]);
        assert_eq!(
            counted_names(sums(&samples, "wasm_syscalls_total", "syscall")),
            counted.syscalls(),
            "{mode}"
        );
        let exports: Vec<_> = sums(&samples, "wasm_syscalls_total", "export").into_keys().collect();
        assert_eq!(exports, ["start"], "{mode}");
    }
}

#[test]
fn metrics_are_served_over_http_while_tracing() {
    let Some(_kernel) = Kernel::acquire() else { return };
    let Some(python) = environment::python() else { return };
    let mut workload = Workload::ready(&["--calls", "20", "--repeat", "3", "--hold"]);
    let words = [
        "--pid",
        &workload.pid(),
        "--format",
        "json",
        "--metrics-listen",
        "127.0.0.1:0",
    ];
    let agent = Agent::watching(words);
    let line = agent.0.stderr_line(|line| line.starts_with("metrics on "));
    workload.0.send_line();
    let counted = workload.0.stdout_line(|line| line.starts_with("{\"scenario\""));
    let counted = wasmscope_tests::workload::Counts::among([counted.as_str()]);

    let directory = tempdir().unwrap();
    let file = directory.path().join("scrape.txt");
    let begun = std::time::Instant::now();
    loop {
        let response = http::get(&line["metrics on ".len()..]);
        let (head, body) = response.split_once("\r\n\r\n").unwrap();
        assert!(head.starts_with("HTTP/1.1 200"), "{head}");
        assert!(
            head.to_lowercase()
                .contains("content-type: application/openmetrics-text; version=1.0.0"),
            "{head}"
        );
        std::fs::write(&file, body).unwrap();
        let seen = sums(&samples::read(python, &file), "wasm_host_calls_total", "import");
        if seen == counted.host_calls {
            break;
        }
        assert!(begun.elapsed() < *wasmscope_tests::running::DEADLINE, "{seen:?}");
    }
    workload.0.finish().succeeded();
    agent.finish();
}

#[test]
fn metrics_are_written_where_there_is_nothing_to_draw() {
    let Some(_kernel) = Kernel::acquire() else { return };
    let Some(python) = environment::python() else { return };
    let directory = tempdir().unwrap();
    let file = directory.path().join("metrics.txt");
    let mut command = wasmscope();
    command
        .args(["trace", "--metrics-file"])
        .arg(&file)
        .args(["--", "/bin/true"]);
    run(command).ended_with(1);
    samples::read(python, &file);
}
