//! Counters kept by the programs in one per-CPU array; the index is the variant.

/// What a program counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u32)]
pub enum Counter {
    /// Records offered to the ring buffer: delivered + `RingFull`.
    Emitted = 0,
    /// Records lost since the ring buffer was full.
    RingFull = 1,
    /// Syscalls of watched threads that had no activation.
    SyscallOffActivation = 2,
    /// Threads that could not be tracked since the thread table was full.
    ThreadTableFull = 3,
    /// Activations whose record could not be read (paged out, or being torn down).
    ActivationUnreadable = 4,
    /// Events of a process whose layout was not known yet.
    Uncalibrated = 5,
    /// Guest stacks whose frame chain broke before the entry frame.
    StackBroken = 7,
    /// Guest stacks deeper than the walk goes.
    StackTooDeep = 8,
    /// Processes that could not be watched since the process table was full.
    ProcessTableFull = 9,
    /// What the aggregate counted under nobody's name since its table was full.
    AggregateFull = 10,
    /// Syscalls made below an activation while no guest function was waiting for them, as when the runtime handles a
    /// trap: they have no guest frames.
    NoGuestFrames = 11,
    /// Work handed to helper threads that could not be followed since the table of it was full: its syscalls are among
    /// those without an activation.
    HelperTableFull = 12,
    /// Activations that the aggregate counts without their duration since the table of open ones was full.
    OpenTableFull = 13,
    /// What the aggregate counted without its name since its process had as many rows as one may have.
    ProcessRowsFull = 14,
    /// As `ThreadTableFull`, since its process had as many threads in it as one may have.
    ProcessThreadsFull = 15,
}

/// Entries of the counter array.
pub const COUNTER_SLOTS: u32 = 16;

impl Counter {
    /// Every counter.
    pub const ALL: [Self; 15] = [
        Self::Emitted,
        Self::RingFull,
        Self::SyscallOffActivation,
        Self::ThreadTableFull,
        Self::ActivationUnreadable,
        Self::Uncalibrated,
        Self::StackBroken,
        Self::StackTooDeep,
        Self::ProcessTableFull,
        Self::AggregateFull,
        Self::NoGuestFrames,
        Self::HelperTableFull,
        Self::OpenTableFull,
        Self::ProcessRowsFull,
        Self::ProcessThreadsFull,
    ];

    /// The name used in metrics and diagrams.
    pub fn name(self) -> &'static str {
        match self {
            Self::Emitted => "emitted",
            Self::RingFull => "ring_full",
            Self::SyscallOffActivation => "syscall_off_activation",
            Self::ThreadTableFull => "thread_table_full",
            Self::ActivationUnreadable => "activation_unreadable",
            Self::Uncalibrated => "uncalibrated",
            Self::StackBroken => "stack_broken",
            Self::StackTooDeep => "stack_too_deep",
            Self::ProcessTableFull => "process_table_full",
            Self::AggregateFull => "aggregate_full",
            Self::NoGuestFrames => "no_guest_frames",
            Self::HelperTableFull => "helper_table_full",
            Self::OpenTableFull => "open_table_full",
            Self::ProcessRowsFull => "process_rows_full",
            Self::ProcessThreadsFull => "process_threads_full",
        }
    }

    /// Whether a count means that something is missing from the picture. What the aggregate counts without a name is counted all the same: see
    /// [`Self::overflow`].
    pub fn is_loss(self) -> bool {
        !matches!(
            self,
            Self::Emitted
                | Self::SyscallOffActivation
                | Self::StackTooDeep
                | Self::NoGuestFrames
                | Self::AggregateFull
                | Self::ProcessRowsFull
        )
    }

    /// The table that was full, if a count means that something was counted under another name and nothing is missing.
    pub fn overflow(self) -> Option<&'static str> {
        match self {
            Self::AggregateFull => Some("kernel_rows"),
            Self::ProcessRowsFull => Some("process_rows"),
            _ => None,
        }
    }
}
