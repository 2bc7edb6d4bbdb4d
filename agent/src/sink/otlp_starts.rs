//! Since when each series that is sent counts: series of processes that are gone end, and those of the same name that come later begin anew.

use std::collections::HashMap;
use std::hash::{BuildHasher as _, RandomState};

use crate::metrics::snapshot::{Kind, Labels, Number, Snapshot, Value};

/// Since when each series counts.
#[derive(Debug)]
pub(super) struct Starts {
    /// By name and labels, hashed: start and what the series had counted, of those in the last reading.
    known: HashMap<u64, (u64, f64)>,
    hashing: RandomState,
    /// When series began that are new in the next reading, at the earliest.
    last_ns: u64,
}

impl Starts {
    pub(super) fn new(agent_ns: u64) -> Self {
        Self {
            known: HashMap::new(),
            hashing: RandomState::new(),
            last_ns: agent_ns,
        }
    }

    /// Takes note of a reading that begins at `now_ns`. What went back has ended and begun again in between.
    pub(super) fn read(&mut self, snapshot: &Snapshot, now_ns: u64) {
        let mut known = HashMap::with_capacity(self.known.len());
        for family in snapshot.families.iter().filter(|family| family.kind != Kind::Gauge) {
            for (labels, value) in &family.series {
                let key = self.key(&family.name, labels);
                let count = match value {
                    Value::Number(Number::Whole(count)) => *count as f64,
                    Value::Number(Number::Fraction(count)) => *count,
                    Value::Histogram { count, .. } | Value::Native { count, .. } => *count as f64,
                };
                let start_ns = match self.known.get(&key) {
                    Some((start_ns, before)) if *before <= count => *start_ns,
                    _ => self.last_ns,
                };
                known.insert(key, (start_ns, count));
            }
        }
        self.known = known;
        self.last_ns = now_ns;
    }

    /// Zero for what has no start: gauges.
    pub(super) fn of(&self, name: &str, labels: &Labels) -> u64 {
        let known = self.known.get(&self.key(name, labels));
        known.map_or(0, |(start_ns, _)| *start_ns)
    }

    fn key(&self, name: &str, labels: &Labels) -> u64 {
        self.hashing.hash_one((name, labels))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_series_that_ended_and_comes_back_has_a_new_start() {
        let labels = |value: &str| vec![("a".to_owned(), value.to_owned())];
        let mut starts = Starts::new(100);
        let mut read = |values: &str, now_ns| {
            starts.read(&Snapshot::parse(&format!("# TYPE f counter\n{values}")), now_ns);
            [starts.of("f", &labels("x")), starts.of("f", &labels("y"))]
        };
        assert_eq!(read("f_total{a=\"x\"} 5\nf_total{a=\"y\"} 5\n", 200), [100, 100]);
        assert_eq!(read("f_total{a=\"x\"} 5\n", 300), [100, 0], "one is gone");
        assert_eq!(
            read("f_total{a=\"x\"} 6\nf_total{a=\"y\"} 9\n", 400),
            [100, 300],
            "and back"
        );
        assert_eq!(
            read("f_total{a=\"x\"} 2\nf_total{a=\"y\"} 9\n", 500),
            [400, 300],
            "what went back ended and came back in between"
        );
    }
}
