//! What is kept per thread: the syscall that is running, the address of its TLS slot, and room to build a record in.

use aya_ebpf::{bindings::BPF_NOEXIST, helpers::bpf_get_current_pid_tgid};
use wasmscope_common::{
    AggregateKey, Counter, HandedOver, KIND_NONE, MAX_COPIES, MAX_RECORD_BYTES, MAX_THREADS_PER_PROCESS, ProcessConfig,
    RuntimeCopy, THREAD_BYTES, TLS_DYNAMIC, TLS_STATIC, TLS_UNKNOWN, ThreadHead,
};

use crate::{
    maps::{OBSERVED, PROCESSES, THREADS, add, count, generation},
    user::{read_user_word, thread_pointer},
};

/// Words of [`Thread::window`]; a power of two.
pub const WINDOW_WORDS: usize = 32;

/// See [`Thread::trapped`].
pub const TRAPPED: u32 = 1;
/// See [`Thread::trapped`].
pub const LEFT_AFTER_TRAP: u32 = 2;
/// See [`Thread::copy`].
pub const NO_COPY: u32 = u32::MAX;

/// State and workspace of one thread.
#[repr(C)]
pub struct Thread {
    /// When the running syscall was entered, 0 if none is.
    pub entered_ns: u64,
    /// Number of the running syscall.
    pub syscall: u64,
    /// For whom the thread does what it does, if that was handed over to it; activation 0: for itself.
    pub on_behalf_of: HandedOver,
    /// Address of the task that this is.
    pub task: u64,
    /// Process it belongs to: thread ids are used again.
    pub pid: u32,
    /// Unused, zero.
    pub reserved: u32,
    /// When what the running program is about happened: the time of the record and of what is counted, so that both agree.
    pub at_ns: u64,
    /// Address of the TLS slot that holds the activation of the copy of the runtime that is looked at, 0 if not known.
    pub slot: u64,
    /// How far down static TLS has been searched for it; 0: not begun.
    pub searched_to: u64,
    /// [`crate::maps::generation`] when the process was looked at last.
    pub seen_generation: u64,
    /// Generation of the config that `slot` was derived from.
    pub generation: u32,
    /// As in the config.
    pub store_offset: u32,
    /// As in the config.
    pub layout: u32,
    /// As in the config.
    pub flags: u32,
    /// As in the config.
    pub calibrations: u32,
    /// As in the config.
    pub other_copies: u32,
    /// Which copy `slot`, `store_offset` and `layout` are of; [`NO_COPY`] if that is not known.
    pub copy: u32,
    /// [`RuntimeCopy::file`] of it.
    pub file: u32,
    /// Copy of the activation that [`crate::activation::innermost`] has found.
    pub innermost: u32,
    /// Library in whose TLS block a slot may have been found.
    pub found_module: u32,
    /// [`TRAPPED`] from a trap of the guest until its activation leaves, [`LEFT_AFTER_TRAP`] from then on until the next
    /// crossing; meanwhile the exit fields are of an earlier moment. 0 otherwise.
    pub trapped: u32,
    /// Not 0: the thread has waited for several descriptors at once.
    pub multiplexes: u32,
    /// Low half of [`Observed::code_epoch`].
    pub epoch: u32,
    /// As in the config.
    pub call_gaps: u32,
    /// Lowest address of guest code, as far as agent or programs know of any.
    pub code_start: u64,
    /// End of it; 0 if there is none.
    pub code_end: u64,
    /// The row of the activation that left last, until anything else happens; [`KIND_NONE`] if there is none.
    pub ended: AggregateKey,
    /// All copies, where there are several.
    pub copies: [CopyState; MAX_COPIES],
    /// `VMStoreContext` fields as read last.
    pub limits: Limits,
    /// Frame pointer and return address as read last.
    pub frame: Frame,
    /// The stack from the exit trampoline's frame up, so that most frames need no read of their own.
    pub window: [u64; WINDOW_WORDS],
    /// The record being built.
    pub record: [u64; MAX_RECORD_BYTES / 8],
}

// The agent reads the head, and maps are opened by the size of their values.
const _: () = {
    assert!(
        size_of::<Thread>() == THREAD_BYTES,
        "put the new size into THREAD_BYTES"
    );
    assert!(core::mem::offset_of!(Thread, entered_ns) == core::mem::offset_of!(ThreadHead, entered_ns));
    assert!(core::mem::offset_of!(Thread, syscall) == core::mem::offset_of!(ThreadHead, syscall));
    assert!(core::mem::offset_of!(Thread, on_behalf_of) == core::mem::offset_of!(ThreadHead, on_behalf_of));
    assert!(core::mem::offset_of!(Thread, pid) == core::mem::offset_of!(ThreadHead, pid));
};
/// A thread and one copy of the runtime.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct CopyState {
    /// As [`Thread::slot`].
    pub slot: u64,
    /// What the copy is about to put there, as its last swap on this thread said; 0 if nothing.
    pub announced: u64,
}

/// The part of `VMStoreContext` that says where wasm was entered and left.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Limits {
    /// Frame pointer of the trampoline through which wasm was left, or of the guest function that called it, as the layout
    /// says.
    pub exit_fp: u64,
    /// Return address into the guest function that left wasm.
    pub exit_pc: u64,
    pub entry_sp: u64,
    /// Frame pointer of the trampoline through which wasm was entered.
    pub entry_fp: u64,
    /// An address inside that trampoline, which belongs to one exported function.
    pub entry_handler: u64,
}

/// What a frame pointer points to.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Frame {
    pub caller_fp: u64,
    pub return_address: u64,
}

/// New threads start from it; too large for the program's stack.
static NEW_THREAD: Thread = Thread {
    entered_ns: 0,
    syscall: 0,
    on_behalf_of: HandedOver {
        activation: 0,
        at_ns: 0,
    },
    task: 0,
    pid: 0,
    reserved: 0,
    at_ns: 0,
    slot: 0,
    searched_to: 0,
    // None has this value, so that what depends on it is read.
    seen_generation: u64::MAX,
    generation: 0,
    store_offset: 0,
    layout: 0,
    flags: 0,
    calibrations: 0,
    other_copies: 0,
    copy: 0,
    file: 0,
    innermost: 0,
    found_module: 0,
    trapped: 0,
    multiplexes: 0,
    epoch: 0,
    call_gaps: 0,
    code_start: 0,
    code_end: 0,
    ended: AggregateKey {
        pid: 0,
        epoch: 0,
        kind: KIND_NONE,
        detail: 0,
        entry_handler: 0,
        call_site: 0,
        callee: 0,
    },
    copies: [CopyState { slot: 0, announced: 0 }; MAX_COPIES],
    limits: Limits {
        exit_fp: 0,
        exit_pc: 0,
        entry_sp: 0,
        entry_fp: 0,
        entry_handler: 0,
    },
    frame: Frame {
        caller_fp: 0,
        return_address: 0,
    },
    window: [0; WINDOW_WORDS],
    record: [0; MAX_RECORD_BYTES / 8],
};

impl Thread {
    /// The same value, of which the verifier knows nothing any more: it would else follow what comes next once for each range that
    /// the value may be of. Uses the window, so what is there must not be needed any more.
    #[inline(always)]
    pub fn forget(&mut self, value: u64) -> u64 {
        let passed = &raw mut self.window[0];
        // SAFETY: a field of this thread's own entry.
        unsafe {
            core::ptr::write_volatile(passed, value);
            core::ptr::read_volatile(passed)
        }
    }
}

/// A copy of the runtime of which nothing is known.
pub const NOTHING_KNOWN: RuntimeCopy = RuntimeCopy {
    tls_kind: TLS_UNKNOWN,
    tls_module: 0,
    tls_offset: 0,
    store_offset: 0,
    layout: 0,
    file: 0,
    reserved: 0,
};

/// The config of the current process, if it is watched.
#[inline(always)]
pub fn watched() -> Option<*mut ProcessConfig> {
    let pid = (bpf_get_current_pid_tgid() >> 32) as u32;
    PROCESSES.get_ptr_mut(&pid)
}

/// The state of the current thread of a watched process, brought up to date with `config`.
#[inline(always)]
pub fn current(config: &ProcessConfig) -> Option<*mut Thread> {
    let id = bpf_get_current_pid_tgid();
    let (tid, pid) = (id as u32, (id >> 32) as u32);
    let thread = match THREADS.get_ptr_mut(&tid) {
        Some(thread) => thread,
        None => {
            let observed = OBSERVED.get_ptr_mut(&pid);
            if let Some(observed) = observed
                // SAFETY: a pointer into a map value; a word is read whole.
                && unsafe { core::ptr::read_volatile(&raw const (*observed).thread_count) } as i64
                    >= i64::from(MAX_THREADS_PER_PROCESS)
            {
                count(Counter::ProcessThreadsFull);
                return None;
            }
            // A failure other than "already there" is a full table; the lookup below tells.
            if THREADS.insert(&tid, &NEW_THREAD, u64::from(BPF_NOEXIST)).is_ok()
                && let Some(observed) = observed
            {
                // SAFETY: as above.
                add(unsafe { &raw mut (*observed).thread_count }, 1);
            }
            match THREADS.get_ptr_mut(&tid) {
                Some(thread) => thread,
                None => {
                    count(Counter::ThreadTableFull);
                    return None;
                }
            }
        }
    };
    // SAFETY: a pointer into a map value; no other program runs for this thread at the same time.
    let state = unsafe { &mut *thread };
    // Before what it stands for, which is changed before it is.
    let generation = generation();
    if state.seen_generation != generation || state.pid != pid {
        state.seen_generation = generation;
        look_at_code(state, config, pid);
    }
    let known = state.pid == pid
        && state.generation == config.generation
        && state.flags == config.flags
        && state.call_gaps == config.call_gaps
        && state.calibrations == config.calibrations;
    let is_same_process = state.pid == pid;
    if !is_same_process {
        state.on_behalf_of.activation = 0;
        state.task = 0;
    }
    if !known {
        state.generation = config.generation;
        state.calibrations = config.calibrations;
        state.flags = config.flags;
        state.call_gaps = config.call_gaps;
        state.other_copies = config.other_copies;
        state.pid = pid;
        state.entered_ns = 0;
        state.searched_to = 0;
        state.trapped = 0;
        if !is_same_process {
            state.multiplexes = 0;
        }
        state.ended.kind = KIND_NONE;
        state.copies = [CopyState { slot: 0, announced: 0 }; MAX_COPIES];
        state.copy = NO_COPY;
        select(state, config, 0);
    } else if state.slot == 0 && state.copy < MAX_COPIES as u32 {
        let copy = state.copy;
        select(state, config, copy);
    }
    Some(thread)
}

/// Notes which guest code there is.
#[inline(always)]
fn look_at_code(state: &mut Thread, config: &ProcessConfig, pid: u32) {
    state.epoch = 0;
    state.code_start = config.code_start;
    state.code_end = config.code_end;
    let Some(observed) = OBSERVED.get_ptr(&pid) else { return };
    // SAFETY: a pointer into a map value; its words are read one by one, each whole.
    let observed = unsafe { &*observed };
    state.epoch = observed.code_epoch as u32;
    if observed.code_end != 0 {
        if state.code_end == 0 || observed.code_start < state.code_start {
            state.code_start = observed.code_start;
        }
        if observed.code_end > state.code_end {
            state.code_end = observed.code_end;
        }
    }
}

/// Makes `copy` the copy of the runtime that is looked at.
#[inline(always)]
pub fn select(thread: &mut Thread, config: &ProcessConfig, copy: u32) {
    let index = copy as usize & (MAX_COPIES - 1);
    let known = &config.copies[index];
    let slot = if thread.copies[index].slot == 0 {
        slot_address(known)
    } else {
        thread.copies[index].slot
    };
    thread.copies[index].slot = slot;
    thread.slot = slot;
    thread.copy = index as u32;
    thread.file = known.file;
    thread.store_offset = known.store_offset;
    thread.layout = known.layout;
}

/// Makes the copy of the runtime that the probed file brought the one that is looked at; no copy if that is not (yet)
/// known to be in the process.
#[inline(always)]
pub fn select_file(thread: &mut Thread, config: &ProcessConfig, file: u32) {
    if thread.file != file || thread.copy == NO_COPY {
        search_file(thread, config, file);
    }
}

#[inline(never)]
fn search_file(thread: *mut Thread, config: *const ProcessConfig, file: u32) {
    // SAFETY: both point into map values; the thread's is used by this program alone.
    let (thread, config) = unsafe { (&mut *thread, &*config) };
    let mut copy = 0;
    while copy < MAX_COPIES {
        // Nobody has looked at the process yet: it has one runtime, most likely.
        if config.copies[copy].file == file || (copy == 0 && config.copies[0].file == 0) {
            select(thread, config, copy as u32);
            return;
        }
        copy += 1;
    }
    thread.slot = 0;
    thread.copy = NO_COPY;
    thread.store_offset = 0;
}

/// The layout of the copy of the runtime that a file brought, 0 if it is not known.
#[inline(always)]
pub fn layout_of_file(config: &ProcessConfig, file: u32) -> u32 {
    if config.other_copies == 0 {
        return config.copies[0].layout;
    }
    let mut layout = 0;
    let mut copy = 0;
    while copy < MAX_COPIES {
        if config.copies[copy].file == file {
            layout = config.copies[copy].layout;
        }
        copy += 1;
    }
    layout
}

/// Where a copy's TLS slot of the current thread is, 0 if that is not known (yet).
#[inline(always)]
pub fn slot_address(copy: &RuntimeCopy) -> u64 {
    let Some(pointer) = thread_pointer() else { return 0 };
    match copy.tls_kind {
        TLS_STATIC => pointer.wrapping_add_signed(copy.tls_offset),
        TLS_DYNAMIC if copy.tls_module != 0 => match dynamic_block(pointer, copy.tls_module) {
            0 => 0,
            block => block.wrapping_add_signed(copy.tls_offset),
        },
        _ => 0,
    }
}

/// The current thread's TLS block of one shared library, 0 if it has none (glibc and musl: word 1 of the thread
/// control block is the vector, glibc's entries are 16 bytes and -1 means "not allocated yet"; what lies behind those that the
/// entry before the first counts is not the vector's).
#[inline(always)]
pub fn dynamic_block(thread_pointer: u64, module: u32) -> u64 {
    let Some(vector) = read_user_word(thread_pointer + 8) else {
        return 0;
    };
    if read_user_word(vector.wrapping_sub(16)).unwrap_or(0) < u64::from(module) {
        return 0;
    }
    match read_user_word(vector + 16 * u64::from(module)) {
        Some(block) if block != u64::MAX => block,
        _ => 0,
    }
}

/// Low half of the number of the asynchronous task that the current thread runs; 0: none, or not known.
#[inline(always)]
pub fn task(config: &ProcessConfig) -> u32 {
    if config.task_offset == 0 {
        return 0;
    }
    let Some(pointer) = thread_pointer() else { return 0 };
    read_user_word(pointer.wrapping_add_signed(i64::from(config.task_offset))).unwrap_or(0) as u32
}
