//! What the agent counts and measures, as `OpenMetrics` text. The names of the families live here and nowhere else.
//!
//! Counters are exact: each span, loss and record adds one where it belongs. Durations are observed where both ends are known (or inferred); a call that was
//! still open when the window ended is counted but not timed. Each family has a cap on its series ([`MAX_COUNTER_SERIES`],
//! [`MAX_HISTOGRAM_SERIES`]); past it, new label sets count as `other`, and `wasmscope_series_overflow_total` says how often.
//!
//! The share of a module's calls that were cold is a query: `sum by (module) (rate(wasm_cold_starts_total[5m])) / sum by (module)
//! (rate(wasm_invocations_total[5m]))`.

mod aggregate;
mod bounded;
mod config;
mod exposition;
mod labels;
mod owners;
mod readings;
pub mod reference;
pub mod snapshot;

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use prometheus_client::collector::Collector;
use prometheus_client::encoding::EncodeMetric;
use prometheus_client::encoding::text::{encode_eof, encode_registry};
use prometheus_client::metrics::TypedMetric;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::{Family, MetricConstructor};
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::Registry;

use self::aggregate::AggregateFamilies;
use self::bounded::{BoundedFamily, Expiring, Labels};
pub use self::config::MetricsConfig;
pub use self::exposition::Format;
use self::labels::{
    ExportLabels, FamilyLabels, GrowLabels, HostCallLabels, ImportLabels, InterruptionLabels, InvocationLabels,
    IoLabels, KindLabels, LossLabels, ModuleLabels, PhaseLabels, ResolutionLabels, SyscallLabels, SyscallTimeLabels,
    TrapLabels, Value, Workload,
};
use self::owners::{Ended, Owner};
use crate::errno;
use crate::pipeline::{AggregateRow, Pipeline};
use crate::span::{
    Bound, Function, Growth, Import, InterruptionCause, Loss, Outcome, PhaseKind, Process, Span, SpanKind, Trace,
};

/// Series of one family of counters, those of `other` aside.
pub const MAX_COUNTER_SERIES: usize = 2_000;
/// Series of one family of histograms, those of `other` aside; each has 25 lines.
pub const MAX_HISTOGRAM_SERIES: usize = 500;
/// Content type of [`Metrics::encode`].
pub const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// Last line of [`Metrics::encode`].
const END: &str = "# EOF\n";

/// A host call that does nothing takes about a microsecond; a request that waits, seconds.
const DURATION_BUCKETS_SECONDS: [f64; 22] = [
    1e-6, 2.5e-6, 5e-6, 1e-5, 2.5e-5, 5e-5, 1e-4, 2.5e-4, 5e-4, 1e-3, 2.5e-3, 5e-3, 1e-2, 2.5e-2, 5e-2, 0.1, 0.25, 0.5,
    1.0, 2.5, 5.0, 10.0,
];

/// Seconds that add up without rounding: kept as whole nanoseconds, written as seconds.
type SecondsCounter = Counter<f64, NanosecondsAsSeconds>;

/// The parts of a cold start.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ColdStartPhase {
    /// As in the model.
    Of(PhaseKind),
    /// The first call itself.
    FirstCall,
    /// From the moment a module's code became executable to the first call into it: linking, instantiation, queueing.
    PublishToInvoke,
}

impl From<PhaseKind> for ColdStartPhase {
    fn from(kind: PhaseKind) -> Self {
        Self::Of(kind)
    }
}

impl ColdStartPhase {
    /// The word of the `phase` label.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Of(kind) => kind.as_str(),
            Self::FirstCall => "first_call",
            Self::PublishToInvoke => "publish_to_invoke",
        }
    }
}

/// All families. Every method takes `&self` and may be called from any thread.
#[derive(Debug)]
pub struct Metrics {
    registry: Registry,
    /// Of families that are collected when they are asked for.
    collectors: Mutex<Registry>,
    invocations: BoundedFamily<InvocationLabels, Counter>,
    invocation_time: BoundedFamily<ExportLabels, Histogram>,
    host_calls: BoundedFamily<HostCallLabels, Counter>,
    host_call_time: BoundedFamily<ImportLabels, Histogram>,
    syscalls: BoundedFamily<SyscallLabels, Counter>,
    syscall_time: BoundedFamily<SyscallTimeLabels, Histogram>,
    io_bytes: BoundedFamily<IoLabels, Counter>,
    cold_start_time: BoundedFamily<PhaseLabels, Histogram>,
    cold_starts: BoundedFamily<ModuleLabels, Counter>,
    instantiations: BoundedFamily<ModuleLabels, Counter>,
    traps: BoundedFamily<TrapLabels, Counter>,
    suspended_time: BoundedFamily<ExportLabels, SecondsCounter>,
    interruptions: BoundedFamily<InterruptionLabels, Counter>,
    memory_grows: BoundedFamily<GrowLabels, Counter>,
    table_grows: BoundedFamily<GrowLabels, Counter>,
    memory_bytes: BoundedFamily<ModuleLabels, Gauge<u64, AtomicU64>>,
    memory_max_bytes: BoundedFamily<ModuleLabels, Gauge<u64, AtomicU64>>,
    events: BoundedFamily<KindLabels, Counter>,
    records_emitted: Counter,
    records_delivered: Counter,
    overflow: Family<FamilyLabels, Counter>,
    losses: BoundedFamily<LossLabels, Counter>,
    pod_resolutions: BoundedFamily<ResolutionLabels, Counter>,
    symbol_coverage: Gauge<f64, AtomicU64>,
    named_count: AtomicU64,
    nameable_count: AtomicU64,
    aggregates: Option<AggregateFamilies>,
    config: MetricsConfig,
    ended: Ended,
}

impl Default for Metrics {
    fn default() -> Self {
        Self::new()
    }
}

impl Metrics {
    /// All families, without series; traces feed them.
    pub fn new() -> Self {
        Self::with_config(MetricsConfig::default())
    }

    /// The same, kept and shown as configured.
    pub fn with_config(config: MetricsConfig) -> Self {
        Self::made(config, false)
    }

    fn made(config: MetricsConfig, has_aggregates: bool) -> Self {
        let mut families = Families {
            has_aggregates,
            max_counter_series: config.max_counter_series,
            max_histogram_series: config.max_histogram_series,
            registry: Registry::default(),
            overflow: Family::default(),
        };
        families.registry.register(
            "wasmscope_series_overflow",
            "Observations counted under the value other or unknown because their family was at its cap, or the kernel's table of rows (kernel_rows) or the part of it that one process may have (process_rows) was full",
            families.overflow.clone(),
        );
        let overflow = families.overflow.clone();
        let aggregates = has_aggregates.then(|| {
            let overflow = |family| overflow.get_or_create_owned(&FamilyLabels { family });
            AggregateFamilies::new(config.clone(), overflow)
        });
        let (records_emitted, records_delivered) = (Counter::default(), Counter::default());
        families.registry.register(
            "wasmscope_records_emitted",
            "Records that the kernel programs made: those delivered, and those lost with the reason ring_full",
            records_emitted.clone(),
        );
        families.registry.register(
            "wasmscope_records_delivered",
            "Records that the agent took from the kernel",
            records_delivered.clone(),
        );
        let symbol_coverage = Gauge::default();
        symbol_coverage.set(f64::NAN);
        families.registry.register(
            "wasmscope_symbol_coverage_ratio",
            "Share of the boundary crossings seen so far whose function or import is known by name; NaN before the first",
            symbol_coverage.clone(),
        );
        Self {
            invocations: families.counters("wasm_invocations", "Calls of exported functions by the host"),
            invocation_time: families.histograms(
                "wasm_invocation_duration_seconds",
                "Time from entering a guest to leaving it",
            ),
            host_calls: families.counters("wasm_host_calls", "Calls of imported functions by guests"),
            host_call_time: families.histograms("wasm_host_call_duration_seconds", "Time in an imported function"),
            syscalls: families.counters("wasm_syscalls", "System calls made on behalf of guests"),
            syscall_time: families.histograms(
                "wasm_syscall_duration_seconds",
                "Time in a system call made on behalf of a guest",
            ),
            io_bytes: families.counters("wasm_io_bytes", "Bytes moved by system calls made on behalf of guests"),
            cold_start_time: families.histograms(
                "wasm_cold_start_duration_seconds",
                "Time to get a guest ready to run, by phase",
            ),
            cold_starts: families.counters(
                "wasm_cold_starts",
                "Invocations that were the first since their module was loaded; all others of wasm_invocations were warm",
            ),
            instantiations: families.counters("wasm_instantiations", "Instances made of modules"),
            traps: families.counters(
                "wasm_traps",
                "Traps; one that passes through nested invocations counts once",
            ),
            suspended_time: families.counters(
                "wasm_suspended_seconds",
                "Time invocations spent off every thread, waiting for the host",
            ),
            interruptions: families.counters(
                "wasm_interruptions",
                "Times that guests were stopped because their fuel or time was used up",
            ),
            memory_grows: families.counters("wasm_memory_grows", "memory.grow of guests"),
            table_grows: families.counters("wasm_table_grows", "table.grow of guests"),
            memory_bytes: families.counters(
                "wasm_memory_bytes",
                "Largest linear memory that an instance was seen to have after a memory.grow of the module's code; memories never shrink, and those that never grow are not seen",
            ),
            memory_max_bytes: families.counters(
                "wasm_memory_max_bytes",
                "Largest size that the module itself declares for those linear memories, where it declares any",
            ),
            events: families.counters("wasmscope_events", "Events that the agent made of kernel records and of what it saw itself"),
            losses: families.counters("wasmscope_events_lost", "What the agent knows it missed or dropped"),
            pod_resolutions: families.counters(
                "wasmscope_pod_resolutions",
                "Times that a source was asked which pod a process is in, and traces that did not wait for the answer",
            ),
            records_emitted,
            records_delivered,
            overflow: families.overflow,
            symbol_coverage,
            named_count: AtomicU64::new(0),
            nameable_count: AtomicU64::new(0),
            aggregates,
            config,
            ended: Ended::default(),
            registry: families.registry,
            collectors: Mutex::default(),
        }
    }

    /// Also tells what this has to tell.
    pub fn add_collector(&self, collector: Box<dyn Collector>) {
        let mut collectors = self.collectors.lock().unwrap_or_else(PoisonError::into_inner);
        collectors.register_collector(collector);
    }

    /// Counts the calls, bytes and traps of a trace. Not its losses: those of a window are told by every trace that overlaps it; see
    /// [`Metrics::set_loss_total`].
    pub fn observe_trace(&self, trace: &Trace) {
        let workload = Workload::new(&trace.process, &self.config);
        let owner = self.ended.owner(&trace.process);
        let mut pending = vec![(&trace.root, None)];
        while let Some((span, enclosing)) = pending.pop() {
            let export = match (&span.kind, enclosing) {
                (SpanKind::Invoke { function }, _) => export_labels(&workload, function.as_deref()),
                (_, Some(enclosing)) => enclosing,
                (_, None) => export_labels(&workload, None),
            };
            self.observe_span(span, &export, &owner);
            pending.extend(span.children.iter().map(|child| (child, Some(export.clone()))));
        }
        self.observe_traps(trace, &workload, &owner);
        let suspended_ns = trace.root.suspended_ns();
        if let (SpanKind::Invoke { function }, 1..) = (&trace.root.kind, suspended_ns) {
            let export = export_labels(&workload, function.as_deref());
            self.suspended_time.with(&export, &owner, |seconds| {
                seconds.inner().nanoseconds.fetch_add(suspended_ns, Ordering::Relaxed);
            });
        }
    }

    /// Makes a trace that can be found where traces go the example of the buckets that its invocations and host calls are in.
    pub fn exemplify(&self, trace: &Trace) {
        if let Some(aggregates) = &self.aggregates {
            aggregates.exemplify(trace);
        }
    }

    /// To add families of others.
    pub fn registry_mut(&mut self) -> &mut Registry {
        &mut self.registry
    }

    /// All families, of which those that the kernel counts are fed by [`Self::observe_aggregate`] and not by traces; a trace
    /// only gives them exemplars.
    pub fn with_aggregates(config: MetricsConfig) -> Self {
        Self::made(config, true)
    }

    /// Adds what the kernel has counted.
    pub fn observe_aggregate(&self, row: &AggregateRow) {
        if let Some(aggregates) = &self.aggregates {
            let owner = row
                .process
                .as_deref()
                .map_or(Owner::Agent, |process| self.ended.owner(process));
            aggregates.observe(row, &owner);
        }
    }

    /// A process has ended and its last rows have been observed: its series expire in time.
    pub fn process_gone(&self, process: &Process) {
        self.ended.add(process, Instant::now());
    }

    /// A process runs; to be told of those that [`Self::process_gone`] may have been told of, for an image that has been replaced.
    pub fn process_runs(&self, process: &Process) {
        self.ended.remove(process);
    }

    /// Forgets series that have expired; every few seconds.
    pub fn expire(&self) {
        self.expire_at(Instant::now());
    }

    fn expire_at(&self, now: Instant) {
        let ended = self.ended.recent(now);
        let expiry = Duration::from_secs(self.config.expiry_seconds);
        for families in self.expiring() {
            families.expire(&ended, expiry, now);
        }
        if let Some(aggregates) = &self.aggregates {
            aggregates.expire(&ended, expiry, now);
        }
    }

    /// The families whose series are of processes.
    fn expiring(&self) -> [&dyn Expiring; 17] {
        [
            &self.invocations,
            &self.invocation_time,
            &self.host_calls,
            &self.host_call_time,
            &self.syscalls,
            &self.syscall_time,
            &self.io_bytes,
            &self.cold_start_time,
            &self.cold_starts,
            &self.instantiations,
            &self.traps,
            &self.suspended_time,
            &self.interruptions,
            &self.memory_grows,
            &self.table_grows,
            &self.memory_bytes,
            &self.memory_max_bytes,
        ]
    }

    /// Counts something known to be missing.
    pub fn observe_loss(&self, loss: &Loss) {
        self.losses.with(&loss_labels(loss), &Owner::Agent, |counter| {
            counter.inc_by(loss.count);
        });
    }

    /// Sets a loss that is counted elsewhere (in the kernel, in a sink) to its running total. A total that went back is ignored.
    pub fn set_loss_total(&self, loss: &Loss) {
        self.losses.with(&loss_labels(loss), &Owner::Agent, |counter| {
            counter.inner().fetch_max(loss.count, Ordering::Relaxed);
        });
    }

    /// Sets how often each source was asked for pods to its running total, `Places::counts`.
    pub fn set_pod_resolutions(&self, counts: &[(&'static str, &'static str, u64)]) {
        for (source, result, count) in counts {
            self.pod_resolutions
                .with(&ResolutionLabels { source, result }, &Owner::Agent, |counter| {
                    counter.inner().fetch_max(*count, Ordering::Relaxed);
                });
        }
    }

    /// Counts kernel records of a kind (`syscall`, `push`, …).
    pub fn observe_events(&self, kind: &str, count: u64) {
        self.events
            .with(&KindLabels { kind: Value::new(kind) }, &Owner::Agent, |counter| {
                counter.inc_by(count);
            });
    }

    /// Sets what the kernel programs and the way from them have counted to its running totals.
    pub fn observe_kernel(&self, pipeline: &Pipeline) {
        let (emitted, delivered) = pipeline.record_counts();
        self.records_emitted.inner().fetch_max(emitted, Ordering::Relaxed);
        self.records_delivered.inner().fetch_max(delivered, Ordering::Relaxed);
        for (family, count) in pipeline.overflows() {
            let overflow = self.overflow.get_or_create_owned(&FamilyLabels { family });
            overflow.inner().fetch_max(count, Ordering::Relaxed);
        }
    }

    /// Records one phase of a cold start.
    ///
    /// Modules that are loaded and never called have phases as well; `publish` lies within `compile` or `deserialize`.
    pub fn observe_cold_start(
        &self,
        process: &Process,
        module: Option<&str>,
        phase: ColdStartPhase,
        duration: Duration,
    ) {
        let labels = PhaseLabels {
            module: self.module_labels(process, module),
            phase: phase.as_str(),
        };
        self.cold_start_time
            .with(&labels, &self.ended.owner(process), |histogram| {
                histogram.observe(duration.as_secs_f64());
            });
    }

    /// Counts an invocation that was the first since its module was loaded.
    pub fn count_cold_start(&self, process: &Process, module: Option<&str>) {
        let labels = self.module_labels(process, module);
        self.cold_starts.with(&labels, &self.ended.owner(process), increment);
    }

    /// Counts an instance of a module.
    pub fn observe_instantiation(&self, process: &Process, module: Option<&str>) {
        let labels = self.module_labels(process, module);
        self.instantiations.with(&labels, &self.ended.owner(process), increment);
    }

    /// All series as `OpenMetrics` text; see [`CONTENT_TYPE`].
    pub fn encode(&self) -> String {
        let mut text = self.encode_registry();
        if let Some(aggregates) = &self.aggregates {
            text.truncate(text.len() - END.len());
            exposition::write_aggregates(&mut text, aggregates);
            text.push_str(END);
        }
        text
    }

    fn encode_registry(&self) -> String {
        let mut text = String::new();
        let collectors = self.collectors.lock().unwrap_or_else(PoisonError::into_inner);
        encode_registry(&mut text, &self.registry)
            .and_then(|()| encode_registry(&mut text, &collectors))
            .and_then(|()| encode_eof(&mut text))
            .expect("writing to a string cannot fail");
        text
    }

    fn module_labels(&self, process: &Process, module: Option<&str>) -> ModuleLabels {
        ModuleLabels {
            workload: Workload::new(process, &self.config),
            module: module.map_or_else(Value::unknown, Value::new),
        }
    }

    fn observe_span(&self, span: &Span, export: &ExportLabels, owner: &Owner) {
        match &span.kind {
            SpanKind::Invoke { function } => {
                self.observe_name(function.is_some());
                if self.aggregates.is_none() {
                    let labels = InvocationLabels {
                        export: export.clone(),
                        outcome: span.outcome.as_str(),
                    };
                    self.invocations.with(&labels, owner, increment);
                    self.invocation_time.with_duration(export, owner, span);
                }
            }
            SpanKind::HostCall { import } => {
                self.observe_name(import.is_some());
                if self.aggregates.is_none() {
                    self.observe_host_call(span, import.as_deref(), export, owner);
                }
            }
            SpanKind::Syscall { name, result, .. } if self.aggregates.is_none() => {
                self.observe_syscall(span, name, *result, export, owner);
            }
            SpanKind::Syscall { .. } => {}
            SpanKind::MemoryGrow(growth) => {
                let labels = grow_labels(growth, span, export);
                self.memory_grows.with(&labels, owner, increment);
                if let Some(bytes) = growth.new_bytes() {
                    self.memory_bytes.with(&labels.module, owner, |gauge| {
                        gauge.inner().fetch_max(bytes, Ordering::Relaxed);
                    });
                }
                if let Some(bytes) = growth.maximum_bytes() {
                    self.memory_max_bytes.with(&labels.module, owner, |gauge| {
                        gauge.inner().fetch_max(bytes, Ordering::Relaxed);
                    });
                }
            }
            SpanKind::TableGrow(growth) => {
                self.table_grows
                    .with(&grow_labels(growth, span, export), owner, increment);
            }
            SpanKind::Interruption(interruption) => {
                self.observe_interruption(interruption.cause, span.outcome.as_str(), export, owner);
            }
            SpanKind::Trap { code, .. } => {
                let causes = [InterruptionCause::Fuel, InterruptionCause::Epoch];
                if let Some(cause) = causes.into_iter().find(|cause| cause.trap_code() == code) {
                    self.observe_interruption(cause, "trap", export, owner);
                }
            }
        }
    }

    fn observe_host_call(&self, span: &Span, import: Option<&Import>, export: &ExportLabels, owner: &Owner) {
        let import = ImportLabels {
            workload: export.workload.clone(),
            module: span
                .stack
                .first()
                .map_or_else(|| export.module.clone(), |function| Value::new(&function.module.name)),
            import: import.map_or_else(Value::unknown, |import| {
                Value::new(&format!("{}.{}", import.module, import.name))
            }),
        };
        self.host_call_time.with_duration(&import, owner, span);
        let outcome = span.outcome.as_str();
        self.host_calls
            .with(&HostCallLabels { import, outcome }, owner, increment);
    }

    fn observe_syscall(&self, span: &Span, name: &str, result: i64, export: &ExportLabels, owner: &Owner) {
        let call = SyscallTimeLabels {
            export: export.clone(),
            syscall: Value::new(name),
        };
        self.syscall_time.with_duration(&call, owner, span);
        let outcome = syscall_outcome(&span.outcome);
        self.syscalls.with(&SyscallLabels { call, outcome }, owner, increment);
        if let (Some(direction), Ok(byte_count @ 1..)) = (io_direction(name), u64::try_from(result)) {
            let labels = IoLabels {
                export: export.clone(),
                direction,
            };
            self.io_bytes.with(&labels, owner, |counter| {
                counter.inc_by(byte_count);
            });
        }
    }

    fn observe_interruption(
        &self,
        cause: InterruptionCause,
        outcome: &'static str,
        export: &ExportLabels,
        owner: &Owner,
    ) {
        let labels = InterruptionLabels {
            export: export.clone(),
            kind: cause.as_str(),
            outcome,
        };
        self.interruptions.with(&labels, owner, increment);
    }

    /// A trap is counted where it was seen as such; an invocation that ended in one counts only when no call below it saw one.
    fn observe_traps(&self, trace: &Trace, workload: &Workload, owner: &Owner) {
        // Children first, so that an invocation knows what happened below it.
        let spans = spans_with_parents(&trace.root);
        let mut has_trap = vec![false; spans.len()];
        for (index, (span, parent)) in spans.iter().enumerate().rev() {
            let code = match (&span.kind, &span.outcome) {
                (SpanKind::Trap { code, .. }, _) => Some(code),
                (SpanKind::Invoke { .. }, Outcome::Trap { code }) if !has_trap[index] => Some(code),
                _ => None,
            };
            if let Some(code) = code {
                let invoke =
                    std::iter::successors(Some(index), |&at| spans[at].1).find_map(|at| match &spans[at].0.kind {
                        SpanKind::Invoke { function } => Some(function.as_deref()),
                        _ => None,
                    });
                let export = export_labels(workload, invoke.flatten());
                self.traps.with(
                    &TrapLabels {
                        export,
                        code: Value::new(code),
                    },
                    owner,
                    increment,
                );
                has_trap[index] = true;
            }
            if let Some(parent) = parent {
                has_trap[*parent] |= has_trap[index];
            }
        }
    }

    fn observe_name(&self, is_named: bool) {
        let nameable = self.nameable_count.fetch_add(1, Ordering::Relaxed) + 1;
        let named = self.named_count.fetch_add(u64::from(is_named), Ordering::Relaxed) + u64::from(is_named);
        self.symbol_coverage.set((named as f64 / nameable as f64).min(1.0));
    }
}

fn increment(counter: &Counter) {
    counter.inc();
}

/// Parents first, each with the index of its parent.
fn spans_with_parents(root: &Span) -> Vec<(&Span, Option<usize>)> {
    let mut spans = vec![(root, None)];
    let mut next = 0;
    while next < spans.len() {
        let span: &Span = spans[next].0;
        spans.extend(span.children.iter().map(|child| (child, Some(next))));
        next += 1;
    }
    spans
}

fn export_labels(workload: &Workload, function: Option<&Function>) -> ExportLabels {
    ExportLabels {
        workload: workload.clone(),
        module: function.map_or_else(Value::unknown, |function| Value::new(&function.module.name)),
        export: function.map_or_else(Value::unknown, |function| Value::new(&function.name)),
    }
}

/// The module whose code asked, which is the memory's own unless that is imported.
fn grow_labels(growth: &Growth, span: &Span, export: &ExportLabels) -> GrowLabels {
    GrowLabels {
        module: ModuleLabels {
            workload: export.workload.clone(),
            module: growth
                .function
                .as_ref()
                .map_or_else(|| export.module.clone(), |function| Value::new(&function.module.name)),
        },
        outcome: span.outcome.as_str(),
    }
}

fn loss_labels(loss: &Loss) -> LossLabels {
    LossLabels {
        layer: Value::new(&loss.layer),
        reason: Value::new(&loss.reason),
    }
}

fn syscall_outcome(outcome: &Outcome) -> Value {
    match outcome {
        Outcome::Errno { errno } => Value::new(&errno::name(*errno)),
        other => Value::new(other.as_str()),
    }
}

/// Which way the bytes went that a successful call returns the number of. Calls that count anything else (`recvmmsg`: messages) are not among them.
fn io_direction(syscall: &str) -> Option<&'static str> {
    match syscall {
        "read" | "pread64" | "readv" | "preadv" | "preadv2" | "recvfrom" | "recvmsg" => Some("read"),
        "write" | "pwrite64" | "writev" | "pwritev" | "pwritev2" | "sendto" | "sendmsg" | "sendfile"
        | "copy_file_range" | "splice" => Some("write"),
        _ => None,
    }
}

impl<S: Labels> BoundedFamily<S, Histogram> {
    fn with_duration(&self, labels: &S, owner: &Owner, span: &Span) {
        if span.start_bound != Bound::Open && span.end_bound != Bound::Open {
            self.with(labels, owner, |histogram| {
                histogram.observe(span.duration_ns() as f64 / 1e9);
            });
        }
    }
}

/// What families are made with.
struct Families {
    /// The families that the kernel counts are not in the registry.
    has_aggregates: bool,
    max_counter_series: usize,
    max_histogram_series: usize,
    registry: Registry,
    overflow: Family<FamilyLabels, Counter>,
}

impl Families {
    fn counters<S: Labels, M>(&mut self, name: &'static str, help: &'static str) -> BoundedFamily<S, M>
    where
        M: EncodeMetric + TypedMetric + Default + std::fmt::Debug + Send + Sync + 'static,
    {
        self.register(name, help, M::default, self.max_counter_series)
    }

    fn histograms<S: Labels>(&mut self, name: &'static str, help: &'static str) -> BoundedFamily<S, Histogram> {
        self.register(
            name,
            help,
            || Histogram::new(DURATION_BUCKETS_SECONDS),
            self.max_histogram_series,
        )
    }

    fn register<S: Labels, M>(
        &mut self,
        name: &'static str,
        help: &'static str,
        constructor: fn() -> M,
        max_series: usize,
    ) -> BoundedFamily<S, M>
    where
        M: EncodeMetric + TypedMetric + std::fmt::Debug + Send + Sync + 'static,
        fn() -> M: MetricConstructor<M>,
    {
        let overflow = self.overflow.get_or_create_owned(&FamilyLabels { family: name });
        let is_aggregate = |known: &(&str, &str)| known.0 == name;
        let mut unused = Registry::default();
        let registry = if self.has_aggregates
            && (aggregate::COUNTERS.iter().any(is_aggregate) || aggregate::HISTOGRAMS.iter().any(is_aggregate))
        {
            &mut unused
        } else {
            &mut self.registry
        };
        BoundedFamily::register(registry, name, help, constructor, max_series, overflow)
    }
}

/// Storage of [`SecondsCounter`].
#[derive(Debug, Default)]
struct NanosecondsAsSeconds {
    nanoseconds: AtomicU64,
}

impl prometheus_client::metrics::counter::Atomic<f64> for NanosecondsAsSeconds {
    fn inc(&self) -> f64 {
        self.inc_by(1.0)
    }

    fn inc_by(&self, seconds: f64) -> f64 {
        let before = self.nanoseconds.fetch_add((seconds * 1e9) as u64, Ordering::Relaxed);
        before as f64 / 1e9
    }

    fn get(&self) -> f64 {
        self.nanoseconds.load(Ordering::Relaxed) as f64 / 1e9
    }
}

#[cfg(test)]
mod tests;
