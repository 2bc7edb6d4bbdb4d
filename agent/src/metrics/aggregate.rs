//! The families that the kernel counts: their series, and how long those live.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use prometheus_client::metrics::counter::Counter;

pub(super) use super::snapshot::Exemplar;
use super::{
    bounded::Expiring,
    config::{MetricsConfig, label_name},
    io_direction,
    labels::bounded_value,
    owners::{EndedProcesses, Owner, Owners},
};
use crate::{
    clock::ClockAnchor,
    pipeline::{AggregateRow, Counted, Times},
    sink::spans::sent_spans,
    span::{Bound, Process, Span, SpanKind, Trace},
};
use wasmscope_common::bucket_of;

/// A label set, in the order in which it is written.
pub(super) type LabelSet = Vec<(String, String)>;

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

/// A series with its owners.
#[derive(Debug, Default)]
struct Series<T> {
    value: T,
    owners: Owners,
}

/// What a histogram's series holds.
#[derive(Clone, Debug, Default)]
pub(super) struct Histogram {
    pub(super) times: Times,
    /// The last complete trace of a bucket.
    pub(super) exemplars: BTreeMap<usize, Exemplar>,
}

/// The series of a family.
type SeriesOf<T> = BTreeMap<Arc<LabelSet>, Series<T>>;

/// All series.
#[derive(Debug, Default)]
struct State {
    counters: [SeriesOf<u64>; COUNTERS.len()],
    histograms: [SeriesOf<Histogram>; HISTOGRAMS.len()],
}

/// The families that the kernel counts.
#[derive(Debug)]
pub(super) struct AggregateFamilies {
    pub(super) config: MetricsConfig,
    state: Mutex<State>,
    /// What is counted under `other`, by family.
    counter_overflows: [Counter; COUNTERS.len()],
    histogram_overflows: [Counter; HISTOGRAMS.len()],
}

impl AggregateFamilies {
    /// Without series. `overflow` makes the counter of what a family counts under `other`.
    pub(super) fn new(config: MetricsConfig, overflow: impl Fn(&'static str) -> Counter) -> Self {
        Self {
            config,
            state: Mutex::default(),
            counter_overflows: COUNTERS.map(|(name, _)| overflow(name)),
            histogram_overflows: HISTOGRAMS.map(|(name, _)| overflow(name)),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The series of a family of [`COUNTERS`]: a copy, so that nobody who counts has to wait until they are written.
    pub(super) fn counters(&self, family: usize) -> Vec<(Arc<LabelSet>, u64)> {
        let state = self.state();
        let series = state.counters[family].iter();
        series
            .map(|(labels, series)| (Arc::clone(labels), series.value))
            .collect()
    }

    /// The series of a family of [`HISTOGRAMS`], also a copy.
    pub(super) fn histograms(&self, family: usize) -> Vec<(Arc<LabelSet>, Histogram)> {
        let state = self.state();
        let series = state.histograms[family].iter();
        series
            .map(|(labels, series)| (Arc::clone(labels), series.value.clone()))
            .collect()
    }

    /// Adds what is new in a row.
    pub(super) fn observe(&self, row: &AggregateRow, owner: &Owner) {
        let (family, base) = self.base_of(row.process.as_deref(), &row.counted);
        let mut state = self.state();
        let cap = self.config.max_counter_series;
        for (outcome, count) in &row.outcomes {
            let mut labels = base.clone();
            labels.push(("outcome".to_owned(), bounded_value(outcome)));
            let counter = series(
                &mut state.counters[family],
                labels,
                cap,
                owner,
                &self.counter_overflows[family],
            );
            *counter += count;
        }
        if let (Counted::Syscalls { syscall, .. }, 1..) = (&row.counted, row.bytes)
            && let Some(direction) = io_direction(syscall)
        {
            let mut labels: LabelSet = base.iter().filter(|(name, _)| name != "syscall").cloned().collect();
            labels.push(("direction".to_owned(), direction.to_owned()));
            let overflow = &self.counter_overflows[IO_BYTES];
            *series(&mut state.counters[IO_BYTES], labels, cap, owner, overflow) += row.bytes;
        }
        if row.times.count() > 0 {
            let cap = self.config.max_histogram_series;
            let overflow = &self.histogram_overflows[family];
            let histogram = series(&mut state.histograms[family], base, cap, owner, overflow);
            histogram.times.add(&row.times);
        }
    }

    /// Keeps a trace's id for the buckets that its invocations and host calls are in, with those of its spans that leave one by one.
    pub(super) fn exemplify(&self, trace: &Trace) {
        let observed = Duration::from_nanos(ClockAnchor::now().unix_ns);
        let sent = sent_spans(trace);
        let mut state = self.state();
        for (span, span_id) in sent {
            if span.start_bound == Bound::Open || span.end_bound == Bound::Open {
                continue;
            }
            let Some(counted) = counted(span) else { continue };
            let (family, labels) = self.base_of(Some(&trace.process), &counted);
            // The kernel's rows make the series; a trace only says where to look.
            if let Some(series) = state.histograms[family].get_mut(&labels) {
                let exemplar = Exemplar {
                    trace: trace.exported_id(),
                    span_id,
                    seconds: span.duration_ns() as f64 / 1e9,
                    observed,
                };
                series.value.exemplars.insert(bucket_of(span.duration_ns()), exemplar);
            }
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

impl Expiring for AggregateFamilies {
    fn expire(&self, ended: &EndedProcesses, expiry: Duration, now: Instant) {
        let mut state = self.state();
        for family in &mut state.counters {
            retain_owned(family, ended, expiry, now);
        }
        for family in &mut state.histograms {
            retain_owned(family, ended, expiry, now);
        }
    }
}

fn retain_owned<T>(family: &mut SeriesOf<T>, ended: &EndedProcesses, expiry: Duration, now: Instant) {
    family.retain(|_, series| {
        series.owners.retain_running(ended, now);
        !series.owners.are_gone_for(expiry, now)
    });
}

/// The series of these labels, or of `other` if there is no room for it.
fn series<'a, T: Default>(
    family: &'a mut SeriesOf<T>,
    labels: LabelSet,
    cap: usize,
    owner: &Owner,
    overflow: &Counter,
) -> &'a mut T {
    let labels = if family.len() < cap || family.contains_key(&labels) {
        labels
    } else {
        overflow.inc();
        to_other(labels)
    };
    let series = family.entry(Arc::new(labels)).or_default();
    series.owners.add(owner);
    &mut series.value
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
