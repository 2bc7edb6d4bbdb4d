//! What the kernel counts by itself, row by row, with the names of what was counted.

use std::sync::Arc;

use wasmscope_common::SyscallStats;

use super::Pipeline;
use crate::{
    span::{Function, Process},
    syscalls,
};

/// Syscalls of one kind made below one export.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SyscallRow {
    /// The process.
    pub process: Arc<Process>,
    /// The export, if it could be named.
    pub export: Option<Arc<Function>>,
    /// Name of the syscall.
    pub syscall: String,
    /// Counts, times and bytes.
    pub stats: SyscallStats,
}

impl Pipeline {
    /// What the kernel has counted for all processes, those that ended included.
    pub fn syscall_aggregate(&mut self) -> Vec<SyscallRow> {
        let pids: Vec<_> = self.processes.keys().copied().collect();
        for pid in pids {
            self.collect_aggregate(pid);
        }
        std::mem::take(&mut self.aggregate)
    }

    /// Names the rows of one process while that is still possible, and takes them out of the kernel's table.
    pub(super) fn collect_aggregate(&mut self, pid: u32) {
        let Some(watched) = self.processes.get(&pid) else {
            return;
        };
        let process = Arc::new(self.process_of(pid, watched));
        let Some(watched) = self.processes.get_mut(&pid) else {
            return;
        };
        for (key, stats) in self.kernel.take_syscall_stats(pid) {
            self.aggregate.push(SyscallRow {
                process: process.clone(),
                export: watched.guests.function(key.entry_handler),
                syscall: syscalls::name(u64::from(key.number)),
                stats,
            });
        }
    }
}
