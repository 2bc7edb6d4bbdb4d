//! What runs WebAssembly on this node, for those who place guests: runtimes with version and embedding, modules, and how warm they are.
//!
//! A module is *held* by a process that has its code published now. It is *warm* if a process holds it and has invoked it in the last
//! `warm_seconds`. Modules are told apart by name and by the hash of their code, which differs between versions of the runtime. What was seen of
//! a module (invocations, cold starts, instances) counts for the processes that hold it now, and goes with them.

mod api;
mod config;
mod features;
mod metrics;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use arc_swap::ArcSwap;
use serde::Serialize;

pub use self::api::routes;
pub use self::config::InventoryConfig;
pub use self::features::FeaturesFile;
pub use self::metrics::InventoryCollector;
use crate::event::{Event, EventKind};
use crate::image::code_object::CodeKind;
use crate::pipeline::{AggregateRow, Counted, Holding, Pipeline};
use crate::process::maps;
use crate::sink::text::bounded_line;
use crate::span::{PhaseKind, SpanKind, Trace};

/// Longest name or version kept, bytes.
const MAX_TEXT_BYTES: usize = 128;
/// Runtimes told apart; the others are counted together.
const MAX_RUNTIMES: usize = 64;
/// Modules of which it is known at once how they are used, those of each process apart.
const MAX_USES: usize = 65_536;
/// Modules looked at to find those that are told apart.
const MAX_SEEN_MODULES: usize = 65_536;
/// Processes of which it is looked at once whether they still map what they have published.
const CHECKED_AT_ONCE: usize = 16;

/// How the code of a module came to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Compilation {
    /// By the process that holds it.
    Jit,
    /// Before: it was deserialized, or mapped from a file.
    Aot,
    /// One in one process, another in another.
    Mixed,
    /// Nobody saw it come.
    Unknown,
}

impl Compilation {
    /// The word for it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Jit => "jit",
            Self::Aot => "aot",
            Self::Mixed => "mixed",
            Self::Unknown => "unknown",
        }
    }
}

/// A runtime as it is embedded.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
pub struct RuntimeKey {
    /// Value of `wasm.runtime.name`.
    pub runtime: String,
    /// As the runtime writes it into its code, `48` or `36.0.0`; `unknown` where there is none. Bounded and on one line, but chosen by the process.
    pub version: String,
    /// A word of [`crate::runtime::Embedding`]; `mixed` for a process with several that differ.
    pub embedding: &'static str,
    /// Whether the files with the runtime have no symbols: `true`, `false`, `mixed` or `unknown`.
    pub stripped: &'static str,
}

/// A runtime, and how many processes have it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct RuntimeRow {
    /// Which.
    #[serde(flatten)]
    pub key: RuntimeKey,
    /// Processes that have it now.
    pub processes: u64,
}

/// A module, and how it is used.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ModuleRow {
    /// Its name; bounded and on one line, but chosen by its owner.
    pub module: String,
    /// Hash of its code, twelve hexadecimal digits.
    pub module_hash: String,
    /// `core` or `component`.
    pub kind: &'static str,
    /// How the code came to be.
    pub compilation: Compilation,
    /// Processes that hold it now.
    pub processes: u64,
    /// Of those, the ones that have invoked it in the last `warm_seconds`.
    pub warm_processes: u64,
    /// Invocations that those processes were seen to make.
    pub invocations_seen: u64,
    /// Of those, the ones that were the first since the code was published.
    pub cold_starts_seen: u64,
    /// Share of the second in the first; none without invocations.
    pub cold_ratio: Option<f64>,
    /// Instances that those processes were seen to make.
    pub instances_seen: u64,
    /// Since the last invocation that was seen, to the second; none if there was none.
    pub idle_seconds: Option<u64>,
}

/// What there is now.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Snapshot {
    /// `wasmscope.inventory.v1`: fields may come, none goes or changes its meaning.
    pub schema: &'static str,
    /// Name of the node, empty if it is not known.
    pub node: String,
    /// Times that it was renewed.
    pub generation: u64,
    /// A module is warm for so long after its last invocation.
    pub warm_seconds: u64,
    /// Processes that run wasm.
    pub processes: u64,
    /// Runtimes, those of most processes first.
    pub runtimes: Vec<RuntimeRow>,
    /// Processes with runtimes that are not told apart: one for each runtime of theirs.
    pub other_runtime_processes: u64,
    /// Modules, those of most processes first.
    pub modules: Vec<ModuleRow>,
    /// Processes with modules that are not told apart: one for each module of theirs.
    pub other_module_processes: u64,
    /// Times that a module was used and could not be counted, for there were too many.
    pub uses_not_kept: u64,
}

/// How a process was seen to use a module.
#[derive(Clone, Copy, Debug, Default)]
struct Use {
    invocations: u64,
    cold_starts: u64,
    instances: u64,
    last: Option<Instant>,
}

#[derive(Debug, Default)]
struct Known {
    start_ns: u64,
    /// By hash.
    uses: HashMap<String, Use>,
    /// By where the code is.
    compilations: HashMap<u64, Compilation>,
    /// Where code was that is not mapped any more.
    gone: HashSet<u64>,
}

#[derive(Debug, Default)]
struct State {
    processes: BTreeMap<u32, Known>,
    use_count: usize,
    uses_not_kept: u64,
    /// The process that was looked at last.
    checked: u32,
    generation: u64,
    next: Option<Instant>,
}

/// The inventory: fed by the event loop, read by everybody.
#[derive(Debug)]
pub struct Inventory {
    config: InventoryConfig,
    node: String,
    /// Invocations come as rows of the kernel's, not with traces.
    has_aggregates: bool,
    state: Mutex<State>,
    snapshot: ArcSwap<Snapshot>,
}

impl Inventory {
    /// Empty. `has_aggregates`: invocations are told by [`Self::row`].
    pub fn new(config: InventoryConfig, node: String, has_aggregates: bool) -> Self {
        let snapshot = Snapshot {
            schema: "wasmscope.inventory.v1",
            warm_seconds: config.warm_seconds,
            node: node.clone(),
            ..Snapshot::default()
        };
        Self {
            config,
            node,
            has_aggregates,
            state: Mutex::default(),
            snapshot: ArcSwap::from_pointee(snapshot),
        }
    }

    /// What there is.
    pub fn snapshot(&self) -> Arc<Snapshot> {
        self.snapshot.load_full()
    }

    /// Notes processes that come and go, and how code came to be.
    pub fn event(&self, event: &Event) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        match &event.kind {
            EventKind::Process { process, .. } => {
                let known = state.processes.entry(event.pid).or_default();
                if known.start_ns != process.start_ns {
                    let old = std::mem::take(known);
                    known.start_ns = process.start_ns;
                    state.use_count -= old.uses.len();
                }
            }
            EventKind::ProcessGone => {
                if let Some(known) = state.processes.remove(&event.pid) {
                    state.use_count -= known.uses.len();
                }
            }
            EventKind::Phase { phase, image, hash, .. } => {
                if *phase == PhaseKind::Instantiate
                    && let Some(hash) = hash
                {
                    state.used(event.pid, None, hash, |used| used.instances += 1);
                }
                let compilation = match phase {
                    PhaseKind::Compile => Compilation::Jit,
                    PhaseKind::Deserialize => Compilation::Aot,
                    _ => return,
                };
                if *image != 0
                    && let Some(known) = state.processes.get_mut(&event.pid)
                    && known.compilations.len() < crate::process::guests::MAX_OBJECTS
                {
                    known.compilations.insert(*image, compilation);
                }
            }
            EventKind::ModulePublished { image, .. } => {
                // What was there before came otherwise, perhaps.
                if let Some(known) = state.processes.get_mut(&event.pid) {
                    known.compilations.remove(image);
                    known.gone.remove(image);
                }
            }
            _ => {}
        }
    }

    /// Counts invocations that the kernel has counted.
    pub fn row(&self, row: &AggregateRow) {
        let (Counted::Invocations { export: Some(function) }, Some(process)) = (&row.counted, &row.process) else {
            return;
        };
        let count: u64 = row.outcomes.iter().map(|(_, count)| count).sum();
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let now = Instant::now();
        state.used(process.pid, Some(process.start_ns), &function.module.hash, |used| {
            used.invocations += count;
            used.last = Some(now);
        });
    }

    /// Counts cold starts and, unless the kernel does, invocations.
    pub fn trace(&self, trace: &Trace) {
        let owner = &trace.process;
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        for cold in &trace.starts.cold {
            state.used(owner.pid, Some(owner.start_ns), &cold.module.hash, |used| {
                used.cold_starts += 1;
            });
        }
        if self.has_aggregates {
            return;
        }
        let now = Instant::now();
        for span in trace.root.walk() {
            if let SpanKind::Invoke {
                function: Some(function),
            } = &span.kind
            {
                state.used(owner.pid, Some(owner.start_ns), &function.module.hash, |used| {
                    used.invocations += 1;
                    used.last = Some(now);
                });
            }
        }
    }

    /// Looks what the watched processes hold, if it is time to.
    pub fn refresh(&self, pipeline: &mut Pipeline) {
        let now = Instant::now();
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if state.next.is_some_and(|next| now < next) {
            return;
        }
        state.next = Some(now + Duration::from_secs(self.config.interval_seconds));
        let mut pids = pipeline.watched_pids();
        pids.sort_unstable();
        for pid in next_of(&pids, state.checked) {
            state.checked = pid;
            let (Some(holding), Ok(mappings)) = (pipeline.holding(pid), maps::executable_mappings(pid)) else {
                continue;
            };
            let is_mapped = |text_start| mappings.iter().any(|mapping| mapping.range.contains(&text_start));
            let gone = holding.code.iter().map(|code| code.text_start);
            let gone = gone.filter(|text_start| !is_mapped(*text_start)).collect();
            if let Some(known) = state.processes.get_mut(&pid) {
                known.gone = gone;
            }
        }
        let holdings = pids.iter().filter_map(|pid| pipeline.holding(*pid));
        let snapshot = self.look(&mut state, holdings, now);
        self.snapshot.store(Arc::new(snapshot));
    }

    fn look(&self, state: &mut State, holdings: impl Iterator<Item = Holding>, now: Instant) -> Snapshot {
        let warm = Duration::from_secs(self.config.warm_seconds);
        let mut gathered = Gathered::default();
        for holding in holdings {
            // A process that has no guests yet, or was started by one that has, is none that runs wasm.
            if !holding.code.is_empty() {
                gathered.processes += 1;
                gathered.runtimes(&holding);
            }
            let known = state.processes.get_mut(&holding.pid);
            let known = known.filter(|known| known.start_ns == holding.start_ns);
            let hashes = gathered.modules(&holding, known.as_deref(), now, warm);
            if let Some(known) = known {
                let before = known.uses.len();
                known.uses.retain(|hash, _| hashes.contains(hash.as_str()));
                let addresses: HashSet<_> = holding.code.iter().map(|code| code.text_start).collect();
                known.compilations.retain(|address, _| addresses.contains(address));
                state.use_count -= before - known.uses.len();
            }
        }
        state.generation += 1;
        let (runtimes, other_runtime_processes) = gathered.runtime_rows();
        let (modules, other_module_processes) = gathered.module_rows(self.config.max_modules);
        Snapshot {
            schema: "wasmscope.inventory.v1",
            node: self.node.clone(),
            generation: state.generation,
            warm_seconds: self.config.warm_seconds,
            processes: gathered.processes,
            runtimes,
            other_runtime_processes,
            modules,
            other_module_processes,
            uses_not_kept: state.uses_not_kept,
        }
    }
}

impl State {
    /// Notes a use, if the process is known and, where that is said, the one that started then.
    fn used(&mut self, pid: u32, start_ns: Option<u64>, hash: &str, note: impl FnOnce(&mut Use)) {
        let Some(known) = self.processes.get_mut(&pid) else {
            return;
        };
        if start_ns.is_some_and(|start_ns| start_ns != known.start_ns) {
            return;
        }
        if let Some(used) = known.uses.get_mut(hash) {
            return note(used);
        }
        if self.use_count >= MAX_USES {
            self.uses_not_kept += 1;
            return;
        }
        self.use_count += 1;
        note(known.uses.entry(hash.to_owned()).or_default());
    }
}

/// The next few after one, from the beginning after the last.
fn next_of(pids: &[u32], after: u32) -> Vec<u32> {
    let start = pids.partition_point(|pid| *pid <= after);
    let (before, rest) = pids.split_at(start);
    rest.iter().chain(before).copied().take(CHECKED_AT_ONCE).collect()
}

/// What is being added up.
#[derive(Default)]
struct Gathered {
    processes: u64,
    runtimes: HashMap<RuntimeKey, u64>,
    other_runtimes: u64,
    /// By name, hash and kind.
    modules: HashMap<(String, String, &'static str), ModuleRow>,
    other_modules: u64,
}

impl Gathered {
    fn runtimes(&mut self, holding: &Holding) {
        let unknown = || vec!["unknown".to_owned()];
        let versions = if holding.versions.is_empty() {
            unknown()
        } else {
            let bounded = |version: &String| named(version, "unknown");
            holding.versions.iter().map(bounded).collect()
        };
        let versions: HashSet<_> = versions.into_iter().collect();
        let embeddings = holding.files.iter().map(|(embedding, _)| embedding.as_str());
        let stripped = holding.files.iter().map(|(_, is_stripped)| match is_stripped {
            true => "true",
            false => "false",
        });
        let (embedding, stripped) = (common(embeddings), common(stripped));
        for version in versions {
            let key = RuntimeKey {
                runtime: holding.runtime_name.to_owned(),
                version,
                embedding,
                stripped,
            };
            let is_full = self.runtimes.len() >= MAX_SEEN_MODULES;
            match self.runtimes.get_mut(&key) {
                Some(count) => *count += 1,
                // Hosts choose what they call their version.
                None if is_full => self.other_runtimes += 1,
                None => {
                    self.runtimes.insert(key, 1);
                }
            }
        }
    }

    /// Adds the modules of a process; the hashes of all of them.
    fn modules<'a>(
        &mut self,
        holding: &'a Holding,
        known: Option<&Known>,
        now: Instant,
        warm: Duration,
    ) -> HashSet<&'a str> {
        let mut own: HashMap<(String, String, &'static str), Compilation> = HashMap::new();
        let mut hashes = HashSet::new();
        for code in &holding.code {
            hashes.insert(code.module.hash.as_str());
            if known.is_some_and(|known| known.gone.contains(&code.text_start)) {
                continue;
            }
            let seen = known.and_then(|known| known.compilations.get(&code.text_start));
            let compilation = match seen {
                _ if code.is_of_a_file => Compilation::Aot,
                Some(compilation) => *compilation,
                None => Compilation::Unknown,
            };
            let kind = match code.kind {
                CodeKind::Module => "core",
                CodeKind::Component => "component",
            };
            let key = (named(&code.module.name, "unknown"), code.module.hash.clone(), kind);
            let compilations = own.entry(key).or_insert(compilation);
            *compilations = both(*compilations, compilation);
        }
        // A module that has two names in a process is used under one of them, it is not known which: under the first.
        let mut told = HashSet::new();
        let mut own: Vec<_> = own.into_iter().collect();
        own.sort_unstable();
        for (key, compilation) in own {
            let is_full = self.modules.len() >= MAX_SEEN_MODULES;
            let row = match self.modules.get_mut(&key) {
                Some(row) => row,
                None if is_full => {
                    self.other_modules += 1;
                    continue;
                }
                None => {
                    let (module, module_hash, kind) = key.clone();
                    self.modules.entry(key.clone()).or_insert(ModuleRow {
                        module,
                        module_hash,
                        kind,
                        compilation,
                        processes: 0,
                        warm_processes: 0,
                        invocations_seen: 0,
                        cold_starts_seen: 0,
                        cold_ratio: None,
                        instances_seen: 0,
                        idle_seconds: None,
                    })
                }
            };
            row.processes += 1;
            row.compilation = both(row.compilation, compilation);
            let used = known.and_then(|known| known.uses.get(&key.1));
            if told.insert(key.1.clone())
                && let Some(used) = used
            {
                row.add(used, now, warm);
            }
        }
        hashes
    }

    fn runtime_rows(&mut self) -> (Vec<RuntimeRow>, u64) {
        let rows = self.runtimes.drain();
        let mut rows: Vec<_> = rows.map(|(key, processes)| RuntimeRow { key, processes }).collect();
        rows.sort_unstable_by(|one, other| (other.processes, &one.key).cmp(&(one.processes, &other.key)));
        let others: u64 = rows.iter().skip(MAX_RUNTIMES).map(|row| row.processes).sum();
        rows.truncate(MAX_RUNTIMES);
        (rows, self.other_runtimes + others)
    }

    fn module_rows(&mut self, max_modules: usize) -> (Vec<ModuleRow>, u64) {
        let mut rows: Vec<_> = self.modules.drain().map(|(_, row)| row).collect();
        rows.sort_unstable_by(|one, other| {
            let words = |row: &ModuleRow| (row.module.clone(), row.module_hash.clone(), row.kind);
            let processes = other.processes.cmp(&one.processes);
            processes.then_with(|| words(one).cmp(&words(other)))
        });
        let others: u64 = rows.iter().skip(max_modules).map(|row| row.processes).sum();
        rows.truncate(max_modules);
        for row in &mut rows {
            row.cold_ratio =
                (row.invocations_seen > 0).then(|| row.cold_starts_seen as f64 / row.invocations_seen as f64);
        }
        (rows, self.other_modules + others)
    }
}

impl ModuleRow {
    fn add(&mut self, used: &Use, now: Instant, warm: Duration) {
        self.invocations_seen += used.invocations;
        self.cold_starts_seen += used.cold_starts;
        self.instances_seen += used.instances;
        let Some(last) = used.last else { return };
        let idle = now.saturating_duration_since(last);
        self.warm_processes += u64::from(idle < warm);
        let least = self.idle_seconds.unwrap_or(u64::MAX);
        self.idle_seconds = Some(idle.as_secs().min(least));
    }
}

/// Untrusted text as a name: bounded, on one line, not empty.
fn named(untrusted: &str, otherwise: &str) -> String {
    if untrusted.is_empty() {
        return otherwise.to_owned();
    }
    bounded_line(untrusted, MAX_TEXT_BYTES).into_owned()
}

fn both(one: Compilation, other: Compilation) -> Compilation {
    if one == other { one } else { Compilation::Mixed }
}

/// The word that all have.
fn common(mut words: impl Iterator<Item = &'static str>) -> &'static str {
    let Some(first) = words.next() else { return "unknown" };
    if words.all(|word| word == first) {
        first
    } else {
        "mixed"
    }
}
