//! What one hit of a probe costs, and what a crossing of the boundary costs when it is seen: each beside the same without
//! probes, in interleaved rounds.

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
    /// Crossings in one measurement.
    #[arg(long, default_value_t = 50_000, value_parser = clap::value_parser!(u32).range(1000..=100_000_000))]
    calls: u32,
}

/// One kind of crossing.
struct Crossing {
    title: &'static str,
    arguments: &'static [&'static str],
    /// What the workload must have counted as often as it was asked to.
    counted: fn(&serde_json::Value) -> &serde_json::Value,
}

const CROSSINGS: [Crossing; 4] = [
    Crossing {
        title: "invocation of an empty export",
        arguments: &["--scenario", "enter"],
        counted: |report| &report["invocations"]["crossings/enter"],
    },
    Crossing {
        title: "host call that does nothing",
        arguments: &["--scenario", "leave"],
        counted: |report| &report["host_calls"]["host.add"],
    },
    Crossing {
        title: "host call with one write",
        arguments: &["--scenario", "writes", "--work", "0"],
        counted: |report| &report["syscalls"]["write"],
    },
    Crossing {
        title: "host call with one write, 5 µs of guest work",
        arguments: &["--scenario", "writes"],
        counted: |report| &report["syscalls"]["write"],
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
    for round in 0..options.rounds {
        for (crossing, each) in CROSSINGS.iter().zip(&mut each) {
            step.note(&format!("round {} of {rounds}: {}", round + 1, crossing.title));
            for (view, values) in VIEWS.iter().zip(each) {
                let (report, _) = work(workspace, *view, crossing.arguments, options.calls)?;
                let counted = (crossing.counted)(&report);
                ensure!(
                    counted.as_u64() == Some(u64::from(options.calls)),
                    "{}: asked for {}, counted {counted}",
                    crossing.title,
                    options.calls
                );
                values.push(elapsed_ns(&report)? as f64 / f64::from(options.calls));
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
