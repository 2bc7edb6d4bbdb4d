//! The families that the kernel counts: their series, and how long those live.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use super::{config::MetricsConfig, io_direction, labels::bounded_value};
use crate::{
    pipeline::{AggregateRow, Counted, Times},
    span::{Bound, Process, Span, SpanKind, Trace, TraceId},
};
use wasmscope_common::bucket_of;

/// A label set, in the order in which it is written.
pub(super) type LabelSet = Vec<(String, String)>;
/// A process: ids are used again.
type ProcessKey = (u32, u64);

/// Name and help of the families of counters, without `_total`.
pub(super) const COUNTERS: [(&str, &str); 4] = [
    ("wasm_invocations", "Calls of exported functions by the host"),
    ("wasm_host_calls", "Calls of imported functions by guests"),
    ("wasm_syscalls", "System calls made on behalf of guests"),
    ("wasm_io_bytes", "Bytes moved by system calls made on behalf of guests"),
];
/// Name and help of the families of histograms.
pub(super) const HISTOGRAMS: [(&str, &str); 3] = [
    (
        "wasm_invocation_duration_seconds",
        "Time from entering a guest to leaving it",
    ),
    ("wasm_host_call_duration_seconds", "Time in an imported function"),
    (
        "wasm_syscall_duration_seconds",
        "Time in a system call made on behalf of a guest",
    ),
];
const INVOCATIONS: usize = 0;
const HOST_CALLS: usize = 1;
const SYSCALLS: usize = 2;
const IO_BYTES: usize = 3;

/// A trace that stands for a bucket.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Exemplar {
    pub(super) trace: TraceId,
    pub(super) seconds: f64,
}

/// A series with its owners.
#[derive(Debug, Default)]
pub(super) struct Series<T> {
    pub(super) value: T,
    owners: BTreeSet<ProcessKey>,
    unowned_since: Option<Instant>,
}

/// What a histogram's series holds.
#[derive(Debug, Default)]
pub(super) struct Histogram {
    pub(super) times: Times,
    /// The last complete trace of a bucket.
    pub(super) exemplars: BTreeMap<usize, Exemplar>,
}

/// All series.
#[derive(Debug, Default)]
pub(super) struct State {
    pub(super) counters: [BTreeMap<LabelSet, Series<u64>>; 4],
    pub(super) histograms: [BTreeMap<LabelSet, Series<Histogram>>; 3],
    pub(super) overflow_count: u64,
}

/// The families that the kernel counts.
#[derive(Debug)]
pub(super) struct AggregateFamilies {
    pub(super) config: MetricsConfig,
    state: Mutex<State>,
}

impl AggregateFamilies {
    pub(super) fn new(config: MetricsConfig) -> Self {
        Self {
            config,
            state: Mutex::default(),
        }
    }

    pub(super) fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds what is new in a row.
    pub(super) fn observe(&self, row: &AggregateRow) {
        let (family, base) = self.base_of(row.process.as_deref(), &row.counted);
        let owner = row.process.as_ref().map(|process| (process.pid, process.start_ns));
        let mut state = self.state();
        let cap = self.config.max_counter_series;
        for (outcome, count) in &row.outcomes {
            let mut labels = base.clone();
            labels.push(("outcome".to_owned(), bounded_value(outcome)));
            let labels = state.room_for_counter(family, labels, cap);
            let series = state.counters[family].entry(labels).or_default();
            series.value += count;
            series.own(owner);
        }
        if let (Counted::Syscalls { syscall, .. }, 1..) = (&row.counted, row.bytes)
            && let Some(direction) = io_direction(syscall)
        {
            let mut labels: LabelSet = base.iter().filter(|(name, _)| name != "syscall").cloned().collect();
            labels.push(("direction".to_owned(), direction.to_owned()));
            let labels = state.room_for_counter(IO_BYTES, labels, cap);
            let series = state.counters[IO_BYTES].entry(labels).or_default();
            series.value += row.bytes;
            series.own(owner);
        }
        if row.times.count() > 0 {
            let labels = state.room_for_histogram(family, base, self.config.max_histogram_series);
            let series = state.histograms[family].entry(labels).or_default();
            series.value.times.add(&row.times);
            series.own(owner);
        }
    }

    /// Keeps a trace's id for the buckets that its invocations and host calls are in.
    pub(super) fn exemplify(&self, trace: &Trace) {
        let mut state = self.state();
        let mut pending = vec![&trace.root];
        while let Some(span) = pending.pop() {
            pending.extend(&span.children);
            if span.start_bound == Bound::Open || span.end_bound == Bound::Open {
                continue;
            }
            let Some(counted) = counted(span) else { continue };
            let (family, labels) = self.base_of(Some(&trace.process), &counted);
            // The kernel's rows make the series; a trace only says where to look.
            if let Some(series) = state.histograms[family].get_mut(&labels) {
                let exemplar = Exemplar {
                    trace: trace.id,
                    seconds: span.duration_ns() as f64 / 1e9,
                };
                series.value.exemplars.insert(bucket_of(span.duration_ns()), exemplar);
            }
        }
    }

    /// A process has ended, and its last rows have been handed out.
    pub(super) fn process_gone(&self, process: &Process, now: Instant) {
        let owner = (process.pid, process.start_ns);
        let mut state = self.state();
        let state = &mut *state;
        for series in state.counters.iter_mut().flat_map(BTreeMap::values_mut) {
            series.disown(owner, now);
        }
        for series in state.histograms.iter_mut().flat_map(BTreeMap::values_mut) {
            series.disown(owner, now);
        }
    }

    /// Forgets the series whose processes have all been gone for long enough.
    pub(super) fn expire(&self, now: Instant) {
        let expiry = Duration::from_secs(self.config.expiry_seconds);
        let is_over =
            |since: Option<Instant>| since.is_some_and(|since| now.saturating_duration_since(since) >= expiry);
        let mut state = self.state();
        for family in &mut state.counters {
            family.retain(|_, series| !is_over(series.unowned_since));
        }
        for family in &mut state.histograms {
            family.retain(|_, series| !is_over(series.unowned_since));
        }
    }

    /// Which family, and the labels that its counter and its histogram share.
    fn base_of(&self, process: Option<&Process>, counted: &Counted) -> (usize, LabelSet) {
        let mut labels = LabelSet::new();
        let known = |name: Option<&str>| match (process, name) {
            (None, _) => "other".to_owned(),
            (Some(_), Some(name)) => bounded_value(name),
            (Some(_), None) => "unknown".to_owned(),
        };
        if self.config.process_label {
            labels.push((
                "process".to_owned(),
                known(process.map(|process| process.command.as_str())),
            ));
        }
        if let Some(place) = process.map(|process| &process.place) {
            for (name, value) in [
                ("namespace", &place.namespace),
                ("pod", &place.pod_name),
                ("container", &place.container_name),
            ] {
                if let Some(value) = value {
                    labels.push((name.to_owned(), bounded_value(value)));
                }
            }
            for name in &self.config.pod_labels {
                if let Some(value) = place.labels.get(name) {
                    labels.push((label_name(name), bounded_value(value)));
                }
            }
        }
        let (family, function) = match counted {
            Counted::Invocations { export } => (INVOCATIONS, export),
            Counted::HostCalls { caller, .. } => (HOST_CALLS, caller),
            Counted::Syscalls { export, .. } => (SYSCALLS, export),
        };
        let module = function.as_ref().map(|function| function.module.name.as_str());
        labels.push(("module".to_owned(), known(module)));
        if let Counted::HostCalls { import, .. } = counted {
            let import = import
                .as_ref()
                .map(|import| format!("{}.{}", import.module, import.name));
            labels.push(("import".to_owned(), known(import.as_deref())));
        } else {
            let export = function.as_ref().map(|function| function.name.as_str());
            labels.push(("export".to_owned(), known(export)));
        }
        if let Counted::Syscalls { syscall, .. } = counted {
            labels.push(("syscall".to_owned(), known(Some(syscall))));
        }
        (family, labels)
    }
}

impl State {
    fn room_for_counter(&mut self, family: usize, labels: LabelSet, cap: usize) -> LabelSet {
        if self.counters[family].len() < cap || self.counters[family].contains_key(&labels) {
            return labels;
        }
        self.overflow_count += 1;
        to_other(labels)
    }

    fn room_for_histogram(&mut self, family: usize, labels: LabelSet, cap: usize) -> LabelSet {
        if self.histograms[family].len() < cap || self.histograms[family].contains_key(&labels) {
            return labels;
        }
        self.overflow_count += 1;
        to_other(labels)
    }
}

impl<T> Series<T> {
    fn own(&mut self, owner: Option<ProcessKey>) {
        self.owners.extend(owner);
        self.unowned_since = None;
    }

    fn disown(&mut self, owner: ProcessKey, now: Instant) {
        if self.owners.remove(&owner) && self.owners.is_empty() {
            self.unowned_since = Some(now);
        }
    }
}

fn counted(span: &Span) -> Option<Counted> {
    match &span.kind {
        SpanKind::Invoke { function } => Some(Counted::Invocations {
            export: function.clone(),
        }),
        SpanKind::HostCall { import } => Some(Counted::HostCalls {
            caller: span.stack.first().cloned(),
            import: import.clone(),
        }),
        _ => None,
    }
}

/// Every label of an open set becomes `other`; outcomes and directions stay.
fn to_other(labels: LabelSet) -> LabelSet {
    labels
        .into_iter()
        .filter(|(name, _)| !name.starts_with("label_"))
        .map(|(name, value)| {
            let stays = name == "outcome" || name == "direction";
            (name, if stays { value } else { "other".to_owned() })
        })
        .collect()
}

/// As kube-state-metrics does it.
fn label_name(pod_label: &str) -> String {
    let clean = pod_label
        .chars()
        .map(|c| if c.is_ascii_alphanumeric() { c } else { '_' });
    "label_".chars().chain(clean).collect()
}
