//! What the programs count by themselves: rows with a histogram each, and the activations that are open.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// Buckets of a histogram: bucket 0 is at most [`ZERO_SECONDS_LOG2`], the last is everything above the ones between.
pub const BUCKET_COUNT: usize = 128;
/// Buckets per octave as a power of two: the schema of Prometheus's native histograms and the scale of OTLP's.
pub const BUCKET_SCALE: i32 = 2;
/// Durations up to two to the power of this many seconds (238 ns) are in bucket 0.
pub const ZERO_SECONDS_LOG2: i32 = -22;

/// [`AggregateKey::kind`]: an invocation.
pub const KIND_INVOCATION: u32 = 0;
/// [`AggregateKey::kind`]: a call of a host function.
pub const KIND_HOST_CALL: u32 = 1;
/// [`AggregateKey::kind`]: a syscall.
pub const KIND_SYSCALL: u32 = 2;
/// [`AggregateKey::kind`]: nothing.
pub const KIND_NONE: u32 = u32::MAX;
/// [`AggregateKey::kind`] in the table of rows has above these bits the number of the shard: a row that several CPUs count in would go back and
/// forth between them.
pub const KIND_BITS: u32 = 16;
/// Rows that take what the table has no room for, by kind.
pub const OTHER_ROWS: u32 = 4;

/// Rows of the table, shards counted: 10 MiB of kernel memory when all are there.
pub const MAX_ROWS: u32 = 16 << 10;
/// Rows that one process may have.
pub const MAX_ROWS_PER_PROCESS: u32 = MAX_ROWS / 8;
/// Shards of a row at most; a power of two.
pub const MAX_SHARDS: u32 = 4;

/// [`AggregateKey::detail`] of the row, of each kind and process, that takes what the process has no rows for. Nothing else
/// of its key is set.
pub const DETAIL_OTHER: u32 = u32::MAX;

/// [`AggregateKey::detail`] of an invocation that no host call has ended.
pub const ENDED_BY_ITSELF: u32 = 0;
/// As above, of one whose last host call failed: that one is in the key.
pub const ENDED_BY_FAILED_CALL: u32 = 1;
/// As above, of one whose last host call was not seen to end: that one is in the key.
pub const ENDED_IN_CALL: u32 = 2;
/// As above, of one whose end was missed: another one has begun in its place.
pub const ENDED_UNSEEN: u32 = 3;
/// As above, of one whose last host call may not have been seen. (4 is the flag [`crate::COMPONENT_CALL`].)
pub const ENDED_UNSURE: u32 = 8;
/// Flag of [`AggregateKey::detail`] of a host call: it was open when they ceased to be counted, so its end is not known.
pub const CALL_UNFINISHED: u32 = 1 << 16;

/// What is counted in one row.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct AggregateKey {
    /// Process.
    pub pid: u32,
    /// [`crate::Observed::code_epoch`]: which code the addresses are of.
    pub epoch: u32,
    /// `KIND_*`; in the table of rows with a shard, see [`KIND_BITS`].
    pub kind: u32,
    /// Of an invocation `ENDED_*`, of a host call [`crate::COMPONENT_CALL`] and [`CALL_UNFINISHED`], of a syscall its number.
    pub detail: u32,
    /// Trap handler address of the activation: the export. 0 of a host call. This and the other addresses of code are 0 as
    /// well if they lie where no guest code is known to be.
    pub entry_handler: u64,
    /// Guest return address of the host call; of a syscall the errno, 0 for success.
    pub call_site: u64,
    /// What was called from there, as in [`crate::HostCall`]; of a component its trampoline.
    pub callee: u64,
}

/// What is summed up per row.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct AggregateStats {
    /// Ends.
    pub count: u64,
    /// Nanoseconds in all.
    pub total_ns: u64,
    /// Invocations that a signal of a trap was delivered to; host calls that returned a failure.
    pub failed: u64,
    /// Invocations that were then turned into an error value; host calls whose end is that of what came next; syscalls
    /// that do not return.
    pub marked: u64,
    /// Ends whose begin was not seen: they are in no bucket.
    pub untimed: u64,
    /// Sum of the positive results of syscalls that move bytes.
    pub bytes: u64,
    /// Ends by duration; see [`bucket_of`]. They may wrap.
    pub buckets: [u32; BUCKET_COUNT],
}

/// Identity of an open activation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct OpenKey {
    /// Its address.
    pub activation: u64,
    /// Process.
    pub pid: u32,
    /// Unused, zero.
    pub reserved: u32,
}

/// [`OpenActivation::parent`] of one whose begin was not seen.
pub const PARENT_UNKNOWN: u64 = u64::MAX;

/// An activation that has begun, wherever its fiber is, and the host call that it is in.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct OpenActivation {
    /// When it began, `CLOCK_MONOTONIC`, nanoseconds; 0: before the probes were there.
    pub start_ns: u64,
    /// What was on top of the thread when it was last put there.
    pub parent: u64,
    /// Trap handler address, 0 until it is known.
    pub entry_handler: u64,
    /// When its host call began; 0: none is open.
    pub call_start_ns: u64,
    /// Stack pointer at that host call's entry.
    pub call_frame: u64,
    /// As [`AggregateKey::call_site`], of the last host call.
    pub call_site: u64,
    /// As [`AggregateKey::callee`], of the last host call.
    pub callee: u64,
    /// As [`AggregateKey::detail`], of the last host call.
    pub call_detail: u32,
    /// 1 if the last host call failed.
    pub call_failed: u32,
    /// 1 if a signal of a trap was delivered.
    pub trapped: u32,
    /// [`crate::ProcessConfig::call_gaps`] when its last host call began, or it did.
    pub call_gaps: u32,
}

/// The bucket of a duration. Bounds are powers of the fourth root of two, in seconds, each included in the bucket below
/// it; they are met to within one part in ten millions.
#[inline(always)]
#[expect(clippy::manual_ilog2, reason = "what can panic has no place in the programs")]
pub const fn bucket_of(duration_ns: u64) -> usize {
    /// 2^50 / 10^9: durations are looked at in units of 2^-50 s.
    const UNITS_PER_NS: u64 = 1_125_900;
    /// More is in the last bucket anyway, and would overflow.
    const MAX_NS: u64 = 1 << 43;
    /// Exponent of the lowest bound.
    const LOWEST: u32 = (50 + ZERO_SECONDS_LOG2) as u32;
    let bounded = if duration_ns > MAX_NS { MAX_NS } else { duration_ns };
    let units = bounded * UNITS_PER_NS;
    if units <= 1 << LOWEST {
        return 0;
    }
    // A bound is the last value of its bucket.
    let below = units - 1;
    let exponent = 63 - below.leading_zeros();
    // 2^31 to 2^32: where in its octave.
    let mantissa = (below << (63 - exponent)) >> 32;
    let quarter =
        (mantissa >= 2_553_802_834) as u64 + (mantissa >= 3_037_000_500) as u64 + (mantissa >= 3_611_622_603) as u64;
    let index = ((exponent - LOWEST) as u64) * 4 + quarter + 1;
    if index > BUCKET_COUNT as u64 - 1 {
        BUCKET_COUNT - 1
    } else {
        index as usize
    }
}

impl AggregateStats {
    /// Nothing.
    pub const EMPTY: Self = Self {
        count: 0,
        total_ns: 0,
        failed: 0,
        marked: 0,
        untimed: 0,
        bytes: 0,
        buckets: [0; BUCKET_COUNT],
    };
}

const _: () = {
    assert!(size_of::<AggregateKey>() == 40);
    assert!(size_of::<AggregateStats>() == 48 + 4 * BUCKET_COUNT);
    assert!(size_of::<OpenActivation>() == 72);
};

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bound_is_in_the_bucket_below_it_and_buckets_never_go_back() {
        assert_eq!(bucket_of(0), 0);
        assert_eq!(bucket_of(238), 0);
        assert_eq!(bucket_of(239), 1);
        // One second is the upper bound of the last bucket below it: 22 octaves.
        assert_eq!(bucket_of(999_999_000), 88);
        assert_eq!(bucket_of(1_000_000_100), 89);
        assert_eq!(bucket_of(u64::MAX), BUCKET_COUNT - 1);
        let mut before = 0;
        let mut ns = 1u64;
        while ns < 1 << 45 {
            let bucket = bucket_of(ns);
            assert!(bucket >= before && bucket - before <= 1, "{ns}");
            before = bucket;
            ns += 1 + ns / 50;
        }
        assert_eq!(before, BUCKET_COUNT - 1);
    }
}
