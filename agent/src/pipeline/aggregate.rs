//! What the kernel counts by itself: read, named while that is still possible, and handed out as what is new since the last
//! time.
//!
//! Rows are keyed by addresses and by the epoch of the code that lies there. A row is named by what was known of that epoch:
//! those of code that is about to be replaced before the new code is looked at, those of code that nobody has looked at yet
//! not before that. Rows are taken out only when nothing can be added to them any more.

use std::{collections::HashMap, sync::Arc};

use wasmscope_common::{
    AggregateKey, AggregateStats, BUCKET_COUNT, COMPONENT_CALL, ENDED_BY_FAILED_CALL, ENDED_IN_CALL, KIND_HOST_CALL,
    KIND_INVOCATION, KIND_SYSCALL, OpenActivation,
};

use super::Pipeline;
use crate::{
    errno,
    span::{Function, Import, Process},
    syscalls,
};

/// Collections for which a row waits for its name before it is handed out without.
const MAX_HELD: u32 = 3;
/// Collections after which a row of code that is gone is taken out if nothing was added.
const QUIET_COLLECTIONS: u32 = 2;

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
}

struct RowState {
    name: Option<Counted>,
    /// The import that ended the invocations is the one by which programs exit.
    is_exit: bool,
    handed_out: AggregateStats,
    outcomes: Vec<(String, u64)>,
    held: u32,
    quiet: u32,
}

impl Default for RowState {
    fn default() -> Self {
        Self {
            name: None,
            is_exit: false,
            handed_out: AggregateStats::EMPTY,
            outcomes: Vec::new(),
            held: 0,
            quiet: 0,
        }
    }
}

impl Pipeline {
    /// What the kernel has counted since the last call, processes that ended in the meantime included.
    pub fn collect_aggregates(&mut self) -> Vec<AggregateRow> {
        for (key, stats) in self.kernel.aggregates.rows() {
            self.collect_row(key, &stats, self.is_finishing);
        }
        if self.is_finishing {
            let pids: Vec<_> = self.processes.keys().copied().collect();
            for pid in pids {
                self.collect_open(pid);
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

    /// Names the rows of code that is about to be replaced, which begins with this epoch.
    pub(super) fn name_before(&mut self, pid: u32, epoch: u32) {
        if epoch <= self.collected.epochs.get(&pid).copied().unwrap_or(0) {
            return;
        }
        for (key, stats) in self.kernel.aggregates.rows() {
            if key.pid == pid && key.epoch < epoch {
                self.collect_row(key, &stats, false);
            }
        }
    }

    /// The code of this epoch has been looked at.
    pub(super) fn epoch_begins(&mut self, pid: u32, epoch: u32) {
        let known = self.collected.epochs.entry(pid).or_default();
        *known = epoch.max(*known);
    }

    /// Hands out the rows of a process that has ended, and takes them out of the kernel's tables. Those of a new image of it
    /// stay.
    pub(super) fn collect_aggregate(&mut self, pid: u32, next_epoch: Option<u32>) {
        if !self.processes.contains_key(&pid) {
            return;
        }
        for (key, stats) in self.kernel.aggregates.rows() {
            if key.pid == pid && next_epoch.is_none_or(|next| key.epoch < next) {
                self.collect_row(key, &stats, true);
                self.kernel.aggregates.remove(&key);
                self.collected.rows.remove(&key);
            }
        }
        self.collect_open(pid);
        match next_epoch {
            Some(next) => self.epoch_begins(pid, next),
            None => {
                self.collected.epochs.remove(&pid);
            }
        }
    }

    /// Counts what is open in a process that has ended, that is not watched any more, or of which probes are paused.
    pub(super) fn collect_open(&mut self, pid: u32) {
        let follows = self
            .processes
            .get(&pid)
            .is_some_and(|watched| watched.coverage.activations);
        for open in self.kernel.aggregates.take_open(pid) {
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
        let is_gone = key.epoch < epoch;
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
        if key.epoch > epoch && !is_last {
            // Nobody has looked at that code yet.
            self.collected.rows.insert(key, state);
            return;
        }
        let (counted, is_named) = match &state.name {
            Some(name) => (name.clone(), true),
            None if is_gone && !is_last && state.held > 0 => (unnamed(&key), false),
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
        let outcomes = outcomes(&key, stats, state.is_exit, tells_failures);
        let new: Vec<_> = outcomes
            .iter()
            .map(|(word, count)| {
                let before = state.outcomes.iter().find(|(known, _)| known == word);
                (
                    word.clone(),
                    count.saturating_sub(before.map_or(0, |(_, count)| *count)),
                )
            })
            .filter(|(_, count)| *count > 0)
            .collect();
        for (word, count) in &new {
            match state.outcomes.iter_mut().find(|(known, _)| known == word) {
                Some((_, total)) => *total += count,
                None => state.outcomes.push((word.clone(), *count)),
            }
        }
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
        let is_exit = import.as_ref().is_some_and(|import| import.name == "proc_exit");
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

/// How many of a row had which outcome, since the row was made.
fn outcomes(key: &AggregateKey, stats: &AggregateStats, is_exit: bool, tells_failures: bool) -> Vec<(String, u64)> {
    let rest = stats.count.saturating_sub(stats.failed).saturating_sub(stats.marked);
    let by_host = if is_exit { "exit" } else { "host_error" };
    let fine = if tells_failures { "ok" } else { "unknown" };
    let errno_name;
    let counts = match key.kind {
        KIND_INVOCATION => match key.detail & !u32::from(COMPONENT_CALL) {
            ENDED_BY_FAILED_CALL => vec![(by_host, stats.count)],
            ENDED_IN_CALL => vec![(by_host, stats.marked), (fine, rest)],
            _ => vec![("trap", stats.failed + stats.marked), (fine, rest)],
        },
        KIND_HOST_CALL => vec![("host_error", stats.failed), ("unknown", stats.marked), ("ok", rest)],
        _ if key.call_site == 0 => vec![("unfinished", stats.marked), ("ok", rest)],
        _ => {
            errno_name = errno::name(u16::try_from(key.call_site).unwrap_or(0));
            vec![(errno_name.as_ref(), stats.count)]
        }
    };
    let counts = counts.into_iter().filter(|(_, count)| *count > 0);
    counts.map(|(word, count)| (word.to_owned(), count)).collect()
}
