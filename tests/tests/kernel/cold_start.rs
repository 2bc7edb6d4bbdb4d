//! What a module goes through before its first call, against the host's own counts and clocks.

use std::collections::BTreeMap;

use serde::Deserialize;
use wasmscope::span::{ColdStart, PhaseKind, Role, Span, SpanKind};
use wasmscope_tests::agent::{self, Agent};
use wasmscope_tests::captured::{Captured, Trace};
use wasmscope_tests::environment::{self, Kernel};
use wasmscope_tests::workload::Workload;

/// The host runs and each of its instances is called this often.
const REPEAT: &str = "3";
/// Steps, the length under which one says nothing about how much of it was seen (nanoseconds), and the least share of the rest that the
/// phases in it must make up, in the median.
const LONG: [(&str, u64, f64); 3] = [
    ("compile", 1_000_000, 0.8),
    ("deserialize", 200_000, 0.8),
    ("instantiate", 1_000_000, 0.8),
];

/// One step of the host's, timed with the clock of probes.
#[derive(Clone, Debug, Deserialize)]
struct Step {
    module: String,
    #[serde(rename = "step")]
    name: String,
    start_ns: u64,
    end_ns: u64,
}

#[derive(Deserialize)]
struct Steps {
    steps: Vec<Step>,
}

/// What the host says and what was seen.
struct Run {
    steps: Vec<Step>,
    seen: Captured,
    metrics: String,
    replayed: Captured,
}

impl Step {
    fn contains(&self, start_ns: u64, end_ns: u64) -> bool {
        self.start_ns <= start_ns && end_ns <= self.end_ns
    }
}

impl Run {
    fn of(arguments: &[&str]) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let [metrics, recording] = ["metrics", "recording"].map(|name| directory.path().join(name));
        let mut words = vec!["--scenario", "coldstart", "--repeat", REPEAT, "--hold"];
        words.extend(arguments);
        let mut workload = Workload::ready(&words);
        let pid = workload.pid();
        let mut words = vec!["--pid", &pid, "--format", "json"];
        words.extend([
            "--metrics-file",
            metrics.to_str().unwrap(),
            "--record",
            recording.to_str().unwrap(),
        ]);
        let agent = Agent::watching(words);
        workload.0.send_line();
        let line = workload.0.stdout_line(|line| line.starts_with("{\"steps\""));
        let steps: Steps = serde_json::from_str(&line).unwrap();
        workload.0.stdout_line(|line| line.starts_with("{\"scenario\""));
        // The host still has all its modules while the agent reads what they are.
        agent.interrupt();
        let seen = agent.captured();
        workload.0.finish().succeeded();
        let mut replay = agent::wasmscope();
        replay.arg("replay").arg(&recording).args(["--format", "json"]);
        Self {
            steps: steps.steps,
            seen,
            metrics: std::fs::read_to_string(metrics).unwrap(),
            replayed: Captured::parse(&agent::run(replay).succeeded().stdout),
        }
    }

    fn steps<'a>(&'a self, step: &'a str) -> impl Iterator<Item = &'a Step> {
        self.steps.iter().filter(move |known| known.name == step)
    }

    /// How often the host did something to each module.
    fn counted(&self, step: &str) -> BTreeMap<String, u64> {
        let mut counts = BTreeMap::new();
        for step in self.steps(step) {
            *counts.entry(step.module.clone()).or_default() += 1;
        }
        counts
    }

    /// The same, as the metrics have it.
    fn measured(&self, name: &str, phase: &str) -> BTreeMap<String, u64> {
        let mut counts = BTreeMap::new();
        for line in self.metrics.lines() {
            let Some((labels, value)) = line
                .strip_prefix(name)
                .and_then(|rest| rest.strip_prefix('{'))
                .and_then(|rest| rest.split_once("} "))
            else {
                continue;
            };
            if phase.is_empty() || labels.contains(&format!("phase=\"{phase}\"")) {
                let module = labels.split("module=\"").nth(1).unwrap().split('"').next().unwrap();
                let value: f64 = value.split(' ').next().unwrap().parse().unwrap();
                *counts.entry(module.to_owned()).or_default() += value as u64;
            }
        }
        counts
    }

    /// The first call after each load, as the host made them.
    fn first_calls(&self) -> Vec<&Step> {
        let mut waiting: BTreeMap<&str, bool> = BTreeMap::new();
        let mut first = Vec::new();
        for step in &self.steps {
            match step.name.as_str() {
                "compile" | "deserialize" => {
                    waiting.insert(&step.module, true);
                }
                "call" if waiting.insert(&step.module, false) == Some(true) => first.push(step),
                _ => {}
            }
        }
        first
    }

    /// The host's call that a trace is of; none for what instances run at their start.
    fn call_of(&self, trace: &Trace) -> Option<&Step> {
        self.steps("call")
            .find(|step| step.contains(trace.root.start_ns, trace.root.end_ns))
    }
}

fn module_of(span: &Span) -> &str {
    let SpanKind::Invoke {
        function: Some(function),
    } = &span.kind
    else {
        panic!("{span:?}")
    };
    &function.module.name
}

fn cold_starts(seen: &Captured) -> impl Iterator<Item = &ColdStart> {
    seen.traces.iter().flat_map(|trace| &trace.starts.cold)
}

const VARIANTS: [&[&str]; 3] = [
    &["--mode", "sync"],
    &["--mode", "async"],
    &["--mode", "async", "--pooling"],
];

#[test]
fn each_phase_is_counted_as_often_as_the_host_did_it() {
    let Some(_kernel) = Kernel::acquire() else { return };
    for variant in VARIANTS {
        let run = Run::of(variant);
        run.seen.assert_nothing_lost();
        let phases = "wasm_cold_start_duration_seconds_count";
        for kind in ["compile", "deserialize"] {
            assert_eq!(run.measured(phases, kind), run.counted(kind), "{variant:?} {kind}");
        }
        let mut loads = run.counted("compile");
        for (module, count) in run.counted("deserialize") {
            *loads.entry(module).or_default() += count;
        }
        assert_eq!(run.measured(phases, "publish"), loads, "{variant:?}");
        assert_eq!(run.measured(phases, "read"), run.counted("deserialize"), "{variant:?}");
        let mut instances = run.counted("instantiate");
        // The module that was there before anybody looked.
        instances.insert("unknown".to_owned(), 1);
        assert_eq!(run.measured("wasm_instantiations_total", ""), instances, "{variant:?}");
        assert_eq!(
            run.measured(phases, "start"),
            BTreeMap::from([("starting".to_owned(), 1)])
        );
        // Nobody has called it.
        loads.remove("uncalled").unwrap();
        assert_eq!(run.measured("wasm_cold_starts_total", ""), loads, "{variant:?}");
        assert_eq!(run.measured(phases, "first_call"), loads, "{variant:?}");
        assert_eq!(run.measured(phases, "instantiate"), loads, "{variant:?}");
    }
}

#[test]
fn exactly_the_first_call_of_each_load_is_cold_and_every_later_one_is_warm() {
    let Some(_kernel) = Kernel::acquire() else { return };
    for variant in VARIANTS {
        let run = Run::of(variant);
        let first: Vec<u64> = run.first_calls().iter().map(|step| step.start_ns).collect();
        let mut found = 0;
        for trace in &run.seen.traces {
            let Some(call) = run.call_of(trace) else { continue };
            found += 1;
            assert_eq!(module_of(&trace.root), call.module);
            let is_first = first.contains(&call.start_ns);
            assert_eq!(trace.starts.cold.len(), usize::from(is_first), "{variant:?} {call:?}");
            assert_eq!(trace.starts.is_warm, !is_first, "{variant:?} {call:?}");
            assert!(trace.starts.cold.iter().all(|cold| cold.is_of(&trace.root)));
        }
        assert_eq!(found, run.steps("call").count(), "{variant:?}");
        // Whether the call was the first of a module that was loaded earlier is not known; the second was not.
        let earlier: Vec<_> = run
            .seen
            .traces
            .iter()
            .filter(|trace| module_of(&trace.root) == "earlier")
            .collect();
        let known: Vec<_> = earlier
            .iter()
            .map(|trace| (trace.starts.cold.len(), trace.starts.is_warm))
            .collect();
        assert_eq!(known, [(0, false), (0, true)]);
        let starts = |seen: &Captured| -> Vec<_> { seen.traces.iter().map(|trace| trace.starts.clone()).collect() };
        assert_eq!(starts(&run.replayed), starts(&run.seen), "{variant:?}");
    }
}

#[test]
fn compiling_and_deserializing_are_told_apart() {
    use PhaseKind::{Compile, Deserialize, Instantiate, Publish, Read, Start};

    let Some(_kernel) = Kernel::acquire() else { return };
    let run = Run::of(&["--mode", "sync"]);
    let seen: Vec<(&str, Vec<PhaseKind>)> = cold_starts(&run.seen)
        .map(|cold| {
            (
                cold.module.name.as_str(),
                cold.phases.iter().map(|phase| phase.kind).collect(),
            )
        })
        .collect();
    let compiled = vec![Compile, Publish, Instantiate];
    let deserialized = vec![Read, Deserialize, Publish, Instantiate];
    assert_eq!(
        seen,
        [
            ("compiled", compiled.clone()),
            ("deserialized", deserialized.clone()),
            ("mapped", deserialized.clone()),
            ("starting", vec![Compile, Publish, Instantiate, Start]),
            ("thrice", deserialized.clone()),
            ("thrice", deserialized),
            ("thrice", compiled.clone()),
            ("part", compiled),
        ]
    );
}

/// Phases lie inside of what the host timed, and of what took it long they are at least four fifths. The clocks are one, so the
/// first is exact; the second leaves room for what the host does between its look at the clock and the function that is probed, and for
/// the machine to do something else meanwhile, and is asked of the median of all runs.
#[test]
fn phases_lie_inside_of_the_hosts_own_times_and_make_up_most_of_them() {
    let Some(_kernel) = Kernel::acquire() else { return };
    let mut shares: BTreeMap<&str, Vec<f64>> = BTreeMap::new();
    for variant in VARIANTS {
        let run = Run::of(variant);
        for cold in cold_starts(&run.seen) {
            for (step, long_ns, _) in LONG {
                let inside = |kind: PhaseKind| match step {
                    "compile" => kind == PhaseKind::Compile,
                    "deserialize" => matches!(kind, PhaseKind::Read | PhaseKind::Deserialize),
                    _ => matches!(kind, PhaseKind::Instantiate | PhaseKind::Start),
                };
                let phases: Vec<_> = cold.phases.iter().filter(|phase| inside(phase.kind)).collect();
                let Some(first) = phases.first() else { continue };
                let host = run
                    .steps(step)
                    .find(|host| host.module == cold.module.name && host.contains(first.start_ns, first.end_ns))
                    .unwrap_or_else(|| panic!("{variant:?}: no {step} of the host's around {first:?} of {cold:?}"));
                for phase in &phases {
                    assert!(host.contains(phase.start_ns, phase.end_ns), "{phase:?} in {host:?}");
                }
                let ours: u64 = phases.iter().map(|phase| phase.duration_ns()).sum();
                let all = host.end_ns - host.start_ns;
                if all >= long_ns {
                    shares.entry(step).or_default().push(ours as f64 / all as f64);
                }
            }
            let publish = cold
                .phases
                .iter()
                .find(|phase| phase.kind == PhaseKind::Publish)
                .unwrap();
            assert!((publish.start_ns..=publish.end_ns).contains(&cold.published_ns));
        }
    }
    eprintln!("shares of the host's own times: {shares:?}");
    for (step, _, least) in LONG {
        let mut shares = shares.remove(step).unwrap_or_default();
        assert!(shares.len() >= VARIANTS.len(), "{step}: only {shares:?} took long");
        shares.sort_by(f64::total_cmp);
        let median = shares[shares.len() / 2];
        assert!(median >= least && shares[shares.len() - 1] <= 1.0, "{step}: {shares:?}");
    }
}

#[test]
fn a_module_has_one_hash_in_every_process_however_it_was_loaded() {
    let Some(_kernel) = Kernel::acquire() else { return };
    let hashes = |variant: &[&str]| -> BTreeMap<String, Vec<String>> {
        let mut hashes: BTreeMap<String, Vec<String>> = BTreeMap::new();
        for cold in cold_starts(&Run::of(variant).seen) {
            let known = hashes.entry(cold.module.name.clone()).or_default();
            known.push(cold.module.hash.clone());
            known.dedup();
        }
        hashes
    };
    let first = hashes(VARIANTS[0]);
    assert!(first.values().all(|hashes| hashes.len() == 1), "{first:?}");
    let mut all: Vec<_> = first.values().flatten().collect();
    all.sort();
    all.dedup();
    assert_eq!(all.len(), first.len(), "different modules have different hashes");
    assert_eq!(hashes(VARIANTS[0]), first);
    assert_eq!(hashes(VARIANTS[1]), first);
}

#[test]
fn cold_starts_of_wasmtime_from_pypi_have_their_phases() {
    let Some(_kernel) = Kernel::acquire() else { return };
    let Some(python) = environment::python() else { return };
    let arguments = ["--tasks", "1", "--calls", "5", "--repeat", "4", "--compile-after-wait"];
    let workload = Workload::ready_python(python, "pywasm.py", &arguments);
    let agent = Agent::json_of(&workload.pid());
    workload.run();
    let seen = agent.captured();
    let cold: Vec<_> = cold_starts(&seen).collect();
    let [cold] = cold.as_slice() else {
        panic!("{} cold starts; losses: {:?}", cold.len(), seen.capture.losses)
    };
    let kinds: Vec<_> = cold.phases.iter().map(|phase| phase.kind).collect();
    assert_eq!(kinds, [PhaseKind::Compile, PhaseKind::Publish, PhaseKind::Instantiate]);
    assert_eq!(cold.module.name, "pyguest");
    let first = seen.traces.iter().min_by_key(|trace| trace.root.start_ns).unwrap();
    assert!(cold.is_of(&first.root));
    let warm = seen.traces.iter().filter(|trace| trace.starts.is_warm).count();
    assert_eq!(warm, seen.traces.len() - 1);
}

#[test]
fn a_stripped_host_has_its_first_call_and_no_phases() {
    let Some(_kernel) = Kernel::acquire() else { return };
    let directory = tempfile::tempdir().unwrap();
    let program = directory.path().join("workload.stripped");
    wasmscope_tests::workload::stripped(&environment::test_host("workload"), &program);
    let arguments = ["--calls", "20", "--repeat", "4", "--compile-after-wait"];
    let workload = Workload::ready_as(&program, &arguments);
    let agent = Agent::json_of(&workload.pid());
    workload.run();
    let seen = agent.captured();
    assert!(!seen.traces.is_empty());
    assert_eq!(cold_starts(&seen).count(), 1);
    assert!(cold_starts(&seen).all(|cold| cold.phases.is_empty()));
    assert!(seen.traces.iter().all(|trace| trace.root.role() == Role::Invoke));
    let limits = &seen.traces[0].process.limits;
    assert!(limits.iter().any(|limit| limit.contains("cold starts")), "{limits:?}");
}
