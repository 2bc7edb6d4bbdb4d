//! What the node agent costs: idle and at work, its own processor time and memory, and what it takes from the workload.

use std::collections::BTreeMap;
use std::fs;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use serde_json::Value;

use super::event_rate;
use super::report::median;
use crate::process::Running;
use crate::workspace::Workspace;

pub(super) const LIMIT: Duration = Duration::from_mins(2);
/// Ticks of `/proc/PID/stat` in a second (`USER_HZ`, the same on every architecture that Linux calls by this name).
const TICKS_PER_SECOND: f64 = 100.0;
/// Rounds of guest arithmetic that one nanosecond takes, roughly: 2800 take about 5 µs.
pub(super) const ROUNDS_PER_US: u32 = 560;
/// Between what a start leaves to do and the measurement of an idle agent.
const SETTLING: Duration = Duration::from_secs(3);
/// An idle agent takes so few ticks that a short time would show none or one.
const IDLE_SPAN: Duration = Duration::from_secs(30);
/// Ways of running, by the agent's options: without one, with one that sees everything whatever it costs, and as it is installed.
const MODES: [Option<&[&str]>; 3] = [None, Some(&["--set", "governor.enabled=false"]), Some(&[])];
/// Invocations per second that are aimed at.
const RATES: [u32; 2] = [1_000, 10_000];

/// Measure the node agent, idle and at work, beside the budgets.
#[derive(Debug, clap::Args)]
pub(crate) struct AgentBench {
    /// How often each throughput is measured.
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=100))]
    rounds: u32,
    /// Seconds of each measurement, roughly.
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..=600))]
    seconds: u32,
    /// One round of two seconds: whether it works, not how fast.
    #[arg(long)]
    quick: bool,
}

/// Processor time and memory of a process.
#[derive(Debug, Clone, Copy)]
struct Usage {
    cpu_seconds: f64,
    rss_kib: u64,
    /// As the kernel shares pages out among those that map them. The ring is mapped twice, one after the other, so that records never
    /// wrap: `rss_kib` has its pages twice, this once.
    pss_kib: u64,
}

/// Measures and prints the table.
pub(crate) fn run(workspace: &Workspace, options: &AgentBench) -> Result<()> {
    let (rounds, seconds) = if options.quick {
        (1, 2)
    } else {
        (options.rounds, options.seconds)
    };
    let span = Duration::from_secs(u64::from(seconds));
    // A program with guests that does nothing.
    let mut command = Command::new(workspace.release_binary("workload"));
    command.arg("--wait");
    let mut quiet = Running::start_with_stdin(&mut command)?;
    quiet.wait_for("it is ready", LIMIT, |line| (line == "ready").then_some(()))?;
    let (directory, mut agent) = start(workspace, &[])?;
    watched(&mut agent, quiet.id())?;
    thread::sleep(SETTLING);
    let (idle_share, idle) = share(agent.id(), span.max(IDLE_SPAN))?;
    let maps = map_bytes(agent.id())?;
    drop((quiet, agent, directory));

    println!("{:<44} {:>14}  budget", "the agent", "measured");
    let row = |what: &str, value: String, budget: &str| println!("{what:<44} {value:>14}  {budget}");
    row(
        "idle, one process with guests: processor",
        format!("{:.2} %", idle_share * 100.0),
        "< 0.1 % of a core",
    );
    row(
        "idle: memory, the ring's pages once",
        format!("{:.1} MiB", idle.pss_kib as f64 / 1024.0),
        "< 40 MiB",
    );
    row(
        "idle: resident, the ring's pages twice",
        format!("{:.1} MiB", idle.rss_kib as f64 / 1024.0),
        "",
    );
    row(
        "BPF maps (memlock of its map fds)",
        format!("{:.1} MiB", maps as f64 / 1_048_576.0),
        "< 32 MiB",
    );

    for rate in RATES {
        let mut measured: [Measured; 2] = Default::default();
        for round in 0..rounds as usize {
            let mut elapsed = [0.0; MODES.len()];
            // Another one begins each round.
            for index in 0..MODES.len() {
                let mode = (index + round) % MODES.len();
                let (seconds, usage) = throughput(workspace, rate, rate * seconds, MODES[mode])?;
                elapsed[mode] = seconds;
                if let Some(usage) = usage {
                    let measured = &mut measured[mode - 1];
                    measured.shares.push(usage.cpu_seconds / seconds);
                    measured.memory_kib = measured.memory_kib.max(usage.pss_kib);
                }
            }
            for (measured, seconds) in measured.iter_mut().zip(&elapsed[1..]) {
                measured.ratios.push(seconds / elapsed[0]);
            }
        }
        for (measured, (how, budget)) in measured
            .into_iter()
            .zip([("full trace", "< 3 % at 10k/s"), ("governed", "")])
        {
            let loss = (1.0 - 1.0 / median(measured.ratios)) * 100.0;
            let what = |what: &str| format!("{rate} invocations/s, {how}: {what}");
            row(&what("throughput lost"), format!("{loss:.2} %"), budget);
            row(
                &what("processor"),
                format!("{:.1} %", median(measured.shares) * 100.0),
                "< 1 % of the workload's",
            );
            row(
                &what("memory, most"),
                format!("{:.1} MiB", measured.memory_kib as f64 / 1024.0),
                "< 80 MiB",
            );
        }
    }
    print_event_rates(&event_rate::measure(workspace, span)?);
    println!("medians of {rounds} interleaved rounds of about {seconds} s; workload on one thread");
    Ok(())
}

fn print_event_rates(paces: &[event_rate::Pace]) {
    println!(
        "\n{:>14} {:>14} {:>14}  budget: 0 lost at 200k events/s",
        "events/s", "delivered", "lost"
    );
    for pace in paces {
        println!("{:>14.0} {:>14} {:>14}", pace.per_second, pace.delivered, pace.lost);
    }
    let lossless = paces.iter().filter(|pace| pace.lost == 0).map(|pace| pace.per_second);
    match lossless.max_by(f64::total_cmp) {
        Some(most) => println!("{most:.0} events/s is the most without loss"),
        None => println!("no pace was without loss"),
    }
}

/// What came of one way of being watched.
#[derive(Default)]
struct Measured {
    /// Seconds to those without an agent.
    ratios: Vec<f64>,
    /// Of one core.
    shares: Vec<f64>,
    memory_kib: u64,
}

/// Seconds that the work took, and what the agent used meanwhile.
fn throughput(
    workspace: &Workspace,
    rate: u32,
    invocations: u32,
    options: Option<&[&str]>,
) -> Result<(f64, Option<Usage>)> {
    // Each invocation is arithmetic for as long as the rate leaves it, and one write.
    let work = (1_000_000 / rate * ROUNDS_PER_US).to_string();
    let mut command = Command::new(workspace.release_binary("workload"));
    command
        .args([
            "--scenario",
            "writes",
            "--calls",
            "1",
            "--wait",
            "--hold",
            "--work",
            &work,
        ])
        .args(["--repeat", &invocations.to_string()]);
    let mut workload = Running::start_with_stdin(&mut command)?;
    workload.wait_for("it is ready", LIMIT, |line| (line == "ready").then_some(()))?;
    let mut agent = options.map(|options| start(workspace, options)).transpose()?;
    let mut before = None;
    if let Some((_, agent)) = &mut agent {
        watched(agent, workload.id())?;
        before = Some(usage(agent.id())?);
    }
    workload.send_line("go")?;
    let report: Value = workload.wait_for("its report", Duration::from_mins(30), |line| {
        serde_json::from_str(line).ok()
    })?;
    let seconds = super::measure::elapsed_ns(&report)? as f64 / 1e9;
    let used = match (&agent, before) {
        (Some((_, agent)), Some(before)) => {
            let after = usage(agent.id())?;
            Some(Usage {
                cpu_seconds: after.cpu_seconds - before.cpu_seconds,
                ..after
            })
        }
        _ => None,
    };
    workload.close_stdin();
    workload.wait(LIMIT)?;
    Ok((seconds, used))
}

/// An agent that is ready, without a collector.
pub(super) fn start(workspace: &Workspace, options: &[&str]) -> Result<(tempfile::TempDir, Running)> {
    let directory = tempfile::tempdir()?;
    let mut command = Command::new(workspace.release_binary("wasmscope"));
    command
        .args(["agent", "--listen", "127.0.0.1:0", "--set"])
        .arg(format!(
            "instance.lock_file={}",
            directory.path().join("lock").display()
        ))
        .args(options)
        .env_remove("OTEL_EXPORTER_OTLP_ENDPOINT");
    Ok((directory, Running::start(&mut command)?))
}

pub(super) fn watched(agent: &mut Running, pid: u32) -> Result<()> {
    let pid = format!(" pid={pid} ");
    agent.wait_for("it watches the workload", LIMIT, |line| {
        (line.contains("process watched") && line.contains(&pid)).then_some(())
    })
}

/// Share of one core over `span`, and what it uses at its end.
fn share(pid: u32, span: Duration) -> Result<(f64, Usage)> {
    let begun = Instant::now();
    let before = usage(pid)?;
    thread::sleep(span);
    let after = usage(pid)?;
    let share = (after.cpu_seconds - before.cpu_seconds) / begun.elapsed().as_secs_f64();
    Ok((share, after))
}

fn usage(pid: u32) -> Result<Usage> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    // The name in parentheses may hold anything; utime and stime are fields 14 and 15.
    let (_, rest) = stat.rsplit_once(") ").context("/proc/PID/stat has no name")?;
    let ticks: u64 = rest
        .split(' ')
        .skip(11)
        .take(2)
        .filter_map(|field| field.parse::<u64>().ok())
        .sum();
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let rss = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let rollup = fs::read_to_string(format!("/proc/{pid}/smaps_rollup"))?;
    let kib = |text: Option<&str>| {
        text.and_then(|text| text.split_whitespace().next()?.parse().ok())
            .unwrap_or(0)
    };
    Ok(Usage {
        cpu_seconds: ticks as f64 / TICKS_PER_SECOND,
        rss_kib: kib(rss),
        pss_kib: kib(rollup.lines().find_map(|line| line.strip_prefix("Pss:"))),
    })
}

/// Bytes of all maps that the process holds open, each once.
fn map_bytes(pid: u32) -> Result<u64> {
    let mut maps = BTreeMap::new();
    for entry in fs::read_dir(format!("/proc/{pid}/fdinfo"))? {
        // A descriptor may be closed meanwhile.
        let text = fs::read_to_string(entry?.path()).unwrap_or_default();
        let field = |key: &str| -> Option<u64> {
            text.lines()
                .find_map(|line| line.strip_prefix(key)?.trim().parse().ok())
        };
        if let (Some(id), Some(bytes)) = (field("map_id:"), field("memlock:")) {
            maps.insert(id, bytes);
        }
    }
    Ok(maps.values().sum())
}
