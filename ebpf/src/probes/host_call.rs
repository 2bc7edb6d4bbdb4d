//! Host functions called by guests: entry, with the guest's stack, and return.

use aya_ebpf::{
    bindings::{BPF_RB_FORCE_WAKEUP, BPF_RB_NO_WAKEUP},
    macros::uprobe,
    programs::ProbeContext,
};
use wasmscope_common::{
    AGGREGATE_CALLS, ArgumentLocation, COMPONENT_CALL, Counter, EMIT_HOST_CALLS, HIT_HOST_CALL, HIT_HOST_CALL_END,
    HOST_FUNCTIONS_SOUGHT, HostCall, HostCallEnd, IMPORT_TABLE_BYTES, IMPORT_TABLE_CHUNK_BYTES, ImportTable,
    LAYOUT_NO_RESULT, MAX_TABLES_PER_CALL_SITE, RecordHeader, RecordKind, STACK_TRUNCATED, SeenCallSite, SeenCallee,
};

use crate::{
    activation::{TRUNCATED, read_limits, top, walk_from_exit},
    aggregate,
    calibrate::{UNKNOWN, calibrate, is_complete},
    maps::{CALL_SITES, EVENTS, count, hit},
    output::{Wake, emit, emit_with_frames, header, header_at, now},
    thread::{current, layout_of_file, select_file, watched},
    user::{argument, cookie, read_user},
};

/// Of a core module.
#[uprobe]
pub fn host_call(ctx: ProbeContext) -> u32 {
    enter::<false>(&ctx)
}

/// Of a component.
#[uprobe]
pub fn component_host_call(ctx: ProbeContext) -> u32 {
    enter::<true>(&ctx)
}

#[inline(always)]
fn enter<const IS_COMPONENT: bool>(ctx: &ProbeContext) -> u32 {
    let Some(config) = watched() else { return 0 };
    hit(HIT_HOST_CALL);
    // SAFETY: a pointer into a map value.
    let flags = unsafe { (*config).flags };
    if flags & (EMIT_HOST_CALLS | AGGREGATE_CALLS) == 0 {
        return 0;
    }
    // SAFETY: as above.
    let Some(thread) = current(unsafe { &*config }) else {
        return 0;
    };
    let cookie = cookie(ctx);
    // SAFETY: the context of a uprobe is the thread's registers.
    let regs = unsafe { &*ctx.regs };
    // SAFETY: this thread's own entry.
    let state = unsafe { &mut *thread };
    let callee = state.forget(argument(regs, cookie.first()));
    let caller = state.forget(argument(regs, cookie.second()));
    let stack_pointer = regs.rsp;
    state.trapped = 0;
    // SAFETY: as above.
    select_file(state, unsafe { &*config }, cookie.file());
    let mut activation = top(state);
    if !is_complete(state) {
        activation = calibrate::<false>(thread, config, stack_pointer);
    }
    // SAFETY: as above.
    let state = unsafe { &mut *thread };
    let record: *mut HostCall = state.record.as_mut_ptr().cast();
    let mut head = header(RecordKind::HostCall);
    state.at_ns = head.at_ns;
    let mut frame_count = 0;
    let mut entry = 0;
    let walks = flags & EMIT_HOST_CALLS != 0;
    let is_known = activation != 0 && activation != UNKNOWN;
    let is_readable = is_known && read_limits(state, activation);
    if !is_known {
        activation = 0;
        count(Counter::Uncalibrated);
    }
    if flags & AGGREGATE_CALLS != 0 {
        // Before the walk, whose many ends would each be followed by the verifier.
        if !is_readable {
            state.limits.exit_pc = 0;
            state.limits.entry_handler = 0;
        }
        let on_top = if is_known { activation } else { aggregate::on_top(state) };
        let frame = stack_pointer + cookie.frame_bytes();
        if IS_COMPONENT {
            aggregate::call_began(thread, on_top, caller, frame, u64::from(COMPONENT_CALL));
        } else {
            aggregate::call_began(thread, on_top, callee, frame, 0);
        }
    }
    // SAFETY: as above.
    let state = unsafe { &mut *thread };
    if !walks {
        if is_known && !is_readable {
            count(Counter::ActivationUnreadable);
        }
    } else if is_readable {
        // SAFETY: the workspace is as large and as aligned as the largest record.
        let walked = walk_from_exit(state, unsafe { &mut (*record).frames }, stack_pointer);
        entry = state.limits.entry_handler;
        frame_count = walked & 0xff;
        head.flags = if walked & TRUNCATED == 0 { 0 } else { STACK_TRUNCATED };
    } else if is_known {
        count(Counter::ActivationUnreadable);
    }
    head.frame_count = frame_count as u16;
    if IS_COMPONENT {
        head.flags |= COMPONENT_CALL;
    } else {
        // SAFETY: as above.
        let call_site = if !walks {
            state.limits.exit_pc
        } else if frame_count == 0 {
            0
        } else {
            unsafe { (*record).frames[0] }
        };
        // SAFETY: a pointer into a map value.
        announce_callee(&head, call_site, callee, caller, unsafe { (*config).generation });
    }
    if !walks {
        return 0;
    }
    // SAFETY: as above.
    unsafe {
        (*record).header = head;
        (*record).activation = activation;
        (*record).entry_handler = entry;
        (*record).callee = callee;
        (*record).caller = caller;
        (*record).frame = stack_pointer + cookie.frame_bytes();
    }
    emit_with_frames(record, core::mem::offset_of!(HostCall, frames), frame_count);
    0
}

/// Where every return of a host function passes: unlike a return probe, this changes nothing on the thread's stack.
#[uprobe]
pub fn host_call_end(ctx: ProbeContext) -> u32 {
    let Some(config) = watched() else { return 0 };
    hit(HIT_HOST_CALL_END);
    // SAFETY: a pointer into a map value.
    let flags = unsafe { (*config).flags };
    if flags & (EMIT_HOST_CALLS | AGGREGATE_CALLS) == 0 {
        return 0;
    }
    // SAFETY: the context of a uprobe is the thread's registers.
    let regs = unsafe { &*ctx.regs };
    let cookie = cookie(&ctx);
    if cookie
        .condition()
        .is_some_and(|condition| !holds(condition, regs.eflags))
    {
        return 0;
    }
    // SAFETY: a pointer into a map value.
    let layout = layout_of_file(unsafe { &*config }, cookie.file());
    let succeeded = match cookie.first() {
        // Where they return nothing, they do not return at all if they fail; which versions those are is not known yet
        // without a layout.
        _ if layout == 0 || layout & LAYOUT_NO_RESULT != 0 => 1,
        ArgumentLocation::Constant(value) => u64::from(value),
        _ => regs.rax & 1,
    };
    let frame = regs.rsp + cookie.frame_bytes();
    let at_ns = now();
    if flags & AGGREGATE_CALLS != 0 {
        // SAFETY: a pointer into a map value.
        if let Some(thread) = current(unsafe { &*config }) {
            // SAFETY: this thread's own entry, and a pointer into a map value.
            unsafe {
                (*thread).at_ns = at_ns;
                select_file(&mut *thread, &*config, cookie.file());
            }
            aggregate::call_ended(thread, frame, succeeded);
        }
        if flags & EMIT_HOST_CALLS == 0 {
            return 0;
        }
    }
    emit(
        &HostCallEnd {
            header: header_at(RecordKind::HostCallEnd, at_ns),
            frame,
            succeeded,
        },
        Wake::Later,
    );
    0
}

/// Whether an x86 condition holds: the low four bits of the opcode of its conditional jump.
#[inline(always)]
fn holds(condition: u8, flags: u64) -> bool {
    let bit = |number: u32| flags >> number & 1 != 0;
    let (carry, parity, zero, sign, overflow) = (bit(0), bit(2), bit(6), bit(7), bit(11));
    let base = match condition >> 1 {
        0 => overflow,
        1 => carry,
        2 => zero,
        3 => carry | zero,
        4 => sign,
        5 => parity,
        6 => sign != overflow,
        _ => zero | (sign != overflow),
    };
    base != (condition & 1 != 0)
}

/// Sends the caller's import table, once per callee of a call site.
#[inline(always)]
fn announce_callee(head: &RecordHeader, call_site: u64, callee: u64, caller: u64, generation: u32) {
    let key = SeenCallSite {
        call_site,
        pid: head.pid,
        generation,
    };
    let mut sent = 0;
    if let Some(seen) = CALL_SITES.get_ptr(&key) {
        // SAFETY: a pointer into a map value.
        let seen = unsafe { *seen };
        if seen.callee == callee || seen.sent >= u64::from(MAX_TABLES_PER_CALL_SITE) {
            return;
        }
        sent = seen.sent;
    }
    if send_table(head, call_site, callee, caller, 0) {
        // A failure means that it will be sent again.
        let _ = CALL_SITES.insert(&key, &SeenCallee { callee, sent: sent + 1 }, 0);
    }
}

/// Sends the caller's import table, as far as it can be read; `false` if there was no room.
#[inline(always)]
pub fn send_table(head: &RecordHeader, call_site: u64, callee: u64, caller: u64, flags: u8) -> bool {
    count(Counter::Emitted);
    let Some(mut entry) = EVENTS.reserve::<ImportTable>(0) else {
        count(Counter::RingFull);
        return false;
    };
    let table = entry.as_mut_ptr();
    // SAFETY: the reservation is as large and as aligned as the record.
    unsafe {
        (*table).header = *head;
        (*table).header.kind = RecordKind::ImportTable as u8;
        (*table).header.frame_count = 0;
        (*table).header.flags = flags;
        (*table).callee = callee;
        (*table).caller = caller;
        (*table).call_site = call_site;
    }
    let mut length = 0usize;
    while length < IMPORT_TABLE_BYTES {
        // SAFETY: as above; `length` is a multiple of the chunk and below the end.
        let chunk: *mut [u8; IMPORT_TABLE_CHUNK_BYTES] =
            unsafe { (&raw mut (*table).vmcontext).cast::<u8>().add(length).cast() };
        if !read_user(chunk, caller + length as u64) {
            break;
        }
        length += IMPORT_TABLE_CHUNK_BYTES;
    }
    // SAFETY: as above.
    unsafe { (*table).length = length as u64 };
    let wake = if flags & HOST_FUNCTIONS_SOUGHT == 0 {
        BPF_RB_NO_WAKEUP
    } else {
        BPF_RB_FORCE_WAKEUP
    };
    entry.submit(u64::from(wake));
    true
}
