//! Signals that the runtime turns into traps of the guest.

use aya_ebpf::{
    bindings::pt_regs,
    helpers::generated::{bpf_get_current_task_btf, bpf_task_pt_regs},
    macros::raw_tracepoint,
    programs::RawTracePointContext,
};
use wasmscope_common::{AGGREGATE_INVOCATIONS, Counter, EMIT_ACTIVATIONS, RecordKind, STACK_TRUNCATED, Trap};

use crate::{
    activation::{TRUNCATED, innermost, read_limits, top, walk},
    aggregate,
    calibrate::{UNKNOWN, calibrate, is_complete},
    maps::count,
    output::{emit_with_frames, header_at, now},
    thread::{NO_COPY, TRAPPED, current, select, watched},
    user::read_kernel,
};

/// SIGILL, SIGTRAP, SIGBUS, SIGFPE, SIGSEGV.
const TRAP_SIGNALS: [u64; 5] = [4, 5, 7, 8, 11];

#[raw_tracepoint(tracepoint = "signal_deliver")]
pub fn signal_deliver(ctx: RawTracePointContext) -> i32 {
    let signal: u64 = ctx.arg::<u64>(0) & 0xffff_ffff;
    if !TRAP_SIGNALS.contains(&signal) {
        return 0;
    }
    let Some(config) = watched() else { return 0 };
    // SAFETY: a pointer into a map value.
    let flags = unsafe { (*config).flags };
    if flags & (EMIT_ACTIVATIONS | AGGREGATE_INVOCATIONS) == 0 {
        return 0;
    }
    // SAFETY: as above.
    let Some(thread) = current(unsafe { &*config }) else {
        return 0;
    };
    // SAFETY: this thread's own entry.
    let (code_start, code_end) = unsafe { ((*thread).code_start, (*thread).code_end) };
    // SAFETY: the task is the current one; its registers were saved on kernel entry.
    let regs = unsafe { bpf_task_pt_regs(bpf_get_current_task_btf()) } as u64;
    let mut instruction_pointer = 0u64;
    let mut frame_pointer = 0u64;
    let mut stack_pointer = 0u64;
    let readable = read_kernel(
        &raw mut instruction_pointer,
        regs + core::mem::offset_of!(pt_regs, rip) as u64,
    ) && read_kernel(
        &raw mut frame_pointer,
        regs + core::mem::offset_of!(pt_regs, rbp) as u64,
    ) && read_kernel(
        &raw mut stack_pointer,
        regs + core::mem::offset_of!(pt_regs, rsp) as u64,
    );
    if !readable || instruction_pointer < code_start || instruction_pointer >= code_end {
        // Host code crashed, or somebody sent a signal: not a trap of the guest.
        return 0;
    }
    // SAFETY: this thread's own entry.
    let state = unsafe { &mut *thread };
    if state.other_copies | state.copy != 0 && innermost(thread, config, stack_pointer, NO_COPY) != 0 {
        // SAFETY: as above.
        unsafe { select(&mut *thread, &*config, (*thread).innermost) };
    }
    // SAFETY: as above.
    let state = unsafe { &mut *thread };
    let mut activation = top(state);
    if !is_complete(state) {
        activation = calibrate::<false>(thread, config, stack_pointer);
    }
    if activation == 0 || activation == UNKNOWN {
        count(Counter::Uncalibrated);
        return 0;
    }
    // SAFETY: as above.
    let state = unsafe { &mut *thread };
    if !read_limits(state, activation) {
        count(Counter::ActivationUnreadable);
        return 0;
    }
    // Activations are emitted, so the swap that ends this one is seen and takes the mark away.
    state.trapped = TRAPPED;
    state.at_ns = now();
    if flags & AGGREGATE_INVOCATIONS != 0 {
        aggregate::trapped(thread, activation);
        if flags & EMIT_ACTIVATIONS == 0 {
            return 0;
        }
    }
    // SAFETY: as above.
    let state = unsafe { &mut *thread };
    let record: *mut Trap = state.record.as_mut_ptr().cast();
    // SAFETY: the workspace is as large and as aligned as the largest record.
    let frames = unsafe { &mut (*record).frames };
    frames[0] = instruction_pointer;
    let walked = walk(state, frames, frame_pointer);
    let entry = state.limits.entry_handler;
    let frame_count = walked & 0xff;
    let mut head = header_at(RecordKind::Trap, state.at_ns);
    head.frame_count = frame_count as u16;
    head.flags = if walked & TRUNCATED == 0 { 0 } else { STACK_TRUNCATED };
    // SAFETY: as above.
    unsafe {
        (*record).header = head;
        (*record).activation = activation;
        (*record).entry_handler = entry;
        (*record).signal = signal;
        (*record).instruction_pointer = instruction_pointer;
    }
    emit_with_frames(record, core::mem::offset_of!(Trap, frames), frame_count);
    0
}
