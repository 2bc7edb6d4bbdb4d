//! The ceiling on what probes cost: they are paused while they would cost too much, which is stated, and return afterwards.

use std::time::Instant;

use wasmscope::span::{Bound, Outcome, ProbeKind, Role};
use wasmscope_tests::agent::Agent;
use wasmscope_tests::captured::name_of;
use wasmscope_tests::environment::Kernel;
use wasmscope_tests::http;
use wasmscope_tests::running::DEADLINE;
use wasmscope_tests::workload::{Counts, Workload};

/// Host calls in each invocation of the loop.
const CALLS: u64 = 100_000;
/// Invocations of the loop, and of what comes after it.
const REPEAT: u64 = 150;

/// The sum of a metric's samples that have all of `labels`.
fn metric(url: &str, name: &str, labels: &str) -> f64 {
    let response = http::get(url);
    let lines = response
        .lines()
        .filter(|line| line.starts_with(name) && line.contains(labels));
    lines
        .filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok())
        .sum()
}

#[test]
fn a_tight_loop_pauses_host_calls_and_what_follows_it_is_seen_exactly() {
    let Some(_kernel) = Kernel::acquire() else { return };
    let (calls, repeat) = (CALLS.to_string(), REPEAT.to_string());
    let mut workload = Workload::ready(&["--scenario", "burst", "--calls", &calls, "--repeat", &repeat]);
    let agent = Agent::watching([
        "--pid",
        &workload.pid(),
        "--format",
        "json",
        "--overhead-budget",
        "5",
        "--metrics-listen",
        "127.0.0.1:0",
        "--ring-mib",
        "64",
    ]);
    let line = agent.0.stderr_line(|line| line.starts_with("metrics on "));
    let url = &line["metrics on ".len()..];
    let begun = Instant::now();
    let wait_for = |what: &str, holds: &dyn Fn() -> bool| {
        while !holds() {
            assert!(begun.elapsed() < *DEADLINE, "{what}");
        }
    };

    workload.0.send_line();
    let paused = || metric(url, "wasmscope_site_paused_seconds_total", "probe=\"host_call\"");
    wait_for("host calls are not paused", &|| paused() > 0.0);
    workload.0.stdout_line(|line| line == "calm");
    let is_paused = || metric(url, "wasmscope_paused_processes", "") > 0.0;
    wait_for("probes do not return", &|| !is_paused());
    assert!(metric(url, "wasmscope_probe_cost_seconds", "source=\"measured\"") > 0.0);
    workload.0.send_line();
    let counted = Counts::of(&workload.0.finish().succeeded());
    let seen = agent.captured();

    // Nothing is wrong: every invocation is there, and each host call that was seen was made.
    let known = |layer: &str, reason: &str| layer == "correlate" && reason == "host_call_end_without_begin";
    for loss in &seen.capture.losses {
        assert!(known(&loss.layer, &loss.reason), "{loss:?}");
    }
    assert_eq!(seen.capture.emitted_count, seen.capture.delivered_count);
    assert_eq!(seen.counts().invocations, counted.invocations);
    let host_calls = |root: &wasmscope::span::Span| {
        let calls = root.children.iter().filter(|call| call.role() == Role::HostCall);
        calls.count() as u64
    };
    let (mut missed, mut in_loop, mut exact, mut unfinished) = (0, 0, 0, 0);
    for trace in &seen.traces {
        let function = match &trace.root.kind {
            wasmscope::span::SpanKind::Invoke { function } => name_of(function.as_deref()),
            other => panic!("{other:?}"),
        };
        assert_eq!(trace.root.outcome, Outcome::Ok);
        let count = host_calls(&trace.root);
        if function.ends_with("/enter") {
            assert_eq!((count, &trace.pauses[..]), (0, &[][..]));
        } else if count == 3 && trace.pauses.is_empty() {
            exact += 1;
        } else {
            in_loop += 1;
            missed += CALLS - count;
            let states_pause = trace.pauses.iter().any(|pause| pause.probe == ProbeKind::HostCall);
            assert!(
                count <= CALLS && (count == CALLS || states_pause),
                "{count}, {:?}",
                trace.pauses
            );
            // Only what was open when probes were paused has no end, and it says so.
            for call in &trace.root.children {
                let is_whole = call.end_bound == Bound::Exact && call.outcome == Outcome::Ok;
                let is_cut = call.end_bound == Bound::Open && call.outcome == Outcome::Unfinished;
                assert!(is_whole || is_cut, "{call:?}");
                unfinished += u64::from(is_cut);
            }
        }
    }
    assert_eq!((in_loop, exact), (REPEAT, REPEAT));
    let pauses = seen.traces.iter().flat_map(|trace| &trace.pauses).count() as u64;
    assert!(
        unfinished <= pauses,
        "{unfinished} calls without an end, {pauses} pauses"
    );
    // The hits stopped while it ran.
    assert!(missed > CALLS * REPEAT / 2, "{missed}");
}
