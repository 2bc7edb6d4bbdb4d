//! Metrics that leave the agent over real sockets: what arrives is what the agent's own text says.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail as tests do")]

// Not all of its helpers are needed here.
#[allow(dead_code, reason = "shared with other tests")]
mod support;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use opentelemetry_proto::tonic::common::v1::{KeyValue, any_value};
use opentelemetry_proto::tonic::metrics::v1::{Metric, exemplar, metric, number_data_point};
use support::{sample_trace, wait_until};
use wasmscope::metrics::{Metrics, MetricsConfig};
use wasmscope::pipeline::{AggregateRow, Counted, Times};
use wasmscope::sink::otlp::Protocol;
use wasmscope::sink::otlp_config::{CompressionConfig, OtlpMetricsConfig};
use wasmscope::sink::otlp_metrics::MetricsExporter;
use wasmscope::span::{Function, Process, SpanKind, Trace};
use wasmscope_tests::otlp_receiver::{Answer, ReceivedMetrics, Receiver};

const PROTOCOLS: [Protocol; 2] = [Protocol::Grpc, Protocol::HttpProtobuf];
const LONG: Duration = Duration::from_secs(30);
const START_NS: u64 = 1_700_000_000_000_000_000;

/// Series by how the text writes them.
type Series = BTreeMap<String, f64>;

fn config(endpoint: &str, protocol: Protocol) -> OtlpMetricsConfig {
    let mut config = OtlpMetricsConfig::default();
    config.target.endpoint = Some(endpoint.to_owned());
    config.target.protocol = protocol;
    config
}

fn start(config: &OtlpMetricsConfig, metrics: &Arc<Metrics>) -> MetricsExporter {
    let metrics = Arc::clone(metrics);
    MetricsExporter::start(config, "node-7", START_NS, Box::new(move || metrics.snapshot())).unwrap()
}

fn used() -> Arc<Metrics> {
    let metrics = Metrics::new();
    (1..=5).for_each(|id| metrics.observe_trace(&sample_trace(id)));
    Arc::new(metrics)
}

/// The text's own lines; the labels of a sample are sorted.
fn written(metrics: &Metrics) -> Series {
    let text = metrics.encode();
    text.lines()
        .filter(|line| !line.starts_with('#'))
        .map(|line| {
            let line = line.split(" # ").next().unwrap();
            let (series, value) = line.rsplit_once(' ').unwrap();
            let series = match series.split_once('{') {
                Some((name, labels)) => {
                    let mut labels: Vec<String> = labels.trim_end_matches('}').split(',').map(bound).collect();
                    labels.sort_unstable();
                    format!("{name}{{{}}}", labels.join(","))
                }
                None => format!("{series}{{}}"),
            };
            (series, value.parse().unwrap())
        })
        .collect()
}

/// The bound of a bucket in one notation.
fn bound(label: &str) -> String {
    let bound = label
        .strip_prefix("le=\"")
        .and_then(|rest| rest.trim_end_matches('"').parse::<f64>().ok());
    match bound {
        Some(bound) if bound.is_finite() => format!("le=\"{bound:?}\""),
        _ => label.to_owned(),
    }
}

fn key(name: &str, attributes: &[KeyValue], bound: Option<String>) -> String {
    let mut labels: Vec<String> = attributes
        .iter()
        .map(|attribute| match &attribute.value.as_ref().unwrap().value {
            Some(any_value::Value::StringValue(value)) => format!("{}=\"{value}\"", attribute.key),
            other => panic!("{other:?}"),
        })
        .chain(bound.map(|bound| format!("le=\"{bound}\"")))
        .collect();
    labels.sort_unstable();
    format!("{name}{{{}}}", labels.join(","))
}

/// What was received, as the text would have written it.
fn arrived(received: &[ReceivedMetrics]) -> Series {
    let mut series = Series::new();
    let mut add = |key: String, value: f64| assert_eq!(series.insert(key.clone(), value), None, "twice: {key}");
    let metrics = received
        .iter()
        .flat_map(|received| &received.request.resource_metrics)
        .flat_map(|resource| &resource.scope_metrics)
        .flat_map(|scope| &scope.metrics);
    for metric in metrics {
        let name = &metric.name;
        let number = |value: &Option<number_data_point::Value>| match value.unwrap() {
            number_data_point::Value::AsInt(whole) => whole as f64,
            number_data_point::Value::AsDouble(fraction) => fraction,
        };
        match metric.data.as_ref().unwrap() {
            metric::Data::Sum(sum) => {
                assert!(sum.is_monotonic && sum.aggregation_temporality == 2, "cumulative");
                for point in &sum.data_points {
                    assert_eq!(point.start_time_unix_nano, START_NS);
                    assert!(point.time_unix_nano > START_NS);
                    add(
                        key(&format!("{name}_total"), &point.attributes, None),
                        number(&point.value),
                    );
                }
            }
            metric::Data::Gauge(gauge) => {
                for point in &gauge.data_points {
                    add(key(name, &point.attributes, None), number(&point.value));
                }
            }
            metric::Data::Histogram(histogram) => {
                assert_eq!(histogram.aggregation_temporality, 2, "cumulative");
                for point in &histogram.data_points {
                    add(key(&format!("{name}_sum"), &point.attributes, None), point.sum.unwrap());
                    add(
                        key(&format!("{name}_count"), &point.attributes, None),
                        point.count as f64,
                    );
                    let mut cumulative = 0;
                    let bounds = point.explicit_bounds.iter().map(|bound| format!("{bound:?}"));
                    for (bound, count) in bounds.chain(["+Inf".to_owned()]).zip(&point.bucket_counts) {
                        cumulative += count;
                        add(
                            key(&format!("{name}_bucket"), &point.attributes, Some(bound)),
                            cumulative as f64,
                        );
                    }
                }
            }
            other => panic!("{other:?}"),
        }
    }
    series
}

#[tokio::test]
async fn what_arrives_is_what_the_text_says_over_both_transports_and_packed() {
    for protocol in PROTOCOLS {
        for compression in [CompressionConfig::None, CompressionConfig::Gzip] {
            let receiver = Receiver::start(Answer::Accept).unwrap();
            let metrics = used();
            let mut config = config(&receiver.endpoint(), protocol);
            config.target.compression = compression;
            config.target.headers.insert("x-tenant".to_owned(), "shop".to_owned());
            let exporter = start(&config, &metrics);
            exporter.shutdown(LONG).await;
            assert_eq!(exporter.losses(), []);
            let received = receiver.metrics();
            let expected = written(&metrics);
            assert!(expected.len() > 50, "{expected:#?}");
            assert_eq!(arrived(&received), expected, "{protocol:?} {compression:?}");
            assert_eq!(received[0].headers.get("x-tenant").unwrap(), "shop");
            let resource = received[0].request.resource_metrics[0].resource.as_ref().unwrap();
            let resource = key("", &resource.attributes, None);
            for attribute in ["service.name=\"wasmscope\"", "k8s.node.name=\"node-7\"", "host.name=\""] {
                assert!(resource.contains(attribute), "{resource}");
            }
        }
    }
}

/// What the kernel would have counted of the trace, besides a call that took no time to speak of.
fn row(trace: &Trace) -> AggregateRow {
    let SpanKind::Invoke { function } = &trace.root.kind else {
        panic!("is an invocation")
    };
    let function: Option<Arc<Function>> = function.clone();
    let process: Arc<Process> = Arc::clone(&trace.process);
    let mut times = Times {
        total_ns: trace.root.duration_ns() + 1,
        ..Times::default()
    };
    times.buckets[0] = 1;
    // Bucket i ends at 2^(i/4 - 22) seconds.
    let seconds = trace.root.duration_ns() as f64 / 1e9;
    times.buckets[(4.0 * (seconds.log2() + 22.0)).ceil() as usize] = 1;
    AggregateRow {
        process: Some(process),
        counted: Counted::Invocations { export: function },
        outcomes: vec![("ok".to_owned(), 1), ("trap".to_owned(), 1)],
        times,
        bytes: 0,
    }
}

fn of_name(received: &[ReceivedMetrics], name: &str) -> Metric {
    let mut metrics = received
        .iter()
        .flat_map(|received| &received.request.resource_metrics)
        .flat_map(|resource| &resource.scope_metrics)
        .flat_map(|scope| &scope.metrics)
        .filter(|metric| metric.name == name);
    let metric = metrics.next().unwrap().clone();
    assert!(metrics.next().is_none(), "{name} comes twice");
    metric
}

#[tokio::test]
async fn what_the_kernel_counts_arrives_in_native_buckets_with_exemplars_that_are_spans_which_arrived() {
    for protocol in PROTOCOLS {
        let receiver = Receiver::start(Answer::Accept).unwrap();
        let trace = sample_trace(3);
        support::export(
            support::config(&receiver.endpoint(), protocol),
            std::slice::from_ref(&trace),
        )
        .await;
        let metrics = Arc::new(Metrics::with_aggregates(MetricsConfig::default()));
        metrics.observe_aggregate(&row(&trace));
        metrics.exemplify(&trace);
        let exporter = start(&config(&receiver.endpoint(), protocol), &metrics);
        exporter.shutdown(LONG).await;
        let received = receiver.metrics();
        assert_eq!(of_name(&received, "wasm_invocations").unit, "{invocation}");
        let durations = of_name(&received, "wasm_invocation_duration_seconds");
        assert_eq!(durations.unit, "s");
        let Some(metric::Data::ExponentialHistogram(histogram)) = &durations.data else {
            panic!("{durations:?}")
        };
        assert_eq!(histogram.aggregation_temporality, 2, "cumulative");
        let [point] = &histogram.data_points[..] else {
            panic!("{histogram:?}")
        };
        assert_eq!((point.count, point.zero_count), (2, 1));
        let seconds = trace.root.duration_ns() as f64 / 1e9;
        assert!((point.sum.unwrap() - seconds - 1e-9).abs() < 1e-12);
        let buckets = point.positive.as_ref().unwrap();
        assert_eq!(buckets.bucket_counts, [1]);
        // As OpenTelemetry defines them: above base^index, at most base^(index + 1).
        let log = f64::from(point.scale).exp2();
        let index = (seconds.log2() * log).ceil() - 1.0;
        assert!((f64::from(buckets.offset) - index).abs() < f64::EPSILON);
        assert!(point.zero_threshold > 0.0 && point.zero_threshold < seconds);
        let [exemplar] = &point.exemplars[..] else {
            panic!("{point:?}")
        };
        assert_eq!(exemplar.value, Some(exemplar::Value::AsDouble(seconds)));
        assert!(exemplar.time_unix_nano > START_NS);
        let spans = receiver.spans();
        let span = spans
            .iter()
            .find(|span| span.span_id == exemplar.span_id && span.trace_id == exemplar.trace_id)
            .unwrap();
        let duration_ns = span.end_time_unix_nano - span.start_time_unix_nano;
        assert_eq!(duration_ns, trace.root.duration_ns());
    }
}

#[tokio::test]
async fn a_reading_that_is_refused_is_counted_and_the_next_one_says_it_all() {
    for protocol in PROTOCOLS {
        let receiver = Receiver::start(Answer::Refuse).unwrap();
        let metrics = used();
        let config = OtlpMetricsConfig {
            interval_seconds: 1,
            ..config(&receiver.endpoint(), protocol)
        };
        let exporter = start(&config, &metrics);
        wait_until(|| !exporter.losses().is_empty()).await;
        let loss = exporter.losses().remove(0);
        assert_eq!(
            (loss.layer.as_str(), loss.reason.as_str()),
            ("export_metrics", "export_failed")
        );
        assert!(loss.count > 0);
        receiver.answer(Answer::Accept);
        metrics.observe_trace(&sample_trace(6));
        let refused_count = receiver.metrics().len();
        exporter.shutdown(LONG).await;
        let received: Vec<_> = receiver.metrics().split_off(refused_count);
        let accepted: Vec<_> = received
            .into_iter()
            .filter(|received| received.answer == Answer::Accept)
            .collect();
        assert_eq!(arrived(&accepted), written(&metrics), "{protocol:?}");
    }
}

#[tokio::test]
async fn the_last_reading_has_its_time_though_another_one_hangs() {
    for protocol in PROTOCOLS {
        let receiver = Receiver::start(Answer::Hang).unwrap();
        let mut config = config(&receiver.endpoint(), protocol);
        config.interval_seconds = 1;
        config.target.timeout_ms = 600_000;
        let metrics = used();
        let exporter = start(&config, &metrics);
        receiver.wait_for_metrics(|received| !received.is_empty()).await;
        receiver.answer(Answer::Accept);
        let last = exporter.shutdown(LONG).await;
        assert!(last.taken > 0 && last.lost == 0, "{protocol:?} {last:?}");
        assert_eq!(exporter.sent_count(), last.taken);
        let losses = exporter.losses();
        assert_eq!(losses.len(), 1, "{losses:?}");
        assert_eq!((losses[0].reason.as_str(), losses[0].count), ("shutdown", last.taken));
    }
}

#[tokio::test]
async fn a_last_reading_that_nobody_takes_ends_at_the_deadline_and_counts() {
    let receiver = Receiver::start(Answer::Hang).unwrap();
    let mut config = config(&receiver.endpoint(), Protocol::HttpProtobuf);
    config.target.timeout_ms = 600_000;
    let metrics = used();
    let exporter = start(&config, &metrics);
    let last = exporter.shutdown(Duration::from_millis(50)).await;
    assert!(last.taken == 0 && last.lost > 0, "{last:?}");
    assert_eq!(exporter.losses()[0].count, last.lost);
}

#[tokio::test]
async fn readings_before_the_collector_wants_to_be_asked_again_are_counted_and_not_sent() {
    for protocol in PROTOCOLS {
        let receiver = Receiver::start(Answer::Throttle(100)).unwrap();
        let config = OtlpMetricsConfig {
            interval_seconds: 1,
            ..config(&receiver.endpoint(), protocol)
        };
        let exporter = start(&config, &used());
        wait_until(|| !exporter.losses().is_empty()).await;
        let first = exporter.losses().remove(0).count;
        wait_until(|| exporter.losses().remove(0).count >= 2 * first).await;
        exporter.shutdown(Duration::from_millis(100)).await;
        assert!(exporter.losses().remove(0).count >= 3 * first, "{protocol:?}");
        assert_eq!(receiver.metrics().len(), 1, "{protocol:?}");
    }
}
