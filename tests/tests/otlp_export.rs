//! Traces that leave the agent over real sockets: what arrives, and what is accounted for when the collector is in trouble.

mod support;

use std::sync::Arc;
use std::time::Duration;

use support::{ANCHOR, all_accounted_for, config, export, sample_trace, wait_until};
use wasmscope::sink::otlp::{ExportCounts, Exporter, ExporterConfig, Protocol, StartError};
use wasmscope::sink::otlp_config::CompressionConfig;
use wasmscope_tests::otlp_receiver::{Answer, Receiver, ReservedPort, Transport, spans};

const PROTOCOLS: [Protocol; 2] = [Protocol::Grpc, Protocol::HttpProtobuf];
const LONG: Duration = Duration::from_secs(30);

#[tokio::test]
async fn both_transports_carry_the_whole_span_tree() {
    for protocol in PROTOCOLS {
        let receiver = Receiver::start(Answer::Accept).unwrap();
        export(config(&receiver.endpoint(), protocol), &[sample_trace(1)]).await;
        let received = receiver.received();
        assert_eq!(received.len(), 1);
        insta::assert_snapshot!("span_tree", support::describe(&received[0].request));
        assert!(support::resource(&received[0].request, "host.name").is_some_and(|name| !name.is_empty()));
    }
}

#[tokio::test]
async fn spans_of_a_trace_form_one_tree() {
    let receiver = Receiver::start(Answer::Accept).unwrap();
    export(
        config(&receiver.endpoint(), Protocol::Grpc),
        &[sample_trace(1), sample_trace(2)],
    )
    .await;
    let spans = receiver.spans();
    for trace_id in [[1; 16], [2; 16]] {
        let of_trace: Vec<_> = spans.iter().filter(|span| span.trace_id == trace_id).collect();
        assert_eq!(of_trace.len(), spans.len() / 2);
        assert_eq!(
            of_trace.iter().filter(|span| span.parent_span_id.is_empty()).count(),
            1,
            "one root"
        );
        for span in &of_trace {
            assert!(
                span.parent_span_id.is_empty() || of_trace.iter().any(|parent| parent.span_id == span.parent_span_id)
            );
        }
    }
}

#[tokio::test]
async fn traces_of_two_processes_have_their_own_resources() {
    let receiver = Receiver::start(Answer::Accept).unwrap();
    let mut other = sample_trace(2);
    other.process = Arc::new(wasmscope::span::Process {
        pid: 99,
        command: "other".to_owned(),
        ..(*other.process).clone()
    });
    export(
        config(&receiver.endpoint(), Protocol::HttpProtobuf),
        &[sample_trace(1), other, sample_trace(3)],
    )
    .await;
    let mut services: Vec<(String, usize)> = receiver
        .received()
        .iter()
        .map(|received| (support::service(&received.request), spans(&received.request).len()))
        .collect();
    services.sort();
    assert_eq!(services, [("edge-host".to_owned(), 8), ("other".to_owned(), 4)]);
}

#[tokio::test]
async fn requests_are_packed_with_gzip_when_asked() {
    for (protocol, header) in [
        (Protocol::Grpc, "grpc-encoding"),
        (Protocol::HttpProtobuf, "content-encoding"),
    ] {
        let receiver = Receiver::start(Answer::Accept).unwrap();
        let mut config = config(&receiver.endpoint(), protocol);
        config.target.compression = CompressionConfig::Gzip;
        let counts = export(config, &[sample_trace(1)]).await;
        assert_eq!(
            counts,
            ExportCounts {
                offered: 1,
                exported: 1,
                ..ExportCounts::default()
            }
        );
        assert_eq!(
            receiver.received()[0]
                .headers
                .get(header)
                .and_then(|value| value.to_str().ok()),
            Some("gzip"),
            "{protocol:?}"
        );
    }
}

#[tokio::test]
async fn a_short_outage_loses_nothing() {
    for protocol in PROTOCOLS {
        let receiver = Receiver::start(Answer::Unavailable).unwrap();
        let exporter = Exporter::start(&config(&receiver.endpoint(), protocol), ANCHOR).unwrap();
        exporter.offer(Arc::new(sample_trace(1)));
        receiver.wait_for(|received| received.len() >= 2).await;
        receiver.answer(Answer::Accept);
        let counts = exporter.shutdown(LONG).await;
        assert_eq!(
            counts,
            ExportCounts {
                offered: 1,
                exported: 1,
                ..ExportCounts::default()
            },
            "{protocol:?}"
        );
        assert_eq!(receiver.spans().len(), 4);
    }
}

#[tokio::test]
async fn a_collector_that_was_down_gets_what_is_offered_once_it_is_up() {
    for protocol in PROTOCOLS {
        let port = ReservedPort::new().unwrap();
        let mut config = config(&port.endpoint(), protocol);
        config.target.timeout_ms = 100;
        let exporter = Exporter::start(&config, ANCHOR).unwrap();
        exporter.offer(Arc::new(sample_trace(1)));
        wait_until(|| exporter.counts().lost_export_failed == 1).await;
        let receiver = port.listen(Answer::Accept).unwrap();
        exporter.offer(Arc::new(sample_trace(2)));
        wait_until(|| exporter.counts().exported == 1).await;
        all_accounted_for(exporter.shutdown(LONG).await);
        assert!(
            receiver.spans().iter().all(|span| span.trace_id == [2; 16]),
            "{protocol:?}"
        );
    }
}

#[tokio::test]
async fn a_collector_that_never_answers_costs_bounded_memory_and_time() {
    for protocol in PROTOCOLS {
        let receiver = Receiver::start(Answer::Hang).unwrap();
        let config = ExporterConfig {
            queue_capacity: 4,
            ..config(&receiver.endpoint(), protocol)
        };
        let exporter = Exporter::start(&config, ANCHOR).unwrap();
        exporter.offer(Arc::new(sample_trace(0)));
        receiver.wait_for(|received| !received.is_empty()).await;
        for id in 1..50 {
            exporter.offer(Arc::new(sample_trace(id)));
        }
        let counts = exporter.counts();
        assert_eq!(
            (counts.offered, counts.lost_queue_full),
            (50, 45),
            "one under way and four waiting"
        );
        let counts = exporter.shutdown(Duration::from_millis(50)).await;
        assert_eq!(
            counts,
            ExportCounts {
                offered: 50,
                lost_queue_full: 45,
                lost_shutdown: 5,
                ..ExportCounts::default()
            },
            "{protocol:?}"
        );
    }
}

#[tokio::test]
async fn an_answer_that_takes_too_long_is_a_failed_export() {
    for protocol in PROTOCOLS {
        let receiver = Receiver::start(Answer::Hang).unwrap();
        let mut config = config(&receiver.endpoint(), protocol);
        config.target.timeout_ms = 50;
        let exporter = Exporter::start(&config, ANCHOR).unwrap();
        exporter.offer(Arc::new(sample_trace(1)));
        wait_until(|| exporter.counts().lost_export_failed == 1).await;
        all_accounted_for(exporter.shutdown(LONG).await);
    }
}

#[tokio::test]
async fn a_refusal_is_not_repeated_and_counts() {
    for protocol in PROTOCOLS {
        let receiver = Receiver::start(Answer::Refuse).unwrap();
        let traces: Vec<_> = (0..10).map(sample_trace).collect();
        let counts = export(config(&receiver.endpoint(), protocol), &traces).await;
        assert_eq!(
            counts,
            ExportCounts {
                offered: 10,
                lost_export_failed: 10,
                ..ExportCounts::default()
            }
        );
        assert_eq!(receiver.received().len(), 1, "{protocol:?}");
    }
}

#[tokio::test]
async fn an_outage_is_logged_once_and_so_is_its_end() {
    let logs = support::Logs::default();
    let _guard = logs.capture();
    let receiver = Receiver::start(Answer::Refuse).unwrap();
    let exporter = Exporter::start(&config(&receiver.endpoint(), Protocol::HttpProtobuf), ANCHOR).unwrap();
    for failed_count in 1..=4 {
        exporter.offer(Arc::new(sample_trace(1)));
        wait_until(|| exporter.counts().lost_export_failed == failed_count).await;
    }
    receiver.answer(Answer::Accept);
    exporter.offer(Arc::new(sample_trace(2)));
    wait_until(|| exporter.counts().exported == 1).await;
    exporter.shutdown(LONG).await;
    let lines = logs.lines();
    assert_eq!(lines.len(), 2, "{lines:#?}");
    assert!(
        lines[0].contains("ERROR") && lines[0].contains("cannot be exported") && lines[0].contains("400"),
        "{lines:#?}"
    );
    assert!(
        lines[1].contains("INFO") && lines[1].contains("exported again"),
        "{lines:#?}"
    );
}

#[tokio::test]
async fn spans_that_the_collector_rejects_are_counted() {
    for protocol in PROTOCOLS {
        let receiver = Receiver::start(Answer::AcceptPartly(3)).unwrap();
        let counts = export(config(&receiver.endpoint(), protocol), &[sample_trace(1)]).await;
        assert_eq!(
            counts,
            ExportCounts {
                offered: 1,
                exported: 1,
                rejected_spans: 3,
                ..ExportCounts::default()
            },
            "{protocol:?}"
        );
    }
}

#[tokio::test]
async fn a_shutdown_can_be_made_to_end_earlier_and_not_later() {
    let receiver = Receiver::start(Answer::Hang).unwrap();
    let exporter = Arc::new(Exporter::start(&config(&receiver.endpoint(), Protocol::Grpc), ANCHOR).unwrap());
    exporter.offer(Arc::new(sample_trace(1)));
    receiver.wait_for(|received| !received.is_empty()).await;
    let first = tokio::spawn({
        let exporter = Arc::clone(&exporter);
        async move { exporter.shutdown(Duration::from_hours(1)).await }
    });
    // Whichever of the two calls comes first.
    tokio::task::yield_now().await;
    exporter.shutdown(Duration::from_millis(10)).await;
    exporter.shutdown(Duration::from_hours(1)).await;
    let counts = first.await.unwrap();
    assert_eq!((counts.offered, counts.lost_shutdown), (1, 1), "{counts:?}");
}

#[tokio::test]
async fn what_is_offered_after_shutdown_is_lost_and_counted() {
    let receiver = Receiver::start(Answer::Accept).unwrap();
    let exporter = Exporter::start(&config(&receiver.endpoint(), Protocol::Grpc), ANCHOR).unwrap();
    exporter.offer(Arc::new(sample_trace(1)));
    exporter.shutdown(LONG).await;
    exporter.offer(Arc::new(sample_trace(2)));
    assert_eq!(
        exporter.counts(),
        ExportCounts {
            offered: 2,
            exported: 1,
            lost_shutdown: 1,
            ..ExportCounts::default()
        }
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn offers_from_many_threads_during_trouble_all_end_up_somewhere() {
    let receiver = Receiver::start(Answer::Accept).unwrap();
    let config = ExporterConfig {
        queue_capacity: 32,
        ..config(&receiver.endpoint(), Protocol::Grpc)
    };
    let exporter = Arc::new(Exporter::start(&config, ANCHOR).unwrap());
    let threads: Vec<_> = (0..4)
        .map(|thread| {
            let exporter = Arc::clone(&exporter);
            std::thread::spawn(move || {
                for i in 0..500 {
                    exporter.offer(Arc::new(sample_trace((thread * 60 + i % 60) as u8)));
                }
            })
        })
        .collect();
    for answer in [
        Answer::Unavailable,
        Answer::Accept,
        Answer::Refuse,
        Answer::Accept,
        Answer::Hang,
    ] {
        receiver.answer(answer);
        let seen = receiver.received().len();
        let _ = tokio::time::timeout(
            Duration::from_millis(100),
            receiver.wait_for(|received| received.len() > seen + 1),
        )
        .await;
    }
    let counts = exporter.shutdown(Duration::from_millis(100)).await;
    for thread in threads {
        thread.join().unwrap();
    }
    let late = exporter.counts();
    assert!(counts.lost() <= late.lost());
    assert_eq!(late.offered, 2_000);
    all_accounted_for(late);
}

#[tokio::test]
async fn a_trace_of_any_size_arrives_cut_and_says_so() {
    for protocol in PROTOCOLS {
        let receiver = Receiver::start(Answer::Accept).unwrap();
        let traces = [
            support::huge_trace(1, 10_000),
            support::huge_trace(2, 10_000),
            support::huge_trace(3, 10_000),
        ];
        let counts = export(config(&receiver.endpoint(), protocol), &traces).await;
        assert_eq!(
            counts,
            ExportCounts {
                offered: 3,
                exported: 3,
                ..ExportCounts::default()
            },
            "{protocol:?}"
        );
        let spans = receiver.spans();
        let root = spans
            .iter()
            .find(|span| span.parent_span_id.is_empty() && span.trace_id == [1; 16])
            .unwrap();
        let cut_count = support::int(&root.attributes, "wasmscope.cut.span_count").unwrap();
        let kept_count = spans.iter().filter(|span| span.trace_id == [1; 16]).count();
        assert_eq!(kept_count + cut_count as usize, 10_001);
    }
}

#[tokio::test]
async fn traces_beyond_the_bytes_that_may_wait_are_lost_and_counted() {
    let receiver = Receiver::start(Answer::Hang).unwrap();
    let config = ExporterConfig {
        queue_bytes: 1,
        ..config(&receiver.endpoint(), Protocol::Grpc)
    };
    let exporter = Exporter::start(&config, ANCHOR).unwrap();
    for id in 0..3 {
        exporter.offer(Arc::new(sample_trace(id)));
    }
    let counts = exporter.shutdown(Duration::from_millis(50)).await;
    assert_eq!(
        counts,
        ExportCounts {
            offered: 3,
            lost_queue_bytes: 2,
            lost_shutdown: 1,
            ..ExportCounts::default()
        }
    );
}

#[tokio::test]
async fn a_malformed_endpoint_is_refused_at_the_start() {
    for protocol in PROTOCOLS {
        let error = Exporter::start(&config("http://[not an address", protocol), ANCHOR).unwrap_err();
        assert!(matches!(&error, StartError::Transport(_)), "{error}");
    }
}

/// Set for the copy of this test binary that [`the_standard_variables_configure_the_exporter`] starts.
const CHILD: &str = "WASMSCOPE_TEST_EXPORTS_AS_ITS_ENVIRONMENT_SAYS";

#[tokio::test]
async fn the_standard_variables_configure_the_exporter() {
    if std::env::var_os(CHILD).is_some() {
        let counts = export(ExporterConfig::from_environment().unwrap(), &[sample_trace(1)]).await;
        assert_eq!(
            counts,
            ExportCounts {
                offered: 1,
                exported: 1,
                ..ExportCounts::default()
            }
        );
        return;
    }
    for (transport, variables) in [
        (
            Transport::Grpc,
            vec![
                ("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc"),
                ("OTEL_EXPORTER_OTLP_HEADERS", "x-tenant=shop"),
                ("OTEL_EXPORTER_OTLP_COMPRESSION", "gzip"),
                ("OTEL_SERVICE_NAME", "checkout"),
                ("OTEL_RESOURCE_ATTRIBUTES", "service.name=loser,team=a"),
            ],
        ),
        (
            Transport::Http,
            vec![
                ("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc"),
                ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "http/protobuf"),
                ("OTEL_EXPORTER_OTLP_TRACES_HEADERS", "x-tenant=shop"),
                ("OTEL_EXPORTER_OTLP_TRACES_COMPRESSION", "gzip"),
                ("OTEL_RESOURCE_ATTRIBUTES", "service.name=checkout,team=a"),
            ],
        ),
    ] {
        let receiver = Receiver::start(Answer::Accept).unwrap();
        let output = tokio::process::Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "the_standard_variables_configure_the_exporter"])
            .env_clear()
            .env(CHILD, "1")
            .env("OTEL_EXPORTER_OTLP_ENDPOINT", receiver.endpoint())
            .envs(variables)
            .output()
            .await
            .unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
        let received = &receiver.received()[0];
        assert_eq!(received.transport, transport);
        assert_eq!(received.headers.get("x-tenant").unwrap(), "shop");
        let encoding = ["grpc-encoding", "content-encoding"]
            .iter()
            .find_map(|name| received.headers.get(*name));
        assert_eq!(encoding.unwrap(), "gzip");
        assert_eq!(support::service(&received.request), "checkout");
        assert_eq!(support::resource(&received.request, "team").as_deref(), Some("a"));
    }
}

#[tokio::test]
async fn a_file_of_otlp_json_holds_what_the_wire_carries() {
    let receiver = Receiver::start(Answer::Accept).unwrap();
    export(config(&receiver.endpoint(), Protocol::Grpc), &[sample_trace(1)]).await;
    let mut writer = wasmscope::sink::otlp_json::OtlpJsonWriter::new(Vec::new(), ANCHOR);
    writer.write(&sample_trace(1)).unwrap();
    let line: opentelemetry_proto::tonic::collector::trace::v1::ExportTraceServiceRequest =
        serde_json::from_slice(&writer.finish().unwrap()).unwrap();
    assert_eq!(
        support::describe(&line),
        support::describe(&receiver.received()[0].request)
    );
}

#[tokio::test]
async fn a_collector_that_says_when_to_come_back_is_left_alone_until_then_and_gets_what_it_refused() {
    const SECONDS: u8 = 3;
    for protocol in PROTOCOLS {
        let receiver = Receiver::start(Answer::Throttle(SECONDS)).unwrap();
        let mut config = config(&receiver.endpoint(), protocol);
        // Shorter than what it asks for, by far.
        config.target.timeout_ms = 500;
        config.queue_capacity = 4;
        let exporter = Exporter::start(&config, ANCHOR).unwrap();
        exporter.offer(Arc::new(sample_trace(1)));
        receiver.wait_for(|received| !received.is_empty()).await;
        receiver.answer(Answer::Accept);
        for number in 2..12 {
            exporter.offer(Arc::new(sample_trace(number)));
        }
        let counts = exporter.shutdown(LONG).await;
        assert_eq!(
            counts,
            ExportCounts {
                offered: 11,
                exported: 5,
                lost_queue_full: 6,
                ..ExportCounts::default()
            },
            "{protocol:?}"
        );
        let received = receiver.received();
        let waited = received[1].at.duration_since(received[0].at);
        assert!(
            waited >= Duration::from_secs(SECONDS.into()),
            "{protocol:?}: {waited:?}"
        );
        assert_eq!(received[0].request, received[1].request, "{protocol:?}");
    }
}

#[tokio::test]
async fn a_wait_that_is_longer_than_the_time_for_stopping_costs_exactly_what_waits() {
    for protocol in PROTOCOLS {
        let receiver = Receiver::start(Answer::Throttle(100)).unwrap();
        let exporter = Exporter::start(&config(&receiver.endpoint(), protocol), ANCHOR).unwrap();
        exporter.offer(Arc::new(sample_trace(1)));
        receiver.wait_for(|received| !received.is_empty()).await;
        exporter.offer(Arc::new(sample_trace(2)));
        let counts = exporter.shutdown(Duration::from_secs(1)).await;
        assert_eq!(
            counts,
            ExportCounts {
                offered: 2,
                lost_shutdown: 2,
                ..ExportCounts::default()
            },
            "{protocol:?}"
        );
        assert_eq!(receiver.received().len(), 1, "{protocol:?}");
    }
}
