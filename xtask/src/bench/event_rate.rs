//! How many kernel records a second the agent takes before any is lost, and what is lost above that.

use std::net::SocketAddr;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;

use super::agent::{LIMIT, ROUNDS_PER_US, start, watched};
use crate::process::Running;
use crate::workspace::Workspace;
use crate::{http, soak::address_of};

/// Microseconds of guest arithmetic between two host calls, from what is easily kept up with to none at all.
const PACES_US: [u32; 6] = [50, 20, 10, 5, 2, 0];
/// Invocations that the calls are spread over: a trace has an end.
const INVOCATIONS: u32 = 100;

/// One pace.
#[derive(Debug, Clone, Copy)]
pub(super) struct Pace {
    /// Records that the programs made, a second of the work.
    pub(super) per_second: f64,
    /// Of them, those that reached the agent, by its own account.
    pub(super) delivered: u64,
    /// Of them, those that found no room in the ring.
    pub(super) lost: u64,
}

/// Every pace once, each with an agent of its own that leaves nothing out (no governor).
pub(super) fn measure(workspace: &Workspace, span: Duration) -> Result<Vec<Pace>> {
    PACES_US
        .into_iter()
        .map(|pace_us| one(workspace, pace_us, span))
        .collect()
}

fn one(workspace: &Workspace, pace_us: u32, span: Duration) -> Result<Pace> {
    // A call costs a few microseconds by itself, most of them the probes'.
    let calls = (span.as_micros() / u128::from(pace_us + 5) / u128::from(INVOCATIONS)).max(1);
    let mut command = Command::new(workspace.release_binary("workload"));
    command
        .args(["--scenario", "writes", "--wait", "--hold"])
        .args(["--repeat", &INVOCATIONS.to_string(), "--calls", &calls.to_string()])
        .args(["--work", &(pace_us * ROUNDS_PER_US).to_string()]);
    let mut workload = Running::start_with_stdin(&mut command)?;
    workload.wait_for("it is ready", LIMIT, |line| (line == "ready").then_some(()))?;
    let (_directory, mut agent) = start(workspace, &["--set", "governor.enabled=false"])?;
    let address = address_of(&mut agent, LIMIT)?;
    watched(&mut agent, workload.id())?;
    let before = settled(address)?;
    workload.send_line("go")?;
    let report: Value = workload.wait_for("its report", Duration::from_mins(30), |line| {
        serde_json::from_str(line).ok()
    })?;
    let seconds = super::measure::elapsed_ns(&report)? as f64 / 1e9;
    let after = settled(address)?;
    workload.close_stdin();
    workload.wait(LIMIT)?;
    let (delivered, lost) = (after.0 - before.0, after.1 - before.1);
    Ok(Pace {
        per_second: (delivered + lost) as f64 / seconds,
        delivered,
        lost,
    })
}

/// Records delivered and lost so far.
fn counted(address: SocketAddr) -> Result<(u64, u64)> {
    let scrape = http::get(address, "/metrics")?;
    ensure!(scrape.status == 200, "/metrics answered {}", scrape.status);
    let sample = |name: &str| {
        let line = scrape
            .body
            .lines()
            .find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        let value = line.and_then(|value| value.parse::<f64>().ok());
        value.with_context(|| format!("/metrics has no {name}"))
    };
    let emitted = sample("wasmscope_records_emitted_total")?;
    let delivered = sample("wasmscope_records_delivered_total")?;
    Ok((delivered as u64, (emitted - delivered) as u64))
}

/// The same once it does not change any more.
fn settled(address: SocketAddr) -> Result<(u64, u64)> {
    let begun = Instant::now();
    let mut last = counted(address)?;
    loop {
        thread::sleep(Duration::from_secs(1));
        let now = counted(address)?;
        if now == last {
            return Ok(now);
        }
        ensure!(begun.elapsed() < LIMIT, "the agent did not take what was in the ring");
        last = now;
    }
}
