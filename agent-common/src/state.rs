//! Map values: what the programs know of a watched process, and what they aggregate.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// Emit [`crate::Syscall`] records.
pub const EMIT_SYSCALLS: u32 = 1;
/// Emit [`crate::HostCall`] and [`crate::HostCallEnd`] records.
pub const EMIT_HOST_CALLS: u32 = 2;
/// Emit [`crate::ActivationSwap`], [`crate::Trap`] and [`crate::Unwind`] records.
pub const EMIT_ACTIVATIONS: u32 = 4;
/// Count syscalls in [`crate::AggregateStats`].
pub const AGGREGATE_SYSCALLS: u32 = 16;
/// Emit [`crate::HttpRequest`], [`crate::RecordKind::RequestEnd`] and [`crate::RecordKind::Multiplexes`] records.
pub const EMIT_REQUESTS: u32 = 32;
/// Count host calls there.
pub const AGGREGATE_CALLS: u32 = 64;
/// Count invocations there.
pub const AGGREGATE_INVOCATIONS: u32 = 128;
/// Flag of a child that is about to replace its image by one that the agent has looked at: its TLS fields are of that image
/// already. Good for one exec.
pub const KEEP_TLS_ON_EXEC: u32 = 8;
/// Global flag: watch a process from the moment it publishes wasm code.
pub const WATCH_NEW_WASM: u32 = 1;

/// Nobody has looked at the binary yet: the TLS slot of the activation is looked for in the static TLS block, but need not
/// be there.
pub const TLS_UNKNOWN: u32 = 0;
/// The slot is at thread pointer + `tls_offset`.
pub const TLS_STATIC: u32 = 1;
/// The slot is at `tls_offset` in the TLS block of a shared library; `tls_module` 0: which one is to be found.
pub const TLS_DYNAMIC: u32 = 2;
/// The slot is in the static TLS block, and is to be found there.
pub const TLS_SEARCH: u32 = 3;

/// Words at the start of an activation record that are searched for the store pointer.
pub const STORE_WORDS: usize = 24;

/// Copies of a runtime followed in one process: an executable and its libraries may each bring one.
pub const MAX_COPIES: usize = 4;

/// Low bits of a layout: bytes from `VMStoreContext` to the frame pointer of where wasm was left, which the return address
/// into the guest follows. Next come entry sp, entry fp and entry trap handler, unless flags say otherwise.
pub const LAYOUT_BASE: u32 = 0xffff;
/// Flag of a layout: the frame pointer is that of the guest function that was left, not of the trampoline it called.
pub const LAYOUT_GUEST_EXIT: u32 = 1 << 16;
/// Flag of a layout: the third word is the entry trampoline's frame pointer, and there is no trap handler.
pub const LAYOUT_NO_HANDLER: u32 = 1 << 17;
/// Flag of a layout with [`LAYOUT_NO_HANDLER`]: the third word is the entry trampoline's stack pointer instead.
pub const LAYOUT_ENTRY_SP: u32 = 1 << 18;
/// Flag of a layout: another one differs from it only in what was left, so it can be told only once something was.
pub const LAYOUT_ALIKE: u32 = 1 << 19;
/// Flag of a layout: host functions do not return whether they succeeded.
pub const LAYOUT_NO_RESULT: u32 = 1 << 20;
/// A layout that is known not to be understood: activations are not followed.
pub const LAYOUT_UNSUPPORTED: u32 = 1 << 31;

/// How to follow a thread to the activations of one copy of the runtime. Zero means "not known, find it": the programs
/// calibrate what the agent could not derive from the binary, and report it in a [`crate::Calibrated`] record.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct RuntimeCopy {
    /// `TLS_*`.
    pub tls_kind: u32,
    /// For [`TLS_DYNAMIC`]: index of the library in the thread's vector of TLS blocks; 0 if not known.
    pub tls_module: u32,
    /// As `tls_kind` says. For [`TLS_DYNAMIC`] always known.
    pub tls_offset: i64,
    /// Bytes from the start of an activation record (`CallThreadState`) to its `vm_store_context`; 0 if not known.
    pub store_offset: u32,
    /// Which of the layouts it is; 0 if not known.
    pub layout: u32,
    /// [`crate::SiteCookie::file`] of its sites; 0: nobody has looked at the binary yet, or nothing was recognised.
    pub file: u32,
    /// Unused, zero.
    pub reserved: u32,
}

/// What the programs are told of one process. The agent writes all of it at once, and the programs write `copies`,
/// `calibrations` and, when the image is replaced, everything; so either may undo what the other has just written. All of
/// it heals: threads calibrate again, and the agent writes again when it handles the record of a new image. What must never
/// be undone is in [`Observed`], which only programs write.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct ProcessConfig {
    /// `EMIT_*`.
    pub flags: u32,
    /// `flags` of processes that this one makes.
    pub child_flags: u32,
    /// Changes whenever the agent changes the value, so that threads drop what they have cached.
    pub generation: u32,
    /// Changes whenever the programs find something out.
    pub calibrations: u32,
    /// Lowest address of guest code that the agent has looked at; the programs add what they have seen since.
    pub code_start: u64,
    /// End of it.
    pub code_end: u64,
    /// `LAYOUT_*` of the published code objects; those of all copies, as code does not tell which copy it belongs to. If
    /// the first is 0, nobody has looked at them yet.
    pub layouts: [u32; MAX_COPIES],
    /// Copies in use beyond the first.
    pub other_copies: u32,
    /// Bytes from the thread pointer to the number of the asynchronous task that the thread runs, always negative; 0: not
    /// known.
    pub task_offset: i32,
    /// Changes whenever host calls begin or cease to be counted: one that was open then may have ended unseen.
    pub call_gaps: u32,
    /// Unused, zero.
    pub reserved: u32,
    /// The copies of the runtime.
    pub copies: [RuntimeCopy; MAX_COPIES],
}

/// What the programs have seen of one process. The agent makes and removes the entry, and never changes one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Observed {
    /// Lowest address of guest code that was published.
    pub code_start: u64,
    /// End of it; 0 if none was.
    pub code_end: u64,
    /// Changes whenever code may have taken the place of other code.
    pub code_epoch: u64,
    /// Rows of [`crate::AggregateStats`] ever made for it, those that count what has no row of its own left out.
    pub row_count: u64,
    /// Threads of it that have an entry in the table of threads, as a signed number: one that got it before its process was
    /// observed is counted only when it ends.
    pub thread_count: u64,
}

/// Import tables sent per call site; a site that calls more host functions than this does so through a table of its own,
/// or its host makes new ones all the time.
pub const MAX_TABLES_PER_CALL_SITE: u32 = 16;

/// A place in guest code that calls host functions.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct SeenCallSite {
    /// Guest return address.
    pub call_site: u64,
    /// Process.
    pub pid: u32,
    /// Generation of its config: code at one address can be replaced.
    pub generation: u32,
}

/// What was called from there last.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct SeenCallee {
    /// The callee's `VMContext`.
    pub callee: u64,
    /// Import tables sent for the site.
    pub sent: u64,
}

/// Work that an activation has handed over and that no helper thread has begun.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct HelperTask {
    /// Address of the task.
    pub task: u64,
    /// Process.
    pub pid: u32,
    /// Unused, zero.
    pub reserved: u32,
}

/// Threads of watched processes that are followed at once.
pub const MAX_THREADS: u32 = 8192;
/// Of them, those that one process may have.
pub const MAX_THREADS_PER_PROCESS: u32 = MAX_THREADS / 2;

/// Processes watched at once.
pub const MAX_PROCESSES: u32 = 4096;

/// Kinds of probes whose hits are counted: index in [`ProbeHits::counts`].
pub const HIT_SYSCALL: usize = 0;
/// A swap of activations, or an error that leaves one.
pub const HIT_ACTIVATION: usize = 1;
/// Entry of a host function.
pub const HIT_HOST_CALL: usize = 2;
/// A return of a host function.
pub const HIT_HOST_CALL_END: usize = 3;
/// A function that is called seldom, entry or return.
pub const HIT_MARK: usize = 4;
/// A task of a helper thread that is handed over, begun or over.
pub const HIT_HELPER: usize = 5;
/// Kinds of probes whose hits are counted.
pub const HIT_KINDS: usize = 6;

/// How often the probes in one process were hit, whether or not they recorded anything. The agent makes the entry.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct ProbeHits {
    /// By `HIT_*`.
    pub counts: [u64; HIT_KINDS],
}

/// Who handed work over, and when.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct HandedOver {
    /// The activation; 0 for none.
    pub activation: u64,
    /// `CLOCK_MONOTONIC`, nanoseconds.
    pub at_ns: u64,
}

/// A socket from which a request was read that nothing has been written back for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct OpenRequest {
    /// Process.
    pub pid: u32,
    /// Its descriptor.
    pub descriptor: u32,
}

/// Bytes of the programs' state of a thread.
pub const THREAD_BYTES: usize = 912;

/// The part of it that the agent reads: it comes first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct ThreadHead {
    /// When the running syscall was entered, `CLOCK_MONOTONIC`, nanoseconds; 0 if none is.
    pub entered_ns: u64,
    /// Number of the running syscall.
    pub syscall: u64,
    /// For whom the thread works, if it is a helper.
    pub on_behalf_of: HandedOver,
    /// The task that this is, its address.
    pub task: u64,
    /// Process.
    pub pid: u32,
    /// Unused, zero.
    pub reserved: u32,
}

const _: () = {
    assert!(size_of::<RuntimeCopy>() == 32);
    assert!(size_of::<ProcessConfig>() == 64 + 32 * MAX_COPIES);
    assert!(size_of::<Observed>() == 40);
    assert!(size_of::<ThreadHead>() == 48);
};
