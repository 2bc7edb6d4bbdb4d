//! Lives of processes and threads.

use aya_ebpf::{bindings::BPF_ANY, macros::raw_tracepoint, programs::RawTracePointContext};
use wasmscope_common::{
    AGGREGATE_SYSCALLS, Counter, DOES_NOT_RETURN, EMIT_SYSCALLS, KEEP_TLS_ON_EXEC, MAX_COPIES, Observed, ProcessEvent,
    RecordKind, Syscall,
};

use crate::{
    aggregate,
    maps::{OBSERVED, PROCESSES, TASK_MM_OFFSET, TASK_TGID_OFFSET, THREADS, add, count, global},
    output::{Wake, emit, emit_with_frames, header},
    thread::NOTHING_KNOWN,
    user::read_kernel,
};

/// A process replaced its image: what was known of the old one no longer holds.
#[raw_tracepoint(tracepoint = "sched_process_exec")]
pub fn process_exec(ctx: RawTracePointContext) -> i32 {
    let mut head = header(RecordKind::Exec);
    // A thread that replaces the image takes its leader's id; this is the one it had.
    let old_tid: u32 = ctx.arg(1);
    replaced(old_tid);
    let _ = THREADS.remove(&head.tid);
    let _ = THREADS.remove(&old_tid);
    if let Some(config) = PROCESSES.get_ptr_mut(&head.pid) {
        // SAFETY: a pointer into a map value; the process has one thread at this point.
        let config = unsafe { &mut *config };
        if config.child_flags & KEEP_TLS_ON_EXEC == 0 {
            config.copies[0] = NOTHING_KNOWN;
        }
        let mut copy = 1;
        while copy < MAX_COPIES {
            config.copies[copy] = NOTHING_KNOWN;
            copy += 1;
        }
        config.child_flags &= !KEEP_TLS_ON_EXEC;
        config.flags = config.child_flags;
        config.copies[0].store_offset = 0;
        config.copies[0].layout = 0;
        config.other_copies = 0;
        config.layouts = [0; MAX_COPIES];
        config.code_start = 0;
        config.code_end = 0;
        config.generation += 1;
        if let Some(observed) = OBSERVED.get_ptr_mut(&head.pid) {
            // SAFETY: as above.
            let observed = unsafe { &mut *observed };
            observed.code_start = 0;
            observed.code_end = 0;
            observed.code_epoch += 1;
            // All others have ended, and this one's entry is gone.
            observed.thread_count = 0;
            head.task = observed.code_epoch as u32;
        }
    } else {
        return 0;
    }
    #[cfg(feature = "log")]
    aya_log_ebpf::debug!(&ctx, "process {} replaced its image", head.pid);
    emit(
        &ProcessEvent {
            header: head,
            argument: 0,
        },
        Wake::Now,
    );
    0
}

/// The syscall that replaced the image does not return to who made it. Nothing can be read of the old image any more: what
/// is on the thread has to be known.
#[inline(always)]
fn replaced(tid: u32) {
    let Some(thread) = THREADS.get_ptr_mut(&tid) else {
        return;
    };
    // SAFETY: the entry of the thread that is running, under the id that it had.
    let thread = unsafe { &mut *thread };
    if thread.entered_ns == 0 {
        return;
    }
    if thread.flags & AGGREGATE_SYSCALLS != 0 {
        aggregate::image_replaced(thread);
    }
    if thread.flags & EMIT_SYSCALLS == 0 {
        return;
    }
    let mut head = header(RecordKind::Syscall);
    let duration_ns = head.at_ns - thread.entered_ns;
    head.tid = tid;
    head.at_ns = thread.entered_ns;
    head.flags = DOES_NOT_RETURN;
    let number = thread.syscall;
    let record: *mut Syscall = thread.record.as_mut_ptr().cast();
    // SAFETY: the workspace is as large and as aligned as the largest record.
    unsafe {
        (*record).header = head;
        (*record).activation = 0;
        (*record).entry_handler = 0;
        (*record).duration_ns = duration_ns;
        (*record).number = number;
        (*record).result = 0;
        (*record).arguments = [0; 3];
    }
    emit_with_frames(record, core::mem::offset_of!(Syscall, frames), 0);
}

/// A thread ends; the last of a process ends that.
#[raw_tracepoint(tracepoint = "sched_process_exit")]
pub fn process_exit(_ctx: RawTracePointContext) -> i32 {
    let head = header(RecordKind::ThreadExit);
    // Whether or not its process is still watched: the id will be used again.
    let was_followed = THREADS.remove(&head.tid).is_ok();
    if PROCESSES.get_ptr(&head.pid).is_none() {
        return 0;
    }
    if was_followed && let Some(observed) = OBSERVED.get_ptr_mut(&head.pid) {
        // One less.
        // SAFETY: a pointer into a map value.
        add(unsafe { &raw mut (*observed).thread_count }, u64::MAX);
    }
    let wake = if head.tid == head.pid { Wake::Now } else { Wake::Later };
    emit(
        &ProcessEvent {
            header: head,
            argument: 0,
        },
        wake,
    );
    0
}

/// A watched process made a child: it is watched too, as it shares its parent's image until it replaces it.
#[raw_tracepoint(tracepoint = "sched_process_fork")]
pub fn process_fork(ctx: RawTracePointContext) -> i32 {
    let head = header(RecordKind::Fork);
    let Some(config) = PROCESSES.get_ptr(&head.pid) else {
        return 0;
    };
    let child_task: u64 = ctx.arg(1);
    let mut child = 0u32;
    if !read_kernel(&raw mut child, child_task + u64::from(global(&TASK_TGID_OFFSET))) || child == head.pid {
        return 0;
    }
    // SAFETY: a pointer into a map value.
    let mut config = unsafe { *config };
    // A child that shares its parent's memory (vfork, posix_spawn) is about to replace its image. Until then the
    // activations it would be seen on are its parent's.
    config.flags = if shares_memory(ctx.arg(0), child_task) {
        0
    } else {
        config.child_flags & !KEEP_TLS_ON_EXEC
    };
    let mut observed = Observed {
        code_start: 0,
        code_end: 0,
        code_epoch: 0,
        row_count: 0,
        thread_count: 0,
    };
    if let Some(parent) = OBSERVED.get_ptr(&head.pid) {
        // SAFETY: as above.
        observed = unsafe { *parent };
        observed.row_count = 0;
        observed.thread_count = 0;
    }
    if OBSERVED.insert(&child, &observed, u64::from(BPF_ANY)).is_err()
        || PROCESSES.insert(&child, &config, u64::from(BPF_ANY)).is_err()
    {
        count(Counter::ProcessTableFull);
        return 0;
    }
    emit(
        &ProcessEvent {
            header: head,
            argument: u64::from(child),
        },
        Wake::Now,
    );
    0
}

/// Whether two tasks have the same address space; `false` if that cannot be told.
#[inline(always)]
fn shares_memory(parent_task: u64, child_task: u64) -> bool {
    let offset = u64::from(global(&TASK_MM_OFFSET));
    let (mut parent, mut child) = (0u64, 0u64);
    offset != 0
        && read_kernel(&raw mut parent, parent_task + offset)
        && read_kernel(&raw mut child, child_task + offset)
        && parent == child
}
