//! Traces to export, and what the tests say of them.

#![expect(clippy::unwrap_used, reason = "a helper of tests may fail as a test does")]

use std::fmt::Write as _;
use std::io::Write;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use opentelemetry_proto::tonic::collector::trace::v1::ExportTraceServiceRequest;
use opentelemetry_proto::tonic::common::v1::{AnyValue, KeyValue, any_value};
use opentelemetry_proto::tonic::trace::v1::Span as ProtoSpan;
use wasmscope::clock::ClockAnchor;
use wasmscope::sink::otlp::{ExportCounts, Exporter, ExporterConfig, Protocol};
use wasmscope::sink::otlp_config::TargetConfig;
use wasmscope::span::{
    Bound, Function, Import, Loss, Module, Outcome, Process, Span, SpanKind, Suspend, Trace, TraceId,
};

pub(crate) const ANCHOR: ClockAnchor = ClockAnchor {
    monotonic_ns: 5_000_000,
    unix_ns: 1_700_000_000_000_000_000,
};

/// Fast, but patient.
pub(crate) fn config(endpoint: &str, protocol: Protocol) -> ExporterConfig {
    ExporterConfig {
        target: TargetConfig {
            endpoint: Some(endpoint.to_owned()),
            protocol,
            ..TargetConfig::default()
        },
        batch_delay: Duration::from_millis(20),
        max_pause: Duration::from_millis(5),
        ..ExporterConfig::default()
    }
}

/// Offers the traces and shuts down with time enough.
pub(crate) async fn export(config: ExporterConfig, traces: &[Trace]) -> ExportCounts {
    let exporter = Exporter::start(&config, ANCHOR).unwrap();
    for trace in traces {
        exporter.offer(Arc::new(trace.clone()));
    }
    exporter.shutdown(Duration::from_secs(30)).await
}

pub(crate) fn all_accounted_for(counts: ExportCounts) {
    assert_eq!(counts.offered, counts.exported + counts.lost(), "{counts:?}");
}

/// Waits for something that another task does.
pub(crate) async fn wait_until(mut condition: impl FnMut() -> bool) {
    let deadline = tokio::time::Instant::now() + Duration::from_secs(30);
    while !condition() {
        assert!(tokio::time::Instant::now() < deadline, "it did not happen in time");
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

fn span(kind: SpanKind, start_ns: u64, end_ns: u64, stack: &[&str]) -> Span {
    Span {
        start_ns,
        end_ns,
        start_bound: Bound::Exact,
        end_bound: Bound::Exact,
        tid: 2113,
        kind,
        outcome: Outcome::Ok,
        stack: stack.iter().map(|name| function(name)).collect(),
        stack_truncated: false,
        children: Vec::new(),
        suspends: Vec::new(),
    }
}

fn function(name: &str) -> Arc<Function> {
    let module = Arc::new(Module {
        name: "policy.wasm".to_owned(),
        hash: "3f9ac2000000".to_owned(),
    });
    Arc::new(Function {
        module,
        index: 7,
        name: name.to_owned(),
    })
}

fn host_call(module: &str, name: &str, start_ns: u64, end_ns: u64) -> Span {
    let import = Import {
        module: module.to_owned(),
        name: name.to_owned(),
    };
    span(
        SpanKind::HostCall {
            import: Some(Arc::new(import)),
        },
        start_ns,
        end_ns,
        &["load_rules", "handle_request"],
    )
}

/// A request that reads a file, waits for the host, and traps.
pub(crate) fn sample_trace(id: u8) -> Trace {
    let syscall = SpanKind::Syscall {
        number: 257,
        name: "openat".to_owned(),
        args: [0xffff_ff9c, 0x7fff_1234, 0],
        result: -2,
        on_helper: false,
    };
    let mut openat = span(syscall, 5_002_000, 5_003_000, &["load_rules", "handle_request"]);
    openat.outcome = Outcome::Errno { errno: 2 };
    openat.start_bound = Bound::Inferred;
    let mut path_open = host_call("wasi_snapshot_preview1", "path_open", 5_001_000, 5_004_000);
    path_open.children = vec![openat];

    let suspend = Suspend {
        start_ns: 5_006_000,
        end_ns: Some(5_009_000),
        from_tid: 2113,
        to_tid: Some(2117),
    };
    let mut fetch = host_call("host", "fetch", 5_005_000, 5_010_000);
    fetch.suspends = vec![suspend];

    let kind = SpanKind::Trap {
        code: "unreachable".to_owned(),
        function: Some(function("parse_rule")),
        native_offset: 0x1c4,
        wasm_offset: Some(0x2f),
    };
    let trap = span(kind, 5_011_000, 5_011_000, &[]);

    let mut root = span(
        SpanKind::Invoke {
            function: Some(function("handle_request")),
        },
        5_000_000,
        5_012_000,
        &[],
    );
    root.outcome = Outcome::Trap {
        code: "unreachable".to_owned(),
    };
    root.suspends = vec![suspend];
    root.children = vec![path_open, fetch, trap];
    Trace {
        id: TraceId([id.max(1); 16]),
        process: Arc::new(Process {
            pid: 2113,
            start_ns: 1,
            command: "edge-host".to_owned(),
            runtime_name: "wasmtime".to_owned(),
            runtime_version: Some("48.0.8".to_owned()),
            limits: vec!["stripped: activations are inferred from syscalls".to_owned()],
            place: wasmscope::span::Place::default(),
        }),
        root,
        losses: vec![Loss {
            layer: "ring".to_owned(),
            reason: "ring_full".to_owned(),
            count: 3,
        }],
        event_count: 9,
        starts: wasmscope::span::Starts::default(),
        parent: None,
        pauses: Vec::new(),
    }
}

/// A trace with so many host calls, no two alike, with long names and stacks.
pub(crate) fn huge_trace(id: u8, call_count: u64) -> Trace {
    let mut trace = sample_trace(id);
    trace.root.suspends = Vec::new();
    trace.root.outcome = Outcome::Ok;
    let stack: Vec<_> = (0..20)
        .map(|depth| function(&format!("frame_{depth}_{}", "y".repeat(200))))
        .collect();
    trace.root.children = (0..call_count)
        .map(|i| {
            let mut call = host_call(
                "wasi_snapshot_preview1",
                &format!("call_{i}_{}", "x".repeat(200)),
                5_000_000 + i,
                5_000_001 + i,
            );
            call.stack.clone_from(&stack);
            call
        })
        .collect();
    trace
}

/// Everything in a request but what differs from host to host, one fact a line, in the order in which it came.
pub(crate) fn describe(request: &ExportTraceServiceRequest) -> String {
    let mut text = String::new();
    for resource_spans in &request.resource_spans {
        let mut attributes = resource_spans.resource.as_ref().unwrap().attributes.clone();
        attributes.retain(|attribute| !["host.name", "telemetry.sdk.version"].contains(&attribute.key.as_str()));
        attributes.sort_by(|a, b| a.key.cmp(&b.key));
        text.push_str("resource\n");
        describe_attributes(&mut text, &attributes);
        for scope_spans in &resource_spans.scope_spans {
            let _ = writeln!(text, "scope {}", scope_spans.scope.as_ref().unwrap().name);
            scope_spans.spans.iter().for_each(|span| describe_span(&mut text, span));
        }
    }
    text
}

fn describe_span(text: &mut String, span: &ProtoSpan) {
    let hex = |bytes: &[u8]| {
        bytes
            .iter()
            .fold(String::new(), |text, byte| text + &format!("{byte:02x}"))
    };
    let status = span.status.clone().unwrap_or_default();
    let _ = writeln!(text, "span {}", span.name);
    let _ = writeln!(
        text,
        "  trace {} id {} parent {}",
        hex(&span.trace_id),
        hex(&span.span_id),
        hex(&span.parent_span_id)
    );
    let _ = writeln!(
        text,
        "  kind {} flags {:#x} status {} {}",
        span.kind, span.flags, status.code, status.message
    );
    let _ = writeln!(
        text,
        "  time {} to {}",
        span.start_time_unix_nano, span.end_time_unix_nano
    );
    describe_attributes(text, &span.attributes);
    for event in &span.events {
        let _ = writeln!(text, "  event {} at {}", event.name, event.time_unix_nano);
        describe_attributes(text, &event.attributes);
    }
    assert_eq!(
        (
            span.dropped_attributes_count,
            span.dropped_events_count,
            span.dropped_links_count
        ),
        (0, 0, 0)
    );
}

fn describe_attributes(text: &mut String, attributes: &[KeyValue]) {
    for attribute in attributes {
        let _ = writeln!(text, "    {} = {}", attribute.key, value_text(attribute.value.as_ref()));
    }
}

fn value_text(value: Option<&AnyValue>) -> String {
    match value.and_then(|value| value.value.as_ref()) {
        Some(any_value::Value::StringValue(text)) => format!("{text:?}"),
        Some(any_value::Value::IntValue(value)) => value.to_string(),
        Some(any_value::Value::ArrayValue(array)) => {
            format!(
                "[{}]",
                array
                    .values
                    .iter()
                    .map(|value| value_text(Some(value)))
                    .collect::<Vec<_>>()
                    .join(", ")
            )
        }
        other => panic!("unexpected value {other:?}"),
    }
}

pub(crate) fn int(attributes: &[KeyValue], key: &str) -> Option<i64> {
    attributes
        .iter()
        .find(|attribute| attribute.key == key)
        .and_then(|attribute| value_text(attribute.value.as_ref()).parse().ok())
}

/// A string attribute of the request's resource.
pub(crate) fn resource(request: &ExportTraceServiceRequest, key: &str) -> Option<String> {
    let attributes = &request.resource_spans.first()?.resource.as_ref()?.attributes;
    let value = attributes
        .iter()
        .find(|attribute| attribute.key == key)?
        .value
        .as_ref()?
        .value
        .as_ref()?;
    match value {
        any_value::Value::StringValue(text) => Some(text.clone()),
        _ => None,
    }
}

pub(crate) fn service(request: &ExportTraceServiceRequest) -> String {
    resource(request, "service.name").expect("every resource names its service")
}

/// What this thread logs at INFO and above.
#[derive(Clone, Default)]
pub(crate) struct Logs(Arc<Mutex<Vec<u8>>>);

impl Logs {
    pub(crate) fn capture(&self) -> tracing::subscriber::DefaultGuard {
        let logs = self.clone();
        let subscriber = tracing_subscriber::fmt()
            .with_ansi(false)
            .with_max_level(tracing::Level::INFO)
            .with_writer(move || logs.clone())
            .finish();
        tracing::subscriber::set_default(subscriber)
    }

    pub(crate) fn lines(&self) -> Vec<String> {
        String::from_utf8(self.0.lock().unwrap().clone())
            .unwrap()
            .lines()
            .map(str::to_owned)
            .collect()
    }
}

impl Write for Logs {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}
