//! Metrics as text (`OpenMetrics` and the classic format) and as protobuf with native histograms.

use std::fmt::Write as _;

use prost::Message as _;

use super::{
    Metrics,
    aggregate::{AggregateFamilies, COUNTERS, Exemplar, HISTOGRAMS, Histogram, LabelSet},
};
use wasmscope_common::{BUCKET_COUNT, BUCKET_SCALE, ZERO_SECONDS_LOG2};

/// What metrics are written as.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// `OpenMetrics` text 1.0.0, with exemplars.
    OpenMetrics,
    /// Prometheus text 0.0.4.
    Classic,
    /// Length-delimited `io.prometheus.client.MetricFamily`, with native histograms.
    Protobuf,
}

impl Format {
    /// The best of what a scraper accepts; `OpenMetrics` where it does not say.
    pub fn of_accept(accept: Option<&str>) -> Self {
        let Some(accept) = accept else {
            return Self::OpenMetrics;
        };
        let accept = accept.to_ascii_lowercase();
        let weight = |media: &str| -> f32 {
            let part = accept.split(',').map(str::trim).find(|part| part.starts_with(media));
            part.map_or(0.0, |part| {
                let weight = part.split(';').find_map(|word| word.trim().strip_prefix("q="));
                weight.and_then(|weight| weight.parse().ok()).unwrap_or(1.0)
            })
        };
        let offers = [
            (Self::Protobuf, weight("application/vnd.google.protobuf")),
            (
                Self::OpenMetrics,
                weight("application/openmetrics-text").max(weight("*/*")),
            ),
            (Self::Classic, weight("text/plain").max(weight("text/*"))),
        ];
        let mut best = (Self::OpenMetrics, 0.0);
        for offer in offers {
            if offer.1 > best.1 {
                best = offer;
            }
        }
        best.0
    }

    /// The content type of the answer.
    pub fn content_type(self) -> &'static str {
        match self {
            Self::OpenMetrics => super::CONTENT_TYPE,
            Self::Classic => "text/plain; version=0.0.4; charset=utf-8",
            Self::Protobuf => {
                "application/vnd.google.protobuf; proto=io.prometheus.client.MetricFamily; encoding=delimited"
            }
        }
    }
}

impl Metrics {
    /// All series in a format.
    pub fn encode_as(&self, format: Format) -> Vec<u8> {
        match format {
            Format::OpenMetrics => self.encode().into_bytes(),
            Format::Classic => classic(&self.encode()).into_bytes(),
            Format::Protobuf => self.protobuf(),
        }
    }

    fn protobuf(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        for family in families_of(&self.encode_registry()) {
            // Writing to a vector does not fail.
            let _ = family.encode_length_delimited(&mut bytes);
        }
        if let Some(aggregates) = &self.aggregates {
            for family in native_families(aggregates) {
                let _ = family.encode_length_delimited(&mut bytes);
            }
        }
        bytes
    }
}

/// The families that the kernel counts, as `OpenMetrics` text; none without series, as it is with all others.
pub(super) fn write_aggregates(text: &mut String, families: &AggregateFamilies) {
    for (family, (name, help)) in COUNTERS.iter().enumerate() {
        let series = families.counters(family);
        if !series.is_empty() {
            let _ = writeln!(text, "# HELP {name} {help}.\n# TYPE {name} counter");
        }
        for (labels, value) in series {
            let _ = writeln!(text, "{name}_total{{{}}} {value}", joined(&labels));
        }
    }
    for (family, (name, help)) in HISTOGRAMS.iter().enumerate() {
        let series = families.histograms(family);
        if !series.is_empty() {
            let _ = writeln!(text, "# HELP {name} {help}.\n# TYPE {name} histogram");
        }
        for (labels, histogram) in series {
            write_histogram(text, name, &labels, &histogram, families.config.classic_histograms);
        }
    }
}

/// The upper bound of a bucket in seconds; the last has none.
pub(super) fn upper_bound(bucket: usize) -> f64 {
    if bucket >= BUCKET_COUNT - 1 {
        return f64::INFINITY;
    }
    let quarters = f64::from(1 << BUCKET_SCALE);
    (f64::from(ZERO_SECONDS_LOG2) + bucket as f64 / quarters).exp2()
}

/// Classic buckets: one an octave, from about a microsecond to a bit over a minute.
pub(super) fn classic_bounds() -> impl Iterator<Item = usize> {
    (8..=112).step_by(4)
}

fn write_histogram(text: &mut String, name: &str, labels: &LabelSet, histogram: &Histogram, has_buckets: bool) {
    let labels = joined(labels);
    let separator = if labels.is_empty() { "" } else { "," };
    let count = histogram.times.count();
    let mut from = 0;
    let all = classic_bounds().filter(|_| has_buckets).chain([BUCKET_COUNT - 1]);
    for bucket in all {
        let below: u64 = histogram.times.buckets[..=bucket].iter().sum();
        let bound = upper_bound(bucket);
        let bound = if bound.is_finite() {
            format!("{bound:?}")
        } else {
            "+Inf".to_owned()
        };
        let _ = write!(text, "{name}_bucket{{{labels}{separator}le=\"{bound}\"}} {below}");
        if let Some((_, exemplar)) = histogram.exemplars.range(from..=bucket).next_back() {
            let Exemplar {
                trace,
                span_id,
                seconds,
                ..
            } = exemplar;
            let _ = write!(
                text,
                " # {{trace_id=\"{trace}\",span_id=\"{span_id:016x}\"}} {seconds:?}"
            );
        }
        text.push('\n');
        from = bucket + 1;
    }
    let seconds = histogram.times.total_ns as f64 / 1e9;
    let _ = writeln!(
        text,
        "{name}_sum{{{labels}}} {seconds:?}\n{name}_count{{{labels}}} {count}"
    );
}

fn joined(labels: &LabelSet) -> String {
    let mut text = String::new();
    for (index, (name, value)) in labels.iter().enumerate() {
        let comma = if index == 0 { "" } else { "," };
        let value = value.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n");
        let _ = write!(text, "{comma}{name}=\"{value}\"");
    }
    text
}

/// `OpenMetrics` text, written here, in the classic format.
fn classic(open_metrics: &str) -> String {
    let mut text = String::with_capacity(open_metrics.len());
    let mut counters = std::collections::BTreeSet::new();
    for line in open_metrics.lines() {
        if let Some(name) = line
            .strip_prefix("# TYPE ")
            .and_then(|rest| rest.strip_suffix(" counter"))
        {
            counters.insert(name.to_owned());
        }
    }
    for line in open_metrics.lines() {
        if line == "# EOF" || line.starts_with("# UNIT ") {
            continue;
        }
        let named = line.strip_prefix("# TYPE ").map(|rest| ("# TYPE ", rest));
        let named = named.or_else(|| line.strip_prefix("# HELP ").map(|rest| ("# HELP ", rest)));
        match named.and_then(|(word, rest)| Some((word, rest.split_once(' ')?))) {
            Some((word, (name, rest))) if counters.contains(name) => {
                let _ = writeln!(text, "{word}{name}_total {rest}");
            }
            Some(_) => {
                let _ = writeln!(text, "{line}");
            }
            None => {
                let (sample, _) = sample_of(line);
                let _ = writeln!(text, "{sample}");
            }
        }
    }
    text
}

/// A line of a sample without its exemplar, and where its labels end.
fn sample_of(line: &str) -> (&str, usize) {
    let mut in_quotes = false;
    let mut is_escaped = false;
    let mut labels_end = line.find([' ', '{']).unwrap_or(line.len());
    let mut end = line.len();
    for (index, c) in line.char_indices() {
        if in_quotes {
            match c {
                _ if is_escaped => is_escaped = false,
                '\\' => is_escaped = true,
                '"' => in_quotes = false,
                _ => {}
            }
            continue;
        }
        match c {
            '"' => in_quotes = true,
            '}' => labels_end = index + 1,
            '#' => {
                end = index;
                break;
            }
            _ => {}
        }
    }
    (line[..end].trim_end(), labels_end.min(end))
}

/// The families of text that was written here.
fn families_of(open_metrics: &str) -> Vec<proto::MetricFamily> {
    let mut families: Vec<proto::MetricFamily> = Vec::new();
    for line in open_metrics.lines() {
        if let Some(rest) = line.strip_prefix("# HELP ") {
            let (name, help) = rest.split_once(' ').unwrap_or((rest, ""));
            families.push(proto::MetricFamily {
                name: name.to_owned(),
                help: help.to_owned(),
                r#type: proto::UNTYPED,
                metric: Vec::new(),
            });
        } else if let Some((_, kind)) = line.strip_prefix("# TYPE ").and_then(|rest| rest.split_once(' ')) {
            if let Some(family) = families.last_mut() {
                family.r#type = match kind {
                    "counter" => proto::COUNTER,
                    "gauge" => proto::GAUGE,
                    "histogram" => proto::HISTOGRAM,
                    _ => proto::UNTYPED,
                };
                if kind == "counter" {
                    family.name.push_str("_total");
                }
            }
        } else if let (false, Some(family)) = (line.starts_with('#'), families.last_mut()) {
            add_sample(family, line);
        }
    }
    families
}

fn add_sample(family: &mut proto::MetricFamily, line: &str) {
    let (sample, labels_end) = sample_of(line);
    let head = &sample[..labels_end];
    let value: f64 = sample[labels_end..].trim().parse().unwrap_or(f64::NAN);
    let (name, labels) = head.split_once('{').unwrap_or((head, ""));
    let mut label = labels_of(labels.trim_end_matches('}'));
    match family.r#type {
        proto::COUNTER => family.metric.push(proto::Metric {
            label,
            counter: Some(proto::Counter { value }),
            ..proto::Metric::default()
        }),
        proto::HISTOGRAM => {
            let position = label.iter().position(|pair| pair.name == "le");
            let bound = position.map(|position| label.remove(position).value);
            if family.metric.last().is_none_or(|metric| metric.label != label) {
                family.metric.push(proto::Metric {
                    label,
                    histogram: Some(proto::Histogram::default()),
                    ..proto::Metric::default()
                });
            }
            let Some(histogram) = family.metric.last_mut().and_then(|metric| metric.histogram.as_mut()) else {
                return;
            };
            if name.ends_with("_sum") {
                histogram.sample_sum = value;
            } else if name.ends_with("_count") {
                histogram.sample_count = value as u64;
            } else if let Some(bound) = bound.and_then(|bound| bound.trim_start_matches('+').parse().ok()) {
                histogram.bucket.push(proto::Bucket {
                    cumulative_count: value as u64,
                    upper_bound: bound,
                    exemplar: None,
                });
            }
        }
        proto::GAUGE => family.metric.push(proto::Metric {
            label,
            gauge: Some(proto::Gauge { value }),
            ..proto::Metric::default()
        }),
        _ => family.metric.push(proto::Metric {
            label,
            untyped: Some(proto::Untyped { value }),
            ..proto::Metric::default()
        }),
    }
}

/// `name="value",…`, with escapes.
fn labels_of(text: &str) -> Vec<proto::LabelPair> {
    let mut pairs = Vec::new();
    let mut rest = text;
    while let Some((name, after)) = rest.split_once("=\"") {
        let mut value = String::new();
        let mut chars = after.char_indices();
        let mut end = after.len();
        while let Some((index, c)) = chars.next() {
            match c {
                '"' => {
                    end = index + 1;
                    break;
                }
                '\\' => match chars.next() {
                    Some((_, 'n')) => value.push('\n'),
                    Some((_, c)) => value.push(c),
                    None => {}
                },
                c => value.push(c),
            }
        }
        pairs.push(proto::LabelPair {
            name: name.to_owned(),
            value,
        });
        rest = after.get(end..).unwrap_or("").trim_start_matches(',');
    }
    pairs
}

fn pairs(labels: &LabelSet) -> Vec<proto::LabelPair> {
    let pairs = labels.iter().map(|(name, value)| proto::LabelPair {
        name: name.clone(),
        value: value.clone(),
    });
    pairs.collect()
}

fn native_families(families: &AggregateFamilies) -> Vec<proto::MetricFamily> {
    let mut all = Vec::new();
    for (family, (name, help)) in COUNTERS.iter().enumerate() {
        let series = families.counters(family);
        let metric = series.into_iter().map(|(labels, value)| proto::Metric {
            label: pairs(&labels),
            counter: Some(proto::Counter { value: value as f64 }),
            ..proto::Metric::default()
        });
        all.push(proto::MetricFamily {
            name: format!("{name}_total"),
            help: format!("{help}."),
            r#type: proto::COUNTER,
            metric: metric.collect(),
        });
    }
    for (family, (name, help)) in HISTOGRAMS.iter().enumerate() {
        let series = families.histograms(family);
        let metric = series.into_iter().map(|(labels, histogram)| proto::Metric {
            label: pairs(&labels),
            histogram: Some(native(
                &histogram,
                families.config.classic_histograms,
                families.config.native_histograms,
            )),
            ..proto::Metric::default()
        });
        all.push(proto::MetricFamily {
            name: (*name).to_owned(),
            help: format!("{help}."),
            r#type: proto::HISTOGRAM,
            metric: metric.collect(),
        });
    }
    all.retain(|family| !family.metric.is_empty());
    all
}

fn native(histogram: &Histogram, has_classic: bool, has_native: bool) -> proto::Histogram {
    let times = &histogram.times;
    let mut encoded = proto::Histogram {
        sample_count: times.count(),
        sample_sum: times.total_ns as f64 / 1e9,
        ..proto::Histogram::default()
    };
    if has_classic {
        let mut from = 0;
        for bucket in classic_bounds().chain([BUCKET_COUNT - 1]) {
            let exemplar = histogram.exemplars.range(from..=bucket).next_back();
            from = bucket + 1;
            encoded.bucket.push(proto::Bucket {
                cumulative_count: times.buckets[..=bucket].iter().sum(),
                upper_bound: upper_bound(bucket),
                exemplar: exemplar.map(|(_, exemplar)| proto::Exemplar {
                    label: vec![
                        proto::LabelPair {
                            name: "trace_id".to_owned(),
                            value: exemplar.trace.to_string(),
                        },
                        proto::LabelPair {
                            name: "span_id".to_owned(),
                            value: format!("{:016x}", exemplar.span_id),
                        },
                    ],
                    value: exemplar.seconds,
                    timestamp: Some(proto::Timestamp {
                        seconds: exemplar.observed.as_secs().cast_signed(),
                        nanos: exemplar.observed.subsec_nanos().cast_signed(),
                    }),
                }),
            });
        }
    }
    if !has_native {
        return encoded;
    }
    encoded.schema = BUCKET_SCALE;
    encoded.zero_threshold = upper_bound(0);
    encoded.zero_count = times.buckets[0];
    // The bucket with index i ends at 2^(i/4) seconds; spans count from the end of the one before.
    let first = ZERO_SECONDS_LOG2 * (1 << BUCKET_SCALE);
    let mut next = 0;
    let mut last_count = 0i64;
    for (bucket, count) in times
        .buckets
        .iter()
        .enumerate()
        .skip(1)
        .filter(|(_, count)| **count > 0)
    {
        let index = first + i32::try_from(bucket).unwrap_or(0);
        match encoded.positive_span.last_mut() {
            Some(span) if index == next => span.length += 1,
            _ => encoded.positive_span.push(proto::BucketSpan {
                offset: index - next,
                length: 1,
            }),
        }
        next = index + 1;
        let count = i64::try_from(*count).unwrap_or(i64::MAX);
        encoded.positive_delta.push(count - last_count);
        last_count = count;
    }
    if encoded.positive_span.is_empty() && encoded.zero_count == 0 {
        // How an empty native histogram is told from a classic one.
        encoded.positive_span.push(proto::BucketSpan { offset: 0, length: 0 });
    }
    encoded
}

/// `io.prometheus.client`, as far as it is written: `metrics.proto` of `prometheus/client_model`.
pub(super) mod proto {
    pub(crate) const COUNTER: i32 = 0;
    pub(crate) const GAUGE: i32 = 1;
    pub(crate) const UNTYPED: i32 = 3;
    pub(crate) const HISTOGRAM: i32 = 4;

    #[derive(Clone, PartialEq, prost::Message)]
    pub(crate) struct LabelPair {
        #[prost(string, tag = "1")]
        pub(crate) name: String,
        #[prost(string, tag = "2")]
        pub(crate) value: String,
    }
    #[derive(Clone, PartialEq, prost::Message)]
    pub(crate) struct Gauge {
        #[prost(double, tag = "1")]
        pub(crate) value: f64,
    }
    #[derive(Clone, PartialEq, prost::Message)]
    pub(crate) struct Counter {
        #[prost(double, tag = "1")]
        pub(crate) value: f64,
    }
    #[derive(Clone, PartialEq, prost::Message)]
    pub(crate) struct Untyped {
        #[prost(double, tag = "1")]
        pub(crate) value: f64,
    }
    #[derive(Clone, PartialEq, prost::Message)]
    pub(crate) struct Exemplar {
        #[prost(message, repeated, tag = "1")]
        pub(crate) label: Vec<LabelPair>,
        #[prost(double, tag = "2")]
        pub(crate) value: f64,
        #[prost(message, optional, tag = "3")]
        pub(crate) timestamp: Option<Timestamp>,
    }
    #[derive(Clone, PartialEq, prost::Message)]
    pub(crate) struct Timestamp {
        #[prost(int64, tag = "1")]
        pub(crate) seconds: i64,
        #[prost(int32, tag = "2")]
        pub(crate) nanos: i32,
    }
    #[derive(Clone, PartialEq, prost::Message)]
    pub(crate) struct Bucket {
        #[prost(uint64, tag = "1")]
        pub(crate) cumulative_count: u64,
        #[prost(double, tag = "2")]
        pub(crate) upper_bound: f64,
        #[prost(message, optional, tag = "3")]
        pub(crate) exemplar: Option<Exemplar>,
    }
    #[derive(Clone, PartialEq, prost::Message)]
    pub(crate) struct BucketSpan {
        #[prost(sint32, tag = "1")]
        pub(crate) offset: i32,
        #[prost(uint32, tag = "2")]
        pub(crate) length: u32,
    }
    #[derive(Clone, PartialEq, prost::Message)]
    pub(crate) struct Histogram {
        #[prost(uint64, tag = "1")]
        pub(crate) sample_count: u64,
        #[prost(double, tag = "2")]
        pub(crate) sample_sum: f64,
        #[prost(message, repeated, tag = "3")]
        pub(crate) bucket: Vec<Bucket>,
        #[prost(sint32, tag = "5")]
        pub(crate) schema: i32,
        #[prost(double, tag = "6")]
        pub(crate) zero_threshold: f64,
        #[prost(uint64, tag = "7")]
        pub(crate) zero_count: u64,
        #[prost(message, repeated, tag = "12")]
        pub(crate) positive_span: Vec<BucketSpan>,
        #[prost(sint64, repeated, tag = "13")]
        pub(crate) positive_delta: Vec<i64>,
    }
    #[derive(Clone, PartialEq, prost::Message)]
    pub(crate) struct Metric {
        #[prost(message, repeated, tag = "1")]
        pub(crate) label: Vec<LabelPair>,
        #[prost(message, optional, tag = "2")]
        pub(crate) gauge: Option<Gauge>,
        #[prost(message, optional, tag = "3")]
        pub(crate) counter: Option<Counter>,
        #[prost(message, optional, tag = "5")]
        pub(crate) untyped: Option<Untyped>,
        #[prost(message, optional, tag = "7")]
        pub(crate) histogram: Option<Histogram>,
    }
    #[derive(Clone, PartialEq, prost::Message)]
    pub(crate) struct MetricFamily {
        #[prost(string, tag = "1")]
        pub(crate) name: String,
        #[prost(string, tag = "2")]
        pub(crate) help: String,
        #[prost(int32, tag = "3")]
        pub(crate) r#type: i32,
        #[prost(message, repeated, tag = "4")]
        pub(crate) metric: Vec<Metric>,
    }
}
