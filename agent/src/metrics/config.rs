//! The section `[metrics]` of the configuration.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// How metrics are kept and shown.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct MetricsConfig {
    /// Series of one family of counters, those of `other` aside: 1 to 100,000. Default: 2,000.
    pub max_counter_series: usize,
    /// Series of one family of histograms, those of `other` aside: 1 to 100,000. Default: 500.
    pub max_histogram_series: usize,
    /// Seconds that series outlive the last process they are of: 0 to 86,400. Default: 300.
    pub expiry_seconds: u64,
    /// Buckets of histograms with fixed bounds, one an octave. Histograms that the kernel does not count always have them. Default: true.
    pub classic_histograms: bool,
    /// Native histograms of what the kernel counts, where a scraper takes them (protobuf); over OTLP, exponential ones instead of those with fixed
    /// bounds. Default: true.
    pub native_histograms: bool,
    /// Label `process`, the command. Default: true.
    pub process_label: bool,
    /// Labels of pods that become labels of series, as `label_…`; at most 32. Default: none.
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
        let mut names = BTreeMap::new();
        for pod_label in &self.pod_labels {
            if let Some(other) = names.insert(label_name(pod_label), pod_label) {
                return Err(format!(
                    "metrics: pod_labels {other:?} and {pod_label:?} would both become {}",
                    label_name(pod_label)
                ));
            }
        }
        Ok(())
    }
}

/// The name of the label that a pod's label becomes, as kube-state-metrics does it. None of the agent's own labels begins like this.
pub(super) fn label_name(pod_label: &str) -> String {
    let clean = pod_label
        .chars()
        .map(|c| if c.is_ascii_alphanumeric() { c } else { '_' });
    "label_".chars().chain(clean).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pod_labels_that_would_become_one_label_are_refused() {
        let config = |names: &[&str]| MetricsConfig {
            pod_labels: names.iter().map(|name| (*name).to_owned()).collect(),
            ..MetricsConfig::default()
        };
        config(&["app.kubernetes.io/name", "app", "team"]).validate().unwrap();
        for names in [["app.kubernetes.io/name", "app-kubernetes.io/name"], ["team", "team"]] {
            let error = config(&names).validate().unwrap_err();
            assert!(error.contains(&label_name(names[0])), "{error}");
        }
    }
}
