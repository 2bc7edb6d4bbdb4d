//! `cargo xtask gallery`: pictures of the dashboards, drawn by Grafana's own components from a live Prometheus that scrapes a live trace of the demo's host.

use std::fs;
use std::net::{SocketAddr, TcpListener};
use std::path::PathBuf;
use std::process::Command;
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

/// Draw each dashboard as a PNG in target/gallery, from a Prometheus that scrapes a real trace under load.
///
/// A renderer with Grafana's published components, not a Grafana server. Needs root, Node.js, Chromium and Prometheus.
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// Seconds of load, which is what the pictures show.
    #[arg(long, value_name = "N", default_value_t = 120)]
    seconds: u64,
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
    let mut agent = Running::start(Command::new(workspace.release_binary("wasmscope")).args([
        "trace",
        "--pid",
        &host.id().to_string(),
        "--metrics-listen",
        &metrics.to_string(),
        "--format",
        "json",
        "--output",
        "/dev/null",
    ]))?;
    agent.wait_for("its probes are active", START_LIMIT, |line| {
        line.starts_with("watching").then_some(())
    })?;
    let prometheus_address = free_port()?;
    let config = directory.join("prometheus.yaml");
    fs::write(&config, configuration(workspace, metrics)).context("while writing Prometheus's configuration")?;
    let mut prometheus = Running::start(
        Command::new("prometheus")
            .arg(format!("--config.file={}", config.display()))
            .arg(format!("--storage.tsdb.path={}", directory.join("data").display()))
            .arg(format!("--web.listen-address={prometheus_address}"))
            .arg("--enable-feature=exemplar-storage"),
    )?;
    let step = Step::start("load");
    let end = Instant::now() + Duration::from_secs(options.seconds);
    while Instant::now() < end {
        crate::interrupt::check()?;
        for path in PATHS {
            http::get(address, path)?;
        }
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

/// The labels that a cluster's scrape would add.
fn configuration(workspace: &Workspace, metrics: SocketAddr) -> String {
    let rules = workspace.root.join("dashboards/rules");
    format!(
        "global: {{scrape_interval: 2s, evaluation_interval: 5s}}\nrule_files: ['{rules}/recording.yaml', '{rules}/alerts.yaml']\nscrape_configs:\n\
         - job_name: wasmscope\n  honor_labels: true\n  static_configs:\n  - targets: ['{metrics}']\n    \
         labels: {{cluster: demo, node: node-a, namespace: shop, pod: edge-host-0, container: edge-host}}\n",
        rules = rules.display()
    )
}

fn free_port() -> Result<SocketAddr> {
    Ok(TcpListener::bind("127.0.0.1:0")?.local_addr()?)
}
