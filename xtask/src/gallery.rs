//! `cargo xtask gallery`: pictures of the dashboards, drawn by Grafana's own components from a live Prometheus that scrapes a live agent, which
//! watches the demo's host and what else runs on the machine.

use std::fs;
use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpListener};
use std::path::PathBuf;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};

use crate::http;
use crate::process::Running;
use crate::setup;
use crate::step::{Step, run_noting};
use crate::toolchain::on_path;
use crate::workspace::Workspace;

const START_LIMIT: Duration = Duration::from_mins(2);
const END_LIMIT: Duration = Duration::from_secs(20);
/// What the demo's host is asked for, over and over.
const PATHS: [&str; 7] = [
    "/policy/cart",
    "/transform?op=gray",
    "/policy/checkout",
    "/transform?op=words",
    "/faulty?kind=memory_out_of_bounds",
    "/transform?op=upper",
    "/faulty?kind=host_error",
];

/// What runs beside it, one after the other.
const BESIDE: [&[&str]; 6] = [
    &["--scenario", "grow"],
    &["--scenario", "fuel", "--mode", "async", "--calls", "5"],
    &["--scenario", "coldstart", "--repeat", "2"],
    &["--scenario", "traps", "--calls", "2"],
    &["--calls", "5", "--output", "/dev/full"],
    // So many calls that probes are paused.
    &["--scenario", "burst", "--calls", "100000", "--repeat", "30"],
];
/// How long one of them waits for the agent to look at it.
const PACE: Duration = Duration::from_secs(2);
/// Between two requests: they are to be a service's, not a benchmark's.
const BETWEEN_REQUESTS: Duration = Duration::from_millis(20);
/// What kube-state-metrics and the kubelet say of a pod: here, of the one that everything is taken to be in. Counters grow by as much with each scrape.
const OF_KUBERNETES: &str = "tests/fixtures/kubernetes.prom";
const POD: &str = "namespace: shop, pod: edge-7d9f8c6b5-x2x4z, container: guest";

const SECONDS: u64 = 120;

/// Draw each dashboard as a PNG in target/gallery, from a Prometheus that scrapes a real agent under load.
///
/// A renderer with Grafana's published components, not a Grafana server. Needs root, Node.js, Chromium and Prometheus.
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// Seconds of load, which is what the pictures show.
    #[arg(long, value_name = "N", default_value_t = SECONDS)]
    seconds: u64,
}

impl Default for Options {
    fn default() -> Self {
        Self { seconds: SECONDS }
    }
}

/// Runs load, trace and Prometheus, then the renderer.
pub(crate) fn run(workspace: &Workspace, options: &Options) -> Result<()> {
    setup::ensure_ebpf(workspace)?;
    let missing = setup::ensure_tools(workspace, &["prometheus"])?;
    ensure!(missing.is_empty(), "{}", missing.join("; "));
    for (program, package) in [("node", "nodejs"), ("npm", "npm"), ("chromium", "chromium")] {
        ensure!(!on_path(program).is_empty(), "no {program}: apt-get install {package}");
    }
    let renderer = workspace.root.join("dashboards/renderer");
    if !renderer.join("node_modules").is_dir() {
        let words = ["ci", "--ignore-scripts", "--no-audit", "--no-fund"];
        Step::run(
            "installing Grafana's components (npm ci)",
            Command::new("npm").args(words).current_dir(&renderer),
        )?;
    }
    crate::demo::build(workspace, &["wasmscope", "wasmscope-test-hosts"], None)?;
    let directory = workspace.target.join("gallery");
    if directory.exists() {
        fs::remove_dir_all(&directory).with_context(|| format!("while emptying {}", directory.display()))?;
    }
    fs::create_dir_all(&directory).with_context(|| format!("while making {}", directory.display()))?;

    let mut host = Running::start(Command::new(workspace.release_binary("edge-host")).args([
        "--listen",
        "127.0.0.1:0",
        "--threads",
        "2",
    ]))?;
    let address: SocketAddr = host.wait_for("it listens", START_LIMIT, |line| {
        line.strip_prefix("listening on ")?.trim().parse().ok()
    })?;
    let metrics = free_port()?;
    let lock = format!("instance.lock_file={}", directory.join("lock").display());
    let run_time = "capture.program_run_time=true";
    let words = [
        "agent",
        "--listen",
        &metrics.to_string(),
        "--set",
        &lock,
        "--set",
        run_time,
    ]
    .map(str::to_owned);
    let mut agent = Running::start(
        Command::new(workspace.release_binary("wasmscope"))
            .args(words)
            // Nobody listens there: there are losses to show.
            .env("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:1")
            .env("OTEL_EXPORTER_OTLP_TIMEOUT", "1000"),
    )?;
    agent.wait_for("it is ready", START_LIMIT, |line| line.ends_with("ready").then_some(()))?;
    let kubernetes = serve_kubernetes(workspace)?;
    let prometheus_address = free_port()?;
    let config = directory.join("prometheus.yaml");
    fs::write(&config, configuration(workspace, metrics, kubernetes))
        .context("while writing Prometheus's configuration")?;
    let mut prometheus = Running::start(
        Command::new("prometheus")
            .arg(format!("--config.file={}", config.display()))
            .arg(format!("--storage.tsdb.path={}", directory.join("data").display()))
            .arg(format!("--web.listen-address={prometheus_address}"))
            .arg("--enable-feature=exemplar-storage"),
    )?;
    let step = Step::start("load");
    let load = Load::start(workspace, address);
    let end = Instant::now() + Duration::from_secs(options.seconds);
    while Instant::now() < end {
        crate::interrupt::check()?;
        std::thread::sleep(PACE);
    }
    step.done(&format!("{} s", options.seconds));

    let mut dashboards: Vec<PathBuf> = fs::read_dir(workspace.root.join("dashboards/grafana"))?
        .map(|entry| entry.map(|entry| entry.path()))
        .collect::<Result<_, _>>()?;
    dashboards.sort();
    let chromium = on_path("chromium").into_iter().next().context("no chromium")?;
    let step = Step::start("drawing");
    let pictures = run_noting(
        Command::new("node")
            .arg(renderer.join("render.mjs"))
            .arg(format!("http://{prometheus_address}"))
            .arg(options.seconds.to_string())
            .args([&directory, &chromium])
            .args(&dashboards),
        |line| step.note(line),
    )?;
    step.done("done");
    load.end()?;
    for running in [&mut agent, &mut prometheus, &mut host] {
        running.interrupt()?;
        running.wait(END_LIMIT)?;
    }
    ensure!(
        pictures.lines().count() == dashboards.len(),
        "not every dashboard was drawn"
    );
    println!("{}", pictures.trim());
    Ok(())
}

/// Requests and programs that go on while pictures are drawn.
struct Load {
    is_over: Arc<AtomicBool>,
    threads: Vec<JoinHandle<Result<()>>>,
}

impl Load {
    fn start(workspace: &Workspace, edge: SocketAddr) -> Self {
        let is_over = Arc::new(AtomicBool::new(false));
        let requests = repeat(&is_over, move || {
            for path in PATHS {
                http::get(edge, path)?;
                std::thread::sleep(BETWEEN_REQUESTS);
            }
            Ok(())
        });
        let program = workspace.release_binary("workload");
        let mut next = BESIDE.iter().cycle();
        let programs = repeat(&is_over, move || {
            let arguments = next.next().copied().unwrap_or_default();
            let mut running = Running::start_with_stdin(Command::new(&program).args(arguments).arg("--wait"))?;
            std::thread::sleep(PACE);
            running.send_line("go")?;
            running.close_stdin();
            running.wait(END_LIMIT).map(drop)
        });
        Self {
            is_over,
            threads: vec![requests, programs],
        }
    }

    /// Ends it; an error if it ended before.
    fn end(self) -> Result<()> {
        self.is_over.store(true, Ordering::Relaxed);
        for thread in self.threads {
            thread.join().ok().context("the load panicked")??;
        }
        Ok(())
    }
}

fn repeat(is_over: &Arc<AtomicBool>, mut work: impl FnMut() -> Result<()> + Send + 'static) -> JoinHandle<Result<()>> {
    let is_over = Arc::clone(is_over);
    std::thread::spawn(move || {
        while !is_over.load(Ordering::Relaxed) {
            work()?;
        }
        Ok(())
    })
}

/// The labels that a cluster's scrape would add, and those of a pod that the agent would add in a cluster.
fn configuration(workspace: &Workspace, metrics: SocketAddr, kubernetes: SocketAddr) -> String {
    let rules = workspace.root.join("dashboards/rules");
    format!(
        "global: {{scrape_interval: 2s, evaluation_interval: 5s}}\nrule_files: ['{rules}/recording.yaml', '{rules}/alerts.yaml']\nscrape_configs:\n\
         - job_name: wasmscope\n  honor_labels: true\n  static_configs:\n  - targets: ['{metrics}']\n    \
         labels: {{cluster: demo, node: node-a, {POD}}}\n\
         - job_name: kubernetes\n  honor_labels: true\n  static_configs:\n  - targets: ['{kubernetes}']\n    labels: {{cluster: demo}}\n",
        rules = rules.display()
    )
}

/// Answers scrapes with [`OF_KUBERNETES`] until this process ends.
fn serve_kubernetes(workspace: &Workspace) -> Result<SocketAddr> {
    let path = workspace.root.join(OF_KUBERNETES);
    let text = fs::read_to_string(&path).with_context(|| format!("while reading {}", path.display()))?;
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let address = listener.local_addr()?;
    std::thread::spawn(move || {
        for (scrape, connection) in listener.incoming().enumerate() {
            // Whoever does not read the answer has none.
            let _ = connection.and_then(|mut connection| {
                let mut head = [0; 4096];
                let _ = connection.read(&mut head)?;
                let body = grown(&text, scrape as f64 + 1.0);
                let length = body.len();
                write!(
                    connection,
                    "HTTP/1.1 200 OK\r\nContent-Type: text/plain; version=0.0.4\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n{body}"
                )
            });
        }
    });
    Ok(address)
}

/// An exposition with all counters `times` as large.
fn grown(text: &str, times: f64) -> String {
    let lines = text.lines().map(|line| {
        let (series, value) = line.rsplit_once(' ')?;
        let value: f64 = value.parse().ok()?;
        series
            .contains("_total{")
            .then(|| format!("{series} {}\n", value * times))
    });
    let lines = lines.zip(text.lines());
    lines
        .map(|(grown, line)| grown.unwrap_or_else(|| format!("{line}\n")))
        .collect()
}

fn free_port() -> Result<SocketAddr> {
    Ok(TcpListener::bind("127.0.0.1:0")?.local_addr()?)
}
