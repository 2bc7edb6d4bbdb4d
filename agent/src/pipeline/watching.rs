//! Processes come, load guests, fork, replace themselves and go; this keeps the programs' tables and the names in step.

use std::{collections::HashSet, io, ops::Range, path::Path};

use wasmscope_common::{Counter, HOST_FUNCTIONS_SOUGHT, ImportTable, KEEP_TLS_ON_EXEC, MAX_PROCESSES, ProcessConfig};

use super::{
    Detail, FileLinks, Pipeline, SharedHost, cold::Loads, copies, images::Unscanned, requests, requests::Requests,
};
use crate::{
    bpf::{MapError, SiteProgram, UprobeSite},
    clock,
    event::{Coverage, Event, EventKind, FunctionId, ImportId},
    place::cgroup,
    process::{
        describe,
        guests::Guests,
        looks::Looks,
        maps::{self, ExecutableMapping},
        memory::ProcessMemory,
        reading::Reading,
    },
    runtime::ProbePlan,
    span::{Place, Process},
};

/// Executable ranges known of a process; more are known only after its mappings were read again.
const MAX_UNLISTED: usize = 100_000;

/// Name of the runtime of a process in which no file is known to have one.
pub(super) const UNKNOWN_RUNTIME: &str = "unknown";

/// A process that is being watched.
pub(super) struct Watched {
    pub(super) memory: ProcessMemory,
    pub(super) guests: Guests,
    /// Files that each bring a copy of the runtime, in the order in which they were noticed.
    pub(super) hosts: Vec<SharedHost>,
    /// Of each, [`crate::process::hosts::Found::tls_number_at`].
    pub(super) tls_numbers_at: Vec<Option<u64>>,
    pub(super) loads: Loads,
    pub(super) facts: describe::ProcessFacts,
    /// As its cgroup says.
    pub(super) place: Place,
    /// Executable ranges, to tell code from data.
    pub(super) code: Vec<Range<u64>>,
    pub(super) coverage: Coverage,
    /// Addresses of imported functions that have been looked at.
    pub(super) known_functions: HashSet<u64>,
    /// Of the layouts that are not known, how many have been counted as lost.
    layout_error_count: usize,
    pub(super) requests: Requests,
    pub(super) reading: Reading,
    /// Of the kernel's count of undecided syscalls, those that have been decided about.
    settled_syscalls: u64,
    /// What looking at it has cost.
    pub(super) looks: Looks,
}

/// Why a process cannot be watched.
#[derive(Debug, thiserror::Error)]
pub enum WatchError {
    /// It is gone, or may not be inspected.
    #[error("cannot inspect process {pid}")]
    Inspect {
        /// Which.
        pid: u32,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// The programs' table refused it.
    #[error("cannot watch process {pid}")]
    Table {
        /// Which.
        pid: u32,
        /// Why not.
        #[source]
        source: MapError,
    },
    /// Too many.
    #[error("more than {MAX_PROCESSES} processes")]
    TooMany,
}

impl WatchError {
    /// Layer and reason of the loss that it is.
    fn as_loss(&self) -> (&'static str, &'static str) {
        match self {
            Self::Inspect { .. } => ("symbols", "process_gone"),
            Self::Table { .. } | Self::TooMany => ("kernel", "process_table_full"),
        }
    }
}

/// What is known of a process once it is watched.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WatchReport {
    /// Its description.
    pub process: Process,
    /// Code objects found.
    pub module_count: usize,
    /// Sites attached in its host binary.
    pub site_count: usize,
    /// What is observed.
    pub coverage: Coverage,
}

impl Pipeline {
    /// Watches a process that is already running.
    pub fn watch(&mut self, pid: u32) -> Result<(WatchReport, Vec<Event>), WatchError> {
        let mut events = Vec::new();
        self.add_process(pid, &mut events)?;
        let watched = self.processes.get(&pid).ok_or(WatchError::TooMany)?;
        let report = WatchReport {
            process: self.process_of(pid, watched),
            module_count: watched.guests.len(),
            site_count: watched.hosts.iter().map(|host| self.site_count(host)).sum(),
            coverage: watched.coverage,
        };
        for event in &events {
            self.correlator.push(event.clone());
        }
        Ok((report, events))
    }

    /// Watches every process that already runs wasm; later ones are noticed when they publish code.
    pub fn watch_running(&mut self) -> io::Result<(Vec<WatchReport>, Vec<Event>)> {
        let mut reports = Vec::new();
        let mut events = Vec::new();
        for pid in describe::all_pids()? {
            // Processes come and go, and kernel threads have no mappings: neither is an error.
            let Ok(mappings) = maps::executable_mappings(pid) else {
                continue;
            };
            let runs_wasm =
                ProcessMemory::open(pid).is_ok_and(|memory| !maps::code_objects(&mappings, &memory).is_empty());
            if runs_wasm && let Ok((report, mut more)) = self.watch(pid) {
                reports.push(report);
                events.append(&mut more);
            }
        }
        Ok((reports, events))
    }

    /// Prepares for a program that is about to be started: its sites are attached before its first instruction.
    pub fn prepare(&mut self, program: &Path) -> io::Result<Option<WatchedHost>> {
        let Some(host) = self.hosts.look_up(program)? else {
            return Ok(None);
        };
        let coverage = self.attach(&host);
        Ok(Some(WatchedHost {
            runtime_name: host.plan.runtime_name,
            site_count: self.site_count(&host),
            coverage,
            limits: self.limits_of(&host),
        }))
    }

    /// Watches whatever the calling process starts from now on, from its first instruction. `program` is what it will be.
    pub fn adopt_children(&mut self, program: &Path) -> Result<(), WatchError> {
        let pid = std::process::id();
        let mut config = ProcessConfig {
            child_flags: self.options.detail.flags(),
            ..ProcessConfig::default()
        };
        if let Ok(Some(host)) = self.hosts.look_up(program) {
            host.plan.tls.apply(&mut config.copies[0]);
            config.copies[0].file = host.number;
            config.child_flags |= KEEP_TLS_ON_EXEC;
        }
        self.kernel
            .watch(pid, config)
            .map_err(|source| WatchError::Table { pid, source })
    }

    /// Ends [`Self::adopt_children`].
    pub fn disown_children(&mut self) {
        self.kernel.unwatch(std::process::id());
    }

    /// Looks at a process and watches it, or leaves nothing of it behind and counts it as lost.
    fn add_process(&mut self, pid: u32, events: &mut Vec<Event>) -> Result<(), WatchError> {
        let added = self.examine(pid, events);
        if let Err(error) = &added {
            self.end_watch(pid);
            self.settle_undecided(pid);
            self.kernel.forget_undecided(pid);
            self.remove_process(pid);
            self.collect_aggregate(pid, None);
            self.seek_host_functions();
            let (layer, reason) = error.as_loss();
            self.lose(layer, reason);
        }
        added
    }

    fn examine(&mut self, pid: u32, events: &mut Vec<Event>) -> Result<(), WatchError> {
        if self.processes.len() >= MAX_PROCESSES as usize {
            return Err(WatchError::TooMany);
        }
        let inspect = |source| WatchError::Inspect { pid, source };
        let facts = describe::facts(pid).map_err(inspect)?;
        let memory = ProcessMemory::open(pid).map_err(inspect)?;
        let mappings = maps::executable_mappings(pid).map_err(inspect)?;
        let mut watched = Watched {
            memory,
            guests: Guests::new(self.code.clone()),
            loads: Loads::default(),
            hosts: Vec::new(),
            tls_numbers_at: Vec::new(),
            facts,
            place: cgroup::place_of(pid),
            code: Vec::new(),
            coverage: Coverage::default(),
            known_functions: HashSet::new(),
            layout_error_count: 0,
            requests: Requests::default(),
            reading: Reading::default(),
            settled_syscalls: 0,
            looks: Looks::default(),
        };
        // Before the code is looked at: what replaces it meanwhile announces itself.
        let epoch = self.kernel.code_epoch(pid);
        // Guests first: they are gone with the process, which may be short, while its host binary stays.
        let turn = self.turn_count;
        let mut missing = Unscanned::default();
        watched.scan(&mappings, turn, &mut missing);
        self.processes.insert(pid, watched);
        self.epoch_begins(pid, epoch);
        self.find_hosts(pid, &mappings);
        self.configure(pid)?;
        // What was published between the scan and now announces itself only from now on.
        if let Ok(mappings) = maps::executable_mappings(pid)
            && let Some(watched) = self.processes.get_mut(&pid)
        {
            watched.scan(&mappings, turn, &mut missing);
            self.configure(pid)?;
        }
        self.lose_images(missing);
        self.count_layout_errors(pid);
        self.describe(pid, events);
        requests::tell_environment(pid, events);
        self.seek_host_functions();
        Ok(())
    }

    /// Tells the programs how to follow the process's threads. What they have found out themselves is kept.
    fn configure(&mut self, pid: u32) -> Result<(), WatchError> {
        let Some(watched) = self.processes.get(&pid) else {
            return Ok(());
        };
        if self.is_finishing {
            return Ok(());
        }
        let known = self.kernel.config(pid).unwrap_or_default();
        let mut config = ProcessConfig {
            flags: self.flags_of(pid),
            child_flags: self.options.detail.flags(),
            ..known
        };
        copies::apply_layouts(&mut config, &watched.guests);
        copies::apply_hosts(&mut config, &watched.hosts);
        copies::apply_tls_numbers(&mut config, &watched.tls_numbers_at, &watched.memory);
        if let Some(range) = watched.guests.code_range() {
            config.code_start = range.start;
            config.code_end = range.end;
        }
        if config != known {
            config.generation = known.generation.wrapping_add(1);
            self.kernel
                .watch(pid, config)
                .map_err(|source| WatchError::Table { pid, source })?;
        }
        self.settle_undecided(pid);
        Ok(())
    }

    /// Decides about the syscalls that the programs met before anybody had looked at the process's files: with a slot where
    /// they have searched, they were made by no activation; else nobody knows.
    pub(super) fn settle_undecided(&mut self, pid: u32) {
        let total = self.kernel.undecided(pid);
        let mut new = total;
        if let Some(watched) = self.processes.get_mut(&pid) {
            new = total.saturating_sub(watched.settled_syscalls);
            watched.settled_syscalls = total;
            if !watched.hosts.is_empty() && watched.hosts.iter().all(|host| host.plan.tls.is_static()) {
                return;
            }
        }
        if new > 0 {
            self.lose_many("kernel", Counter::Uncalibrated.name(), new);
        }
    }

    pub(super) fn describe(&mut self, pid: u32, events: &mut Vec<Event>) {
        let Some(watched) = self.processes.get(&pid) else {
            return;
        };
        events.push(Event {
            at_ns: clock::monotonic_ns(),
            pid,
            tid: pid,
            kind: EventKind::Process {
                process: Box::new(self.process_of(pid, watched)),
                coverage: self.coverage_now(pid, watched.coverage),
            },
        });
    }

    /// Attaches a host's sites, once per file.
    pub(super) fn attach(&mut self, host: &SharedHost) -> Coverage {
        if !self.options.detail.has_probes() {
            return Coverage::default();
        }
        if let Some(coverage) = self.links.get(&host.file_id).map(|(coverage, _)| *coverage) {
            self.resume_links(host.file_id);
            return coverage;
        }
        let (coverage, links) = self.attach_plan(host, &host.plan);
        self.links.insert(host.file_id, (coverage, links));
        self.recall(host)
    }

    /// Attaches the sites of a plan; answers with what is observed through them.
    pub(super) fn attach_plan(&mut self, host: &SharedHost, plan: &ProbePlan) -> FileLinks {
        let path = host.path();
        let mut links = Vec::new();
        let mut coverage = plan.coverage;
        for program in SiteProgram::ALL {
            if self.options.detail == Detail::MetricsOnly && matches!(program, SiteProgram::Mark | SiteProgram::MarkEnd)
            {
                continue;
            }
            if self.options.detail == Detail::MetricsOnly
                && plan.recognises_swap
                && program == SiteProgram::ActivationSwap
            {
                // Nothing would show whether it is what it was taken for.
                coverage.activations = false;
                continue;
            }
            let mut sites = Vec::new();
            for site in plan.sites.iter().filter(|site| site.program == program) {
                sites.push(UprobeSite {
                    file_offset: site.file_offset,
                    cookie: site.cookie().in_file(host.number).0,
                });
            }
            if sites.is_empty() {
                continue;
            }
            match self.kernel.attach_sites(&path, program, &sites) {
                Ok(link) => links.push((program, link)),
                Err(error) => {
                    tracing::warn!(
                        function = sites_of(plan, program),
                        error = &error as &dyn std::error::Error,
                        "sites not attached"
                    );
                    match program {
                        SiteProgram::ActivationSwap => coverage.activations = false,
                        SiteProgram::Unwind => coverage.unwinds = false,
                        SiteProgram::HostCall | SiteProgram::ComponentHostCall => coverage.host_calls = false,
                        SiteProgram::HostCallEnd => coverage.host_call_ends = false,
                        SiteProgram::Mark | SiteProgram::MarkEnd | SiteProgram::Helper => {}
                    }
                }
            }
        }
        (coverage, links)
    }

    /// Says which module became executable, and when, so that its cold start can be told.
    pub(super) fn tell_published(
        &mut self,
        (pid, tid, at_ns): (u32, u32, u64),
        text: Range<u64>,
        events: &mut Vec<Event>,
    ) {
        let Some(watched) = self.processes.get_mut(&pid) else {
            return;
        };
        if let Some(module) = watched.guests.module_of(text.start, 0) {
            let is_component = watched.guests.is_component(text.start);
            let image = text.start;
            watched.loads.published(tid, text, is_component);
            events.push(Event {
                at_ns,
                pid,
                tid,
                kind: EventKind::ModulePublished {
                    module: module.name.clone(),
                    hash: module.hash.clone(),
                    image,
                },
            });
        }
    }

    /// Takes on a process that the programs watch already; what cannot be taken on is not watched any longer.
    fn take_on(&mut self, pid: u32, events: &mut Vec<Event>) {
        if self.is_finishing {
            return;
        }
        // What cannot be looked at has been counted.
        let _ = self.add_process(pid, events);
    }

    pub(super) fn code_published(&mut self, pid: u32, range: Range<u64>, events: &mut Vec<Event>) {
        if !self.processes.contains_key(&pid) {
            self.take_on(pid, events);
            return;
        }
        let watched = self.processes.get(&pid);
        if watched.is_some_and(|watched| watched.reading.is_read(&range, self.turn_count)) {
            return;
        }
        let mappings = self.mappings_now(pid);
        let is_listed = mappings.is_some();
        let mappings = mappings.unwrap_or_default();
        let file_name = mappings
            .iter()
            .find(|mapping| mapping.range.contains(&range.start))
            .and_then(file_name);
        let Some(watched) = self.processes.get(&pid) else {
            return;
        };
        let described = self.process_of(pid, watched);
        // A library may have been loaded after the process had been looked at.
        self.find_hosts(pid, &mappings);
        let Some(watched) = self.processes.get_mut(&pid) else {
            return;
        };
        if is_listed {
            watched.code = mappings.iter().map(|mapping| mapping.range.clone()).collect();
        } else if watched.code.len() < MAX_UNLISTED {
            watched.code.push(range.clone());
        }
        // Container runtimes move a process into its cgroup after they have forked it.
        let place = cgroup::place_of(pid);
        if !place.is_unknown() {
            watched.place = place;
        }
        let mut missing = Unscanned::default();
        missing.count(watched.read(&range, file_name, self.turn_count));
        self.lose_images(missing);
        self.announce_again(pid);
        if self.configure(pid).is_err() {
            self.lose("kernel", "process_table_full");
        }
        self.count_layout_errors(pid);
        if self
            .processes
            .get(&pid)
            .is_some_and(|watched| self.process_of(pid, watched) != described)
        {
            self.describe(pid, events);
        }
        self.seek_host_functions();
    }

    /// Counts the code objects whose activations cannot be followed, once each way.
    fn count_layout_errors(&mut self, pid: u32) {
        let Some(watched) = self.processes.get_mut(&pid) else {
            return;
        };
        let count = watched.guests.layout_errors().len();
        let new_count = count.saturating_sub(watched.layout_error_count);
        watched.layout_error_count = count;
        for _ in 0..new_count {
            self.lose("symbols", "layout_unknown");
        }
    }

    /// A process has another image since `at_ns`, whose code begins with `next_epoch`.
    pub(super) fn process_replaced(&mut self, pid: u32, (next_epoch, at_ns): (u32, u64), events: &mut Vec<Event>) {
        // It was the main thread of the image that is gone.
        self.departing.remove(&pid);
        self.stop_governing(pid);
        self.forget_swaps(pid, None);
        self.collect_aggregate(pid, Some((next_epoch, at_ns)));
        if self.is_bystander(pid) {
            self.settle_undecided(pid);
            self.remove_process(pid);
            self.release(pid);
            return;
        }
        self.remove_process(pid);
        // Nothing that was found out about the image before holds for this one.
        if let Some(known) = self.kernel.config(pid)
            && !self.is_finishing
        {
            let config = ProcessConfig {
                flags: known.flags,
                child_flags: known.child_flags,
                generation: known.generation.wrapping_add(1),
                ..ProcessConfig::default()
            };
            // It was there a moment ago, so there is room.
            let _ = self.kernel.watch(pid, config);
        }
        self.take_on(pid, events);
    }

    pub(super) fn process_forked(&mut self, parent: u32, child: u32, events: &mut Vec<Event>) {
        if self.processes.contains_key(&child) {
            return;
        }
        // Made before its parent was let go. One that shares a watched parent's guests, or has not been heard to replace
        // them, stays.
        if !self.processes.contains_key(&parent) && self.is_bystander(child) {
            self.release(child);
            return;
        }
        self.take_on(child, events);
        self.may_move(child);
    }

    pub(super) fn thread_exited(&mut self, pid: u32, tid: u32) {
        self.forget_swaps(pid, Some(tid));
        if let Some(watched) = self.processes.get_mut(&pid) {
            watched.loads.thread_gone(tid);
        }
        if pid != tid {
            return;
        }
        // A thread announces its exit a moment before `/proc` shows it, and the records of others may come after its own.
        self.departing.insert(pid);
    }

    /// Looks whether watched processes still live, in case the record that says so was lost.
    pub fn check_liveness(&mut self) {
        let changed = self.processes.iter().filter(|(pid, watched)| {
            describe::facts(**pid).map_or(true, |facts| facts.start_ns != watched.facts.start_ns)
                || !describe::is_alive(**pid)
        });
        self.departing.extend(changed.map(|(pid, _)| *pid));
    }

    /// Of the processes that may be about to be gone, those that are.
    pub(super) fn departed(&self) -> Vec<u32> {
        let is_other = |pid: u32| {
            let watched = self.processes.get(&pid);
            watched
                .is_some_and(|watched| describe::facts(pid).is_ok_and(|facts| facts.start_ns != watched.facts.start_ns))
        };
        let departing = self.departing.iter().copied();
        departing
            .filter(|pid| !describe::is_alive(*pid) || is_other(*pid))
            .collect()
    }

    pub(super) fn bury(&mut self, gone: Vec<u32>, events: &mut Vec<Event>) {
        let at_ns = clock::monotonic_ns();
        for pid in gone {
            self.process_gone(pid, pid, at_ns, events);
        }
    }

    fn process_gone(&mut self, pid: u32, tid: u32, at_ns: u64, events: &mut Vec<Event>) {
        self.departing.remove(&pid);
        self.stop_governing(pid);
        self.forget_swaps(pid, None);
        // First, so that nothing is added any more.
        self.end_watch(pid);
        self.settle_undecided(pid);
        self.kernel.forget_undecided(pid);
        self.collect_aggregate(pid, None);
        if self.remove_process(pid) {
            self.seek_host_functions();
            events.push(Event {
                at_ns,
                pid,
                tid,
                kind: EventKind::ProcessGone,
            });
        }
    }

    pub(super) fn learn_callee(&mut self, pid: u32, table: &ImportTable, events: &mut Vec<Event>) {
        self.learn_host_functions(pid, table, events);
        if table.header.flags & HOST_FUNCTIONS_SOUGHT != 0 {
            return;
        }
        let Some(watched) = self.processes.get_mut(&pid) else {
            return;
        };
        let code = &watched.code;
        let is_code = |address: u64| code.iter().any(|range| range.contains(&address));
        // What cannot be learnt shows, and is counted, at the calls.
        watched.guests.learn_callee(table, is_code);
        self.announce_again(pid);
    }

    pub(super) fn function(&mut self, pid: u32, address: u64, events: &mut Vec<Event>) -> Option<FunctionId> {
        if address == 0 {
            return None;
        }
        let function = self.processes.get_mut(&pid)?.guests.function(address)?;
        Some(self.definitions.function(&function, events))
    }

    pub(super) fn stack(&mut self, pid: u32, frames: &[u64], events: &mut Vec<Event>) -> Vec<FunctionId> {
        frames
            .iter()
            .filter_map(|address| {
                let function = self.function(pid, *address, events);
                if function.is_none() && !self.is_glue(pid, *address) {
                    self.lose("symbols", "frame_unresolved");
                }
                function
            })
            .collect()
    }

    fn is_glue(&mut self, pid: u32, address: u64) -> bool {
        self.processes
            .get_mut(&pid)
            .is_some_and(|watched| watched.guests.is_glue(address))
    }

    pub(super) fn import(
        &mut self,
        pid: u32,
        call_site: u64,
        callee: u64,
        events: &mut Vec<Event>,
    ) -> Option<ImportId> {
        let import = self.processes.get_mut(&pid)?.guests.import(call_site, callee)?;
        Some(self.definitions.import(&import, events))
    }

    /// The host function that a component calls through the trampoline which `return_address` lies in.
    pub(super) fn trampoline_import(
        &mut self,
        pid: u32,
        return_address: u64,
        events: &mut Vec<Event>,
    ) -> Option<ImportId> {
        let import = self.processes.get_mut(&pid)?.guests.trampoline_import(return_address)?;
        Some(self.definitions.import(&import, events))
    }
}

/// A host binary that is ready to be started.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WatchedHost {
    /// Which runtime.
    pub runtime_name: &'static str,
    /// Sites attached.
    pub site_count: usize,
    /// What is observed.
    pub coverage: Coverage,
    /// What is not.
    pub limits: Vec<String>,
}

impl Watched {
    /// Reads the code objects among `mappings` that are not held yet.
    fn scan(&mut self, mappings: &[ExecutableMapping], turn: u64, missing: &mut Unscanned) {
        self.code = mappings.iter().map(|mapping| mapping.range.clone()).collect();
        for mapping in maps::code_objects(mappings, &self.memory) {
            if self.guests.holds(mapping.range.start) {
                continue;
            }
            missing.count(self.read(&mapping.range, file_name(&mapping), turn));
        }
    }

    /// The copy of the runtime whose host functions have to be learnt; of several, the first.
    pub(super) fn learning_host(&self) -> Option<&SharedHost> {
        self.hosts.iter().find(|host| host.plan.learns_host_functions)
    }

    pub(super) fn describe(&self, pid: u32, limits: Vec<String>) -> Process {
        let versions = self.guests.engine_versions();
        Process {
            pid,
            start_ns: self.facts.start_ns,
            command: self.facts.command.clone(),
            runtime_name: self
                .hosts
                .first()
                .map_or(UNKNOWN_RUNTIME, |host| host.plan.runtime_name)
                .to_owned(),
            runtime_version: (!versions.is_empty()).then(|| versions.join(", ")),
            limits,
            place: self.place.clone(),
        }
    }
}

/// A function that the program is attached to in this host.
fn sites_of(plan: &ProbePlan, program: SiteProgram) -> &'static str {
    let mut sites = plan.sites.iter();
    sites
        .find(|site| site.program == program)
        .map_or("", |site| site.function)
}

fn file_name(mapping: &ExecutableMapping) -> Option<String> {
    mapping.file.as_ref()?;
    let path = mapping.path.as_deref()?;
    Path::new(path).file_stem()?.to_str().map(str::to_owned)
}
