//! All maps and the globals that the agent sets before loading.

use aya_ebpf::{
    bindings::{BPF_F_NO_PREALLOC, BPF_NOEXIST},
    macros::map,
    maps::{Array, HashMap, LruHashMap, PerCpuArray, PerCpuHashMap, RingBuf},
};
use wasmscope_common::{
    AggregateKey, AggregateStats, COUNTER_SLOTS, Counter, HandedOver, HelperTask, HttpRequest, MAX_PROCESSES, MAX_ROWS,
    MAX_THREADS, OTHER_ROWS, Observed, OpenActivation, OpenKey, OpenRequest, ProbeHits, ProcessConfig, SeenCallSite,
    SeenCallee,
};

use crate::thread::Thread;

/// The one way out. The agent sizes it.
#[map]
pub static EVENTS: RingBuf = RingBuf::with_byte_size(16 << 20, 0);

/// Processes watched, by pid.
#[map]
pub static PROCESSES: HashMap<u32, ProcessConfig> = HashMap::with_max_entries(MAX_PROCESSES, 0);

/// Syscalls, by process, of threads on which nothing was found before the agent had looked at the process's files: made by
/// no activation if the runtime keeps its slot where was searched, else lost. The agent takes them out.
#[map]
static UNDECIDED: HashMap<u32, u64> = HashMap::with_max_entries(MAX_PROCESSES, BPF_F_NO_PREALLOC);

/// What was seen of them. Unlike [`PROCESSES`], only programs write here, so that the agent undoes nothing.
#[map]
pub static OBSERVED: HashMap<u32, Observed> = HashMap::with_max_entries(MAX_PROCESSES, 0);

/// Rows of [`AGGREGATES`] that the agent has taken out again, by process. Only the agent writes here.
#[map]
pub static RELEASED_ROWS: HashMap<u32, u64> = HashMap::with_max_entries(MAX_PROCESSES, BPF_F_NO_PREALLOC);

/// Threads of watched processes, by tid: what is cached about them, and the workspace in which records are built. A
/// thread can only be in one program at a time, unlike a CPU, on which uprobes preempt each other.
#[map]
pub static THREADS: HashMap<u32, Thread> = HashMap::with_max_entries(MAX_THREADS, 0);

/// [`Counter`]s. Incremented atomically, as uprobes of one CPU can interleave.
#[map]
static COUNTERS: PerCpuArray<u64> = PerCpuArray::with_max_entries(COUNTER_SLOTS, 0);

/// What is counted without records, for processes whose config asks for it. Not a map per CPU, whose rows would be fewer the more CPUs there
/// are: a few CPUs share a row of each key.
#[map]
pub static AGGREGATES: HashMap<AggregateKey, AggregateStats> = HashMap::with_max_entries(MAX_ROWS, BPF_F_NO_PREALLOC);

/// What [`AGGREGATES`] has no room for, by kind.
#[map]
pub static OTHER: PerCpuArray<AggregateStats> = PerCpuArray::with_max_entries(OTHER_ROWS, 0);

/// Activations that are open, for processes whose calls are aggregated.
#[map]
pub static OPEN: HashMap<OpenKey, OpenActivation> = HashMap::with_max_entries(16_384, BPF_F_NO_PREALLOC);

/// Hits of probes by process, for those that the agent governs.
#[map]
static HITS: PerCpuHashMap<u32, ProbeHits> = PerCpuHashMap::with_max_entries(MAX_PROCESSES, 0);

/// Call sites whose callee has been announced; the least recently used are forgotten and announced again.
#[map]
pub static CALL_SITES: LruHashMap<SeenCallSite, SeenCallee> = LruHashMap::with_max_entries(16_384, 0);

/// Work handed to helper threads. An entry is taken out when its work begins and replaced when its address is used again;
/// those of work that never begins are forgotten when room is needed.
#[map]
pub static HELPER_TASKS: LruHashMap<HelperTask, HandedOver> = LruHashMap::with_max_entries(16_384, 0);

/// Sockets from which requests were read that nothing has been written back for; 1: what is read next belongs to it. The least recently used are forgotten.
#[map]
pub static OPEN_REQUESTS: LruHashMap<OpenRequest, u64> = LruHashMap::with_max_entries(16_384, 0);

/// Room to build the record of a request in: raw tracepoints of one CPU do not interleave.
#[map]
pub static REQUEST: PerCpuArray<HttpRequest> = PerCpuArray::with_max_entries(1, 0);

/// Entry 0 changes after every change the agent makes to [`PROCESSES`]: threads then look at their process again.
#[map]
static GENERATION: Array<u64> = Array::with_max_entries(1, 0);

/// Entry 0 is 1 while the agent sleeps for longer than records may wait: the next one is to wake it.
#[map]
static AGENT_SLEEPS: Array<u32> = Array::with_max_entries(1, 0);

/// Bytes from `task_struct` to `thread.fsbase`, from the kernel's BTF.
#[unsafe(no_mangle)]
pub static TASK_FSBASE_OFFSET: u32 = 0;

/// Bytes from `task_struct` to `tgid`, from the kernel's BTF.
#[unsafe(no_mangle)]
pub static TASK_TGID_OFFSET: u32 = 0;

/// Bytes from `task_struct` to `mm`, from the kernel's BTF.
#[unsafe(no_mangle)]
pub static TASK_MM_OFFSET: u32 = 0;

/// `WATCH_*` flags.
#[unsafe(no_mangle)]
pub static WATCH_FLAGS: u32 = 0;

/// `EMIT_*` flags of a process that is watched from its first code object on.
#[unsafe(no_mangle)]
pub static NEW_PROCESS_FLAGS: u32 = 0;

/// The generation that what threads have cached must be of.
#[inline(always)]
pub fn generation() -> u64 {
    // SAFETY: a pointer into a map value; a torn read is impossible for an aligned word.
    GENERATION
        .get_ptr(0)
        .map_or(0, |value| unsafe { core::ptr::read_volatile(value) })
}

/// Makes threads look at their process again. The agent counts in the low half and never sets a value twice.
#[inline(always)]
pub fn next_generation() {
    if let Some(value) = GENERATION.get_ptr_mut(0) {
        add(value, 1 << 32);
    }
}

/// Whether this record is to wake the agent. True once for each time that it went to sleep, or a few times if threads race.
#[inline(always)]
pub fn take_agent_sleeps() -> bool {
    let Some(value) = AGENT_SLEEPS.get_ptr_mut(0) else {
        return false;
    };
    // SAFETY: a pointer into a map value; a torn access is impossible for an aligned word.
    unsafe {
        let sleeps = core::ptr::read_volatile(value) != 0;
        if sleeps {
            core::ptr::write_volatile(value, 0);
        }
        sleeps
    }
}

/// Reads a global that the agent may have set.
#[inline(always)]
pub fn global(value: &'static u32) -> u32 {
    // SAFETY: a reference is valid for reads; volatile since the loader patches the value after compilation.
    unsafe { core::ptr::read_volatile(value) }
}

/// Counts a syscall in [`UNDECIDED`]. `false` if there is no room.
#[inline(always)]
pub fn count_undecided(pid: u32) -> bool {
    if let Some(value) = UNDECIDED.get_ptr_mut(&pid) {
        add(value, 1);
        return true;
    }
    // Another thread may have been first: the kernel refuses, and its count is added to.
    if UNDECIDED.insert(&pid, &1, BPF_NOEXIST.into()).is_ok() {
        return true;
    }
    let Some(value) = UNDECIDED.get_ptr_mut(&pid) else {
        return false;
    };
    add(value, 1);
    true
}

/// Adds one to a counter.
#[inline(always)]
pub fn count(counter: Counter) {
    if let Some(value) = COUNTERS.get_ptr_mut(counter as u32) {
        add(value, 1);
    }
}

/// As [`add`], one to a word of 32 bits.
#[inline(always)]
pub fn increment(value: *mut u32) {
    // SAFETY: as in `add`, 4-byte aligned.
    unsafe {
        core::intrinsics::atomic_xadd::<u32, u32, { core::intrinsics::AtomicOrdering::Relaxed }>(value, 1);
    }
}

/// Counts a hit of a probe in the current process, `kind` being one of `HIT_*`.
#[inline(always)]
pub fn hit(kind: usize) {
    let pid = (aya_ebpf::helpers::bpf_get_current_pid_tgid() >> 32) as u32;
    if let Some(hits) = HITS.get_ptr_mut(&pid) {
        // SAFETY: a pointer into a map value, and a constant below the number of kinds.
        add(unsafe { &raw mut (*hits).counts[kind] }, 1);
    }
}

/// Adds to a map value that other programs may be adding to.
#[inline(always)]
pub fn add(value: *mut u64, amount: u64) {
    // The target has the instruction but the library offers no `fetch_add` for it.
    // SAFETY: callers pass pointers into map values, which stay valid while the program runs and are 8-byte aligned.
    unsafe {
        core::intrinsics::atomic_xadd::<u64, u64, { core::intrinsics::AtomicOrdering::Relaxed }>(value, amount);
    }
}
