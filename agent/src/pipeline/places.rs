//! Where processes are that were forked: container runtimes and servers move a process into its cgroup after they have made
//! it, and one that shares its parent's code may never publish any.

use std::collections::VecDeque;

use super::Pipeline;
use crate::{clock, event::Event, place::cgroup, process::describe, span::Place};

/// How long after a fork its place is read again, nanoseconds.
const SETTLED_NS: u64 = 1_000_000_000;
/// Processes waited for at once; others keep the place that they were forked in.
const MAX_MOVERS: usize = 4096;

/// A process that may be moved yet.
#[derive(Debug)]
struct Mover {
    pid: u32,
    start_ns: u64,
    /// As it was told.
    place: Place,
    /// `CLOCK_MONOTONIC`, nanoseconds.
    due_ns: u64,
}

/// Those of the last moments, the oldest first.
#[derive(Debug, Default)]
pub(super) struct Movers(VecDeque<Mover>);

impl Movers {
    fn add(&mut self, mover: Mover) {
        if self.0.len() < MAX_MOVERS {
            self.0.push_back(mover);
        }
    }

    fn due(&mut self, now_ns: u64) -> Option<Mover> {
        self.0.pop_front_if(|mover| mover.due_ns <= now_ns)
    }
}

impl Pipeline {
    /// A process was forked and has been taken on.
    pub(super) fn may_move(&mut self, pid: u32) {
        if let Some(watched) = self.processes.get(&pid) {
            self.movers.add(Mover {
                pid,
                start_ns: watched.facts.start_ns,
                place: watched.place.clone(),
                due_ns: clock::monotonic_ns().saturating_add(SETTLED_NS),
            });
        }
    }

    /// Reads again, before what was counted is handed out, where those are that may have been moved.
    pub(super) fn place_movers(&mut self) {
        for step in 0..self.movers.0.len() {
            if let Some(Mover { pid, start_ns, .. }) = self.movers.0.get(step) {
                self.place_again(*pid, *start_ns);
            }
        }
    }

    /// Reads again where those are that have been moved by now if ever, and tells of it.
    pub(super) fn tell_moved(&mut self, events: &mut Vec<Event>) {
        let now_ns = clock::monotonic_ns();
        while let Some(mover) = self.movers.due(now_ns) {
            self.place_again(mover.pid, mover.start_ns);
            let watched = self.processes.get(&mover.pid);
            if watched.is_some_and(|watched| watched.facts.start_ns == mover.start_ns && watched.place != mover.place) {
                self.describe(mover.pid, events);
            }
        }
    }

    fn place_again(&mut self, pid: u32, start_ns: u64) {
        let place = cgroup::place_of(pid);
        // Read after the place: the id may be another process's by now.
        let is_same = describe::facts(pid).is_ok_and(|facts| facts.start_ns == start_ns);
        if let Some(watched) = self.processes.get_mut(&pid)
            && watched.facts.start_ns == start_ns
            && is_same
            && !place.is_unknown()
        {
            watched.place = place;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_is_due_once_and_in_time_and_no_more_are_waited_for_than_fit() {
        let mut movers = Movers::default();
        for pid in 0..5000 {
            movers.add(Mover {
                pid,
                start_ns: 1,
                place: Place::default(),
                due_ns: 100 + u64::from(pid),
            });
        }
        assert_eq!(movers.0.len(), MAX_MOVERS);
        assert!(movers.due(99).is_none());
        assert_eq!(movers.due(100).map(|mover| mover.pid), Some(0));
        assert!(movers.due(100).is_none());
        assert_eq!(movers.due(200).map(|mover| mover.pid), Some(1));
    }
}
