//! Runs the workload again and again, traced by each subject in turn.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;

use super::tracer::Subject;
use crate::interrupt;
use crate::process::Running;
use crate::step::Step;
use crate::workspace::Workspace;

const START_LIMIT: Duration = Duration::from_mins(1);
const RUN_LIMIT: Duration = Duration::from_mins(15);

/// What came of one subject.
#[derive(Debug)]
pub(crate) struct Measured {
    /// Nothing for the untraced run.
    pub(crate) subject: Option<Subject>,
    /// Nanoseconds for all calls, one per round.
    pub(crate) elapsed_ns: Vec<u64>,
    /// Why there are no more of them.
    pub(crate) failure: Option<String>,
}

/// Every round measures everything once, so that what drifts on the machine drifts for all.
pub(crate) fn run(workspace: &Workspace, subjects: &[Subject], rounds: u32, calls: u32) -> Result<Vec<Measured>> {
    let all = std::iter::once(None).chain(subjects.iter().copied().map(Some));
    let mut results: Vec<_> = all
        .map(|subject| Measured {
            subject,
            elapsed_ns: Vec::new(),
            failure: None,
        })
        .collect();
    let step = Step::start(format!(
        "measuring {} in {rounds} rounds of {calls} calls",
        results.len()
    ));
    // Pages and caches are warm afterwards.
    once(workspace, None, calls).context("while running the workload untraced")?;
    for round in 0..rounds {
        let count = results.len();
        for index in 0..count {
            // Another one begins each round.
            let result = &mut results[(index + round as usize) % count];
            if result.failure.is_some() {
                continue;
            }
            let title = result.subject.map_or("untraced", Subject::title);
            step.note(&format!("round {} of {rounds}: {title}", round + 1));
            match once(workspace, result.subject, calls) {
                Ok(elapsed_ns) => result.elapsed_ns.push(elapsed_ns),
                Err(error) => {
                    interrupt::check()?;
                    eprintln!("!! NOT MEASURED: {title}: {error:#}");
                    result.failure = Some(format!("{error:#}").lines().next().unwrap_or_default().to_owned());
                }
            }
        }
    }
    step.done("done");
    Ok(results)
}

/// Runs `writes` once, with the tracer attached before its work begins and ended after it.
fn once(workspace: &Workspace, subject: Option<Subject>, calls: u32) -> Result<u64> {
    let arguments = ["--scenario", "writes", "--mode", "sync"];
    let (report, counted) = work(workspace, subject, &arguments, calls, None)?;
    if let Some(counted) = counted {
        ensure!(
            counted >= u64::from(calls),
            "the tracer counted {counted} syscalls, the workload made {calls} writes"
        );
    }
    let writes = report["syscalls"]["write"].as_u64().unwrap_or(0);
    ensure!(
        writes >= u64::from(calls),
        "the workload made {writes} writes instead of {calls}: {report}"
    );
    elapsed_ns(&report)
}

/// Nanoseconds that the work took.
pub(crate) fn elapsed_ns(report: &Value) -> Result<u64> {
    report["elapsed_ns"]
        .as_u64()
        .with_context(|| format!("no elapsed_ns in {report}"))
}

/// Runs the workload once, traced from before its work begins until it is done: its report, and what the tracer counted. Wasmscope
/// writes its own counts to `metrics`.
pub(crate) fn work(
    workspace: &Workspace,
    subject: Option<Subject>,
    arguments: &[&str],
    calls: u32,
    metrics: Option<&Path>,
) -> Result<(Value, Option<u64>)> {
    let mut command = Command::new(workspace.release_binary("workload"));
    command
        .args(arguments)
        .args(["--wait", "--hold", "--calls", &calls.to_string()]);
    let mut workload = Running::start_with_stdin(&mut command)?;
    workload.wait_for("it is ready", START_LIMIT, |line| (line == "ready").then_some(()))?;
    let attached = subject
        .map(|subject| subject.attach(workspace, workload.id(), metrics))
        .transpose()?;
    workload.send_line("go")?;
    let report: Value = workload.wait_for("its report", RUN_LIMIT, |line| serde_json::from_str(line).ok())?;
    let counted = attached.map(super::tracer::Attached::end).transpose()?.flatten();
    workload.close_stdin();
    workload.wait(START_LIMIT)?;
    Ok((report, counted))
}
