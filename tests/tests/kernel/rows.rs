//! The rows in which the kernel counts: each process has its own, as many as it may have, and gives them back.

use std::path::Path;

use wasmscope_tests::environment::{self, Kernel};
use wasmscope_tests::running::DEADLINE;
use wasmscope_tests::samples::sums;
use wasmscope_tests::workload::{Counts, Numbers, Workload};

use crate::agent::Node;
use crate::aggregates::by_export;

fn node() -> Node {
    Node::start(&[
        ("WASMSCOPE_GOVERNOR__ENABLED", "false"),
        ("WASMSCOPE_TRACES__SAMPLING__TRACES_PER_SECOND", "1000000"),
        ("WASMSCOPE_TRACES__SAMPLING__BURST", "1000000"),
    ])
}

/// Waits until this holds of the entries of the agent's tables.
fn wait_for_tables(node: &Node, python: &Path, holds: impl Fn(&Numbers) -> bool) {
    let begun = std::time::Instant::now();
    loop {
        let tables = sums(&node.scrape(python), "wasmscope_table_entries", "table");
        if holds(&tables) {
            return;
        }
        assert!(begun.elapsed() < *DEADLINE, "{tables:?}");
    }
}

fn counted(workload: &mut Workload) -> Counts {
    workload.0.send_line();
    let line = workload.0.stdout_line(|line| line.starts_with("{\"scenario\""));
    Counts::among([line.as_str()])
}

#[test]
fn workers_forked_by_a_watched_host_are_counted_exactly_and_give_their_rows_back() {
    let Some(_kernel) = Kernel::acquire() else { return };
    let Some(python) = environment::python() else { return };
    let arguments = ["--fork", "5", "--calls", "20", "--repeat", "10", "--hold"];
    let mut workload = Workload::ready_python(python, "pywasm.py", &arguments);
    let node = node();
    let counts = counted(&mut workload);
    assert_eq!(counts.invocations.values().sum::<u64>(), 60);
    node.wait_for(python, "wasm_host_calls_total", "import", &counts.host_calls);
    node.wait_for(
        python,
        "wasm_invocations_total",
        "module",
        &Numbers::from([("pyguest".to_owned(), 60)]),
    );
    let samples = node.scrape(python);
    let syscalls = sums(&samples, "wasm_syscalls_total", "syscall");
    for (name, count) in counts.syscalls() {
        assert_eq!(syscalls.get(&name), Some(&count), "{name}");
    }
    wait_for_tables(&node, python, |tables| {
        tables["bpf_processes"] == 6 && tables["bpf_rows"] > 0
    });
    drop(workload.0.finish().succeeded());
    wait_for_tables(&node, python, |tables| {
        tables["bpf_processes"] == 0 && tables["bpf_rows"] == 0 && tables["processes"] == 0
    });
    let samples = node.scrape(python);
    assert_eq!(sums(&samples, "wasm_host_calls_total", "import"), counts.host_calls);
}

#[test]
fn a_process_with_more_rows_than_its_share_loses_names_but_no_counts_and_takes_none_of_its_neighbours() {
    let Some(_kernel) = Kernel::acquire() else { return };
    let Some(python) = environment::python() else { return };
    let mut crowd = Workload::ready(&["--scenario", "sites", "--repeat", "20", "--hold"]);
    let mut neighbour = Workload::ready(&["--calls", "15", "--repeat", "4", "--hold"]);
    let node = node();
    let (crowd_counts, counts) = (counted(&mut crowd), counted(&mut neighbour));
    let total = |counts: &Counts| counts.host_calls.values().sum::<u64>();
    assert_eq!(total(&crowd_counts), 60_000);

    let begun = std::time::Instant::now();
    let by_module = loop {
        let by_module = sums(&node.scrape(python), "wasm_host_calls_total", "module");
        let seen: u64 = by_module.values().sum();
        if seen == total(&crowd_counts) + total(&counts) {
            break by_module;
        }
        assert!(begun.elapsed() < *DEADLINE, "{by_module:?}");
    };
    // Some rows of it are its own, all the others are one that has no names.
    let (named, unnamed) = (by_module["sites"], by_module["unknown"]);
    assert_eq!(named + unnamed, total(&crowd_counts));
    assert!(named > 0 && unnamed > 0, "{by_module:?}");
    let samples = node.scrape(python);
    let others: Vec<_> = samples
        .iter()
        .filter(|sample| sample.name == "wasm_host_calls_total")
        .filter(|sample| !["sites", "unknown"].contains(&sample.labels["module"].as_str()))
        .cloned()
        .collect();
    assert_eq!(sums(&others, "wasm_host_calls_total", "import"), counts.host_calls);
    let outcomes = sums(&samples, "wasm_host_calls_total", "outcome");
    assert_eq!(
        outcomes,
        Numbers::from([("ok".to_owned(), named + total(&counts)), ("other".to_owned(), unnamed)])
    );
    // Its invocations end when all of its rows are taken.
    let exports = sums(&samples, "wasm_invocations_total", "export");
    let mut invocations = by_export(&counts.invocations);
    invocations.insert("unknown".to_owned(), crowd_counts.invocations.values().sum());
    assert_eq!(exports, invocations);
    // All of it is counted, so that none of it is lost.
    let overflows = sums(&samples, "wasmscope_series_overflow_total", "family");
    assert_eq!(overflows.get("process_rows"), Some(&(unnamed + exports["unknown"])));
    let lost = sums(&samples, "wasmscope_events_lost_total", "reason");
    assert_eq!(lost.get("process_rows_full"), None);

    drop(crowd.0.finish().succeeded());
    drop(neighbour.0.finish().succeeded());
    wait_for_tables(&node, python, |tables| tables["bpf_rows"] == 0);
}
