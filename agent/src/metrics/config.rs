//! The section `[metrics]` of the configuration.

use serde::{Deserialize, Serialize};

/// How metrics that the kernel counts are kept and shown.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct MetricsConfig {
    /// Series of one family of counters, those of `other` aside: 1 to 100,000; 2,000 by default.
    pub max_counter_series: usize,
    /// Series of one family of histograms, those of `other` aside: 1 to 100,000; 500 by default.
    pub max_histogram_series: usize,
    /// Seconds that series outlive the last process they are of: 0 to 86,400; 300 by default.
    pub expiry_seconds: u64,
    /// Buckets of histograms with fixed bounds, one an octave; on by default.
    pub classic_histograms: bool,
    /// Native histograms, where a scraper takes them (protobuf); on by default.
    pub native_histograms: bool,
    /// Label `process`, the command; on by default.
    pub process_label: bool,
    /// Labels of pods that become labels of series, as `label_…`; none by default.
    pub pod_labels: Vec<String>,
}

impl Default for MetricsConfig {
    fn default() -> Self {
        Self {
            max_counter_series: super::MAX_COUNTER_SERIES,
            max_histogram_series: super::MAX_HISTOGRAM_SERIES,
            expiry_seconds: 300,
            classic_histograms: true,
            native_histograms: true,
            process_label: true,
            pod_labels: Vec::new(),
        }
    }
}

impl MetricsConfig {
    /// Whether every value is in its range; the error says which is not.
    pub fn validate(&self) -> Result<(), String> {
        let caps = 1..=100_000;
        if !caps.contains(&self.max_counter_series) || !caps.contains(&self.max_histogram_series) {
            return Err("metrics: caps of series must be from 1 to 100000".to_owned());
        }
        if self.expiry_seconds > 86_400 {
            return Err("metrics: expiry_seconds must be at most 86400".to_owned());
        }
        if !self.classic_histograms && !self.native_histograms {
            return Err("metrics: classic_histograms and native_histograms cannot both be off".to_owned());
        }
        if self.pod_labels.len() > 32 || self.pod_labels.iter().any(|name| name.is_empty() || name.len() > 128) {
            return Err("metrics: pod_labels must be at most 32 names of 1 to 128 bytes".to_owned());
        }
        Ok(())
    }
}
