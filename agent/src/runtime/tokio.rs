//! tokio's pool of helper threads, to which asynchronous hosts hand what would block: where a task is handed over, where a
//! helper calls it, and where it is done.
//!
//! A task keeps its address from the hand-over to its end, which links the two threads exactly. tokio 1.x:
//! `runtime/blocking/pool.rs` (`Spawner::spawn_task`, the loop of `Inner::run`), `runtime/task/core.rs` (`Header` begins with
//! its `State`), `runtime/task/harness.rs` (the task's own code is over when `State::transition_to_complete` is called; what
//! follows wakes who waits for it).

use wasmscope_common::{ArgumentLocation, SiteKind};

use super::{
    PlannedSite, ProbePlan,
    wasmtime::{location, read_code},
};
use crate::{
    bpf::SiteProgram,
    image::{
        ReadAt,
        call_sites::indirect_calls,
        exchange::exchanged_field,
        host::{HostFunction, HostSymbols, TlsModel},
        prologue,
    },
};

/// In x86 numbering.
const RDX: u8 = 2;
/// In x86 numbering.
const RSI: u8 = 6;
/// In x86 numbering.
const RDI: u8 = 7;
/// Calls probed in one of the pool's functions; they have about a dozen.
const MAX_CALLS: usize = 64;

impl ProbePlan {
    /// Plans the sites of the pool of helper threads if all that is needed to follow them is there; says so if not.
    pub(super) fn follow_helpers(&mut self, symbols: &HostSymbols, file: &dyn ReadAt) {
        let (spawn, run) = (&symbols.helper_spawn, &symbols.helper_run);
        if spawn.is_empty() && run.is_empty() {
            return;
        }
        let before = self.sites.len();
        for function in run {
            self.around_calls(function, file);
        }
        let has_calls = self.sites.len() > before;
        // A helper can also become a worker that runs everybody's tasks; without the place where it does, it would be taken
        // to do all that for whoever it worked for last. And what wakes the one who waits is not part of the work.
        if spawn.is_empty() || !has_calls || symbols.worker_run.is_empty() || symbols.task_complete.is_empty() {
            self.sites.truncate(before);
            self.limits.push(
                "tokio's helper threads cannot be followed: what they do for a host call is not shown".to_owned(),
            );
            return;
        }
        let in_registers = |first: u8, second| [ArgumentLocation::Register(first), second];
        for function in spawn {
            let places = in_registers(RSI, ArgumentLocation::Register(RDX));
            self.at_entry(SiteKind::HelperSpawn, function, file, places);
        }
        for function in &symbols.task_complete {
            let places = in_registers(RDI, ArgumentLocation::Lost);
            self.at_entry(SiteKind::HelperRest, function, file, places);
        }
        for function in &symbols.worker_run {
            self.at_entry(SiteKind::HelperRest, function, file, [ArgumentLocation::Lost; 2]);
        }
    }

    /// On the first instruction.
    fn at_entry(
        &mut self,
        kind: SiteKind,
        function: &HostFunction,
        file: &dyn ReadAt,
        arguments: [ArgumentLocation; 2],
    ) {
        let code = read_code(function, file);
        let point = prologue::entry_point(&code, function.address, [true; prologue::ARGUMENT_COUNT]);
        self.sites.push(PlannedSite {
            program: SiteProgram::Helper,
            kind,
            file_offset: function.file_offset,
            arguments,
            frame_bytes: 0,
            condition: None,
            emulated: point.offset == 0 && point.emulated,
            function: function.path,
        });
    }

    /// Before and after every call through a pointer: whether it is a task that is called there shows when it is.
    fn around_calls(&mut self, function: &HostFunction, file: &dyn ReadAt) {
        let code = read_code(function, file);
        let mut calls = indirect_calls(&code, function.address);
        calls.truncate(MAX_CALLS);
        for call in &calls {
            for (kind, offset, argument, emulated) in [
                (SiteKind::HelperRun, call.before, location(call.argument), false),
                (
                    SiteKind::HelperRest,
                    call.after,
                    ArgumentLocation::Lost,
                    call.after_is_emulated,
                ),
            ] {
                let site = PlannedSite {
                    program: SiteProgram::Helper,
                    kind,
                    file_offset: function.file_offset + u64::from(offset),
                    arguments: [argument, ArgumentLocation::Lost],
                    frame_bytes: 0,
                    condition: None,
                    emulated,
                    function: function.path,
                };
                // Two calls can share what comes after them. Where the next call begins, that is what counts.
                let is_next = kind == SiteKind::HelperRest && calls.iter().any(|next| next.before == offset);
                if !is_next && !self.sites.contains(&site) {
                    self.sites.push(site);
                }
            }
        }
    }
}

/// Bytes from the thread pointer to the number of the task that a thread runs, if it is known where that is: numbers are never
/// used again, and 0 outside of tasks. tokio 1.x: `runtime/task/core.rs` (`TaskIdGuard`), `runtime/context.rs`
/// (`set_current_task_id`).
pub(super) fn task_offset(symbols: &HostSymbols, file: &dyn ReadAt) -> Option<i32> {
    let TlsModel::LocalExec { thread_pointer_offset } = symbols.task_context?.model else {
        return None;
    };
    // One of the two calls the other, or both have the same code.
    let mut found: Vec<_> = symbols
        .task_enter
        .iter()
        .filter_map(|function| exchanged_field(&read_code(function, file), function.address))
        .collect();
    found.dedup();
    let [field] = found[..] else { return None };
    i32::try_from(thread_pointer_offset.checked_add(field)?)
        .ok()
        .filter(|offset| *offset < 0)
}
