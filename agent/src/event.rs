//! Decoded, resolved events: what the correlator consumes and what a recording holds.
//!
//! An event stream defines functions and imports before it refers to them by number, so that recordings are small and a
//! replay needs neither the process nor the kernel.

use serde::{Deserialize, Serialize};

use crate::span::{Loss, PhaseKind, Process};

/// Number of a function defined earlier in the same stream.
pub type FunctionId = u32;
/// Number of an import defined earlier in the same stream.
pub type ImportId = u32;

/// One event.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Event {
    /// `CLOCK_MONOTONIC`, nanoseconds.
    pub at_ns: u64,
    /// Thread-group id.
    pub pid: u32,
    /// Thread id.
    pub tid: u32,
    /// What happened.
    #[serde(flatten)]
    pub kind: EventKind,
}

/// What happened.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "event")]
pub enum EventKind {
    /// Defines, or redefines, the process `pid`.
    Process {
        /// Its description.
        process: Process,
        /// Which ends are observed rather than inferred.
        coverage: Coverage,
    },
    /// Defines a function.
    Function {
        /// Its number; numbers are given once.
        id: FunctionId,
        /// Name of its module.
        module: String,
        /// Hash of its module.
        hash: String,
        /// Index in the module.
        index: u32,
        /// Its name.
        name: String,
    },
    /// Defines an import.
    Import {
        /// Its number; numbers are given once.
        id: ImportId,
        /// Its interface.
        module: String,
        /// Its name.
        name: String,
    },
    /// A module became executable: from here on it is cold until it is first called.
    ModulePublished {
        /// Its name.
        module: String,
        /// Its hash.
        hash: String,
        /// Where its code is; 0 in recordings that do not say.
        #[serde(default, skip_serializing_if = "is_zero")]
        image: u64,
    },
    /// Something that gets a module ready to be called is over.
    Phase {
        /// What it was.
        phase: PhaseKind,
        /// When it began.
        start_ns: u64,
        /// Where the module's code is; 0 if it is not known which module it is.
        image: u64,
        /// Its name.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        module: Option<String>,
        /// Its hash.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        hash: Option<String>,
        /// It is the first of its kind since the module was loaded.
        is_first: bool,
    },
    /// An activation turns out to be the first call into a code object since that became executable.
    FirstCall {
        /// Which activation.
        activation: u64,
        /// Where the code is.
        image: u64,
    },
    /// The thread's activation is about to be replaced.
    ActivationSwap {
        /// Activation on top before, 0 for none; `None` if that could not be seen.
        old: Option<u64>,
        /// Activation on top afterwards, 0 for none.
        new: u64,
        /// Stack pointer of the code that does it.
        stack_pointer: u64,
        /// Function through which `old` was entered.
        entry: Option<FunctionId>,
    },
    /// A guest called a host function.
    HostCall {
        /// Activation it belongs to; 0 if unknown.
        activation: u64,
        /// Function through which that was entered.
        entry: Option<FunctionId>,
        /// Which import.
        import: Option<ImportId>,
        /// Stack pointer on entry of the host function; 0 if unknown, as in recordings before 0.2.
        #[serde(default)]
        frame: u64,
        /// Guest functions, innermost first.
        stack: Vec<FunctionId>,
        /// The stack is cut.
        #[serde(default, skip_serializing_if = "std::ops::Not::not")]
        truncated: bool,
    },
    /// The host function called last is about to return.
    HostCallEnd {
        /// As in its `HostCall`.
        #[serde(default)]
        frame: u64,
        /// Whether it returns to the guest rather than unwinding it.
        succeeded: bool,
    },
    /// A syscall returned; `at_ns` is when it was entered.
    Syscall {
        /// Activation it belongs to.
        activation: u64,
        /// Function through which that was entered.
        entry: Option<FunctionId>,
        /// Time in the kernel, nanoseconds.
        duration_ns: u64,
        /// Number.
        number: u64,
        /// Return value.
        result: i64,
        /// First three arguments.
        arguments: [u64; 3],
        /// Guest functions, innermost first.
        stack: Vec<FunctionId>,
        /// The stack is cut.
        #[serde(default, skip_serializing_if = "std::ops::Not::not")]
        truncated: bool,
    },
    /// A signal that the runtime turns into a trap.
    Trap {
        /// Activation it belongs to.
        activation: u64,
        /// Function through which that was entered.
        entry: Option<FunctionId>,
        /// As in [`crate::span::SpanKind::Trap`].
        code: String,
        /// Guest functions, innermost first; the first one trapped.
        stack: Vec<FunctionId>,
        /// As in [`crate::span::SpanKind::Trap`].
        native_offset: u64,
    },
    /// The error of the activation that just ended is being made: it ended in a trap or host error.
    Unwind,
    /// The thread ended.
    ThreadExit,
    /// The process ended or replaced its image.
    ProcessGone,
    /// Something is missing from here on.
    Lost {
        /// What.
        loss: Loss,
    },
}

/// Which boundaries of a process are observed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[expect(clippy::struct_excessive_bools, reason = "independent facts about one process")]
pub struct Coverage {
    /// Activations: invocations begin and end exactly.
    pub activations: bool,
    /// Entries of host calls.
    pub host_calls: bool,
    /// Ends of host calls.
    pub host_call_ends: bool,
    /// Traps and host errors that leave as error values.
    pub unwinds: bool,
}

impl EventKind {
    /// The word for it in metrics.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Process { .. } => "process",
            Self::Function { .. } => "function",
            Self::Import { .. } => "import",
            Self::ModulePublished { .. } => "module_published",
            Self::Phase { .. } => "phase",
            Self::FirstCall { .. } => "first_call",
            Self::ActivationSwap { .. } => "activation_swap",
            Self::HostCall { .. } => "host_call",
            Self::HostCallEnd { .. } => "host_call_end",
            Self::Syscall { .. } => "syscall",
            Self::Trap { .. } => "trap",
            Self::Unwind => "unwind",
            Self::ThreadExit => "thread_exit",
            Self::ProcessGone => "process_gone",
            Self::Lost { .. } => "lost",
        }
    }
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde calls it so")]
fn is_zero(number: &u64) -> bool {
    *number == 0
}
