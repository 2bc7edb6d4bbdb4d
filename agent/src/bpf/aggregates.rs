//! The maps in which the programs count by themselves.

use aya::{
    Ebpf, Pod,
    maps::{HashMap, MapData, PerCpuArray, PerCpuHashMap},
};
use wasmscope_common::{AggregateKey, AggregateStats, OpenActivation, OpenKey};

use super::load::{LoadError, take};

/// Memory that all rows may take together, bytes.
const MAX_ROW_BYTES: usize = 12 << 20;
/// Rows of the table, however many CPUs there are.
const ROWS: std::ops::RangeInclusive<usize> = 256..=4096;
/// Bytes of a row beside its key and values.
const ROW_OVERHEAD_BYTES: usize = 64;

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
}

impl Aggregates {
    pub(super) fn take(ebpf: &mut Ebpf) -> Result<Self, LoadError> {
        Ok(Self {
            rows: take(ebpf, "AGGREGATES")?,
            other: take(ebpf, "OTHER")?,
            open: take(ebpf, "OPEN")?,
        })
    }

    /// Every row, summed over CPUs since it was made. Buckets wrap.
    pub fn rows(&self) -> Vec<(AggregateKey, AggregateStats)> {
        let rows = self.rows.iter().filter_map(Result::ok);
        rows.map(|(key, per_cpu)| (key.0, sum(per_cpu.iter().map(|stats| stats.0))))
            .collect()
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
        let _ = self.rows.remove(&PodKey(*key));
    }

    /// Takes out what is open in a process that is not watched any more.
    pub fn take_open(&mut self, pid: u32) -> Vec<OpenActivation> {
        let open: Vec<_> = self
            .open
            .iter()
            .filter_map(Result::ok)
            .filter(|(key, _)| key.0.pid == pid)
            .collect();
        for (key, _) in &open {
            let _ = self.open.remove(key);
        }
        open.into_iter().map(|(_, open)| open.0).collect()
    }
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
