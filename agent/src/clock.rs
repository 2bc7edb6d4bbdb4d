//! The one place that ties the kernel's monotonic clock to wall time.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

/// One instant on both clocks; taken once per capture so that spans of one capture never move against each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClockAnchor {
    /// `CLOCK_MONOTONIC`, as eBPF's `bpf_ktime_get_ns` reports it.
    pub monotonic_ns: u64,
    /// The same instant since the Unix epoch.
    pub unix_ns: u64,
}

impl ClockAnchor {
    /// Reads both clocks.
    pub fn now() -> Self {
        #[expect(clippy::disallowed_methods, reason = "the one permitted use")]
        let unix = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        Self {
            monotonic_ns: monotonic_ns(),
            unix_ns: unix.as_nanos() as u64,
        }
    }

    /// Wall time of a monotonic instant, before or after the anchor.
    pub fn wall(&self, monotonic_ns: u64) -> SystemTime {
        UNIX_EPOCH
            + Duration::from_nanos(
                self.unix_ns
                    .saturating_add(monotonic_ns)
                    .saturating_sub(self.monotonic_ns),
            )
    }
}

/// `CLOCK_MONOTONIC` now.
pub fn monotonic_ns() -> u64 {
    // The vdso call cannot fail for this clock on Linux.
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64
}
