//! What the kernel counts by itself: read, named while that is still possible, and handed out as what is new since the last
//! time.
//!
//! Rows are keyed by addresses and by the epoch of the code that lies there. A row is named by what was known of that epoch:
//! those of code that is about to be replaced before the new code is looked at, those of code that nobody has looked at yet
//! not before that. Rows are taken out only when nothing can be added to them any more.

use std::{collections::HashMap, sync::Arc};

use wasmscope_common::{
    AggregateKey, AggregateStats, BUCKET_COUNT, CALL_UNFINISHED, COMPONENT_CALL, DETAIL_OTHER, ENDED_BY_FAILED_CALL,
    ENDED_IN_CALL, ENDED_UNSEEN, ENDED_UNSURE, KIND_HOST_CALL, KIND_INVOCATION, KIND_SYSCALL, OpenActivation,
};

use super::Pipeline;
use crate::{
    errno,
    process::describe,
    span::{Function, Import, Process},
    syscalls,
};

/// Collections for which a row waits for its name before it is handed out without.
const MAX_HELD: u32 = 3;
/// Collections after which a row of code that is gone is taken out if nothing was added.
const QUIET_COLLECTIONS: u32 = 2;
/// Collections from one look for what is open in processes that nobody watches to the next.
const SWEEP_COLLECTIONS: u32 = 60;
/// What a row counts in at most so many ways.
const CLASSES: usize = 3;

/// What is new in one row since it was handed out last.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AggregateRow {
    /// The process; `None` for what the kernel's table had no room for.
    pub process: Option<Arc<Process>>,
    /// What was counted.
    pub counted: Counted,
    /// How many, by outcome: the words of [`crate::span::Outcome`], of a syscall that failed the name of the errno.
    pub outcomes: Vec<(String, u64)>,
    /// Their durations, of those whose begin and end were seen.
    pub times: Times,
    /// Bytes moved, of syscalls that do.
    pub bytes: u64,
}

/// What a row counts.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Counted {
    /// Invocations of an export.
    Invocations {
        /// The export, if it could be named.
        export: Option<Arc<Function>>,
    },
    /// Calls of a host function.
    HostCalls {
        /// The guest function that calls.
        caller: Option<Arc<Function>>,
        /// The import, if it could be named.
        import: Option<Arc<Import>>,
    },
    /// Syscalls of one kind below an export.
    Syscalls {
        /// The export, if it could be named.
        export: Option<Arc<Function>>,
        /// Name of the syscall.
        syscall: String,
    },
}

/// Durations, by the buckets of [`wasmscope_common::bucket_of`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Times {
    /// Nanoseconds in all.
    pub total_ns: u64,
    /// By bucket, all [`BUCKET_COUNT`] of them.
    pub buckets: Vec<u64>,
}

impl Default for Times {
    fn default() -> Self {
        Self {
            total_ns: 0,
            buckets: vec![0; BUCKET_COUNT],
        }
    }
}

impl Times {
    /// Adds others.
    pub fn add(&mut self, more: &Self) {
        self.total_ns += more.total_ns;
        for (total, more) in self.buckets.iter_mut().zip(&more.buckets) {
            *total += more;
        }
    }

    /// How many durations there are.
    pub fn count(&self) -> u64 {
        self.buckets.iter().sum()
    }

    fn between(before: &AggregateStats, after: &AggregateStats) -> Self {
        let buckets = before.buckets.iter().zip(after.buckets);
        Self {
            total_ns: after.total_ns.wrapping_sub(before.total_ns),
            buckets: buckets
                .map(|(before, after)| u64::from(after.wrapping_sub(*before)))
                .collect(),
        }
    }
}

/// What is remembered between collections.
#[derive(Default)]
pub(super) struct Collected {
    rows: HashMap<AggregateKey, RowState>,
    /// Epoch of the code that has been looked at, by process.
    epochs: HashMap<u32, u32>,
    other: HashMap<u32, AggregateStats>,
    /// To be handed out: of processes that are gone.
    pending: Vec<AggregateRow>,
    /// Which rows there are, since all records that are being handled were made.
    keys: Option<HashMap<u32, Vec<AggregateKey>>>,
    /// Collections since what is open in processes that nobody watches was looked for.
    unswept: u32,
}

struct RowState {
    name: Option<Counted>,
    /// The import that ended the invocations is the one by which programs exit.
    is_exit: bool,
    handed_out: AggregateStats,
    /// How many of each class were handed out, whatever they were called.
    classes: [u64; CLASSES],
    held: u32,
    quiet: u32,
}

impl Default for RowState {
    fn default() -> Self {
        Self {
            name: None,
            is_exit: false,
            handed_out: AggregateStats::EMPTY,
            classes: [0; CLASSES],
            held: 0,
            quiet: 0,
        }
    }
}

impl RowState {
    /// How many of each class are new, given how many there are by now of each and in all. What was handed out once is not
    /// handed out again, even if it has changed its class since: then another one, later, makes up for it.
    fn hand_out(&mut self, counts: [u64; CLASSES], total: u64) -> [u64; CLASSES] {
        let mut left = total.saturating_sub(self.classes.iter().sum());
        let mut new = [0; CLASSES];
        for ((new, count), handed_out) in new.iter_mut().zip(counts).zip(&mut self.classes) {
            *new = count.saturating_sub(*handed_out).min(left);
            *handed_out += *new;
            left -= *new;
        }
        new
    }
}

impl Pipeline {
    /// What the kernel has counted since the last call, processes that ended in the meantime included.
    pub fn collect_aggregates(&mut self) -> Vec<AggregateRow> {
        self.forget_keys();
        self.place_movers();
        let mut strangers: HashMap<u32, bool> = HashMap::new();
        for (key, stats) in self.kernel.aggregates.rows() {
            if !self.is_finishing && !self.processes.contains_key(&key.pid) {
                let is_gone = strangers.entry(key.pid);
                if *is_gone.or_insert_with(|| self.kernel.config(key.pid).is_none() || !describe::is_alive(key.pid)) {
                    self.abandon_row(key, &stats);
                    continue;
                }
            }
            self.collect_row(key, &stats, self.is_finishing);
        }
        for (pid, _) in strangers.into_iter().filter(|(_, is_gone)| *is_gone) {
            self.kernel.unwatch(pid);
            self.collected.forget(pid);
            self.kernel.aggregates.forget(pid);
        }
        self.sweep();
        if self.is_finishing {
            let pids: Vec<_> = self.processes.keys().copied().collect();
            for pid in pids {
                self.collect_open(pid, None);
            }
        }
        for kind in [KIND_INVOCATION, KIND_HOST_CALL, KIND_SYSCALL] {
            let now = self.kernel.aggregates.other(kind);
            let before = self.collected.other.insert(kind, now).unwrap_or(AggregateStats::EMPTY);
            if now.count > before.count {
                let outcomes = vec![("other".to_owned(), now.count - before.count)];
                self.collected.pending.push(AggregateRow {
                    process: None,
                    counted: other(kind),
                    outcomes,
                    times: Times::between(&before, &now),
                    bytes: now.bytes - before.bytes,
                });
            }
        }
        std::mem::take(&mut self.collected.pending)
    }

    /// Names the rows of code that is about to be replaced, by code which begins with this epoch.
    pub(super) fn name_before(&mut self, pid: u32, epoch: u32) {
        let known = self.collected.epochs.get(&pid);
        if !self.processes.contains_key(&pid) || known.is_some_and(|known| epoch <= *known) {
            return;
        }
        for key in self.keys_of(pid) {
            if key.epoch >= epoch || known_name(&self.collected, &key) {
                continue;
            }
            let (counted, is_named, is_exit) = self.name_row(&key);
            let state = self.collected.rows.entry(key).or_default();
            if is_named {
                state.name = Some(counted);
                state.is_exit = is_exit;
            } else {
                // The new code does not name it.
                state.held = state.held.max(1);
            }
        }
    }

    /// The rows of a process. The kernel has no table by process: all of it is read at most once for what is handled
    /// together, as what is to be named was there before it was drained.
    fn keys_of(&mut self, pid: u32) -> Vec<AggregateKey> {
        if !self.options.detail.has_aggregates() {
            return Vec::new();
        }
        let keys = self.collected.keys.get_or_insert_with(|| {
            let mut keys: HashMap<u32, Vec<AggregateKey>> = HashMap::new();
            for key in self.kernel.aggregates.keys() {
                keys.entry(key.pid).or_default().push(key);
            }
            keys
        });
        keys.get(&pid).cloned().unwrap_or_default()
    }

    /// There may be more rows by now.
    pub(super) fn forget_keys(&mut self) {
        self.collected.keys = None;
    }

    /// The code of this epoch has been looked at.
    pub(super) fn epoch_begins(&mut self, pid: u32, epoch: u32) {
        if self.processes.contains_key(&pid) {
            let known = self.collected.epochs.entry(pid).or_default();
            *known = epoch.max(*known);
        }
    }

    /// Hands out the rows of a process that has ended or was never taken on, and takes them out of the kernel's tables.
    /// If it has replaced its image, `next` is the epoch of the new one's code and the time since when it runs: what is of that
    /// stays.
    pub(super) fn collect_aggregate(&mut self, pid: u32, next: Option<(u32, u64)>) {
        let is_known = self.processes.contains_key(&pid);
        // More than there were at the time of the last records.
        self.forget_keys();
        for key in self.keys_of(pid) {
            if next.is_some_and(|(next, _)| key.epoch >= next && key.detail != DETAIL_OTHER) {
                continue;
            }
            let Some(stats) = self.kernel.aggregates.row(&key) else {
                continue;
            };
            if is_known && next.is_some() && key.detail == DETAIL_OTHER {
                // The new image may be counting in it already: what is new from now on is the new one's.
                self.collect_row(key, &stats, true);
            } else if is_known {
                self.collect_row(key, &stats, true);
                self.kernel.aggregates.remove(&key);
                self.collected.rows.remove(&key);
            } else {
                self.abandon_row(key, &stats);
            }
        }
        let replaced_ns = next.map(|(_, at_ns)| at_ns);
        if is_known {
            self.collect_open(pid, replaced_ns);
        } else {
            let count = self.kernel.aggregates.take_open(pid, replaced_ns).len();
            self.lose_many("aggregate", "process_unknown", count as u64);
        }
        if let Some((next, _)) = next {
            self.epoch_begins(pid, next);
        } else {
            self.collected.forget(pid);
            self.kernel.aggregates.forget(pid);
        }
    }

    /// Takes out a row of a process of which nothing is known: it is counted as nobody's.
    fn abandon_row(&mut self, key: AggregateKey, stats: &AggregateStats) {
        let before = self.collected.rows.get(&key).map_or(0, |state| state.handed_out.count);
        self.lose_many("aggregate", "process_unknown", stats.count.saturating_sub(before));
        self.collect_row(key, stats, true);
        self.kernel.aggregates.remove(&key);
        self.collected.rows.remove(&key);
    }

    /// Takes out, now and then, what is open in processes that nobody watches.
    fn sweep(&mut self) {
        self.collected.unswept += 1;
        if self.collected.unswept < SWEEP_COLLECTIONS || !self.options.detail.has_aggregates() {
            return;
        }
        self.collected.unswept = 0;
        let (processes, kernel) = (&self.processes, &mut self.kernel);
        let watched = kernel.watched_pids();
        let is_nobodys = |pid| !processes.contains_key(&pid) && !watched.contains(&pid);
        let count = kernel.aggregates.take_open_of(is_nobodys).len();
        self.lose_many("aggregate", "process_unknown", count as u64);
    }

    /// Counts what is open in a process that has ended, that is not watched any more, or of which probes are paused; or what
    /// was open in it when it replaced its image.
    pub(super) fn collect_open(&mut self, pid: u32, replaced_ns: Option<u64>) {
        let follows = self
            .processes
            .get(&pid)
            .is_some_and(|watched| watched.coverage.activations);
        for open in self.kernel.aggregates.take_open(pid, replaced_ns) {
            if !follows {
                // Without the probe that says when they end, what is there may be over.
                continue;
            }
            let epoch = self.collected.epochs.get(&pid).copied().unwrap_or(0);
            let key = AggregateKey {
                pid,
                epoch,
                kind: KIND_INVOCATION,
                entry_handler: open.entry_handler,
                ..AggregateKey::default()
            };
            self.push_unfinished(&key);
            if open.call_start_ns != 0 {
                self.push_unfinished(&call_key(pid, epoch, &open));
            }
        }
    }

    fn push_unfinished(&mut self, key: &AggregateKey) {
        let (counted, _, _) = self.name_row(key);
        self.push_row(
            key.pid,
            counted,
            vec![("unfinished".to_owned(), 1)],
            Times::default(),
            0,
        );
    }

    fn push_row(&mut self, pid: u32, counted: Counted, outcomes: Vec<(String, u64)>, times: Times, bytes: u64) {
        let watched = self.processes.get(&pid);
        let process = watched.map(|watched| Arc::new(self.process_of(pid, watched)));
        self.collected.pending.push(AggregateRow {
            process,
            counted,
            outcomes,
            times,
            bytes,
        });
    }

    fn collect_row(&mut self, key: AggregateKey, stats: &AggregateStats, is_last: bool) {
        let epoch = self.collected.epochs.get(&key.pid).copied().unwrap_or(0);
        let mut state = self.collected.rows.remove(&key).unwrap_or_default();
        let is_gone = key.epoch < epoch && key.detail != DETAIL_OTHER;
        if state.handed_out == *stats {
            state.quiet += 1;
            if is_gone && state.quiet > QUIET_COLLECTIONS {
                self.kernel.aggregates.remove(&key);
                return;
            }
            self.collected.rows.insert(key, state);
            return;
        }
        state.quiet = 0;
        let is_other = key.detail == DETAIL_OTHER;
        if key.epoch > epoch && !is_last {
            // Nobody has looked at that code yet.
            self.collected.rows.insert(key, state);
            return;
        }
        let (counted, is_named) = match &state.name {
            Some(name) => (name.clone(), true),
            None if is_other => (other(key.kind), true),
            None if is_gone && state.held > 0 => (unnamed(&key), false),
            None => {
                let (counted, is_named, is_exit) = self.name_row(&key);
                state.is_exit = is_exit;
                if is_named {
                    state.name = Some(counted.clone());
                }
                (counted, is_named)
            }
        };
        if !is_named && !is_last && !is_gone && state.held < MAX_HELD {
            state.held += 1;
            self.collected.rows.insert(key, state);
            return;
        }
        let tells_failures = self
            .processes
            .get(&key.pid)
            .is_some_and(|watched| watched.coverage.unwinds);
        let new = state.hand_out(classes(&key, stats, tells_failures), stats.count);
        let words = words(&key, state.is_exit, tells_failures);
        let new = words.into_iter().zip(new).filter(|(_, count)| *count > 0).collect();
        let times = Times::between(&state.handed_out, stats);
        let bytes = stats.bytes - state.handed_out.bytes;
        state.handed_out = *stats;
        self.collected.rows.insert(key, state);
        self.push_row(key.pid, counted, new, times, bytes);
    }

    /// What a row counts, whether all of that could be named, and whether its host call is how programs exit.
    fn name_row(&mut self, key: &AggregateKey) -> (Counted, bool, bool) {
        let Some(watched) = self.processes.get_mut(&key.pid) else {
            return (unnamed(key), false, false);
        };
        let import = if key.callee == 0 {
            None
        } else if key.detail & u32::from(COMPONENT_CALL) != 0 {
            watched.guests.trampoline_import(key.callee)
        } else {
            watched.guests.import(key.call_site, key.callee)
        };
        let function = match key.kind {
            KIND_HOST_CALL => key.call_site,
            _ => key.entry_handler,
        };
        let function = if function == 0 {
            None
        } else {
            watched.guests.function(function)
        };
        let is_exit = import.as_ref().is_some_and(|import| import.is_exit());
        match key.kind {
            KIND_HOST_CALL => {
                let is_named = import.is_some();
                let counted = Counted::HostCalls {
                    caller: function,
                    import,
                };
                (counted, is_named, false)
            }
            KIND_SYSCALL => {
                let is_named = function.is_some();
                let counted = Counted::Syscalls {
                    export: function,
                    syscall: syscalls::name(u64::from(key.detail)),
                };
                (counted, is_named, false)
            }
            _ => {
                let is_named = function.is_some() && (key.callee == 0 || import.is_some());
                (Counted::Invocations { export: function }, is_named, is_exit)
            }
        }
    }
}

fn call_key(pid: u32, epoch: u32, open: &OpenActivation) -> AggregateKey {
    AggregateKey {
        pid,
        epoch,
        kind: KIND_HOST_CALL,
        detail: open.call_detail,
        entry_handler: 0,
        call_site: open.call_site,
        callee: open.callee,
    }
}

fn unnamed(key: &AggregateKey) -> Counted {
    match key.kind {
        KIND_HOST_CALL => Counted::HostCalls {
            caller: None,
            import: None,
        },
        KIND_SYSCALL => Counted::Syscalls {
            export: None,
            syscall: syscalls::name(u64::from(key.detail)),
        },
        _ => Counted::Invocations { export: None },
    }
}

fn other(kind: u32) -> Counted {
    match kind {
        KIND_HOST_CALL => Counted::HostCalls {
            caller: None,
            import: None,
        },
        KIND_SYSCALL => Counted::Syscalls {
            export: None,
            syscall: "other".to_owned(),
        },
        _ => Counted::Invocations { export: None },
    }
}

fn known_name(collected: &Collected, key: &AggregateKey) -> bool {
    let state = collected.rows.get(key);
    key.detail == DETAIL_OTHER || state.is_some_and(|state| state.name.is_some())
}

impl Collected {
    /// Forgets a process that is gone.
    fn forget(&mut self, pid: u32) {
        self.epochs.remove(&pid);
        self.rows.retain(|key, _| key.pid != pid);
    }
}

/// How many of a row are of which class, since the row was made. What they are called may change, see [`words`].
/// `tells_failures`: what unwinds its caller is marked; a host call may also have failed with an exception that the guest has caught.
fn classes(key: &AggregateKey, stats: &AggregateStats, tells_failures: bool) -> [u64; CLASSES] {
    let rest = stats.count.saturating_sub(stats.failed).saturating_sub(stats.marked);
    match key.kind {
        _ if key.detail == DETAIL_OTHER => [stats.count, 0, 0],
        KIND_INVOCATION => match key.detail & !u32::from(COMPONENT_CALL) {
            ENDED_UNSEEN => [stats.count, 0, 0],
            ENDED_BY_FAILED_CALL if !tells_failures => [stats.count, 0, 0],
            ENDED_BY_FAILED_CALL | ENDED_IN_CALL => [stats.marked, 0, rest],
            ENDED_UNSURE => [stats.failed, stats.marked, rest],
            _ => [stats.failed + stats.marked, 0, rest],
        },
        KIND_HOST_CALL if key.detail & CALL_UNFINISHED != 0 => [stats.count, 0, 0],
        KIND_HOST_CALL => [stats.failed, stats.marked, rest],
        _ if key.call_site == 0 => [stats.marked, 0, rest],
        _ => [stats.count, 0, 0],
    }
}

/// What the classes of a row are called, as far as that is known now.
fn words(key: &AggregateKey, is_exit: bool, tells_failures: bool) -> [String; CLASSES] {
    let by_host = if is_exit { "exit" } else { "host_error" };
    let fine = if tells_failures { "ok" } else { "unknown" };
    let errno_name;
    let words = match key.kind {
        _ if key.detail == DETAIL_OTHER => ["other", "", ""],
        KIND_INVOCATION => match key.detail & !u32::from(COMPONENT_CALL) {
            ENDED_BY_FAILED_CALL | ENDED_IN_CALL => [by_host, "", fine],
            ENDED_UNSEEN => ["unfinished", "", ""],
            ENDED_UNSURE => ["trap", "unknown", fine],
            _ => ["trap", "", fine],
        },
        KIND_HOST_CALL if key.detail & CALL_UNFINISHED != 0 => ["unfinished", "", ""],
        KIND_HOST_CALL => ["host_error", "unknown", "ok"],
        _ if key.call_site == 0 => ["unfinished", "", "ok"],
        _ => {
            errno_name = errno::name(u16::try_from(key.call_site).unwrap_or(0));
            [errno_name.as_ref(), "", ""]
        }
    };
    words.map(str::to_owned)
}

#[cfg(test)]
mod tests;
