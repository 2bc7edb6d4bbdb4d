//! What a sequence diagram consists of, whatever it is drawn with.
//!
//! Text in it is visible and one line (no control or formatting characters), bounded in length, but not escaped: that is the formats' part.

/// A sequence diagram.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sequence {
    /// The headline: what ran, for how long, and how it failed if it did.
    pub title: String,
    /// Lifelines from left to right; never empty.
    pub participants: Vec<Participant>,
    /// Frames around neighbouring lifelines; they do not overlap.
    pub groups: Vec<Group>,
    /// What happened, in order of time. Loops and activations are balanced.
    pub steps: Vec<Step>,
    /// The note below everything: where the time went, what is missing, how to find the trace again.
    pub closing: Vec<String>,
    /// The figures behind [`Sequence::closing`].
    pub totals: Totals,
}

/// Index into [`Sequence::participants`].
pub type ParticipantId = usize;

/// One lifeline.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Participant {
    /// What it stands for.
    pub kind: ParticipantKind,
    /// Its name, then what identifies it further.
    pub lines: Vec<String>,
}

/// What a lifeline stands for, from left to right.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum ParticipantKind {
    /// The process that embeds the runtime.
    Host,
    /// A guest module.
    Guest,
    /// A module of imports, implemented by the host.
    Interface,
    /// The kernel.
    Kernel,
}

/// A frame around lifelines.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Group {
    /// What they share.
    pub title: String,
    /// Leftmost lifeline.
    pub first: ParticipantId,
    /// Rightmost lifeline.
    pub last: ParticipantId,
}

/// One line of the diagram.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// An arrow.
    Message {
        /// Where it starts.
        from: ParticipantId,
        /// Where it points; may equal `from`.
        to: ParticipantId,
        /// What it means.
        arrow: Arrow,
        /// What it does to the activation bars.
        bar: Bar,
        /// What is written on it; at least one line.
        lines: Vec<String>,
    },
    /// Text over some lifelines.
    Note {
        /// Leftmost lifeline.
        first: ParticipantId,
        /// Rightmost lifeline.
        last: ParticipantId,
        /// At least one line.
        lines: Vec<String>,
    },
    /// The innermost bar of a lifeline ends without an arrow: nothing was seen to return.
    EndBar {
        /// Whose bar.
        at: ParticipantId,
    },
    /// What follows, up to the matching [`Step::LoopEnd`], happened several times.
    LoopBegin {
        /// How often and how long.
        label: String,
    },
    /// Ends the innermost loop.
    LoopEnd,
    /// The fiber was off every thread.
    Suspended {
        /// Leftmost lifeline that waited.
        first: ParticipantId,
        /// Rightmost lifeline that waited.
        last: ParticipantId,
        /// For how long, and which threads.
        lines: Vec<String>,
    },
}

/// What an arrow means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Arrow {
    /// A call.
    Call,
    /// A return.
    Return,
    /// The callee was left by a trap or an error.
    Failed,
}

/// What a message does to the activation bars.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bar {
    /// Nothing.
    Keep,
    /// A bar begins at its target.
    Begin,
    /// The innermost bar of its source ends.
    End,
}

/// Figures of a whole trace. Times in nanoseconds; `guest + host + kernel + suspended = duration`, exactly.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Totals {
    /// From the start to the end of the outermost invocation.
    pub duration_ns: u64,
    /// In guests: own time of invocations.
    pub guest_ns: u64,
    /// In the host: own time of host calls, and of what guests call the runtime for.
    pub host_ns: u64,
    /// In syscalls.
    pub kernel_ns: u64,
    /// With the fiber off every thread.
    pub suspended_ns: u64,
    /// In syscalls of helper threads, side by side with the rest: part of none of the above.
    pub helper_ns: u64,
    /// How many of those there were.
    pub helper_count: u64,
    /// Calls in the trace: invocations, host calls, syscalls, growth, interruptions. `drawn + repeated + folded = call`.
    pub call_count: u64,
    /// Calls drawn one by one; one of each loop is.
    pub drawn_count: u64,
    /// Further iterations of loops.
    pub repeated_count: u64,
    /// Calls folded into notes.
    pub folded_count: u64,
}
