//! A metric family that cannot grow without end: past its cap, what would be a new series is counted under `other`.

use std::fmt::Debug;
use std::hash::Hash;
use std::sync::{Mutex, PoisonError};

use prometheus_client::encoding::{EncodeLabelSet, EncodeMetric};
use prometheus_client::metrics::TypedMetric;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::{Family, MetricConstructor};
use prometheus_client::registry::Registry;

/// Labels that know what they become when there is no room for them.
pub(super) trait Labels: Clone + Debug + Eq + Hash + EncodeLabelSet + Send + Sync + 'static {
    /// The same with every label of an open set replaced by `other`; labels of closed sets stay.
    fn other(&self) -> Self;
}

/// A family with at most `max_series` series, and the few of `other`.
#[derive(Debug)]
pub(super) struct BoundedFamily<S, M, C = fn() -> M> {
    family: Family<S, M, C>,
    series_count: Mutex<usize>,
    max_series: usize,
    overflow: Counter,
}

impl<S, M, C> BoundedFamily<S, M, C>
where
    S: Labels,
    M: EncodeMetric + TypedMetric + Debug + Send + Sync + 'static,
    C: MetricConstructor<M> + Clone + Send + Sync + 'static,
{
    /// Registers the family. `overflow` counts the observations that ended in `other`.
    pub(super) fn register(
        registry: &mut Registry,
        name: &'static str,
        help: &'static str,
        constructor: C,
        max_series: usize,
        overflow: Counter,
    ) -> Self {
        debug_assert!(!name.ends_with("_total"), "the encoder adds _total to {name}");
        let family = Family::new_with_constructor(constructor);
        registry.register(name, help, family.clone());
        Self {
            family,
            series_count: Mutex::new(0),
            max_series,
            overflow,
        }
    }

    /// Updates the series of `labels`, or that of `other`.
    pub(super) fn with(&self, labels: &S, update: impl FnOnce(&M)) {
        // A read guard must not be held while a series is created.
        if self.family.get(labels).is_some() {
            return update(&self.family.get_or_create(labels));
        }
        let mut series_count = self.series_count.lock().unwrap_or_else(PoisonError::into_inner);
        if self.family.get(labels).is_none() {
            if *series_count >= self.max_series {
                drop(series_count);
                self.overflow.inc();
                return update(&self.family.get_or_create(&labels.other()));
            }
            *series_count += 1;
        }
        update(&self.family.get_or_create(labels));
    }
}
