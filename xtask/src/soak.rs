//! `cargo xtask soak`: an agent among programs that come and go, with a collector that goes away twice, held to exact counts and flat memory.

mod collector;
mod metrics;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::net::SocketAddr;
use std::process::{Command, ExitCode};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;

use self::collector::Collector;
use self::metrics::{Numbers, Sums};
use crate::demo::build;
use crate::process::Running;
use crate::workspace::Workspace;
use crate::{http, setup};

/// How long anything but the work itself may take.
const LIMIT: Duration = Duration::from_mins(2);
/// Time between scrapes.
const SCRAPE_INTERVAL: Duration = Duration::from_secs(1);
/// Until the agent asks an absent collector again (`ExportConfig::max_pause`): losses end that long after it came back, at the latest.
const LONGEST_PAUSE: Duration = Duration::from_secs(10);
/// Files and sockets that may be open at the end beyond those after the warm-up: a scrape and an export may be under way.
const MAX_FD_GROWTH: u64 = 4;
/// Every trace is exported: what is sampled out is no loss, and could not be told from one here.
const CONFIG: &str =
    "[traces.sampling]\ntraces_per_second = 1000000.0\nburst = 1000000.0\n[governor]\nenabled = false\n";
/// What programs are started with, in turn.
const KINDS: [&[&str]; 2] = [
    &["--calls", "10", "--repeat", "20"],
    &[
        "--mode",
        "async",
        "--tasks",
        "4",
        "--threads",
        "2",
        "--calls",
        "10",
        "--repeat",
        "5",
    ],
];

/// Soak the agent: programs with guests start and die in waves, the collector goes away twice, and every count must be exact.
///
/// Programs have compiled their guests and wait until the agent has looked at them before they work: what runs earlier is seen in part, and is not the subject.
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// How long programs come and go.
    #[arg(long, default_value_t = 10.0)]
    minutes: f64,
    /// Programs in a wave.
    #[arg(long, default_value_t = 24, value_parser = clap::value_parser!(u16).range(1..=256))]
    at_once: u16,
    /// MiB by which the agent's resident memory may have grown from the second quarter to the last, as the medians of both say.
    #[arg(long, default_value_t = 4)]
    growth_mib: u64,
    /// Use the executables that are there.
    #[arg(long)]
    no_build: bool,
}

/// The agent between two waves.
#[derive(Debug, Clone, Copy)]
struct Row {
    seconds: f64,
    rss_kib: u64,
    fds: u64,
    invocations: u64,
    lost: u64,
    lost_elsewhere: u64,
    is_away: bool,
}

/// Soaks; the exit code says whether everything was as it must be.
pub(crate) fn run(workspace: &Workspace, options: &Options) -> Result<ExitCode> {
    ensure!(
        options.minutes > 0.0 && options.minutes <= 10_000.0,
        "--minutes must be over 0 and at most 10000"
    );
    if !options.no_build {
        setup::ensure_ebpf(workspace)?;
        build(workspace, &["wasmscope", "wasmscope-test-hosts"], None)?;
    }
    let directory = tempfile::tempdir()?;
    let config = directory.path().join("agent.toml");
    fs::write(&config, CONFIG)?;
    let collector = Collector::start()?;
    let mut command = Command::new(workspace.release_binary("wasmscope"));
    command
        .args(["agent", "--listen", "127.0.0.1:0", "--config"])
        .arg(&config)
        .arg("--set")
        .arg(format!(
            "instance.lock_file={}",
            directory.path().join("lock").display()
        ))
        .env("OTEL_EXPORTER_OTLP_ENDPOINT", collector.endpoint())
        .env("OTEL_EXPORTER_OTLP_PROTOCOL", "http/protobuf");
    let mut agent = Running::start(&mut command)?;
    let address = address_of(&mut agent, LIMIT)?;
    agent.wait_for("it is ready", LIMIT, |line| line.ends_with("ready").then_some(()))?;

    let scraper = Scraper::start(address);
    let (rows, counted) = waves(workspace, options, &mut agent, address, &collector)?;
    let (scrapes, failed_scrapes) = scraper.end();
    // What waits for another attempt is delivered or given up while the agent drains; the last line says `lost=` of that, and `exported=` of all.
    kill(&agent)?;
    let status = agent.wait(LIMIT)?;
    let said = agent.stderr();
    let exported: Option<u64> = said.lines().rev().find_map(|line| number_after(line, "exported="));
    let lost_at_end = said
        .lines()
        .rev()
        .find_map(|line| number_after(line, " lost="))
        .unwrap_or(0);

    print(&rows);
    let mut problems = problems(&rows, options);
    let invoked: u64 = counted.invocations.values().sum();
    let lost = rows.last().map_or(0, |row| row.lost) + lost_at_end;
    println!(
        "{} waves of {}; invocations {invoked}, host calls {}, syscalls {}; exported {exported:?} traces, lost {lost}; the collector \
         was away {} times; {scrapes} scrapes",
        rows.len(),
        options.at_once,
        counted.host_calls.values().sum::<u64>(),
        counted.syscalls.values().sum::<u64>(),
        collector.departures(),
    );
    if exported.map(|exported| exported + lost) != Some(invoked) {
        problems.push(format!("exported {exported:?} + lost {lost} is not {invoked}"));
    }
    if failed_scrapes > 0 {
        problems.push(format!("{failed_scrapes} scrapes failed"));
    }
    if !status.success() {
        problems.push(format!("the agent ended with {status}\n{}", agent.tail(5)));
    }
    for problem in &problems {
        println!("MISMATCH: {problem}");
    }
    Ok(if problems.is_empty() {
        println!("as it must be");
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

/// Where an agent that has just been started serves HTTP.
pub(crate) fn address_of(agent: &mut Running, limit: Duration) -> Result<SocketAddr> {
    agent.wait_for("its address", limit, |line| {
        let is_address = line.contains("serving HTTP");
        line.rsplit_once("address=")
            .filter(|_| is_address)?
            .1
            .trim()
            .parse()
            .ok()
    })
}

fn waves(
    workspace: &Workspace,
    options: &Options,
    agent: &mut Running,
    address: SocketAddr,
    collector: &Collector,
) -> Result<(Vec<Row>, Sums)> {
    let begun = Instant::now();
    let length = Duration::from_secs_f64(options.minutes * 60.0);
    let mut counted = Sums::default();
    let mut started = 0;
    let mut rows = Vec::new();
    while begun.elapsed() < length {
        let share = begun.elapsed().as_secs_f64() / length.as_secs_f64();
        let is_away = (0.3..0.4).contains(&share) || (0.6..0.7).contains(&share);
        collector.set_away(is_away);
        wave(workspace, options, address, &mut counted, &mut started)?;
        let seen = settled(address, &counted)?;
        agent.catch_up();
        let row = Row {
            seconds: begun.elapsed().as_secs_f64(),
            rss_kib: status_kib(agent.id(), "VmRSS:")?,
            fds: fs::read_dir(format!("/proc/{}/fd", agent.id()))?.count() as u64,
            invocations: counted.invocations.values().sum(),
            lost: seen.lost.get("export").copied().unwrap_or(0),
            lost_elsewhere: seen
                .lost
                .iter()
                // Metrics that are refused are told anew with the next push.
                .filter(|(layer, _)| !matches!(layer.as_str(), "export" | "export_metrics"))
                .map(|(_, count)| count)
                .sum(),
            is_away,
        };
        rows.push(row);
    }
    collector.set_away(false);
    Ok((rows, counted))
}

/// Starts programs, lets all of them work at once when the agent has looked at them, and adds up what they counted.
fn wave(
    workspace: &Workspace,
    options: &Options,
    address: SocketAddr,
    counted: &mut Sums,
    started: &mut u64,
) -> Result<()> {
    let mut programs = Vec::new();
    for index in 0..usize::from(options.at_once) {
        let mut command = Command::new(workspace.release_binary("workload"));
        command.args(KINDS[index % KINDS.len()]).arg("--wait");
        programs.push(Running::start_with_stdin(&mut command)?);
    }
    for program in &mut programs {
        program.wait_for("it is ready", LIMIT, |line| (line == "ready").then_some(()))?;
    }
    *started += u64::from(options.at_once);
    let begun = Instant::now();
    // Each program has one guest.
    while Sums::scraped(&http::get(address, "/metrics")?.body).modules < *started {
        ensure!(begun.elapsed() < LIMIT, "the agent does not look at all programs");
        crate::interrupt::check()?;
        thread::sleep(Duration::from_millis(200));
    }
    for program in &mut programs {
        program.send_line("go")?;
    }
    for mut program in programs {
        let report: Value = program.wait_for("its counts", LIMIT, |line| serde_json::from_str(line).ok())?;
        counted.add_report(&report);
        program.close_stdin();
        let status = program.wait(LIMIT)?;
        ensure!(status.success(), "a program failed: {status}\n{}", program.tail(5));
    }
    Ok(())
}

/// The metrics once they say what the programs counted.
fn settled(address: SocketAddr, counted: &Sums) -> Result<Sums> {
    let begun = Instant::now();
    loop {
        let scrape = http::get(address, "/metrics")?.body;
        let seen = Sums::scraped(&scrape);
        let difference = counted.difference(&seen);
        if difference.is_none() {
            return Ok(seen);
        }
        if begun.elapsed() > Duration::from_secs(30) {
            let kept = std::env::temp_dir().join("wasmscope-soak-mismatch.txt");
            fs::write(&kept, scrape)?;
            anyhow::bail!(
                "MISMATCH: counted | seen: {}; lost {:?}; the scrape is in {}",
                difference.unwrap_or_default(),
                seen.lost,
                kept.display()
            );
        }
        crate::interrupt::check()?;
        thread::sleep(Duration::from_millis(200));
    }
}

fn problems(rows: &[Row], options: &Options) -> Vec<String> {
    let mut problems = Vec::new();
    let Some(last) = rows.last() else {
        return vec!["no wave came to its end".to_owned()];
    };
    let warm = rows[rows.len() / 5];
    let quarter = rows.len() / 4;
    let (earlier, later) = (resident(&rows[quarter..2 * quarter]), resident(&rows[3 * quarter..]));
    if let (Some(earlier), Some(later)) = (earlier, later)
        && later > earlier + options.growth_mib * 1024
    {
        problems.push(format!(
            "resident memory grew from {earlier} to {later} KiB, by more than {} MiB",
            options.growth_mib
        ));
    }
    if last.fds > warm.fds + MAX_FD_GROWTH {
        problems.push(format!("open files grew from {} to {}", warm.fds, last.fds));
    }
    if last.lost_elsewhere > 0 {
        problems.push(format!(
            "{} lost in layers where nothing was injected",
            last.lost_elsewhere
        ));
    }
    let mut was_away = None;
    for pair in rows.windows(2) {
        for row in pair.iter().filter(|row| row.is_away) {
            was_away = Some(row.seconds);
        }
        let is_excused = was_away.is_some_and(|was| pair[1].seconds - was <= LONGEST_PAUSE.as_secs_f64());
        if pair[1].lost > pair[0].lost && !is_excused {
            problems.push(format!(
                "{} lost by {:.0} s, with the collector there",
                pair[1].lost - pair[0].lost,
                pair[1].seconds
            ));
        }
    }
    problems
}

/// Median resident memory, KiB.
fn resident(rows: &[Row]) -> Option<u64> {
    let mut all: Vec<_> = rows.iter().map(|row| row.rss_kib).collect();
    all.sort_unstable();
    all.get(all.len() / 2).copied()
}

fn print(rows: &[Row]) {
    println!("   seconds  RSS KiB  fds  invocations     lost  collector");
    let step = rows.len().div_ceil(30).max(1);
    for (index, row) in rows.iter().enumerate() {
        if index % step == 0 || index + 1 == rows.len() {
            println!(
                "{:>10.1} {:>8} {:>4} {:>12} {:>8}  {}",
                row.seconds,
                row.rss_kib,
                row.fds,
                row.invocations,
                row.lost,
                if row.is_away { "away" } else { "there" }
            );
        }
    }
}

/// Asks the agent to drain, as a service manager does.
fn kill(agent: &Running) -> Result<()> {
    let pid = i32::try_from(agent.id()).ok().and_then(rustix::process::Pid::from_raw);
    rustix::process::kill_process(pid.context("no such pid")?, rustix::process::Signal::TERM)?;
    Ok(())
}

fn number_after(line: &str, key: &str) -> Option<u64> {
    let (_, rest) = line.split_once(key)?;
    let end = rest
        .find(|character: char| !character.is_ascii_digit())
        .unwrap_or(rest.len());
    rest[..end].parse().ok()
}

/// A size from `/proc/PID/status`.
fn status_kib(pid: u32, key: &str) -> Result<u64> {
    let text = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = text.lines().find_map(|line| line.strip_prefix(key));
    let number = line.and_then(|line| line.split_whitespace().next()?.parse().ok());
    number.with_context(|| format!("no {key} in /proc/{pid}/status"))
}

/// Scrapes every second until its end.
#[derive(Debug)]
struct Scraper {
    state: Arc<(AtomicBool, AtomicU64, AtomicU64)>,
    thread: thread::JoinHandle<()>,
}

impl Scraper {
    fn start(address: SocketAddr) -> Self {
        let state = Arc::new((AtomicBool::new(false), AtomicU64::new(0), AtomicU64::new(0)));
        let shared = Arc::clone(&state);
        let thread = thread::spawn(move || {
            while !shared.0.load(Ordering::Relaxed) {
                let is_good = http::get(address, "/metrics").is_ok_and(|response| response.status == 200);
                let counter = if is_good { &shared.1 } else { &shared.2 };
                counter.fetch_add(1, Ordering::Relaxed);
                thread::sleep(SCRAPE_INTERVAL);
            }
        });
        Self { state, thread }
    }

    /// Scrapes that were answered, and those that were not.
    fn end(self) -> (u64, u64) {
        self.state.0.store(true, Ordering::Relaxed);
        // Its panic would be a failed scrape of nobody's.
        let _ = self.thread.join();
        (
            self.state.1.load(Ordering::Relaxed),
            self.state.2.load(Ordering::Relaxed),
        )
    }
}

/// Sums by one label, for messages.
fn shown(left: &Numbers, right: &Numbers) -> String {
    let names: BTreeSet<_> = left.keys().chain(right.keys()).collect();
    let get = |numbers: &BTreeMap<String, u64>, name: &str| numbers.get(name).copied().unwrap_or(0);
    let different = names.into_iter().filter(|name| get(left, name) != get(right, name));
    let parts: Vec<_> = different
        .map(|name| format!("{name}: {} | {}", get(left, name), get(right, name)))
        .collect();
    parts.join(", ")
}
