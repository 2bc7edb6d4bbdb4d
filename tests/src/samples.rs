//! Metrics as a scraper reads them.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::Command;

use serde::Deserialize;

use crate::environment;

/// One value of one series.
#[derive(Clone, Debug, PartialEq, Deserialize)]
pub struct Sample {
    /// `wasm_host_calls_total`.
    pub name: String,
    /// Its labels.
    pub labels: BTreeMap<String, String>,
    /// The value; `None` where it is not a number.
    pub value: Option<f64>,
}

/// Reads `file` with the reference parser of `OpenMetrics`, which refuses whatever the specification does.
pub fn read(python: &Path, file: &Path) -> Vec<Sample> {
    let script = environment::tests_directory().join("python/open_metrics.py");
    let output = Command::new(python)
        .arg(script)
        .arg(file)
        .output()
        .expect("python can be run");
    assert!(
        output.status.success(),
        "{} is not OpenMetrics: {}",
        file.display(),
        String::from_utf8_lossy(&output.stderr)
    );
    serde_json::from_slice(&output.stdout).expect("samples are JSON")
}

/// Sums of a counter by the value of one label.
pub fn sums(samples: &[Sample], name: &str, label: &str) -> BTreeMap<String, u64> {
    let mut sums = BTreeMap::new();
    for sample in samples.iter().filter(|sample| sample.name == name) {
        let key = sample.labels.get(label).cloned().unwrap_or_default();
        *sums.entry(key).or_default() += sample.value.expect("counters are numbers") as u64;
    }
    sums
}
