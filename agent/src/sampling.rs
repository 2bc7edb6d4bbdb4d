//! Head sampling of traces: which of them leave the node.
//!
//! A trace of a request whose caller has decided (W3C `traceparent`) follows that decision, up to a rate of its pod, for whoever sends a request can
//! write the header; a failed one is kept within a budget of its own; of the others a share is kept by trace id, and of each export of a module in a
//! pod no more than a rate. Metrics count before sampling and stay exact.

use std::collections::HashMap;
use std::hash::Hash;

use serde::{Deserialize, Serialize};

use crate::span::{SpanKind, Trace};

/// Configuration of [`Sampler`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct SamplingConfig {
    /// Traces per second that are kept of each (namespace, pod, module, export); over 0. Default: 10.
    pub traces_per_second: f64,
    /// Traces that may be kept at once after a quiet time, of each key; at least 1. Default: 20.
    pub burst: f64,
    /// Share of traces that are considered, by trace id, before the rate: 0 to 1. Default: 1.
    pub ratio: f64,
    /// Follow the decision of the caller where a `traceparent` was seen. Default: true.
    pub parent_based: bool,
    /// Traces per second that callers have sampled and that are kept of each pod; over 0. Its burst is two seconds' worth. Default: 100.
    pub parent_per_second: f64,
    /// Keep failed traces that ratio or rate would drop, within the failure budget. Default: true.
    pub keep_failed: bool,
    /// Failed traces per second kept on the whole node beyond ratio and rate; over 0. Its burst is ten seconds' worth. Default: 50.
    pub failed_per_second: f64,
    /// Keys remembered, and pods, 1 to 1,000,000 each; further ones share the key `other` until an old one has been idle long enough to be full. Default: 4,096.
    pub max_keys: usize,
}

impl Default for SamplingConfig {
    fn default() -> Self {
        Self {
            traces_per_second: 10.0,
            burst: 20.0,
            ratio: 1.0,
            parent_based: true,
            parent_per_second: 100.0,
            keep_failed: true,
            failed_per_second: 50.0,
            max_keys: 4_096,
        }
    }
}

impl SamplingConfig {
    /// Says what is out of range.
    pub fn validate(&self) -> Result<(), String> {
        for (name, value) in [
            ("traces_per_second", self.traces_per_second),
            ("parent_per_second", self.parent_per_second),
            ("failed_per_second", self.failed_per_second),
        ] {
            if !(value.is_finite() && value > 0.0) {
                return Err(format!("sampling.{name} must be over 0, not {value}"));
            }
        }
        if !(self.burst.is_finite() && self.burst >= 1.0) {
            return Err(format!("sampling.burst must be at least 1, not {}", self.burst));
        }
        if !(0.0..=1.0).contains(&self.ratio) {
            return Err(format!("sampling.ratio must be between 0 and 1, not {}", self.ratio));
        }
        if !(1..=1_000_000).contains(&self.max_keys) {
            return Err(format!(
                "sampling.max_keys must be between 1 and 1000000, not {}",
                self.max_keys
            ));
        }
        Ok(())
    }
}

/// What became of a trace.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Decision {
    /// Within ratio and rate.
    Kept,
    /// The caller had sampled the request.
    ParentKept,
    /// Failed, and kept although ratio or rate would have dropped it.
    FailedKept,
    /// The caller had decided not to sample the request.
    ParentDropped,
    /// Not in the share by trace id.
    RatioDropped,
    /// Over the rate of its key.
    RateLimited,
    /// The caller had sampled the request, over the rate of its pod.
    ParentLimited,
}

impl Decision {
    /// All.
    pub const ALL: [Self; 7] = [
        Self::Kept,
        Self::ParentKept,
        Self::FailedKept,
        Self::ParentDropped,
        Self::RatioDropped,
        Self::RateLimited,
        Self::ParentLimited,
    ];

    /// Whether the trace is exported.
    pub fn is_kept(self) -> bool {
        matches!(self, Self::Kept | Self::ParentKept | Self::FailedKept)
    }

    /// The word of the `decision` label of `wasmscope_traces_sampled_total`.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Kept => "kept",
            Self::ParentKept => "parent_kept",
            Self::FailedKept => "failed_kept",
            Self::ParentDropped => "parent_dropped",
            Self::RatioDropped => "ratio_dropped",
            Self::RateLimited => "rate_limited",
            Self::ParentLimited => "parent_limited",
        }
    }
}

/// What the caller of the request decided, if a `traceparent` was seen; `None` without one.
pub fn parent_sampled(trace: &Trace) -> Option<bool> {
    trace.parent.as_ref().map(crate::span::Parent::is_sampled)
}

/// By namespace and UID or name; what is in none is one.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Pod(Option<Box<str>>, Option<Box<str>>);

impl Pod {
    fn new(trace: &Trace) -> Self {
        let place = &trace.process.place;
        let pod = place.pod_uid.as_deref().or(place.pod_name.as_deref());
        Self(place.namespace.as_deref().map(Box::from), pod.map(Box::from))
    }
}

/// Whose rate a trace counts against.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Key {
    pod: Pod,
    /// Name, hash and export, where the function is known.
    function: Option<(Box<str>, Box<str>, Box<str>)>,
}

impl Key {
    fn new(trace: &Trace) -> Self {
        let function = match &trace.root.kind {
            SpanKind::Invoke {
                function: Some(function),
            } => Some((
                Box::from(&*function.module.name),
                Box::from(&*function.module.hash),
                Box::from(&*function.name),
            )),
            _ => None,
        };
        Self {
            pod: Pod::new(trace),
            function,
        }
    }
}

/// Tokens of one key, as the time at which they will all be back: whole nanoseconds add up without rounding.
#[derive(Clone, Copy, Debug, Default)]
struct Bucket {
    full_at_ns: u64,
}

impl Bucket {
    fn take(&mut self, per_second: f64, burst: f64, now_ns: u64) -> bool {
        let interval_ns = 1e9 / per_second;
        // Traces come in the order in which they end, but not to the nanosecond: time that goes back adds nothing.
        let full_at_ns = self.full_at_ns.max(now_ns);
        let is_enough = (full_at_ns - now_ns) as f64 <= (burst - 1.0) * interval_ns;
        if is_enough {
            self.full_at_ns = full_at_ns.saturating_add(interval_ns as u64);
        }
        is_enough
    }

    /// A full bucket is as good as a forgotten one.
    fn is_full_at(self, now_ns: u64) -> bool {
        self.full_at_ns <= now_ns
    }
}

/// The buckets of many; its memory is bounded.
#[derive(Debug)]
struct Buckets<K> {
    by_key: HashMap<K, Bucket>,
    /// Of all keys there is no room for.
    other: Bucket,
    /// When full buckets are looked for next, so that a flood of keys does not search each time.
    next_sweep_ns: u64,
}

impl<K> Default for Buckets<K> {
    fn default() -> Self {
        Self {
            by_key: HashMap::new(),
            other: Bucket::default(),
            next_sweep_ns: 0,
        }
    }
}

impl<K: Eq + Hash> Buckets<K> {
    fn take(&mut self, key: K, max_keys: usize, (per_second, burst): (f64, f64), now_ns: u64) -> bool {
        if let Some(bucket) = self.by_key.get_mut(&key) {
            return bucket.take(per_second, burst, now_ns);
        }
        if self.by_key.len() >= max_keys && now_ns >= self.next_sweep_ns {
            self.by_key.retain(|_, bucket| !bucket.is_full_at(now_ns));
            self.next_sweep_ns = now_ns.saturating_add(1_000_000_000);
        }
        let bucket = if self.by_key.len() < max_keys {
            self.by_key.entry(key).or_default()
        } else {
            &mut self.other
        };
        bucket.take(per_second, burst, now_ns)
    }

    fn limit(&mut self, max_keys: usize) {
        if max_keys < self.by_key.len() {
            self.by_key.clear();
        }
    }
}

/// Decides on traces. Its memory is bounded by [`SamplingConfig::max_keys`].
#[derive(Debug)]
pub struct Sampler {
    config: SamplingConfig,
    buckets: Buckets<Key>,
    parents: Buckets<Pod>,
    failed: Bucket,
}

impl Sampler {
    /// With full buckets.
    pub fn new(config: SamplingConfig) -> Self {
        Self {
            config,
            buckets: Buckets::default(),
            parents: Buckets::default(),
            failed: Bucket::default(),
        }
    }

    /// Changes the limits; what is remembered of keys and the counts stay.
    pub fn reconfigure(&mut self, config: SamplingConfig) {
        self.buckets.limit(config.max_keys);
        self.parents.limit(config.max_keys);
        self.config = config;
    }

    /// Decides. Rates are measured by the times at which traces end, so that a replay decides alike.
    pub fn decide(&mut self, trace: &Trace) -> Decision {
        self.decision(trace, parent_sampled(trace))
    }

    fn decision(&mut self, trace: &Trace, parent: Option<bool>) -> Decision {
        let now_ns = trace.root.end_ns;
        let max_keys = self.config.max_keys;
        let dropped = match parent.filter(|_| self.config.parent_based) {
            Some(false) => return Decision::ParentDropped,
            Some(true) => {
                let limits = rate_and_burst(self.config.parent_per_second, 2.0);
                if self.parents.take(Pod::new(trace), max_keys, limits, now_ns) {
                    return Decision::ParentKept;
                }
                Decision::ParentLimited
            }
            None if !is_in_ratio(trace.id.0, self.config.ratio) => Decision::RatioDropped,
            None => {
                let limits = (self.config.traces_per_second, self.config.burst);
                if self.buckets.take(Key::new(trace), max_keys, limits, now_ns) {
                    return Decision::Kept;
                }
                Decision::RateLimited
            }
        };
        if self.config.keep_failed && trace.root.outcome.is_failure() {
            let (rate, burst) = rate_and_burst(self.config.failed_per_second, 10.0);
            if self.failed.take(rate, burst, now_ns) {
                return Decision::FailedKept;
            }
        }
        dropped
    }
}

/// A rate with a burst of so many seconds' worth.
fn rate_and_burst(per_second: f64, seconds: f64) -> (f64, f64) {
    (per_second, (seconds * per_second).max(1.0))
}

/// As OpenTelemetry's consistent probability sampling: the last 56 bits of the trace id against a threshold, so that samplers agree with each other.
fn is_in_ratio(trace_id: [u8; 16], ratio: f64) -> bool {
    const RANGE: f64 = (1_u64 << 56) as f64;
    let randomness = (u128::from_be_bytes(trace_id) as u64) & ((1 << 56) - 1);
    let threshold = ((1.0 - ratio) * RANGE) as u64;
    randomness >= threshold
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::sink::testing::{invoke, trace};
    use crate::span::Outcome;

    fn at(export: &str, end_ns: u64) -> Trace {
        trace(invoke(export, end_ns.saturating_sub(1), end_ns))
    }

    fn failed(end_ns: u64) -> Trace {
        let mut trace = at("run", end_ns);
        trace.root.outcome = Outcome::HostError;
        trace
    }

    fn config() -> SamplingConfig {
        SamplingConfig {
            traces_per_second: 2.0,
            burst: 3.0,
            failed_per_second: 0.5,
            ..SamplingConfig::default()
        }
    }

    fn kept(sampler: &mut Sampler, traces: impl IntoIterator<Item = Trace>) -> usize {
        traces
            .into_iter()
            .filter(|trace| sampler.decide(trace).is_kept())
            .count()
    }

    #[test]
    fn a_key_is_kept_up_to_its_burst_and_then_at_its_rate() {
        let mut sampler = Sampler::new(config());
        assert_eq!(kept(&mut sampler, (0..100).map(|_| at("run", 0))), 3);
        let later = (1..=1_000).map(|i| at("run", i * 10_000_000));
        assert_eq!(kept(&mut sampler, later), 20, "two a second for ten seconds");
    }

    #[test]
    fn keys_do_not_share_their_rate() {
        let mut sampler = Sampler::new(config());
        assert_eq!(kept(&mut sampler, (0..10).map(|_| at("run", 1))), 3);
        assert_eq!(kept(&mut sampler, (0..10).map(|_| at("walk", 1))), 3);
    }

    #[test]
    fn keys_that_there_is_no_room_for_share_one_rate_until_others_are_idle() {
        let mut sampler = Sampler::new(SamplingConfig {
            max_keys: 2,
            ..config()
        });
        let many = |end_ns| (0..10).map(move |i| at(&format!("f{i}"), end_ns));
        assert_eq!(kept(&mut sampler, many(1)), 2 + 3);
        assert_eq!(sampler.buckets.by_key.len(), 2);
        assert_eq!(
            kept(&mut sampler, many(60_000_000_000)),
            2 + 3,
            "the idle ones were forgotten"
        );
        assert_eq!(sampler.buckets.by_key.len(), 2);
    }

    #[test]
    fn failed_traces_are_kept_within_a_budget_of_their_own() {
        let mut sampler = Sampler::new(SamplingConfig { ratio: 0.0, ..config() });
        assert_eq!(kept(&mut sampler, (0..100).map(|_| failed(1))), 5, "ten seconds' worth");
        assert_eq!(kept(&mut sampler, [at("run", 1)]), 0);
        let mut sampler = Sampler::new(SamplingConfig {
            ratio: 0.0,
            keep_failed: false,
            ..config()
        });
        assert_eq!(kept(&mut sampler, [failed(1)]), 0);
    }

    #[test]
    fn the_callers_decision_wins_where_it_is_followed() {
        let mut sampler = Sampler::new(SamplingConfig { ratio: 0.0, ..config() });
        assert_eq!(sampler.decision(&at("run", 1), Some(true)), Decision::ParentKept);
        assert_eq!(sampler.decision(&failed(1), Some(false)), Decision::ParentDropped);
        sampler.reconfigure(SamplingConfig {
            parent_based: false,
            ..config()
        });
        assert_eq!(sampler.decision(&at("run", 1), Some(false)), Decision::Kept);
    }

    #[test]
    fn callers_that_sample_everything_get_no_more_than_the_rate_of_their_pod() {
        let pod = |name: &str, end_ns| {
            let mut trace = at("run", end_ns);
            let mut process = (*trace.process).clone();
            process.place.pod_uid = Some(name.to_owned());
            trace.process = Arc::new(process);
            trace
        };
        let mut sampler = Sampler::new(SamplingConfig {
            parent_per_second: 4.0,
            keep_failed: false,
            max_keys: 2,
            ..config()
        });
        let mut kept = |name: &str, end_ns, count| {
            let mut decisions: Vec<_> = (0..count)
                .map(|_| sampler.decision(&pod(name, end_ns), Some(true)))
                .collect();
            let kept = decisions.iter().filter(|decision| decision.is_kept()).count();
            decisions.dedup();
            assert!(decisions.len() <= 2 && decisions.contains(&Decision::ParentLimited));
            kept
        };
        assert_eq!(kept("a", 0, 100), 8, "two seconds' worth");
        assert_eq!(kept("a", 500_000_000, 100), 2);
        assert_eq!(kept("b", 500_000_000, 100), 8, "another pod has its own");
        assert_eq!(
            (kept("c", 500_000_000, 100), kept("d", 500_000_000, 100)),
            (8, 0),
            "the rest share one"
        );
        // The other rates are untouched by it, and a failed one has its budget.
        assert_eq!(sampler.decision(&pod("a", 500_000_000), None), Decision::Kept);
        sampler.reconfigure(SamplingConfig {
            parent_per_second: 4.0,
            ..config()
        });
        let mut trace = pod("a", 500_000_000);
        trace.root.outcome = Outcome::HostError;
        assert_eq!(sampler.decision(&trace, Some(true)), Decision::FailedKept);
    }

    #[test]
    fn the_ratio_depends_on_the_trace_id_alone() {
        let id = |low: u64| (u128::from(low) | (1 << 120)).to_be_bytes();
        assert!(!is_in_ratio(id((1 << 55) - 1), 0.5) && is_in_ratio(id(1 << 55), 0.5));
        assert!(is_in_ratio(id(0), 1.0) && !is_in_ratio(id((1 << 56) - 1), 0.0));
        assert!(
            is_in_ratio(id(0xff << 56 | 1 << 55), 0.5),
            "the first byte of the half is not random"
        );
    }

    #[test]
    fn limits_out_of_range_are_refused() {
        assert_eq!(SamplingConfig::default().validate(), Ok(()));
        for config in [
            SamplingConfig { ratio: 1.5, ..config() },
            SamplingConfig {
                ratio: f64::NAN,
                ..config()
            },
            SamplingConfig { burst: 0.0, ..config() },
            SamplingConfig {
                traces_per_second: -1.0,
                ..config()
            },
            SamplingConfig {
                parent_per_second: 0.0,
                ..config()
            },
            SamplingConfig {
                max_keys: 0,
                ..config()
            },
        ] {
            assert!(config.validate().is_err(), "{config:?}");
        }
    }
}
