//! Counting without records: rows of counts and histograms, which a few CPUs share, and the activations and host calls that are open.
//!
//! Durations are taken from the times that the records carry (`Thread::at_ns`), so what is counted is what a full trace says.
//! An activation is open from the moment its record is put on a thread until it leaves the thread whose stack it lies on;
//! a fiber that is suspended leaves on another stack, and stays open. Uprobes on one CPU preempt each other, so all is
//! added atomically and nothing is ever taken out by the agent while it may be added to.

use aya_ebpf::{
    bindings::{BPF_ANY, BPF_NOEXIST},
    helpers::bpf_get_smp_processor_id,
};
use wasmscope_common::{
    AGGREGATE_CALLS, AggregateKey, AggregateStats, BUCKET_COUNT, CALL_UNFINISHED, COMPONENT_CALL, Counter,
    DETAIL_OTHER, ENDED_BY_FAILED_CALL, ENDED_BY_ITSELF, ENDED_IN_CALL, ENDED_UNSEEN, ENDED_UNSURE, KIND_BITS,
    KIND_HOST_CALL, KIND_INVOCATION, KIND_NONE, KIND_SYSCALL, MAX_ROWS_PER_PROCESS, MAX_SHARDS, OpenActivation,
    OpenKey, PARENT_UNKNOWN, bucket_of,
};

use crate::{
    activation::top,
    maps::{AGGREGATES, OBSERVED, OPEN, OTHER, RELEASED_ROWS, add, count, increment},
    thread::{NO_COPY, Thread},
};

/// An activation record lies in the frame of the function that pushes and pops it, this far above the stack pointer at
/// most: as in the agent's correlator.
const MAX_FRAME_BYTES: u64 = 16 << 10;

static EMPTY: AggregateStats = AggregateStats::EMPTY;

static NOT_SEEN: OpenActivation = OpenActivation {
    start_ns: 0,
    parent: PARENT_UNKNOWN,
    entry_handler: 0,
    call_start_ns: 0,
    call_frame: 0,
    call_site: 0,
    callee: 0,
    call_detail: 0,
    call_failed: 0,
    trapped: 0,
    call_gaps: 0,
};

#[inline(always)]
fn lies_in_frame(activation: u64, stack_pointer: u64) -> bool {
    activation > stack_pointer && activation - stack_pointer < MAX_FRAME_BYTES
}

/// The row of a key; if there is no room for it, the one that takes what has none, of its process, else of its kind. The
/// key is changed to that of the process.
#[inline(always)]
fn row(key: &mut AggregateKey) -> Option<*mut AggregateStats> {
    let kind = key.kind;
    key.kind |= (cpu() & (MAX_SHARDS - 1)) << KIND_BITS;
    let mut found = AGGREGATES.get_ptr_mut(&*key);
    if found.is_none() {
        make_row(key);
        found = AGGREGATES.get_ptr_mut(&*key);
    }
    key.kind = kind;
    if found.is_some() {
        return found;
    }
    count(Counter::AggregateFull);
    OTHER.get_ptr_mut(kind)
}

#[inline(always)]
fn cpu() -> u32 {
    // SAFETY: the helper has no preconditions.
    unsafe { bpf_get_smp_processor_id() }
}

/// Makes the row of a key, or changes the key to that of the row for what the process has no rows for.
#[inline(never)]
fn make_row(key: *mut AggregateKey) -> u64 {
    // SAFETY: callers pass a key that nothing else uses.
    let key = unsafe { &mut *key };
    let observed = OBSERVED.get_ptr_mut(&key.pid);
    if let Some(observed) = observed {
        let released = match RELEASED_ROWS.get_ptr(&key.pid) {
            // SAFETY: a pointer into a map value.
            Some(released) => unsafe { core::ptr::read_volatile(released) },
            None => 0,
        };
        // SAFETY: as above.
        let made = unsafe { core::ptr::read_volatile(&raw const (*observed).row_count) };
        if made >= released + u64::from(MAX_ROWS_PER_PROCESS) {
            count(Counter::ProcessRowsFull);
            key.epoch = 0;
            key.detail = DETAIL_OTHER;
            key.entry_handler = 0;
            key.call_site = 0;
            key.callee = 0;
            // A failure is its being there already, or a full table.
            let _ = AGGREGATES.insert(&*key, &EMPTY, u64::from(BPF_NOEXIST));
            return 0;
        }
    }
    // A failure is another CPU's being first, or a full table; the lookup tells.
    if AGGREGATES.insert(&*key, &EMPTY, u64::from(BPF_NOEXIST)).is_ok()
        && let Some(observed) = observed
    {
        // SAFETY: as above.
        add(unsafe { &raw mut (*observed).row_count }, 1);
    }
    0
}

/// An address of guest code; 0 if there is no code known to be, as it would have no name.
#[inline(always)]
fn in_code(thread: &Thread, address: u64) -> u64 {
    // A return address may be the end.
    if address > thread.code_start && address <= thread.code_end {
        address
    } else {
        0
    }
}

/// What is added to a row beside a count.
#[derive(Clone, Copy)]
pub struct Added {
    /// `None` if the begin was not seen.
    pub duration_ns: Option<u64>,
    pub failed: bool,
    pub marked: bool,
    pub bytes: u64,
}

#[inline(always)]
fn add_to_row(key: &mut AggregateKey, added: Added) {
    let Some(stats) = row(key) else { return };
    // SAFETY: a pointer into a map value, to whose fields all programs add atomically.
    unsafe {
        add(&raw mut (*stats).count, 1);
        match added.duration_ns {
            Some(duration_ns) => {
                add(&raw mut (*stats).total_ns, duration_ns);
                let bucket = core::hint::black_box(bucket_of(duration_ns)) & (BUCKET_COUNT - 1);
                increment((&raw mut (*stats).buckets).cast::<u32>().add(bucket));
            }
            None => add(&raw mut (*stats).untimed, 1),
        }
        if added.failed {
            add(&raw mut (*stats).failed, 1);
        }
        if added.marked {
            add(&raw mut (*stats).marked, 1);
        }
        if added.bytes != 0 {
            add(&raw mut (*stats).bytes, added.bytes);
        }
    }
}

/// What is added for something that began, and that nobody saw the end of.
const UNTIMED_AND_MARKED: Added = Added {
    duration_ns: None,
    failed: false,
    marked: true,
    bytes: 0,
};

/// Time since `start_ns`, unless that is 0.
#[inline(always)]
fn since(start_ns: u64, end_ns: u64) -> Option<u64> {
    if start_ns == 0 { None } else { Some(end_ns - start_ns) }
}

/// What is on top of the thread, as far as that is known: what the runtime said last if the slot is not.
#[inline(always)]
pub fn on_top(thread: &Thread) -> u64 {
    if thread.slot == 0 {
        announced(thread)
    } else {
        top(thread)
    }
}

/// What the last swap put on the thread.
#[inline(always)]
pub fn announced(thread: &Thread) -> u64 {
    if thread.copy == NO_COPY {
        0
    } else {
        thread.copies[thread.copy as usize & 3].announced
    }
}

/// The activation on top of the thread is about to be replaced.
#[inline(never)]
pub fn swapped(thread: *mut Thread, own: u64, new: u64, stack_pointer: u64, entry: u64) -> u32 {
    // SAFETY: this thread's own entry.
    let thread = unsafe { &mut *thread };
    thread.ended.kind = KIND_NONE;
    let begins = lies_in_frame(new, stack_pointer) && (!lies_in_frame(own, stack_pointer) || new < own);
    let mut key = OpenKey {
        activation: own,
        pid: thread.pid,
        reserved: 0,
    };
    if own != 0 {
        match OPEN.get_ptr_mut(&key) {
            Some(open) => {
                // SAFETY: a pointer into a map value; an activation is on one thread at a time.
                let open = unsafe { &mut *open };
                if open.entry_handler == 0 {
                    open.entry_handler = entry;
                }
                if open.parent == new || (open.parent == PARENT_UNKNOWN && !begins) {
                    if lies_in_frame(own, stack_pointer) {
                        close(thread, open);
                        let _ = OPEN.remove(&key);
                    }
                    return 0;
                }
            }
            None if !begins && lies_in_frame(own, stack_pointer) => {
                // It began before the probes were there.
                let detail = if counts_calls(thread) {
                    ENDED_BY_ITSELF
                } else {
                    ENDED_UNSURE
                };
                invocation_key(thread, detail, entry);
                add_to_row(
                    &mut thread.ended,
                    Added {
                        duration_ns: None,
                        failed: false,
                        marked: false,
                        bytes: 0,
                    },
                );
                return 0;
            }
            None => {}
        }
    }
    if new != 0 {
        key.activation = new;
        if begins {
            begin(thread, &key, own);
        } else if let Some(open) = OPEN.get_ptr_mut(&key) {
            // A fiber is resumed.
            // SAFETY: as above.
            unsafe { (*open).parent = own };
        }
    }
    0
}

#[inline(always)]
fn begin(thread: &mut Thread, key: &OpenKey, parent: u64) {
    if let Some(open) = OPEN.get_ptr_mut(key) {
        end_missed(thread, open);
    }
    if OPEN.insert(key, &NOT_SEEN, u64::from(BPF_ANY)).is_err() {
        count(Counter::OpenTableFull);
        return;
    }
    if let Some(open) = OPEN.get_ptr_mut(key) {
        // SAFETY: a pointer into a map value; the activation is on this thread.
        let open = unsafe { &mut *open };
        open.parent = parent;
        open.call_gaps = thread.call_gaps;
        open.start_ns = thread.at_ns;
    }
}

/// Another activation begins where this one lies: its thread ended inside it, or its end went by unseen. Nothing tells when.
#[inline(never)]
fn end_missed(thread: *mut Thread, open: *mut OpenActivation) -> u32 {
    // SAFETY: this thread's own entry, and a pointer into a map value.
    let (thread, open) = unsafe { (&mut *thread, &*open) };
    if open.call_start_ns != 0 {
        call_key(thread, open.call_detail, open.call_site, open.callee);
        add_to_row(&mut thread.ended, UNTIMED_AND_MARKED);
    }
    invocation_key(thread, ENDED_UNSEEN, open.entry_handler);
    add_to_row(&mut thread.ended, UNTIMED_AND_MARKED);
    thread.ended.kind = KIND_NONE;
    0
}

/// Makes the thread's `ended` the row of an invocation.
#[inline(always)]
fn invocation_key(thread: &mut Thread, detail: u32, entry_handler: u64) {
    thread.ended.pid = thread.pid;
    thread.ended.epoch = thread.epoch;
    thread.ended.kind = KIND_INVOCATION;
    thread.ended.detail = detail;
    thread.ended.entry_handler = in_code(thread, entry_handler);
    thread.ended.call_site = 0;
    thread.ended.callee = 0;
}

/// An activation returns.
#[inline(always)]
fn close(thread: &mut Thread, open: &mut OpenActivation) {
    let end_ns = thread.at_ns;
    let in_call = open.call_start_ns != 0;
    if in_call {
        close_call(thread, open, false, true);
    }
    let saw_calls = counts_calls(thread) && open.call_gaps == thread.call_gaps;
    invocation_key(thread, ENDED_BY_ITSELF, open.entry_handler);
    let trapped = open.trapped != 0;
    if !saw_calls {
        thread.ended.detail = ENDED_UNSURE;
    } else if !trapped && (in_call || open.call_failed != 0) {
        thread.ended.detail = if in_call { ENDED_IN_CALL } else { ENDED_BY_FAILED_CALL };
        thread.ended.call_site = in_code(thread, open.call_site);
        thread.ended.callee = open.callee;
        if open.call_detail != 0 {
            thread.ended.callee = in_code(thread, open.callee);
            // Their numbers leave room for it.
            thread.ended.detail |= u32::from(COMPONENT_CALL);
        }
    }
    add_to_row(
        &mut thread.ended,
        Added {
            duration_ns: since(open.start_ns, end_ns),
            failed: trapped,
            marked: false,
            bytes: 0,
        },
    );
    if trapped {
        // Decided.
        thread.ended.kind = KIND_NONE;
    }
}

/// What left the thread last is turned into an error value.
#[inline(never)]
pub fn unwound(thread: *mut Thread) -> u32 {
    // SAFETY: this thread's own entry.
    let thread = unsafe { &mut *thread };
    if thread.ended.kind == KIND_INVOCATION
        && let Some(stats) = row(&mut thread.ended)
    {
        // SAFETY: a pointer into a map value.
        unsafe { add(&raw mut (*stats).marked, 1) };
    }
    thread.ended.kind = KIND_NONE;
    0
}

/// A signal of a trap was delivered while the guest was running.
#[inline(never)]
pub fn trapped(thread: *mut Thread, activation: u64) -> u32 {
    // SAFETY: this thread's own entry.
    let thread = unsafe { &mut *thread };
    if let Some(open) = open_of(thread, activation) {
        // SAFETY: a pointer into a map value.
        let open = unsafe { &mut *open };
        open.trapped = 1;
        if open.call_start_ns != 0 {
            close_call(thread, open, false, true);
            open.call_start_ns = 0;
        }
    }
    0
}

#[inline(always)]
fn open_of(thread: &Thread, activation: u64) -> Option<*mut OpenActivation> {
    let key = OpenKey {
        activation,
        pid: thread.pid,
        reserved: 0,
    };
    OPEN.get_ptr_mut(&key)
}

/// A host call has begun; the thread's limits say where from.
#[inline(never)]
pub fn call_began(thread: *mut Thread, activation: u64, callee: u64, frame: u64, detail: u64) -> u32 {
    // SAFETY: this thread's own entry.
    let thread = unsafe { &mut *thread };
    thread.ended.kind = KIND_NONE;
    let detail = detail as u32;
    let call_site = thread.limits.exit_pc;
    let entry = thread.limits.entry_handler;
    let key = OpenKey {
        activation,
        pid: thread.pid,
        reserved: 0,
    };
    if activation != 0 && OPEN.get_ptr(&key).is_none() && OPEN.insert(&key, &NOT_SEEN, u64::from(BPF_NOEXIST)).is_err()
    {
        count(Counter::OpenTableFull);
    }
    let Some(open) = OPEN.get_ptr_mut(&key) else {
        // Counted where it begins, as its end will find nothing.
        call_key(thread, detail, call_site, callee);
        add_to_row(&mut thread.ended, UNTIMED_AND_MARKED);
        thread.ended.kind = KIND_NONE;
        return 0;
    };
    // SAFETY: a pointer into a map value; the activation is on this thread.
    let open = unsafe { &mut *open };
    if open.call_start_ns != 0 {
        close_call(thread, open, false, true);
    }
    if open.entry_handler == 0 {
        open.entry_handler = entry;
    }
    open.call_start_ns = thread.at_ns;
    open.call_frame = frame;
    open.call_site = call_site;
    open.callee = callee;
    open.call_detail = detail;
    open.call_failed = 0;
    open.call_gaps = thread.call_gaps;
    0
}

/// Makes the thread's `ended` the row of a host call, which leaves no invocation in it.
#[inline(always)]
fn call_key(thread: &mut Thread, detail: u32, call_site: u64, callee: u64) {
    thread.ended.pid = thread.pid;
    thread.ended.epoch = thread.epoch;
    thread.ended.kind = KIND_HOST_CALL;
    thread.ended.detail = detail;
    thread.ended.entry_handler = 0;
    thread.ended.call_site = in_code(thread, call_site);
    thread.ended.callee = if detail == 0 { callee } else { in_code(thread, callee) };
}

/// Whether host calls are counted now, and not only invocations.
#[inline(always)]
fn counts_calls(thread: &Thread) -> bool {
    thread.flags & AGGREGATE_CALLS != 0
}

/// A host call ends. Of one that was open when they ceased to be counted, only that it began is known.
#[inline(always)]
fn close_call(thread: &mut Thread, open: &OpenActivation, failed: bool, marked: bool) {
    call_key(thread, open.call_detail, open.call_site, open.callee);
    let duration_ns = if open.call_gaps == thread.call_gaps {
        Some(thread.at_ns - open.call_start_ns)
    } else {
        thread.ended.detail |= CALL_UNFINISHED;
        None
    };
    add_to_row(
        &mut thread.ended,
        Added {
            duration_ns,
            failed,
            marked,
            bytes: 0,
        },
    );
    thread.ended.kind = KIND_NONE;
}

/// A host function is about to return.
#[inline(never)]
pub fn call_ended(thread: *mut Thread, frame: u64, succeeded: u64) -> u32 {
    // SAFETY: this thread's own entry.
    let thread = unsafe { &mut *thread };
    let activation = on_top(thread);
    if activation == 0 {
        return 0;
    }
    let Some(open) = open_of(thread, activation) else {
        return 0;
    };
    // SAFETY: a pointer into a map value; the activation is on this thread.
    let open = unsafe { &mut *open };
    // Something else that the host function called may return through the same code.
    if open.call_start_ns == 0 || open.call_frame != frame {
        return 0;
    }
    close_call(thread, open, succeeded == 0, false);
    open.call_start_ns = 0;
    // If there was a gap, it may be another one from the same place, which began unseen.
    open.call_failed = u32::from(succeeded == 0 && open.call_gaps == thread.call_gaps);
    0
}

/// A syscall ends, or is entered not to return.
#[inline(never)]
pub fn syscall(thread: *mut Thread, entry_handler: u64, result: i64, duration_ns: u64, moved: u64) -> u32 {
    // SAFETY: this thread's own entry.
    let thread = unsafe { &mut *thread };
    let does_not_return = duration_ns == DOES_NOT_RETURN;
    let is_error = (-4095..0).contains(&result);
    let mut key = AggregateKey {
        pid: thread.pid,
        epoch: thread.epoch,
        kind: KIND_SYSCALL,
        // Whatever number was asked for, it is not that of all others.
        detail: thread.syscall as u32 & !(1 << 31),
        entry_handler: in_code(thread, entry_handler),
        call_site: if is_error { result.unsigned_abs() } else { 0 },
        callee: 0,
    };
    add_to_row(
        &mut key,
        Added {
            duration_ns: if does_not_return { None } else { Some(duration_ns) },
            failed: is_error,
            marked: does_not_return,
            bytes: moved,
        },
    );
    0
}

/// The running syscall has replaced the process's image, so that nothing can be read of the activation that made it: it is
/// the one that the runtime put on the thread last.
#[inline(never)]
pub fn image_replaced(thread: *mut Thread) -> u32 {
    // SAFETY: this thread's own entry.
    let state = unsafe { &mut *thread };
    let activation = announced(state);
    if activation == 0 {
        return 0;
    }
    let entry_handler = match open_of(state, activation) {
        // SAFETY: a pointer into a map value.
        Some(open) => unsafe { (*open).entry_handler },
        None => 0,
    };
    syscall(thread, entry_handler, 0, DOES_NOT_RETURN, 0)
}

/// As a duration: there is none.
pub const DOES_NOT_RETURN: u64 = u64::MAX;

/// The export for which a helper thread works; 0 if the activation that handed the work over is not open any more.
#[inline(always)]
pub fn entry_of_helped(thread: &Thread) -> u64 {
    match open_of(thread, thread.on_behalf_of.activation) {
        // SAFETY: a pointer into a map value.
        Some(open) if unsafe { (*open).start_ns } <= thread.on_behalf_of.at_ns => unsafe { (*open).entry_handler },
        _ => 0,
    }
}
