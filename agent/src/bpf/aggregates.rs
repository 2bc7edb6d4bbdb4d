//! The maps in which the programs count by themselves.
//!
//! Programs go on adding while a map is read. A walk over a hash map starts again where the entry it stands on is removed, so
//! every walk has an end of its own.

use std::collections::HashSet;

use aya::{
    Ebpf, Pod,
    maps::{HashMap, MapData, PerCpuArray, PerCpuHashMap},
};
use wasmscope_common::{AggregateKey, AggregateStats, DETAIL_OTHER, OpenActivation, OpenKey};

use super::load::{LoadError, take};

/// Memory that all rows may take together, bytes.
const MAX_ROW_BYTES: usize = 12 << 20;
/// Rows of the table, however many CPUs there are.
const ROWS: std::ops::RangeInclusive<usize> = 256..=4096;
/// Bytes of a row beside its key and values.
const ROW_OVERHEAD_BYTES: usize = 64;
/// Of all rows, the share that one process may have: one in so many.
const PROCESS_SHARE: u32 = 4;
/// Entries of the table of open activations, as the programs define it.
const OPEN_ENTRIES: usize = 16_384;
/// Steps of a walk, per entry that the map has room for.
const STEPS_PER_ENTRY: usize = 2;

#[derive(Clone, Copy)]
#[repr(transparent)]
struct PodKey(AggregateKey);
#[derive(Clone, Copy)]
#[repr(transparent)]
struct PodStats(AggregateStats);
#[derive(Clone, Copy)]
#[repr(transparent)]
struct PodOpenKey(OpenKey);
#[derive(Clone, Copy)]
#[repr(transparent)]
struct PodOpen(OpenActivation);

// SAFETY: transparent wrappers of `repr(C)` types of integers without padding (zerocopy's derives prove it).
unsafe impl Pod for PodKey {}
// SAFETY: as above.
unsafe impl Pod for PodStats {}
// SAFETY: as above.
unsafe impl Pod for PodOpenKey {}
// SAFETY: as above.
unsafe impl Pod for PodOpen {}

/// What the programs have counted.
pub struct Aggregates {
    rows: PerCpuHashMap<MapData, PodKey, PodStats>,
    other: PerCpuArray<MapData, PodStats>,
    open: HashMap<MapData, PodOpenKey, PodOpen>,
    /// How many rows were taken out, by process.
    released: HashMap<MapData, u32, u64>,
}

impl Aggregates {
    pub(super) fn take(ebpf: &mut Ebpf) -> Result<Self, LoadError> {
        Ok(Self {
            rows: take(ebpf, "AGGREGATES")?,
            other: take(ebpf, "OTHER")?,
            open: take(ebpf, "OPEN")?,
            released: take(ebpf, "RELEASED_ROWS")?,
        })
    }

    /// Every row, summed over CPUs since it was made. Buckets wrap.
    pub fn rows(&self) -> Vec<(AggregateKey, AggregateStats)> {
        let rows = self.rows.iter().take(row_steps()).filter_map(Result::ok);
        rows.map(|(key, per_cpu)| (key.0, sum(per_cpu.iter().map(|stats| stats.0))))
            .collect()
    }

    /// Which rows there are: at half the price of [`Self::rows`].
    pub fn keys(&self) -> Vec<AggregateKey> {
        let keys = self.rows.keys().take(row_steps()).filter_map(Result::ok);
        keys.map(|key| key.0).collect()
    }

    /// One row, as [`Self::rows`].
    pub fn row(&self, key: &AggregateKey) -> Option<AggregateStats> {
        let per_cpu = self.rows.get(&PodKey(*key), 0).ok()?;
        Some(sum(per_cpu.iter().map(|stats| stats.0)))
    }

    /// What there was no row for, of one kind.
    pub fn other(&self, kind: u32) -> AggregateStats {
        let per_cpu = self.other.get(&kind, 0);
        per_cpu.map_or(AggregateStats::EMPTY, |per_cpu| {
            sum(per_cpu.iter().map(|stats| stats.0))
        })
    }

    /// Takes a row out that nothing is added to any more.
    pub fn remove(&mut self, key: &AggregateKey) {
        // It may be gone already, which is what is wanted.
        if self.rows.remove(&PodKey(*key)).is_ok() && key.detail != DETAIL_OTHER {
            let released = self.released.get(&key.pid, 0).unwrap_or(0);
            // Without room, the process has that many rows less.
            let _ = self.released.insert(key.pid, released + 1, 0);
        }
    }

    /// All rows of a process have been taken out, and it has none to come.
    pub fn forget(&mut self, pid: u32) {
        let _ = self.released.remove(&pid);
    }

    /// Takes out what is open in a process that is not watched any more, or what was when it replaced its image. What cannot
    /// be found since the table changes all the time is left.
    pub fn take_open(&mut self, pid: u32, replaced_ns: Option<u64>) -> Vec<OpenActivation> {
        let is_over = |open: &OpenActivation| replaced_ns.is_none_or(|replaced_ns| was_there(open, replaced_ns));
        let taken = self.take_open_where(|of| of == pid, is_over);
        taken.into_iter().map(|(_, open)| open).collect()
    }

    /// As [`Self::take_open`], of all processes that are meant, with their ids.
    pub fn take_open_of(&mut self, is_meant: impl Fn(u32) -> bool) -> Vec<(u32, OpenActivation)> {
        self.take_open_where(is_meant, |_| true)
    }

    fn take_open_where(
        &mut self,
        is_meant: impl Fn(u32) -> bool,
        is_over: impl Fn(&OpenActivation) -> bool,
    ) -> Vec<(u32, OpenActivation)> {
        let steps = self.open.keys().take(OPEN_ENTRIES * STEPS_PER_ENTRY);
        let keys = distinct(steps.filter_map(Result::ok).map(|key| key.0), |key| is_meant(key.pid));
        keys.into_iter()
            .filter_map(|key| {
                let open = self
                    .open
                    .get(&PodOpenKey(key), 0)
                    .ok()
                    .filter(|open| is_over(&open.0))?;
                // Whoever removes it counts it.
                self.open.remove(&PodOpenKey(key)).ok()?;
                Some((key.pid, open.0))
            })
            .collect()
    }
}

/// Whether an activation was there at a time. Of one whose begin was not seen, its host call tells; without one, it was.
fn was_there(open: &OpenActivation, at_ns: u64) -> bool {
    let seen_ns = if open.start_ns == 0 {
        open.call_start_ns
    } else {
        open.start_ns
    };
    seen_ns <= at_ns
}

/// Those that are meant, each once.
fn distinct(keys: impl Iterator<Item = OpenKey>, is_meant: impl Fn(&OpenKey) -> bool) -> HashSet<OpenKey> {
    keys.filter(is_meant).collect()
}

fn row_steps() -> usize {
    row_count() as usize * STEPS_PER_ENTRY
}

/// Rows of the table that one process may have.
pub(super) fn rows_per_process() -> u32 {
    row_count() / PROCESS_SHARE
}

/// Rows of the table on this machine.
pub(super) fn row_count() -> u32 {
    let cpus = aya::util::nr_cpus().unwrap_or(1);
    let bytes = cpus * size_of::<AggregateStats>() + size_of::<AggregateKey>() + ROW_OVERHEAD_BYTES;
    (MAX_ROW_BYTES / bytes).clamp(*ROWS.start(), *ROWS.end()) as u32
}

fn sum(parts: impl Iterator<Item = AggregateStats>) -> AggregateStats {
    parts.fold(AggregateStats::EMPTY, |mut total, part| {
        for (total, part) in [
            (&mut total.count, part.count),
            (&mut total.total_ns, part.total_ns),
            (&mut total.failed, part.failed),
            (&mut total.marked, part.marked),
            (&mut total.untimed, part.untimed),
            (&mut total.bytes, part.bytes),
        ] {
            *total = total.wrapping_add(part);
        }
        for (total, part) in total.buckets.iter_mut().zip(part.buckets) {
            *total = total.wrapping_add(part);
        }
        total
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_new_image_has_opened_is_not_of_the_old_one() {
        let open = |start_ns, call_start_ns| OpenActivation {
            start_ns,
            call_start_ns,
            ..OpenActivation::default()
        };
        let of_old = [open(9, 0), open(9, 10), open(0, 9), open(0, 0)];
        assert!(of_old.iter().all(|open| was_there(open, 10)));
        let of_new = [open(11, 0), open(11, 12), open(0, 11)];
        assert!(!of_new.iter().any(|open| was_there(open, 10)));
    }

    #[test]
    fn an_activation_that_a_walk_meets_again_is_taken_once_and_others_not_at_all() {
        let key = |activation, pid| OpenKey {
            activation,
            pid,
            reserved: 0,
        };
        // The walk has started again: an entry it stood on was removed.
        let met = [key(1, 5), key(2, 5), key(3, 6), key(1, 5), key(2, 5)];
        let found = distinct(met.into_iter(), |key| key.pid == 5);
        assert_eq!(found, HashSet::from([key(1, 5), key(2, 5)]));
    }
}
