//! What nobody runs any more is let go: the probes on a file, and what has been found out about it.
//!
//! Not at once: a host that is started again and again would be examined again and again.

use std::collections::HashMap;

use super::Pipeline;
use crate::{bpf::SiteLinks, clock, event::Event, process::hosts::FileId};

/// How long a file may be without a process before it is let go, unless the options say otherwise, nanoseconds.
pub const FILE_GRACE_NS: u64 = 300_000_000_000;
/// Between two perf events that are detached, nanoseconds: each makes the event task wait for a tenth of a second.
const DETACH_INTERVAL_NS: u64 = 1_000_000_000;

/// Files that no process has mapped, and probes that are on their way out.
#[derive(Default)]
pub(super) struct Unused {
    /// Since when, `CLOCK_MONOTONIC`, nanoseconds.
    since: HashMap<FileId, u64>,
    leaving: Vec<SiteLinks>,
    detached_ns: u64,
}

impl Unused {
    fn due(&mut self, now_ns: u64, grace_ns: u64) -> Vec<FileId> {
        let is_due = |since_ns: u64| now_ns.saturating_sub(since_ns) >= grace_ns;
        let due = self.since.iter().filter(|(_, since_ns)| is_due(**since_ns));
        let due: Vec<_> = due.map(|(file_id, _)| *file_id).collect();
        for file_id in &due {
            self.since.remove(file_id);
        }
        due
    }
}

impl Pipeline {
    /// A process has mapped the file.
    pub(super) fn file_used(&mut self, file_id: FileId) {
        self.unused.since.remove(&file_id);
    }

    /// A process that had mapped the file is gone.
    pub(super) fn file_left(&mut self, file_id: FileId) {
        let hosts = self.processes.values().flat_map(|watched| &watched.hosts);
        if hosts.into_iter().all(|host| host.file_id != file_id) {
            self.unused.since.insert(file_id, clock::monotonic_ns());
        }
    }

    /// Nothing more is wanted of a process. Its threads may live on.
    pub(super) fn end_watch(&mut self, pid: u32) {
        self.kernel.unwatch(pid);
        self.kernel.forget_threads(pid);
    }

    /// Takes a process, or the image that it has had, out of the table; `false` if it was not there.
    pub(super) fn remove_process(&mut self, pid: u32) -> bool {
        let Some(watched) = self.processes.remove(&pid) else {
            return false;
        };
        for host in &watched.hosts {
            self.file_left(host.file_id);
        }
        true
    }

    /// Lets go what has not been used for long enough.
    pub(super) fn let_go(&mut self, events: &mut Vec<Event>) {
        self.definitions.forget_unused(events);
        let now_ns = clock::monotonic_ns();
        for file_id in self.unused.due(now_ns, self.options.file_grace_ns) {
            let links = self.links.remove(&file_id).into_iter().flat_map(|(_, links)| links);
            self.unused.leaving.extend(links.map(|(_, links)| links));
            self.forget_swap_check(file_id);
            self.learning.forget(file_id);
            self.hosts.forget(file_id);
            tracing::debug!("no process runs a host any more: its probes are detached");
        }
        if self.unused.leaving.is_empty() || now_ns.saturating_sub(self.unused.detached_ns) < DETACH_INTERVAL_NS {
            return;
        }
        self.unused.detached_ns = now_ns;
        let kernel = &mut self.kernel;
        self.unused.leaving.retain_mut(|links| !kernel.detach_part(links));
    }
}
