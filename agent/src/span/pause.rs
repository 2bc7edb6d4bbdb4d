//! Times in which probes were paused since they would have cost more than they may.

use serde::{Deserialize, Serialize};

/// What was not observed meanwhile.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ProbeKind {
    /// Host calls.
    HostCall,
    /// Activations: invocations, suspensions, and what the runtime is called for.
    Activation,
    /// Syscalls.
    Syscall,
}

impl ProbeKind {
    /// Every kind, in the order in which they are paused.
    pub const ALL: [Self; 3] = [Self::HostCall, Self::Activation, Self::Syscall];

    /// The word for it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::HostCall => "host_call",
            Self::Activation => "activation",
            Self::Syscall => "syscall",
        }
    }
}

/// A part of a trace in which probes of one kind were paused: what they observe may have happened there, unseen.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pause {
    /// Which.
    pub probe: ProbeKind,
    /// From when on, not before the trace began.
    pub start_ns: u64,
    /// Until when, not after the trace ended.
    pub end_ns: u64,
}
