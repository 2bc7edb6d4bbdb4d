//! The recorder's own metrics, read from it at each scrape.

use std::fmt;
use std::sync::Arc;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric as _};
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::registry::Unit;

use super::{Recorder, Stats};

/// Puts `wasmscope_recorder_*` into a registry.
#[derive(Clone, Debug)]
pub struct RecorderCollector(pub Arc<Recorder>);

impl Collector for RecorderCollector {
    fn encode(&self, encoder: DescriptorEncoder) -> Result<(), fmt::Error> {
        encode(&self.0.stats(), encoder)
    }
}

fn encode(stats: &Stats, mut encoder: DescriptorEncoder) -> Result<(), fmt::Error> {
    let gauges = [
        (
            "wasmscope_recorder",
            "Memory that the flight recorder takes.",
            Some(&Unit::Bytes),
            stats.bytes,
        ),
        (
            "wasmscope_recorder_max",
            "Most memory that the flight recorder may take.",
            Some(&Unit::Bytes),
            stats.max_bytes,
        ),
        (
            "wasmscope_recorder_traces",
            "Traces that the flight recorder keeps.",
            None,
            stats.traces,
        ),
        (
            "wasmscope_recorder_keys",
            "Exports of pods and processes that the flight recorder tells apart.",
            None,
            stats.keys,
        ),
    ];
    for (name, help, unit, value) in gauges {
        let gauge = ConstGauge::new(value.cast_signed());
        let metric = encoder.encode_descriptor(name, help, unit, prometheus_client::metrics::MetricType::Gauge)?;
        gauge.encode(metric)?;
    }
    let counters = [
        (
            "wasmscope_recorder_offered_traces",
            "Traces that the flight recorder was offered.",
            stats.offered,
        ),
        (
            "wasmscope_recorder_expired_traces",
            "Kept traces that became older than the window, which is no loss.",
            stats.window_passed,
        ),
    ];
    for (name, help, value) in counters {
        let metric = encoder.encode_descriptor(name, help, None, prometheus_client::metrics::MetricType::Counter)?;
        ConstCounter::new(value).encode(metric)?;
    }
    let mut dropped = encoder.encode_descriptor(
        "wasmscope_recorder_dropped",
        "Traces that should have been kept and were not, or not long enough, by reason.",
        None,
        prometheus_client::metrics::MetricType::Counter,
    )?;
    for (reason, count) in [
        ("over_budget", stats.over_budget),
        ("trace_too_large", stats.trace_too_large),
        ("too_many_keys", stats.too_many_keys),
    ] {
        ConstCounter::new(count).encode(dropped.encode_family(&[("reason", reason)])?)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock::ClockAnchor;
    use crate::recorder::RecorderConfig;
    use crate::sink::testing::{invoke, trace};

    #[test]
    fn every_scrape_says_how_full_it_is() {
        let recorder = Arc::new(Recorder::new(
            RecorderConfig::default(),
            ClockAnchor::now(),
            "6.18".to_owned(),
        ));
        recorder.offer(&trace(invoke("run", 1, 2)));
        let mut registry = prometheus_client::registry::Registry::default();
        registry.register_collector(Box::new(RecorderCollector(recorder.clone())));
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, &registry).unwrap();
        let bytes = recorder.stats().bytes;
        for line in [
            &format!("wasmscope_recorder_bytes {bytes}\n"),
            "wasmscope_recorder_traces 1\n",
            "wasmscope_recorder_offered_traces_total 1\n",
            "wasmscope_recorder_dropped_total{reason=\"over_budget\"} 0\n",
        ] {
            assert!(text.contains(line), "{line} is not in\n{text}");
        }
    }
}
