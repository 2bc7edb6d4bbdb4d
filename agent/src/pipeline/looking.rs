//! What a process can make the agent read of it: within the bounds of [`crate::process::looks`], and counted where they end.

use wasmscope_common::MAX_COPIES;

use super::{Pipeline, copies};
use crate::{
    clock,
    event::Coverage,
    process::{
        hosts::Found,
        looks::LibraryLook,
        maps::{self, ExecutableMapping},
    },
};

impl Pipeline {
    /// The process's mappings, unless it makes the agent read them too often: then only what the publication itself says is
    /// known of the code. Libraries loaded since are noticed at a later one.
    pub(super) fn mappings_now(&mut self, pid: u32) -> Option<Vec<ExecutableMapping>> {
        let watched = self.processes.get_mut(&pid)?;
        if !watched.looks.maps.has_any(clock::monotonic_ns()) {
            self.lose("symbols", "mappings_limit");
            return None;
        }
        let (mappings, byte_count) = maps::sized_mappings(pid).unwrap_or_default();
        watched.looks.maps.spend(byte_count);
        Some(mappings)
    }

    /// Looks which files with a runtime are mapped by now, and attaches to those that are new.
    pub(super) fn find_hosts(&mut self, pid: u32, mappings: &[ExecutableMapping]) {
        let Some(watched) = self.processes.get_mut(&pid) else {
            return;
        };
        let mut look = watched.looks.at_libraries();
        let hosts = self.hosts.of_process(pid, mappings, &mut look);
        let LibraryLook {
            is_cut, has_stalled, ..
        } = look;
        if is_cut {
            self.lose("symbols", "libraries_limit");
        }
        if has_stalled {
            self.lose("symbols", "file_stalled");
        }
        for Found { host, tls_number_at } in hosts {
            let Some(watched) = self.processes.get(&pid) else {
                return;
            };
            if watched.hosts.iter().any(|known| known.file_id == host.file_id) {
                continue;
            }
            // More copies are not followed, so there is nothing to attach for.
            let coverage = if watched.hosts.len() < MAX_COPIES {
                self.attach(&host)
            } else {
                Coverage::default()
            };
            self.file_used(host.file_id);
            let Some(watched) = self.processes.get_mut(&pid) else {
                return;
            };
            watched.coverage = if watched.hosts.is_empty() {
                coverage
            } else {
                copies::common_coverage(watched.coverage, coverage)
            };
            watched.hosts.push(host);
            watched.tls_numbers_at.push(tls_number_at);
        }
    }
}
