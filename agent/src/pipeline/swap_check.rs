//! Whether a function that was recognised by its code, in a host without symbols, does what it was taken for: nothing
//! else changes a thread's activation, so each swap must find what the one before it left.

use std::collections::HashMap;

use wasmscope_common::{ActivationSwap, SLOT_UNKNOWN};

use super::Pipeline;
use crate::{bpf::SiteProgram, event::Event, process::hosts::FileId};

/// Swaps that have to agree before no more are looked at.
const ENOUGH: u32 = 256;
/// Threads followed meanwhile.
const MAX_THREADS: usize = 4096;

/// Files whose swaps are remembered to be something else.
const MAX_CHECKS: usize = 1024;

/// What has been seen of one file's swaps.
#[derive(Debug, Default)]
pub(super) struct SwapCheck {
    agreed_count: u32,
    /// What the last swap left, by process and thread.
    left: HashMap<(u32, u32), u64>,
    is_distrusted: bool,
}

impl SwapCheck {
    /// Takes the next swap; `false` if it contradicts one before.
    fn agrees(&mut self, pid: u32, tid: u32, old: Option<u64>, new: u64) -> bool {
        if self.agreed_count >= ENOUGH {
            return true;
        }
        if self.left.len() >= MAX_THREADS {
            self.left.clear();
        }
        match (self.left.insert((pid, tid), new), old) {
            (Some(left), Some(old)) if left != old => return false,
            (Some(_), Some(_)) => self.agreed_count += 1,
            _ => {}
        }
        if self.agreed_count >= ENOUGH {
            self.left = HashMap::new();
        }
        true
    }
}

impl Pipeline {
    /// Whether a swap can be believed. If not, its probe is gone by now.
    pub(super) fn believes(&mut self, pid: u32, tid: u32, swap: &ActivationSwap, events: &mut Vec<Event>) -> bool {
        // With several copies it is not known whose swap it is, so only a lone one is judged.
        let host = self
            .processes
            .get(&pid)
            .and_then(|watched| match watched.hosts.as_slice() {
                [host] if host.plan.recognises_swap => Some(host),
                _ => None,
            });
        let Some(host) = host else {
            return true;
        };
        let file_id = host.file_id;
        let check = self.swap_checks.entry(file_id).or_default();
        if check.is_distrusted {
            return false;
        }
        if check.agreed_count >= ENOUGH {
            return true;
        }
        if !self.requests.are_reliable() {
            // A swap whose record was lost explains everything.
            check.left.clear();
            return true;
        }
        let old = (swap.header.flags & SLOT_UNKNOWN == 0).then_some(swap.old);
        if check.agrees(pid, tid, old, swap.new) {
            return true;
        }
        self.distrust_swap(file_id, events);
        false
    }

    /// A thread or a whole process begins anew.
    pub(super) fn forget_swaps(&mut self, pid: u32, tid: Option<u32>) {
        for check in self.swap_checks.values_mut() {
            if let Some(tid) = tid {
                check.left.remove(&(pid, tid));
            } else {
                check.left.retain(|(of, _), _| *of != pid);
            }
        }
    }

    /// No process runs the file any more. That it is distrusted stays known.
    pub(super) fn forget_swap_check(&mut self, file_id: FileId) {
        if !self.distrusts_swap(file_id) || self.swap_checks.len() > MAX_CHECKS {
            self.swap_checks.remove(&file_id);
        }
    }

    /// Whether the swaps of a file turned out to be something else.
    pub(super) fn distrusts_swap(&self, file_id: FileId) -> bool {
        self.swap_checks.get(&file_id).is_some_and(|check| check.is_distrusted)
    }

    fn distrust_swap(&mut self, file_id: FileId, events: &mut Vec<Event>) {
        tracing::warn!("the function taken for the swap of activations is another; its probe is taken away");
        if let Some(check) = self.swap_checks.get_mut(&file_id) {
            check.is_distrusted = true;
            check.left = HashMap::new();
        }
        let Some((coverage, links)) = self.links.get_mut(&file_id) else {
            return;
        };
        coverage.activations = false;
        let (wrong, right) = std::mem::take(links)
            .into_iter()
            .partition(|(program, _)| *program == SiteProgram::ActivationSwap);
        *links = right;
        for (_, link) in wrong {
            self.kernel.detach(link);
        }
        self.cover(file_id, events);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn swaps_that_find_what_was_left_are_believed() {
        let mut check = SwapCheck::default();
        for (tid, old, new) in [
            (1, 0, 0x10),
            (2, 0, 0x20),
            (1, 0x10, 0x11),
            (2, 0x20, 0),
            (1, 0x11, 0x10),
        ] {
            assert!(check.agrees(7, tid, Some(old), new), "{tid} {old:#x} {new:#x}");
        }
        assert_eq!(check.agreed_count, 3);
    }

    #[test]
    fn a_swap_that_finds_something_else_is_not_believed() {
        let mut check = SwapCheck::default();
        assert!(check.agrees(7, 1, Some(0), 0x10));
        assert!(!check.agrees(7, 1, Some(0), 0x20));
    }

    #[test]
    fn what_could_not_be_read_says_nothing() {
        let mut check = SwapCheck::default();
        assert!(check.agrees(7, 1, Some(0), 0x10));
        assert!(check.agrees(7, 1, None, 0x20));
        assert!(check.agrees(7, 1, Some(0x20), 0));
    }
}
