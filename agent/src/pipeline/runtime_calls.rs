//! What guest code calls wasmtime for: growth, fuel, epochs, traps; and where in the guest that was.
//!
//! wasmtime 48: `crates/wasmtime/src/runtime/vm/libcalls.rs`. The functions take the caller's `VMContext`, then operands.

use wasmscope_common::{Mark, MarkEnd, SiteKind};

use super::Pipeline;
use crate::{
    decode::Record,
    event::{Event, EventKind, RuntimeCall, RuntimeResult, WantedGrowth},
    process::guests::Place,
    span::InterruptionCause,
};

/// `memory_grow` and `table_grow` return this when nothing has grown.
const GROWTH_REFUSED: u64 = u64::MAX;
/// `memory_grow` and `table_grow` return this when the guest is to be unwound.
const GROWTH_UNWINDS: u64 = u64::MAX - 1;
/// Of a module whose declarations cannot be read: the proposal for other sizes is off unless an embedder turns it on.
const DEFAULT_PAGE_BYTES: u64 = 65_536;
/// `new_epoch` returns this when the guest is to be unwound, else the next deadline.
const EPOCH_UNWINDS: u64 = u64::MAX;

impl Pipeline {
    /// One of them was entered.
    pub(super) fn runtime_call(&mut self, kind: SiteKind, mark: &Mark, record: &Record, events: &mut Vec<Event>) {
        let (pid, tid, at_ns) = (mark.header.pid, mark.header.tid, mark.header.at_ns);
        let entry = self.function(pid, mark.entry_handler, events);
        let stack = self.stack(pid, record.frames(), events);
        let call_site = record.frames().first().copied();
        let place = self.place_of_call(pid, call_site);
        let call = match kind {
            SiteKind::MemoryGrow => RuntimeCall::MemoryGrow(self.wanted_growth(pid, call_site, kind, mark)),
            SiteKind::TableGrow => RuntimeCall::TableGrow(self.wanted_growth(pid, call_site, kind, mark)),
            SiteKind::OutOfFuel => RuntimeCall::Interruption {
                cause: InterruptionCause::Fuel,
            },
            SiteKind::EpochDeadline => RuntimeCall::Interruption {
                cause: InterruptionCause::Epoch,
            },
            SiteKind::ReportedTrap => {
                let code = self.reported_trap(pid, call_site, mark.arguments[1] as u8);
                events.push(Event {
                    at_ns,
                    pid,
                    tid,
                    kind: EventKind::Trap {
                        activation: mark.activation,
                        entry,
                        code,
                        stack,
                        native_offset: place.native_offset,
                        wasm_offset: place.wasm_offset,
                    },
                });
                return;
            }
            // Nothing else is sent here.
            _ => {
                events.push(Event {
                    at_ns,
                    pid,
                    tid,
                    kind: EventKind::Raise {
                        activation: mark.activation,
                        entry,
                        code: self.raised_trap(pid, call_site).map(str::to_owned),
                        stack,
                        native_offset: place.native_offset,
                        wasm_offset: place.wasm_offset,
                    },
                });
                return;
            }
        };
        events.push(Event {
            at_ns,
            pid,
            tid,
            kind: EventKind::RuntimeCall {
                activation: mark.activation,
                entry,
                call,
                stack_pointer: mark.stack_pointer,
                stack,
                truncated: record.is_truncated(),
                native_offset: place.native_offset,
                wasm_offset: place.wasm_offset,
            },
        });
    }

    pub(super) fn is_guest_code(&mut self, pid: u32, address: u64) -> bool {
        let watched = self.processes.get_mut(&pid);
        watched.is_some_and(|watched| watched.guests.contains(address))
    }

    /// The kind and place of a trap that a signal tells.
    pub(super) fn trap(&mut self, pid: u32, address: u64, signal: u64) -> (String, Place) {
        let guests = self.processes.get_mut(&pid).map(|watched| &mut watched.guests);
        guests
            .and_then(|guests| Some((guests.trap_code(address)?.to_owned(), guests.place(address)?)))
            .unwrap_or_else(|| (format!("signal_{signal}"), Place::default()))
    }

    /// Where the call is that returns to `call_site`.
    fn place_of_call(&mut self, pid: u32, call_site: Option<u64>) -> Place {
        let guests = self.processes.get_mut(&pid).map(|watched| &mut watched.guests);
        let place = guests.zip(call_site).and_then(|(guests, call_site)| {
            // As wasmtime does it for its backtraces: the instruction that the call itself is in.
            let call = guests.place(call_site.checked_sub(1)?)?;
            Some(Place {
                native_offset: call.native_offset + 1,
                ..call
            })
        });
        place.unwrap_or_default()
    }

    /// `index` is among the memories or tables that `instance` does not import. Where the asking module imports what
    /// grows, `instance` is another one, of which nothing is known here.
    fn wanted_growth(&mut self, pid: u32, call_site: Option<u64>, kind: SiteKind, mark: &Mark) -> WantedGrowth {
        let [instance, first, second, _] = mark.arguments;
        let (index, delta) = match kind {
            SiteKind::MemoryGrow => (second as u32, first),
            _ => (first as u32, second),
        };
        let guests = self.processes.get_mut(&pid).map(|watched| &mut watched.guests);
        let limits = guests
            .zip(call_site)
            .and_then(|(guests, call_site)| guests.declared_limits(call_site.saturating_sub(1)))
            .filter(|limits| !limits.imports_growable);
        let position = index as usize;
        let (page_bytes, maximum) = if kind == SiteKind::MemoryGrow {
            let memory = limits.and_then(|limits| limits.memories.get(position));
            (
                Some(memory.map_or(DEFAULT_PAGE_BYTES, |memory| memory.page_bytes)),
                memory.and_then(|memory| memory.maximum),
            )
        } else {
            let table = limits.and_then(|limits| limits.tables.get(position));
            (None, table.and_then(|table| table.maximum))
        };
        WantedGrowth {
            instance,
            index,
            delta,
            page_bytes,
            maximum,
        }
    }

    fn reported_trap(&mut self, pid: u32, call_site: Option<u64>, code: u8) -> String {
        let guests = self.processes.get_mut(&pid).map(|watched| &mut watched.guests);
        let name = guests
            .zip(call_site)
            .and_then(|(guests, call_site)| guests.trap_name(call_site.saturating_sub(1), code));
        name.map_or_else(|| format!("trap_{code}"), str::to_owned)
    }

    /// The trap that a guest is unwound with after a call of the runtime that can fail in one way only.
    fn raised_trap(&mut self, pid: u32, call_site: Option<u64>) -> Option<&'static str> {
        let watched = self.processes.get_mut(&pid)?;
        let builtin = watched.guests.builtin(&watched.memory, call_site?)?;
        // Up to wasmtime 47 these check bounds themselves; later ones are told what has been checked.
        match &*builtin {
            "memory_copy" | "memory_fill" | "memory_init" => Some("memory_out_of_bounds"),
            "table_copy" | "table_fill_func_ref" | "table_fill_gc_ref" | "table_init" => Some("table_out_of_bounds"),
            "out_of_gas" => Some(InterruptionCause::Fuel.trap_code()),
            _ => None,
        }
    }
}

/// One of them is about to return.
pub(super) fn runtime_call_end(kind: SiteKind, end: &MarkEnd, events: &mut Vec<Event>) {
    let result = match (kind, end.result) {
        (SiteKind::MemoryGrow | SiteKind::TableGrow, GROWTH_REFUSED) => RuntimeResult::Refused,
        (SiteKind::MemoryGrow | SiteKind::TableGrow, GROWTH_UNWINDS) | (SiteKind::EpochDeadline, EPOCH_UNWINDS) => {
            RuntimeResult::Unwinds
        }
        (SiteKind::MemoryGrow | SiteKind::TableGrow, old) => RuntimeResult::Grown { old },
        // A `bool`: the rest of the register says nothing.
        (SiteKind::OutOfFuel, result) if result as u8 == 0 => RuntimeResult::Unwinds,
        _ => RuntimeResult::Continued,
    };
    events.push(Event {
        at_ns: end.header.at_ns,
        pid: end.header.pid,
        tid: end.header.tid,
        kind: EventKind::RuntimeCallEnd {
            stack_pointer: end.stack_pointer,
            result,
        },
    });
}
