//! Functions of the runtime that are called seldom: entry, with the guest's stack if guest code called, and return.

use aya_ebpf::{macros::uprobe, programs::ProbeContext};
use wasmscope_common::{Counter, EMIT_ACTIVATIONS, HIT_MARK, Mark, MarkEnd, RecordKind, STACK_TRUNCATED, SiteKind};

use crate::{
    activation::{TRUNCATED, read_limits, top, walk_from_exit},
    calibrate::{UNKNOWN, calibrate, is_complete},
    maps::{count, hit},
    output::{Wake, emit, emit_with_frames, header},
    thread::{current, select_file, watched},
    user::{cookie, read_user_word},
};

/// On the first instruction of a function.
#[uprobe]
pub fn mark(ctx: ProbeContext) -> u32 {
    let Some(config) = watched() else { return 0 };
    hit(HIT_MARK);
    // SAFETY: a pointer into a map value.
    if unsafe { (*config).flags } & EMIT_ACTIVATIONS == 0 {
        return 0;
    }
    // SAFETY: as above.
    let Some(thread) = current(unsafe { &*config }) else {
        return 0;
    };
    // SAFETY: the context of a uprobe is the thread's registers.
    let regs = unsafe { &*ctx.regs };
    let (mut arguments, stack_pointer) = ([regs.rdi, regs.rsi, regs.rdx, regs.rcx], regs.rsp);
    let cookie = cookie(&ctx);
    if cookie.kind() == SiteKind::RegisterModule as u8 {
        arguments[3] = read_user_word(arguments[2]).unwrap_or(0);
    }
    // SAFETY: this thread's own entry, and as above.
    select_file(unsafe { &mut *thread }, unsafe { &*config }, cookie.file());
    // SAFETY: this thread's own entry.
    let mut activation = top(unsafe { &*thread });
    // SAFETY: as above.
    if !is_complete(unsafe { &*thread }) {
        activation = calibrate::<false>(thread, config, stack_pointer);
        if activation == UNKNOWN {
            activation = 0;
        }
    }
    // SAFETY: as above.
    let state = unsafe { &mut *thread };
    let record: *mut Mark = state.record.as_mut_ptr().cast();
    let mut head = header(RecordKind::Mark);
    let mut frame_count = 0;
    let mut entry = 0;
    if activation != 0 {
        if read_limits(state, activation) {
            // SAFETY: the workspace is as large and as aligned as the largest record.
            let walked = walk_from_exit(state, unsafe { &mut (*record).frames }, stack_pointer);
            entry = state.limits.entry_handler;
            frame_count = walked & 0xff;
            head.flags = if walked & TRUNCATED == 0 { 0 } else { STACK_TRUNCATED };
        } else {
            count(Counter::ActivationUnreadable);
        }
    }
    head.frame_count = frame_count as u16;
    // SAFETY: as above.
    unsafe {
        (*record).header = head;
        (*record).site_kind = u64::from(cookie.kind());
        (*record).activation = activation;
        (*record).entry_handler = entry;
        (*record).stack_pointer = stack_pointer;
        (*record).arguments = arguments;
    }
    emit_with_frames(record, core::mem::offset_of!(Mark, frames), frame_count);
    0
}

/// On a `ret` of such a function.
#[uprobe]
pub fn mark_end(ctx: ProbeContext) -> u32 {
    let Some(config) = watched() else { return 0 };
    hit(HIT_MARK);
    // SAFETY: a pointer into a map value.
    if unsafe { (*config).flags } & EMIT_ACTIVATIONS == 0 {
        return 0;
    }
    // SAFETY: the context of a uprobe is the thread's registers.
    let regs = unsafe { &*ctx.regs };
    emit(
        &MarkEnd {
            header: header(RecordKind::MarkEnd),
            site_kind: u64::from(cookie(&ctx).kind()),
            stack_pointer: regs.rsp,
            result: regs.rax,
            second_result: regs.rdx,
        },
        Wake::Later,
    );
    0
}
