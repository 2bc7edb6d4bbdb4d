//! What `opentelemetry-otlp` reports nowhere but in its log: spans that a collector took in and then rejected (OTLP's "partial success"), and over gRPC the
//! details of a status, which say when to come back.
//!
//! Its futures run under this subscriber, which takes note of both and keeps the rest of its log (a line for each failed request) out of ours.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use tracing::field::{Field, Visit};
use tracing::metadata::LevelFilter;
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Level, Metadata, Subscriber};

use super::otlp_throttle::Throttle;

/// How the library's log calls a request over gRPC that it has given up, after the name of the client.
const EXPORT_FAILED: &str = "TracesClient.ExportFailed";

/// Counts rejected spans, and notes what is said of when to come back.
#[derive(Debug, Default)]
pub(crate) struct Rejections {
    span_count: AtomicU64,
    throttle: Arc<Throttle>,
}

impl Rejections {
    pub(crate) fn new(throttle: Arc<Throttle>) -> Self {
        Self {
            throttle,
            ..Self::default()
        }
    }

    pub(crate) fn count(&self) -> u64 {
        self.span_count.load(Ordering::Relaxed)
    }
}

impl Subscriber for Rejections {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        let is_wanted = match *metadata.level() {
            Level::WARN => true,
            Level::DEBUG => metadata.name().ends_with(EXPORT_FAILED),
            _ => false,
        };
        is_wanted && metadata.is_event() && metadata.target() == "opentelemetry-otlp"
    }

    fn max_level_hint(&self) -> Option<LevelFilter> {
        Some(LevelFilter::DEBUG)
    }

    fn event(&self, event: &Event<'_>) {
        let name = event.metadata().name();
        if name.ends_with(".PartialSuccess") || name.ends_with(EXPORT_FAILED) {
            event.record(&mut Visitor {
                noted: self,
                code: String::new(),
            });
        }
    }

    fn new_span(&self, _: &Attributes<'_>) -> Id {
        Id::from_u64(1)
    }

    fn record(&self, _: &Id, _: &Record<'_>) {}

    fn record_follows_from(&self, _: &Id, _: &Id) {}

    fn enter(&self, _: &Id) {}

    fn exit(&self, _: &Id) {}
}

struct Visitor<'a> {
    noted: &'a Rejections,
    /// Of the status; the library says it before the details.
    code: String,
}

impl Visit for Visitor<'_> {
    fn record_i64(&mut self, field: &Field, value: i64) {
        if field.name() == "rejected_spans" {
            self.noted
                .span_count
                .fetch_add(u64::try_from(value).unwrap_or(0), Ordering::Relaxed);
        }
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        match field.name() {
            "grpc_code" => value.clone_into(&mut self.code),
            "grpc_details" => self.noted.throttle.note_status(&self.code, &listed(value)),
            _ => {}
        }
    }

    fn record_debug(&mut self, _: &Field, _: &dyn std::fmt::Debug) {}
}

/// Bytes as Rust prints them: `[8, 14]`.
fn listed(text: &str) -> Vec<u8> {
    let inner = text.trim_start_matches('[').trim_end_matches(']');
    inner.split(", ").map_while(|number| number.parse().ok()).collect()
}
