//! Decoded, resolved events: what the correlator consumes and what a recording holds.
//!
//! An event stream defines functions and imports before it refers to them by number, so that recordings are small and a
//! replay needs neither the process nor the kernel.

use serde::{Deserialize, Serialize};

use crate::{
    http_request::RequestProblem,
    span::{InterruptionCause, Loss, Parent, PhaseKind, ProbeKind, Process},
};

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
        process: Box<Process>,
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
    /// Functions and imports that are not referred to again.
    Forgotten {
        /// Functions.
        functions: Vec<FunctionId>,
        /// Imports.
        imports: Vec<ImportId>,
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
    /// A syscall returned, or was seen not to; `at_ns` is when it was entered.
    Syscall {
        /// Activation it belongs to; 0: to the one on the thread, if there is one.
        activation: u64,
        /// Function through which that was entered.
        entry: Option<FunctionId>,
        /// Time in the kernel as far as it was seen, nanoseconds.
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
        /// It was made by a helper thread, for work that the activation handed over at this time, nanoseconds.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        handed_over_ns: Option<u64>,
        /// It does not return, or had not when the window ended.
        #[serde(default, skip_serializing_if = "std::ops::Not::not")]
        is_open: bool,
    },
    /// A signal that the runtime turns into a trap, or a trap that guest code reports by a call.
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
        /// As in [`crate::span::SpanKind::Trap`].
        #[serde(default, skip_serializing_if = "Option::is_none")]
        wasm_offset: Option<u32>,
    },
    /// Guest code called the runtime for something that takes time or may fail.
    RuntimeCall {
        /// Activation it belongs to; 0 if unknown.
        activation: u64,
        /// Function through which that was entered.
        entry: Option<FunctionId>,
        /// For what.
        call: RuntimeCall,
        /// Stack pointer on entry: pairs it with its end, whatever thread that is on.
        stack_pointer: u64,
        /// Guest functions, innermost first.
        stack: Vec<FunctionId>,
        /// The stack is cut.
        #[serde(default, skip_serializing_if = "std::ops::Not::not")]
        truncated: bool,
        /// Offset of the instruction after the call from the start of its function's machine code, bytes.
        native_offset: u64,
        /// Offset of the calling instruction in the wasm binary, bytes.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        wasm_offset: Option<u32>,
    },
    /// A call of the runtime is about to return.
    RuntimeCallEnd {
        /// As in its begin.
        stack_pointer: u64,
        /// What comes of it.
        result: RuntimeResult,
    },
    /// The runtime is about to unwind the guest: a call of a host function or of the runtime failed.
    Raise {
        /// Activation it belongs to; 0 if unknown.
        activation: u64,
        /// Function through which that was entered.
        entry: Option<FunctionId>,
        /// The trap, if what was called can fail in one way only.
        code: Option<String>,
        /// Guest functions, innermost first.
        stack: Vec<FunctionId>,
        /// As in [`crate::span::SpanKind::Trap`].
        native_offset: u64,
        /// As in [`crate::span::SpanKind::Trap`].
        #[serde(default, skip_serializing_if = "Option::is_none")]
        wasm_offset: Option<u32>,
    },
    /// An HTTP request was read, outside of any activation.
    HttpRequest {
        /// Where it was read from: a number that is used again.
        descriptor: u32,
        /// The asynchronous task that read it; 0: none, or not known.
        #[serde(default, skip_serializing_if = "is_zero_u32")]
        task: u32,
        /// Nothing in the process switches between requests: what the thread does next is for this one.
        is_exclusive: bool,
        /// The span that it names.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        parent: Option<Parent>,
        /// Why it is not known which span that is.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        problem: Option<RequestProblem>,
    },
    /// Something was written to a socket from which a request had been read, or it was closed.
    RequestEnd {
        /// As in its `HttpRequest`.
        descriptor: u32,
    },
    /// The asynchronous task that the thread runs at the next event, which is of the thread too.
    Task {
        /// Its number.
        task: u32,
    },
    /// Records of requests may be missing: none of those seen so far is known to go on.
    RequestsUncertain,
    /// The environment of the process says under which span of the application it runs.
    Environment {
        /// That span.
        parent: Parent,
    },
    /// The error of the activation that just ended is being made: it ended in a trap or host error.
    Unwind,
    /// The thread ended.
    ThreadExit,
    /// The process ended or replaced its image.
    ProcessGone,
    /// Probes in the process are being paused: from here on, what they observe may not be seen. Events of before may follow.
    ProbesPaused {
        /// Which.
        probes: Vec<ProbeKind>,
    },
    /// Nothing of paused probes follows: what is open may end unseen.
    ProbesSilent {
        /// Which.
        probes: Vec<ProbeKind>,
    },
    /// Probes in the process are there again. Events of before may follow, those of theirs do.
    ProbesResumed {
        /// Which.
        probes: Vec<ProbeKind>,
    },
    /// Something is missing from here on.
    Lost {
        /// What.
        loss: Loss,
    },
}

/// What guest code called the runtime for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "call")]
pub enum RuntimeCall {
    /// A larger memory.
    MemoryGrow(WantedGrowth),
    /// A larger table.
    TableGrow(WantedGrowth),
    /// It has used up its fuel or its time.
    Interruption {
        /// Which of the two.
        cause: InterruptionCause,
    },
}

/// As in [`crate::span::Growth`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[expect(missing_docs, reason = "described there")]
pub struct WantedGrowth {
    pub instance: u64,
    pub index: u32,
    pub delta: u64,
    pub page_bytes: Option<u64>,
    pub maximum: Option<u64>,
}

/// What comes of a call of the runtime.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "result")]
pub enum RuntimeResult {
    /// The guest goes on.
    Continued,
    /// It has grown.
    Grown {
        /// Pages or elements before.
        old: u64,
    },
    /// It has not grown, and the guest goes on.
    Refused,
    /// The guest is unwound.
    Unwinds,
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
            Self::Forgotten { .. } => "forgotten",
            Self::ModulePublished { .. } => "module_published",
            Self::Phase { .. } => "phase",
            Self::FirstCall { .. } => "first_call",
            Self::ActivationSwap { .. } => "activation_swap",
            Self::HostCall { .. } => "host_call",
            Self::HostCallEnd { .. } => "host_call_end",
            Self::Syscall { .. } => "syscall",
            Self::Trap { .. } => "trap",
            Self::RuntimeCall { .. } => "runtime_call",
            Self::RuntimeCallEnd { .. } => "runtime_call_end",
            Self::Raise { .. } => "raise",
            Self::HttpRequest { .. } => "http_request",
            Self::RequestEnd { .. } => "request_end",
            Self::Task { .. } => "task",
            Self::RequestsUncertain => "requests_uncertain",
            Self::Environment { .. } => "environment",
            Self::Unwind => "unwind",
            Self::ThreadExit => "thread_exit",
            Self::ProcessGone => "process_gone",
            Self::ProbesPaused { .. } => "probes_paused",
            Self::ProbesSilent { .. } => "probes_silent",
            Self::ProbesResumed { .. } => "probes_resumed",
            Self::Lost { .. } => "lost",
        }
    }
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde calls it so")]
fn is_zero(number: &u64) -> bool {
    *number == 0
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde calls it so")]
fn is_zero_u32(number: &u32) -> bool {
    *number == 0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_syscall_of_a_recording_that_knows_no_helper_threads_is_read() {
        let line = r#"{"at_ns":5,"pid":1,"tid":2,"event":"syscall","activation":4096,"entry":null,"duration_ns":7,"number":0,
            "result":-11,"arguments":[3,0,64],"stack":[1,0]}"#;
        let event: Event = serde_json::from_str(line).unwrap();
        let EventKind::Syscall {
            handed_over_ns,
            is_open,
            ..
        } = &event.kind
        else {
            panic!("{event:?}")
        };
        assert_eq!((*handed_over_ns, *is_open), (None, false));
        let written = serde_json::to_string(&event).unwrap();
        assert!(
            !written.contains("handed_over_ns") && !written.contains("is_open"),
            "{written}"
        );
    }
}
