//! Keeps what probes cost within its limits: counts hits, asks the governor, pauses and resumes, and says so.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, PoisonError},
};

use wasmscope_common::{
    AGGREGATE_CALLS, AGGREGATE_INVOCATIONS, AGGREGATE_SYSCALLS, EMIT_ACTIVATIONS, EMIT_HOST_CALLS, EMIT_REQUESTS,
    EMIT_SYSCALLS,
};

use super::{
    Output, Pipeline,
    paused::{MAX_WORKLOADS, PausedTimes},
    reattach::Retries,
    watching::Watched,
};
use crate::{
    bpf::{self, SiteProgram},
    clock,
    decode::decode,
    event::{Coverage, Event, EventKind},
    governor::{Change, Governor, GovernorConfig, Level, ProbeCosts, Sample},
    process::hosts::FileId,
    span::{Place, ProbeKind},
};

/// A program that has read a process's flags is done with it by then, nanoseconds.
const IN_FLIGHT_NS: u64 = 1_000_000;

/// What the probes cost and what is paused, for whoever asks; renewed while the pipeline runs.
#[derive(Clone, Debug, Default)]
pub struct GovernorReport {
    /// What hits are taken to cost.
    pub costs: ProbeCosts,
    /// Share of all CPUs that the probes take.
    pub node_ratio: f64,
    /// Share of its CPU time that they take, of each workload; of several processes, the largest.
    pub ratios: BTreeMap<WorkloadKey, f64>,
    /// Time in which probes were paused, nanoseconds.
    pub paused_ns: BTreeMap<(WorkloadKey, ProbeKind), u64>,
    /// Processes in which probes are paused now.
    pub paused_counts: BTreeMap<ProbeKind, u64>,
    /// Watched processes by what is observed of them.
    pub coverage_counts: BTreeMap<&'static str, u64>,
}

/// What tells workloads apart.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct WorkloadKey {
    /// Of the pod, if it is in one.
    pub namespace: String,
    /// Its pod.
    pub pod: String,
    /// Its container.
    pub container: String,
    /// Command name; untrusted.
    pub process: String,
}

/// Completes a place with the names that are known by now.
type NamePlace = Box<dyn Fn(&Place) -> Place + Send>;

impl WorkloadKey {
    fn new(place: Place, command: &str) -> Self {
        Self {
            namespace: place.namespace.unwrap_or_default(),
            pod: place.pod_name.unwrap_or_default(),
            container: place.container_name.unwrap_or_default(),
            process: command.to_owned(),
        }
    }

    pub(super) fn other() -> Self {
        let other = || "other".to_owned();
        Self {
            namespace: other(),
            pod: other(),
            container: other(),
            process: other(),
        }
    }
}

/// The governor's part of the event task.
pub(super) struct Governing {
    governor: Governor,
    /// Pauses of which nothing follows once what came before them has been handled.
    pending: Vec<(u32, Vec<ProbeKind>, u64)>,
    /// Sites that could not be attached again.
    retries: Retries<FileId>,
    next_ns: u64,
    accounted_ns: u64,
    report: Arc<Mutex<GovernorReport>>,
    paused: PausedTimes,
    name: NamePlace,
}

impl Governing {
    /// What a process is called by now.
    fn workload(&self, watched: &Watched) -> WorkloadKey {
        WorkloadKey::new((self.name)(&watched.place), &watched.facts.command)
    }
}

impl Pipeline {
    /// Measures what hits cost, and from now on keeps them within `config`. Takes a few dozen milliseconds.
    ///
    /// `name` completes a place with the names that are known by now; it is called often, and must not wait.
    pub fn start_governor(&mut self, config: GovernorConfig, name: impl Fn(&Place) -> Place + Send + 'static) {
        let costs = self.measure_costs();
        let cpus = std::thread::available_parallelism().map_or(1, |count| u32::try_from(count.get()).unwrap_or(1));
        let report = GovernorReport {
            costs,
            ..GovernorReport::default()
        };
        self.governing = Some(Governing {
            governor: Governor::new(config, costs, cpus),
            pending: Vec::new(),
            retries: Retries::default(),
            next_ns: 0,
            accounted_ns: clock::monotonic_ns(),
            report: Arc::new(Mutex::new(report)),
            paused: PausedTimes::default(),
            name: Box::new(name),
        });
    }

    /// Changes budgets and times from now on.
    pub fn reconfigure_governor(&mut self, config: GovernorConfig) {
        if let Some(governing) = &mut self.governing {
            governing.governor.reconfigure(config);
        }
    }

    /// What the governor has to say, whenever it is asked; `None` before it was started.
    pub fn governor_report(&self) -> Option<Arc<Mutex<GovernorReport>>> {
        self.governing.as_ref().map(|governing| governing.report.clone())
    }

    #[cfg(target_arch = "x86_64")]
    fn measure_costs(&mut self) -> ProbeCosts {
        let mut backlog = Vec::new();
        let mut taken_count = 0;
        let measured = bpf::measure_probe_costs(&mut self.kernel, &mut self.ring, |bytes, is_own| {
            taken_count += 1;
            if !is_own {
                backlog.push(decode(bytes));
            }
        });
        self.delivered_count += taken_count;
        for record in backlog {
            match record {
                Ok(record) => self.backlog.push(record),
                Err(_) => self.lose("decode", "malformed"),
            }
        }
        measured.unwrap_or_else(|error| {
            tracing::warn!(
                error = &error as &dyn std::error::Error,
                "costs of probes cannot be measured; assuming twice what is usual"
            );
            ProbeCosts::default()
        })
    }

    #[cfg(not(target_arch = "x86_64"))]
    fn measure_costs(&mut self) -> ProbeCosts {
        ProbeCosts::default()
    }

    /// Looks at what probes cost, if it is time to, and pauses or resumes them. To be called after every [`Self::turn`]; what it
    /// answers with is handled in the same way.
    pub fn govern(&mut self) -> Output {
        let mut output = Output::default();
        let now_ns = clock::monotonic_ns();
        self.tell_pauses(&mut output.events);
        if self
            .governing
            .as_ref()
            .is_some_and(|governing| now_ns >= governing.next_ns)
            && !self.is_finishing
        {
            let changes = self.decide(now_ns);
            for change in &changes {
                self.apply(*change, &mut output.events);
            }
            self.fit_links();
            self.account(now_ns);
        }
        if !output.events.is_empty() {
            self.correlate(&mut output);
        }
        output
    }

    /// The records that are wanted of a process now.
    pub(super) fn flags_of(&self, pid: u32) -> u32 {
        let wanted = self.options.detail.flags();
        let level = self.level_of(pid);
        let paused = level.paused().iter().fold(0, |flags, probe| {
            flags
                | match probe {
                    ProbeKind::HostCall => EMIT_HOST_CALLS | AGGREGATE_CALLS,
                    ProbeKind::Activation => EMIT_ACTIVATIONS | AGGREGATE_INVOCATIONS,
                    ProbeKind::Syscall => EMIT_SYSCALLS | EMIT_REQUESTS | AGGREGATE_SYSCALLS,
                }
        });
        wanted & !paused
    }

    /// What is observed of a process now.
    pub(super) fn coverage_now(&self, pid: u32, full: Coverage) -> Coverage {
        let level = self.level_of(pid);
        let mut coverage = full;
        if level >= Level::NoHostCalls {
            coverage.host_calls = false;
            coverage.host_call_ends = false;
        }
        if level >= Level::NoActivations {
            coverage.activations = false;
            coverage.unwinds = false;
        }
        coverage
    }

    /// Whether probes of any process are paused: those are looked at more often than a quiet loop turns.
    pub(super) fn has_pauses(&self) -> bool {
        let mut governors = self.governing.iter();
        governors.any(|governing| {
            governing
                .governor
                .overheads()
                .any(|(_, overhead)| overhead.level != Level::Full)
        })
    }

    fn level_of(&self, pid: u32) -> Level {
        let governing = self.governing.as_ref();
        governing.map_or(Level::Full, |governing| governing.governor.level(pid))
    }

    pub(super) fn stop_governing(&mut self, pid: u32) {
        self.kernel.forget_hits(pid);
        if let Some(governing) = &mut self.governing {
            governing.governor.forget(pid);
            governing.pending.retain(|(paused, ..)| *paused != pid);
        }
    }

    /// Attaches again whatever is detached in a file.
    pub(super) fn resume_links(&mut self, file: FileId) {
        let mut failed_count = 0;
        if let Some((_, links)) = self.links.get_mut(&file) {
            for (program, links) in links {
                failed_count += u64::from(!self.kernel.resume_links(*program, links));
            }
        }
        self.tried_links(file, failed_count);
    }

    /// Counts what could not be attached again; [`Self::fit_links`] tries again, ever more seldom.
    fn tried_links(&mut self, file: FileId, failed_count: u64) {
        if failed_count > 0 {
            *self.losses.entry(("attach", "not_attached_again")).or_default() += failed_count;
        }
        if let Some(governing) = &mut self.governing {
            governing.retries.tried(file, failed_count == 0, clock::monotonic_ns());
        }
    }

    fn decide(&mut self, now_ns: u64) -> Vec<Change> {
        let Some(governing) = &mut self.governing else {
            return Vec::new();
        };
        governing.next_ns = now_ns + governing.governor.config().interval_ms * 100_000;
        let mut samples = Vec::new();
        for (pid, watched) in &self.processes {
            if !governing.governor.is_due(*pid, now_ns) {
                continue;
            }
            let hits = match self.kernel.hits(*pid) {
                Some(hits) => hits.counts,
                None if self.kernel.count_hits(*pid) => Default::default(),
                None => continue,
            };
            // One that is gone is about to be noticed.
            let Ok(cpu_ns) = bpf::process_cpu_ns(*pid) else {
                continue;
            };
            let ends = || {
                let sites = watched.hosts.iter().flat_map(|host| &host.plan.sites);
                sites.filter(|site| site.program == SiteProgram::HostCallEnd)
            };
            let stepped = ends().filter(|site| !site.emulated).count();
            samples.push(Sample {
                pid: *pid,
                cpu_ns,
                hits,
                stepped_share: stepped as f64 / ends().count().max(1) as f64,
                file: watched.hosts.first().map(|host| host.file_id),
            });
        }
        governing.governor.tick(now_ns, &samples)
    }

    fn apply(&mut self, change: Change, events: &mut Vec<Event>) {
        let Change { pid, from, to } = change;
        let (before, after) = (from.paused(), to.paused());
        let gone: Vec<_> = after.iter().copied().filter(|probe| !before.contains(probe)).collect();
        let back: Vec<_> = before.iter().copied().filter(|probe| !after.contains(probe)).collect();
        tracing::info!(pid, paused = ?after, "what is probed of a process changes for what it costs");
        if gone.iter().chain(&back).any(|probe| *probe == ProbeKind::Syscall)
            && let Some(watched) = self.processes.get_mut(&pid)
        {
            // What it reads and opens meanwhile is not seen.
            watched.requests.forget();
        }
        // What it swaps meanwhile is not seen.
        self.forget_swaps(pid, None);
        let mut tell = |kind| {
            events.push(Event {
                at_ns: clock::monotonic_ns(),
                pid,
                tid: pid,
                kind,
            });
        };
        if gone.is_empty() {
            // Sites first, so that ends are seen of all begins that are.
            for file in self.files_of(pid) {
                self.resume_links(file);
            }
            // What they have recorded by now is handled after this.
            self.tell_pauses_of(pid, events);
        } else {
            tell(EventKind::ProbesPaused { probes: gone.clone() });
        }
        if self.kernel.set_flags(pid, self.flags_of(pid)).is_err() {
            self.lose("kernel", "process_table_full");
        }
        if gone.is_empty() {
            events.push(Event {
                at_ns: clock::monotonic_ns(),
                pid,
                tid: pid,
                kind: EventKind::ProbesResumed { probes: back },
            });
            self.describe(pid, events);
            return;
        }
        if gone.contains(&ProbeKind::Activation)
            && let Some(watched) = self.processes.get_mut(&pid)
        {
            // What was being loaded will not be seen to be.
            watched.loads.forget();
        }
        if let Some(governing) = &mut self.governing {
            governing.pending.push((pid, gone, clock::monotonic_ns()));
        }
    }

    fn files_of(&self, pid: u32) -> Vec<FileId> {
        let watched = self.processes.get(&pid);
        watched.map_or_else(Vec::new, |watched| {
            watched.hosts.iter().map(|host| host.file_id).collect()
        })
    }

    /// Detaches where all processes of a file do without, and attaches where one does not.
    fn fit_links(&mut self) {
        if !self.options.detail.has_probes() {
            return;
        }
        let mut least: BTreeMap<FileId, Level> = BTreeMap::new();
        for (pid, watched) in &self.processes {
            let level = self.level_of(*pid);
            for host in &watched.hosts {
                let known = least.entry(host.file_id).or_insert(level);
                *known = (*known).min(level);
            }
        }
        if let Some(governing) = &mut self.governing {
            governing.retries.keep(|file| least.contains_key(file));
        }
        let now_ns = clock::monotonic_ns();
        for (file, level) in least {
            let governing = self.governing.as_ref();
            let is_due = governing.is_none_or(|governing| governing.retries.is_due(file, now_ns));
            let mut failed_count = 0;
            let Some((_, links)) = self.links.get_mut(&file) else {
                continue;
            };
            for (program, links) in links {
                let is_wanted = match program {
                    SiteProgram::HostCall | SiteProgram::ComponentHostCall | SiteProgram::HostCallEnd => {
                        level < Level::NoHostCalls
                    }
                    SiteProgram::ActivationSwap | SiteProgram::Unwind | SiteProgram::Mark | SiteProgram::MarkEnd => {
                        level < Level::NoActivations
                    }
                    // They say whose the syscalls of helper threads are.
                    SiteProgram::Helper => level < Level::Nothing,
                };
                if !is_wanted {
                    self.kernel.pause_links(links);
                } else if is_due {
                    failed_count += u64::from(!self.kernel.resume_links(*program, links));
                }
            }
            if is_due {
                self.tried_links(file, failed_count);
            }
        }
    }

    /// Tells of every pause, when nothing more is to come.
    pub(super) fn tell_all_pauses(&mut self, events: &mut Vec<Event>) {
        let pending = self.governing.as_ref().map(|governing| &governing.pending);
        let pids: Vec<_> = pending.into_iter().flatten().map(|(pid, ..)| *pid).collect();
        for pid in pids {
            self.tell_pauses_of(pid, events);
        }
    }

    /// Tells of the pauses before which everything has been handled.
    fn tell_pauses(&mut self, events: &mut Vec<Event>) {
        let Some(governing) = &self.governing else { return };
        let until_ns = self.drained_ns.saturating_sub(IN_FLIGHT_NS);
        let ready = governing.pending.iter().filter(|(_, _, at_ns)| *at_ns < until_ns);
        let ready: Vec<_> = ready.map(|(pid, ..)| *pid).collect();
        for pid in ready {
            self.tell_pauses_of(pid, events);
        }
    }

    fn tell_pauses_of(&mut self, pid: u32, events: &mut Vec<Event>) {
        let Some(governing) = &mut self.governing else { return };
        let told: Vec<_> = governing
            .pending
            .extract_if(.., |(paused, ..)| *paused == pid)
            .collect();
        if told.is_empty() {
            return;
        }
        let mut told_of_activations = false;
        for (pid, probes, at_ns) in told {
            let of_activations = probes.contains(&ProbeKind::Activation);
            events.push(Event {
                at_ns,
                pid,
                tid: pid,
                kind: EventKind::ProbesSilent { probes },
            });
            told_of_activations |= of_activations;
        }
        if told_of_activations {
            // What is open may end unseen, and something else begin in its place: counted as what does not end.
            self.collect_open(pid, None);
        }
        self.describe(pid, events);
    }

    fn account(&mut self, now_ns: u64) {
        let Some(governing) = &mut self.governing else { return };
        let passed_ns = now_ns.saturating_sub(governing.accounted_ns);
        governing.accounted_ns = now_ns;
        let mut ratios: BTreeMap<WorkloadKey, f64> = BTreeMap::new();
        let mut coverage_counts: BTreeMap<&'static str, u64> = BTreeMap::new();
        let mut paused_counts: BTreeMap<ProbeKind, u64> = BTreeMap::new();
        for (pid, watched) in &self.processes {
            let word = match watched.coverage {
                coverage if coverage.activations && coverage.host_calls => "boundary",
                coverage if coverage.activations => "activations",
                _ => "syscalls",
            };
            *coverage_counts.entry(word).or_default() += 1;
            let level = governing.governor.level(*pid);
            if level == Level::Full {
                continue;
            }
            for probe in level.paused() {
                *paused_counts.entry(*probe).or_default() += 1;
            }
            let workload = governing.workload(watched);
            let process = (*pid, watched.facts.start_ns);
            governing.paused.add(process, &workload, level.paused(), passed_ns);
        }
        if !governing.paused.is_empty() {
            let running = self.processes.iter();
            let running: Vec<_> = running
                .map(|(pid, watched)| ((*pid, watched.facts.start_ns), governing.workload(watched)))
                .collect();
            governing.paused.watched(now_ns, running.into_iter());
        }
        for (pid, overhead) in governing.governor.overheads() {
            let Some(watched) = self.processes.get(&pid) else {
                continue;
            };
            let mut workload = governing.workload(watched);
            if ratios.len() >= MAX_WORKLOADS && !ratios.contains_key(&workload) {
                workload = WorkloadKey::other();
            }
            let ratio = ratios.entry(workload).or_default();
            *ratio = ratio.max(overhead.ratio);
        }
        // Nobody panics while holding it; if so, what is in it is still whole.
        let mut report = governing.report.lock().unwrap_or_else(PoisonError::into_inner);
        report.node_ratio = governing.governor.node_ratio();
        report.ratios = ratios;
        report.coverage_counts = coverage_counts;
        report.paused_counts = paused_counts;
        report.paused_ns.clone_from(governing.paused.times_ns());
    }
}
