//! Syscalls that have not returned when the window ends: the programs only speak when one does.

use wasmscope_common::ThreadHead;

use super::Pipeline;
use crate::{
    event::{Event, EventKind},
    process::describe,
};

/// A thread that is in a syscall.
#[derive(Clone, Copy, Debug)]
pub(super) struct InFlight {
    tid: u32,
    head: ThreadHead,
    arguments: [u64; 3],
}

impl Pipeline {
    /// The syscalls that watched threads are in, as far as their arguments can be told.
    pub(super) fn in_flight(&self) -> Vec<InFlight> {
        let mut threads = self.kernel.threads();
        threads.retain(|(_, head)| head.entered_ns != 0 && self.processes.contains_key(&head.pid));
        let found: Vec<_> = threads
            .into_iter()
            .filter_map(|(tid, head)| {
                let (number, arguments) = describe::running_syscall(head.pid, tid)?;
                (number == head.syscall).then_some(InFlight { tid, head, arguments })
            })
            .collect();
        // One that went on meanwhile may be in another one of the same kind.
        let later = self.kernel.threads();
        found
            .into_iter()
            .filter(|call| later.contains(&(call.tid, call.head)))
            .collect()
    }
}

/// Events for those that have still not returned by what was handled since. Whether a thread has an activation is for the
/// correlator to know.
pub(super) fn events(calls: &[InFlight], handled: &[Event], end_ns: u64) -> Vec<Event> {
    let returned = |call: &InFlight| {
        handled.iter().any(|event| {
            event.tid == call.tid
                && event.at_ns == call.head.entered_ns
                && matches!(event.kind, EventKind::Syscall { .. })
        })
    };
    calls
        .iter()
        .filter(|call| !returned(call))
        .map(|call| {
            let by = call.head.on_behalf_of;
            Event {
                at_ns: call.head.entered_ns,
                pid: call.head.pid,
                tid: call.tid,
                kind: EventKind::Syscall {
                    activation: by.activation,
                    entry: None,
                    duration_ns: end_ns.saturating_sub(call.head.entered_ns),
                    number: call.head.syscall,
                    result: 0,
                    arguments: call.arguments,
                    stack: Vec::new(),
                    truncated: false,
                    handed_over_ns: (by.activation != 0).then_some(by.at_ns),
                    is_open: true,
                },
            }
        })
        .collect()
}
