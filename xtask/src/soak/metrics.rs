//! What programs counted, and what a scrape says of them, as sums that can be compared.

use std::collections::BTreeMap;

use serde_json::Value;

use super::shown;

pub(super) type Numbers = BTreeMap<String, u64>;

/// Sums over everything that ran.
#[derive(Debug, Default)]
pub(super) struct Sums {
    /// By export.
    pub(super) invocations: Numbers,
    /// By import.
    pub(super) host_calls: Numbers,
    /// By name.
    pub(super) syscalls: Numbers,
    /// By layer, where there are any; only of a scrape.
    pub(super) lost: Numbers,
    /// Code objects that were read; only of a scrape.
    pub(super) modules: u64,
}

impl Sums {
    /// Adds the line of JSON that a workload printed.
    pub(super) fn add_report(&mut self, report: &Value) {
        for (name, count) in numbers(&report["invocations"]) {
            let export = name.split_once('/').map_or(name.as_str(), |(_, export)| export);
            *self.invocations.entry(export.to_owned()).or_default() += count;
        }
        for (name, count) in numbers(&report["host_calls"]) {
            *self.host_calls.entry(name).or_default() += count;
        }
        for (name, count) in numbers(&report["syscalls"]) {
            *self.syscalls.entry(name).or_default() += count;
        }
    }

    /// From the text of a scrape.
    pub(super) fn scraped(text: &str) -> Self {
        let sums = |name, label| sums(text, name, label);
        let mut lost = sums("wasmscope_events_lost_total", "layer");
        lost.retain(|_, count| *count > 0);
        Self {
            invocations: sums("wasm_invocations_total", "export"),
            host_calls: sums("wasm_host_calls_total", "import"),
            syscalls: sums("wasm_syscalls_total", "syscall"),
            lost,
            modules: sums("wasmscope_events_total", "kind")
                .get("module_published")
                .copied()
                .unwrap_or(0),
        }
    }

    /// Where a scrape says something else, if it does. Syscalls that no program counts of itself (of its allocator and its locks) are left out.
    pub(super) fn difference(&self, seen: &Self) -> Option<String> {
        let mut syscalls = seen.syscalls.clone();
        syscalls.retain(|name, _| self.syscalls.contains_key(name));
        let parts = [
            shown(&self.invocations, &seen.invocations),
            shown(&self.host_calls, &seen.host_calls),
            shown(&self.syscalls, &syscalls),
        ];
        let text = parts.iter().filter(|part| !part.is_empty());
        let text = text.map(String::as_str).collect::<Vec<_>>().join("; ");
        (!text.is_empty()).then_some(text)
    }
}

fn numbers(value: &Value) -> Numbers {
    let pairs = value.as_object().into_iter().flatten();
    pairs
        .filter_map(|(name, count)| Some((name.clone(), count.as_u64()?)))
        .collect()
}

/// Sums of a counter by the value of one label.
fn sums(text: &str, name: &str, label: &str) -> Numbers {
    let mut sums = Numbers::new();
    let key = format!("{label}=\"");
    for line in text.lines() {
        let Some(rest) = line.strip_prefix(name).and_then(|rest| rest.strip_prefix('{')) else {
            continue;
        };
        let Some((labels, value)) = rest.rsplit_once("} ") else {
            continue;
        };
        // No value of these families has a quote or a comma in it.
        let value_of = labels.split(',').find_map(|pair| pair.strip_prefix(key.as_str()));
        let value: Option<f64> = value.split(' ').next().and_then(|value| value.parse().ok());
        if let (Some(of), Some(value)) = (value_of, value) {
            *sums.entry(of.trim_end_matches('"').to_owned()).or_default() += value as u64;
        }
    }
    sums
}

#[cfg(test)]
mod tests {
    use super::*;

    const SCRAPE: &str = "# TYPE wasm_invocations_total counter\n\
        wasm_invocations_total{module=\"a\",export=\"run\"} 3\n\
        wasm_invocations_total{module=\"b\",export=\"run\"} 4\n\
        wasm_syscalls_total{syscall=\"write\"} 5\n\
        wasmscope_events_lost_total{layer=\"ring\",reason=\"full\"} 0\n";

    #[test]
    fn a_scrape_is_summed_by_label_and_losses_of_nothing_are_none() {
        let sums = Sums::scraped(SCRAPE);
        assert_eq!(sums.invocations, Numbers::from([("run".to_owned(), 7)]));
        assert_eq!(sums.syscalls["write"], 5);
        assert!(sums.lost.is_empty());
    }

    #[test]
    fn one_call_too_few_is_a_difference() {
        let mut counted = Sums::default();
        counted
            .add_report(&serde_json::json!({"invocations": {"a/run": 8}, "host_calls": {}, "syscalls": {"write": 5}}));
        assert_eq!(counted.difference(&Sums::scraped(SCRAPE)).unwrap(), "run: 8 | 7");
    }
}
