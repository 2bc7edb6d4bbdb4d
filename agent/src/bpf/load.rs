//! Loads the object, attaches the programs that need no site, and owns the maps.

use std::collections::BTreeMap;

use aya::{
    Ebpf, EbpfError, EbpfLoader, Pod, VerifierLogLevel,
    maps::{Array, HashMap, MapData, MapError, PerCpuArray, PerCpuHashMap, RingBuf},
    programs::{ProgramError, RawTracePoint},
};
use wasmscope_common::{
    AGGREGATE_CALLS, Counter, MAX_PROCESSES, Observed, ProbeHits, ProcessConfig, THREAD_BYTES, ThreadHead,
};
use zerocopy::FromBytes as _;

use super::{
    aggregates::Aggregates,
    attach::Attacher,
    breakpoint,
    kernel_types::{KernelTypesError, task_offsets},
    multi::{self, MultiError},
    programs,
    ring::Ring,
};

/// The programs, as built by the build script.
pub(super) static OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/wasmscope.bpf.o"));

/// Programs on raw tracepoints, with the tracepoint each is for.
pub(super) const TRACEPOINTS: [(&str, &str); 6] = [
    ("sys_enter", "sys_enter"),
    ("sys_exit", "sys_exit"),
    ("process_exec", "sched_process_exec"),
    ("process_exit", "sched_process_exit"),
    ("process_fork", "sched_process_fork"),
    ("signal_deliver", "signal_deliver"),
];

/// Threads of one process that are sought in the table of threads.
const MAX_THREADS: usize = 65_536;

/// Flag of an update: only if there is no entry yet.
const BPF_NOEXIST: u64 = 1;

/// How to load.
#[derive(Clone, Copy, Debug)]
pub struct LoadOptions {
    /// Size of the ring buffer, a power of two and a multiple of the page size.
    pub ring_bytes: u32,
    /// Watch every process from the moment it publishes wasm code.
    pub watch_new_wasm: bool,
    /// `EMIT_*` flags of processes watched that way.
    pub new_process_flags: u32,
}

/// Why the programs are not running.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// Not enough privileges; the message names them.
    #[error("operation not permitted: needs CAP_BPF and CAP_PERFMON (or root)")]
    NotPermitted,
    /// Offsets in kernel structures.
    #[error(transparent)]
    KernelTypes(#[from] KernelTypesError),
    /// The object as a whole.
    #[error("the eBPF object was refused")]
    Object(#[source] EbpfError),
    /// One program.
    #[error("the eBPF program {program} was refused")]
    Program {
        /// Its name.
        program: &'static str,
        /// The kernel's answer, with the verifier's log.
        #[source]
        source: ProgramError,
    },
    /// A map could not be opened.
    #[error("the eBPF map {map} is not usable")]
    Map {
        /// Its name.
        map: &'static str,
        /// What happened.
        #[source]
        source: MapError,
    },
    /// Descriptors of the maps, of which each thread that loads a program has its own.
    #[error("the descriptors of the eBPF maps cannot be duplicated")]
    Descriptors(#[source] std::io::Error),
    /// A multi-site program.
    #[error("the eBPF uprobes were refused")]
    Uprobes(#[source] MultiError),
    /// The ring buffer could not be registered with the event loop.
    #[error("the ring buffer cannot be polled")]
    Ring(#[source] std::io::Error),
}

/// Values of the programs' counters, summed over CPUs.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CounterValues(BTreeMap<&'static str, (Counter, u64)>);

impl CounterValues {
    /// One counter's value.
    pub fn get(&self, counter: Counter) -> u64 {
        self.0.get(counter.name()).map_or(0, |(_, value)| *value)
    }

    /// Every counter with its value.
    pub fn iter(&self) -> impl Iterator<Item = (Counter, u64)> {
        self.0.values().copied()
    }
}

/// The loaded programs and their maps. Dropping it detaches everything.
pub struct Kernel {
    pub(super) attacher: Attacher,
    processes: HashMap<MapData, u32, PodConfig>,
    observed: HashMap<MapData, u32, PodObserved>,
    counters: PerCpuArray<MapData, u64>,
    /// What the programs count by themselves.
    pub aggregates: Aggregates,
    hits: PerCpuHashMap<MapData, u32, PodHits>,
    pub(super) objects: Vec<super::account::KernelObject>,
    threads: HashMap<MapData, u32, [u8; THREAD_BYTES]>,
    undecided: HashMap<MapData, u32, u64>,
    generation: Array<MapData, u64>,
    generation_value: u64,
    agent_sleeps: Array<MapData, u32>,
    pub(super) ebpf: Ebpf,
}

#[derive(Clone, Copy)]
#[repr(transparent)]
struct PodConfig(ProcessConfig);
// SAFETY: a transparent wrapper of a `repr(C)` type of integers without padding (zerocopy's derives prove it).
unsafe impl Pod for PodConfig {}
#[derive(Clone, Copy)]
#[repr(transparent)]
struct PodObserved(Observed);
// SAFETY: as above.
unsafe impl Pod for PodObserved {}
#[derive(Clone, Copy)]
#[repr(transparent)]
struct PodHits(ProbeHits);
// SAFETY: as above.
unsafe impl Pod for PodHits {}

impl Kernel {
    /// Loads everything and attaches the tracepoints. From here on processes can be watched.
    pub fn load(options: LoadOptions) -> Result<(Self, Ring), LoadError> {
        let offsets = task_offsets()?;
        let watch_flags = if options.watch_new_wasm {
            wasmscope_common::WATCH_NEW_WASM
        } else {
            0
        };
        let mut ebpf = EbpfLoader::new()
            .verifier_log_level(VerifierLogLevel::STATS)
            .override_global("TASK_FSBASE_OFFSET", &offsets.fsbase, true)
            .override_global("TASK_MM_OFFSET", &offsets.mm, true)
            .override_global("TASK_TGID_OFFSET", &offsets.tgid, true)
            .override_global("WATCH_FLAGS", &watch_flags, true)
            .override_global("NEW_PROCESS_FLAGS", &options.new_process_flags, true)
            .map_max_entries("EVENTS", options.ring_bytes)
            .load(OBJECT)
            .map_err(object_error)?;
        let attacher = programs::load(OBJECT, &mut ebpf)?;
        breakpoint::load(&mut ebpf);
        #[cfg(debug_assertions)]
        forward_messages(&mut ebpf);
        let objects = super::account::maps_of(&ebpf);
        let ring = ebpf.take_map("EVENTS").ok_or_else(|| missing("EVENTS"))?;
        let ring = RingBuf::try_from(ring).map_err(|source| LoadError::Map { map: "EVENTS", source })?;
        let mut kernel = Self {
            attacher,
            processes: take(&mut ebpf, "PROCESSES")?,
            observed: take(&mut ebpf, "OBSERVED")?,
            counters: take(&mut ebpf, "COUNTERS")?,
            aggregates: Aggregates::take(&mut ebpf)?,
            hits: take(&mut ebpf, "HITS")?,
            objects,
            threads: take(&mut ebpf, "THREADS")?,
            undecided: take(&mut ebpf, "UNDECIDED")?,
            generation: take(&mut ebpf, "GENERATION")?,
            generation_value: 0,
            agent_sleeps: take(&mut ebpf, "AGENT_SLEEPS")?,
            ebpf,
        };
        kernel.attach_tracepoints()?;
        let programs = super::account::programs_of(&kernel);
        kernel.objects.extend(programs);
        Ok((kernel, Ring::new(ring).map_err(LoadError::Ring)?))
    }

    fn attach_tracepoints(&mut self) -> Result<(), LoadError> {
        for (name, tracepoint) in TRACEPOINTS {
            let refused = |source| program_error(name, source);
            let program: &mut RawTracePoint = self
                .ebpf
                .program_mut(name)
                .ok_or_else(|| missing(name))?
                .try_into()
                .map_err(refused)?;
            program.attach(tracepoint).map_err(refused)?;
        }
        Ok(())
    }

    /// Starts watching a process, or changes how it is watched.
    pub fn watch(&mut self, pid: u32, config: ProcessConfig) -> Result<(), MapError> {
        // First, as the programs expect one; one that is there is theirs.
        if self.observed.get(&pid, 0).is_err() {
            match self.observed.insert(pid, PodObserved(Observed::default()), BPF_NOEXIST) {
                Err(error) if self.observed.get(&pid, 0).is_err() => return Err(error),
                _ => {}
            }
        }
        self.processes.insert(pid, PodConfig(config), 0)?;
        self.next_generation()
    }

    /// How a process is being watched, with what the programs have found out.
    pub fn config(&self, pid: u32) -> Option<ProcessConfig> {
        self.processes.get(&pid, 0).ok().map(|config| config.0)
    }

    /// Every process that is watched.
    pub fn watched_pids(&self) -> std::collections::HashSet<u32> {
        self.processes
            .keys()
            .take(2 * MAX_PROCESSES as usize)
            .filter_map(Result::ok)
            .collect()
    }

    /// Low half of the epoch of a process's code, which the programs count up; 0 if it is not watched.
    pub fn code_epoch(&self, pid: u32) -> u32 {
        self.observed
            .get(&pid, 0)
            .map_or(0, |observed| observed.0.code_epoch as u32)
    }

    /// Stops watching a process.
    pub fn unwatch(&mut self, pid: u32) {
        // It may be gone already, which is what is wanted.
        let _ = self.processes.remove(&pid);
        let _ = self.observed.remove(&pid);
        // Writing to an array that was just mapped does not fail.
        let _ = self.next_generation();
    }

    /// Ends what the programs know of the agent's own threads, which live on when they are not watched any more.
    pub(super) fn forget_own_threads(&mut self) {
        self.forget_threads(std::process::id());
    }

    /// Ends what the programs know of the threads of a process that is not watched any more. They would keep it until the
    /// threads end.
    pub fn forget_threads(&mut self, pid: u32) {
        let tasks = std::fs::read_dir(format!("/proc/{pid}/task"))
            .into_iter()
            .flatten()
            .flatten();
        for tid in tasks
            .take(MAX_THREADS)
            .filter_map(|task| task.file_name().to_str()?.parse().ok())
        {
            // Most were never met.
            let _ = self.threads.remove(&tid);
        }
    }

    /// How many syscalls of a process were met before it was known where its runtime keeps activations, and found none in the
    /// static blocks of their threads.
    pub fn undecided(&self, pid: u32) -> u64 {
        self.undecided.get(&pid, 0).unwrap_or(0)
    }

    /// Ends [`Self::undecided`] of a process that is not watched any more.
    pub fn forget_undecided(&mut self, pid: u32) {
        // There may be none.
        let _ = self.undecided.remove(&pid);
    }

    /// Makes threads look at their process again.
    fn next_generation(&mut self) -> Result<(), MapError> {
        self.generation_value += 1;
        self.generation.set(0, self.generation_value, 0)
    }

    /// Has the next record wake the agent, whatever it is; see [`Ring::woken`].
    pub fn wake_by_next_record(&mut self) {
        // Writing to an array that was just mapped does not fail; without it the agent sees the record when it looks next.
        let _ = self.agent_sleeps.set(0, 1, 0);
    }

    /// Sums the counters.
    pub fn counters(&self) -> CounterValues {
        let value = |counter: Counter| {
            self.counters
                .get(&(counter as u32), 0)
                .map_or(0, |per_cpu| per_cpu.iter().sum())
        };
        CounterValues(
            Counter::ALL
                .into_iter()
                .map(|counter| (counter.name(), (counter, value(counter))))
                .collect(),
        )
    }

    /// Counts the hits of probes in a process from now on. `false` if there is no room.
    pub fn count_hits(&mut self, pid: u32) -> bool {
        let Ok(cpus) = aya::util::nr_cpus() else { return false };
        let zero = aya::maps::PerCpuValues::try_from(vec![PodHits(ProbeHits::default()); cpus]);
        zero.is_ok_and(|zero| self.hits.insert(pid, zero, 0).is_ok())
    }

    /// Hits so far; `None` if they are not counted.
    pub fn hits(&self, pid: u32) -> Option<ProbeHits> {
        let per_cpu = self.hits.get(&pid, 0).ok()?;
        let mut total = ProbeHits::default();
        for hits in per_cpu.iter() {
            for (total, count) in total.counts.iter_mut().zip(hits.0.counts) {
                *total += count;
            }
        }
        Some(total)
    }

    /// Ends [`Self::count_hits`].
    pub fn forget_hits(&mut self, pid: u32) {
        // It may never have been counted.
        let _ = self.hits.remove(&pid);
    }

    /// Changes which records are wanted of a process, not of those that it makes.
    pub fn set_flags(&mut self, pid: u32, flags: u32) -> Result<(), MapError> {
        let Some(mut config) = self.config(pid) else {
            return Ok(());
        };
        if config.flags == flags {
            return Ok(());
        }
        if (config.flags ^ flags) & AGGREGATE_CALLS != 0 {
            config.call_gaps = config.call_gaps.wrapping_add(1);
        }
        config.flags = flags;
        self.watch(pid, config)
    }

    /// How many entries the tables have that follow processes and threads.
    pub fn entries(&self) -> [(&'static str, usize); 5] {
        [
            ("bpf_processes", self.processes.keys().count()),
            ("bpf_threads", self.threads.keys().count()),
            ("bpf_undecided", self.undecided.keys().count()),
            ("bpf_hits", self.hits.keys().count()),
            ("bpf_rows", self.aggregates.entry_count()),
        ]
    }

    /// What the programs know of the threads that they have met and that still live, by thread id.
    pub fn threads(&self) -> Vec<(u32, ThreadHead)> {
        self.threads
            .iter()
            .filter_map(Result::ok)
            .filter_map(|(tid, bytes)| Some((tid, ThreadHead::read_from_prefix(&bytes).ok()?.0)))
            .collect()
    }
}

/// Forwards what the programs of a debug build have to say to the log. Builds that say nothing have no map for it.
#[cfg(debug_assertions)]
fn forward_messages(ebpf: &mut Ebpf) {
    let Ok(logger) = aya_log::EbpfLogger::init(ebpf) else {
        return;
    };
    // SAFETY: the logger owns its file descriptor for as long as it lives, and always answers with the same one.
    let polled = unsafe { tokio::io::unix::AsyncFd::register_with_interest(logger, tokio::io::Interest::READABLE) };
    let Ok(mut logger) = polled else { return };
    tokio::spawn(async move {
        while let Ok(mut guard) = logger.readable_mut().await {
            guard.get_inner_mut().flush();
            guard.clear_ready();
        }
    });
}

pub(super) fn take<T: TryFrom<aya::maps::Map, Error = MapError>>(
    ebpf: &mut Ebpf,
    map: &'static str,
) -> Result<T, LoadError> {
    let found = ebpf.take_map(map).ok_or_else(|| missing(map))?;
    T::try_from(found).map_err(|source| LoadError::Map { map, source })
}

pub(super) fn missing(name: &'static str) -> LoadError {
    LoadError::Map {
        map: name,
        source: MapError::InvalidName { name: name.to_owned() },
    }
}

fn object_error(error: EbpfError) -> LoadError {
    if is_not_permitted(&error) {
        LoadError::NotPermitted
    } else {
        LoadError::Object(error)
    }
}

pub(super) fn program_error(program: &'static str, source: ProgramError) -> LoadError {
    if is_not_permitted(&source) {
        LoadError::NotPermitted
    } else {
        LoadError::Program { program, source }
    }
}

pub(super) fn multi_error(error: MultiError) -> LoadError {
    if is_not_permitted(&error) {
        LoadError::NotPermitted
    } else {
        LoadError::Uprobes(error)
    }
}

/// Whether any cause of an error is the kernel's "operation not permitted".
fn is_not_permitted(error: &(dyn std::error::Error + 'static)) -> bool {
    std::iter::successors(Some(error), |error| error.source()).any(|error| {
        error
            .downcast_ref::<std::io::Error>()
            .is_some_and(|error| matches!(error.raw_os_error(), Some(libc::EPERM | libc::EACCES)))
    })
}

pub(super) fn map_fds(ebpf: &Ebpf) -> impl Iterator<Item = (&str, std::os::fd::BorrowedFd<'_>)> {
    multi::map_fds(ebpf)
}
