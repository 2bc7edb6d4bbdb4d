//! A family of metrics in OTLP's terms: its data points, their exemplars, and its unit.

use opentelemetry_proto::tonic::common::v1::{AnyValue, KeyValue, any_value};
use opentelemetry_proto::tonic::metrics::v1::{
    AggregationTemporality, Exemplar as Sent, ExponentialHistogram, ExponentialHistogramDataPoint, Gauge, Histogram,
    HistogramDataPoint, Metric, NumberDataPoint, Sum, exemplar, exponential_histogram_data_point::Buckets, metric,
    number_data_point,
};

use super::otlp_starts::Starts;
use crate::metrics::snapshot::{Exemplar, Family, Kind, Labels, Number, Value};

/// Units of the families whose names do not end in what they count.
const UNITS: [(&str, &str); 9] = [
    ("wasmscope_events_lost", "{event}"),
    ("wasmscope_log_lines_dropped", "{line}"),
    ("wasmscope_queue_depth", "{trace}"),
    ("wasmscope_recorder_dropped", "{trace}"),
    ("wasmscope_records_delivered", "{record}"),
    ("wasmscope_records_emitted", "{record}"),
    ("wasmscope_series_overflow", "{observation}"),
    ("wasmscope_traces_exported", "{trace}"),
    ("wasmscope_traces_sampled", "{trace}"),
];

pub(super) fn attribute(key: &str, value: String) -> KeyValue {
    KeyValue {
        key: key.to_owned(),
        value: Some(AnyValue {
            value: Some(any_value::Value::StringValue(value)),
        }),
        ..KeyValue::default()
    }
}

/// Some series of a family. Native histograms are sent as exponential ones; no family has both kinds.
pub(super) fn metric(family: &Family, series: &[(Labels, Value)], starts: &Starts, now_ns: u64) -> Metric {
    let cumulative = AggregationTemporality::Cumulative.into();
    let point = |(labels, value)| {
        let start_ns = starts.of(&family.name, labels);
        (attributes(labels), value, start_ns)
    };
    let pairs = || series.iter().map(|(labels, value)| point((labels, value)));
    let numbers = || {
        pairs()
            .filter_map(|(attributes, value, start_ns)| number_point(attributes, value, start_ns, now_ns))
            .collect()
    };
    let is_native = matches!(series.first(), Some((_, Value::Native { .. })));
    let data = match family.kind {
        Kind::Counter => metric::Data::Sum(Sum {
            data_points: numbers(),
            aggregation_temporality: cumulative,
            is_monotonic: true,
        }),
        Kind::Gauge => metric::Data::Gauge(Gauge { data_points: numbers() }),
        Kind::Histogram if is_native => metric::Data::ExponentialHistogram(ExponentialHistogram {
            data_points: pairs()
                .filter_map(|(attributes, value, start_ns)| exponential_point(attributes, value, start_ns, now_ns))
                .collect(),
            aggregation_temporality: cumulative,
        }),
        Kind::Histogram => metric::Data::Histogram(Histogram {
            data_points: pairs()
                .filter_map(|(attributes, value, start_ns)| histogram_point(attributes, value, start_ns, now_ns))
                .collect(),
            aggregation_temporality: cumulative,
        }),
    };
    Metric {
        name: family.name.clone(),
        description: family.help.clone(),
        unit: unit(family),
        data: Some(data),
        ..Metric::default()
    }
}

/// In UCUM's words. What is counted is in braces, which collectors that make names of units leave out; the names here end in their unit already.
fn unit(family: &Family) -> String {
    let word = if family.unit.is_empty() {
        family.name.rsplit('_').next().unwrap_or_default()
    } else {
        family.unit.as_str()
    };
    if let Some((_, unit)) = UNITS.iter().find(|(name, _)| *name == family.name) {
        return (*unit).to_owned();
    }
    match word {
        "seconds" => "s".to_owned(),
        "bytes" => "By".to_owned(),
        "ratio" | "ratios" => "1".to_owned(),
        // Of what is always one.
        "info" | "" => String::new(),
        _ => match (word.strip_suffix("ies"), word.strip_suffix("sses")) {
            (Some(stem), _) => format!("{{{stem}y}}"),
            (_, Some(stem)) => format!("{{{stem}ss}}"),
            _ => format!("{{{}}}", word.strip_suffix('s').unwrap_or(word)),
        },
    }
}

fn attributes(labels: &Labels) -> Vec<KeyValue> {
    labels
        .iter()
        .map(|(name, value)| attribute(name, value.clone()))
        .collect()
}

fn number_point(attributes: Vec<KeyValue>, value: &Value, start_ns: u64, now_ns: u64) -> Option<NumberDataPoint> {
    let Value::Number(number) = value else { return None };
    Some(NumberDataPoint {
        attributes,
        start_time_unix_nano: start_ns,
        time_unix_nano: now_ns,
        value: Some(match number {
            Number::Whole(whole) => number_data_point::Value::AsInt(*whole),
            Number::Fraction(fraction) => number_data_point::Value::AsDouble(*fraction),
        }),
        ..NumberDataPoint::default()
    })
}

fn histogram_point(attributes: Vec<KeyValue>, value: &Value, start_ns: u64, now_ns: u64) -> Option<HistogramDataPoint> {
    let Value::Histogram {
        bounds,
        counts,
        sum,
        count,
        exemplars,
    } = value
    else {
        return None;
    };
    Some(HistogramDataPoint {
        attributes,
        start_time_unix_nano: start_ns,
        time_unix_nano: now_ns,
        count: *count,
        sum: Some(*sum),
        bucket_counts: counts.clone(),
        explicit_bounds: bounds.clone(),
        exemplars: exemplars.iter().map(sent).collect(),
        ..HistogramDataPoint::default()
    })
}

fn exponential_point(
    attributes: Vec<KeyValue>,
    value: &Value,
    start_ns: u64,
    now_ns: u64,
) -> Option<ExponentialHistogramDataPoint> {
    let Value::Native {
        scale,
        zero_threshold,
        zero_count,
        offset,
        counts,
        sum,
        count,
        exemplars,
    } = value
    else {
        return None;
    };
    Some(ExponentialHistogramDataPoint {
        attributes,
        start_time_unix_nano: start_ns,
        time_unix_nano: now_ns,
        count: *count,
        sum: Some(*sum),
        scale: *scale,
        zero_count: *zero_count,
        zero_threshold: *zero_threshold,
        positive: Some(Buckets {
            offset: *offset,
            bucket_counts: counts.clone(),
        }),
        exemplars: exemplars.iter().map(sent).collect(),
        ..ExponentialHistogramDataPoint::default()
    })
}

fn sent(exemplar: &Exemplar) -> Sent {
    Sent {
        time_unix_nano: u64::try_from(exemplar.observed.as_nanos()).unwrap_or(u64::MAX),
        span_id: exemplar.span_id.to_be_bytes().to_vec(),
        trace_id: exemplar.trace.0.to_vec(),
        value: Some(exemplar::Value::AsDouble(exemplar.seconds)),
        ..Sent::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_family_has_a_unit_that_collectors_do_not_make_another_name_of() {
        let families = crate::metrics::reference::families();
        assert!(families.len() > 40);
        let unit_of = |name: &str| {
            unit(&Family {
                name: name.to_owned(),
                help: String::new(),
                unit: String::new(),
                kind: Kind::Counter,
                series: Vec::new(),
            })
        };
        for family in &families {
            let name = family.name.strip_suffix("_total").unwrap_or(&family.name);
            let unit = unit_of(name);
            let fits = match unit.as_str() {
                "s" => name.ends_with("_seconds"),
                "By" => name.ends_with("_bytes"),
                "1" => name.ends_with("_ratio"),
                "" => name.ends_with("_info"),
                counted => counted.starts_with('{') && (counted.ends_with("ss}") || !counted.ends_with("s}")),
            };
            assert!(fits, "{name}: {unit}");
        }
        let units = [
            "wasm_host_calls",
            "wasmscope_table_entries",
            "wasmscope_paused_processes",
        ]
        .map(unit_of);
        assert_eq!(units, ["{call}", "{entry}", "{process}"]);
    }
}
