//! A trace in OpenTelemetry's terms: ids, names, attributes, events, status and resource. How they travel is up to `otlp` and `otlp_json`.
//!
//! # Kinds
//! Every span is `INTERNAL`. Back ends build request rates and service maps from `SERVER` and `CLIENT` spans, and an activation is not
//! necessarily a request: one request may cause ten, and the host's own instrumentation may already have sent its `SERVER` span. Once a
//! traceparent of the request is known, the outermost span becomes its child; it stays `INTERNAL` unless it is all that is known of the request.
//!
//! # Ids
//! The trace id is the application's where the trace hangs under a span of it, else the model's, which then is in `wasmscope.trace.id`
//! of the outermost span. A span id is mixed from the model's trace id and the positions of its ancestors and itself among their siblings, so
//! the same trace exported twice, through any sink, has the same ids.

use std::borrow::Cow;
use std::fmt::Write as _;

use opentelemetry::trace::{Event, SpanContext, SpanId, SpanKind as OtelKind, Status, TraceFlags, TraceId, TraceState};
use opentelemetry::{Array, InstrumentationScope, Key, KeyValue, StringValue, Value};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::resource::{EnvResourceDetector, ResourceDetector, TelemetryResourceDetector};
use opentelemetry_sdk::trace::{SpanData, SpanEvents};

use super::fold::{self, Limits, Node};
use super::growth::{growth_attributes, wasm_offset};
use super::phases;
use super::place;
use super::text::{bounded, bounded_line};
use crate::clock::ClockAnchor;
use crate::errno;
use crate::span::{Bound, Function, Outcome, Parent, ProbeKind, Process, Span, SpanKind, Trace};

/// Spans sent for one trace; the rest is folded or counted on the parents (`wasmscope.cut.span_count`).
pub(crate) const MAX_SPANS_PER_TRACE: usize = 2_000;
/// Estimated size of one trace on the wire: collectors refuse requests over 4 MiB unless told otherwise.
pub(crate) const MAX_TRACE_BYTES: usize = 2 * 1024 * 1024;
/// From this many on, calls that are alike and follow each other leave as one span.
const MIN_RUN: u64 = 16;
/// Guest stack in `code.stacktrace`.
const MAX_STACK_BYTES: usize = 2_048;
/// Any other text.
const MAX_TEXT_BYTES: usize = 256;
/// Suspensions and traps told as events of one span, by time; what is over is in `dropped_events_count`.
const MAX_EVENTS_PER_SPAN: usize = 128;
/// Attributes about losses, and notes on the process.
const MAX_LOSS_ATTRIBUTES: usize = 32;
/// Timestamps, ids and the attributes with bounded values, on the wire.
const FIXED_SPAN_BYTES: usize = 500;
const EVENT_BYTES: usize = 120;
/// Numbers and where they were asked for.
const GROWTH_BYTES: usize = 400;

const LIMITS: Limits = Limits {
    max_nodes: MAX_SPANS_PER_TRACE,
    max_bytes: MAX_TRACE_BYTES,
    max_depth: super::MAX_DEPTH,
    min_run: MIN_RUN,
    cost_bytes,
};

/// A trace in OpenTelemetry's terms.
#[derive(Debug)]
pub(crate) struct Converted {
    /// Parents first.
    pub(crate) spans: Vec<SpanData>,
    /// Estimate of their size on the wire, never far below it.
    pub(crate) byte_count: usize,
}

/// Converts the traces of one capture.
#[derive(Clone, Debug)]
pub(crate) struct Converter {
    anchor: ClockAnchor,
    scope: InstrumentationScope,
    host_name: Option<String>,
    node_name: Option<String>,
    /// `OTEL_RESOURCE_ATTRIBUTES`, `OTEL_SERVICE_NAME` and what describes this build; wins over what is known of the process.
    overrides: Vec<KeyValue>,
}

impl Converter {
    /// Reads the environment (`OTEL_SERVICE_NAME`, `OTEL_RESOURCE_ATTRIBUTES`) and the host's name, once.
    pub(crate) fn from_env(anchor: ClockAnchor) -> Self {
        let version = env!("CARGO_PKG_VERSION");
        let mut overrides = vec![
            KeyValue::new("telemetry.distro.name", "wasmscope"),
            KeyValue::new("telemetry.distro.version", version),
        ];
        for resource in [TelemetryResourceDetector.detect(), EnvResourceDetector::new().detect()] {
            overrides.extend(
                resource
                    .iter()
                    .map(|(key, value)| KeyValue::new(key.clone(), value.clone())),
            );
        }
        if let Some(name) = std::env::var("OTEL_SERVICE_NAME").ok().filter(|name| !name.is_empty()) {
            overrides.push(KeyValue::new("service.name", name));
        }
        let host_name = rustix::system::uname().nodename().to_str().ok().map(str::to_owned);
        Self {
            anchor,
            scope: InstrumentationScope::builder("wasmscope").with_version(version).build(),
            host_name,
            node_name: None,
            overrides,
        }
    }

    /// On the node of this name; without one, nothing is said of it.
    pub(crate) fn on_node(mut self, name: &str) -> Self {
        self.node_name = (!name.is_empty()).then(|| name.to_owned());
        self
    }

    /// What the spans of a process have in common.
    pub(crate) fn resource(&self, process: &Process) -> Resource {
        let mut attributes = vec![
            KeyValue::new("service.name", text(&process.command)),
            KeyValue::new("process.pid", i64::from(process.pid)),
            KeyValue::new("process.executable.name", text(&process.command)),
            KeyValue::new("wasm.runtime.name", text(&process.runtime_name)),
        ];
        attributes.extend(
            process
                .runtime_version
                .as_deref()
                .map(|version| KeyValue::new("wasm.runtime.version", text(version))),
        );
        attributes.extend(
            self.host_name
                .as_deref()
                .map(|name| KeyValue::new("host.name", text(name))),
        );
        if !process.limits.is_empty() {
            let limits: Vec<StringValue> = process
                .limits
                .iter()
                .take(MAX_LOSS_ATTRIBUTES)
                .map(|limit| StringValue::from(text(limit)))
                .collect();
            attributes.push(KeyValue::new("wasmscope.limits", Value::Array(Array::String(limits))));
        }
        attributes.extend(place::attributes(&process.place, self.node_name.as_deref()));
        attributes.extend(self.overrides.iter().cloned());
        Resource::builder_empty().with_attributes(attributes).build()
    }

    /// The spans of a trace, within [`MAX_SPANS_PER_TRACE`] and [`MAX_TRACE_BYTES`].
    pub(crate) fn spans(&self, trace: &Trace) -> Converted {
        let nodes = fold::fold(&trace.root, &LIMITS);
        let ids = ids(trace, &nodes);
        let mut spans = Vec::with_capacity(nodes.len());
        let mut cold_phases = Vec::new();
        let mut byte_count = 0;
        for (node, id) in nodes.iter().zip(&ids) {
            let (id, parent_id) = (*id, node.parent.map(|parent| ids[parent]));
            byte_count += node.cost_bytes + EVENT_BYTES * (2 * node.suspends.len()).min(MAX_EVENTS_PER_SPAN);
            byte_count += node
                .traps
                .iter()
                .take(MAX_EVENTS_PER_SPAN)
                .map(|trap| cost_bytes(trap))
                .sum::<usize>();
            let span = self.span(trace, node, id, parent_id);
            if let Some(cold) = phases::cold_start(trace, node.span) {
                let sent_count = cold_phases.len();
                cold_phases.extend(phases::spans(cold, &span, id, sent_count, &self.anchor, child_id));
                byte_count += phases::PHASE_BYTES * (cold_phases.len() - sent_count);
            }
            spans.push(span);
        }
        spans.append(&mut cold_phases);
        Converted { spans, byte_count }
    }

    fn span(&self, trace: &Trace, node: &Node<'_>, id: u64, parent_id: Option<u64>) -> SpanData {
        let context = |id: u64| SpanId::from_bytes(id.to_be_bytes());
        let remote = trace.parent.as_ref();
        let remote_id = remote.map(|parent| SpanId::from_bytes(parent.span_id));
        let mut attributes = span_attributes(node.span);
        attributes.extend(run_attributes(node));
        attributes.extend(phases::attribute(trace, node.span, parent_id.is_none()));
        if parent_id.is_none() {
            attributes.extend(trace_attributes(trace));
            attributes.extend(remote.into_iter().flat_map(|parent| parent_attributes(trace, parent)));
        }
        SpanData {
            span_context: SpanContext::new(
                TraceId::from_bytes(trace.exported_id().0),
                context(id),
                trace.parent.as_ref().map_or(TraceFlags::SAMPLED, flags),
                false,
                trace.parent.as_ref().map_or(TraceState::NONE, state),
            ),
            parent_span_id: parent_id.map(context).or(remote_id).unwrap_or(SpanId::INVALID),
            parent_span_is_remote: parent_id.is_none() && remote_id.is_some(),
            span_kind: OtelKind::Internal,
            name: Cow::Owned(name(node.span)),
            start_time: self.anchor.wall(node.span.start_ns),
            end_time: self.anchor.wall(node.run.end_ns),
            status: status(node, &mut attributes),
            attributes,
            dropped_attributes_count: 0,
            events: self.events(node),
            links: opentelemetry_sdk::trace::SpanLinks::default(),
            instrumentation_scope: self.scope.clone(),
        }
    }

    fn events(&self, node: &Node<'_>) -> SpanEvents {
        let thread = |tid: u32| KeyValue::new("thread.id", i64::from(tid));
        let mut timed: Vec<(u64, &'static str, Vec<KeyValue>)> = Vec::new();
        for suspend in &node.suspends {
            timed.push((suspend.start_ns, "suspended", vec![thread(suspend.from_tid)]));
            if let Some(end_ns) = suspend.end_ns {
                timed.push((end_ns, "resumed", suspend.to_tid.map(thread).into_iter().collect()));
            }
        }
        for trap in &node.traps {
            timed.push((trap.start_ns, "exception", trap_attributes(trap)));
        }
        timed.sort_by_key(|(at_ns, ..)| *at_ns);
        let mut events = SpanEvents::default();
        events.dropped_count = timed.len().saturating_sub(MAX_EVENTS_PER_SPAN) as u32;
        timed.truncate(MAX_EVENTS_PER_SPAN);
        events.events = timed
            .into_iter()
            .map(|(at_ns, name, attributes)| Event::new(name, self.anchor.wall(at_ns), attributes, 0))
            .collect();
        events
    }
}

/// The spans of a trace that leave as they are, with their ids: the first of a run that is folded, none of what is left out.
pub(crate) fn sent_spans(trace: &Trace) -> Vec<(&Span, u64)> {
    let nodes = fold::fold(&trace.root, &LIMITS);
    let ids = ids(trace, &nodes);
    nodes.iter().map(|node| node.span).zip(ids).collect()
}

/// Of each node.
fn ids(trace: &Trace, nodes: &[Node<'_>]) -> Vec<u64> {
    let mut ids: Vec<u64> = Vec::with_capacity(nodes.len());
    for node in nodes {
        let parent_id = node.parent.map(|parent| ids[parent]);
        ids.push(parent_id.map_or_else(|| root_id(trace.id.0), |parent_id| child_id(parent_id, node.position)));
    }
    ids
}

/// splitmix64's finaliser: every bit of the input reaches every bit of the output, the same on every machine and in every version.
fn mix(value: u64) -> u64 {
    let value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    value ^ (value >> 31)
}

fn root_id(trace_id: [u8; 16]) -> u64 {
    let id = u128::from_be_bytes(trace_id);
    mix((id >> 64) as u64 ^ mix(id as u64)).max(1)
}

fn child_id(parent_id: u64, position: usize) -> u64 {
    mix(parent_id.wrapping_add(0x9e37_79b9_7f4a_7c15_u64.wrapping_mul(position as u64 + 1))).max(1)
}

fn name(span: &Span) -> String {
    match &span.kind {
        SpanKind::Invoke {
            function: Some(function),
        } => format!("{} {}", text(&function.module.name), text(&function.name)),
        SpanKind::Invoke { function: None } => "wasm invoke".to_owned(),
        SpanKind::HostCall { import: Some(import) } => format!("{}.{}", text(&import.module), text(&import.name)),
        SpanKind::HostCall { import: None } => "wasm host call".to_owned(),
        SpanKind::Syscall { name, .. } => text(name),
        SpanKind::Trap { code, .. } => format!("trap {}", text(code)),
        SpanKind::MemoryGrow(_) => "memory.grow".to_owned(),
        SpanKind::TableGrow(_) => "table.grow".to_owned(),
        SpanKind::Interruption(interruption) => format!("interrupted {}", interruption.cause.as_str()),
    }
}

fn text(untrusted: &str) -> String {
    bounded_line(untrusted, MAX_TEXT_BYTES).into_owned()
}

fn cost_bytes(span: &Span) -> usize {
    let names = match &span.kind {
        SpanKind::Invoke { function } => function.as_deref().map_or(0, function_bytes),
        SpanKind::HostCall { import } => import
            .as_ref()
            .map_or(0, |import| 2 * (import.module.len() + import.name.len())),
        SpanKind::Syscall { name, .. } => name.len(),
        SpanKind::Trap { code, function, .. } => 3 * code.len() + function.as_deref().map_or(0, function_bytes),
        SpanKind::MemoryGrow(_) | SpanKind::TableGrow(_) | SpanKind::Interruption(_) => GROWTH_BYTES,
    };
    let caller = span.stack.first().map_or(0, |function| function_bytes(function));
    let frames: usize = span
        .stack
        .iter()
        .map(|function| function.module.name.len() + function.name.len() + 2)
        .sum();
    FIXED_SPAN_BYTES + names.min(4 * MAX_TEXT_BYTES) + caller.min(4 * MAX_TEXT_BYTES) + frames.min(MAX_STACK_BYTES)
}

fn function_bytes(function: &Function) -> usize {
    2 * (function.module.name.len() + function.name.len())
}

fn span_attributes(span: &Span) -> Vec<KeyValue> {
    let mut attributes = vec![
        KeyValue::new("wasmscope.role", span.role().as_str()),
        KeyValue::new("thread.id", i64::from(span.tid)),
    ];
    let acting = match &span.kind {
        SpanKind::Invoke { function } => function.as_ref(),
        _ => span.stack.first(),
    };
    attributes.extend(acting.into_iter().flat_map(|function| function_attributes(function)));
    match &span.kind {
        SpanKind::HostCall { import: Some(import) } => {
            attributes.push(KeyValue::new("wasm.import.module", text(&import.module)));
            attributes.push(KeyValue::new("wasm.import.name", text(&import.name)));
        }
        // Arguments stay out: they are addresses and descriptors, and those that point at paths must never be followed from here.
        SpanKind::Syscall { number, result, .. } => {
            attributes.push(KeyValue::new(
                "wasmscope.syscall.number",
                i64::try_from(*number).unwrap_or(i64::MAX),
            ));
            if span.end_bound != Bound::Open {
                attributes.push(KeyValue::new("wasmscope.syscall.result", *result));
            }
            if span.is_on_helper() {
                attributes.push(KeyValue::new("wasmscope.helper_thread", true));
            }
        }
        SpanKind::MemoryGrow(growth) => attributes.extend(growth_attributes("wasm.memory", growth)),
        SpanKind::TableGrow(growth) => attributes.extend(growth_attributes("wasm.table", growth)),
        SpanKind::Interruption(interruption) => {
            attributes.push(KeyValue::new("wasm.interruption.cause", interruption.cause.as_str()));
            attributes.extend(wasm_offset("wasm.instruction.offset", interruption.wasm_offset));
        }
        _ => {}
    }
    attributes.extend(bound_attribute("wasmscope.start_bound", span.start_bound));
    attributes.extend(bound_attribute("wasmscope.end_bound", span.end_bound));
    if !span.stack.is_empty() {
        attributes.push(KeyValue::new("code.stacktrace", stack_text(span)));
    }
    attributes
}

fn function_attributes(function: &Function) -> [KeyValue; 5] {
    let module = text(&function.module.name);
    let name = text(&function.name);
    [
        KeyValue::new("code.function.name", format!("{module}.{name}")),
        KeyValue::new("wasm.module.name", module),
        KeyValue::new("wasm.module.hash", text(&function.module.hash)),
        KeyValue::new("wasm.function.name", name),
        KeyValue::new("wasm.function.index", i64::from(function.index)),
    ]
}

fn bound_attribute(key: &'static str, bound: Bound) -> Option<KeyValue> {
    match bound {
        Bound::Exact => None,
        Bound::Inferred => Some(KeyValue::new(key, "inferred")),
        Bound::Open => Some(KeyValue::new(key, "open")),
    }
}

/// `module.function`, innermost first, one a line; cut frames are stated in the last line.
fn stack_text(span: &Span) -> String {
    let mut lines = String::new();
    for (index, function) in span.stack.iter().enumerate() {
        let line = format!("{}.{}", text(&function.module.name), text(&function.name));
        if lines.len() + line.len() > MAX_STACK_BYTES {
            let _ = writeln!(lines, "… {} more", span.stack.len() - index);
            break;
        }
        let _ = writeln!(lines, "{line}");
    }
    if span.stack_truncated {
        lines.push_str("… deeper frames not walked\n");
    }
    lines.truncate(lines.trim_end().len());
    lines
}

/// The sampling decision is the application's; that the span is here says that it is kept all the same.
fn flags(parent: &Parent) -> TraceFlags {
    TraceFlags::new(parent.flags) | TraceFlags::SAMPLED
}

fn state(parent: &Parent) -> TraceState {
    let state = parent.tracestate.as_deref();
    state.and_then(|state| state.parse().ok()).unwrap_or(TraceState::NONE)
}

fn parent_attributes(trace: &Trace, parent: &Parent) -> Vec<KeyValue> {
    let mut attributes = vec![
        KeyValue::new("wasmscope.trace.id", trace.id.to_string()),
        KeyValue::new("wasmscope.parent.source", parent.how.as_str()),
    ];
    attributes.extend(
        parent
            .method
            .as_deref()
            .map(|method| KeyValue::new("http.request.method", text(method))),
    );
    attributes
}

fn run_attributes(node: &Node<'_>) -> Vec<KeyValue> {
    let int = |key: &'static str, value: u64| KeyValue::new(key, i64::try_from(value).unwrap_or(i64::MAX));
    let mut attributes = Vec::new();
    if node.run.count > 1 {
        attributes.push(int("wasmscope.fold.count", node.run.count));
        attributes.push(int("wasmscope.fold.duration_min_ns", node.run.min_ns));
        attributes.push(int("wasmscope.fold.duration_max_ns", node.run.max_ns));
        attributes.push(int("wasmscope.fold.duration_sum_ns", node.run.sum_ns));
    }
    if node.cut_count > 0 {
        attributes.push(int("wasmscope.cut.span_count", node.cut_count));
    }
    attributes
}

fn trace_attributes(trace: &Trace) -> Vec<KeyValue> {
    let int = |value: u64| i64::try_from(value).unwrap_or(i64::MAX);
    let mut attributes = vec![KeyValue::new("wasmscope.event_count", int(trace.event_count))];
    for probe in ProbeKind::ALL {
        let mut of_probe = trace.pauses.iter().filter(|pause| pause.probe == probe).peekable();
        if of_probe.peek().is_some() {
            let paused_ns = of_probe.map(|pause| pause.end_ns.saturating_sub(pause.start_ns)).sum();
            let key = format!("wasmscope.paused.{}_ns", probe.as_str());
            attributes.push(KeyValue::new(Key::from(key), int(paused_ns)));
        }
    }
    for loss in trace.losses.iter().take(MAX_LOSS_ATTRIBUTES) {
        let key = format!(
            "wasmscope.lost.{}.{}",
            bounded(&loss.layer, 64),
            bounded(&loss.reason, 64)
        );
        attributes.push(KeyValue::new(Key::from(key), int(loss.count)));
    }
    let unnamed: u64 = trace
        .losses
        .iter()
        .skip(MAX_LOSS_ATTRIBUTES)
        .map(|loss| loss.count)
        .sum();
    if unnamed > 0 {
        attributes.push(KeyValue::new("wasmscope.lost.other", int(unnamed)));
    }
    attributes
}

fn trap_attributes(trap: &Span) -> Vec<KeyValue> {
    let SpanKind::Trap {
        code,
        function,
        native_offset,
        wasm_offset: offset,
    } = &trap.kind
    else {
        return Vec::new();
    };
    let code = text(code);
    let mut attributes = vec![
        KeyValue::new("exception.type", format!("trap.{code}")),
        KeyValue::new("exception.message", format!("wasm trap: {code}")),
    ];
    attributes.push(KeyValue::new("wasm.trap.code", code));
    attributes.extend(wasm_offset("wasm.trap.offset", *offset));
    attributes.push(KeyValue::new(
        "wasmscope.native_offset",
        i64::try_from(*native_offset).unwrap_or(i64::MAX),
    ));
    attributes.push(KeyValue::new("thread.id", i64::from(trap.tid)));
    attributes.extend(function.as_deref().into_iter().flat_map(function_attributes));
    if !trap.stack.is_empty() {
        attributes.push(KeyValue::new("exception.stacktrace", stack_text(trap)));
    }
    attributes
}

/// Success is left unset, as the conventions ask of instrumentation. Errors that are how non-blocking I/O works are named but are no failure.
fn status(node: &Node<'_>, attributes: &mut Vec<KeyValue>) -> Status {
    let outcome = &node.span.outcome;
    if *outcome != Outcome::Ok {
        attributes.push(KeyValue::new("wasmscope.outcome", outcome.as_str()));
    }
    let mut failed = |error_type: String, description: String| {
        attributes.push(KeyValue::new("error.type", error_type));
        Status::error(description)
    };
    match outcome {
        Outcome::Trap { code } => trapped(&text(code), attributes),
        Outcome::HostError => failed("host_error".to_owned(), "a host call returned an error".to_owned()),
        Outcome::Errno { errno } => {
            let name = errno::name(*errno);
            let status = failed(name.to_string(), name.into_owned());
            if errno::is_flow_control(*errno) {
                Status::Unset
            } else {
                status
            }
        }
        Outcome::Ok | Outcome::Exit | Outcome::Refused | Outcome::Unfinished | Outcome::Unknown => {
            match node.traps.first().map(|trap| &trap.kind) {
                Some(SpanKind::Trap { code, .. }) if *outcome != Outcome::Ok => trapped(&text(code), attributes),
                _ => Status::Unset,
            }
        }
    }
}

fn trapped(code: &str, attributes: &mut Vec<KeyValue>) -> Status {
    attributes.push(KeyValue::new("wasm.trap.code", code.to_owned()));
    attributes.push(KeyValue::new("error.type", format!("trap.{code}")));
    Status::error(format!("wasm trap: {code}"))
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;
    use std::sync::Arc;

    use super::*;
    use crate::sink::testing::{function, growth, host_call, interruption, invoke, process, syscall, trace, trap};
    use crate::span::{InterruptionCause, Loss, Suspend};

    fn convert(root: Span) -> Vec<SpanData> {
        converter().spans(&trace(root)).spans
    }

    fn converter() -> Converter {
        Converter::from_env(ClockAnchor {
            monotonic_ns: 1_000,
            unix_ns: 1_700_000_000_000_001_000,
        })
    }

    fn value<'a>(span: &'a SpanData, key: &str) -> Option<&'a Value> {
        span.attributes
            .iter()
            .find(|attribute| attribute.key.as_str() == key)
            .map(|attribute| &attribute.value)
    }

    fn string(span: &SpanData, key: &str) -> Option<String> {
        value(span, key).map(|value| value.as_str().into_owned())
    }

    #[test]
    fn growth_and_interruptions_say_how_much_and_where() {
        let mut root = invoke("run", 0, 100);
        root.children = vec![
            growth(Some(1), 10),
            interruption(InterruptionCause::Epoch, 20),
            trap("interrupt", 90),
        ];
        root.outcome = Outcome::Trap {
            code: "interrupt".to_owned(),
        };
        let spans = convert(root);
        let number = |span: &SpanData, key: &str| match value(span, key) {
            Some(Value::I64(number)) => Some(*number),
            _ => None,
        };
        let grown = spans.iter().find(|span| span.name == "memory.grow").expect("a span");
        for (key, expected) in [
            ("wasm.memory.delta_pages", 2),
            ("wasm.memory.old_pages", 1),
            ("wasm.memory.new_bytes", 3 * 65_536),
            ("wasm.memory.maximum_bytes", 20 * 65_536),
            ("wasm.instruction.offset", 0x63),
        ] {
            assert_eq!(number(grown, key), Some(expected), "{key}");
        }
        let stop = spans
            .iter()
            .find(|span| span.name == "interrupted epoch")
            .expect("a span");
        assert_eq!(value(stop, "wasm.interruption.cause"), Some(&Value::from("epoch")));
        let root = spans.iter().find(|span| span.name.ends_with("run")).expect("a span");
        let event = &root.events.events[0];
        let offset = event
            .attributes
            .iter()
            .find(|attribute| attribute.key.as_str() == "wasm.trap.offset");
        assert_eq!(offset.map(|attribute| &attribute.value), Some(&Value::I64(0x2f)));
    }

    #[test]
    fn ids_are_the_same_every_time_and_never_shared() {
        let mut root = invoke("run", 0, 1_000);
        root.children = (0..12)
            .map(|i| host_call(&format!("import_{i}"), i * 10, i * 10 + 5))
            .collect();
        let ids = |spans: &[SpanData]| spans.iter().map(|span| span.span_context.span_id()).collect::<Vec<_>>();
        let once = ids(&convert(root.clone()));
        assert_eq!(once, ids(&convert(root)));
        assert_eq!(once.iter().collect::<HashSet<_>>().len(), 13);
        assert!(once.iter().all(|id| *id != SpanId::INVALID));
    }

    #[test]
    fn a_trap_is_an_event_and_the_status_of_the_call_it_ended() {
        let mut root = invoke("run", 0, 10);
        root.outcome = Outcome::Trap {
            code: "memory_out_of_bounds".to_owned(),
        };
        root.children = vec![trap("memory_out_of_bounds", 9)];
        let spans = convert(root);
        assert_eq!(spans.len(), 1);
        assert_eq!(spans[0].status, Status::error("wasm trap: memory_out_of_bounds"));
        assert_eq!(
            string(&spans[0], "error.type").as_deref(),
            Some("trap.memory_out_of_bounds")
        );
        assert_eq!(spans[0].events[0].name, "exception");
        assert!(
            spans[0].events[0]
                .attributes
                .contains(&KeyValue::new("wasm.function.name", "parse_rule"))
        );
    }

    #[test]
    fn a_suspension_is_told_once_by_the_innermost_call() {
        let suspend = Suspend {
            start_ns: 20,
            end_ns: Some(30),
            from_tid: 11,
            to_tid: Some(12),
        };
        let mut call = host_call("fetch", 10, 40);
        call.suspends = vec![suspend];
        let mut root = invoke("run", 0, 50);
        root.suspends = vec![suspend];
        root.children = vec![call];
        let spans = convert(root);
        assert!(spans[0].events.is_empty());
        let events: Vec<_> = spans[1]
            .events
            .iter()
            .map(|event| (event.name.as_ref(), event.attributes.clone()))
            .collect();
        assert_eq!(
            events,
            [
                ("suspended", vec![KeyValue::new("thread.id", 11)]),
                ("resumed", vec![KeyValue::new("thread.id", 12)])
            ]
        );
    }

    #[test]
    fn a_would_block_error_is_named_but_is_no_failure() {
        let mut root = invoke("run", 0, 50);
        let mut call = syscall("read", 10, 11);
        call.outcome = Outcome::Errno {
            errno: libc::EAGAIN as u16,
        };
        root.children = vec![call.clone(), call];
        root.children[1].outcome = Outcome::Errno {
            errno: libc::ENOENT as u16,
        };
        let spans = convert(root);
        assert_eq!(
            (&spans[1].status, string(&spans[1], "error.type").as_deref()),
            (&Status::Unset, Some("EAGAIN"))
        );
        assert_eq!(
            (&spans[2].status, string(&spans[2], "error.type").as_deref()),
            (&Status::error("ENOENT"), Some("ENOENT"))
        );
    }

    #[test]
    fn a_syscall_of_a_helper_thread_says_so_and_names_the_thread() {
        let mut root = invoke("run", 0, 50);
        let mut call = syscall("openat", 10, 11);
        call.tid = 77;
        root.children = vec![call.clone(), call];
        if let SpanKind::Syscall { on_helper, .. } = &mut root.children[1].kind {
            *on_helper = true;
        }
        let spans = convert(root);
        let helper = KeyValue::new("wasmscope.helper_thread", true);
        assert!(!spans[1].attributes.contains(&helper));
        assert!(spans[2].attributes.contains(&helper));
        assert!(spans[2].attributes.contains(&KeyValue::new("thread.id", 77)));
    }

    #[test]
    fn syscall_arguments_do_not_leave() {
        let mut root = invoke("run", 0, 50);
        root.children = vec![syscall("openat", 10, 11)];
        let spans = convert(root);
        let address = 0x7fff_0000_i64.to_string();
        assert!(
            spans[1]
                .attributes
                .iter()
                .all(|attribute| attribute.value.as_str() != address),
            "{:?}",
            spans[1].attributes
        );
    }

    #[test]
    fn the_root_states_what_was_lost() {
        let mut trace = trace(invoke("run", 0, 50));
        trace.losses = vec![Loss {
            layer: "ring".to_owned(),
            reason: "ring_full".to_owned(),
            count: 3,
        }];
        let spans = converter().spans(&trace).spans;
        assert_eq!(value(&spans[0], "wasmscope.lost.ring.ring_full"), Some(&Value::I64(3)));
    }

    #[test]
    fn names_and_stacks_of_any_size_stay_within_the_byte_estimate() {
        let hostile = Arc::new(Function {
            name: "x\n\"é".repeat(3_000),
            ..(*function("f")).clone()
        });
        let mut root = invoke("run", 0, 50);
        root.children = (0..100)
            .map(|i| {
                let mut call = host_call(&format!("{i}{}", "é".repeat(9_000)), i, i);
                call.stack = vec![Arc::clone(&hostile); 500];
                call
            })
            .collect();
        let converted = converter().spans(&trace(root));
        let request = crate::sink::otlp_json::request(&converter(), &process(), converted.spans);
        let encoded_bytes = prost::Message::encoded_len(&request);
        assert!(
            encoded_bytes <= converted.byte_count,
            "{encoded_bytes} > {}",
            converted.byte_count
        );
        assert!(encoded_bytes < MAX_TRACE_BYTES);
    }

    #[test]
    fn a_function_name_cannot_forge_a_stack_frame() {
        let mut call = host_call("a", 1, 2);
        call.stack = vec![Arc::new(Function {
            name: "f\nadmin.login".to_owned(),
            ..(*function("f")).clone()
        })];
        let mut root = invoke("run", 0, 50);
        root.children = vec![call];
        let stack = string(&convert(root)[1], "code.stacktrace").unwrap();
        assert_eq!(stack.lines().count(), 1, "{stack:?}");
    }

    #[test]
    fn a_trace_with_a_parent_leaves_as_a_part_of_the_applications_trace() {
        let mut root = invoke("run", 0, 50);
        root.children = vec![host_call("a", 1, 2)];
        let own = trace(root);
        let parent = Parent::parse(
            b"00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-02",
            crate::span::ParentSource::Request,
        )
        .unwrap()
        .with_tracestate(b"vendor=1");
        let under = Trace {
            parent: Some(parent.clone()),
            ..own.clone()
        };
        let (alone, under) = (converter().spans(&own).spans, converter().spans(&under).spans);
        for (alone, under) in alone.iter().zip(&under) {
            assert_eq!(under.span_context.trace_id().to_bytes(), parent.trace_id.0);
            assert_eq!(under.span_context.trace_state().header(), "vendor=1");
            assert_eq!(under.span_context.span_id(), alone.span_context.span_id());
            assert_eq!(under.span_kind, OtelKind::Internal);
        }
        assert_eq!(under[0].parent_span_id.to_bytes(), parent.span_id);
        assert_eq!(
            (under[0].parent_span_is_remote, under[1].parent_span_is_remote),
            (true, false)
        );
        assert_eq!(under[1].parent_span_id, under[0].span_context.span_id());
        assert_eq!(string(&under[0], "wasmscope.trace.id"), Some(own.id.to_string()));
        assert_eq!(string(&alone[0], "wasmscope.trace.id"), None);
    }

    #[test]
    fn the_process_names_the_service() {
        let resource = converter().resource(&process());
        assert_eq!(resource.get(&Key::new("service.name")), Some(Value::from("edge-host")));
        assert_eq!(resource.get(&Key::new("wasm.runtime.version")), Some(Value::from("48")));
        assert_eq!(
            resource.get(&Key::new("telemetry.sdk.language")),
            Some(Value::from("rust"))
        );
    }
}
