//! The function that swaps a thread's activation record: wasm entered or left, fiber resumed or suspended.

use aya_ebpf::{macros::uprobe, programs::ProbeContext};
use wasmscope_common::{
    AGGREGATE_INVOCATIONS, ActivationSwap, EMIT_ACTIVATIONS, HIT_ACTIVATION, MAX_COPIES, RecordKind, SLOT_UNKNOWN,
    Unwind,
};

use crate::{
    activation::{entry_handler, inner, innermost, read_limits, top},
    aggregate,
    calibrate::{UNKNOWN, calibrate, is_complete},
    maps::hit,
    output::{Wake, emit, header, header_at, now},
    thread::{LEFT_AFTER_TRAP, NO_COPY, TRAPPED, current, select_file, task, watched},
    user::cookie,
};

/// An activation that is being left has its frames just below the stack pointer.
const LEFT_FRAMES_BYTES: u64 = 4096;

/// On entry of `tls::raw::replace(new)`.
#[uprobe]
pub fn activation_swap(ctx: ProbeContext) -> u32 {
    let Some(config) = watched() else { return 0 };
    hit(HIT_ACTIVATION);
    // SAFETY: a pointer into a map value.
    let flags = unsafe { (*config).flags };
    if flags & (EMIT_ACTIVATIONS | AGGREGATE_INVOCATIONS) == 0 {
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
    // SAFETY: as above.
    select_file(state, unsafe { &*config }, cookie(&ctx).file());
    let mut own = top(state);
    let mut entry = 0;
    if !is_complete(state) {
        let found = calibrate::<false>(thread, config, stack_pointer - LEFT_FRAMES_BYTES);
        if found != UNKNOWN {
            own = found;
        }
    }
    if own != 0 {
        // SAFETY: as above.
        let state = unsafe { &mut *thread };
        if is_complete(state) && read_limits(state, own) {
            entry = entry_handler(state);
        }
    }
    // SAFETY: as above.
    unsafe { (*thread).at_ns = now() };
    if flags & AGGREGATE_INVOCATIONS != 0 {
        // SAFETY: as above.
        let state = unsafe { &mut *thread };
        let known = if state.slot == 0 {
            aggregate::announced(state)
        } else {
            own
        };
        aggregate::swapped(thread, known, new, stack_pointer, entry);
        // SAFETY: as above.
        let state = unsafe { &mut *thread };
        if state.copy != NO_COPY {
            state.copies[state.copy as usize & (MAX_COPIES - 1)].announced = new;
        }
        if flags & EMIT_ACTIVATIONS == 0 {
            return 0;
        }
    }
    let (mut old, mut replacement) = (own, new);
    // SAFETY: as above.
    let state = unsafe { &mut *thread };
    if state.other_copies != 0 {
        // The record is of the whole thread: what is on top of it may be another copy's.
        let other = innermost(thread, config, stack_pointer, state.copy);
        old = inner(own, other, stack_pointer);
        replacement = inner(new, other, stack_pointer);
        if old != own {
            entry = 0;
        }
        // SAFETY: as above.
        let state = unsafe { &mut *thread };
        if state.copy != NO_COPY {
            state.copies[state.copy as usize & (MAX_COPIES - 1)].announced = new;
        }
    }
    // SAFETY: as above.
    let mut head = header_at(RecordKind::ActivationSwap, unsafe { (*thread).at_ns });
    if new != 0 {
        // SAFETY: a pointer into a map value.
        head.task = task(unsafe { &*config });
    }
    // SAFETY: as above.
    if unsafe { (*thread).slot } == 0 {
        head.flags = SLOT_UNKNOWN;
    }
    emit(
        &ActivationSwap {
            header: head,
            old,
            new: replacement,
            stack_pointer,
            entry_handler: entry,
        },
        Wake::Later,
    );
    0
}

/// On entry of the function that turns a trap or host error into an error value.
#[uprobe]
pub fn unwind(_ctx: ProbeContext) -> u32 {
    let Some(config) = watched() else { return 0 };
    hit(HIT_ACTIVATION);
    // SAFETY: a pointer into a map value.
    let flags = unsafe { (*config).flags };
    if flags & AGGREGATE_INVOCATIONS != 0
        // SAFETY: as above.
        && let Some(thread) = current(unsafe { &*config })
    {
        aggregate::unwound(thread);
    }
    if flags & EMIT_ACTIVATIONS != 0 {
        emit(
            &Unwind {
                header: header(RecordKind::Unwind),
            },
            Wake::Later,
        );
    }
    0
}
