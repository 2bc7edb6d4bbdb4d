//! The maps in which the programs count by themselves.
//!
//! Programs go on adding while a map is read. A walk over a hash map starts again where the entry it stands on is removed, so
//! every walk has an end of its own.

use std::collections::{HashMap as Table, HashSet};

use aya::{
    Ebpf, Pod,
    maps::{HashMap, MapData, PerCpuArray},
};
use wasmscope_common::{
    AggregateKey, AggregateStats, DETAIL_OTHER, KIND_BITS, MAX_ROWS, MAX_SHARDS, OpenActivation, OpenKey,
};

use super::load::{LoadError, take};

/// Entries of the table of open activations, as the programs define it.
const OPEN_ENTRIES: usize = 16_384;
/// Steps of a walk, per entry that the map has room for.
const STEPS_PER_ENTRY: usize = 2;
const ROW_STEPS: usize = MAX_ROWS as usize * STEPS_PER_ENTRY;

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
    rows: HashMap<MapData, PodKey, PodStats>,
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

    /// Every row, summed over its shards since it was made. Buckets wrap.
    pub fn rows(&self) -> Vec<(AggregateKey, AggregateStats)> {
        // A walk that has started again meets a shard twice.
        let shards = self.rows.iter().take(ROW_STEPS).filter_map(Result::ok);
        let shards: Table<_, _> = shards.map(|(key, stats)| (key.0, stats.0)).collect();
        let mut rows: Table<AggregateKey, AggregateStats> = Table::new();
        for (key, stats) in shards {
            let row = rows.entry(whole(key)).or_insert(AggregateStats::EMPTY);
            *row = sum([*row, stats].into_iter());
        }
        rows.into_iter().collect()
    }

    /// Which rows there are: at half the price of [`Self::rows`].
    pub fn keys(&self) -> Vec<AggregateKey> {
        let keys = self.rows.keys().take(ROW_STEPS).filter_map(Result::ok);
        let keys: HashSet<_> = keys.map(|key| whole(key.0)).collect();
        keys.into_iter().collect()
    }

    /// Entries of the table: each shard of each row.
    pub fn entry_count(&self) -> usize {
        let keys = self.rows.keys().take(ROW_STEPS).filter_map(Result::ok);
        keys.map(|key| key.0).collect::<HashSet<_>>().len()
    }

    /// One row, as [`Self::rows`].
    pub fn row(&self, key: &AggregateKey) -> Option<AggregateStats> {
        let found: Vec<_> = shards(key)
            .filter_map(|shard| Some(self.rows.get(&PodKey(shard), 0).ok()?.0))
            .collect();
        (!found.is_empty()).then(|| sum(found.into_iter()))
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
        // What is gone already is as it is wanted.
        let removed = shards(key)
            .filter(|shard| self.rows.remove(&PodKey(*shard)).is_ok())
            .count() as u64;
        if removed > 0 && key.detail != DETAIL_OTHER {
            let released = self.released.get(&key.pid, 0).unwrap_or(0);
            // Without room, the process has that many rows less.
            let _ = self.released.insert(key.pid, released + removed, 0);
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

/// The key of a row in the table, without its shard.
fn whole(mut key: AggregateKey) -> AggregateKey {
    key.kind &= (1 << KIND_BITS) - 1;
    key
}

/// The keys that a row may have in the table.
fn shards(key: &AggregateKey) -> impl Iterator<Item = AggregateKey> + use<> {
    let key = *key;
    (0..MAX_SHARDS).map(move |shard| AggregateKey {
        kind: key.kind | shard << KIND_BITS,
        ..key
    })
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
    fn shards_of_a_row_are_those_of_no_other() {
        let key = |kind| AggregateKey {
            pid: 7,
            kind,
            ..AggregateKey::default()
        };
        let kinds = [wasmscope_common::KIND_INVOCATION, wasmscope_common::KIND_SYSCALL];
        let all: HashSet<_> = kinds.iter().flat_map(|kind| shards(&key(*kind))).collect();
        assert_eq!(all.len(), 2 * MAX_SHARDS as usize);
        assert_eq!(
            all.into_iter().map(whole).collect::<HashSet<_>>(),
            kinds.map(key).into()
        );
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
