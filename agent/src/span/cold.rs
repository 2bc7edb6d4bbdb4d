//! Cold starts: what a module went through before the first call into it.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::Module;

/// What is known of the invocations of a trace being the first of their module.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Starts {
    /// The invocations that were the first after their module had been loaded, nested ones included, by time.
    pub cold: Vec<ColdStart>,
    /// The outermost invocation is known not to be the first: its module had been called before in this process. `false`
    /// also where nothing is known.
    pub is_warm: bool,
}

/// The first call into a module since it was loaded, and what came before.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ColdStart {
    /// When the invocation began that was the first.
    pub invoked_ns: u64,
    /// Thread it began on.
    pub tid: u32,
    /// What was loaded.
    pub module: Arc<Module>,
    /// When its code became executable.
    pub published_ns: u64,
    /// What was seen of getting it ready, by start time. Empty where the host's functions cannot be probed.
    pub phases: Vec<Phase>,
}

/// A part of a cold start. Those of kind [`PhaseKind::Publish`] lie within another, all others follow each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Phase {
    /// What was done.
    pub kind: PhaseKind,
    /// When it began.
    pub start_ns: u64,
    /// When it ended.
    pub end_ns: u64,
    /// Thread it began on.
    pub tid: u32,
}

/// What a phase does. The variants are words of the vocabulary of roles.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PhaseKind {
    /// Machine code that had been kept was read: a file mapped, bytes copied, a cache looked up.
    Read,
    /// Machine code was made from wasm.
    Compile,
    /// A module was made of machine code that had been kept.
    Deserialize,
    /// The code was made executable; part of compiling or deserializing.
    Publish,
    /// The first instance was made.
    Instantiate,
    /// That instance ran what a guest runs before anybody may call it: its start function, its segments.
    Start,
}

impl PhaseKind {
    /// The word used in attributes, labels and file formats.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Read => "read",
            Self::Compile => "compile",
            Self::Deserialize => "deserialize",
            Self::Publish => "publish",
            Self::Instantiate => "instantiate",
            Self::Start => "start",
        }
    }
}

impl Phase {
    /// How long it took.
    pub fn duration_ns(&self) -> u64 {
        self.end_ns.saturating_sub(self.start_ns)
    }
}

impl ColdStart {
    /// What all phases took together; the time between them, in which the host did something else, is none of it.
    pub fn duration_ns(&self) -> u64 {
        self.parts().map(Phase::duration_ns).sum()
    }

    /// The phases that add up: all but those that lie within another.
    pub fn parts(&self) -> impl Iterator<Item = &Phase> {
        let has_whole = self.phases.iter().any(|phase| phase.kind != PhaseKind::Publish);
        self.phases
            .iter()
            .filter(move |phase| phase.kind != PhaseKind::Publish || !has_whole)
    }

    /// Whether a span of the trace is the invocation that this is about.
    pub fn is_of(&self, span: &super::Span) -> bool {
        span.start_ns == self.invoked_ns && span.tid == self.tid && span.role() == super::Role::Invoke
    }
}
