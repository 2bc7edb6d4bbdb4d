//! Every family that the agent can have, described from the families themselves: for the reference in `docs/metrics.md` and for checks of dashboards.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::sync::Arc;

use super::config::MetricsConfig;
use super::labels::{
    ExportLabels, FamilyLabels, GrowLabels, HostCallLabels, ImportLabels, InterruptionLabels, InvocationLabels,
    IoLabels, KindLabels, LossLabels, ModuleLabels, PhaseLabels, ResolutionLabels, SyscallLabels, SyscallTimeLabels,
    TrapLabels, Value, Workload,
};
use super::owners::Owner;
use super::{ColdStartPhase, Metrics};
use crate::clock::ClockAnchor;
use crate::inventory::InventoryCollector;
use crate::recorder::{Recorder, RecorderCollector, RecorderConfig};
use crate::self_observation::SelfObservation;
use crate::span::{Place, Process};

/// A family as a scrape shows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FamilyDescription {
    /// Without the suffix that the samples of its kind have: `wasm_invocations` for `wasm_invocations_total`.
    pub name: String,
    /// `counter`, `gauge` or `histogram`.
    pub kind: String,
    /// In a sentence.
    pub help: String,
    /// Names of its labels, in the order in which they are written; `le` of buckets is not among them.
    pub labels: Vec<String>,
}

impl FamilyDescription {
    /// The names that its samples have.
    pub fn sample_names(&self) -> Vec<String> {
        let suffixes: &[&str] = match self.kind.as_str() {
            "counter" => &["_total"],
            "histogram" => &["_bucket", "_count", "_sum"],
            _ => &[""],
        };
        suffixes.iter().map(|suffix| format!("{}{suffix}", self.name)).collect()
    }
}

/// All families of an agent, by name.
pub fn families() -> Vec<FamilyDescription> {
    parse(&with_a_series_each().encode())
}

/// A page for people, in Markdown.
pub fn markdown() -> String {
    let mut page = String::from(
        "# Metrics\n\nWritten by `cargo xtask docs` from the families in the code; do not edit.\n\n\
         `namespace`, `pod` and `container` say where the watched process runs; what is not in a pod has none of them. `process` is the name of the\n\
         command, `module` and `export` the guest's own names, `import` is `module.name`. Values that cannot be known are `unknown`; past the cap of a family,\n\
         new label sets count as `other`, and `wasmscope_series_overflow_total` says how often. No label holds an id of an instance, a file descriptor, an\n\
         address or a path.\n\nDurations are histograms in seconds.\n",
    );
    for (title, prefix) in [
        ("Guests", "wasm_"),
        ("The agent itself", "wasmscope_"),
        ("Its process", "process_"),
    ] {
        let _ = write!(
            page,
            "\n## {title}\n\n| metric | kind | what | labels |\n|---|---|---|---|\n"
        );
        for family in families().iter().filter(|family| family.name.starts_with(prefix)) {
            let suffix = if family.kind == "counter" { "_total" } else { "" };
            let labels: Vec<_> = family.labels.iter().map(|label| format!("`{label}`")).collect();
            let _ = writeln!(
                page,
                "| `{}{suffix}` | {} | {} | {} |",
                family.name,
                family.kind,
                family.help.trim_end_matches('.').replace('|', "\\|"),
                labels.join(" ")
            );
        }
    }
    page
}

/// Families without series are not written, so each is given one. A new field of [`Metrics`] has to be added here: it would not compile otherwise.
fn with_a_series_each() -> Metrics {
    let mut metrics = Metrics::new();
    crate::agent::register_examples(metrics.registry_mut());
    metrics.add_collector(Box::new(InventoryCollector::example()));
    metrics.add_collector(Box::new(SelfObservation::example()));
    let recorder = Recorder::new(RecorderConfig::default(), ClockAnchor::now(), String::new());
    metrics.add_collector(Box::new(RecorderCollector(Arc::new(recorder))));
    let export = ExportLabels {
        workload: Workload::new(&process(), &MetricsConfig::default()),
        module: Value::unknown(),
        export: Value::unknown(),
    };
    let import = ImportLabels {
        workload: export.workload.clone(),
        module: Value::unknown(),
        import: Value::unknown(),
    };
    let call = SyscallTimeLabels {
        export: export.clone(),
        syscall: Value::unknown(),
    };
    let module = ModuleLabels {
        workload: export.workload.clone(),
        module: Value::unknown(),
    };
    let grow = GrowLabels {
        module: module.clone(),
        outcome: "ok",
    };
    let Metrics {
        registry: _,
        collectors: _,
        invocations,
        invocation_time,
        host_calls,
        host_call_time,
        syscalls,
        syscall_time,
        io_bytes,
        cold_start_time,
        cold_starts,
        instantiations,
        traps,
        suspended_time,
        interruptions,
        memory_grows,
        table_grows,
        memory_bytes,
        memory_max_bytes,
        events,
        losses,
        pod_resolutions,
        records_emitted: _,
        records_delivered: _,
        overflow: _,
        symbol_coverage: _,
        named_count: _,
        nameable_count: _,
        // Counted in the kernel, written under the names of the families above.
        aggregates: _,
        config: _,
        ended: _,
    } = &metrics;
    let outcome = "ok";
    invocations.with(
        &InvocationLabels {
            export: export.clone(),
            outcome,
        },
        &Owner::Agent,
        |_| (),
    );
    invocation_time.with(&export, &Owner::Agent, |_| ());
    host_calls.with(
        &HostCallLabels {
            import: import.clone(),
            outcome,
        },
        &Owner::Agent,
        |_| (),
    );
    host_call_time.with(&import, &Owner::Agent, |_| ());
    syscall_time.with(&call, &Owner::Agent, |_| ());
    syscalls.with(
        &SyscallLabels {
            call,
            outcome: Value::new(outcome),
        },
        &Owner::Agent,
        |_| (),
    );
    io_bytes.with(
        &IoLabels {
            export: export.clone(),
            direction: "read",
        },
        &Owner::Agent,
        |_| (),
    );
    cold_start_time.with(
        &PhaseLabels {
            module: module.clone(),
            phase: ColdStartPhase::FirstCall.as_str(),
        },
        &Owner::Agent,
        |_| (),
    );
    cold_starts.with(&module, &Owner::Agent, |_| ());
    instantiations.with(&module, &Owner::Agent, |_| ());
    memory_bytes.with(&module, &Owner::Agent, |_| ());
    memory_max_bytes.with(&module, &Owner::Agent, |_| ());
    suspended_time.with(&export, &Owner::Agent, |_| ());
    interruptions.with(
        &InterruptionLabels {
            export: export.clone(),
            kind: "fuel",
            outcome,
        },
        &Owner::Agent,
        |_| (),
    );
    traps.with(
        &TrapLabels {
            export,
            code: Value::unknown(),
        },
        &Owner::Agent,
        |_| (),
    );
    memory_grows.with(&grow, &Owner::Agent, |_| ());
    table_grows.with(&grow, &Owner::Agent, |_| ());
    events.with(&KindLabels { kind: Value::unknown() }, &Owner::Agent, |_| ());
    losses.with(
        &LossLabels {
            layer: Value::unknown(),
            reason: Value::unknown(),
        },
        &Owner::Agent,
        |_| (),
    );
    pod_resolutions.with(
        &ResolutionLabels {
            source: "cri",
            result: "found",
        },
        &Owner::Agent,
        |_| (),
    );
    // The label set of `wasmscope_series_overflow`, whose series are made with the families.
    let FamilyLabels { family: _ } = FamilyLabels { family: "" };
    metrics
}

/// One of which everything is known, so that no label is left out.
fn process() -> Process {
    let known = || Some("unknown".to_owned());
    Process {
        pid: 1,
        start_ns: 0,
        command: "unknown".to_owned(),
        runtime_name: "wasmtime".to_owned(),
        runtime_version: None,
        limits: Vec::new(),
        place: Place {
            namespace: known(),
            pod_name: known(),
            container_name: known(),
            ..Place::default()
        },
    }
}

/// Reads what [`Metrics::encode`] wrote.
fn parse(text: &str) -> Vec<FamilyDescription> {
    let mut families: BTreeMap<String, FamilyDescription> = BTreeMap::new();
    let mut current = String::new();
    for line in text.lines() {
        let mut words = line.splitn(4, ' ');
        match (words.next(), words.next(), words.next(), words.next()) {
            (Some("#"), Some("HELP"), Some(name), Some(help)) => {
                name.clone_into(&mut current);
                families.insert(
                    current.clone(),
                    FamilyDescription {
                        name: current.clone(),
                        kind: String::new(),
                        // The encoder adds a full stop.
                        help: help.trim_end_matches('.').to_owned(),
                        labels: Vec::new(),
                    },
                );
            }
            (Some("#"), Some("TYPE"), Some(_), Some(kind)) => {
                if let Some(family) = families.get_mut(&current) {
                    kind.clone_into(&mut family.kind);
                }
            }
            (Some(sample), ..) if !sample.starts_with('#') => {
                if let Some(family) = families.get_mut(&current) {
                    for label in label_names(line) {
                        if label != "le" && !family.labels.contains(&label) {
                            family.labels.push(label);
                        }
                    }
                }
            }
            _ => {}
        }
    }
    families.into_values().collect()
}

/// Of a line whose values hold neither commas nor braces, as all of [`with_a_series_each`].
fn label_names(line: &str) -> Vec<String> {
    let Some((_, rest)) = line.split_once('{') else {
        return Vec::new();
    };
    let labels = rest.split_once('}').map_or(rest, |(labels, _)| labels);
    labels
        .split(',')
        .filter_map(|label| label.split_once('='))
        .map(|(name, _)| name.to_owned())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_family_is_described_with_its_labels() {
        let families = families();
        let family = |name: &str| families.iter().find(|family| family.name == name).unwrap();
        let syscalls = family("wasm_syscalls");
        assert_eq!(syscalls.kind, "counter");
        assert_eq!(syscalls.sample_names(), ["wasm_syscalls_total"]);
        for label in ["process", "module", "export", "syscall", "outcome"] {
            assert!(syscalls.labels.iter().any(|name| name == label), "{label}");
        }
        assert_eq!(family("wasm_invocation_duration_seconds").kind, "histogram");
        assert_eq!(family("wasmscope_events_lost").labels, ["layer", "reason"]);
        assert_eq!(family("wasmscope_series_overflow").labels, ["family"]);
        assert_eq!(family("wasmscope_recorder_dropped").labels, ["reason"]);
        assert_eq!(family("wasmscope_table_entries").labels, ["table"]);
        assert_eq!(family("wasmscope_queue_depth").labels, ["queue"]);
        assert_eq!(family("wasmscope_bpf_program_seconds").labels, ["program"]);
        assert_eq!(family("wasmscope_traces_sampled").labels, ["decision"]);
        assert!(
            families
                .iter()
                .all(|family| !family.help.is_empty() && !family.kind.is_empty())
        );
    }
}
