//! Records of the one ring buffer. A record starts with a [`RecordHeader`]; `kind` says which struct follows it.
//!
//! Records that end in guest frames are cut after the last frame that is in use: `frame_count` of the header says how
//! many there are. All addresses are of the traced process and therefore untrusted.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// Guest frames kept per stack. Deeper stacks are cut and marked with [`STACK_TRUNCATED`].
pub const MAX_FRAMES: usize = 32;

/// No record is longer than this.
pub const MAX_RECORD_BYTES: usize = size_of::<Syscall>();

/// Header flag: the walk stopped before it reached the entry frame.
pub const STACK_TRUNCATED: u8 = 1;

/// Header flag of an [`ActivationSwap`]: the TLS slot is not known, so `old` says nothing.
pub const SLOT_UNKNOWN: u8 = 2;

/// Header flag of a [`HostCall`]: a component made it, so `caller` is not a `VMContext` but the return address into the
/// trampoline of the lowered import, which names the host function.
pub const COMPONENT_CALL: u8 = 4;

/// Header flag of a [`Syscall`] or [`HelperSyscall`]: recorded when it was entered, as it does not return.
pub const DOES_NOT_RETURN: u8 = 8;
/// Header flag of an [`ImportTable`]: it was sent by a breakpoint on a guest's way to host functions, to learn where those
/// are; no host call was recorded.
pub const HOST_FUNCTIONS_SOUGHT: u8 = 16;

/// What a record is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum RecordKind {
    /// [`ActivationSwap`]
    ActivationSwap = 1,
    /// [`HostCall`]
    HostCall = 2,
    /// [`HostCallEnd`]
    HostCallEnd = 3,
    /// [`Syscall`]
    Syscall = 4,
    /// [`Trap`]
    Trap = 5,
    /// [`Unwind`]
    Unwind = 6,
    /// [`CodePublished`]
    CodePublished = 7,
    /// [`ProcessEvent`]: the process replaced its image.
    Exec = 8,
    /// [`ProcessEvent`]: a thread of a watched process ended.
    ThreadExit = 9,
    /// [`ProcessEvent`]: a watched process made a new process; `argument` is its pid.
    Fork = 10,
    /// [`Calibrated`]
    Calibrated = 11,
    /// [`ImportTable`]
    ImportTable = 12,
    /// [`Mark`]
    Mark = 13,
    /// [`MarkEnd`]
    MarkEnd = 14,
    /// [`HelperSyscall`]
    HelperSyscall = 15,
    /// [`HttpRequest`]
    HttpRequest = 16,
    /// [`Descriptor`]: something was written to a socket from which a request had been read, or it was closed.
    RequestEnd = 17,
    /// [`Descriptor`]: the process can wait for many things at once from now on.
    Multiplexes = 18,
}

impl RecordKind {
    /// Every kind, in order of its number.
    pub const ALL: [Self; 18] = [
        Self::ActivationSwap,
        Self::HostCall,
        Self::HostCallEnd,
        Self::Syscall,
        Self::Trap,
        Self::Unwind,
        Self::CodePublished,
        Self::Exec,
        Self::ThreadExit,
        Self::Fork,
        Self::Calibrated,
        Self::ImportTable,
        Self::Mark,
        Self::MarkEnd,
        Self::HelperSyscall,
        Self::HttpRequest,
        Self::RequestEnd,
        Self::Multiplexes,
    ];

    /// The kind that `value` stands for.
    pub fn from_u8(value: u8) -> Option<Self> {
        Self::ALL.get(usize::from(value).checked_sub(1)?).copied()
    }
}

/// Opens every record.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct RecordHeader {
    /// A [`RecordKind`].
    pub kind: u8,
    /// [`STACK_TRUNCATED`], [`SLOT_UNKNOWN`], [`COMPONENT_CALL`], [`DOES_NOT_RETURN`] and [`HOST_FUNCTIONS_SOUGHT`], as
    /// far as they apply.
    pub flags: u8,
    /// Frames at the end of the record.
    pub frame_count: u16,
    /// Kernel thread id.
    pub tid: u32,
    /// Process: the kernel's thread-group id.
    pub pid: u32,
    /// Of an [`ActivationSwap`] that puts something on top and of an [`HttpRequest`]: low half of the number of the
    /// asynchronous task that the thread runs. 0: none, or not known.
    /// Of [`CodePublished`] and [`RecordKind::Exec`]: low half of the [`crate::Observed::code_epoch`] that begins with it.
    pub task: u32,
    /// `CLOCK_MONOTONIC`, nanoseconds. For a syscall: when it was entered.
    pub at_ns: u64,
}

/// The activation record of a thread is about to be replaced: wasm is entered or left, a fiber resumed or suspended.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct ActivationSwap {
    /// Kind [`RecordKind::ActivationSwap`].
    pub header: RecordHeader,
    /// Activation on top before; 0 for none, or when the TLS slot is not known.
    pub old: u64,
    /// Activation on top afterwards; 0 for none.
    pub new: u64,
    /// User stack pointer at the probe: tells an activation that returns (it lies just above) from one whose fiber has
    /// been suspended (it lies on another stack).
    pub stack_pointer: u64,
    /// Trap handler address of the activation on top before; lies in the entry trampoline of the export. 0 if unknown.
    pub entry_handler: u64,
}

/// A guest called a host function.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct HostCall {
    /// Kind [`RecordKind::HostCall`].
    pub header: RecordHeader,
    /// Activation that made the call; 0 if unknown.
    pub activation: u64,
    /// Trap handler address of that activation; 0 if unknown.
    pub entry_handler: u64,
    /// The callee's `VMContext`, which identifies the host function; for a component the function's data, which does too.
    pub callee: u64,
    /// The caller's `VMContext`, whose import table names the callee; for a component as [`COMPONENT_CALL`] says.
    pub caller: u64,
    /// User stack pointer on entry of the host function, where the return address is: the same as in its
    /// [`HostCallEnd`].
    pub frame: u64,
    /// Guest return addresses, innermost first.
    pub frames: [u64; MAX_FRAMES],
}

/// Register arguments kept of a [`Mark`].
pub const MARK_ARGUMENTS: usize = 4;

/// A function of the runtime was entered that is called seldom: what happens there is told by the site's kind.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Mark {
    /// Kind [`RecordKind::Mark`].
    pub header: RecordHeader,
    /// A [`crate::SiteKind`].
    pub site_kind: u64,
    /// Activation on top; 0 if there is none, or if that is not known.
    pub activation: u64,
    /// Trap handler address of that activation; 0 if unknown.
    pub entry_handler: u64,
    /// User stack pointer on entry, where the return address is: the same as in the [`MarkEnd`] of this call.
    pub stack_pointer: u64,
    /// The first integer arguments. Of a [`crate::SiteKind::RegisterModule`], the last is what the third points to; 0 if
    /// that cannot be read.
    pub arguments: [u64; MARK_ARGUMENTS],
    /// Guest return addresses, innermost first; none where the runtime was not called by guest code.
    pub frames: [u64; MAX_FRAMES],
}

/// A marked function is about to return.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct MarkEnd {
    /// Kind [`RecordKind::MarkEnd`].
    pub header: RecordHeader,
    /// A [`crate::SiteKind`].
    pub site_kind: u64,
    /// User stack pointer at the `ret`.
    pub stack_pointer: u64,
    /// What it returns.
    pub result: u64,
    /// The second register of what it returns, if that takes two.
    pub second_result: u64,
}

/// A host function is about to return to its guest.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct HostCallEnd {
    /// Kind [`RecordKind::HostCallEnd`].
    pub header: RecordHeader,
    /// User stack pointer on entry of the host function that ends.
    pub frame: u64,
    /// 1 if the host function succeeded, 0 if it is about to unwind the guest.
    pub succeeded: u64,
}

/// A syscall made below an activation, recorded when it returned or, with [`DOES_NOT_RETURN`], when it was entered.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Syscall {
    /// Kind [`RecordKind::Syscall`]; `at_ns` is when it was entered.
    pub header: RecordHeader,
    /// Activation that made the call; 0: the one on the thread.
    pub activation: u64,
    /// Trap handler address of that activation; 0 if unknown.
    pub entry_handler: u64,
    /// Nanoseconds from entry to exit.
    pub duration_ns: u64,
    /// Syscall number.
    pub number: u64,
    /// Return value; negative values are `-errno`.
    pub result: i64,
    /// First three arguments.
    pub arguments: [u64; 3],
    /// Guest return addresses, innermost first.
    pub frames: [u64; MAX_FRAMES],
}

/// A syscall made by a thread that has no activation of its own but does work that an activation handed over.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct HelperSyscall {
    /// Kind [`RecordKind::HelperSyscall`]; `at_ns` is when it was entered, `tid` the helper.
    pub header: RecordHeader,
    /// Activation that handed the work over.
    pub activation: u64,
    /// When it did, `CLOCK_MONOTONIC`, nanoseconds: tells which of its host calls, and tells it from an activation that
    /// later lies at the same address.
    pub handed_over_ns: u64,
    /// Nanoseconds from entry to exit.
    pub duration_ns: u64,
    /// Syscall number.
    pub number: u64,
    /// Return value; negative values are `-errno`.
    pub result: i64,
    /// First three arguments.
    pub arguments: [u64; 3],
}

/// A signal that the runtime may turn into a trap was delivered to a thread with an activation.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Trap {
    /// Kind [`RecordKind::Trap`].
    pub header: RecordHeader,
    /// Activation on top.
    pub activation: u64,
    /// Trap handler address of that activation; 0 if unknown.
    pub entry_handler: u64,
    /// Signal number.
    pub signal: u64,
    /// User instruction pointer; also the first of `frames` when it lies in guest code.
    pub instruction_pointer: u64,
    /// Guest addresses, innermost first.
    pub frames: [u64; MAX_FRAMES],
}

/// A trap or host error leaves wasm as an error value.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Unwind {
    /// Kind [`RecordKind::Unwind`].
    pub header: RecordHeader,
}

/// A code image is about to become executable.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct CodePublished {
    /// Kind [`RecordKind::CodePublished`].
    pub header: RecordHeader,
    /// First byte of the executable range; the image's ELF header lies one page before.
    pub address: u64,
    /// Length of the executable range, bytes.
    pub length: u64,
}

/// Something happened to a process or thread as a whole.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct ProcessEvent {
    /// Kind [`RecordKind::Exec`], [`RecordKind::ThreadExit`] or [`RecordKind::Fork`].
    pub header: RecordHeader,
    /// As the kind says.
    pub argument: u64,
}

/// The programs have found where a process keeps its activations.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Calibrated {
    /// Kind [`RecordKind::Calibrated`].
    pub header: RecordHeader,
    /// Which of the process's copies of the runtime.
    pub copy: u64,
    /// What is known of it now.
    pub found: crate::RuntimeCopy,
}

/// Bytes of a caller's `VMContext` that an [`ImportTable`] may hold: room for about 120 imports.
pub const IMPORT_TABLE_BYTES: usize = 4096;
/// It is read in pieces of this size, until one is not there.
pub const IMPORT_TABLE_CHUNK_BYTES: usize = 256;

/// The first call from one place to one host function: what is needed to name it. Instances live no longer than a
/// request, so this cannot be read later.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct ImportTable {
    /// Kind [`RecordKind::ImportTable`].
    pub header: RecordHeader,
    /// The callee's `VMContext`.
    pub callee: u64,
    /// The caller's `VMContext`.
    pub caller: u64,
    /// Guest return address of the call; 0 if unknown.
    pub call_site: u64,
    /// Bytes of `vmcontext` that were read.
    pub length: u64,
    /// Start of the caller's `VMContext`.
    pub vmcontext: [u8; IMPORT_TABLE_BYTES],
}

/// Header flag of an [`HttpRequest`]: it came out of a call that reads files as well as sockets.
pub const MAY_BE_FILE: u8 = 32;
/// Header flag of an [`HttpRequest`]: the thread has waited for several descriptors at once before.
pub const THREAD_MULTIPLEXES: u8 = 64;
/// Header flag of an [`HttpRequest`]: it is what was read next from where the one before was cut.
pub const CONTINUES: u8 = 128;
/// A first read of at most this many bytes is taken for a look at which protocol is spoken (hyper-util's looks at 24), and what
/// is read next is sent too.
pub const MAX_GLANCE_BYTES: u64 = 32;
/// Bytes of what was read that an [`HttpRequest`] may hold.
pub const REQUEST_HEAD_BYTES: usize = 4096;

/// A thread without activation has read something that begins like an HTTP/1 request. The record is cut after the last byte
/// of `head` that is in use.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct HttpRequest {
    /// Kind [`RecordKind::HttpRequest`]; `at_ns` is when the call returned.
    pub header: RecordHeader,
    /// Descriptor that it was read from.
    pub descriptor: u64,
    /// Bytes read.
    pub length: u64,
    /// Bytes of `head` that are in use.
    pub head_length: u64,
    /// The first bytes of them.
    pub head: [u8; REQUEST_HEAD_BYTES],
}

/// Something happened to a descriptor.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Descriptor {
    /// Kind [`RecordKind::RequestEnd`] or [`RecordKind::Multiplexes`].
    pub header: RecordHeader,
    /// Which.
    pub descriptor: u64,
}

// Frames come last and follow 8-byte fields only, so cutting a record never splits a field.
const _: () = {
    assert!(size_of::<RecordHeader>() == 24);
    assert!(core::mem::offset_of!(Syscall, frames) == 24 + 8 * 8);
    assert!(core::mem::offset_of!(HostCall, frames) == 24 + 5 * 8);
    assert!(core::mem::offset_of!(Trap, frames) == 24 + 4 * 8);
    assert!(core::mem::offset_of!(Mark, frames) == 24 + 8 * 8);
    assert!(size_of::<Mark>() <= MAX_RECORD_BYTES);
    assert!(size_of::<HostCall>() <= MAX_RECORD_BYTES);
    assert!(size_of::<Trap>() <= MAX_RECORD_BYTES);
    assert!(core::mem::offset_of!(HttpRequest, head) == 24 + 3 * 8);
    assert!(size_of::<Calibrated>() == 64);
};
