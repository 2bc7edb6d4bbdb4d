//! What the agent costs and how it fares, collected when the metrics are asked for.

use std::{
    collections::BTreeMap,
    fmt, fs,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeMetric as _, MetricEncoder, NoLabelSet},
    metrics::{MetricType, counter::ConstCounter, gauge::ConstGauge},
};

use crate::{
    bpf::{self, KernelObject, ObjectInfo},
    pipeline::{GovernorReport, Pipeline, WorkloadKey},
    span::ProbeKind,
};

/// Bytes of a page, in which `/proc/self/statm` counts.
const PAGE_BYTES: u64 = 4096;
/// Longest label value, characters.
const MAX_LABEL_CHARS: usize = 128;

/// Name of a program or map, whether it is a program, and what is said of it.
type Described = (String, bool, ObjectInfo);

/// Tells how much waits in a queue.
type Depth = Box<dyn Fn() -> u64 + Send + Sync>;

/// Made once for a pipeline; share it, register a clone with the metrics.
#[derive(Clone, Debug)]
pub struct SelfObservation(Arc<Inner>);

struct Inner {
    objects: Vec<KernelObject>,
    /// Told instead of what the kernel says, for the reference of metrics.
    examples: Vec<Described>,
    governor: Option<Arc<Mutex<GovernorReport>>>,
    queues: Mutex<BTreeMap<&'static str, Depth>>,
    queue_bytes: Mutex<BTreeMap<&'static str, Depth>>,
    lag_ns: AtomicU64,
    tables: Mutex<Vec<(&'static str, usize)>>,
}

impl fmt::Debug for Inner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SelfObservation").finish_non_exhaustive()
    }
}

impl SelfObservation {
    /// Of this pipeline, after its governor has been started.
    pub fn new(pipeline: &mut Pipeline) -> Self {
        Self(Arc::new(Inner {
            objects: pipeline.take_kernel_objects(),
            examples: Vec::new(),
            governor: pipeline.governor_report(),
            queues: Mutex::default(),
            queue_bytes: Mutex::default(),
            lag_ns: AtomicU64::new(0),
            tables: Mutex::default(),
        }))
    }

    /// With one series in each family, for the reference.
    pub(crate) fn example() -> Self {
        let workload = WorkloadKey {
            namespace: "unknown".to_owned(),
            pod: "unknown".to_owned(),
            container: "unknown".to_owned(),
            process: "unknown".to_owned(),
        };
        let info = ObjectInfo {
            run_count: 1,
            ..ObjectInfo::default()
        };
        let report = GovernorReport {
            ratios: BTreeMap::from([(workload.clone(), 0.0)]),
            paused_ns: BTreeMap::from([((workload, ProbeKind::HostCall), 0)]),
            coverage_counts: BTreeMap::from([("all", 0)]),
            ..GovernorReport::default()
        };
        let example = Self(Arc::new(Inner {
            objects: Vec::new(),
            examples: vec![("unknown".to_owned(), true, info), ("unknown".to_owned(), false, info)],
            governor: Some(Arc::new(Mutex::new(report))),
            queues: Mutex::default(),
            queue_bytes: Mutex::default(),
            lag_ns: AtomicU64::new(0),
            tables: Mutex::new(vec![("unknown", 0)]),
        }));
        example.add_queue("unknown", || 0);
        example.add_queue_bytes("unknown", || 0);
        example
    }

    /// Also tells how much waits in a queue, under this name.
    pub fn add_queue(&self, name: &'static str, depth: impl Fn() -> u64 + Send + Sync + 'static) {
        let mut queues = self.0.queues.lock().unwrap_or_else(PoisonError::into_inner);
        queues.insert(name, Box::new(depth));
    }

    /// Also tells how much memory what waits in a queue takes, bytes.
    pub fn add_queue_bytes(&self, name: &'static str, bytes: impl Fn() -> u64 + Send + Sync + 'static) {
        let mut queues = self.0.queue_bytes.lock().unwrap_or_else(PoisonError::into_inner);
        queues.insert(name, Box::new(bytes));
    }

    /// How many entries each table has that follows what runs.
    pub fn set_tables(&self, tables: Vec<(&'static str, usize)>) {
        *self.0.tables.lock().unwrap_or_else(PoisonError::into_inner) = tables;
    }

    /// How much later than it should the event loop came round, at most, since this was said last.
    pub fn set_lag(&self, lag: Duration) {
        let lag_ns = u64::try_from(lag.as_nanos()).unwrap_or(u64::MAX);
        self.0.lag_ns.store(lag_ns, Ordering::Relaxed);
    }

    fn encode_objects(&self, encoder: &mut DescriptorEncoder<'_>) -> fmt::Result {
        let known = self.0.objects.iter().filter_map(|object| {
            let info = object.info().ok()?;
            Some((object.name.clone(), object.is_program, info))
        });
        let infos: Vec<Described> = known.chain(self.0.examples.iter().cloned()).collect();
        let programs = || infos.iter().filter(|(_, is_program, _)| *is_program);
        let maps = || infos.iter().filter(|(_, is_program, _)| !is_program);
        // Where it is measured: `capture.program_run_time`, or `sysctl kernel.bpf_stats_enabled=1`.
        if programs().any(|(_, _, info)| info.run_count > 0) {
            let mut family = family(
                encoder,
                "wasmscope_bpf_program_seconds",
                "Time that each program ran while that was measured",
                MetricType::Counter,
            )?;
            for (name, _, info) in programs() {
                count(&mut family, &[("program", name)], info.run_time_ns as f64 / 1e9)?;
            }
            let mut family = self::family(
                encoder,
                "wasmscope_bpf_program_runs",
                "Runs of each program while its time was measured",
                MetricType::Counter,
            )?;
            for (name, _, info) in programs() {
                count(&mut family, &[("program", name)], info.run_count as f64)?;
            }
        }
        let mut family = self::family(
            encoder,
            "wasmscope_bpf_map_bytes",
            "Memory that each map takes",
            MetricType::Gauge,
        )?;
        for (name, _, info) in maps() {
            gauge(&mut family, &[("map", name)], info.bytes as f64)?;
        }
        let mut family = self::family(
            encoder,
            "wasmscope_bpf_map_max_entries",
            "Entries that each map has room for; of the ring, bytes",
            MetricType::Gauge,
        )?;
        for (name, _, info) in maps() {
            gauge(&mut family, &[("map", name)], info.max_entries as f64)?;
        }
        Ok(())
    }

    fn encode_governor(&self, encoder: &mut DescriptorEncoder<'_>) -> fmt::Result {
        let Some(report) = &self.0.governor else { return Ok(()) };
        let report = report.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let mut family = self::family(
            encoder,
            "wasmscope_probe_cost_seconds",
            "What one hit of a probe is taken to cost",
            MetricType::Gauge,
        )?;
        let source = if report.costs.is_measured {
            "measured"
        } else {
            "assumed"
        };
        for (probe, cost_ns) in report.costs.named() {
            gauge(
                &mut family,
                &[("probe", probe), ("source", source)],
                cost_ns as f64 / 1e9,
            )?;
        }
        let mut family = self::family(
            encoder,
            "wasmscope_overhead_node_ratio",
            "Share of all CPUs that probes are estimated to take",
            MetricType::Gauge,
        )?;
        gauge(&mut family, &[], report.node_ratio)?;
        let mut family = self::family(
            encoder,
            "wasmscope_overhead_ratio",
            "Share of its CPU time that probes are estimated to take, of each workload",
            MetricType::Gauge,
        )?;
        // Names that differ may look the same once they are made fit to be labels.
        let mut ratios: BTreeMap<WorkloadLabels, f64> = BTreeMap::new();
        for (workload, ratio) in &report.ratios {
            let known = ratios.entry(WorkloadLabels::new(workload)).or_default();
            *known = known.max(*ratio);
        }
        for (workload, ratio) in &ratios {
            gauge(&mut family, &workload.with(&[]), *ratio)?;
        }
        let mut family = self::family(
            encoder,
            "wasmscope_site_paused_seconds",
            "Time in which probes were paused for what they cost",
            MetricType::Counter,
        )?;
        let mut paused: BTreeMap<_, u64> = BTreeMap::new();
        for ((workload, probe), paused_ns) in &report.paused_ns {
            *paused.entry((WorkloadLabels::new(workload), *probe)).or_default() += paused_ns;
        }
        for ((workload, probe), paused_ns) in &paused {
            let labels = workload.with(&[("probe", probe.as_str())]);
            count(&mut family, &labels, *paused_ns as f64 / 1e9)?;
        }
        let mut family = self::family(
            encoder,
            "wasmscope_paused_processes",
            "Processes in which probes are paused now",
            MetricType::Gauge,
        )?;
        for probe in ProbeKind::ALL {
            let count = report.paused_counts.get(&probe).copied().unwrap_or(0);
            gauge(&mut family, &[("probe", probe.as_str())], count as f64)?;
        }
        let mut family = self::family(
            encoder,
            "wasmscope_watched_processes",
            "Processes that are watched, by what is observed of them",
            MetricType::Gauge,
        )?;
        for (coverage, processes) in &report.coverage_counts {
            gauge(&mut family, &[("coverage", coverage)], *processes as f64)?;
        }
        Ok(())
    }

    fn encode_process(&self, encoder: &mut DescriptorEncoder<'_>) -> fmt::Result {
        if let Ok(cpu_ns) = bpf::process_cpu_ns(std::process::id()) {
            let mut family = self::family(
                encoder,
                "process_cpu_seconds",
                "CPU time that the agent has used",
                MetricType::Counter,
            )?;
            count(&mut family, &[], cpu_ns as f64 / 1e9)?;
        }
        let resident = fs::read_to_string("/proc/self/statm").ok().and_then(|text| {
            let pages: u64 = text.split(' ').nth(1)?.parse().ok()?;
            Some(pages * PAGE_BYTES)
        });
        let entries = |path: &str| fs::read_dir(path).ok().map(|entries| entries.count() as u64);
        let lag_seconds = self.0.lag_ns.load(Ordering::Relaxed) as f64 / 1e9;
        let gauges = [
            (
                "process_resident_memory_bytes",
                "Memory that the agent has resident",
                resident.map(|bytes| bytes as f64),
            ),
            (
                "process_open_fds",
                "File descriptors that the agent has open",
                entries("/proc/self/fd").map(|count| count as f64),
            ),
            (
                "process_threads",
                "Threads of the agent",
                entries("/proc/self/task").map(|count| count as f64),
            ),
            (
                "wasmscope_event_loop_lag_seconds",
                "How much later than it should the event loop came round, at most, in the last second",
                Some(lag_seconds),
            ),
        ];
        for (name, help, value) in gauges {
            if let Some(value) = value {
                let mut family = self::family(encoder, name, help, MetricType::Gauge)?;
                gauge(&mut family, &[], value)?;
            }
        }
        let queues = self.0.queues.lock().unwrap_or_else(PoisonError::into_inner);
        let mut family = self::family(
            encoder,
            "wasmscope_queue_depth",
            "What waits in each queue; in export until a collector has answered",
            MetricType::Gauge,
        )?;
        for (name, depth) in queues.iter() {
            gauge(&mut family, &[("queue", name)], depth() as f64)?;
        }
        drop(queues);
        let queues = self.0.queue_bytes.lock().unwrap_or_else(PoisonError::into_inner);
        let mut family = self::family(
            encoder,
            "wasmscope_queue_bytes",
            "Memory that what waits in each queue takes, estimated; of traces until they are through all stages",
            MetricType::Gauge,
        )?;
        for (name, bytes) in queues.iter() {
            gauge(&mut family, &[("queue", name)], bytes() as f64)?;
        }
        drop(queues);
        let tables = self.0.tables.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let mut family = self::family(
            encoder,
            "wasmscope_table_entries",
            "Entries of each table that follows what runs; those of the kernel's side begin with bpf_",
            MetricType::Gauge,
        )?;
        for (name, count) in tables {
            gauge(&mut family, &[("table", name)], count as f64)?;
        }
        Ok(())
    }
}

impl Collector for SelfObservation {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        self.encode_objects(&mut encoder)?;
        self.encode_governor(&mut encoder)?;
        self.encode_process(&mut encoder)
    }
}

/// Labels of a workload, escaped and bounded as those of the other families.
#[derive(PartialEq, Eq, PartialOrd, Ord)]
struct WorkloadLabels([(&'static str, String); 4]);

impl WorkloadLabels {
    fn new(key: &WorkloadKey) -> Self {
        let text = |text: &str| -> String {
            let characters = text.chars().take(MAX_LABEL_CHARS);
            characters
                .map(|character| if character.is_control() { '\u{fffd}' } else { character })
                .collect()
        };
        Self([
            ("namespace", text(&key.namespace)),
            ("pod", text(&key.pod)),
            ("container", text(&key.container)),
            ("process", text(&key.process)),
        ])
    }

    fn with<'a>(&'a self, more: &[(&'a str, &'a str)]) -> Vec<(&'a str, &'a str)> {
        let own = self.0.iter().map(|(name, value)| (*name, value.as_str()));
        own.chain(more.iter().copied()).collect()
    }
}

fn family<'a>(
    encoder: &'a mut DescriptorEncoder<'_>,
    name: &'a str,
    help: &'a str,
    kind: MetricType,
) -> Result<MetricEncoder<'a>, fmt::Error> {
    encoder.encode_descriptor(name, help, None, kind)
}

fn gauge(family: &mut MetricEncoder<'_>, labels: &[(&str, &str)], value: f64) -> fmt::Result {
    if labels.is_empty() {
        return family.encode_gauge(&value);
    }
    ConstGauge::new(value).encode(family.encode_family(&labels)?)
}

fn count(family: &mut MetricEncoder<'_>, labels: &[(&str, &str)], value: f64) -> fmt::Result {
    if labels.is_empty() {
        return family.encode_counter::<NoLabelSet, f64, f64>(&value, None);
    }
    ConstCounter::new(value).encode(family.encode_family(&labels)?)
}
