//! Host functions called by guests: entry, with the guest's stack, and return.

use aya_ebpf::{EbpfContext as _, bindings::pt_regs, helpers::bpf_get_attach_cookie, macros::uprobe, programs::ProbeContext};
use wasmscope_common::{
    ArgumentLocation, Counter, EMIT_HOST_CALLS, HostCall, HostCallEnd, RecordKind, STACK_TRUNCATED, SiteCookie,
};

use crate::{
    activation::{TRUNCATED, read_limits, top, walk_from_exit},
    calibrate::{calibrate, is_complete},
    maps::{SITE_HITS, add, count},
    output::{Wake, emit, emit_with_frames, header},
    thread::{current, watched},
    user::{read_user_word, register},
};

#[uprobe]
pub fn host_call(ctx: ProbeContext) -> u32 {
    let Some(config) = watched() else { return 0 };
    // SAFETY: a pointer into a map value.
    if unsafe { (*config).flags } & EMIT_HOST_CALLS == 0 {
        return 0;
    }
    // SAFETY: as above.
    let Some(thread) = current(unsafe { &*config }) else { return 0 };
    let cookie = cookie(&ctx);
    hit(cookie.site());
    // SAFETY: the context of a uprobe is the thread's registers.
    let regs = unsafe { &*ctx.regs };
    let callee = argument(regs, cookie.first());
    let caller = argument(regs, cookie.second());
    let stack_pointer = regs.rsp;

    // SAFETY: this thread's own entry.
    let state = unsafe { &mut *thread };
    let mut activation = top(state);
    if !is_complete(state) {
        activation = calibrate(thread, config, stack_pointer);
    }
    // SAFETY: as above.
    let state = unsafe { &mut *thread };
    let record: *mut HostCall = state.record.as_mut_ptr().cast();
    let mut head = header(RecordKind::HostCall);
    let mut frame_count = 0;
    let mut entry_handler = 0;
    if activation == 0 {
        count(Counter::Uncalibrated);
    } else if read_limits(state, activation) {
        entry_handler = state.limits.entry_handler;
        // SAFETY: the workspace is as large and as aligned as the largest record.
        let walked = walk_from_exit(state, unsafe { &mut (*record).frames });
        frame_count = walked & 0xff;
        head.flags = if walked & TRUNCATED == 0 { 0 } else { STACK_TRUNCATED };
    } else {
        count(Counter::ActivationUnreadable);
    }
    head.frame_count = frame_count as u16;
    // SAFETY: as above.
    unsafe {
        (*record).header = head;
        (*record).activation = activation;
        (*record).entry_handler = entry_handler;
        (*record).callee = callee;
        (*record).caller = caller;
        (*record).site = u64::from(cookie.site());
        (*record).stack_pointer = stack_pointer;
    }
    emit_with_frames(record, core::mem::offset_of!(HostCall, frames), frame_count);
    0
}

/// On the host function's own `ret`: unlike a return probe, this changes nothing on the thread's stack.
#[uprobe]
pub fn host_call_end(ctx: ProbeContext) -> u32 {
    let Some(config) = watched() else { return 0 };
    // SAFETY: a pointer into a map value.
    if unsafe { (*config).flags } & EMIT_HOST_CALLS == 0 {
        return 0;
    }
    let cookie = cookie(&ctx);
    hit(cookie.site());
    // SAFETY: the context of a uprobe is the thread's registers.
    let regs = unsafe { &*ctx.regs };
    emit(
        &HostCallEnd {
            header: header(RecordKind::HostCallEnd),
            site: u64::from(cookie.site()),
            stack_pointer: regs.rsp,
            succeeded: regs.rax & 1,
        },
        Wake::Later,
    );
    0
}

#[inline(always)]
fn cookie(ctx: &ProbeContext) -> SiteCookie {
    // SAFETY: the pointer is this program's context.
    SiteCookie(unsafe { bpf_get_attach_cookie(ctx.as_ptr()) })
}

#[inline(always)]
fn hit(site: u32) {
    if let Some(hits) = SITE_HITS.get_ptr_mut(site) {
        add(hits, 1);
    }
}

#[inline(always)]
fn argument(regs: &pt_regs, location: ArgumentLocation) -> u64 {
    match location {
        ArgumentLocation::Register(number) => register(regs, number),
        ArgumentLocation::Stack(offset) => read_user_word(regs.rsp + u64::from(offset)).unwrap_or(0),
        ArgumentLocation::Lost => 0,
    }
}
