//! What the agent's own `OpenMetrics` text says, as families: the one place where metrics are made is their registry, and every way out reads that.

use std::time::Duration;

use crate::span::TraceId;

/// What a family measures.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Only grows.
    Counter,
    /// Goes up and down; also what the text calls unknown or info.
    Gauge,
    /// Counts by size.
    Histogram,
}

/// Labels with their values, in the order of the text.
pub type Labels = Vec<(String, String)>;

/// A number.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Number {
    /// Written without a fraction, and within range.
    Whole(i64),
    /// Any other.
    Fraction(f64),
}

/// The values of one label set.
#[derive(Clone, Debug, PartialEq)]
pub enum Value {
    /// Of a counter or a gauge.
    Number(Number),
    /// Of a histogram.
    Histogram {
        /// Upper bounds of the buckets but the last, which has none.
        bounds: Vec<f64>,
        /// In each bucket alone, one more than there are bounds.
        counts: Vec<u64>,
        /// Of all observations.
        sum: f64,
        /// Observations.
        count: u64,
        /// Traces that stand for buckets.
        exemplars: Vec<Exemplar>,
    },
    /// Of a histogram whose buckets have no bounds of their own. Not in a text.
    Native {
        /// Bucket i is of what is above base^i and at most base^(i + 1), where the base is 2^(2^-scale).
        scale: i32,
        /// What is no larger is in no such bucket.
        zero_threshold: f64,
        /// How many these are.
        zero_count: u64,
        /// Number of the first of the buckets that follow.
        offset: i32,
        /// In each bucket alone.
        counts: Vec<u64>,
        /// Of all observations.
        sum: f64,
        /// Observations.
        count: u64,
        /// Traces that stand for buckets.
        exemplars: Vec<Exemplar>,
    },
}

/// A trace that stands for a bucket.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Exemplar {
    /// As it was exported.
    pub trace: TraceId,
    /// Its span that took so long, as it was exported.
    pub span_id: u64,
    /// How long that took.
    pub seconds: f64,
    /// When it was observed, since 1970. Prometheus keeps none of a native histogram without.
    pub observed: Duration,
}

/// Series that have a name in common.
#[derive(Clone, Debug, PartialEq)]
pub struct Family {
    /// Without `_total`, `_bucket` and the like.
    pub name: String,
    /// In words.
    pub help: String,
    /// As `OpenMetrics` names it (`seconds`); empty without one.
    pub unit: String,
    /// What it measures.
    pub kind: Kind,
    /// By label set.
    pub series: Vec<(Labels, Value)>,
}

/// All families of a text.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Snapshot {
    /// In the order of the text.
    pub families: Vec<Family>,
    /// Lines that say nothing this reader knows: none, for what the agent writes.
    pub unreadable_count: u64,
}

impl Snapshot {
    /// Reads a text. Exemplars are left out.
    pub fn parse(text: &str) -> Self {
        let mut reader = Reader::default();
        for line in text.lines() {
            if reader.line(line).is_none() {
                reader.snapshot.unreadable_count += 1;
            }
        }
        reader.close();
        reader.snapshot
    }
}

/// A histogram while its lines are read.
#[derive(Debug, Default)]
struct Open {
    labels: Labels,
    /// Bound and cumulative count.
    buckets: Vec<(f64, u64)>,
    sum: f64,
    count: Option<u64>,
}

#[derive(Default)]
struct Reader {
    snapshot: Snapshot,
    open: Option<Open>,
}

impl Reader {
    /// `None` if the line cannot be read.
    fn line(&mut self, line: &str) -> Option<()> {
        if let Some(comment) = line.strip_prefix("# ") {
            return self.comment(comment);
        }
        let name_end = line.find(['{', ' '])?;
        let (name, rest) = line.split_at(name_end);
        let (mut labels, rest) = match rest.strip_prefix('{') {
            Some(rest) => labels(rest)?,
            None => (Labels::new(), rest),
        };
        // An exemplar may follow.
        let value = rest.strip_prefix(' ')?.split(' ').next()?;
        let family = self.snapshot.families.last()?;
        let suffix = name.strip_prefix(family.name.as_str())?;
        let number = match (family.kind, suffix) {
            (Kind::Counter, "_total") | (Kind::Gauge, "" | "_info") => number(value)?,
            (Kind::Histogram, "_bucket") => {
                let at = labels.iter().position(|(label, _)| label == "le")?;
                let (_, bound) = labels.remove(at);
                let bucket = (bound.parse().ok()?, value.parse().ok()?);
                self.histogram(labels).buckets.push(bucket);
                return Some(());
            }
            (Kind::Histogram, "_sum") => {
                self.histogram(labels).sum = value.parse().ok()?;
                return Some(());
            }
            (Kind::Histogram, "_count") => {
                self.histogram(labels).count = Some(value.parse().ok()?);
                return Some(());
            }
            _ => return None,
        };
        let family = self.snapshot.families.last_mut()?;
        family.series.push((labels, Value::Number(number)));
        Some(())
    }

    fn comment(&mut self, comment: &str) -> Option<()> {
        let (kind, rest) = comment.split_once(' ').unwrap_or((comment, ""));
        let (name, what) = rest.split_once(' ').unwrap_or((rest, ""));
        match kind {
            "EOF" => return Some(()),
            "HELP" | "TYPE" | "UNIT" => {}
            _ => return None,
        }
        if self.snapshot.families.last().is_none_or(|family| family.name != name) {
            self.close();
            self.snapshot.families.push(Family {
                name: name.to_owned(),
                help: String::new(),
                unit: String::new(),
                kind: Kind::Gauge,
                series: Vec::new(),
            });
        }
        let family = self.snapshot.families.last_mut()?;
        match kind {
            "HELP" => what.clone_into(&mut family.help),
            "UNIT" => what.clone_into(&mut family.unit),
            _ => {
                family.kind = match what {
                    "counter" => Kind::Counter,
                    "histogram" => Kind::Histogram,
                    "gauge" | "unknown" | "info" => Kind::Gauge,
                    _ => return None,
                }
            }
        }
        Some(())
    }

    fn histogram(&mut self, labels: Labels) -> &mut Open {
        if self.open.as_ref().is_some_and(|open| open.labels != labels) {
            self.close();
        }
        self.open.get_or_insert_with(|| Open {
            labels,
            ..Open::default()
        })
    }

    fn close(&mut self) {
        let (Some(mut open), Some(family)) = (self.open.take(), self.snapshot.families.last_mut()) else {
            return;
        };
        open.buckets.sort_by(|(one, _), (other, _)| one.total_cmp(other));
        let mut below = 0;
        let mut counts = Vec::with_capacity(open.buckets.len() + 1);
        let mut bounds = Vec::with_capacity(open.buckets.len());
        for (bound, count) in open.buckets {
            counts.push(count.saturating_sub(below));
            below = count;
            if bound.is_finite() {
                bounds.push(bound);
            }
        }
        let count = open.count.unwrap_or(below);
        if counts.len() == bounds.len() {
            counts.push(count.saturating_sub(below));
        }
        let value = Value::Histogram {
            bounds,
            counts,
            sum: open.sum,
            count,
            exemplars: Vec::new(),
        };
        family.series.push((open.labels, value));
    }
}

fn number(text: &str) -> Option<Number> {
    text.parse()
        .map(Number::Whole)
        .or_else(|_| text.parse().map(Number::Fraction))
        .ok()
}

/// Labels up to the closing brace, and what follows it.
fn labels(mut rest: &str) -> Option<(Labels, &str)> {
    let mut labels = Labels::new();
    loop {
        if let Some(after) = rest.strip_prefix('}') {
            return Some((labels, after));
        }
        let (name, after) = rest.split_once("=\"")?;
        let mut value = String::new();
        let mut characters = after.char_indices();
        let end = loop {
            match characters.next()? {
                (at, '"') => break at,
                (_, '\\') => value.push(match characters.next()?.1 {
                    'n' => '\n',
                    other => other,
                }),
                (_, other) => value.push(other),
            }
        };
        labels.push((name.to_owned(), value));
        rest = &after[end + 1..];
        rest = rest.strip_prefix(',').unwrap_or(rest);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::metrics::Metrics;
    use crate::sink::testing::{invoke, syscall, trace};

    #[test]
    fn counters_gauges_and_histograms_are_read_with_their_labels() {
        let text = concat!(
            "# HELP calls Calls of \"x\"\n# TYPE calls counter\n",
            "calls_total{a=\"q\\\"\\\\\\n,}\",b=\"\"} 3 # {trace_id=\"1\"} 0.5\n",
            "# HELP took_seconds Took\n# TYPE took_seconds histogram\n# UNIT took_seconds seconds\n",
            "took_seconds_sum{e=\"f\"} 1.5\ntook_seconds_count{e=\"f\"} 4\n",
            "took_seconds_bucket{le=\"0.1\",e=\"f\"} 1\ntook_seconds_bucket{le=\"1.0\",e=\"f\"} 3\n",
            "took_seconds_bucket{le=\"+Inf\",e=\"f\"} 4\n",
            "took_seconds_sum{e=\"g\"} 0\ntook_seconds_count{e=\"g\"} 0\ntook_seconds_bucket{le=\"+Inf\",e=\"g\"} 0\n",
            "# HELP share Share\n# TYPE share gauge\nshare 0.25\n# EOF\n"
        );
        let snapshot = Snapshot::parse(text);
        assert_eq!(snapshot.unreadable_count, 0);
        let [calls, took, share] = &snapshot.families[..] else {
            panic!("{snapshot:#?}")
        };
        let labels = vec![
            ("a".to_owned(), "q\"\\\n,}".to_owned()),
            ("b".to_owned(), String::new()),
        ];
        assert_eq!(calls.series, [(labels, Value::Number(Number::Whole(3)))]);
        assert_eq!((took.kind, took.unit.as_str()), (Kind::Histogram, "seconds"));
        let histogram = Value::Histogram {
            bounds: vec![0.1, 1.0],
            counts: vec![1, 2, 1],
            sum: 1.5,
            count: 4,
            exemplars: Vec::new(),
        };
        assert_eq!(took.series[0], (vec![("e".to_owned(), "f".to_owned())], histogram));
        assert_eq!(took.series.len(), 2);
        assert_eq!(share.series, [(Labels::new(), Value::Number(Number::Fraction(0.25)))]);
    }

    #[test]
    fn nothing_of_what_the_agent_writes_is_left_out() {
        let metrics = Metrics::new();
        let mut root = invoke("run\"\\\n", 0, 3_000_000);
        root.children = vec![syscall("read", 1, 2), syscall("write", 3, 4)];
        metrics.observe_trace(&trace(root));
        let text = metrics.encode();
        let snapshot = Snapshot::parse(&text);
        assert_eq!(snapshot.unreadable_count, 0);
        let lines: usize = snapshot
            .families
            .iter()
            .flat_map(|family| &family.series)
            .map(|(_, value)| match value {
                Value::Number(_) => 1,
                Value::Histogram { counts, .. } => counts.len() + 2,
                Value::Native { .. } => 0,
            })
            .sum();
        assert_eq!(lines, text.lines().filter(|line| !line.starts_with('#')).count());
    }

    #[test]
    fn what_is_not_understood_is_counted() {
        let text = "calls_total 1\n# TYPE calls summary\ncalls 1\ncalls{a=\"b 2\n\n# EOF\n";
        assert_eq!(Snapshot::parse(text).unreadable_count, 4);
    }
}
