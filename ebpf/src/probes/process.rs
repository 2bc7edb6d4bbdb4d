//! Lives of processes and threads.

use aya_ebpf::{bindings::BPF_ANY, macros::raw_tracepoint, programs::RawTracePointContext};
use wasmscope_common::{Counter, KEEP_TLS_ON_EXEC, MAX_COPIES, ProcessEvent, RecordKind, WATCH_NEW_WASM};

use crate::{
    maps::{PROCESSES, TASK_MM_OFFSET, TASK_TGID_OFFSET, THREADS, WATCH_FLAGS, count, global},
    output::{Wake, emit, header},
    thread::NOTHING_KNOWN,
    user::read_kernel,
};

/// A process replaced its image: what was known of the old one no longer holds.
#[raw_tracepoint(tracepoint = "sched_process_exec")]
pub fn process_exec(ctx: RawTracePointContext) -> i32 {
    let head = header(RecordKind::Exec);
    let _ = THREADS.remove(&head.tid);
    // A thread that replaces the image takes its leader's id; this is the one it had.
    let old_tid: u32 = ctx.arg(1);
    let _ = THREADS.remove(&old_tid);
    if let Some(config) = PROCESSES.get_ptr_mut(&head.pid) {
        // SAFETY: a pointer into a map value; the process has one thread at this point.
        let config = unsafe { &mut *config };
        if config.child_flags & KEEP_TLS_ON_EXEC == 0 {
            config.copies[0] = NOTHING_KNOWN;
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
    } else if global(&WATCH_FLAGS) & WATCH_NEW_WASM == 0 {
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

#[raw_tracepoint(tracepoint = "sched_process_exit")]
pub fn process_exit(_ctx: RawTracePointContext) -> i32 {
    let head = header(RecordKind::ThreadExit);
    // Whether or not its process is still watched: the id will be used again.
    let _ = THREADS.remove(&head.tid);
    if PROCESSES.get_ptr(&head.pid).is_none() {
        return 0;
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
    if PROCESSES.insert(&child, &config, u64::from(BPF_ANY)).is_err() {
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
