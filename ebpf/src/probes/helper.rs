//! Work that a host function hands to a helper thread and waits for: whose work a thread does is known from the moment it
//! calls the task until the task is done, because the task has one address from the hand-over to the end.

use aya_ebpf::{bindings::BPF_ANY, helpers::bpf_ktime_get_ns, macros::uprobe, programs::ProbeContext};
use wasmscope_common::{AGGREGATE_SYSCALLS, Counter, EMIT_ACTIVATIONS, HIT_HELPER, HandedOver, HelperTask, SiteKind};

use crate::{
    activation::top,
    maps::{HELPER_TASKS, count, hit},
    thread::{Thread, current, select_file, watched},
    user::{argument, cookie},
};

/// Lower addresses are numbers, flags and the like.
const LOWEST_TASK: u64 = 4096;
/// A task is told by its first byte; what is passed about may point a little further in.
const MAX_HEADER_BYTES: u64 = 256;

/// On all sites of helper threads; the site's kind tells which.
#[uprobe]
pub fn helper(ctx: ProbeContext) -> u32 {
    hit(HIT_HELPER);
    let Some(config) = watched() else { return 0 };
    // SAFETY: a pointer into a map value.
    if unsafe { (*config).flags } & (EMIT_ACTIVATIONS | AGGREGATE_SYSCALLS) == 0 {
        return 0;
    }
    // SAFETY: as above.
    let Some(thread) = current(unsafe { &*config }) else {
        return 0;
    };
    // SAFETY: this thread's own entry.
    let thread = unsafe { &mut *thread };
    let cookie = cookie(&ctx);
    // SAFETY: the context of a uprobe is the thread's registers.
    let regs = unsafe { &*ctx.regs };
    let first = argument(regs, cookie.first());
    if cookie.kind() == SiteKind::HelperSpawn as u8 {
        let second = argument(regs, cookie.second());
        // SAFETY: a pointer into a map value.
        select_file(thread, unsafe { &*config }, cookie.file());
        hand_over(thread, first, second);
    } else if cookie.kind() == SiteKind::HelperRun as u8 {
        begin(thread, first);
    } else if first == 0 || first.wrapping_sub(thread.task) < MAX_HEADER_BYTES {
        thread.on_behalf_of.activation = 0;
        thread.task = 0;
    }
    0
}

/// The task is in one of two registers, which depends on how the function returns its result. What the other one holds is
/// never called as a task.
#[inline(always)]
fn hand_over(thread: &Thread, first: u64, second: u64) {
    let mut by = thread.on_behalf_of;
    let activation = top(thread);
    if activation != 0 {
        by = HandedOver {
            activation,
            // SAFETY: the helper has no preconditions.
            at_ns: unsafe { bpf_ktime_get_ns() },
        };
    }
    remember(thread.pid, first, &by);
    remember(thread.pid, second, &by);
}

#[inline(always)]
fn remember(pid: u32, task: u64, by: &HandedOver) {
    if task < LOWEST_TASK || !task.is_multiple_of(8) {
        return;
    }
    let key = HelperTask { task, pid, reserved: 0 };
    if by.activation == 0 {
        // Nobody's: what lay there before and was never begun is not it.
        let _ = HELPER_TASKS.remove(&key);
    } else if HELPER_TASKS.insert(&key, by, u64::from(BPF_ANY)).is_err() {
        count(Counter::HelperTableFull);
    }
}

#[inline(always)]
fn begin(thread: &mut Thread, task: u64) {
    let key = HelperTask {
        task,
        pid: thread.pid,
        reserved: 0,
    };
    thread.on_behalf_of.activation = 0;
    thread.task = 0;
    if let Some(by) = HELPER_TASKS.get_ptr(&key) {
        // SAFETY: a pointer into a map value.
        thread.on_behalf_of = unsafe { *by };
        thread.task = task;
        let _ = HELPER_TASKS.remove(&key);
    }
}
