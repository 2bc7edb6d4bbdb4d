//! `cargo xtask demo`: traces a real HTTP service that runs guests, and shows what came out.

mod compare;
mod load;

use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use serde_json::Value;

use crate::agent_cli::{Agent, Depth, Format, Outputs};
use crate::http;
use crate::process::Running;
use crate::setup;
use crate::step::{Step, run_noting, seconds};
use crate::test::cannot_trace;
use crate::workspace::Workspace;

/// Trace a small real service and show a diagram of what happened, in one command.
///
/// Sets up, builds, starts an HTTP service that runs several WebAssembly guests, sends it requests, traces it, prints one diagram
/// and writes diagram, spans and metrics to target/demo. Where this machine cannot trace, it says why and shows a recorded run.
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// Show the recorded run even where this machine can trace.
    #[arg(long)]
    replay: bool,
}

/// How long the demo host may take to compile its guests and listen.
const HOST_LIMIT: Duration = Duration::from_mins(2);
/// How long it may take to end after the last response.
const END_LIMIT: Duration = Duration::from_secs(20);
const LISTENING: &str = "listening on ";

/// The recording shown where tracing is not possible, from the root of the repository.
pub(crate) const FIXTURE: &str = "tests/fixtures/demo.wasmscope";

/// What a run left in `target/demo`.
#[derive(Debug)]
pub(crate) struct Files {
    pub(crate) recording: PathBuf,
    diagram: PathBuf,
    spans: PathBuf,
    traces: PathBuf,
    metrics: PathBuf,
}

impl Files {
    /// Names in `directory`, which is made anew.
    pub(crate) fn new(directory: &Path) -> Result<Self> {
        if directory.exists() {
            fs::remove_dir_all(directory).with_context(|| format!("while emptying {}", directory.display()))?;
        }
        fs::create_dir_all(directory).with_context(|| format!("while creating {}", directory.display()))?;
        Ok(Self {
            recording: directory.join("demo.wasmscope"),
            diagram: directory.join("trace.mmd"),
            spans: directory.join("spans.otlp.json"),
            traces: directory.join("traces.json"),
            metrics: directory.join("metrics.txt"),
        })
    }
}

/// Runs the demo, live or from the recording.
pub(crate) fn run(workspace: &Workspace, options: &Options) -> Result<()> {
    let files = Files::new(&workspace.target.join("demo"))?;
    let reason = match setup::ensure_ebpf(workspace) {
        Ok(_) if options.replay => Some("--replay".to_owned()),
        Ok(_) => {
            build(workspace, &["wasmscope", "wasmscope-test-hosts"], None)?;
            cannot_trace(&agent(workspace))?
        }
        Err(error) => {
            crate::interrupt::check()?;
            Some(format!("the eBPF programs cannot be built: {error:#}"))
        }
    };
    match reason {
        None => live(workspace, &files).map(drop),
        Some(reason) => replayed(workspace, &files, &reason),
    }
}

/// Traces the demo host for real; `true` when it counted the same as the agent.
pub(crate) fn live(workspace: &Workspace, files: &Files) -> Result<bool> {
    let agent = agent(workspace);
    let step = Step::start("starting the demo host");
    let mut host = Running::start(Command::new(workspace.release_binary("edge-host")).args([
        "--listen",
        "127.0.0.1:0",
        "--threads",
        "2",
    ]))?;
    let address: SocketAddr = host.wait_for("it listens", HOST_LIMIT, |line| {
        line.strip_prefix(LISTENING)?.trim().parse().ok()
    })?;
    step.done(&format!("edge-host (pid {}) on {address}", host.id()));

    let step = Step::start("attaching");
    let outputs = Outputs {
        recording: Some(&files.recording),
        metrics: Some(&files.metrics),
        discard: true,
    };
    let tracing = agent.trace(host.id(), Depth::Full, outputs)?;
    step.done("wasmscope is watching it");

    let before = counts(address)?;
    let step = Step::start("sending requests");
    let sent = load::run(address, |done, all| step.note(&format!("{done} of {all}")))?;
    step.done(&sent.to_string());
    let after = counts(address)?;

    let step = Step::start("ending the trace");
    tracing.end()?;
    step.done("written");
    host.interrupt()?;
    host.wait(END_LIMIT)?;

    let diagram = draw(&agent, files, false)?;
    let traces =
        fs::read_to_string(&files.traces).with_context(|| format!("while reading {}", files.traces.display()))?;
    let comparison = compare::Comparison::new(&before, &after, &traces)?;
    println!("\n{diagram}\n\n{comparison}\n");
    say_where(workspace, files);
    Ok(comparison.is_equal())
}

fn replayed(workspace: &Workspace, files: &Files, reason: &str) -> Result<()> {
    println!("not traced here: {reason}");
    let recording = workspace.root.join(FIXTURE);
    if !recording.is_file() {
        bail!(
            "there is no recorded run at {FIXTURE} to show instead; `cargo xtask fixtures` makes one on a machine that can trace"
        );
    }
    let binary = workspace.release_binary("wasmscope");
    if setup::ensure_ebpf(workspace).is_err() || !binary.is_file() {
        // A replay loads no programs, so an empty object will do.
        let empty = workspace.target.join("demo/no-programs.o");
        fs::write(&empty, []).with_context(|| format!("while writing {}", empty.display()))?;
        let object = setup::ensure_ebpf(workspace).is_err().then_some(empty.as_path());
        let built = build(workspace, &["wasmscope"], object);
        fs::remove_file(&empty).with_context(|| format!("while removing {}", empty.display()))?;
        built?;
    }
    fs::copy(&recording, &files.recording).with_context(|| format!("while copying {}", recording.display()))?;
    let agent = agent(workspace);
    let diagram = draw(&agent, files, true)?;
    run_noting(&mut agent.replay_metrics(&files.recording, &files.metrics), |_| ())?;
    println!("\n==== REPLAY of a recorded run ({FIXTURE}), not of this machine ====\n\n{diagram}\n");
    println!("==== end of the REPLAY ====\n");
    say_where(workspace, files);
    Ok(())
}

fn draw(agent: &Agent, files: &Files, is_replay: bool) -> Result<String> {
    let step = Step::start("drawing");
    let outputs = [
        (Format::Mermaid, &files.diagram),
        (Format::Otlp, &files.spans),
        (Format::Json, &files.traces),
    ];
    for (format, path) in outputs {
        run_noting(
            &mut agent.replay(&files.recording, format, Some(path), is_replay),
            |line| {
                step.note(line);
            },
        )?;
    }
    let text = run_noting(
        &mut agent.replay(&files.recording, Format::Text, None, is_replay),
        |_| (),
    )?;
    step.done("done");
    Ok(text)
}

fn say_where(workspace: &Workspace, files: &Files) {
    let lines = [
        ("sequence diagram (Mermaid)", &files.diagram),
        ("spans (OTLP JSON)", &files.spans),
        ("traces (JSON)", &files.traces),
        ("metrics (OpenMetrics)", &files.metrics),
        ("recording (wasmscope replay)", &files.recording),
    ];
    for (what, path) in lines {
        println!("{what:<30}{}", workspace.shown(path));
    }
}

fn counts(address: SocketAddr) -> Result<Value> {
    let response = http::get(address, "/counts")?;
    serde_json::from_str(&response.body).context("while reading the host's own counts")
}

fn agent(workspace: &Workspace) -> Agent {
    Agent(workspace.release_binary("wasmscope"))
}

/// Builds the binaries of `packages` with the release profile, cargo showing its own progress; `object` stands in for the programs.
pub(crate) fn build(workspace: &Workspace, packages: &[&str], object: Option<&Path>) -> Result<()> {
    let started = std::time::Instant::now();
    let list = packages.join(" and ");
    eprintln!("building {list} (several minutes the first time) …");
    // One at a time: built together, their features would be united, and wasmtime compiled again for the tests.
    for package in packages {
        let mut command = workspace.cargo(["build", "--release", "--locked", "--bins", "--package", package]);
        if let Some(object) = object {
            command.env("WASMSCOPE_EBPF_OBJECT", object);
        }
        let status = command.status().context("while starting cargo")?;
        crate::interrupt::check()?;
        anyhow::ensure!(status.success(), "building {package} failed ({status})");
    }
    eprintln!("building {list}: done ({})", seconds(started.elapsed()));
    Ok(())
}
