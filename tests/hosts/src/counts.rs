//! Counters of what a host really did, each added to at the point of doing.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use serde::Serialize;

/// One number; clones share it.
#[derive(Clone, Debug, Default)]
pub struct Counter(Arc<AtomicU64>);

impl Counter {
    /// Adds one.
    pub fn add_one(&self) {
        self.add(1);
    }

    /// Adds `amount`.
    pub fn add(&self, amount: u64) {
        self.0.fetch_add(amount, Ordering::Relaxed);
    }

    /// The number now.
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// Counters by name. Looking one up locks (and may wait for) a mutex: do it outside host functions and keep the
/// [`Counter`].
#[derive(Debug, Default)]
pub struct Group(Mutex<BTreeMap<String, Counter>>);

impl Group {
    /// The counter called `name`; it is zero when first asked for.
    pub fn counter(&self, name: &str) -> Counter {
        let mut counters = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(counter) = counters.get(name) {
            return counter.clone();
        }
        counters.entry(name.to_owned()).or_default().clone()
    }

    fn snapshot(&self) -> BTreeMap<String, u64> {
        let counters = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        counters
            .iter()
            .map(|(name, counter)| (name.clone(), counter.get()))
            .filter(|(_, count)| *count > 0)
            .collect()
    }
}

/// Counters of how invocations failed, found without a lock because nested invocations fail inside of host functions.
#[derive(Debug)]
pub struct TrapCounters(BTreeMap<&'static str, Counter>);

impl Default for TrapCounters {
    fn default() -> Self {
        Self(TRAP_KINDS.map(|kind| (kind, Counter::default())).into())
    }
}

impl TrapCounters {
    /// Adds one to `kind`, one of [`TRAP_KINDS`].
    pub fn add_one(&self, kind: &'static str) {
        self.0.get(kind).expect("kinds come from TRAP_KINDS").add_one();
    }

    fn snapshot(&self) -> BTreeMap<String, u64> {
        let some = self.0.iter().filter(|(_, counter)| counter.get() > 0);
        some.map(|(kind, counter)| ((*kind).to_owned(), counter.get()))
            .collect()
    }
}

/// How invocations fail: traps by wasmtime's kinds, and `host_error` for an error that came from a host function, `exit` for
/// the one with which WASI ends a program.
pub const TRAP_KINDS: [&str; 12] = [
    "memory_out_of_bounds",
    "unreachable",
    "integer_division_by_zero",
    "integer_overflow",
    "stack_overflow",
    "indirect_call_to_null",
    "bad_signature",
    "table_out_of_bounds",
    "host_error",
    "exit",
    "uncaught_exception",
    "other_trap",
];

/// Everything that one host counts.
#[derive(Debug, Default)]
pub struct Counts {
    /// Calls of guest exports, by `module/export` (`/export` if the module has no name), nested ones
    /// included, counted just before the call.
    pub invocations: Group,
    /// Calls of host functions by guests, by `module.field`, counted as the first thing the host function does.
    pub host_calls: Group,
    /// Invocations that ended in a trap (by its kind) or were unwound by a host function's error (`host_error`).
    pub traps: TrapCounters,
    /// What invocations answered, by its text, where the scenario compares that.
    pub answers: Group,
    /// Times that an invocation's fiber left its thread before it was done. A nested invocation and those around it
    /// count one each.
    pub suspends: Counter,
    /// Times that such a fiber was resumed.
    pub resumes: Counter,
    /// Resumes on another thread than the one that the fiber had left.
    pub moves: Counter,
    /// What only some scenario has, in its own words.
    pub notes: Group,
    syscalls: Mutex<BTreeMap<String, Arc<Group>>>,
}

impl Counts {
    /// Syscalls that the host function `host_call` makes on purpose, by syscall name.
    pub fn syscalls_of(&self, host_call: &str) -> Arc<Group> {
        let mut groups = self.syscalls.lock().unwrap_or_else(PoisonError::into_inner);
        groups.entry(host_call.to_owned()).or_default().clone()
    }

    /// The numbers now. Those that are zero are left out.
    pub fn snapshot(&self) -> Snapshot {
        let groups = self.syscalls.lock().unwrap_or_else(PoisonError::into_inner);
        let by_host_call: BTreeMap<String, BTreeMap<String, u64>> = groups
            .iter()
            .map(|(host_call, group)| (host_call.clone(), group.snapshot()))
            .filter(|(_, syscalls)| !syscalls.is_empty())
            .collect();
        let mut syscalls = BTreeMap::new();
        for (name, count) in by_host_call.values().flatten() {
            *syscalls.entry(name.clone()).or_default() += count;
        }
        Snapshot {
            invocations: self.invocations.snapshot(),
            host_calls: self.host_calls.snapshot(),
            syscalls,
            syscalls_by_host_call: by_host_call,
            traps: self.traps.snapshot(),
            answers: self.answers.snapshot(),
            suspends: self.suspends.get(),
            resumes: self.resumes.get(),
            moves: self.moves.get(),
            notes: self.notes.snapshot(),
        }
    }
}

/// The numbers of a [`Counts`] at one moment.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Snapshot {
    /// [`Counts::invocations`].
    pub invocations: BTreeMap<String, u64>,
    /// [`Counts::host_calls`].
    pub host_calls: BTreeMap<String, u64>,
    /// Sums of `syscalls_by_host_call`.
    pub syscalls: BTreeMap<String, u64>,
    /// Syscalls made by host functions on purpose; memory allocation may add `brk`, `mmap`, `munmap` and `madvise`.
    pub syscalls_by_host_call: BTreeMap<String, BTreeMap<String, u64>>,
    /// [`Counts::traps`].
    pub traps: BTreeMap<String, u64>,
    /// [`Counts::answers`].
    pub answers: BTreeMap<String, u64>,
    /// [`Counts::suspends`].
    pub suspends: u64,
    /// [`Counts::resumes`].
    pub resumes: u64,
    /// [`Counts::moves`].
    pub moves: u64,
    /// [`Counts::notes`].
    pub notes: BTreeMap<String, u64>,
}

/// The counters of one host function.
#[derive(Clone, Debug)]
pub struct HostCall {
    calls: Counter,
    syscalls: Arc<Group>,
}

impl HostCall {
    /// For the import `module`.`field`.
    pub fn new(counts: &Counts, module: &str, field: &str) -> Self {
        let name = format!("{module}.{field}");
        Self {
            calls: counts.host_calls.counter(&name),
            syscalls: counts.syscalls_of(&name),
        }
    }

    /// Counts one call; the first thing that a host function does.
    pub fn enter(&self) {
        self.calls.add_one();
    }

    /// The counter of the syscall `name` in this host function. Not to be called inside of it (see [`Group`]).
    pub fn syscall(&self, name: &str) -> Counter {
        self.syscalls.counter(name)
    }
}
