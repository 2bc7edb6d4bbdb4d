//! From hits and CPU time to what is paused and resumed. No clock, no kernel: both come in as numbers.

use std::collections::{BTreeMap, HashMap};

use wasmscope_common::HIT_KINDS;

use super::{GovernorConfig, Level, ProbeCosts};
use crate::process::hosts::FileId;

/// Share of what was measured last in the smoothed rates.
const NEWEST_SHARE: f64 = 0.5;
/// Only a process that takes less than this share of its budget gets the next probes back at once.
const CALM_SHARE: f64 = 0.75;
/// Looks at what was just resumed before that counts as gone well.
const TRIAL_LOOKS: u32 = 3;
/// What muted probes in one file may take of a node's budget that is used up.
const MUTED_SHARE: f64 = 0.1;

/// What was counted of one process since it was first watched.
#[derive(Clone, Copy, Debug)]
pub struct Sample {
    /// Which.
    pub pid: u32,
    /// CPU time of all its threads, nanoseconds.
    pub cpu_ns: u64,
    /// Hits by kind (`HIT_*`).
    pub hits: [u64; HIT_KINDS],
    /// Share of its sites at the ends of host calls that are single-stepped.
    pub stepped_share: f64,
    /// Where its probes are, which all processes of that file have or do without; of several files, the first.
    pub file: Option<FileId>,
}

/// Something that is to be paused or resumed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Change {
    /// In which process.
    pub pid: u32,
    /// What was there.
    pub from: Level,
    /// What is to be there.
    pub to: Level,
}

/// What the probes in a process cost.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct ProcessOverhead {
    /// Share of the process's CPU time, smoothed.
    pub ratio: f64,
    /// Nanoseconds per second, smoothed.
    pub ns_per_second: f64,
    /// What is left of them.
    pub level: Level,
}

/// Decides.
#[derive(Debug)]
pub struct Governor {
    config: GovernorConfig,
    costs: ProbeCosts,
    cpu_count: u32,
    processes: HashMap<u32, State>,
}

#[derive(Debug)]
struct State {
    level: Level,
    last: Sample,
    last_ns: u64,
    next_ns: u64,
    /// Nanoseconds per second by kind of hit, smoothed.
    cost_rates: [f64; HIT_KINDS],
    /// CPU nanoseconds per second, smoothed.
    cpu_rate: f64,
    is_smoothed: bool,
    backoff_ns: u64,
    resume_ns: u64,
    /// Looks since the last resumption; `None` if all has been well since.
    trial: Option<u32>,
    pause_count: u32,
    calm_since_ns: u64,
}

impl State {
    fn cost_rate(&self) -> f64 {
        self.cost_rates.iter().sum()
    }

    fn allowed(&self, config: &GovernorConfig) -> f64 {
        (self.cpu_rate * config.process_budget_percent / 100.0).max(config.process_floor_percent / 100.0 * 1e9)
    }

    /// What would be left of the cost at a level.
    fn cost_rate_at(&self, level: Level) -> f64 {
        let rates = self.cost_rates.iter().enumerate();
        rates
            .filter(|(kind, _)| level.is_recorded(*kind))
            .map(|(_, rate)| rate)
            .sum()
    }

    /// What paused probes cost that stay attached for other processes of the file.
    fn muted_rate(&self) -> f64 {
        self.cost_rate() - self.cost_rate_at(self.level)
    }

    /// They are detached now.
    fn forget_muted(&mut self) {
        for (kind, rate) in self.cost_rates.iter_mut().enumerate() {
            if !self.level.is_recorded(kind) {
                *rate = 0.0;
            }
        }
    }

    /// What there would be to pay at a higher level than this one, as far as muted probes show it: those that are detached show
    /// nothing.
    fn foreseen(&self, to: Level, costs: &ProbeCosts) -> f64 {
        let now = costs.at(self.level, self.last.stepped_share);
        let then = costs.at(to, self.last.stepped_share);
        let rates = self.cost_rates.iter().enumerate();
        rates
            .filter(|(kind, _)| to.is_recorded(*kind))
            .map(|(kind, rate)| {
                if now[kind] > 0.0 {
                    rate / now[kind] * then[kind]
                } else {
                    0.0
                }
            })
            .sum()
    }

    fn pause(&mut self, to: Level, now_ns: u64, config: &GovernorConfig) {
        let (least, most) = (config.min_backoff_ms * 1_000_000, config.max_backoff_ms * 1_000_000);
        // One that had recovered for good starts anew.
        let has_recovered =
            self.trial.is_none() && now_ns.saturating_sub(self.calm_since_ns) > self.backoff_ns.max(least);
        self.backoff_ns = if self.pause_count == 0 || has_recovered {
            least
        } else {
            (self.backoff_ns * 2).clamp(least, most)
        };
        self.pause_count += 1;
        self.level = to;
        // What is left of it is measured from now on.
        self.forget_muted();
        self.trial = None;
        self.calm_since_ns = now_ns;
        self.resume_ns = now_ns + self.backoff_ns + jitter(self.last.pid, self.pause_count, self.backoff_ns / 4);
    }
}

impl Governor {
    /// For a machine with so many CPUs.
    pub fn new(config: GovernorConfig, costs: ProbeCosts, cpu_count: u32) -> Self {
        Self {
            config,
            costs,
            cpu_count,
            processes: HashMap::new(),
        }
    }

    /// Changes budgets and times from now on.
    pub fn reconfigure(&mut self, config: GovernorConfig) {
        self.config = config;
    }

    /// The configuration in use.
    pub fn config(&self) -> &GovernorConfig {
        &self.config
    }

    /// What hits are taken to cost.
    pub fn costs(&self) -> &ProbeCosts {
        &self.costs
    }

    /// Whether a process is to be looked at.
    pub fn is_due(&self, pid: u32, now_ns: u64) -> bool {
        self.processes.get(&pid).is_none_or(|state| now_ns >= state.next_ns)
    }

    /// It is gone.
    pub fn forget(&mut self, pid: u32) {
        self.processes.remove(&pid);
    }

    /// What is left of the probes in a process.
    pub fn level(&self, pid: u32) -> Level {
        self.processes.get(&pid).map_or(Level::Full, |state| state.level)
    }

    /// What they cost, by process.
    pub fn overheads(&self) -> impl Iterator<Item = (u32, ProcessOverhead)> + '_ {
        self.processes.iter().map(|(pid, state)| {
            let cost = state.cost_rate();
            let cpu = state.cpu_rate.max(cost);
            let overhead = ProcessOverhead {
                ratio: if cpu > 0.0 { cost / cpu } else { 0.0 },
                ns_per_second: cost,
                level: state.level,
            };
            (*pid, overhead)
        })
    }

    /// What they cost in all, as a share of all CPUs.
    pub fn node_ratio(&self) -> f64 {
        let cost: f64 = self.processes.values().map(State::cost_rate).sum();
        cost / (f64::from(self.cpu_count.max(1)) * 1e9)
    }

    /// Takes samples of the processes that are due; answers with what is to change.
    pub fn tick(&mut self, now_ns: u64, samples: &[Sample]) -> Vec<Change> {
        let mut changes = Vec::new();
        for sample in samples {
            if let Some(change) = self.look(now_ns, *sample) {
                changes.push(change);
            }
        }
        if self.config.enabled {
            self.detach_shared_probes(now_ns, &mut changes);
            self.hold_node_budget(now_ns, &mut changes);
        }
        changes
    }

    fn look(&mut self, now_ns: u64, sample: Sample) -> Option<Change> {
        let interval_ns = self.config.interval_ms * 1_000_000;
        let Some(state) = self.processes.get_mut(&sample.pid) else {
            self.processes
                .insert(sample.pid, State::first(sample, now_ns, interval_ns));
            return None;
        };
        let from = state.level;
        state.measure(&self.costs, sample, now_ns);
        // What probes of paused kinds cost that stay attached for other processes can neither be saved by pausing more, nor be a
        // reason to leave the others paused.
        let (cost, allowed) = (state.cost_rate_at(from), state.allowed(&self.config));
        if self.config.enabled && cost > allowed {
            // What is left must fit, and must be less than now; where nothing is left to pause, it is as it is.
            let to = Level::ALL.into_iter().find(|level| {
                *level > from
                    && state.cost_rate_at(*level) < state.cost_rate_at(from)
                    && state.cost_rate_at(*level) <= allowed
            });
            if let Some(to) = to {
                state.pause(to, now_ns, &self.config);
            }
        } else if from != Level::Full {
            let has_gone_well = state.trial.is_some_and(|looks| looks >= TRIAL_LOOKS) && cost <= allowed * CALM_SHARE;
            let is_time = has_gone_well || (state.trial.is_none() && now_ns >= state.resume_ns);
            if !self.config.enabled || (is_time && state.foreseen(from.recovered(), &self.costs) <= allowed) {
                state.level = if self.config.enabled {
                    from.recovered()
                } else {
                    Level::Full
                };
                state.trial = Some(0);
                // What there was before says nothing about what there will be.
                state.is_smoothed = false;
            }
        } else if state.trial.is_some_and(|looks| looks >= TRIAL_LOOKS) && cost <= allowed * CALM_SHARE {
            state.trial = None;
            state.calm_since_ns = now_ns;
        }
        if let Some(looks) = &mut state.trial {
            *looks += 1;
        }
        state.next_ns = match state.trial {
            Some(_) => now_ns + interval_ns / 10,
            // Those paused at once come back each at its own time.
            None if state.level != Level::Full && state.resume_ns > now_ns => state.resume_ns.min(now_ns + interval_ns),
            None => now_ns + interval_ns,
        };
        (state.level != from).then_some(Change {
            pid: sample.pid,
            from,
            to: state.level,
        })
    }

    /// Most that probes in all processes may cost, nanoseconds per second.
    fn node_budget(&self) -> f64 {
        f64::from(self.cpu_count.max(1)) * 1e9 * self.config.node_budget_percent / 100.0
    }

    /// Where what is paused in some processes of a file costs them more than they may pay, since it is attached for others, it is paused in those
    /// too: only what no process wants is detached. So one process cannot have another one pay for it without end, nor use up what the node may.
    fn detach_shared_probes(&mut self, now_ns: u64, changes: &mut Vec<Change>) {
        let budget = self.node_budget();
        let is_used_up = self.processes.values().map(State::cost_rate).sum::<f64>() > budget;
        let mut files: BTreeMap<FileId, Muted> = BTreeMap::new();
        for state in self.processes.values() {
            if let Some(file) = state.last.file
                && state.muted_rate() > 0.0
            {
                files.entry(file).or_default().add(state, &self.config);
            }
        }
        files.retain(|_, muted| muted.rate > muted.allowed || (is_used_up && muted.rate > budget * MUTED_SHARE));
        if files.is_empty() {
            return;
        }
        for (pid, state) in &mut self.processes {
            let Some(muted) = state.last.file.and_then(|file| files.get(&file)) else {
                continue;
            };
            if state.level >= muted.level {
                state.forget_muted();
            } else if !changes.iter().any(|change| change.pid == *pid) {
                let from = state.level;
                state.pause(muted.level, now_ns, &self.config);
                changes.push(Change {
                    pid: *pid,
                    from,
                    to: muted.level,
                });
            }
        }
    }

    /// Pauses where probes cost most, until all together cost what they may.
    fn hold_node_budget(&mut self, now_ns: u64, changes: &mut Vec<Change>) {
        let allowed = self.node_budget();
        // A pause saves nothing of what muted probes cost: that is what `detach_shared_probes` is for.
        let recorded = |state: &State| state.cost_rate_at(state.level);
        let mut cost: f64 = self.processes.values().map(recorded).sum();
        let is_changed = |pid: u32| changes.iter().any(|change| change.pid == pid);
        let processes = self.processes.iter().filter(|(pid, _)| !is_changed(**pid));
        let mut order: Vec<_> = processes.map(|(pid, state)| (recorded(state), *pid)).collect();
        order.sort_unstable_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
        for (_, pid) in order {
            if cost <= allowed {
                return;
            }
            let Some(state) = self.processes.get_mut(&pid) else {
                continue;
            };
            let from = state.level;
            let now = state.cost_rate_at(from);
            let to = Level::ALL
                .into_iter()
                .find(|level| *level > from && state.cost_rate_at(*level) < now);
            if let Some(to) = to {
                cost -= now - state.cost_rate_at(to);
                state.pause(to, now_ns, &self.config);
                changes.push(Change { pid, from, to });
            }
        }
    }
}

/// Probes in one file that are paused in some processes and attached for others.
#[derive(Clone, Copy, Debug, Default)]
struct Muted {
    /// What they cost the processes in which they are paused, nanoseconds per second.
    rate: f64,
    /// What those may pay.
    allowed: f64,
    /// Of the process that pays most.
    level: Level,
    most: f64,
}

impl Muted {
    fn add(&mut self, state: &State, config: &GovernorConfig) {
        let rate = state.muted_rate();
        self.rate += rate;
        self.allowed += state.allowed(config);
        if rate > self.most {
            (self.most, self.level) = (rate, state.level);
        }
    }
}

impl State {
    fn first(sample: Sample, now_ns: u64, interval_ns: u64) -> Self {
        Self {
            level: Level::Full,
            last: sample,
            last_ns: now_ns,
            // The sooner a process that is too busy is noticed, the better.
            next_ns: now_ns + interval_ns / 10,
            cost_rates: [0.0; HIT_KINDS],
            cpu_rate: 0.0,
            is_smoothed: false,
            backoff_ns: 0,
            resume_ns: 0,
            trial: None,
            pause_count: 0,
            calm_since_ns: now_ns,
        }
    }

    fn measure(&mut self, costs: &ProbeCosts, sample: Sample, now_ns: u64) {
        let seconds = now_ns.saturating_sub(self.last_ns) as f64 / 1e9;
        if seconds <= 0.0 {
            return;
        }
        let share = if self.is_smoothed { NEWEST_SHARE } else { 1.0 };
        let costs = costs.at(self.level, sample.stepped_share);
        for (kind, rate) in self.cost_rates.iter_mut().enumerate() {
            let hits = sample.hits[kind].saturating_sub(self.last.hits[kind]) as f64;
            *rate += share * (hits * costs[kind] / seconds - *rate);
        }
        let cpu = sample.cpu_ns.saturating_sub(self.last.cpu_ns) as f64;
        self.cpu_rate += share * (cpu / seconds - self.cpu_rate);
        self.is_smoothed = true;
        self.last = sample;
        self.last_ns = now_ns;
    }
}

/// Something below `limit` that differs between processes and times, so that those paused together are not resumed together.
fn jitter(pid: u32, count: u32, limit: u64) -> u64 {
    let mixed = (u64::from(pid) << 32 | u64::from(count)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    if limit == 0 { 0 } else { (mixed >> 16) % limit }
}
