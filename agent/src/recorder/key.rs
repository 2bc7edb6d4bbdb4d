//! What is kept of one (pod or process, module, export): which traces are wanted, and which goes first when memory is short.

use std::sync::Arc;

use crate::span::{Function, Outcome, Process, TraceId};

use super::random::Random;

/// Parts of the window. What is kept of a part is kept until all of it has passed, so that the slowest of a part stays the
/// slowest of it.
pub(super) const INTERVALS: u64 = 8;
/// Stands for what maps, sets and allocations take beside the bytes in them.
const ALLOCATION_BYTES: usize = 64;

/// Why a trace was wanted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Wanted {
    pub(super) slowest: bool,
    pub(super) failed: bool,
    pub(super) random: bool,
}

impl Wanted {
    pub(super) fn is_any(self) -> bool {
        self.slowest || self.failed || self.random
    }
}

/// One kept trace.
#[derive(Debug)]
pub(super) struct Entry {
    pub(super) id: TraceId,
    /// The application's trace that it is part of.
    pub(super) application_id: Option<TraceId>,
    /// When it was kept.
    pub(super) at_ns: u64,
    /// How many traces had been offered by then.
    pub(super) offered_count: u64,
    pub(super) start_ns: u64,
    pub(super) duration_ns: u64,
    pub(super) outcome: Outcome,
    pub(super) span_count: u64,
    pub(super) event_count: u64,
    pub(super) loss_count: u64,
    pub(super) process: Arc<Process>,
    pub(super) wanted: Wanted,
    pub(super) compact: Arc<[u8]>,
    /// Part of the window that `at_ns` is in.
    interval: u64,
}

/// What decides whether a trace is wanted; known without serialising it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Facts<'a> {
    pub(super) at_ns: u64,
    pub(super) duration_ns: u64,
    pub(super) outcome: &'a Outcome,
}

/// How many of each are kept, and for how long.
#[derive(Clone, Copy, Debug)]
pub(super) struct Quota {
    pub(super) slowest: usize,
    pub(super) failed: usize,
    pub(super) random: usize,
    pub(super) window_ns: u64,
}

impl Quota {
    pub(super) fn interval(&self, at_ns: u64) -> u64 {
        at_ns / (self.window_ns / INTERVALS).max(1)
    }

    /// Each random one is of a stretch of its own.
    fn stretch(&self, at_ns: u64) -> u64 {
        at_ns / (self.window_ns / self.random.max(1) as u64).max(1)
    }

    fn is_over(&self, entry: &Entry, now_ns: u64) -> bool {
        entry.interval + INTERVALS < self.interval(now_ns)
    }
}

/// Everything about one (pod or process, module, export).
#[derive(Debug)]
pub(super) struct Key {
    pub(super) tenant: u128,
    /// The exported function; `None` where nothing showed it.
    pub(super) function: Option<Arc<Function>>,
    pub(super) entries: Vec<Entry>,
    /// Part of the window that the next three are about.
    interval: u64,
    /// How many of the slowest this part may have; fewer once memory was short.
    slowest_quota: usize,
    failed_quota: usize,
    failed_count: u64,
    /// A trace must take longer to be of the slowest of this part; `None` while there is room.
    floor_ns: Option<u64>,
    stretch: u64,
    stretch_count: u64,
    /// Processes that entries are of, one for all that are equal.
    processes: Vec<Arc<Process>>,
}

impl Key {
    pub(super) fn new(tenant: u128, function: Option<Arc<Function>>) -> Self {
        Self {
            tenant,
            function,
            entries: Vec::new(),
            interval: 0,
            slowest_quota: 0,
            failed_quota: 0,
            failed_count: 0,
            floor_ns: None,
            stretch: u64::MAX,
            stretch_count: 0,
            processes: Vec::new(),
        }
    }

    /// Bytes that it takes, whatever is in it included.
    pub(super) fn bytes(&self) -> usize {
        let names = self.function.as_ref().map_or(0, |function| {
            size_of::<Function>() + function.name.len() + function.module.name.len() + 2 * ALLOCATION_BYTES
        });
        let processes: usize = self.processes.iter().map(|process| process_bytes(process)).sum();
        let spare = (self.entries.capacity() - self.entries.len()) * size_of::<Entry>();
        let entries: usize = self.entries.iter().map(entry_bytes).sum();
        size_of::<Self>() + 3 * ALLOCATION_BYTES + names + processes + spare + entries
    }

    /// Begins the parts of the window that `at_ns` is in, unless it is in those begun last.
    fn turn(&mut self, at_ns: u64, quota: &Quota) {
        let interval = quota.interval(at_ns);
        if interval != self.interval {
            self.interval = interval;
            self.slowest_quota = quota.slowest;
            self.failed_quota = quota.failed;
            self.failed_count = 0;
            self.set_floor();
        }
        let stretch = quota.stretch(at_ns);
        if stretch != self.stretch {
            self.stretch = stretch;
            self.stretch_count = 0;
        }
    }

    /// Whether a trace is wanted, and that it was offered.
    pub(super) fn offer(&mut self, facts: Facts<'_>, quota: &Quota, random: &mut Random) -> Wanted {
        self.turn(facts.at_ns, quota);
        let slowest = self.slowest_quota > 0 && self.floor_ns.is_none_or(|floor_ns| facts.duration_ns > floor_ns);
        let failed = facts.outcome.is_failure() && self.wants_failed(facts.outcome, random);
        self.stretch_count += 1;
        let random = quota.random > 0 && random.below(self.stretch_count) == 0;
        Wanted {
            slowest,
            failed,
            random,
        }
    }

    /// All until there are enough of this part, then each with the same chance; one that fails as none of them does, always.
    fn wants_failed(&mut self, outcome: &Outcome, random: &mut Random) -> bool {
        self.failed_count += 1;
        if self.failed_quota == 0 {
            return false;
        }
        let quota = self.failed_quota as u64;
        if self.failed_count <= quota || random.below(self.failed_count) < quota {
            return true;
        }
        let mut failed = self.entries.iter().filter(|entry| entry.wanted.failed);
        !failed.any(|entry| entry.interval == self.interval && entry.outcome == *outcome)
    }

    /// Adds a trace and gives up what it displaces; the rest is for the budget to decide.
    pub(super) fn insert(&mut self, mut entry: Entry, quota: &Quota) -> Vec<Entry> {
        entry.interval = quota.interval(entry.at_ns);
        entry.process = self.shared(&entry.process);
        let wanted = entry.wanted;
        if wanted.random {
            let stretch = quota.stretch(entry.at_ns);
            for other in &mut self.entries {
                if quota.stretch(other.at_ns) == stretch {
                    other.wanted.random = false;
                }
            }
        }
        self.entries.push(entry);
        if wanted.slowest {
            self.drop_dominated(quota);
        }
        if wanted.failed {
            self.drop_failed(quota);
        }
        let displaced = self.take(|entry| !entry.wanted.is_any());
        self.set_floor();
        displaced
    }

    /// A trace that as many others outlast in time as in duration will never be among the slowest again.
    fn drop_dominated(&mut self, quota: &Quota) {
        let mut slowest: Vec<(u64, u64, usize)> = self
            .entries
            .iter()
            .enumerate()
            .filter(|(_, entry)| entry.wanted.slowest)
            .map(|(index, entry)| (entry.duration_ns, entry.interval, index))
            .collect();
        // The longest first, of equals the newest.
        slowest.sort_unstable_by(|a, b| b.cmp(a));
        for (rank, (_, interval, index)) in slowest.iter().enumerate() {
            let outlasting = slowest[..rank].iter().filter(|(_, other, _)| other >= interval).count();
            let most = if *interval == self.interval {
                self.slowest_quota
            } else {
                quota.slowest
            };
            if outlasting >= most {
                self.entries[*index].wanted.slowest = false;
            }
        }
    }

    /// Keeps the quota of failed ones: those of older parts go first, then of what fails most often the oldest.
    fn drop_failed(&mut self, quota: &Quota) {
        loop {
            let failed = || self.entries.iter().enumerate().filter(|(_, entry)| entry.wanted.failed);
            if failed().count() <= quota.failed {
                return;
            }
            let newest = self.entries.last().map(|entry| entry.id);
            let alike = |outcome: &Outcome| failed().filter(|(_, entry)| entry.outcome == *outcome).count();
            let victim = failed()
                .filter(|(_, entry)| Some(entry.id) != newest)
                .min_by_key(|(_, entry)| (entry.interval, std::cmp::Reverse(alike(&entry.outcome)), entry.at_ns))
                .map(|(index, _)| index);
            let Some(victim) = victim else { return };
            self.entries[victim].wanted.failed = false;
        }
    }

    /// Gives up the traces whose time has passed.
    pub(super) fn expire(&mut self, now_ns: u64, quota: &Quota) -> Vec<Entry> {
        let passed = self.take(|entry| quota.is_over(entry, now_ns));
        if !passed.is_empty() {
            self.set_floor();
        }
        passed
    }

    /// Gives up the trace that is worth least; this part of the window then keeps one less of its kind.
    pub(super) fn evict(&mut self) -> Option<Entry> {
        let top_ns = self.entries.iter().map(|entry| entry.duration_ns).max();
        let failed_count = self.entries.iter().filter(|entry| entry.wanted.failed).count();
        let worth = |entry: &Entry| {
            let is_top = entry.wanted.slowest && Some(entry.duration_ns) == top_ns;
            match entry.wanted {
                Wanted { failed: true, .. } => (2 + u64::from(failed_count == 1), entry.at_ns),
                Wanted { slowest: true, .. } if is_top => (4, entry.at_ns),
                Wanted { slowest: true, .. } => (1, entry.duration_ns),
                _ => (0, entry.at_ns),
            }
        };
        let (index, _) = self.entries.iter().enumerate().min_by_key(|(_, entry)| worth(entry))?;
        let entry = self.entries.swap_remove(index);
        if entry.interval == self.interval {
            self.slowest_quota -= usize::from(entry.wanted.slowest && self.slowest_quota > 0);
            self.failed_quota -= usize::from(entry.wanted.failed && self.failed_quota > 0);
        }
        self.tidy();
        self.set_floor();
        Some(entry)
    }

    /// After the quotas have changed.
    pub(super) fn reconfigure(&mut self, now_ns: u64, quota: &Quota) -> Vec<Entry> {
        for entry in &mut self.entries {
            entry.interval = quota.interval(entry.at_ns);
        }
        self.interval = u64::MAX;
        self.stretch = u64::MAX;
        self.turn(now_ns, quota);
        self.drop_dominated(quota);
        let mut failed: Vec<_> = self.entries.iter_mut().filter(|entry| entry.wanted.failed).collect();
        failed.sort_by_key(|entry| std::cmp::Reverse(entry.at_ns));
        failed
            .into_iter()
            .skip(quota.failed)
            .for_each(|entry| entry.wanted.failed = false);
        let mut random: Vec<_> = self.entries.iter_mut().filter(|entry| entry.wanted.random).collect();
        random.sort_by_key(|entry| std::cmp::Reverse(entry.at_ns));
        random
            .into_iter()
            .skip(quota.random)
            .for_each(|entry| entry.wanted.random = false);
        let displaced = self.take(|entry| !entry.wanted.is_any());
        self.set_floor();
        displaced
    }

    fn set_floor(&mut self) {
        let durations = self
            .entries
            .iter()
            .filter(|entry| entry.wanted.slowest && entry.interval == self.interval)
            .map(|entry| entry.duration_ns);
        let (count, least) = durations.fold((0, u64::MAX), |(count, least), ns| (count + 1, least.min(ns)));
        self.floor_ns = (count >= self.slowest_quota).then_some(least);
    }

    fn take(&mut self, is_taken: impl Fn(&Entry) -> bool) -> Vec<Entry> {
        let taken: Vec<Entry> = self.entries.extract_if(.., |entry| is_taken(entry)).collect();
        if !taken.is_empty() {
            self.tidy();
        }
        taken
    }

    fn tidy(&mut self) {
        let entries = &self.entries;
        self.processes
            .retain(|process| entries.iter().any(|entry| Arc::ptr_eq(&entry.process, process)));
        if self.entries.capacity() > 2 * self.entries.len().max(2) {
            self.entries.shrink_to_fit();
        }
    }

    fn shared(&mut self, process: &Arc<Process>) -> Arc<Process> {
        let same = |known: &&Arc<Process>| Arc::ptr_eq(known, process) || ***known == **process;
        if let Some(known) = self.processes.iter().find(same) {
            return known.clone();
        }
        self.processes.push(process.clone());
        process.clone()
    }
}

impl Entry {
    pub(super) fn new(
        trace: &crate::span::Trace,
        wanted: Wanted,
        at_ns: u64,
        offered_count: u64,
        compact: Arc<[u8]>,
    ) -> Self {
        Self {
            id: trace.id,
            application_id: super::query::application_id(trace),
            at_ns,
            offered_count,
            start_ns: trace.root.start_ns,
            duration_ns: trace.root.duration_ns(),
            outcome: trace.root.outcome.clone(),
            span_count: trace.root.walk().count() as u64,
            event_count: trace.event_count,
            loss_count: super::query::loss_count(trace),
            process: trace.process.clone(),
            wanted,
            compact,
            interval: 0,
        }
    }
}

fn entry_bytes(entry: &Entry) -> usize {
    // Itself, its bytes, and its place in the index of ids.
    size_of::<Entry>() + entry.compact.len() + size_of::<(TraceId, u128)>() + 2 * ALLOCATION_BYTES
}

fn process_bytes(process: &Process) -> usize {
    let place = &process.place;
    let words = [
        &place.container_id,
        &place.container_name,
        &place.pod_uid,
        &place.pod_name,
        &place.namespace,
        &place.runtime_class,
        &place.unit,
        &process.runtime_version,
    ];
    let words: usize = words.into_iter().flatten().map(String::len).sum();
    let labels: usize = place
        .labels
        .iter()
        .map(|(name, value)| name.len() + value.len() + ALLOCATION_BYTES)
        .sum();
    let limits: usize = process.limits.iter().map(|limit| limit.len() + ALLOCATION_BYTES).sum();
    size_of::<Process>() + process.command.len() + words + labels + limits + 4 * ALLOCATION_BYTES
}
