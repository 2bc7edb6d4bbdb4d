//! Which traces `wasmscope agent` sends, and what becomes of those that the collector does not take, or not all of.

use rustix::process::Signal;
use wasmscope_tests::environment::{self, Kernel};
use wasmscope_tests::otlp_receiver::{Answer, Receiver};
use wasmscope_tests::samples::sums;
use wasmscope_tests::workload::{Counts, Numbers};

use crate::agent::{Node, lost_on_export};
use crate::export::text;

/// What each of two programs calls, of one export of its own.
const CALLS: u64 = 24;
const BURST: u64 = 5;

#[tokio::test(flavor = "multi_thread")]
async fn of_each_export_no_more_traces_leave_than_its_rate_allows_and_every_call_is_counted() {
    let Some(_kernel) = Kernel::acquire() else { return };
    let Some(python) = environment::python() else { return };
    let receiver = Receiver::start(Answer::Accept).unwrap();
    let node = Node::start(&[
        ("WASMSCOPE_TRACES__TARGET__ENDPOINT", &receiver.endpoint()),
        // The next one could leave after a quarter of an hour.
        ("WASMSCOPE_TRACES__SAMPLING__TRACES_PER_SECOND", "0.001"),
        ("WASMSCOPE_TRACES__SAMPLING__BURST", &BURST.to_string()),
        ("WASMSCOPE_GOVERNOR__ENABLED", "false"),
    ]);
    let repeat = CALLS.to_string();
    let mut workloads = ["calls", "writes"].map(|scenario| {
        node.ready(
            python,
            &["--scenario", scenario, "--calls", "1", "--repeat", &repeat, "--hold"],
        )
    });
    let mut counted = Numbers::new();
    for workload in &mut workloads {
        workload.0.send_line();
        let line = workload.0.stdout_line(|line| line.starts_with("{\"scenario\""));
        for (name, count) in Counts::among([line.as_str()]).invocations {
            let (_, export) = name.split_once('/').unwrap();
            assert_eq!((counted.insert(export.to_owned(), count), count), (None, CALLS));
        }
    }
    assert_eq!(counted.len(), 2);

    let kept = 2 * BURST;
    node.settles(python, kept, [kept, 0, 0]);
    // What the kernel has counted is read while they live.
    node.wait_for(python, "wasm_invocations_total", "export", &counted);
    let mut decisions = sums(&node.scrape(python), "wasmscope_traces_sampled_total", "decision");
    decisions.retain(|_, count| *count > 0);
    let expected = [("kept", kept), ("rate_limited", 2 * (CALLS - BURST))];
    assert_eq!(
        decisions,
        Numbers::from(expected.map(|(decision, count)| (decision.to_owned(), count)))
    );
    let mut roots = Numbers::new();
    for root in receiver.spans().iter().filter(|span| span.parent_span_id.is_empty()) {
        let export = text(root, "wasm.function.name").unwrap();
        *roots.entry(export.to_owned()).or_default() += 1;
    }
    let expected: Numbers = counted.into_keys().map(|export| (export, BURST)).collect();
    assert_eq!(roots, expected);

    for workload in workloads {
        workload.0.finish().succeeded();
    }
    node.agent.signal(Signal::TERM);
    node.agent.finish().succeeded();
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_collector_refuses_and_rejects_is_counted_and_told_at_the_end_over_either_protocol() {
    let Some(_kernel) = Kernel::acquire() else { return };
    let Some(python) = environment::python() else { return };
    for protocol in ["grpc", "http/protobuf"] {
        let receiver = Receiver::start(Answer::Refuse).unwrap();
        let node = Node::start(&[
            ("WASMSCOPE_TRACES__TARGET__ENDPOINT", &receiver.endpoint()),
            ("WASMSCOPE_TRACES__TARGET__PROTOCOL", protocol),
            ("WASMSCOPE_GOVERNOR__ENABLED", "false"),
        ]);
        // One call is one trace is one request.
        let call = || {
            let counted = node.ready(python, &["--calls", "1"]).run();
            assert_eq!(counted.invocations.values().sum::<u64>(), 1);
        };
        call();
        node.settles(python, 1, [0, 1, 0]);
        receiver.answer(Answer::AcceptPartly(3));
        call();
        node.settles(python, 2, [1, 1, 0]);
        let lost = [("export_failed".to_owned(), 1), ("spans_rejected".to_owned(), 3)];
        assert_eq!(lost_on_export(&node.scrape(python)), Numbers::from(lost), "{protocol}");

        // The last one is sent again and again, until the agent has been told to end.
        let seen = receiver.received().len();
        receiver.answer(Answer::Throttle(1));
        call();
        receiver.wait_for(|received| received.len() > seen).await;
        node.settles(python, 3, [1, 1, 1]);
        node.agent.signal(Signal::TERM);
        node.agent.stderr_line(|line| line.contains("draining"));
        receiver.answer(Answer::AcceptPartly(2));
        let finished = node.agent.finish().ended_with(3);
        let last = finished.stderr.last().unwrap();
        assert!(last.contains("not everything was delivered"), "{last}");
        // What was told before is not told again.
        for part in ["delivered=1 lost=0 exported=2 ", " spans_rejected=2 "] {
            assert!(last.contains(part), "{protocol}: {last}");
        }
    }
}
