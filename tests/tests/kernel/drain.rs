//! How `wasmscope agent` ends when the collector never answers: at its deadline or at a second signal, with an exact account.

use rustix::process::Signal;
use wasmscope_tests::environment::{self, Kernel};
use wasmscope_tests::otlp_receiver::{Answer, Receiver};
use wasmscope_tests::workload::{Numbers, Workload};

use crate::agent::Node;

/// An agent whose traces are all with a collector that never answers, and how many they are.
async fn stuck(receiver: &Receiver, python: &std::path::Path, deadline: &str) -> (Node, u64) {
    let workload = Workload::ready(&["--calls", "2", "--repeat", "7"]);
    let node = Node::start(&[
        ("OTEL_EXPORTER_OTLP_ENDPOINT", &receiver.endpoint()),
        // Only the drain's own deadline can end a request.
        ("OTEL_EXPORTER_OTLP_TIMEOUT", "600000"),
        ("WASMSCOPE_OTLP_METRICS__INTERVAL_SECONDS", "1"),
        ("WASMSCOPE_SHUTDOWN__DEADLINE_SECONDS", deadline),
        ("WASMSCOPE_TRACES__SAMPLING__TRACES_PER_SECOND", "1000000"),
        ("WASMSCOPE_TRACES__SAMPLING__BURST", "1000000"),
        ("WASMSCOPE_GOVERNOR__ENABLED", "false"),
    ]);
    let made: u64 = workload.run().invocations.values().sum();
    assert_ne!(made, 0);
    let sampled = [
        "kept",
        "parent_kept",
        "failed_kept",
        "parent_dropped",
        "ratio_dropped",
        "rate_limited",
        "parent_limited",
    ]
    .map(|decision| (decision.to_owned(), if decision == "kept" { made } else { 0 }));
    node.wait_for(
        python,
        "wasmscope_traces_sampled_total",
        "decision",
        &Numbers::from(sampled),
    );
    receiver.wait_for(|received| !received.is_empty()).await;
    node.settles(python, made, [0, 0, made]);
    receiver.wait_for_metrics(|received| !received.is_empty()).await;
    (node, made)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_collector_that_never_answers_costs_the_deadline_and_every_lost_trace_is_told() {
    let Some(_kernel) = Kernel::acquire() else { return };
    let Some(python) = environment::python() else { return };
    let receiver = Receiver::start(Answer::Hang).unwrap();
    let (node, made) = stuck(&receiver, python, "2").await;
    let readings = receiver.metrics().len();
    node.agent.signal(Signal::TERM);
    let finished = node.agent.finish().ended_with(3);
    let text = finished.stderr_text();
    let last = finished
        .stderr
        .iter()
        .find(|line| line.contains("not everything was delivered"));
    let last = last.unwrap_or_else(|| panic!("{text}"));
    assert!(last.contains(&format!("delivered=0 lost={made} ")), "{last}");
    assert!(last.contains("records_handled=true"), "{last}");
    // The last metrics had their time, though the reading before them was still under way and the traces took all of theirs.
    assert_eq!(receiver.metrics().len(), readings + 1, "{text}");
    assert!(!last.contains("points_lost=0"), "{last}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_signal_ends_the_agent_at_once_and_what_is_left_is_told() {
    let Some(_kernel) = Kernel::acquire() else { return };
    let Some(python) = environment::python() else { return };
    let receiver = Receiver::start(Answer::Hang).unwrap();
    // The test gives up long before the drain would.
    let (node, made) = stuck(&receiver, python, "600").await;
    node.agent.signal(Signal::TERM);
    node.agent.stderr_line(|line| line.contains("draining"));
    node.agent.signal(Signal::INT);
    let finished = node.agent.finish().ended_with(3);
    let text = finished.stderr_text();
    assert!(text.contains("second signal"), "{text}");
    assert!(text.contains(&format!("delivered=0 lost={made} ")), "{text}");
}
