//! Syscalls of watched processes, and code that becomes executable in any.
//!
//! Entry only notes the time; the stack is walked at exit, when it is the same as at entry, so that a syscall costs one
//! record and one table look-up each way.

use aya_ebpf::{
    bindings::BPF_ANY, helpers::bpf_get_current_pid_tgid, macros::raw_tracepoint, programs::RawTracePointContext,
};
use wasmscope_common::{
    AGGREGATE_SYSCALLS, CodePublished, Counter, DOES_NOT_RETURN, EMIT_REQUESTS, EMIT_SYSCALLS, HIT_SYSCALL,
    HelperSyscall, LAYOUT_NO_HANDLER, MAX_COPIES, MAX_FRAMES, Observed, ProcessConfig, RecordKind, STACK_TRUNCATED,
    Syscall, TLS_DYNAMIC, WATCH_NEW_WASM,
};

use crate::{
    activation::{TRUNCATED, entry_handler, innermost, read_limits, top, walk_from_exit},
    aggregate,
    calibrate::{UNDECIDED, UNKNOWN, calibrate, find_announced, is_complete},
    maps::{
        NEW_PROCESS_FLAGS, OBSERVED, PROCESSES, THREADS, WATCH_FLAGS, add, count, count_undecided, generation, global,
        hit, next_generation,
    },
    output::{Wake, emit, emit_with_frames, header, header_at, now},
    probes::request,
    thread::{CopyState, NO_COPY, NOTHING_KNOWN, Thread, current, select, watched},
    user::{SyscallRegisters, read_user, read_user_word, stack_pointer},
};

const MPROTECT: u64 = 10;
const RT_SIGRETURN: u64 = 15;
const EXIT: u64 = 60;
const EXIT_GROUP: u64 = 231;
const PROT_EXEC: u64 = 4;
const PAGE_BYTES: u64 = 4096;
/// Start of an ELF image of wasmtime: magic, 64-bit, little-endian, version 1, OS/ABI 200.
const WASMTIME_ELF: [u8; 8] = [0x7f, b'E', b'L', b'F', 2, 1, 1, 200];

#[raw_tracepoint(tracepoint = "sys_enter")]
pub fn sys_enter(ctx: RawTracePointContext) -> i32 {
    let number: u64 = ctx.arg(1);
    if number == MPROTECT {
        code_published(&ctx);
    }
    let id = bpf_get_current_pid_tgid();
    let (tid, pid) = (id as u32, (id >> 32) as u32);
    let thread = match THREADS.get_ptr_mut(&tid) {
        // SAFETY: this thread's own entry.
        Some(thread) if unsafe { (*thread).seen_generation == generation() && (*thread).pid == pid } => thread,
        _ => {
            let Some(config) = watched() else { return 0 };
            // SAFETY: a pointer into a map value.
            let Some(thread) = current(unsafe { &*config }) else {
                return 0;
            };
            thread
        }
    };
    // SAFETY: this thread's own entry.
    let thread = unsafe { &mut *thread };
    if thread.flags & (EMIT_SYSCALLS | AGGREGATE_SYSCALLS) != 0 {
        thread.syscall = number;
        thread.entered_ns = now();
        if number == EXIT || number == EXIT_GROUP {
            departing(thread, ctx.arg(0));
        }
    }
    0
}

/// A thread or process ends itself: there is no exit from this syscall.
#[inline(always)]
fn departing(thread: &mut Thread, regs: u64) {
    let activation = top(thread);
    let entered_ns = thread.entered_ns;
    thread.entered_ns = 0;
    if activation != 0 && is_complete(thread) {
        record(thread, activation, entered_ns, regs, 0, DOES_NOT_RETURN);
    } else if activation == 0 && thread.on_behalf_of.activation != 0 {
        record_helper(thread, entered_ns, regs, 0, DOES_NOT_RETURN);
    }
}

#[raw_tracepoint(tracepoint = "sys_exit")]
pub fn sys_exit(ctx: RawTracePointContext) -> i32 {
    let tid = bpf_get_current_pid_tgid() as u32;
    let Some(thread) = THREADS.get_ptr_mut(&tid) else {
        return 0;
    };
    // SAFETY: this thread's own entry.
    let state = unsafe { &mut *thread };
    let entered_ns = state.entered_ns;
    if entered_ns == 0 {
        return 0;
    }
    state.entered_ns = 0;
    hit(HIT_SYSCALL);
    if state.syscall == RT_SIGRETURN {
        // Part of how the runtime handles a trap, not a call of the guest's; it leaves the registers of another moment.
        return 0;
    }
    let regs: u64 = ctx.arg(0);
    if state.other_copies | state.copy != 0 {
        let Some(config) = watched() else { return 0 };
        // SAFETY: a pointer into a map value.
        let _ = current(unsafe { &*config });
        if !select_copy(thread, config, stack_pointer(regs)) {
            count(Counter::SyscallOffActivation);
            return 0;
        }
    }
    // SAFETY: as above.
    let state = unsafe { &mut *thread };
    let mut activation = top(state);
    if !is_complete(state) {
        let Some(config) = watched() else { return 0 };
        // SAFETY: a pointer into a map value. Another thread may have completed the config.
        let _ = current(unsafe { &*config });
        activation = calibrate::<true>(thread, config, stack_pointer(regs));
        if activation == UNDECIDED && count_undecided((bpf_get_current_pid_tgid() >> 32) as u32) {
            return 0;
        }
        if activation == UNKNOWN || activation == UNDECIDED {
            count(Counter::Uncalibrated);
            return 0;
        }
    }
    let result: i64 = ctx.arg(1);
    if activation != 0 {
        record(state, activation, entered_ns, regs, result, 0);
    } else if state.on_behalf_of.activation != 0 {
        record_helper(state, entered_ns, regs, result, 0);
    } else {
        count(Counter::SyscallOffActivation);
        if state.flags & EMIT_REQUESTS != 0 && result >= 0 {
            request::observe(state, regs, result);
        }
    }
    0
}

/// Looks at the copy of the runtime whose activation is on top, else at one that it is still to be found out about. `false`
/// if a copy is just entering its first activation on this thread, so that the runtime makes the syscall for itself.
#[inline(always)]
fn select_copy(thread: *mut Thread, config: *mut ProcessConfig, stack_pointer: u64) -> bool {
    // SAFETY: both point into map values; the thread's is used by this program alone, and racing writers of the config
    // write the same values.
    let (state, known) = unsafe { (&mut *thread, &mut *config) };
    let mut entering = MAX_COPIES;
    let mut copy = 0;
    while copy < MAX_COPIES {
        // Elsewhere than in a library's block the slot is found by other means.
        if known.copies[copy].tls_kind == TLS_DYNAMIC && !has_arrived(&state.copies[copy]) {
            entering = copy;
        }
        copy += 1;
    }
    if entering != MAX_COPIES && !find_announced(state, known, entering) {
        return false;
    }
    let found = innermost(thread, config, stack_pointer, NO_COPY);
    // SAFETY: as above.
    let (thread, config) = unsafe { (&mut *thread, &*config) };
    let mut copy = 0;
    if found != 0 {
        copy = thread.innermost;
    } else {
        while copy < MAX_COPIES as u32 - 1 && thread.copies[copy as usize].slot != 0 {
            copy += 1;
        }
        if copy > thread.other_copies {
            copy = 0;
        }
    }
    select(thread, config, copy);
    true
}

/// Whether what the last swap of a copy has said is in its slot, if it has said anything.
#[inline(never)]
fn has_arrived(copy: *const CopyState) -> bool {
    // SAFETY: a pointer into this thread's own entry.
    let copy = unsafe { &*copy };
    copy.announced == 0 || copy.slot != 0 && read_user_word(copy.slot).unwrap_or(0) & !1 == copy.announced
}

#[inline(always)]
fn record(thread: &mut Thread, activation: u64, entered_ns: u64, regs: u64, result: i64, flags: u8) {
    if !read_limits(thread, activation) {
        count(Counter::ActivationUnreadable);
        return;
    }
    let Some(registers) = SyscallRegisters::read(regs) else {
        count(Counter::ActivationUnreadable);
        return;
    };
    if thread.layout & LAYOUT_NO_HANDLER != 0 && thread.flags & AGGREGATE_SYSCALLS != 0 {
        thread.limits.entry_handler = entry_handler(thread);
    }
    let mut head = header(RecordKind::Syscall);
    let duration_ns = head.at_ns - entered_ns;
    if thread.flags & AGGREGATE_SYSCALLS != 0 {
        let ended = if flags & DOES_NOT_RETURN == 0 {
            duration_ns
        } else {
            aggregate::DOES_NOT_RETURN
        };
        let moved = moved_bytes(thread.syscall, result);
        aggregate::syscall(thread, thread.limits.entry_handler, result, ended, moved);
    }
    if thread.flags & EMIT_SYSCALLS == 0 {
        return;
    }
    head.at_ns = entered_ns;
    let record: *mut Syscall = thread.record.as_mut_ptr().cast();
    // SAFETY: the workspace is as large and as aligned as the largest record.
    let frames = unsafe { &mut (*record).frames };
    let walked = walk_from_exit(thread, frames, registers.stack_pointer);
    let frame_count = walked & 0xff;
    head.frame_count = frame_count as u16;
    head.flags = flags | if walked & TRUNCATED == 0 { 0 } else { STACK_TRUNCATED };
    // SAFETY: as above.
    unsafe {
        (*record).header = head;
        (*record).activation = activation;
        (*record).entry_handler = thread.limits.entry_handler;
        (*record).duration_ns = duration_ns;
        (*record).number = thread.syscall;
        (*record).result = result;
        (*record).arguments = [registers.first, registers.second, registers.third];
    }
    emit_with_frames(record, core::mem::offset_of!(Syscall, frames), frame_count);
}

/// A syscall of a helper thread, whose activation is off every thread or on another one: nothing is read of it.
#[inline(always)]
fn record_helper(thread: &mut Thread, entered_ns: u64, regs: u64, result: i64, flags: u8) {
    let duration_ns = now() - entered_ns;
    if thread.flags & AGGREGATE_SYSCALLS != 0 {
        let ended = if flags & DOES_NOT_RETURN == 0 {
            duration_ns
        } else {
            aggregate::DOES_NOT_RETURN
        };
        let entry = aggregate::entry_of_helped(thread);
        aggregate::syscall(thread, entry, result, ended, moved_bytes(thread.syscall, result));
    }
    if thread.flags & EMIT_SYSCALLS == 0 {
        return;
    }
    let Some(registers) = SyscallRegisters::read(regs) else {
        count(Counter::ActivationUnreadable);
        return;
    };
    let mut head = header_at(RecordKind::HelperSyscall, entered_ns);
    head.flags = flags;
    let record: *mut HelperSyscall = thread.record.as_mut_ptr().cast();
    // SAFETY: the workspace is as large and as aligned as the largest record.
    unsafe {
        (*record).header = head;
        (*record).activation = thread.on_behalf_of.activation;
        (*record).handed_over_ns = thread.on_behalf_of.at_ns;
        (*record).duration_ns = duration_ns;
        (*record).number = thread.syscall;
        (*record).result = result;
        (*record).arguments = [registers.first, registers.second, registers.third];
        emit(&*record, Wake::Later);
    }
}

/// Bytes that a syscall has moved: x86-64's read, write, pread64, pwrite64, readv, writev, sendfile, sendto, recvfrom,
/// sendmsg, recvmsg, splice, preadv, pwritev, copy_file_range, preadv2, pwritev2.
#[inline(always)]
fn moved_bytes(number: u64, result: i64) -> u64 {
    let moves = matches!(
        number,
        0 | 1 | 17 | 18 | 19 | 20 | 40 | 44 | 45 | 46 | 47 | 275 | 295 | 296 | 326 | 327 | 328
    );
    if moves && result > 0 { result as u64 } else { 0 }
}

/// A range becomes executable: if a code object of wasmtime lies there, say so, and watch the process if all are to be.
#[inline(always)]
fn code_published(ctx: &RawTracePointContext) {
    let Some(registers) = SyscallRegisters::read(ctx.arg(0)) else {
        return;
    };
    let (address, length) = (registers.first, registers.second);
    if registers.third & PROT_EXEC == 0 {
        return;
    }
    let mut magic = [0u8; 8];
    if !read_user(&raw mut magic, address.wrapping_sub(PAGE_BYTES)) || magic != WASMTIME_ELF {
        return;
    }
    let mut head = header(RecordKind::CodePublished);
    match PROCESSES.get_ptr_mut(&head.pid) {
        Some(config) => {
            // SAFETY: a pointer into a map value.
            head.task = observe_code(head.pid, unsafe { &*config }, address, address + length);
        }
        None if global(&WATCH_FLAGS) & WATCH_NEW_WASM != 0 => {
            let config = ProcessConfig {
                flags: global(&NEW_PROCESS_FLAGS),
                child_flags: global(&NEW_PROCESS_FLAGS),
                generation: 1,
                calibrations: 0,
                code_start: address,
                code_end: address + length,
                layouts: [0; MAX_COPIES],
                other_copies: 0,
                task_offset: 0,
                call_gaps: 0,
                reserved: 0,
                copies: [NOTHING_KNOWN; MAX_COPIES],
            };
            let observed = Observed {
                code_start: address,
                code_end: address + length,
                code_epoch: 0,
                row_count: 0,
                thread_count: 0,
            };
            if OBSERVED.insert(&head.pid, &observed, u64::from(BPF_ANY)).is_err()
                || PROCESSES.insert(&head.pid, &config, u64::from(BPF_ANY)).is_err()
            {
                count(Counter::ProcessTableFull);
            }
        }
        None => return,
    }
    #[cfg(feature = "log")]
    aya_log_ebpf::debug!(
        ctx,
        "process {} published {} bytes of code at {:x}",
        head.pid,
        length,
        address
    );
    emit(
        &CodePublished {
            header: head,
            address,
            length,
        },
        Wake::Now,
    );
}

/// Notes where guest code is published in a process that is watched; answers with the epoch that begins with it.
#[inline(always)]
fn observe_code(pid: u32, config: &ProcessConfig, start: u64, end: u64) -> u32 {
    let Some(observed) = OBSERVED.get_ptr_mut(&pid) else {
        return 0;
    };
    // SAFETY: a pointer into a map value. Two threads publishing at once may lose one widening; the agent, which sees both
    // records, knows of both ranges.
    let observed = unsafe { &mut *observed };
    let overlaps = |code_start: u64, code_end: u64| start < code_end && end > code_start;
    let (mut code_start, mut code_end) = (config.code_start, config.code_end);
    if observed.code_end != 0 {
        if code_end == 0 || observed.code_start < code_start {
            code_start = observed.code_start;
        }
        if observed.code_end > code_end {
            code_end = observed.code_end;
        }
    }
    if overlaps(code_start, code_end) {
        // It may take the place of other code, whose rows are not to be its own.
        add(&raw mut observed.code_epoch, 1);
    }
    if observed.code_end == 0 || start < observed.code_start {
        observed.code_start = start;
    }
    if end > observed.code_end {
        observed.code_end = end;
    }
    next_generation();
    // SAFETY: as above; others may be adding to it.
    unsafe { core::ptr::read_volatile(&raw const observed.code_epoch) as u32 }
}

const _: () = assert!(MAX_FRAMES <= 0xff);
