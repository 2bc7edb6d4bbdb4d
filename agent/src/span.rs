//! The product of the pipeline: one [`Trace`] per outermost activation, a tree of [`Span`]s in the vocabulary of roles.
//!
//! Diagrams, OTLP, metrics and JSON are written from this model and from nothing else. It knows neither eBPF nor wasmtime's layouts.
//! All times are nanoseconds of `CLOCK_MONOTONIC`; [`crate::clock`] turns them into wall time where an output needs it.

mod cold;
mod parent;
mod pause;
mod place;
mod size;
mod trace_id;

use std::sync::Arc;

use serde::{Deserialize, Serialize};

pub use self::cold::{ColdStart, Phase, PhaseKind, Starts};
pub use self::parent::{MAX_TRACESTATE_BYTES, Parent, ParentSource};
pub use self::pause::{Pause, ProbeKind};
pub use self::place::{Certainty, Owner, Place, PlaceSource};
pub use self::trace_id::NotATraceId;

/// What one outermost activation (host calls into wasm on an otherwise wasm-free call chain) did.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Trace {
    /// Derived from process start, activation address and start time: the same run gives the same id, two activations never share one.
    pub id: TraceId,
    /// The process it ran in.
    pub process: Arc<Process>,
    /// The outermost activation; its role is always [`Role::Invoke`].
    pub root: Span,
    /// What is known to be missing from this trace.
    pub losses: Vec<Loss>,
    /// Kernel records that this trace was built from.
    pub event_count: u64,
    /// Which of its invocations were the first of their module, and what came before.
    #[serde(default)]
    pub starts: Starts,
    /// The span of the application that caused it, if that is known for sure.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub parent: Option<Parent>,
    /// Times in which not all of it was observed.
    #[serde(default)]
    pub pauses: Vec<Pause>,
}

/// A W3C trace id, never all zero.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct TraceId(pub [u8; 16]);

/// A process that runs WebAssembly, as it was when it was first seen.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Process {
    /// Thread-group id in the agent's pid namespace.
    pub pid: u32,
    /// Nanoseconds of `CLOCK_BOOTTIME`; with `pid` it identifies the process.
    pub start_ns: u64,
    /// The command name the kernel reports; untrusted.
    pub command: String,
    /// Name of the runtime, `wasmtime`.
    pub runtime_name: String,
    /// Version as the runtime writes it into its code objects (`48` or `48.0.8`), if one has been read.
    pub runtime_version: Option<String>,
    /// What limits the view of this process (`stripped: activations are inferred from syscalls`), in words for a person.
    pub limits: Vec<String>,
    /// Where it runs, as far as is known.
    #[serde(default, skip_serializing_if = "Place::is_unknown")]
    pub place: Place,
}

/// One call across a boundary.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Span {
    /// When it began.
    pub start_ns: u64,
    /// When it ended, or the last moment at which it was known to run.
    pub end_ns: u64,
    /// How `start_ns` is known.
    pub start_bound: Bound,
    /// How `end_ns` is known.
    pub end_bound: Bound,
    /// Kernel thread id it began on.
    pub tid: u32,
    /// What it was.
    pub kind: SpanKind,
    /// How it ended.
    pub outcome: Outcome,
    /// The guest functions on the stack when it began, innermost first; empty for an outermost invocation.
    pub stack: Vec<Arc<Function>>,
    /// Guest frames that were deeper than the walk is allowed to go: the stack is cut, not complete.
    pub stack_truncated: bool,
    /// Calls made from it, by start time; they never overlap each other, save those of helper threads.
    pub children: Vec<Span>,
    /// Times at which its fiber left its thread, by start time; never overlapping.
    pub suspends: Vec<Suspend>,
}

/// How a point in time is known.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Bound {
    /// Observed at the boundary itself.
    Exact,
    /// Taken from the nearest event that must lie inside (start) or after it (end).
    Inferred,
    /// Not over, or already running, when the window ended or began.
    Open,
}

/// What a span was; the variants are the product's vocabulary of roles.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "role")]
pub enum SpanKind {
    /// Host → guest: an exported function was called.
    Invoke {
        /// The function entered; `None` when nothing showed it.
        function: Option<Arc<Function>>,
    },
    /// Guest → host: an imported function was called.
    HostCall {
        /// The import; `None` when the callee could not be matched to one.
        import: Option<Arc<Import>>,
    },
    /// Host → kernel.
    Syscall {
        /// x86-64 or arm64 syscall number, as the kernel saw it.
        number: u64,
        /// Name of `number` on the traced architecture, or `syscall_<n>`.
        name: String,
        /// The first three arguments, with 0 for those that are addresses or may be.
        args: [u64; 3],
        /// Return value; negative values are `-errno`. Zero where it is an address, and while `end_bound` is open.
        result: i64,
        /// Made by another thread (the span's `tid`) that did work which the host call had handed over and waits for.
        #[serde(default, skip_serializing_if = "std::ops::Not::not")]
        on_helper: bool,
    },
    /// A signal that the runtime turns into a trap of the guest (no duration).
    Trap {
        /// Kind in wasmtime's words (`unreachable`, `memory_out_of_bounds`, …) or `signal_<n>`.
        code: String,
        /// Guest function that trapped.
        function: Option<Arc<Function>>,
        /// Offset of the trapping instruction from the start of the function's machine code, bytes. Where the trap was
        /// reported by a call of the runtime: of the instruction after that call.
        native_offset: u64,
        /// Offset of the trapping instruction in the wasm binary, bytes; `None` where the image does not tell.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        wasm_offset: Option<u32>,
    },
    /// `memory.grow`.
    MemoryGrow(Growth),
    /// `table.grow`.
    TableGrow(Growth),
    /// The guest was stopped because its fuel or its time was used up, and went on later. One that did not go on is a
    /// [`Self::Trap`] (`out_of_fuel`, `interrupt`).
    Interruption(Interruption),
}

/// A guest's wish for a larger memory or table.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Growth {
    /// The instance whose memory or table it is, numbered within the process; used again for one that comes to where it was.
    pub instance: u64,
    /// Which of its memories or tables, as the runtime counts them.
    pub index: u32,
    /// By how much: pages or elements.
    pub delta: u64,
    /// Pages or elements before; known when the growth succeeded.
    pub old: Option<u64>,
    /// Pages or elements afterwards; known when the growth succeeded.
    pub new: Option<u64>,
    /// Bytes of a page; `None` for tables.
    pub page_bytes: Option<u64>,
    /// Most pages or elements that the module's own declaration allows, where that could be read.
    pub maximum: Option<u64>,
    /// The guest function that asked.
    pub function: Option<Arc<Function>>,
    /// Offset of the instruction in the wasm binary, bytes.
    pub wasm_offset: Option<u32>,
}

/// A stop that the host had asked for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Interruption {
    /// Why.
    pub cause: InterruptionCause,
    /// The guest function that was stopped.
    pub function: Option<Arc<Function>>,
    /// Offset of the instruction in the wasm binary, bytes.
    pub wasm_offset: Option<u32>,
}

/// Why a guest was stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum InterruptionCause {
    /// The fuel that it may use at once was used up.
    Fuel,
    /// It ran past its epoch deadline.
    Epoch,
}

/// The roles by name, as they appear in attributes and labels.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[expect(missing_docs, reason = "described at the variants of SpanKind")]
pub enum Role {
    Invoke,
    HostCall,
    Syscall,
    Trap,
    MemoryGrow,
    TableGrow,
    Interruption,
}

/// How a span ended.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "outcome")]
pub enum Outcome {
    /// Returned. For a syscall: with a result that is not an error.
    Ok,
    /// An invocation that ended in a trap.
    Trap {
        /// As in [`SpanKind::Trap`].
        code: String,
    },
    /// An invocation unwound by an error that a host call returned (or raised), or a host call that did so.
    HostError,
    /// The guest asked to exit ([`Import::is_exit`]).
    Exit,
    /// A growth that failed: the guest was given -1.
    Refused,
    /// A syscall that failed.
    Errno {
        /// Positive errno.
        errno: u16,
    },
    /// The window, thread or process ended first.
    Unfinished,
    /// Nothing shows how it ended.
    Unknown,
}

/// An interval in which a fiber was off every thread.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Suspend {
    /// When the fiber left its thread.
    pub start_ns: u64,
    /// When it was resumed; `None` if it had not been when the window ended.
    pub end_ns: Option<u64>,
    /// Thread that it left.
    pub from_tid: u32,
    /// Thread that resumed it.
    pub to_tid: Option<u32>,
}

/// A WebAssembly module or component as loaded in a process.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Module {
    /// From the name section, else the file it was mapped from, else `module-<hash>`; untrusted, at most 256 bytes.
    pub name: String,
    /// First 12 hex digits of a SHA-256 over the machine code and metadata: equal for the same guest compiled alike, on every node.
    pub hash: String,
}

/// A guest function.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Function {
    /// Module it belongs to.
    pub module: Arc<Module>,
    /// Index in the module, imports included.
    pub index: u32,
    /// Export name, else the name section's, else `function[<index>]`; untrusted, at most 256 bytes.
    pub name: String,
}

/// An imported function.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Import {
    /// The interface, `wasi_snapshot_preview1`; untrusted, at most 256 bytes.
    pub module: String,
    /// The function, `fd_write`; untrusted, at most 256 bytes.
    pub name: String,
}

impl Import {
    /// Whether it is how WASI lets a guest end its program: a call of it that does not return is an exit. A function of the same
    /// name in another interface is not.
    pub fn is_exit(&self) -> bool {
        match self.module.as_str() {
            "wasi_snapshot_preview1" | "wasi_unstable" => self.name == "proc_exit",
            interface => {
                let name = interface.split('@').next();
                name == Some("wasi:cli/exit") && matches!(self.name.as_str(), "exit" | "exit-with-code")
            }
        }
    }
}

/// A counted loss.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Loss {
    /// Where: `kernel`, `ring`, `decode`, `symbols`, `correlate`, `recorder`, `export`.
    pub layer: String,
    /// Why, in snake case: `ring_full`, `image_gone`, `queue_full`, …
    pub reason: String,
    /// How many, ≥ 1.
    pub count: u64,
}

/// Accounts for a whole capture: what was watched, for how long, and what is missing.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Capture {
    /// First moment at which probes were active.
    pub start_ns: u64,
    /// Last moment.
    pub end_ns: u64,
    /// Records that the kernel emitted for us.
    pub emitted_count: u64,
    /// Records that reached the correlator.
    pub delivered_count: u64,
    /// Everything known to be missing. `emitted_count = delivered_count + Σ losses of layer ring`.
    pub losses: Vec<Loss>,
    /// Kernel release the capture was made on.
    pub kernel_release: String,
    /// `true` when this is a replay of a recording, with a note on its origin for the person who looks at it.
    pub replay_of: Option<String>,
    /// Traces that were seen, including those not kept.
    pub trace_count: u64,
}

impl Trace {
    /// The trace id under which it leaves: that of the application's trace where it is part of one, else its own. Several
    /// traces may share one.
    pub fn exported_id(&self) -> TraceId {
        self.parent.as_ref().map_or(self.id, |parent| parent.trace_id)
    }
}

impl Span {
    /// How long it took, as far as is known.
    pub fn duration_ns(&self) -> u64 {
        self.end_ns.saturating_sub(self.start_ns)
    }

    /// Whether another thread did it while this one, or nothing, went on: its time is nobody else's.
    pub fn is_on_helper(&self) -> bool {
        matches!(self.kind, SpanKind::Syscall { on_helper: true, .. })
    }

    /// Time spent in it but in none of its children and not suspended. What helper threads do meanwhile takes nothing from it.
    pub fn self_ns(&self) -> u64 {
        let own = self.children.iter().filter(|child| !child.is_on_helper());
        let children: u64 = own.map(Span::duration_ns).sum();
        let child_suspends: u64 = self.children.iter().map(Span::suspended_ns).sum();
        let own_suspends = self.suspended_ns().saturating_sub(child_suspends);
        self.duration_ns().saturating_sub(children).saturating_sub(own_suspends)
    }

    /// Time in which its fiber was off every thread, its children's included.
    pub fn suspended_ns(&self) -> u64 {
        self.suspends
            .iter()
            .map(|s| s.end_ns.unwrap_or(self.end_ns).saturating_sub(s.start_ns))
            .sum()
    }

    /// What it was, without the details.
    pub fn role(&self) -> Role {
        match self.kind {
            SpanKind::Invoke { .. } => Role::Invoke,
            SpanKind::HostCall { .. } => Role::HostCall,
            SpanKind::Syscall { .. } => Role::Syscall,
            SpanKind::Trap { .. } => Role::Trap,
            SpanKind::MemoryGrow(_) => Role::MemoryGrow,
            SpanKind::TableGrow(_) => Role::TableGrow,
            SpanKind::Interruption(_) => Role::Interruption,
        }
    }

    /// The span and everything below it, parents first.
    pub fn walk(&self) -> impl Iterator<Item = &Span> {
        let mut pending = vec![self];
        std::iter::from_fn(move || {
            let span = pending.pop()?;
            pending.extend(span.children.iter().rev());
            Some(span)
        })
    }
}

impl Role {
    /// The word used in attributes, labels and file formats.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Invoke => "invoke",
            Self::HostCall => "host_call",
            Self::Syscall => "syscall",
            Self::Trap => "trap",
            Self::MemoryGrow => "memory_grow",
            Self::TableGrow => "table_grow",
            Self::Interruption => "interruption",
        }
    }
}

impl Growth {
    /// Bytes before, of a memory.
    pub fn old_bytes(&self) -> Option<u64> {
        self.old?.checked_mul(self.page_bytes?)
    }

    /// Bytes afterwards, of a memory.
    pub fn new_bytes(&self) -> Option<u64> {
        self.new?.checked_mul(self.page_bytes?)
    }

    /// Most bytes, of a memory.
    pub fn maximum_bytes(&self) -> Option<u64> {
        self.maximum?.checked_mul(self.page_bytes?)
    }
}

impl InterruptionCause {
    /// The word used in attributes and labels.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Fuel => "fuel",
            Self::Epoch => "epoch",
        }
    }

    /// The trap that it is if the guest does not go on, in wasmtime's words.
    pub fn trap_code(self) -> &'static str {
        match self {
            Self::Fuel => "out_of_fuel",
            Self::Epoch => "interrupt",
        }
    }
}

impl Outcome {
    /// A word of a closed set, fit for a label.
    pub fn as_str(&self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Trap { .. } => "trap",
            Self::HostError => "host_error",
            Self::Exit => "exit",
            Self::Refused => "refused",
            Self::Errno { .. } => "errno",
            Self::Unfinished => "unfinished",
            Self::Unknown => "unknown",
        }
    }

    /// Whether a person looking for trouble wants to see it.
    pub fn is_failure(&self) -> bool {
        matches!(self, Self::Trap { .. } | Self::HostError | Self::Errno { .. })
    }
}
