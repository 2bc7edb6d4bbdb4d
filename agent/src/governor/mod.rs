//! The ceiling on what probes cost: how much of a process's CPU time they may take, and what is paused when they would take
//! more. This decides; [`crate::pipeline`] counts hits and does as decided.

mod decide;

use serde::{Deserialize, Serialize};
use wasmscope_common::{
    HIT_ACTIVATION, HIT_HELPER, HIT_HOST_CALL, HIT_HOST_CALL_END, HIT_KINDS, HIT_MARK, HIT_SYSCALL,
};

pub use self::decide::{Change, Governor, ProcessOverhead, Sample};
use crate::span::ProbeKind;

/// The section `[governor]` of the configuration.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct GovernorConfig {
    /// Whether probes are paused at all. Default: true.
    pub enabled: bool,
    /// Most that probes may take of the CPU time that a process uses, percent; above 0, at most 100. Default: 2.
    pub process_budget_percent: f64,
    /// What probes may always take in a process, percent of one CPU, from 0.01 to 100: a service that mostly waits uses so little CPU time that
    /// its share would leave nothing to see of it, at a cost that nobody notices. The budget of the node holds all the same. Default: 1.
    pub process_floor_percent: f64,
    /// Most that the probes in all processes may take of all CPUs, percent; above 0, at most 100. Default: 1.
    pub node_budget_percent: f64,
    /// How often costs are looked at, milliseconds, 100 to 60,000. What has just been resumed is looked at ten times as often. Default: 1,000.
    pub interval_ms: u64,
    /// How long the first pause is, milliseconds, from 100 to `max_backoff_ms`. Each pause that follows a resumption which was too
    /// much is twice as long. Default: 2,000.
    pub min_backoff_ms: u64,
    /// How long a pause is at most, milliseconds, `min_backoff_ms` to 3,600,000. Default: 300,000.
    pub max_backoff_ms: u64,
}

impl Default for GovernorConfig {
    fn default() -> Self {
        Self {
            enabled: true,
            process_budget_percent: 2.0,
            process_floor_percent: 1.0,
            node_budget_percent: 1.0,
            interval_ms: 1_000,
            min_backoff_ms: 2_000,
            max_backoff_ms: 300_000,
        }
    }
}

impl GovernorConfig {
    /// Whether every value is in its range.
    pub fn validate(&self) -> Result<(), String> {
        for (name, percent) in [
            ("process_budget_percent", self.process_budget_percent),
            ("node_budget_percent", self.node_budget_percent),
        ] {
            if !(percent > 0.0 && percent <= 100.0) {
                return Err(format!("{name} must be above 0 and at most 100"));
            }
        }
        if !(0.01..=100.0).contains(&self.process_floor_percent) {
            return Err("process_floor_percent must be from 0.01 to 100".to_owned());
        }
        if !(100..=60_000).contains(&self.interval_ms) {
            return Err("interval_ms must be from 100 to 60000".to_owned());
        }
        if self.max_backoff_ms > 3_600_000 {
            return Err("max_backoff_ms must be at most 3600000".to_owned());
        }
        if !(100..=self.max_backoff_ms).contains(&self.min_backoff_ms) {
            return Err("min_backoff_ms must be from 100 to max_backoff_ms".to_owned());
        }
        Ok(())
    }
}

/// What one hit of each kind of probe costs, nanoseconds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ProbeCosts {
    /// A syscall: entry and exit, with the stack and the record.
    pub syscall_ns: u64,
    /// A swap of activations.
    pub activation_ns: u64,
    /// The entry of a host call.
    pub host_call_ns: u64,
    /// Its end at an instruction that the kernel emulates.
    pub host_call_end_ns: u64,
    /// Its end at one that is single-stepped.
    pub host_call_end_stepped_ns: u64,
    /// A function that is called seldom.
    pub mark_ns: u64,
    /// A probe whose process is not to be recorded.
    pub muted_ns: u64,
    /// These were measured here; else they are assumed.
    pub is_measured: bool,
}

impl Default for ProbeCosts {
    /// Assumed where nothing can be measured: about twice what was measured on a virtual machine (AMD EPYC, Linux 6.18), since
    /// too high a cost pauses too early, and too low a one breaks the promise.
    fn default() -> Self {
        Self {
            syscall_ns: 1_500,
            activation_ns: 3_000,
            host_call_ns: 3_500,
            host_call_end_ns: 2_500,
            host_call_end_stepped_ns: 20_000,
            mark_ns: 3_000,
            muted_ns: 1_600,
            is_measured: false,
        }
    }
}

impl ProbeCosts {
    /// By name, as in the metric `wasmscope_probe_cost_seconds`.
    pub fn named(&self) -> [(&'static str, u64); 7] {
        [
            ("syscall", self.syscall_ns),
            ("activation", self.activation_ns),
            ("host_call", self.host_call_ns),
            ("host_call_end", self.host_call_end_ns),
            ("host_call_end_stepped", self.host_call_end_stepped_ns),
            ("mark", self.mark_ns),
            ("muted", self.muted_ns),
        ]
    }

    /// Of each kind of hit at a level, nanoseconds. Of the ends of host calls, this share is at instructions that are
    /// single-stepped.
    fn at(&self, level: Level, stepped_share: f64) -> [f64; HIT_KINDS] {
        let mut costs = [0.0; HIT_KINDS];
        let step_ns = self.host_call_end_stepped_ns.saturating_sub(self.host_call_end_ns) as f64 * stepped_share;
        let (host_calls, activations) = (level < Level::NoHostCalls, level < Level::NoActivations);
        let muted = self.muted_ns as f64;
        let either = |wanted: bool, cost: u64| if wanted { cost as f64 } else { muted };
        costs[HIT_SYSCALL] = self.syscall_ns as f64;
        costs[HIT_ACTIVATION] = either(activations, self.activation_ns);
        costs[HIT_MARK] = either(activations, self.mark_ns);
        // About what a mark does; recorded for as long as syscalls are.
        costs[HIT_HELPER] = either(level < Level::Nothing, self.mark_ns);
        costs[HIT_HOST_CALL] = either(host_calls, self.host_call_ns);
        costs[HIT_HOST_CALL_END] = either(host_calls, self.host_call_end_ns) + step_ns;
        costs
    }
}

/// What is left of the probes in a process.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Level {
    /// Everything.
    #[default]
    Full,
    /// Host calls are not recorded.
    NoHostCalls,
    /// Nor are activations.
    NoActivations,
    /// Nor are syscalls.
    Nothing,
}

impl Level {
    /// Every level, from most to least.
    pub const ALL: [Self; 4] = [Self::Full, Self::NoHostCalls, Self::NoActivations, Self::Nothing];

    /// The probes that are paused at it.
    pub fn paused(self) -> &'static [ProbeKind] {
        &ProbeKind::ALL[..self as usize]
    }

    /// The next higher one.
    fn recovered(self) -> Self {
        Self::ALL[(self as usize).saturating_sub(1)]
    }

    /// The kinds of hits that are recorded.
    fn is_recorded(self, kind: usize) -> bool {
        match kind {
            HIT_HOST_CALL | HIT_HOST_CALL_END => self < Self::NoHostCalls,
            HIT_ACTIVATION | HIT_MARK => self < Self::NoActivations,
            _ => self < Self::Nothing,
        }
    }
}

#[cfg(test)]
mod tests;
