//! Processes that descend from one with guests and have none themselves: the programs watch what a watched process makes, and
//! most of that is a shell or a tool.

use std::collections::HashMap;

use super::Pipeline;
use crate::{
    clock,
    decode::Record,
    process::{maps, memory::ProcessMemory},
};

/// A program that has read a process's flags is done with it by then, nanoseconds.
const IN_FLIGHT_NS: u64 = 1_000_000;

/// Processes that were let go, of which records may still come.
#[derive(Debug, Default)]
pub(super) struct Strays {
    /// When, `CLOCK_MONOTONIC`, nanoseconds.
    since: HashMap<u32, u64>,
}

impl Strays {
    fn add(&mut self, pid: u32, now_ns: u64) {
        self.since.insert(pid, now_ns);
    }

    /// Whether a record says nothing: the process has nothing that could be observed. What may change that is heard.
    fn is_idle(&self, pid: u32, record: &Record) -> bool {
        self.since.contains_key(&pid) && !matches!(record, Record::CodePublished(_) | Record::Exec(_) | Record::Fork(_))
    }

    /// Everything has been handled that was recorded before.
    fn drained(&mut self, until_ns: u64) {
        self.since
            .retain(|_, since_ns| since_ns.saturating_add(IN_FLIGHT_NS) >= until_ns);
    }
}

impl Pipeline {
    /// Whether a process is of no interest as long as it publishes no code: the programs notice when it does. One that
    /// cannot be looked at is.
    pub(super) fn is_bystander(&mut self, pid: u32) -> bool {
        if !self.options.watch_all || self.is_finishing {
            return false;
        }
        let (Ok(mappings), Ok(memory)) = (maps::executable_mappings(pid), ProcessMemory::open(pid)) else {
            return false;
        };
        // That of a process that has ended is empty.
        !mappings.is_empty()
            && maps::code_objects(&mappings, &memory).is_empty()
            && self.hosts.of_process(pid, &mappings).is_empty()
    }

    /// Stops watching a process that has no guests and is in no table.
    pub(super) fn release(&mut self, pid: u32) {
        self.end_watch(pid);
        // Without a runtime there are no activations that they could have been made in.
        self.kernel.forget_undecided(pid);
        self.collect_aggregate(pid, None);
        self.seek_host_functions();
        self.strays.add(pid, clock::monotonic_ns());
        tracing::debug!(pid, "a process without guests is not watched any longer");
    }

    /// Whether a record is of a process that was let go while it was made.
    pub(super) fn is_stray(&self, pid: u32, record: &Record) -> bool {
        !self.processes.contains_key(&pid) && self.strays.is_idle(pid, record)
    }

    /// At the end of a turn.
    pub(super) fn forget_strays(&mut self) {
        self.strays.drained(self.drained_ns);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stray_is_known_until_all_that_it_has_left_behind_is_handled() {
        let mut strays = Strays::default();
        strays.add(7, 10 * IN_FLIGHT_NS);
        strays.drained(9 * IN_FLIGHT_NS);
        strays.drained(11 * IN_FLIGHT_NS);
        assert!(strays.since.contains_key(&7));
        strays.drained(11 * IN_FLIGHT_NS + 1);
        assert!(strays.since.is_empty());
    }
}
