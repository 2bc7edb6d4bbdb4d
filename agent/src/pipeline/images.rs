//! Reads the code objects of watched processes, no more of them than a process is entitled to, and what had to wait later.

use std::ops::Range;

use super::{Pipeline, watching::Watched};
use crate::{
    clock,
    event::Event,
    process::{
        guests::{AddError, Added},
        reading::Verdict,
    },
};

/// Why a code object is not known, or not all of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Unread {
    /// Too much has been read of its process lately.
    Deferred,
    /// It is none, or it is gone.
    Unreadable,
    /// As many names are kept as there is room for.
    NoRoom,
    /// There was room for its names only.
    WithoutTables,
}

/// How many of several are not, or not whole.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Unscanned {
    pub(super) deferred: u64,
    pub(super) unreadable: u64,
    pub(super) no_room: u64,
    pub(super) without_tables: u64,
}

impl Unscanned {
    /// Counts one that was or was not read.
    pub(super) fn count(&mut self, read: Result<(), Unread>) {
        match read {
            Ok(()) => {}
            Err(Unread::Deferred) => self.deferred += 1,
            Err(Unread::Unreadable) => self.unreadable += 1,
            Err(Unread::NoRoom) => self.no_room += 1,
            Err(Unread::WithoutTables) => self.without_tables += 1,
        }
    }
}

impl Watched {
    /// Reads the code object in a range that was published, unless that has been done in this turn.
    pub(super) fn read(&mut self, range: &Range<u64>, file_name: Option<String>, turn: u64) -> Result<(), Unread> {
        let read = match self.reading.ask(range, turn, clock::monotonic_ns()) {
            Verdict::AlreadyRead | Verdict::Waits => return Ok(()),
            Verdict::Deferred | Verdict::Refused => Err(Unread::Deferred),
            Verdict::Read => {
                let added = self.guests.add(&self.memory, range.clone(), file_name);
                self.reading.spend(self.guests.take_read_bytes());
                match added {
                    Ok(Added::WithoutTables) => Err(Unread::WithoutTables),
                    Ok(_) => Ok(()),
                    Err(AddError::NoRoom) => Err(Unread::NoRoom),
                    Err(AddError::Image(_)) => Err(Unread::Unreadable),
                }
            }
        };
        if read.is_err_and(|unread| unread != Unread::WithoutTables) {
            // Nor does what was there before hold any longer.
            self.guests.remove(range);
        }
        read
    }
}

impl Pipeline {
    /// Counts what is not known of the guests of a process.
    pub(super) fn lose_images(&mut self, missing: Unscanned) {
        self.lose_many("symbols", "image_unreadable", missing.unreadable);
        self.lose_many("symbols", "image_deferred", missing.deferred);
        self.lose_many("symbols", "image_limit", missing.no_room);
        self.lose_many("symbols", "image_tables_limit", missing.without_tables);
    }

    /// Reads what had to wait.
    pub(super) fn read_deferred(&mut self, events: &mut Vec<Event>) {
        if self.is_finishing {
            return;
        }
        let now_ns = clock::monotonic_ns();
        let processes = self.processes.iter_mut();
        let due: Vec<_> = processes
            .filter_map(|(pid, watched)| Some((*pid, watched.reading.next_deferred(now_ns)?)))
            .collect();
        for (pid, range) in due {
            self.code_published(pid, range, events);
        }
    }

    /// Has the programs announce callees of which the names have been forgotten.
    pub(super) fn announce_again(&mut self, pid: u32) {
        let watched = self.processes.get_mut(&pid);
        if watched.is_some_and(|watched| watched.guests.take_missing_callees())
            && let Some(mut config) = self.kernel.config(pid)
        {
            config.generation = config.generation.wrapping_add(1);
            // It is in the table.
            let _ = self.kernel.watch(pid, config);
        }
    }
}
