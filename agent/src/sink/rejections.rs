//! Spans that a collector took in and then rejected (OTLP's "partial success").
//!
//! `opentelemetry-otlp` reports them nowhere but in its log, over both transports alike. Its futures run under this subscriber, which counts them and keeps
//! the rest of its log (a line for each failed request) out of ours.

use std::sync::atomic::{AtomicU64, Ordering};

use tracing::field::{Field, Visit};
use tracing::metadata::LevelFilter;
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Level, Metadata, Subscriber};

/// Counts rejected spans.
#[derive(Debug, Default)]
pub(crate) struct Rejections {
    span_count: AtomicU64,
}

impl Rejections {
    pub(crate) fn count(&self) -> u64 {
        self.span_count.load(Ordering::Relaxed)
    }
}

impl Subscriber for Rejections {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.is_event() && *metadata.level() == Level::WARN && metadata.target() == "opentelemetry-otlp"
    }

    fn max_level_hint(&self) -> Option<LevelFilter> {
        Some(LevelFilter::WARN)
    }

    fn event(&self, event: &Event<'_>) {
        if event.metadata().name().ends_with(".PartialSuccess") {
            event.record(&mut Visitor(self));
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

struct Visitor<'a>(&'a Rejections);

impl Visit for Visitor<'_> {
    fn record_i64(&mut self, field: &Field, value: i64) {
        if field.name() == "rejected_spans" {
            self.0
                .span_count
                .fetch_add(u64::try_from(value).unwrap_or(0), Ordering::Relaxed);
        }
    }

    fn record_debug(&mut self, _: &Field, _: &dyn std::fmt::Debug) {}
}
