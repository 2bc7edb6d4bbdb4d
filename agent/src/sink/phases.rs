//! Cold starts as spans: an attribute of the invocation that was the first, and what came before as its children, although
//! they began earlier: that invocation is what the work was done for.

use std::borrow::Cow;

use opentelemetry::trace::{SpanContext, SpanId, SpanKind as OtelKind, Status};
use opentelemetry::{KeyValue, Value};
use opentelemetry_sdk::trace::{SpanData, SpanEvents, SpanLinks};

use super::text::bounded_line;
use crate::clock::ClockAnchor;
use crate::span::{ColdStart, Phase, PhaseKind, Span, Trace};

/// Phases sent for one trace.
const MAX_PHASES_PER_TRACE: usize = 128;
/// A phase on the wire.
pub(super) const PHASE_BYTES: usize = 500;
/// The model's children of a span have lower positions.
const FIRST_POSITION: usize = 1 << 48;
const MAX_TEXT_BYTES: usize = 256;

/// The cold start that a span of `trace` paid for.
pub(super) fn cold_start<'a>(trace: &'a Trace, span: &Span) -> Option<&'a ColdStart> {
    trace.starts.cold.iter().find(|cold| cold.is_of(span))
}

/// `faas.coldstart`, where it is known; of nested invocations only the first ones are.
pub(super) fn attribute(trace: &Trace, span: &Span, is_root: bool) -> Option<KeyValue> {
    if cold_start(trace, span).is_some() {
        return Some(KeyValue::new("faas.coldstart", true));
    }
    (is_root && trace.starts.is_warm).then(|| KeyValue::new("faas.coldstart", false))
}

/// The phases of a cold start as spans below `invocation`, which has the id `parent_id`; `child_id` makes ids of positions.
pub(super) fn spans(
    cold: &ColdStart,
    invocation: &SpanData,
    parent_id: u64,
    sent_count: usize,
    anchor: &ClockAnchor,
    child_id: impl Fn(u64, usize) -> u64,
) -> Vec<SpanData> {
    let room = MAX_PHASES_PER_TRACE.saturating_sub(sent_count);
    let id_of = |position: usize| child_id(parent_id, FIRST_POSITION + position);
    let mut spans = Vec::new();
    for (position, phase) in cold.phases.iter().enumerate().take(room) {
        let whole = cold
            .phases
            .iter()
            .take(room)
            .position(|whole| phase.kind == PhaseKind::Publish && contains(whole, phase));
        spans.push(SpanData {
            span_context: SpanContext::new(
                invocation.span_context.trace_id(),
                span_id(id_of(position)),
                invocation.span_context.trace_flags(),
                false,
                invocation.span_context.trace_state().clone(),
            ),
            parent_span_id: span_id(whole.map_or(parent_id, id_of)),
            parent_span_is_remote: false,
            span_kind: OtelKind::Internal,
            name: Cow::Owned(format!("wasm.{}", phase.kind.as_str())),
            start_time: anchor.wall(phase.start_ns),
            end_time: anchor.wall(phase.end_ns),
            status: Status::Unset,
            attributes: attributes(cold, phase),
            dropped_attributes_count: 0,
            events: SpanEvents::default(),
            links: SpanLinks::default(),
            instrumentation_scope: invocation.instrumentation_scope.clone(),
        });
    }
    spans
}

fn attributes(cold: &ColdStart, phase: &Phase) -> Vec<KeyValue> {
    let text = |untrusted: &str| Value::from(bounded_line(untrusted, MAX_TEXT_BYTES).into_owned());
    vec![
        KeyValue::new("wasmscope.role", phase.kind.as_str()),
        KeyValue::new("thread.id", i64::from(phase.tid)),
        KeyValue::new("wasm.module.name", text(&cold.module.name)),
        KeyValue::new("wasm.module.hash", text(&cold.module.hash)),
    ]
}

fn contains(whole: &Phase, part: &Phase) -> bool {
    whole.kind != PhaseKind::Publish && whole.start_ns <= part.start_ns && part.end_ns <= whole.end_ns
}

fn span_id(id: u64) -> SpanId {
    SpanId::from_bytes(id.to_be_bytes())
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::sink::spans::Converter;
    use crate::sink::testing;
    use crate::span::{Module, Role, SpanKind, Starts};

    const ANCHOR: ClockAnchor = ClockAnchor {
        monotonic_ns: 1_000_000,
        unix_ns: 1_700_000_000_000_000_000,
    };

    fn phase(kind: PhaseKind, start_ns: u64, end_ns: u64) -> Phase {
        Phase {
            kind,
            start_ns,
            end_ns,
            tid: 7,
        }
    }

    fn trace(starts: impl FnOnce(&Span) -> Starts) -> Trace {
        let kind = SpanKind::Invoke {
            function: Some(testing::function("handle_request")),
        };
        let mut trace = testing::trace(testing::span(kind, 9_000_000, 9_500_000));
        trace.starts = starts(&trace.root);
        trace
    }

    fn value(span: &SpanData, key: &str) -> Option<Value> {
        let found = span.attributes.iter().find(|attribute| attribute.key.as_str() == key);
        found.map(|attribute| attribute.value.clone())
    }

    #[test]
    fn the_phases_of_a_cold_start_are_spans_below_the_invocation_that_was_the_first() {
        let trace = trace(|root| {
            assert_eq!(root.role(), Role::Invoke);
            Starts {
                cold: vec![ColdStart {
                    invoked_ns: root.start_ns,
                    tid: root.tid,
                    module: Arc::new(Module {
                        name: "policy.wasm".to_owned(),
                        hash: "3f9ac2000000".to_owned(),
                    }),
                    published_ns: 4_500_000,
                    phases: vec![
                        phase(PhaseKind::Deserialize, 4_000_000, 6_900_000),
                        phase(PhaseKind::Publish, 4_500_000, 4_600_000),
                        phase(PhaseKind::Instantiate, 7_000_000, 7_510_000),
                    ],
                }],
                is_warm: false,
            }
        });
        let spans = Converter::from_env(ANCHOR).spans(&trace).spans;
        let names: Vec<_> = spans.iter().map(|span| span.name.as_ref()).collect();
        assert_eq!(
            names,
            [
                "policy.wasm handle_request",
                "wasm.deserialize",
                "wasm.publish",
                "wasm.instantiate"
            ]
        );
        assert_eq!(value(&spans[0], "faas.coldstart"), Some(Value::Bool(true)));
        let (root, deserialize) = (spans[0].span_context.span_id(), spans[1].span_context.span_id());
        assert_eq!(
            spans[1..].iter().map(|span| span.parent_span_id).collect::<Vec<_>>(),
            [root, deserialize, root]
        );
        assert!(
            spans
                .iter()
                .all(|span| span.span_context.trace_id() == spans[0].span_context.trace_id())
        );
        assert_eq!(
            spans[1]
                .end_time
                .duration_since(spans[1].start_time)
                .unwrap()
                .as_nanos(),
            2_900_000
        );
        assert_eq!(value(&spans[3], "wasmscope.role"), Some(Value::from("instantiate")));
    }

    #[test]
    fn warm_is_said_only_where_it_is_known() {
        let converter = Converter::from_env(ANCHOR);
        for (is_warm, said) in [(true, Some(Value::Bool(false))), (false, None)] {
            let trace = trace(|_| Starts {
                cold: Vec::new(),
                is_warm,
            });
            assert_eq!(value(&converter.spans(&trace).spans[0], "faas.coldstart"), said);
        }
    }
}
