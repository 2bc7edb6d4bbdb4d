//! What the traces under way may take together, of all processes: a bound on each trace and each process is none on the node.

use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering::Relaxed},
};

use super::Activation;
use crate::span::Span;

/// Bytes that all traces under way may take, estimated, unless the options say otherwise.
pub const MAX_OPEN_BYTES: usize = 64 << 20;
/// Reason of what is lost when they are reached.
pub(super) const OPEN_TRACES_LIMIT: &str = "open_traces_limit";
/// What a span's name takes, and its share of an unfilled list.
const SPAN_OVERHEAD_BYTES: usize = 64;

/// The account that all open activations of a correlator share.
#[derive(Debug)]
pub(super) struct Room {
    max_bytes: usize,
    taken_bytes: Arc<AtomicUsize>,
}

impl Default for Room {
    fn default() -> Self {
        Self::new(MAX_OPEN_BYTES)
    }
}

impl Room {
    pub(super) fn new(max_bytes: usize) -> Self {
        Self {
            max_bytes,
            taken_bytes: Arc::default(),
        }
    }

    /// A share of it with this much in it, if there is so much.
    pub(super) fn share(&self, bytes: usize) -> Option<Share> {
        let mut share = Share {
            max_bytes: self.max_bytes,
            bytes: 0,
            taken_bytes: Arc::clone(&self.taken_bytes),
        };
        share.take(bytes).then_some(share)
    }
}

/// What one activation takes, given back with it.
#[derive(Debug)]
pub(super) struct Share {
    max_bytes: usize,
    bytes: usize,
    taken_bytes: Arc<AtomicUsize>,
}

impl Share {
    /// Takes more; `false` if there is not so much.
    pub(super) fn take(&mut self, bytes: usize) -> bool {
        if self.taken_bytes.load(Relaxed).saturating_add(bytes) > self.max_bytes {
            return false;
        }
        self.taken_bytes.fetch_add(bytes, Relaxed);
        self.bytes += bytes;
        true
    }

    /// Takes over what another has, which ends, all but so much.
    pub(super) fn absorb(&mut self, mut other: Self, all_but: usize) {
        let bytes = other.bytes.saturating_sub(all_but);
        other.bytes -= bytes;
        self.bytes += bytes;
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        self.taken_bytes.fetch_sub(self.bytes, Relaxed);
    }
}

/// What an open activation takes beside its spans.
pub(super) const fn activation_bytes() -> usize {
    size_of::<Activation>()
}

/// What a span takes without those in it.
pub(super) fn span_bytes(span: &Span) -> usize {
    size_of::<Span>() + SPAN_OVERHEAD_BYTES + size_of_val(span.stack.as_slice())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        correlate::Correlator,
        event::{Coverage, Event, EventKind},
        span::{Place, Process},
    };

    const PROCESSES: u32 = 64;
    const RECORD: u64 = 0x7f00_0000_0000;

    fn push(correlator: &mut Correlator, pid: u32, at_ns: u64, kind: EventKind) {
        let tid = pid;
        correlator.push(Event { at_ns, pid, tid, kind });
    }

    fn process(pid: u32) -> EventKind {
        EventKind::Process {
            process: Box::new(Process {
                pid,
                start_ns: 1,
                command: String::new(),
                runtime_name: String::new(),
                runtime_version: None,
                limits: Vec::new(),
                place: Place::default(),
            }),
            coverage: Coverage {
                activations: true,
                ..Coverage::default()
            },
        }
    }

    fn swap(old: u64, new: u64) -> EventKind {
        EventKind::ActivationSwap {
            old: Some(old),
            new,
            stack_pointer: RECORD - 16,
            entry: None,
        }
    }

    fn syscall() -> EventKind {
        EventKind::Syscall {
            activation: RECORD,
            entry: None,
            duration_ns: 1,
            number: 0,
            result: 0,
            arguments: [0; 3],
            stack: Vec::new(),
            truncated: false,
            handed_over_ns: None,
            is_open: false,
        }
    }

    #[test]
    fn traces_of_all_processes_together_stay_within_the_room_and_what_is_missing_is_told_and_counted() {
        const SYSCALLS: u64 = 1_000;
        const ROOM: usize = 1 << 20;
        let mut correlator = Correlator::with_room(ROOM);
        let mut at_ns = 1;
        // Twice: what was taken is given back.
        for _ in 0..2 {
            for pid in 1..=PROCESSES {
                push(&mut correlator, pid, 0, process(pid));
                push(&mut correlator, pid, at_ns, swap(0, RECORD));
            }
            for _ in 0..SYSCALLS {
                for pid in 1..=PROCESSES {
                    at_ns += 10;
                    push(&mut correlator, pid, at_ns, syscall());
                    assert!(correlator.room.taken_bytes.load(Relaxed) <= ROOM);
                }
            }
            for pid in 1..=PROCESSES {
                at_ns += 10;
                push(&mut correlator, pid, at_ns, swap(RECORD, 0));
            }
            correlator.settle(u64::MAX);
            let traces = correlator.take_finished();
            assert_eq!(traces.len(), PROCESSES as usize);
            let kept: usize = traces.iter().map(|trace| trace.root.children.len()).sum();
            let told = traces.iter().flat_map(|trace| &trace.losses);
            let told: u64 = told.map(|loss| loss.count).sum();
            assert!(kept > 1_000 && kept * size_of::<Span>() < ROOM, "{kept}");
            assert_eq!(kept as u64 + told, SYSCALLS * u64::from(PROCESSES));
            let losses = correlator.take_losses();
            assert_eq!(losses.len(), 1, "{losses:?}");
            assert_eq!((losses[0].reason.as_str(), losses[0].count), (OPEN_TRACES_LIMIT, told));
            assert_eq!(correlator.room.taken_bytes.load(Relaxed), 0);
        }
    }

    #[test]
    fn an_activation_for_which_there_is_no_room_is_counted() {
        let mut correlator = Correlator::with_room(0);
        push(&mut correlator, 1, 0, process(1));
        push(&mut correlator, 1, 1, swap(0, RECORD));
        let losses = correlator.take_losses();
        assert_eq!(losses[0].reason, OPEN_TRACES_LIMIT);
    }
}
