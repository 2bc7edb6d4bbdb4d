//! Spans that reach a collector, and what is told when there is none.

use opentelemetry_proto::tonic::common::v1::any_value::Value;
use opentelemetry_proto::tonic::trace::v1::Span;
use wasmscope_tests::agent::Agent;
use wasmscope_tests::environment::Kernel;
use wasmscope_tests::otlp_receiver::{Answer, Receiver, ReservedPort, Transport};
use wasmscope_tests::workload::{Counts, Numbers, Workload};

const ARGUMENTS: [&str; 10] = [
    "--mode",
    "async",
    "--tasks",
    "8",
    "--threads",
    "4",
    "--calls",
    "5",
    "--repeat",
    "3",
];

pub(crate) fn text<'a>(span: &'a Span, key: &str) -> Option<&'a str> {
    match attribute(span, key)? {
        Value::StringValue(text) => Some(text),
        _ => None,
    }
}

fn number(span: &Span, key: &str) -> Option<u64> {
    match attribute(span, key)? {
        Value::IntValue(number) => u64::try_from(*number).ok(),
        _ => None,
    }
}

fn attribute<'a>(span: &'a Span, key: &str) -> Option<&'a Value> {
    let attribute = span.attributes.iter().find(|attribute| attribute.key == key)?;
    attribute.value.as_ref()?.value.as_ref()
}

/// Calls by name, those folded into one span included.
fn by_name(spans: &[Span], role: &str, name: impl Fn(&Span) -> String) -> Numbers {
    let mut numbers = Numbers::new();
    for span in spans.iter().filter(|span| text(span, "wasmscope.role") == Some(role)) {
        *numbers.entry(name(span)).or_default() += number(span, "wasmscope.fold.count").unwrap_or(1);
    }
    numbers
}

pub(crate) fn assert_spans_equal(spans: &[Span], counted: &Counts) {
    let part = |span: &Span, key: &str| text(span, key).unwrap_or("?").to_owned();
    let cut: u64 = spans
        .iter()
        .filter_map(|span| number(span, "wasmscope.cut.span_count"))
        .sum();
    assert_eq!(cut, 0);
    let invocations = by_name(spans, "invoke", |span| {
        format!(
            "{}/{}",
            part(span, "wasm.module.name"),
            part(span, "wasm.function.name")
        )
    });
    assert_eq!(invocations, counted.invocations);
    let host_calls = by_name(spans, "host_call", |span| {
        format!(
            "{}.{}",
            part(span, "wasm.import.module"),
            part(span, "wasm.import.name")
        )
    });
    assert_eq!(host_calls, counted.host_calls);
    let mut syscalls = by_name(spans, "syscall", |span| {
        span.name.split_whitespace().next_back().unwrap_or("").to_owned()
    });
    syscalls.retain(|name, _| counted.syscalls().contains_key(name));
    assert_eq!(syscalls, counted.syscalls());
    // Parents are there, and in the same trace.
    for span in spans.iter().filter(|span| !span.parent_span_id.is_empty()) {
        let is_parent = |other: &&Span| other.span_id == span.parent_span_id && other.trace_id == span.trace_id;
        assert!(
            spans.iter().any(|other| is_parent(&other)),
            "{} has no parent",
            span.name
        );
    }
    let roots = spans.iter().filter(|span| span.parent_span_id.is_empty()).count() as u64;
    assert_eq!(roots, counted.invocations.values().sum::<u64>());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_collector_gets_every_call_over_either_protocol() {
    let Some(_kernel) = Kernel::acquire() else { return };
    for (protocol, transport) in [("grpc", Transport::Grpc), ("http/protobuf", Transport::Http)] {
        let receiver = Receiver::start(Answer::Accept).unwrap();
        let workload = Workload::ready(&ARGUMENTS);
        let endpoint = receiver.endpoint();
        let agent = Agent::watching_with(
            ["--pid", &workload.pid(), "--format", "otlp"],
            &[
                ("OTEL_EXPORTER_OTLP_ENDPOINT", &endpoint),
                ("OTEL_EXPORTER_OTLP_PROTOCOL", protocol),
            ],
        );
        let counted = workload.run();
        let finished = agent.finish();
        assert!(
            finished.stderr_text().contains("exported 24 of 24 traces"),
            "{}",
            finished.stderr_text()
        );
        assert!(
            receiver
                .received()
                .iter()
                .all(|received| received.transport == transport)
        );
        assert_spans_equal(&receiver.spans(), &counted);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn without_a_collector_the_losses_are_told_exactly_and_the_workload_runs_on() {
    let Some(_kernel) = Kernel::acquire() else { return };
    for protocol in ["grpc", "http/protobuf"] {
        let nobody = ReservedPort::new().unwrap();
        let endpoint = nobody.endpoint();
        let workload = Workload::ready(&ARGUMENTS);
        let agent = Agent::watching_with(
            ["--pid", &workload.pid(), "--format", "otlp"],
            &[
                ("OTEL_EXPORTER_OTLP_ENDPOINT", &endpoint),
                ("OTEL_EXPORTER_OTLP_PROTOCOL", protocol),
                ("OTEL_EXPORTER_OTLP_TIMEOUT", "1000"),
            ],
        );
        let counted = workload.run();
        assert_eq!(counted.invocations["calls/start"], 24);
        let finished = agent.finish();
        let text = finished.stderr_text();
        assert!(text.contains("exported 0 of 24 traces"), "{text}");
        let lost = finished
            .stderr
            .iter()
            .find_map(|line| line.strip_prefix("lost "))
            .unwrap_or_else(|| panic!("{text}"));
        let total: u64 = lost
            .split(", ")
            .filter_map(|part| part.split_once(' ')?.0.parse::<u64>().ok())
            .sum();
        assert_eq!(total, 24, "{text}");
    }
}
