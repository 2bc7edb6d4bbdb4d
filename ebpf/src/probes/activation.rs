//! The function that swaps a thread's activation record: wasm entered or left, fiber resumed or suspended.

use aya_ebpf::{macros::uprobe, programs::ProbeContext};
use wasmscope_common::{ActivationSwap, EMIT_ACTIVATIONS, RecordKind, SLOT_UNKNOWN, Unwind};

use crate::{
    activation::{read_limits, top},
    calibrate::{calibrate, is_complete},
    output::{Wake, emit, header},
    thread::{LEFT_AFTER_TRAP, TRAPPED, current, watched},
};

/// On entry of `tls::raw::replace(new)`.
#[uprobe]
pub fn activation_swap(ctx: ProbeContext) -> u32 {
    let Some(config) = watched() else { return 0 };
    // SAFETY: a pointer into a map value.
    if unsafe { (*config).flags } & EMIT_ACTIVATIONS == 0 {
        return 0;
    }
    // SAFETY: as above.
    let Some(thread) = current(unsafe { &*config }) else {
        return 0;
    };
    // SAFETY: the context of a uprobe is the thread's registers.
    let (new, stack_pointer) = unsafe { ((*ctx.regs).rdi, (*ctx.regs).rsp) };
    // SAFETY: this thread's own entry.
    let state = unsafe { &mut *thread };
    // A nested activation that trapped leaves its caller's fields stale until the runtime has dealt with the error, that
    // is for the rest of the host call that it was nested in.
    state.trapped = if state.trapped == TRAPPED && new != 0 {
        LEFT_AFTER_TRAP
    } else {
        0
    };
    let old = top(state);
    let mut entry_handler = 0;
    if old != 0 {
        if !is_complete(state) {
            calibrate::<false>(thread, config, stack_pointer);
        }
        // SAFETY: as above.
        let state = unsafe { &mut *thread };
        if is_complete(state) && read_limits(state, old) {
            entry_handler = state.limits.entry_handler;
        }
    }
    let mut head = header(RecordKind::ActivationSwap);
    // SAFETY: as above.
    if unsafe { (*thread).slot } == 0 {
        head.flags = SLOT_UNKNOWN;
    }
    emit(
        &ActivationSwap {
            header: head,
            old,
            new,
            stack_pointer,
            entry_handler,
        },
        Wake::Later,
    );
    0
}

/// On entry of the function that turns a trap or host error into an error value.
#[uprobe]
pub fn unwind(_ctx: ProbeContext) -> u32 {
    let Some(config) = watched() else { return 0 };
    // SAFETY: a pointer into a map value.
    if unsafe { (*config).flags } & EMIT_ACTIVATIONS != 0 {
        emit(
            &Unwind {
                header: header(RecordKind::Unwind),
            },
            Wake::Later,
        );
    }
    0
}
