//! Memories and tables that grow, or do not.

use std::collections::BTreeSet;

use wasmscope::span::{Growth, Outcome, Role, Span, SpanKind};
use wasmscope_tests::agent::Agent;
use wasmscope_tests::captured::Captured;
use wasmscope_tests::environment::{self, Kernel};
use wasmscope_tests::samples::{self, sums};
use wasmscope_tests::workload::{Counts, Numbers, Workload};

fn traced(mode: &str, pooling: &[&str]) -> (Captured, Counts, Numbers) {
    traced_with(mode, pooling, &[])
}

fn traced_with(mode: &str, pooling: &[&str], options: &[&str]) -> (Captured, Counts, Numbers) {
    let arguments = ["--scenario", "grow", "--mode", mode, "--tasks", "3", "--threads", "2"];
    let workload = Workload::ready(&[&arguments, pooling].concat());
    let pid = workload.pid();
    let agent = Agent::watching(["--pid", &pid, "--format", "json"].iter().chain(options));
    let (counted, notes) = workload.run_with_notes();
    (agent.captured(), counted, notes)
}

fn growths(seen: &Captured) -> impl Iterator<Item = (&Span, &Growth)> {
    let spans = seen.traces.iter().flat_map(|trace| trace.root.walk());
    spans.filter_map(|span| match &span.kind {
        SpanKind::MemoryGrow(growth) | SpanKind::TableGrow(growth) => Some((span, growth)),
        _ => None,
    })
}

/// What was seen to grow, in the words of the host.
fn told(seen: &Captured) -> Numbers {
    let mut told = Numbers::new();
    for (span, growth) in growths(seen) {
        let what = match (span.role(), growth.index) {
            (Role::TableGrow, 0) => "handlers",
            (Role::MemoryGrow, 0) => "memory",
            (Role::MemoryGrow, 1) => "other",
            other => panic!("{other:?}"),
        };
        let delta = growth.delta;
        let how = match (&span.outcome, growth.old, growth.new) {
            (Outcome::Ok, Some(old), Some(new)) => format!("{old}+{delta}={new}"),
            (outcome, None, None) => format!("+{delta} {}", outcome.as_str()),
            other => panic!("{other:?}"),
        };
        let maximum = growth
            .maximum
            .map_or_else(|| "?".to_owned(), |maximum| maximum.to_string());
        *told.entry(format!("{what} {how} of {maximum}")).or_default() += 1;
    }
    told
}

#[test]
fn each_growth_is_told_with_its_sizes() {
    let Some(_kernel) = Kernel::acquire() else { return };
    for (mode, pooling) in [("sync", [].as_slice()), ("async", &[]), ("async", &["--pooling"])] {
        let (seen, counted, notes) = traced(mode, pooling);
        seen.assert_nothing_lost();
        seen.assert_well_formed();
        assert_eq!(told(&seen), notes, "{mode}");
        assert_eq!(seen.counts(), counted, "{mode}");
        let pages: u64 = growths(&seen)
            .filter(|(span, _)| span.role() == Role::MemoryGrow)
            .count() as u64;
        assert!(pages >= 3 * 50, "{pages}");
        let instances: BTreeSet<_> = growths(&seen).map(|(_, growth)| growth.instance).collect();
        assert_eq!(instances.len(), 3, "one for each task");
    }
}

/// The host's own sizes after each growth, pages.
fn sizes<'a>(notes: &'a Numbers, memory: &'a str) -> impl Iterator<Item = u64> + 'a {
    notes.keys().filter_map(move |note| {
        let (_, after) = note.strip_prefix(memory)?.split_once('=')?;
        after.split(' ').next()?.parse().ok()
    })
}

#[test]
fn gauges_of_memory_are_the_hosts_own_largest_and_the_modules_maximum() {
    const PAGE: u64 = 65_536;

    let Some(_kernel) = Kernel::acquire() else { return };
    let Some(python) = environment::python() else { return };
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("metrics.txt");
    let (_, _, notes) = traced_with("sync", &[], &["--metrics-file", file.to_str().unwrap()]);
    let largest = sizes(&notes, "memory ").chain(sizes(&notes, "other ")).max().unwrap();
    assert!(largest > 20, "{notes:?}");
    let samples = samples::read(python, &file);
    let of_module = |pages: u64| Numbers::from([("grow".to_owned(), pages * PAGE)]);
    assert_eq!(sums(&samples, "wasm_memory_bytes", "module"), of_module(largest));
    // The other memory declares none.
    assert_eq!(sums(&samples, "wasm_memory_max_bytes", "module"), of_module(80));
}

#[test]
fn a_growth_says_which_function_asked() {
    let Some(_kernel) = Kernel::acquire() else { return };
    let (seen, ..) = traced("sync", &[]);
    let askers: BTreeSet<_> = growths(&seen)
        .map(|(span, growth)| {
            assert!(growth.wasm_offset.is_some(), "{growth:?}");
            let asker = growth.function.as_ref().expect("it is known who asked");
            (span.role(), asker.name.as_str())
        })
        .collect();
    let expected = [
        (Role::MemoryGrow, "more"),
        (Role::MemoryGrow, "other_grow"),
        (Role::TableGrow, "table_grow"),
    ];
    assert_eq!(askers, BTreeSet::from(expected));
}
