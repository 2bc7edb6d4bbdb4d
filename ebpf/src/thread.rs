//! What is kept per thread: the syscall that is running, the address of its TLS slot, and room to build a record in.

use aya_ebpf::{bindings::BPF_NOEXIST, helpers::bpf_get_current_pid_tgid};
use wasmscope_common::{
    Counter, HandedOver, MAX_RECORD_BYTES, ProcessConfig, THREAD_BYTES, TLS_DYNAMIC, TLS_STATIC, ThreadHead,
};

use crate::{
    maps::{PROCESSES, THREADS, count, generation},
    user::{read_user_word, thread_pointer},
};

/// Words of [`Thread::window`]; a power of two.
pub const WINDOW_WORDS: usize = 32;

/// See [`Thread::trapped`].
pub const TRAPPED: u32 = 1;
/// See [`Thread::trapped`].
pub const LEFT_AFTER_TRAP: u32 = 2;

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
    /// Address of the TLS slot that holds the activation, 0 if not known.
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
    pub limits_base: u32,
    /// As in the config.
    pub flags: u32,
    /// [`TRAPPED`] from a trap of the guest until its activation leaves, [`LEFT_AFTER_TRAP`] from then on until the next
    /// crossing; meanwhile the exit fields are of an earlier moment. 0 otherwise.
    pub trapped: u32,
    /// Unused, zero.
    pub padding: u32,
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

/// The part of `VMStoreContext` that says where wasm was entered and left.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Limits {
    /// Frame pointer of the trampoline through which wasm was left.
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
    slot: 0,
    searched_to: 0,
    seen_generation: 0,
    generation: 0,
    store_offset: 0,
    limits_base: 0,
    flags: 0,
    trapped: 0,
    padding: 0,
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
            // A failure other than "already there" is a full table; the lookup below tells.
            let _ = THREADS.insert(&tid, &NEW_THREAD, u64::from(BPF_NOEXIST));
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
    state.seen_generation = generation();
    let known = state.pid == pid
        && state.generation == config.generation
        && state.flags == config.flags
        && state.store_offset == config.store_offset;
    if state.pid != pid {
        state.on_behalf_of.activation = 0;
        state.task = 0;
    }
    if !known {
        state.generation = config.generation;
        state.store_offset = config.store_offset;
        state.limits_base = config.limits_base;
        state.flags = config.flags;
        state.pid = pid;
        state.entered_ns = 0;
        state.searched_to = 0;
        state.trapped = 0;
        state.slot = 0;
    }
    if state.slot == 0 {
        state.slot = slot_address(config);
    }
    Some(thread)
}

/// Where the TLS slot of the current thread is, 0 if that is not known (yet).
#[inline(always)]
fn slot_address(config: &ProcessConfig) -> u64 {
    let Some(pointer) = thread_pointer() else { return 0 };
    match config.tls_kind {
        TLS_STATIC => pointer.wrapping_add_signed(config.tls_offset),
        TLS_DYNAMIC if config.tls_module != 0 => match dynamic_block(pointer, config.tls_module) {
            0 => 0,
            block => block.wrapping_add_signed(config.tls_offset),
        },
        _ => 0,
    }
}

/// The current thread's TLS block of one shared library, 0 if it has none (glibc and musl: word 1 of the thread
/// control block is the vector, glibc's entries are 16 bytes and -1 means "not allocated yet").
#[inline(always)]
pub fn dynamic_block(thread_pointer: u64, module: u32) -> u64 {
    let Some(vector) = read_user_word(thread_pointer + 8) else {
        return 0;
    };
    match read_user_word(vector + 16 * u64::from(module)) {
        Some(block) if block != u64::MAX => block,
        _ => 0,
    }
}
