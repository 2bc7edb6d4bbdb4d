//! Host functions of programs without symbols: where they are is learnt from the first host call of each module, and
//! remembered per file and build, so that the next process is probed from its first call.
//!
//! A hardware breakpoint waits on the module's ways out. Its one hit brings the caller's import table, which holds the
//! address of every function that the module imports; of a component its context, which does too. What is learnt is checked against the file: only the beginning of
//! a function of the very file that is going to be probed is taken.

use std::{
    collections::{BTreeSet, HashMap, HashSet},
    ops::Range,
    time::{Duration, Instant},
};

use wasmscope_common::{HOST_FUNCTIONS_SOUGHT, ImportTable};

use super::{Pipeline, SharedHost, copies, watching::Watched};
use crate::{
    bpf::{Breakpoint, MAX_BREAKPOINTS},
    clock,
    event::{Coverage, Event},
    image::host::HostFunction,
    process::{hosts::FileId, maps},
    runtime::PlannedSite,
    span::Process,
};

/// How long a breakpoint waits while others want its place, at first and at most: modules that do nothing are not to cost
/// anything.
const PATIENCE: Range<Duration> = Duration::from_millis(50)..Duration::from_secs(5);
/// Tables of a module that say nothing before it is given up.
const MAX_ATTEMPTS: u32 = 16;
/// Host functions learnt of one file. wasmtime's command line has 963.
const MAX_FUNCTIONS: usize = 4096;
/// Modules remembered per file.
const MAX_MODULES: usize = 4096;
/// Builds remembered.
const MAX_BUILDS: usize = 256;
/// Processes remembered to have run guests.
const MAX_ACTIVE: usize = 1024;
/// Addresses looked at per import table.
const MAX_IMPORTS: usize = 256;

/// All that has been learnt, and what is being sought.
#[derive(Debug, Default)]
pub(super) struct Learning {
    armed: Vec<Armed>,
    /// Which of what is wanted gets the next free breakpoint.
    next: usize,
    /// More is wanted than there are breakpoints.
    is_crowded: bool,
    /// How much is wanted.
    wanted_count: usize,
    /// Doubled whenever everybody has had it and nothing has been learnt.
    patience: Duration,
    /// Processes whose guests have run while there were too few breakpoints: only they get some, if there are any.
    active: HashSet<u32>,
    /// When breakpoints were changed last.
    changed: Option<Instant>,
    /// Why there are no breakpoints, if so.
    refused: Option<String>,
    files: HashMap<FileId, Learnt>,
    /// Host functions by build id, with how each begins: a build id alone is a claim.
    builds: HashMap<String, Vec<(HostFunction, Vec<u8>)>>,
}

/// A breakpoint and what it is for.
#[derive(Debug)]
struct Armed {
    way: Way,
    _breakpoint: Breakpoint,
}

/// A module's way to functions it imports.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Way {
    pid: u32,
    file_id: FileId,
    module: String,
    address: u64,
}

/// What has been learnt of one file.
#[derive(Debug, Default)]
struct Learnt {
    /// By file offset.
    functions: BTreeSet<u64>,
    sites: Vec<PlannedSite>,
    /// Modules whose imports are known, as [`crate::process::guests::WaysOut`] calls them.
    modules: HashSet<String>,
    attempts: HashMap<String, u32>,
}

impl Learning {
    /// Takes all breakpoints away.
    pub(super) fn disarm(&mut self) {
        self.armed.clear();
    }

    /// A guest of the process runs: it may call a host function soon.
    pub(super) fn saw_guest(&mut self, pid: u32) {
        if self.is_crowded && self.active.len() < MAX_ACTIVE && self.active.insert(pid) {
            self.patience = PATIENCE.start;
        }
    }

    /// No process runs the file any more; what is known of its build stays.
    pub(super) fn forget(&mut self, file_id: FileId) {
        self.files.remove(&file_id);
    }

    /// Whether more breakpoints are wanted than there are, so that they change places.
    pub(super) fn is_rotating(&self) -> bool {
        self.is_crowded
    }

    fn wants(&self, file_id: FileId, module: &str) -> bool {
        self.files.get(&file_id).is_none_or(|learnt| {
            !learnt.modules.contains(module) && learnt.attempts.get(module).copied().unwrap_or(0) < MAX_ATTEMPTS
        })
    }
}

impl Pipeline {
    /// Sites attached in a host, those that have been learnt included.
    pub(super) fn site_count(&self, host: &SharedHost) -> usize {
        let learnt = self.learning.files.get(&host.file_id);
        host.plan.sites.len() + learnt.map_or(0, |learnt| learnt.sites.len())
    }

    /// What is not observed of a host's processes, in words for a person.
    pub(super) fn limits_of(&self, host: &SharedHost) -> Vec<String> {
        let mut limits = host.plan.limits.clone();
        if self.distrusts_swap(host.file_id) {
            limits.push(
                "the function taken for the swap of activations is another: guests of this host are not followed"
                    .to_owned(),
            );
        }
        if !host.plan.learns_host_functions {
            return limits;
        }
        let known = self
            .learning
            .files
            .get(&host.file_id)
            .map_or(0, |learnt| learnt.functions.len());
        limits.push(match (&self.learning.refused, known) {
            (Some(reason), 0) => format!("stripped, and no breakpoint to learn host functions with: {reason}"),
            (_, 0) => "stripped: host calls are seen once their functions have been learnt from the first".to_owned(),
            (_, known) => {
                format!("stripped: {known} host functions learnt, others are not seen until their module calls one")
            }
        });
        limits
    }

    /// The description of a process, with what has been learnt so far.
    pub(super) fn process_of(&self, pid: u32, watched: &Watched) -> Process {
        let mut limits = copies::limits(&watched.hosts, &watched.guests, |host| self.limits_of(host));
        if watched.learning_host().is_some() && watched.guests.hides_ways_out() {
            limits.push(
                "stripped, and a component's code does not tell its host functions: they are not seen".to_owned(),
            );
        }
        watched.describe(pid, limits)
    }

    /// Arms breakpoints for modules whose imports are not known, and disarms those that nobody needs any more.
    pub(super) fn seek_host_functions(&mut self) {
        if self.is_finishing || !self.options.detail.has_probes() {
            return;
        }
        let mut wanted = self.wanted();
        self.learning.armed.retain(|armed| wanted.contains(&armed.way));
        self.learning.is_crowded = wanted.len() > MAX_BREAKPOINTS;
        if wanted.len() != self.learning.wanted_count {
            self.learning.wanted_count = wanted.len();
            self.learning.patience = PATIENCE.start;
        }
        if self.learning.is_crowded {
            let active = &mut self.learning.active;
            let pids: HashSet<_> = wanted.iter().map(|way| way.pid).collect();
            active.retain(|pid| pids.contains(pid));
            if !active.is_empty() {
                wanted.retain(|way| active.contains(&way.pid));
            }
        } else {
            self.learning.active.clear();
        }
        self.learning.changed = Some(Instant::now());
        for step in 0..wanted.len() {
            if self.learning.armed.len() >= MAX_BREAKPOINTS {
                break;
            }
            let way = &wanted[(self.learning.next + step) % wanted.len()];
            if self.learning.armed.iter().any(|armed| armed.way == *way) {
                continue;
            }
            match self.kernel.break_at(way.address) {
                Ok(breakpoint) => {
                    tracing::debug!(pid = way.pid, module = way.module, "host functions are sought");
                    self.learning.refused = None;
                    self.learning.armed.push(Armed {
                        way: way.clone(),
                        _breakpoint: breakpoint,
                    });
                }
                Err(error) => {
                    if self.learning.armed.is_empty() && self.learning.refused.is_none() {
                        tracing::warn!(
                            error = &error as &dyn std::error::Error,
                            "no breakpoint to learn host functions with"
                        );
                        self.learning.refused = Some(error.to_string());
                    }
                    // Somebody else's may go away.
                    self.learning.is_crowded = true;
                    break;
                }
            }
        }
        if !wanted.is_empty() {
            self.learning.next = (self.learning.next + MAX_BREAKPOINTS) % wanted.len();
        }
    }

    /// Gives others a turn at the few breakpoints there are.
    pub(super) fn rotate_breakpoints(&mut self) {
        let patience = self.learning.patience;
        let is_due = self
            .learning
            .changed
            .is_some_and(|changed| changed.elapsed() >= patience);
        if self.learning.is_crowded && is_due {
            self.learning.armed.clear();
            self.seek_host_functions();
            let everyone_had_a_turn = self.learning.next < MAX_BREAKPOINTS;
            if everyone_had_a_turn && self.learning.patience == patience {
                self.learning.patience = (patience * 2).min(PATIENCE.end);
            }
        }
    }

    fn wanted(&self) -> Vec<Way> {
        let mut wanted = Vec::new();
        for (pid, watched) in &self.processes {
            let Some(host) = watched.learning_host() else {
                continue;
            };
            let is_wanted = |module: &str| self.learning.wants(host.file_id, module);
            for ways in watched.guests.ways_out(is_wanted) {
                wanted.extend(ways.addresses.into_iter().map(|address| Way {
                    pid: *pid,
                    file_id: host.file_id,
                    module: ways.key.clone(),
                    address,
                }));
            }
        }
        wanted.sort_by_key(|way| (way.pid, way.address));
        wanted
    }

    /// Learns from an import table where host functions are.
    pub(super) fn learn_host_functions(&mut self, pid: u32, table: &ImportTable, events: &mut Vec<Event>) {
        let Some(watched) = self.processes.get_mut(&pid) else {
            return;
        };
        let Some(host) = watched.learning_host().cloned() else {
            return;
        };
        let code = &watched.code;
        let is_code = |address: u64| code.iter().any(|range| range.contains(&address));
        let imported = watched.guests.imported_functions(&watched.memory, table, is_code);
        let is_news = imported.as_ref().is_some_and(|imported| {
            let mut addresses = imported.addresses.iter().take(MAX_IMPORTS);
            addresses.any(|address| !watched.known_functions.contains(address))
        });
        let mappings = if is_news && watched.looks.maps.has_any(clock::monotonic_ns()) {
            let (mappings, byte_count) = maps::sized_mappings(pid).unwrap_or_default();
            watched.looks.maps.spend(byte_count);
            mappings
        } else {
            Vec::new()
        };
        let learnt = self.learning.files.entry(host.file_id).or_default();
        let mut functions = Vec::new();
        let mut is_understood = false;
        let caller = imported.as_ref().map(|imported| imported.key.clone());
        if let Some(imported) = imported {
            is_understood = true;
            for address in imported.addresses.into_iter().take(MAX_IMPORTS) {
                if watched.known_functions.contains(&address) {
                    continue;
                }
                match host.function_in(address, &mappings, &watched.memory, imported.path) {
                    Ok(function) => {
                        functions.extend(function);
                        if watched.known_functions.len() < MAX_FUNCTIONS {
                            watched.known_functions.insert(address);
                        }
                    }
                    // The process is gone, or going: another's call has to tell.
                    Err(error) => {
                        tracing::debug!(pid, address, %error, "a host function cannot be read");
                        is_understood = false;
                    }
                }
            }
            if is_understood {
                if learnt.modules.len() >= MAX_MODULES {
                    // They are learnt again.
                    learnt.modules.clear();
                }
                learnt.modules.insert(imported.key);
            }
        }
        if table.header.flags & HOST_FUNCTIONS_SOUGHT != 0 {
            // The one hit is spent.
            let (spent, armed): (Vec<_>, _) = std::mem::take(&mut self.learning.armed)
                .into_iter()
                .partition(|armed| armed.way.pid == pid);
            self.learning.armed = armed;
            if !is_understood {
                tracing::debug!(
                    pid,
                    call_site = table.call_site,
                    length = table.length,
                    "an import table says nothing"
                );
                let spent: BTreeSet<_> = spent.into_iter().map(|armed| armed.way.module).collect();
                let modules = caller.map_or(spent, |caller| BTreeSet::from([caller]));
                if learnt.attempts.len() >= MAX_MODULES {
                    learnt.attempts.clear();
                }
                for module in modules {
                    *learnt.attempts.entry(module).or_default() += 1;
                }
            }
            self.seek_host_functions();
        }
        self.take_host_functions(&host, &functions, events);
    }

    /// What is known of a build, for a file that is looked at for the first time.
    pub(super) fn recall(&mut self, host: &SharedHost) -> Coverage {
        let known = host
            .plan
            .build_id
            .as_ref()
            .filter(|_| host.plan.learns_host_functions)
            .and_then(|build_id| self.learning.builds.get(build_id));
        let functions: Vec<_> = known
            .into_iter()
            .flatten()
            .filter(|(function, first_bytes)| {
                host.function_from(function.file_offset, function.path).as_ref() == Some(function)
                    && host.first_bytes(function) == *first_bytes
            })
            .map(|(function, _)| function.clone())
            .collect();
        if !functions.is_empty() {
            self.take_host_functions(host, &functions, &mut Vec::new());
            tracing::info!(
                count = functions.len(),
                "host functions known from another file of this build"
            );
        }
        self.links
            .get(&host.file_id)
            .map_or_else(Coverage::default, |(coverage, _)| *coverage)
    }

    /// Attaches those of `functions` that are new, and says so.
    fn take_host_functions(&mut self, host: &SharedHost, functions: &[HostFunction], events: &mut Vec<Event>) {
        let learnt = self.learning.files.entry(host.file_id).or_default();
        let room = MAX_FUNCTIONS.saturating_sub(learnt.functions.len());
        let functions: Vec<_> = functions
            .iter()
            .filter(|function| !learnt.functions.contains(&function.file_offset))
            .take(room)
            .cloned()
            .collect();
        if functions.is_empty() {
            return;
        }
        let is_first = learnt.functions.is_empty();
        learnt
            .functions
            .extend(functions.iter().map(|function| function.file_offset));
        let known = learnt.sites.clone();
        let Some(plan) = host.plan_learnt(known, &functions) else {
            return;
        };
        let (seen, links) = self.attach_plan(host, &plan);
        let Some((coverage, all_links)) = self.links.get_mut(&host.file_id) else {
            return;
        };
        all_links.extend(links);
        coverage.host_calls |= seen.host_calls;
        // One function whose end is not seen makes all ends uncertain.
        coverage.host_call_ends = seen.host_call_ends && (is_first || coverage.host_call_ends);
        tracing::info!(count = functions.len(), "host functions learnt");
        if let Some(learnt) = self.learning.files.get_mut(&host.file_id) {
            learnt.sites.extend(plan.sites);
        }
        if let Some(build_id) = &host.plan.build_id
            && (self.learning.builds.len() < MAX_BUILDS || self.learning.builds.contains_key(build_id))
        {
            let known = self.learning.builds.entry(build_id.clone()).or_default();
            for function in functions {
                if known.len() < MAX_FUNCTIONS && !known.iter().any(|(known, _)| *known == function) {
                    let first_bytes = host.first_bytes(&function);
                    known.push((function, first_bytes));
                }
            }
        }
        self.cover(host.file_id, events);
    }

    /// Tells the processes of a file what is observed from now on.
    pub(super) fn cover(&mut self, file_id: FileId, events: &mut Vec<Event>) {
        let links = &self.links;
        let pids: Vec<_> = self
            .processes
            .iter_mut()
            .filter(|(_, watched)| watched.hosts.iter().any(|host| host.file_id == file_id))
            .map(|(pid, watched)| {
                let coverages = watched.hosts.iter().filter_map(|host| links.get(&host.file_id));
                let common = coverages.map(|(coverage, _)| *coverage).reduce(copies::common_coverage);
                watched.coverage = common.unwrap_or_default();
                *pid
            })
            .collect();
        for pid in pids {
            self.describe(pid, events);
        }
    }
}
