//! A metric family that cannot grow without end: past its cap, what would be a new series is counted under `other`, and series of processes that are gone
//! are forgotten.

use std::collections::HashMap;
use std::fmt::Debug;
use std::hash::Hash;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use prometheus_client::encoding::{EncodeLabelSet, EncodeMetric};
use prometheus_client::metrics::TypedMetric;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::{Family, MetricConstructor};
use prometheus_client::registry::Registry;

use super::owners::{EndedProcesses, Owner, Owners};

/// Labels that know what they become when there is no room for them.
pub(super) trait Labels: Clone + Debug + Eq + Hash + EncodeLabelSet + Send + Sync + 'static {
    /// The same with every label of an open set replaced by `other`; labels of closed sets stay.
    fn other(&self) -> Self;
}

/// What expires does so in every family alike.
pub(super) trait Expiring {
    /// Forgets the series whose processes have all been gone for this long. `ended` are those that ended lately.
    fn expire(&self, ended: &EndedProcesses, expiry: Duration, now: Instant);
}

/// A family with at most `max_series` series, and the few of `other`.
#[derive(Debug)]
pub(super) struct BoundedFamily<S, M, C = fn() -> M> {
    family: Family<S, M, C>,
    /// Of all series but those of `other`, which stay.
    owners: Mutex<HashMap<S, Owners>>,
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
            owners: Mutex::default(),
            max_series,
            overflow,
        }
    }

    /// Updates the series of `labels`, or that of `other`. It lives as long as its owners, or for ever if it has none.
    pub(super) fn with(&self, labels: &S, owner: &Owner, update: impl FnOnce(&M)) {
        // Held until the update is made, so that a series cannot expire under it.
        let mut owners = self.owners();
        if let Some(known) = owners.get_mut(labels) {
            known.add(owner);
        } else if owners.len() >= self.max_series {
            self.overflow.inc();
            return update(&self.family.get_or_create(&labels.other()));
        } else {
            owners.entry(labels.clone()).or_default().add(owner);
        }
        update(&self.family.get_or_create(labels));
    }

    fn owners(&self) -> MutexGuard<'_, HashMap<S, Owners>> {
        self.owners.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<S, M, C> Expiring for BoundedFamily<S, M, C>
where
    S: Labels,
    M: EncodeMetric + TypedMetric + Debug + Send + Sync + 'static,
    C: MetricConstructor<M> + Clone + Send + Sync + 'static,
{
    fn expire(&self, ended: &EndedProcesses, expiry: Duration, now: Instant) {
        self.owners().retain(|labels, owners| {
            owners.retain_running(ended, now);
            let is_over = owners.are_gone_for(expiry, now);
            if is_over {
                self.family.remove(labels);
            }
            !is_over
        });
    }
}
