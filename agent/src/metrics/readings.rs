//! A reading of all families for those who do not take text: what the kernel counts comes as it is kept, with its native buckets and exemplars.

use wasmscope_common::{BUCKET_COUNT, BUCKET_SCALE, ZERO_SECONDS_LOG2};

use super::{
    Metrics,
    aggregate::{AggregateFamilies, COUNTERS, HISTOGRAMS, Histogram, LabelSet},
    exposition::{classic_bounds, upper_bound},
    snapshot::{Family, Kind, Number, Snapshot, Value},
};

impl Metrics {
    /// All families. A histogram that the kernel counts is native unless those are configured off.
    pub fn snapshot(&self) -> Snapshot {
        let mut snapshot = Snapshot::parse(&self.encode_registry());
        if let Some(aggregates) = &self.aggregates {
            snapshot.families.extend(families(aggregates));
        }
        snapshot
    }
}

fn families(aggregates: &AggregateFamilies) -> Vec<Family> {
    let family = |(name, help): &(&str, &str), kind, series: Vec<(LabelSet, Value)>| Family {
        name: (*name).to_owned(),
        help: format!("{help}."),
        unit: String::new(),
        kind,
        series,
    };
    let counters = COUNTERS.iter().enumerate().map(|(index, named)| {
        let series = aggregates.counters(index).into_iter();
        let series = series.map(|(labels, count)| {
            let count = i64::try_from(count).unwrap_or(i64::MAX);
            ((*labels).clone(), Value::Number(Number::Whole(count)))
        });
        family(named, Kind::Counter, series.collect())
    });
    let is_native = aggregates.config.native_histograms;
    let histograms = HISTOGRAMS.iter().enumerate().map(|(index, named)| {
        let series = aggregates.histograms(index).into_iter();
        let series = series.map(|(labels, histogram)| {
            let value = if is_native {
                native(&histogram)
            } else {
                classic(&histogram)
            };
            ((*labels).clone(), value)
        });
        family(named, Kind::Histogram, series.collect())
    });
    let mut all: Vec<_> = counters.chain(histograms).collect();
    // As in the text.
    all.retain(|family| !family.series.is_empty());
    all
}

fn native(histogram: &Histogram) -> Value {
    let times = &histogram.times;
    let filled = |bucket: &usize| times.buckets[*bucket] > 0;
    let first = (1..BUCKET_COUNT).find(filled).unwrap_or(1);
    let last = (1..BUCKET_COUNT).rfind(filled).unwrap_or(0);
    // Bucket i ends where i quarters above the zero bucket do, and OpenTelemetry counts buckets by where they begin.
    let first_index = ZERO_SECONDS_LOG2 * (1 << BUCKET_SCALE) - 1;
    Value::Native {
        scale: BUCKET_SCALE,
        zero_threshold: upper_bound(0),
        zero_count: times.buckets[0],
        offset: first_index + i32::try_from(first).unwrap_or(0),
        counts: times.buckets.get(first..=last).unwrap_or_default().to_vec(),
        sum: times.total_ns as f64 / 1e9,
        count: times.count(),
        exemplars: histogram.exemplars.values().copied().collect(),
    }
}

fn classic(histogram: &Histogram) -> Value {
    let times = &histogram.times;
    let mut from = 0;
    let mut counts = Vec::new();
    for bucket in classic_bounds().chain([BUCKET_COUNT - 1]) {
        counts.push(times.buckets[from..=bucket].iter().sum());
        from = bucket + 1;
    }
    Value::Histogram {
        bounds: classic_bounds().map(upper_bound).collect(),
        counts,
        sum: times.total_ns as f64 / 1e9,
        count: times.count(),
        exemplars: histogram.exemplars.values().copied().collect(),
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::metrics::aggregate::Exemplar;
    use crate::span::TraceId;

    fn filled(buckets: &[(usize, u64)]) -> Histogram {
        let mut histogram = Histogram::default();
        for (bucket, count) in buckets {
            histogram.times.buckets[*bucket] = *count;
            histogram.exemplars.insert(
                *bucket,
                Exemplar {
                    trace: TraceId([1; 16]),
                    span_id: 7,
                    seconds: upper_bound(*bucket),
                    observed: Duration::from_secs(5),
                },
            );
        }
        histogram
    }

    #[test]
    fn native_buckets_end_where_opentelemetry_has_them_end() {
        let Value::Native {
            scale,
            zero_threshold,
            zero_count,
            offset,
            counts,
            count,
            exemplars,
            ..
        } = native(&filled(&[(0, 2), (40, 3), (43, 1)]))
        else {
            panic!("is native")
        };
        assert_eq!(
            (zero_count, counts, count, exemplars.len()),
            (2, vec![3, 0, 0, 1], 6, 3)
        );
        assert_eq!(zero_threshold.to_bits(), upper_bound(0).to_bits());
        // Index i holds what is above base^i and at most base^(i + 1), base being 2^(2^-scale).
        let end = |index: i32| (f64::from(index + 1) * f64::from(-scale).exp2()).exp2();
        assert!((end(offset) / upper_bound(40) - 1.0).abs() < 1e-12);
        assert!((end(offset + 3) / upper_bound(43) - 1.0).abs() < 1e-12);
    }

    #[test]
    fn one_without_observations_has_no_buckets() {
        let Value::Native {
            counts,
            zero_count,
            count,
            ..
        } = native(&Histogram::default())
        else {
            panic!("is native")
        };
        assert_eq!((counts, zero_count, count), (vec![], 0, 0));
    }

    #[test]
    fn classic_buckets_hold_every_observation_once() {
        let Value::Histogram {
            bounds, counts, count, ..
        } = classic(&filled(&[(0, 2), (9, 5), (127, 1)]))
        else {
            panic!("is classic")
        };
        assert_eq!(counts.len(), bounds.len() + 1);
        assert_eq!((counts.iter().sum::<u64>(), count), (8, 8));
        assert_eq!((counts[0], counts[1], counts.last()), (2, 5, Some(&1)));
    }
}
