//! Whose a series is: it outlives the last of its processes by a while, and is then forgotten.

use std::collections::{BTreeSet, HashMap};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::span::Process;

/// A process: ids are used again, times of starting together with them are not.
pub(super) type ProcessKey = (u32, u64);

/// Processes that are remembered to have ended.
const MAX_ENDED: usize = 65_536;
/// How long they are: traces wait for the name of their pod for less, and one that comes late does not bring series back for good.
const ENDED_MEMORY: Duration = Duration::from_mins(10);
/// How long series are searched for a process that has ended: somebody may be adding to one while it ends.
const SEARCH: Duration = Duration::from_mins(1);

/// Who adds to a series.
#[derive(Clone, Copy, Debug)]
pub(super) enum Owner {
    /// The agent itself, or nobody that is known: what has no other owner does not expire.
    Agent,
    /// A process that runs.
    Running(ProcessKey),
    /// A process that ended, of which something was told only now.
    Ended(Instant),
}

/// The owners of a series.
#[derive(Debug, Default)]
pub(super) struct Owners {
    is_of_agent: bool,
    processes: BTreeSet<ProcessKey>,
    gone_since: Option<Instant>,
}

impl Owners {
    pub(super) fn add(&mut self, owner: &Owner) {
        match owner {
            Owner::Agent => self.is_of_agent = true,
            Owner::Running(process) => {
                self.processes.insert(*process);
            }
            Owner::Ended(now) => self.gone_since = Some(*now),
        }
    }

    /// Takes those out that have ended.
    pub(super) fn retain_running(&mut self, ended: &EndedProcesses, now: Instant) {
        let before = self.processes.len();
        self.processes.retain(|process| !ended.contains_key(process));
        if self.processes.len() < before {
            self.gone_since = Some(now);
        }
    }

    pub(super) fn are_gone_for(&self, expiry: Duration, now: Instant) -> bool {
        let is_over = |since: Instant| now.saturating_duration_since(since) >= expiry;
        !self.is_of_agent && self.processes.is_empty() && self.gone_since.is_some_and(is_over)
    }
}

/// Processes, with when it was told that they ended.
pub(super) type EndedProcesses = HashMap<ProcessKey, Instant>;

/// Which processes have ended.
#[derive(Debug, Default)]
pub(super) struct Ended(Mutex<EndedProcesses>);

impl Ended {
    /// What this process is to a series.
    pub(super) fn owner(&self, process: &Process) -> Owner {
        let key = (process.pid, process.start_ns);
        if self.known().contains_key(&key) {
            Owner::Ended(Instant::now())
        } else {
            Owner::Running(key)
        }
    }

    pub(super) fn add(&self, process: &Process, now: Instant) {
        self.known().insert((process.pid, process.start_ns), now);
    }

    /// It runs: another image in the same process.
    pub(super) fn remove(&self, process: &Process) {
        self.known().remove(&(process.pid, process.start_ns));
    }

    /// Forgets those of long ago. Those of which series may still say that they run.
    pub(super) fn recent(&self, now: Instant) -> EndedProcesses {
        let mut known = self.known();
        known.retain(|_, since| now.saturating_duration_since(*since) < ENDED_MEMORY);
        if known.len() > MAX_ENDED {
            let mut since: Vec<_> = known.values().copied().collect();
            let excess = since.len() - MAX_ENDED;
            let (_, oldest_kept, _) = since.select_nth_unstable(excess);
            let oldest_kept = *oldest_kept;
            known.retain(|_, since| *since >= oldest_kept);
        }
        let is_recent = |since: &Instant| now.saturating_duration_since(*since) < SEARCH;
        let recent = known.iter().filter(|(_, since)| is_recent(since));
        recent.map(|(process, since)| (*process, *since)).collect()
    }

    fn known(&self) -> MutexGuard<'_, EndedProcesses> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
