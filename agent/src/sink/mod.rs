//! Where finished traces leave the process; each sink reads [`crate::span`] and knows nothing of where traces come from.
//!
//! | sink | leaves as |
//! |---|---|
//! | [`otlp`] | OTLP over gRPC or HTTP, to a collector |
//! | [`otlp_metrics`] | the metrics, as OTLP, to a collector |
//! | [`otlp_json`] | OTLP/JSON lines, to a file |
//! | [`json`] | the model itself, one object a line, to a file |
//!
//! A sink never blocks the traced processes or the ring: what it cannot take it counts as lost, by reason.

pub(crate) mod fold;
mod growth;
pub mod json;
pub mod otlp;
pub mod otlp_config;
pub mod otlp_json;
pub mod otlp_metrics;
mod otlp_points;
mod otlp_starts;
mod otlp_throttle;
pub mod otlp_transport;
mod phases;
mod place;
mod rejections;
pub(crate) mod spans;
pub(crate) mod text;
mod tls_files;

/// Nesting of spans that files and exporters follow; deeper ones are counted as left out. A guest that calls back into itself without end could
/// otherwise exhaust the stack, and readers of JSON stop at about twice this many levels (`serde_json` at 128).
pub const MAX_DEPTH: usize = 60;

#[cfg(test)]
pub(crate) mod testing;
