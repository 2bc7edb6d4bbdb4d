//! What one hit of a probe costs, and what a crossing of the boundary costs when it is seen: each beside the same without
//! probes, in interleaved rounds.

use std::path::Path;
use std::process::Command;

use anyhow::{Context as _, Result, ensure};

use super::measure::{elapsed_ns, work};
use super::report::median;
use super::tracer::Subject;
use crate::agent_cli::Depth;
use crate::step::Step;
use crate::workspace::Workspace;

/// Measure what a hit of each kind of probe costs, and each kind of crossing, seen and unseen.
#[derive(Debug, clap::Args)]
pub(crate) struct Probes {
    /// How often each is measured.
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=1000))]
    rounds: u32,
    /// Crossings in one measurement, which a trace must have room for.
    #[arg(long, default_value_t = 50_000, value_parser = clap::value_parser!(u32).range(1000..=150_000))]
    calls: u32,
}

/// One kind of crossing.
struct Crossing {
    title: &'static str,
    arguments: &'static [&'static str],
    /// What the workload must have counted as often as it was asked to.
    counted: fn(&serde_json::Value) -> &serde_json::Value,
    /// The series that must say the same of what tier 1 saw.
    seen: &'static str,
}

const INVOCATIONS: &str = "wasm_invocations_total{";
const HOST_CALLS: &str = "wasm_host_calls_total{";
const SYSCALLS: &str = "wasm_syscalls_total{";
/// What tier 0 sees of a crossing that counts for a crossing.
const WRITE: &str = "syscall=\"write\"";

const CROSSINGS: [Crossing; 6] = [
    Crossing {
        title: "invocation of an empty export",
        arguments: &["--scenario", "enter"],
        counted: |report| &report["invocations"]["crossings/enter"],
        seen: INVOCATIONS,
    },
    Crossing {
        title: "host call that does nothing",
        arguments: &["--scenario", "leave"],
        counted: |report| &report["host_calls"]["host.add"],
        seen: HOST_CALLS,
    },
    Crossing {
        title: "host call of a component that does nothing",
        arguments: &["--scenario", "components-leave"],
        counted: |report| &report["host_calls"]["test:host/ops@1.0.0.add"],
        seen: HOST_CALLS,
    },
    Crossing {
        title: "host call that suspends its fiber once",
        arguments: &["--scenario", "yield", "--mode", "async"],
        counted: |report| &report["suspends"],
        seen: HOST_CALLS,
    },
    Crossing {
        title: "host call with one write",
        arguments: &["--scenario", "writes", "--work", "0"],
        counted: |report| &report["syscalls"]["write"],
        seen: SYSCALLS,
    },
    Crossing {
        title: "host call with one write, 5 µs of guest work",
        arguments: &["--scenario", "writes"],
        counted: |report| &report["syscalls"]["write"],
        seen: SYSCALLS,
    },
];

/// What is measured of a crossing.
const VIEWS: [Option<Subject>; 3] = [
    None,
    Some(Subject::Wasmscope(Depth::Tier0)),
    Some(Subject::Wasmscope(Depth::Full)),
];

/// Measures and prints both tables.
pub(crate) fn run(workspace: &Workspace, options: &Probes) -> Result<()> {
    let rounds = options.rounds.to_string();
    let status = Command::new(workspace.release_binary("wasmscope"))
        .args(["check", "--no-processes", "--costs", "--rounds", &rounds])
        .status()
        .context("cannot run wasmscope")?;
    ensure!(status.success(), "wasmscope check: {status}");

    let step = Step::start(format!(
        "measuring {} crossings in {rounds} rounds of {}",
        CROSSINGS.len(),
        options.calls
    ));
    let mut each: Vec<[Vec<f64>; 3]> = CROSSINGS.iter().map(|_| Default::default()).collect();
    let directory = tempfile::tempdir().context("cannot make a temporary directory")?;
    let metrics = directory.path().join("metrics.txt");
    for round in 0..options.rounds {
        step.note(&format!("round {} of {rounds}", round + 1));
        for (crossing, each) in CROSSINGS.iter().zip(&mut each) {
            for index in 0..VIEWS.len() {
                // Another one begins each round.
                let index = (index + round as usize) % VIEWS.len();
                each[index].push(once(workspace, crossing, VIEWS[index], options.calls, &metrics)?);
            }
        }
    }
    step.done("done");
    println!(
        "cost of a crossing, nanoseconds, medians of {rounds} interleaved rounds of {}",
        options.calls
    );
    println!(
        "  {:<46} {:>9} {:>12} {:>13}",
        "crossing", "untraced", "tier 0 adds", "tier 1 adds"
    );
    for (crossing, [untraced, node, boundary]) in CROSSINGS.iter().zip(each) {
        let added = |values: &[f64]| {
            let differences = values.iter().zip(&untraced).map(|(seen, unseen)| seen - unseen);
            median(differences.collect())
        };
        let (node, boundary) = (added(&node), added(&boundary));
        println!(
            "  {:<46} {:>9.0} {node:>12.0} {boundary:>13.0}",
            crossing.title,
            median(untraced.clone())
        );
    }
    Ok(())
}

/// Nanoseconds a crossing, of a run in which each was seen that can be.
fn once(workspace: &Workspace, crossing: &Crossing, view: Option<Subject>, calls: u32, metrics: &Path) -> Result<f64> {
    let (report, _) = work(workspace, view, crossing.arguments, calls, Some(metrics))?;
    let counted = (crossing.counted)(&report);
    let title = crossing.title;
    ensure!(
        counted.as_u64() == Some(u64::from(calls)),
        "{title}: asked for {calls}, counted {counted}"
    );
    let is_seen = match view {
        None => false,
        Some(Subject::Wasmscope(Depth::Tier0)) => crossing.seen == SYSCALLS,
        Some(_) => true,
    };
    if is_seen {
        let text = std::fs::read_to_string(metrics).context("wasmscope wrote no metrics")?;
        let of = if crossing.seen == SYSCALLS { WRITE } else { "" };
        let seen = sum(&text, crossing.seen, of);
        let lost = sum(&text, "wasmscope_events_lost_total{", "");
        ensure!(
            seen == u64::from(calls),
            "{title}: asked for {calls}, saw {seen} and lost {lost} records ({view:?})"
        );
    }
    Ok(elapsed_ns(&report)? as f64 / f64::from(calls))
}

/// Sum of the samples of one family whose labels contain `of`.
fn sum(metrics: &str, family: &str, of: &str) -> u64 {
    let samples = metrics
        .lines()
        .filter_map(|line| line.strip_prefix(family)?.rsplit_once("} "));
    let values = samples.filter(|(labels, _)| labels.contains(of));
    values
        .filter_map(|(_, value)| value.split(' ').next()?.parse::<u64>().ok())
        .sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn samples_of_one_family_are_added_up() {
        let text = "# TYPE wasm_syscalls counter\nwasm_syscalls_total{syscall=\"write\",export=\"a b\"} 3\n\
            wasm_syscalls_total{syscall=\"write\"} 4\nwasm_syscalls_total{syscall=\"read\"} 5\n# EOF\n";
        assert_eq!(sum(text, SYSCALLS, WRITE), 7);
        assert_eq!(sum(text, SYSCALLS, ""), 12);
        assert_eq!(sum(text, HOST_CALLS, ""), 0);
    }
}
