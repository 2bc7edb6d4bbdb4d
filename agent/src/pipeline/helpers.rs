//! Syscalls of helper threads, as events.

use wasmscope_common::HelperSyscall;

use crate::event::EventKind;

/// What the record says; the guest's functions are those of the host call that waits.
pub(super) fn event_kind(record: &HelperSyscall, is_open: bool) -> EventKind {
    EventKind::Syscall {
        activation: record.activation,
        entry: None,
        duration_ns: record.duration_ns,
        number: record.number,
        result: record.result,
        arguments: record.arguments,
        stack: Vec::new(),
        truncated: false,
        handed_over_ns: Some(record.handed_over_ns),
        is_open,
    }
}
