//! `cargo xtask bench`: what being watched costs, against other tools in the same run.

mod agent;
mod event_rate;
mod measure;
mod probes;
mod report;
mod tracer;

use anyhow::{Result, bail};

use crate::demo::build;
use crate::setup;
use crate::workspace::Workspace;

/// Measure what tracing costs the traced.
#[derive(Debug, clap::Subcommand)]
pub(crate) enum Bench {
    Overhead(Overhead),
    Probes(probes::Probes),
    Agent(agent::AgentBench),
}

/// Time a guest that writes in a loop: untraced, traced by wasmscope in its modes, by bpftrace and by strace, in interleaved rounds.
#[derive(Debug, clap::Args)]
pub(crate) struct Overhead {
    /// How often each is measured.
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=1000))]
    rounds: u32,
    /// Host calls (each one a write) in one measurement.
    #[arg(long, default_value_t = 100_000, value_parser = clap::value_parser!(u32).range(1..=100_000_000))]
    calls: u32,
    /// Print the table as Markdown.
    #[arg(long)]
    markdown: bool,
    /// Measure only what has this in its name (the untraced run always is).
    #[arg(long, value_name = "NAME")]
    only: Option<String>,
}

/// Runs a benchmark and prints its table.
pub(crate) fn run(workspace: &Workspace, bench: &Bench) -> Result<()> {
    setup::ensure_ebpf(workspace)?;
    match bench {
        Bench::Overhead(options) => overhead(workspace, options),
        Bench::Agent(options) => {
            build(workspace, &["wasmscope", "wasmscope-test-hosts"], None)?;
            agent::run(workspace, options)
        }
        Bench::Probes(options) => {
            build(workspace, &["wasmscope", "wasmscope-test-hosts"], None)?;
            probes::run(workspace, options)
        }
    }
}

fn overhead(workspace: &Workspace, options: &Overhead) -> Result<()> {
    for reason in setup::ensure_tools(workspace, &["strace", "bpftrace"])? {
        eprintln!("missing: {reason}");
    }
    build(workspace, &["wasmscope", "wasmscope-test-hosts"], None)?;
    let only = options.only.as_deref().unwrap_or_default();
    let subjects: Vec<_> = tracer::SUBJECTS
        .into_iter()
        .filter(|subject| subject.title().contains(only))
        .collect();
    let results = measure::run(workspace, &subjects, options.rounds, options.calls)?;
    println!(
        "{}",
        report::Table {
            results: &results,
            rounds: options.rounds,
            calls: options.calls,
            markdown: options.markdown
        }
    );
    let failed = results.iter().filter(|result| result.failure.is_some()).count();
    if failed > 0 {
        bail!("{failed} of {} could not be measured; see the table", results.len());
    }
    Ok(())
}
