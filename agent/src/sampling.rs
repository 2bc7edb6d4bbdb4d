//! Head sampling of traces: which of them leave the node.
//!
//! A trace of a request whose caller has decided (W3C `traceparent`) follows that decision; a failed one is kept within a budget of its own; of
//! the others a share is kept by trace id, and of each export of a module in a pod no more than a rate. Metrics count before sampling and stay exact.

use std::collections::HashMap;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::span::{SpanKind, Trace};

/// Configuration of [`Sampler`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct SamplingConfig {
    /// Traces per second that are kept of each (namespace, pod, module, export); over 0. Default 10.
    pub traces_per_second: f64,
    /// Traces that may be kept at once after a quiet time, of each key; at least 1. Default 20.
    pub burst: f64,
    /// Share of traces that are considered, by trace id, before the rate: 0 to 1. Default 1.
    pub ratio: f64,
    /// Follow the decision of the caller where a `traceparent` was seen. Default true.
    pub parent_based: bool,
    /// Keep failed traces that ratio or rate would drop, within the failure budget. Default true.
    pub keep_failed: bool,
    /// Failed traces per second kept on the whole node beyond ratio and rate; over 0. Its burst is ten seconds' worth. Default 50.
    pub failed_per_second: f64,
    /// Keys remembered, 1 to 1,000,000; further ones share the key `other` until an old one has been idle long enough to be full. Default 4,096.
    pub max_keys: usize,
}

impl Default for SamplingConfig {
    fn default() -> Self {
        Self {
            traces_per_second: 10.0,
            burst: 20.0,
            ratio: 1.0,
            parent_based: true,
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
}

impl Decision {
    /// All, in the order of [`Sampler::counts`].
    pub const ALL: [Self; 6] = [
        Self::Kept,
        Self::ParentKept,
        Self::FailedKept,
        Self::ParentDropped,
        Self::RatioDropped,
        Self::RateLimited,
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
        }
    }
}

/// What the caller of the request decided, if a `traceparent` was seen; `None` without one.
pub fn parent_sampled(trace: &Trace) -> Option<bool> {
    trace.parent.as_ref().map(crate::span::Parent::is_sampled)
}

/// Whose rate a trace counts against.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Key {
    namespace: Option<Box<str>>,
    pod: Option<Box<str>>,
    /// Name, hash and export, where the function is known.
    function: Option<(Box<str>, Box<str>, Box<str>)>,
}

impl Key {
    fn new(trace: &Trace) -> Self {
        let place = &trace.process.place;
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
            namespace: place.namespace.as_deref().map(Box::from),
            pod: place.pod_uid.as_deref().or(place.pod_name.as_deref()).map(Box::from),
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

/// Decides on traces. Its memory is bounded by [`SamplingConfig::max_keys`].
#[derive(Debug)]
pub struct Sampler {
    config: SamplingConfig,
    buckets: HashMap<Key, Bucket>,
    /// Of all keys there is no room for.
    other: Bucket,
    failed: Bucket,
    /// When full buckets are looked for next, so that a flood of keys does not search each time.
    next_sweep_ns: u64,
    counts: [u64; Decision::ALL.len()],
}

impl Sampler {
    /// With full buckets.
    pub fn new(config: SamplingConfig) -> Self {
        Self {
            config,
            buckets: HashMap::new(),
            other: Bucket::default(),
            failed: Bucket::default(),
            next_sweep_ns: 0,
            counts: [0; Decision::ALL.len()],
        }
    }

    /// Changes the limits; what is remembered of keys and the counts stay.
    pub fn reconfigure(&mut self, config: SamplingConfig) {
        if config.max_keys < self.buckets.len() {
            self.buckets.clear();
        }
        self.config = config;
    }

    /// Decides, and counts the decision. Rates are measured by the times at which traces end, so that a replay decides alike.
    pub fn decide(&mut self, trace: &Trace) -> Decision {
        let decision = self.decision(trace, parent_sampled(trace));
        self.counts[decision as usize] += 1;
        decision
    }

    /// The trace, if it is to be exported.
    pub fn keep(&mut self, trace: &Arc<Trace>) -> Option<Arc<Trace>> {
        self.decide(trace).is_kept().then(|| Arc::clone(trace))
    }

    /// Decisions so far, for `wasmscope_traces_sampled_total{decision}`.
    pub fn counts(&self) -> impl Iterator<Item = (Decision, u64)> + '_ {
        Decision::ALL.into_iter().zip(self.counts)
    }

    fn decision(&mut self, trace: &Trace, parent: Option<bool>) -> Decision {
        match parent.filter(|_| self.config.parent_based) {
            Some(true) => return Decision::ParentKept,
            Some(false) => return Decision::ParentDropped,
            None => {}
        }
        let now_ns = trace.root.end_ns;
        let dropped = if !is_in_ratio(trace.id.0, self.config.ratio) {
            Decision::RatioDropped
        } else if self.bucket(trace, now_ns) {
            return Decision::Kept;
        } else {
            Decision::RateLimited
        };
        if self.config.keep_failed && trace.root.outcome.is_failure() {
            let (rate, burst) = (
                self.config.failed_per_second,
                (10.0 * self.config.failed_per_second).max(1.0),
            );
            if self.failed.take(rate, burst, now_ns) {
                return Decision::FailedKept;
            }
        }
        dropped
    }

    fn bucket(&mut self, trace: &Trace, now_ns: u64) -> bool {
        let (rate, burst) = (self.config.traces_per_second, self.config.burst);
        let key = Key::new(trace);
        if let Some(bucket) = self.buckets.get_mut(&key) {
            return bucket.take(rate, burst, now_ns);
        }
        if self.buckets.len() >= self.config.max_keys && now_ns >= self.next_sweep_ns {
            self.buckets.retain(|_, bucket| !bucket.is_full_at(now_ns));
            self.next_sweep_ns = now_ns.saturating_add(1_000_000_000);
        }
        let bucket = if self.buckets.len() < self.config.max_keys {
            self.buckets.entry(key).or_default()
        } else {
            &mut self.other
        };
        bucket.take(rate, burst, now_ns)
    }
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
    use super::*;
    use crate::sink::testing::{invoke, trace};
    use crate::span::{Outcome, TraceId};

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
        assert_eq!(sampler.buckets.len(), 2);
        assert_eq!(
            kept(&mut sampler, many(60_000_000_000)),
            2 + 3,
            "the idle ones were forgotten"
        );
        assert_eq!(sampler.buckets.len(), 2);
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
    fn every_decision_is_counted_once() {
        let mut sampler = Sampler::new(SamplingConfig { ratio: 0.5, ..config() });
        for i in 0..1_000_u64 {
            let mut trace = if i % 2 == 0 { at("run", i) } else { failed(i) };
            trace.id = TraceId(u128::from(i << 46 | 1).to_be_bytes());
            sampler.decide(&trace);
        }
        assert_eq!(sampler.counts().map(|(_, count)| count).sum::<u64>(), 1_000);
        for (index, decision) in Decision::ALL.into_iter().enumerate() {
            assert_eq!(decision as usize, index);
        }
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
                max_keys: 0,
                ..config()
            },
        ] {
            assert!(config.validate().is_err(), "{config:?}");
        }
    }
}
