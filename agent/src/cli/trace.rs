//! `wasmscope trace`: watches live processes until they end, the time is up, or Ctrl-C.

use std::{
    ffi::OsString,
    fs::File,
    io::{BufWriter, IsTerminal as _},
    net::SocketAddr,
    path::{Path, PathBuf},
    process::{ExitCode, Stdio},
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::Context as _;
use indicatif::{ProgressBar, ProgressStyle};
use tokio::{
    process::{Child, Command},
    signal::unix::{SignalKind, signal},
};

use super::{
    outputs::{self, Outputs},
    summary::grouped,
};
use crate::{
    clock::ClockAnchor,
    event::{Coverage, Event},
    governor::GovernorConfig,
    http,
    metrics::{Metrics, MetricsConfig},
    pipeline::{Detail, FILE_GRACE_NS, Options, Output, Pipeline, WatchReport},
    place::{KubernetesConfig, PlaceStage, Places},
    recording::Writer,
    self_observation::SelfObservation,
    sink::text::printable,
    span::{Capture, Trace},
};

pub(super) const EXAMPLES: &str = "\
Examples:
  wasmscope trace --pid 2113 --duration 10        the slowest of ten seconds, as Mermaid
  wasmscope trace -o slow.mmd -- ./host app.wasm  run a program under trace
  wasmscope trace --pid 2113 --pick failed --format text
  wasmscope trace --format otlp                   every wasm process of this machine, to a collector

Without --pid and without a command, every process that runs WebAssembly is traced.";

/// How often the line of progress is renewed.
const PROGRESS_INTERVAL: Duration = Duration::from_millis(250);
/// How often it is looked whether the watched processes still live.
const LIVENESS_INTERVAL: Duration = Duration::from_millis(200);

#[derive(Debug, clap::Args)]
pub(super) struct TraceArguments {
    /// Trace this process; may be given several times
    #[arg(long, value_name = "PID", value_parser = clap::value_parser!(u32).range(1..))]
    pid: Vec<u32>,
    /// Keep only what ran in this pod
    #[arg(long, value_name = "NAMESPACE/NAME", conflicts_with_all = ["command", "metrics_only"], value_parser = pod)]
    pod: Option<(String, String)>,
    /// Socket of the container runtime, which names pods: auto, off or a path
    #[arg(long, value_name = "SOCKET", env = "WASMSCOPE_CRI_SOCKET", default_value = "auto")]
    cri_socket: String,
    /// End after this many seconds [default: when the processes end, or at Ctrl-C]
    #[arg(long, value_name = "SECONDS", value_parser = seconds)]
    duration: Option<Duration>,
    #[command(flatten)]
    outputs: outputs::OutputArguments,
    /// Also write every event to this file, for `wasmscope replay`
    #[arg(long, value_name = "FILE")]
    record: Option<PathBuf>,
    /// What is observed: 0 = syscalls with their guest functions, no probe in the process; 1 = every crossing
    #[arg(long, value_name = "TIER", default_value_t = 1, value_parser = clap::value_parser!(u8).range(0..=1))]
    tier: u8,
    /// Count syscalls in the kernel and emit no events: the cheapest; needs --metrics-file or --metrics-listen
    #[arg(long, conflicts_with_all = ["record", "tier", "output"])]
    metrics_only: bool,
    /// Count in the kernel as well, so that metrics stay exact when events are lost
    #[arg(long, hide = true, conflicts_with = "metrics_only")]
    kernel_metrics: bool,
    /// Serve the metrics over HTTP while tracing, for example on 127.0.0.1:9464
    #[arg(long, value_name = "ADDRESS")]
    metrics_listen: Option<SocketAddr>,
    /// Size of the buffer between kernel and agent; what does not fit is lost and counted
    #[arg(long, value_name = "MIB", default_value_t = 16, value_parser = ring_mib)]
    ring_mib: u32,
    /// Pause probes in a process where they would take more than this share of the CPU time that it uses
    #[arg(long, value_name = "PERCENT|off", default_value = "off", value_parser = overhead_budget)]
    overhead_budget: OverheadBudget,
    /// Program to run and trace, with its arguments
    #[arg(last = true, value_name = "COMMAND", conflicts_with = "pid")]
    command: Vec<OsString>,
}

fn seconds(text: &str) -> Result<Duration, String> {
    let seconds: f64 = text
        .parse()
        .map_err(|_| format!("{text:?} is not a number of seconds"))?;
    Duration::try_from_secs_f64(seconds)
        .ok()
        .filter(|duration| !duration.is_zero())
        .ok_or_else(|| "must be more than 0".to_owned())
}

fn pod(text: &str) -> Result<(String, String), String> {
    match text.split_once('/') {
        Some((namespace, name)) if !namespace.is_empty() && !name.is_empty() => {
            Ok((namespace.to_owned(), name.to_owned()))
        }
        _ => Err("must be a namespace and a name, with a slash between them".to_owned()),
    }
}

/// Most that probes may take of a process's CPU time, percent, if there is a limit.
#[derive(Clone, Copy, Debug)]
struct OverheadBudget(Option<f64>);

fn overhead_budget(text: &str) -> Result<OverheadBudget, String> {
    if text == "off" {
        return Ok(OverheadBudget(None));
    }
    let percent = text
        .parse()
        .map_err(|_| format!("{text:?} is neither a percentage nor off"))?;
    governor_config(percent).validate()?;
    Ok(OverheadBudget(Some(percent)))
}

fn governor_config(process_budget_percent: f64) -> GovernorConfig {
    GovernorConfig {
        process_budget_percent,
        // Somebody looks at what is traced: the machine as a whole is theirs.
        node_budget_percent: 100.0,
        ..GovernorConfig::default()
    }
}

fn ring_mib(text: &str) -> Result<u32, String> {
    match text.parse::<u32>() {
        Ok(mib @ 1..=1024) if mib.is_power_of_two() => Ok(mib),
        _ => Err("must be a power of two from 1 to 1024".to_owned()),
    }
}

pub(super) fn run(arguments: TraceArguments) -> anyhow::Result<ExitCode> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()
        .context("cannot start the event loop")?;
    runtime.block_on(trace(arguments))
}

async fn trace(arguments: TraceArguments) -> anyhow::Result<ExitCode> {
    let clock = ClockAnchor::now();
    let detail = match (arguments.metrics_only, arguments.tier) {
        (true, _) => Detail::MetricsOnly,
        (false, 0) => Detail::Node,
        (false, _) => Detail::Boundary,
    };
    anyhow::ensure!(
        detail != Detail::MetricsOnly || arguments.outputs.has_metrics() || arguments.metrics_listen.is_some(),
        "--metrics-only needs --metrics-file or --metrics-listen: it has nothing else to show"
    );
    // Everything that can be wrong with the request is found before anything is loaded or started.
    let kubernetes = KubernetesConfig {
        cri_socket: arguments.cri_socket.clone(),
        api_server: "off".to_owned(),
        ..KubernetesConfig::default()
    };
    let places = Places::start(&kubernetes).context("cannot ask who runs where")?;
    let program = arguments.command.first().map(find_program).transpose()?;
    let watch_all = arguments.pid.is_empty() && program.is_none();
    let detail = match detail {
        Detail::Boundary if arguments.kernel_metrics => Detail::BoundaryAndMetrics,
        detail => detail,
    };
    let metrics = if detail.has_aggregates() {
        Metrics::with_aggregates(MetricsConfig::default())
    } else {
        Metrics::new()
    };
    let mut outputs = Outputs::open(arguments.outputs, clock, metrics)?;
    let recording = arguments
        .record
        .as_deref()
        .map(|path| open_recording(path, clock))
        .transpose()?;
    let mut interrupts = signal(SignalKind::interrupt()).context("cannot handle Ctrl-C")?;
    let mut terminations = signal(SignalKind::terminate()).context("cannot handle SIGTERM")?;

    let mut pipeline = Pipeline::start(Options {
        ring_bytes: arguments.ring_mib << 20,
        watch_all,
        detail,
        file_grace_ns: FILE_GRACE_NS,
        names_bytes: crate::process::code_store::MAX_NODE_BYTES,
        open_traces_bytes: crate::correlate::MAX_OPEN_BYTES,
    })
    .context("cannot trace")?;
    if let Some(percent) = arguments.overhead_budget.0 {
        let names = places.clone();
        pipeline.start_governor(governor_config(percent), move |place| names.named(place));
    }
    let observation = SelfObservation::new(&mut pipeline);
    outputs.metrics().add_collector(Box::new(observation));
    let mut session = Session {
        recording,
        outputs: &mut outputs,
        watched: arguments.pid.clone(),
        pod: arguments.pod.clone(),
        places: PlaceStage::new(places.clone(), kubernetes.max_held),
    };
    let server = match arguments.metrics_listen {
        Some(address) => Some(
            http::Server::start(address, metrics_page(session.outputs.metrics()))
                .await
                .with_context(|| format!("cannot serve metrics on {address}"))?,
        ),
        None => None,
    };
    if let Some(server) = &server {
        eprintln!("metrics on http://{}/metrics", server.address());
    }

    let mut child = session.begin(&mut pipeline, &arguments.pid, program.as_deref(), &arguments.command)?;
    let deadline = arguments.duration.map(|duration| Instant::now() + duration);
    let progress = progress_line();
    let mut next_liveness = Instant::now() + LIVENESS_INTERVAL;
    let mut next_progress = Instant::now() + PROGRESS_INTERVAL;
    let started = Instant::now();
    let mut status = None;
    loop {
        tokio::select! {
            () = pipeline.ready() => {}
            _ = interrupts.recv() => break,
            _ = terminations.recv() => break,
            ended = wait_for(&mut child), if status.is_none() => status = Some(ended.context("cannot wait for the program")?),
        }
        session.take(pipeline.turn())?;
        session.take(pipeline.govern())?;
        let now = Instant::now();
        if deadline.is_some_and(|deadline| now >= deadline) {
            break;
        }
        if now >= next_liveness {
            next_liveness = now + LIVENESS_INTERVAL;
            pipeline.check_liveness();
            session.take_aggregates(&mut pipeline);
            // A program's children may outlive it, and are traced as well.
            let main_ended = child.is_none() || status.is_some();
            if !watch_all && main_ended && session.all_gone(&pipeline) {
                break;
            }
        }
        if now >= next_progress {
            next_progress = now + PROGRESS_INTERVAL;
            progress.set_message(format!(
                "{:>3} s  {}  {} lost  [Ctrl-C to stop]",
                started.elapsed().as_secs(),
                session.outputs.summary().totals(),
                grouped(pipeline.lost_count())
            ));
        }
    }
    progress.finish_and_clear();
    let (last, capture) = pipeline.finish();
    session.take(last)?;
    session.settle_places().await?;
    session.outputs.metrics().set_pod_resolutions(&places.counts());
    session.take_aggregates(&mut pipeline);
    session.finish_recording(&capture)?;
    // Detaching takes a while with many sites, and nobody has to wait for it to see the result.
    let detaching = tokio::task::spawn_blocking(move || drop(pipeline));
    let result = if detail == Detail::MetricsOnly {
        outputs.finish_metrics_only()
    } else {
        eprint!("{}", outputs.summary());
        account(&capture);
        outputs.finish(&capture).await
    };
    if let Some(server) = server {
        server.shutdown().await;
    }
    detaching.await.context("while detaching")?;
    result?;
    Ok(match status {
        Some(status) if !status.success() => {
            eprintln!("the program ended with {status}");
            ExitCode::from(u8::try_from(status.code().unwrap_or(1)).unwrap_or(1))
        }
        _ => ExitCode::SUCCESS,
    })
}

fn metrics_page(metrics: Arc<Metrics>) -> axum::Router {
    http::router(
        http::metrics_routes(metrics),
        "wasmscope\n\n/metrics   metrics, as OpenMetrics or Prometheus text\n",
    )
}

struct Session<'a> {
    outputs: &'a mut Outputs,
    recording: Option<(Writer<BufWriter<File>>, PathBuf)>,
    watched: Vec<u32>,
    pod: Option<(String, String)>,
    places: PlaceStage,
}

impl Session<'_> {
    fn begin(
        &mut self,
        pipeline: &mut Pipeline,
        pids: &[u32],
        program: Option<&Path>,
        command: &[OsString],
    ) -> anyhow::Result<Option<Child>> {
        for pid in pids {
            let (report, events) = pipeline.watch(*pid)?;
            self.record(&events)?;
            self.outputs.events(&events);
            tell_watching(&report);
        }
        let Some(program) = program else {
            if pids.is_empty() {
                let (reports, events) = pipeline.watch_running().context("cannot list processes")?;
                self.record(&events)?;
                self.outputs.events(&events);
                for report in &reports {
                    tell_watching(report);
                }
                eprintln!("watching every process that runs WebAssembly");
            }
            return Ok(None);
        };
        let host = pipeline
            .prepare(program)
            .with_context(|| format!("cannot read {}", program.display()))?;
        pipeline.adopt_children(program)?;
        let child = Command::new(program)
            .args(&command[1..])
            .stdin(Stdio::inherit())
            .spawn()
            .with_context(|| format!("cannot run {}", program.display()));
        pipeline.disown_children();
        let child = child?;
        self.watched.extend(child.id());
        match host {
            Some(host) => eprintln!(
                "watching {}: {}, {}",
                program.display(),
                host.runtime_name,
                in_words(host.coverage, host.site_count, &host.limits)
            ),
            None => eprintln!(
                "watching {}: no runtime in it yet, its libraries are looked at when they publish code",
                program.display()
            ),
        }
        Ok(Some(child))
    }

    fn take(&mut self, output: Output) -> anyhow::Result<()> {
        self.record(&output.events)?;
        self.outputs.events(&output.events);
        self.outputs.losses(&output.losses);
        let traces = self.places.pass(output.traces);
        self.show(traces)
    }

    fn show(&mut self, mut traces: Vec<Trace>) -> anyhow::Result<()> {
        if let Some((namespace, name)) = &self.pod {
            traces.retain(|trace| {
                let place = &trace.process.place;
                place.namespace.as_ref() == Some(namespace) && place.pod_name.as_ref() == Some(name)
            });
        }
        self.outputs.traces(traces)
    }

    /// Waits, not for long, for the pods of the last traces.
    async fn settle_places(&mut self) -> anyhow::Result<()> {
        // No longer than a trace ever waits.
        let until = std::time::Instant::now() + Duration::from_mins(10);
        let traces = self.places.finish(until).await;
        self.show(traces)
    }

    fn take_aggregates(&mut self, pipeline: &mut Pipeline) {
        let metrics = self.outputs.metrics();
        metrics.observe_kernel(pipeline);
        for row in pipeline.collect_aggregates() {
            metrics.observe_aggregate(&row);
        }
    }

    fn record(&mut self, events: &[Event]) -> anyhow::Result<()> {
        if let Some((writer, path)) = &mut self.recording {
            for event in events {
                writer
                    .event(event)
                    .with_context(|| format!("while writing {}", path.display()))?;
            }
        }
        Ok(())
    }

    fn finish_recording(&mut self, capture: &Capture) -> anyhow::Result<()> {
        if let Some((writer, path)) = self.recording.take() {
            writer
                .finish(capture)
                .with_context(|| format!("while writing {}", path.display()))?;
        }
        Ok(())
    }

    fn all_gone(&self, pipeline: &Pipeline) -> bool {
        pipeline.watched_count() == 0 && self.watched.iter().all(|pid| !crate::process::describe::is_alive(*pid))
    }
}

async fn wait_for(child: &mut Option<Child>) -> std::io::Result<std::process::ExitStatus> {
    match child {
        Some(child) => child.wait().await,
        None => std::future::pending().await,
    }
}

fn open_recording(path: &Path, clock: ClockAnchor) -> anyhow::Result<(Writer<BufWriter<File>>, PathBuf)> {
    // Written in place rather than at the end: what has been recorded survives the agent being killed.
    let file = File::create(path).with_context(|| format!("cannot write {}", path.display()))?;
    let writer = Writer::new(BufWriter::new(file), clock, crate::pipeline::kernel_release())
        .with_context(|| format!("while writing {}", path.display()))?;
    Ok((writer, path.to_owned()))
}

/// As a shell would find it.
fn find_program(name: &OsString) -> anyhow::Result<PathBuf> {
    let path = Path::new(name);
    let found = if path.components().count() > 1 {
        path.is_file().then(|| path.to_owned())
    } else {
        std::env::var_os("PATH").and_then(|directories| {
            std::env::split_paths(&directories)
                .map(|directory| directory.join(path))
                .find(|candidate| candidate.is_file())
        })
    };
    found.with_context(|| format!("cannot run {}: no such program", path.display()))
}

fn tell_watching(report: &WatchReport) {
    let process = &report.process;
    let version = process.runtime_version.as_deref().unwrap_or("(version not known yet)");
    eprintln!(
        "watching {} (pid {}): {} {version} · {} module{} · {}",
        printable(&process.command),
        process.pid,
        process.runtime_name,
        report.module_count,
        if report.module_count == 1 { "" } else { "s" },
        in_words(report.coverage, report.site_count, &process.limits)
    );
}

fn in_words(coverage: Coverage, site_count: usize, limits: &[String]) -> String {
    let tier = if coverage.activations {
        format!("tier 1 ({site_count} sites)")
    } else {
        "tier 0 (no probe in the process)".to_owned()
    };
    if limits.is_empty() {
        tier
    } else {
        format!("{tier} · {}", limits.join(" · "))
    }
}

/// What was lost, if anything was.
fn account(capture: &Capture) {
    let lost: Vec<_> = capture
        .losses
        .iter()
        .map(|loss| format!("{} {}/{}", grouped(loss.count), loss.layer, loss.reason))
        .collect();
    if lost.is_empty() {
        eprintln!("{} records, 0 lost", grouped(capture.emitted_count));
    } else {
        eprintln!("{} records, lost: {}", grouped(capture.emitted_count), lost.join(", "));
    }
}

fn progress_line() -> ProgressBar {
    if !std::io::stderr().is_terminal() {
        return ProgressBar::hidden();
    }
    let style = ProgressStyle::with_template("  {msg}").unwrap_or_else(|_| ProgressStyle::default_spinner());
    ProgressBar::new_spinner().with_style(style)
}
