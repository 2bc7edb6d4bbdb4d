//! The event task: decides what to watch, turns ring records into resolved events, and feeds the correlator.

mod aggregate;
mod cold;
mod copies;
mod definitions;
mod governing;
mod helpers;
mod holdings;
mod images;
mod in_flight;
mod learning;
mod looking;
mod marks;
mod paused;
mod places;
mod reattach;
mod requests;
mod rest;
mod runtime_calls;
mod subprocesses;
mod swap_check;
mod unused;
mod watching;

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    sync::Arc,
};

use wasmscope_common::{
    AGGREGATE_CALLS, AGGREGATE_INVOCATIONS, AGGREGATE_SYSCALLS, Counter, EMIT_ACTIVATIONS, EMIT_HOST_CALLS,
    EMIT_REQUESTS, EMIT_SYSCALLS,
};

pub use self::{
    aggregate::{AggregateRow, Counted, Times},
    governing::{GovernorReport, WorkloadKey},
    holdings::Holding,
    unused::FILE_GRACE_NS,
    watching::{WatchError, WatchReport, WatchedHost},
};
use self::{
    definitions::Definitions, governing::Governing, learning::Learning, places::Movers, subprocesses::Strays,
    swap_check::SwapCheck, unused::Unused, watching::Watched,
};
use crate::{
    bpf::{CounterValues, Kernel, KernelObject, LoadError, LoadOptions, Ring, SiteLinks, SiteProgram},
    clock,
    correlate::{Correlator, SETTLE_NS},
    decode::{Record, decode},
    event::{Coverage, Event, EventKind},
    process::{
        code_store::CodeStore,
        hosts::{FileId, Hosts},
    },
    span::{Capture, Loss, Trace},
};

/// Records handled before anything else gets a turn.
const RECORDS_PER_TURN: usize = 65_536;

/// What to watch, and how.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// Size of the ring buffer, bytes; a power of two.
    pub ring_bytes: u32,
    /// Watch every process that runs wasm, those already running included.
    pub watch_all: bool,
    /// Which events are wanted.
    pub detail: Detail,
    /// How long a file stays probed that no process runs, nanoseconds.
    pub file_grace_ns: u64,
    /// Bytes that the names and tables of all code objects may take together.
    pub names_bytes: usize,
    /// Bytes that all traces under way may take together.
    pub open_traces_bytes: usize,
}

/// Which events are wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Detail {
    /// All counted in the kernel: invocations, host calls and syscalls; no events of them.
    MetricsOnly,
    /// Syscalls with their guest functions; no uprobes.
    Node,
    /// Everything.
    Boundary,
    /// Everything, and counted in the kernel as well.
    BoundaryAndMetrics,
}

impl Detail {
    fn flags(self) -> u32 {
        match self {
            Self::MetricsOnly => AGGREGATE_SYSCALLS | AGGREGATE_INVOCATIONS | AGGREGATE_CALLS,
            Self::Node => EMIT_SYSCALLS,
            Self::Boundary => EMIT_SYSCALLS | EMIT_HOST_CALLS | EMIT_ACTIVATIONS | EMIT_REQUESTS,
            Self::BoundaryAndMetrics => Self::Boundary.flags() | Self::MetricsOnly.flags(),
        }
    }

    /// Whether crossings are probed.
    fn has_probes(self) -> bool {
        self != Self::Node
    }

    /// Whether the kernel counts by itself.
    pub fn has_aggregates(self) -> bool {
        matches!(self, Self::MetricsOnly | Self::BoundaryAndMetrics)
    }
}

/// What comes out of one turn.
#[derive(Debug, Default)]
pub struct Output {
    /// Resolved events, in order, with the definitions they need.
    pub events: Vec<Event>,
    /// Traces that have become complete.
    pub traces: Vec<Trace>,
    /// Losses since the last turn.
    pub losses: Vec<Loss>,
}

/// The event task's state.
pub struct Pipeline {
    kernel: Kernel,
    ring: Ring,
    options: Options,
    hosts: Hosts,
    links: HashMap<FileId, FileLinks>,
    processes: HashMap<u32, Watched>,
    /// What processes run, each once.
    code: CodeStore,
    /// Processes that may be about to be gone.
    departing: HashSet<u32>,
    strays: Strays,
    movers: Movers,
    learning: Learning,
    swap_checks: HashMap<FileId, SwapCheck>,
    unused: Unused,
    definitions: Definitions,
    correlator: Correlator,
    counted: BTreeMap<&'static str, u64>,
    losses: BTreeMap<(&'static str, &'static str), u64>,
    total_losses: BTreeMap<(String, String), u64>,
    delivered_count: u64,
    trace_count: u64,
    turn_count: u64,
    start_ns: u64,
    /// Up to when all records have been handled.
    drained_ns: u64,
    /// No process is taken on any more.
    is_finishing: bool,
    /// Which records of requests can be relied on.
    requests: requests::Reliance,
    collected: aggregate::Collected,
    governing: Option<Governing>,
    rest: rest::Rest,
    /// Records that were there before anybody wanted to handle them.
    backlog: Vec<Record>,
}

impl Pipeline {
    /// Loads the programs. Nothing is watched yet, unless all is to be.
    pub fn start(options: Options) -> Result<Self, LoadError> {
        let (kernel, ring) = Kernel::load(LoadOptions {
            ring_bytes: options.ring_bytes,
            watch_new_wasm: options.watch_all,
            new_process_flags: options.detail.flags(),
        })?;
        Ok(Self {
            kernel,
            ring,
            options,
            hosts: Hosts::default(),
            links: HashMap::new(),
            processes: HashMap::new(),
            code: CodeStore::new(options.names_bytes),
            departing: HashSet::new(),
            strays: Strays::default(),
            movers: Movers::default(),
            learning: Learning::default(),
            swap_checks: HashMap::new(),
            unused: Unused::default(),
            definitions: Definitions::default(),
            correlator: Correlator::with_room(options.open_traces_bytes),
            counted: BTreeMap::new(),
            losses: BTreeMap::new(),
            total_losses: BTreeMap::new(),
            delivered_count: 0,
            trace_count: 0,
            turn_count: 0,
            start_ns: clock::monotonic_ns(),
            drained_ns: 0,
            is_finishing: false,
            requests: requests::Reliance::default(),
            collected: aggregate::Collected::default(),
            governing: None,
            rest: rest::Rest::default(),
            backlog: Vec::new(),
        })
    }

    /// Waits for the next time at which there may be something to do.
    pub async fn ready(&mut self) {
        if self.rest.is_quiet() {
            self.kernel.wake_by_next_record();
        }
        tokio::select! {
            () = self.ring.woken() => {}
            () = tokio::time::sleep(self.rest.interval()) => {}
        }
    }

    /// Handles what the kernel has produced.
    pub fn turn(&mut self) -> Output {
        let mut output = Output::default();
        self.turn_count += 1;
        let mut records = std::mem::take(&mut self.backlog);
        let backlog = records.len();
        let mut undecodable = 0;
        let drained_ns = clock::monotonic_ns();
        let gone = self.departed();
        self.forget_keys();
        self.ring.drain(RECORDS_PER_TURN, |bytes| match decode(bytes) {
            Ok(record) => records.push(record),
            Err(_) => undecodable += 1,
        });
        self.delivered_count += (records.len() - backlog) as u64 + undecodable;
        // With more to come, only what came before the last record is known to be all there is.
        self.drained_ns = match records.last() {
            Some(last) if records.len() >= RECORDS_PER_TURN => last.header().at_ns,
            _ => drained_ns,
        };
        if undecodable > 0 {
            *self.losses.entry(("decode", "malformed")).or_default() += undecodable;
        }
        let counters = self.kernel.counters();
        self.forget_loads_if_lost(&counters, undecodable);
        self.forget_requests_if_lost(&counters, undecodable, &mut output.events);
        let is_drained = records.len() < RECORDS_PER_TURN;
        // What has been begun and waits for nothing but time is busy too.
        let is_waiting = !self.departing.is_empty() || self.learning.is_rotating() || self.has_pauses();
        self.rest.turned(!records.is_empty() || is_waiting);
        for record in records {
            self.handle(&record, &mut output.events);
        }
        if is_drained {
            // All that they have left behind has been handled.
            self.bury(gone, &mut output.events);
        }
        self.read_deferred(&mut output.events);
        self.forget_strays();
        self.tell_moved(&mut output.events);
        self.rotate_breakpoints();
        self.let_go(&mut output.events);
        // What is lost while records are handled is counted next time, unless there may be none.
        let counters = if self.is_finishing {
            self.kernel.counters()
        } else {
            counters
        };
        self.count_losses(&counters, &mut output);
        self.correlate(&mut output);
        output
    }

    /// Stops watching, handles what is left, and ends what is open.
    pub fn finish(&mut self) -> (Output, Capture) {
        self.is_finishing = true;
        self.learning.disarm();
        for pid in self.processes.keys().copied().collect::<Vec<_>>() {
            self.kernel.unwatch(pid);
            self.settle_undecided(pid);
        }
        let in_flight = self.in_flight();
        let mut output = self.turn();
        // Only what is in the ring by now: other processes may go on filling it.
        let counters = self.kernel.counters();
        let until = counters.get(Counter::Emitted) - counters.get(Counter::RingFull);
        while self.delivered_count < until {
            let before = self.delivered_count;
            output.append(self.turn());
            if self.delivered_count == before {
                break;
            }
        }
        let end_ns = clock::monotonic_ns();
        let mut last = Output::default();
        self.tell_all_pauses(&mut last.events);
        last.events
            .extend(in_flight::events(&in_flight, &output.events, end_ns));
        self.correlate(&mut last);
        output.append(last);
        self.correlator.finish(end_ns);
        let mut last = Output::default();
        self.correlate(&mut last);
        output.append(last);
        let counters = self.kernel.counters();
        let capture = Capture {
            start_ns: self.start_ns,
            end_ns,
            emitted_count: counters.get(Counter::Emitted),
            delivered_count: self.delivered_count,
            losses: self.total_losses(),
            kernel_release: kernel_release(),
            replay_of: None,
            trace_count: self.trace_count,
        };
        (output, capture)
    }

    /// What the kernel can be asked about for as long as the agent runs. Only the first call answers with any.
    pub fn take_kernel_objects(&mut self) -> Vec<KernelObject> {
        self.kernel.take_objects()
    }

    /// Events known to be missing so far.
    pub fn lost_count(&self) -> u64 {
        self.total_losses.values().sum()
    }

    /// Processes being watched.
    pub fn watched_count(&self) -> usize {
        self.processes.len()
    }

    fn total_losses(&self) -> Vec<Loss> {
        self.total_losses
            .iter()
            .map(|((layer, reason), count)| Loss {
                layer: layer.clone(),
                reason: reason.clone(),
                count: *count,
            })
            .collect()
    }

    /// How many entries each table has that follows what runs; the kernel's begin with `bpf_`.
    pub fn table_entries(&self) -> Vec<(&'static str, usize)> {
        let mut tables = vec![
            ("processes", self.processes.len()),
            ("files", self.hosts.count()),
            ("links", self.links.len()),
            ("definitions", self.definitions.len()),
            ("correlated_definitions", self.correlator.definition_count()),
            ("correlated_processes", self.correlator.process_count()),
        ];
        tables.extend(self.kernel.entries());
        tables
    }

    /// Records that the programs have made and that have arrived, as of the last turn; the difference is lost or under way.
    pub fn record_counts(&self) -> (u64, u64) {
        let emitted = self.counted.get(Counter::Emitted.name()).copied().unwrap_or(0);
        (emitted, self.delivered_count)
    }

    /// How often the kernel counted something without its name, by the table that was full.
    pub fn overflows(&self) -> impl Iterator<Item = (&'static str, u64)> {
        Counter::ALL.into_iter().filter_map(|counter| {
            let table = counter.overflow()?;
            Some((table, self.counted.get(counter.name()).copied().unwrap_or(0)))
        })
    }

    fn correlate(&mut self, output: &mut Output) {
        for event in &output.events {
            self.correlator.push(event.clone());
        }
        self.correlator.settle(self.drained_ns.saturating_sub(SETTLE_NS));
        output.traces.extend(self.correlator.take_finished());
        let losses = self.correlator.take_losses();
        self.add_to_total(&losses);
        output.losses.extend(losses);
        self.trace_count += output.traces.len() as u64;
    }

    /// Marks that were lost may have been those that give a pointer another meaning.
    fn forget_loads_if_lost(&mut self, counters: &CounterValues, undecodable: u64) {
        let is_more = |counter: Counter| {
            let before = self.counted.get(counter.name()).copied().unwrap_or(0);
            counters.get(counter) > before
        };
        let lossy = [Counter::RingFull, Counter::ThreadTableFull, Counter::ProcessThreadsFull];
        if undecodable > 0 || lossy.into_iter().any(is_more) {
            for watched in self.processes.values_mut() {
                watched.loads.forget();
            }
        }
    }

    /// Turns what the programs and this task have lost since the last turn into events, so that traces which were open
    /// at the time know.
    fn count_losses(&mut self, counters: &CounterValues, output: &mut Output) {
        let mut losses = Vec::new();
        for (counter, value) in counters.iter() {
            let before = self.counted.insert(counter.name(), value).unwrap_or(0);
            if counter.is_loss() && value > before {
                let layer = if counter == Counter::RingFull { "ring" } else { "kernel" };
                losses.push(Loss {
                    layer: layer.to_owned(),
                    reason: counter.name().to_owned(),
                    count: value - before,
                });
            }
        }
        for ((layer, reason), count) in std::mem::take(&mut self.losses) {
            losses.push(Loss {
                layer: layer.to_owned(),
                reason: reason.to_owned(),
                count,
            });
        }
        let at_ns = clock::monotonic_ns();
        for loss in &losses {
            output.events.push(Event {
                at_ns,
                pid: 0,
                tid: 0,
                kind: EventKind::Lost { loss: loss.clone() },
            });
        }
        self.add_to_total(&losses);
        output.losses.extend(losses);
    }

    fn add_to_total(&mut self, losses: &[Loss]) {
        for loss in losses {
            *self
                .total_losses
                .entry((loss.layer.clone(), loss.reason.clone()))
                .or_default() += loss.count;
        }
    }

    fn lose(&mut self, layer: &'static str, reason: &'static str) {
        self.lose_many(layer, reason, 1);
    }

    fn lose_many(&mut self, layer: &'static str, reason: &'static str, count: u64) {
        if count > 0 {
            *self.losses.entry((layer, reason)).or_default() += count;
        }
    }

    fn handle(&mut self, record: &Record, events: &mut Vec<Event>) {
        let header = *record.header();
        let (pid, tid, at_ns) = (header.pid, header.tid, header.at_ns);
        if self.is_stray(pid, record) {
            return;
        }
        let mut push = |kind| events.push(Event { at_ns, pid, tid, kind });
        match record {
            Record::CodePublished(published) => {
                let range = published.address..published.address.saturating_add(published.length);
                self.name_before(pid, header.task);
                self.code_published(pid, range.clone(), events);
                self.epoch_begins(pid, header.task);
                self.tell_published((pid, tid, at_ns), range, events);
            }
            Record::Exec(_) => {
                if self.processes.contains_key(&pid) {
                    push(EventKind::ProcessGone);
                    self.process_replaced(pid, (header.task, at_ns), events);
                }
            }
            Record::ThreadExit(_) => {
                push(EventKind::ThreadExit);
                self.thread_exited(pid, tid);
            }
            Record::Fork(fork) => {
                if let Ok(child) = u32::try_from(fork.argument) {
                    self.process_forked(pid, child, events);
                }
            }
            Record::Calibrated(found) => tracing::debug!(pid, ?found, "activations found"),
            Record::ImportTable(table) => self.learn_callee(pid, table, events),
            Record::ActivationSwap(swap) => {
                if !self.believes(pid, tid, swap, events) {
                    return;
                }
                self.learning.saw_guest(pid);
                let entry = self.function(pid, swap.entry_handler, events);
                self.tell_task(&header, swap.new, events);
                // Before the activation is gone.
                self.tell_first_call((pid, tid, at_ns), swap.old, swap.entry_handler, events);
                if let Some(watched) = self.processes.get_mut(&pid) {
                    watched.loads.swapped(tid, swap.new);
                }
                let known = header.flags & wasmscope_common::SLOT_UNKNOWN == 0;
                events.push(Event {
                    at_ns,
                    pid,
                    tid,
                    kind: EventKind::ActivationSwap {
                        old: known.then_some(swap.old),
                        new: swap.new,
                        stack_pointer: swap.stack_pointer,
                        entry,
                    },
                });
            }
            Record::HostCall(call) => {
                let entry = self.function(pid, call.entry_handler, events);
                let stack = self.stack(pid, record.frames(), events);
                let import = if header.flags & wasmscope_common::COMPONENT_CALL != 0 {
                    self.trampoline_import(pid, call.caller, events)
                } else {
                    let call_site = record.frames().first().copied().unwrap_or(0);
                    self.import(pid, call_site, call.callee, events)
                };
                if import.is_none() {
                    self.lose("symbols", "import_unresolved");
                }
                events.push(Event {
                    at_ns,
                    pid,
                    tid,
                    kind: EventKind::HostCall {
                        activation: call.activation,
                        entry,
                        import,
                        frame: call.frame,
                        stack,
                        truncated: record.is_truncated(),
                    },
                });
                self.tell_first_call((pid, tid, at_ns), call.activation, call.entry_handler, events);
            }
            Record::HostCallEnd(end) => push(EventKind::HostCallEnd {
                frame: end.frame,
                succeeded: end.succeeded != 0,
            }),
            Record::Syscall(syscall) => {
                self.notice_multiplexing(pid, syscall.number, syscall.result);
                let entry = self.function(pid, syscall.entry_handler, events);
                let stack = self.stack(pid, record.frames(), events);
                events.push(Event {
                    at_ns,
                    pid,
                    tid,
                    kind: EventKind::Syscall {
                        activation: syscall.activation,
                        entry,
                        duration_ns: syscall.duration_ns,
                        number: syscall.number,
                        result: syscall.result,
                        arguments: syscall.arguments,
                        stack,
                        truncated: record.is_truncated(),
                        handed_over_ns: None,
                        is_open: record.does_not_return(),
                    },
                });
                self.tell_first_call((pid, tid, at_ns), syscall.activation, syscall.entry_handler, events);
            }
            Record::HelperSyscall(syscall) => push(helpers::event_kind(syscall, record.does_not_return())),
            Record::Trap(trap) if !self.is_guest_code(pid, trap.instruction_pointer) => {
                // Host code between two code objects, or a guest whose code could not be read.
                self.lose("symbols", "signal_outside_guests");
            }
            Record::Trap(trap) => {
                let entry = self.function(pid, trap.entry_handler, events);
                let stack = self.stack(pid, record.frames(), events);
                let (code, place) = self.trap(pid, trap.instruction_pointer, trap.signal);
                events.push(Event {
                    at_ns,
                    pid,
                    tid,
                    kind: EventKind::Trap {
                        activation: trap.activation,
                        entry,
                        code,
                        stack,
                        native_offset: place.native_offset,
                        wasm_offset: place.wasm_offset,
                    },
                });
                self.tell_first_call((pid, tid, at_ns), trap.activation, trap.entry_handler, events);
            }
            Record::HttpRequest(request) => self.request(request, events),
            Record::RequestEnd(end) => push(EventKind::RequestEnd {
                descriptor: end.descriptor as u32,
            }),
            Record::Multiplexes(_) => self.multiplexes(pid),
            Record::Unwind(_) => push(EventKind::Unwind),
            Record::Mark(mark) => self.mark(mark, record, events),
            Record::MarkEnd(end) => self.mark_end(end, events),
        }
    }
}

impl Output {
    /// Adds a later turn's output.
    pub fn append(&mut self, mut later: Self) {
        self.events.append(&mut later.events);
        self.traces.append(&mut later.traces);
        self.losses.append(&mut later.losses);
    }
}

impl Drop for Pipeline {
    fn drop(&mut self) {
        for links in std::mem::take(&mut self.links)
            .into_values()
            .flat_map(|(_, links)| links)
        {
            self.kernel.detach(links.1);
        }
    }
}

/// The kernel's release, as `uname` tells it.
pub fn kernel_release() -> String {
    rustix::system::uname().release().to_string_lossy().into_owned()
}

/// What is attached to a file, and what is observed through it.
type FileLinks = (Coverage, Vec<(SiteProgram, SiteLinks)>);

/// What is kept per host, shared by its processes.
type SharedHost = Arc<crate::process::hosts::Host>;
