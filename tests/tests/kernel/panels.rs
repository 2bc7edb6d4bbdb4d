//! Every query of the dashboards and every rule, asked of a real Prometheus that scrapes a real agent which watches the demo's host in a pod, and
//! more programs beside it.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::Instant;

use tempfile::tempdir;
use wasmscope_tests::containerd::{Containerd, Pod};
use wasmscope_tests::dashboards::{self, has_number};
use wasmscope_tests::environment::{self, Kernel};
use wasmscope_tests::http::{self, Server};
use wasmscope_tests::load::Load;
use wasmscope_tests::node_agent::NodeAgent;
use wasmscope_tests::prometheus::{Histograms, Prometheus, escaped, is_installed};
use wasmscope_tests::running::DEADLINE;

/// The pod that `kubernetes.prom` tells of.
const EDGE: Pod<'_> = Pod {
    uid: "9f7e5a6b-3c24-4ebf-8a01-5c6d7e8f9012",
    namespace: "shop",
    name: "edge-7d9f8c6b5-x2x4z",
    labels: &[("app", "edge")],
    container: "guest",
};
/// What kube-state-metrics and the kubelet say of it. Its counters are what they grow by with each scrape.
const OF_KUBERNETES: &str = include_str!("../../fixtures/kubernetes.prom");
/// What the demo's host is asked for, over and over.
const PATHS: [&str; 7] = [
    "policy/cart",
    "transform?op=gray",
    "policy/checkout",
    "transform?op=words",
    "faulty?kind=memory_out_of_bounds",
    "transform?op=upper",
    "faulty?kind=host_error",
];
/// What runs beside it, all of them at once and again and again. One writes to a disk that is full.
const BESIDE: [&[&str]; 8] = [
    &["--scenario", "traps", "--calls", "3"],
    &["--scenario", "grow"],
    &["--scenario", "fuel", "--mode", "async", "--calls", "5"],
    &["--scenario", "epoch", "--calls", "5"],
    &["--scenario", "coldstart", "--repeat", "2"],
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
    &["--calls", "5", "--output", "/dev/full"],
    // So many calls that probes are paused.
    &["--scenario", "burst", "--calls", "100000", "--repeat", "30"],
];
/// Whatever has a budget of CPU may use most of it, but not all.
const CONFIG: &str = "[governor]\nprocess_budget_percent = 40.0\nprocess_floor_percent = 0.1\nnode_budget_percent = 100.0\nmin_backoff_ms = 100\n[capture]\nprogram_run_time = true\n";
/// Four times the time between scrapes, as Grafana has it at the least.
const RATE_INTERVAL: &str = "4s";

/// Files that a program is linked with.
fn libraries(program: &Path) -> Vec<PathBuf> {
    let output = Command::new("ldd").arg(program).output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    let words = text.split_whitespace().filter(|word| word.starts_with('/'));
    words.map(PathBuf::from).collect()
}

/// Runs the demo's host in a pod; where it listens.
fn run_edge(containerd: &mut Containerd, directory: &Path) -> String {
    let program = environment::test_host("edge-host");
    let scratch = directory.join("scratch");
    fs::create_dir(&scratch).unwrap();
    let libraries = libraries(&program);
    let files: Vec<_> = libraries.iter().map(|path| fs::canonicalize(path).unwrap()).collect();
    let mut mounts = vec![(program.as_path(), "/edge-host"), (&scratch, "/tmp")];
    let inside = libraries.iter().map(|path| path.to_str().unwrap());
    mounts.extend(files.iter().map(PathBuf::as_path).zip(inside));
    let edge = containerd.run(EDGE, "exec /edge-host --listen 127.0.0.1:0 --threads 2", &mounts);
    let line = containerd.line(&edge, |line| line.starts_with("listening on "));
    line["listening on ".len()..].trim().to_owned()
}

/// Exposition of a kubelet and of kube-state-metrics: all counters grow.
fn of_kubernetes(scrape: u32) -> String {
    let grown = |line: &str| {
        let (series, value) = line.rsplit_once(' ')?;
        let value: f64 = value.parse().ok()?;
        let is_counter = series.split('{').next()?.ends_with("_total");
        is_counter.then(|| format!("{series} {}", value * f64::from(scrape)))
    };
    let lines = OF_KUBERNETES
        .lines()
        .map(|line| grown(line).unwrap_or_else(|| line.to_owned()));
    lines.collect::<Vec<_>>().join("\n") + "\n"
}

/// All that has to have data: its place, and how it is asked.
type Wanted<'a> = BTreeMap<String, Box<dyn Fn() -> bool + 'a>>;

fn wanted<'a>(prometheus: &'a Prometheus, begun: Instant) -> Wanted<'a> {
    let mut wanted: Wanted<'a> = BTreeMap::new();
    for target in dashboards::targets() {
        let place = target.place.clone();
        let seconds = move || begun.elapsed().as_secs().max(1);
        let known = wanted.insert(
            place,
            Box::new(move || target.has_data(prometheus, RATE_INTERVAL, seconds())),
        );
        assert!(known.is_none(), "two queries have the same place");
    }
    for (place, query) in dashboards::annotations() {
        let query = dashboards::substituted(&query, RATE_INTERVAL);
        wanted.insert(place, Box::new(move || has_number(&prometheus.query(&query))));
    }
    for (place, label, series) in dashboards::variables() {
        let path = format!(
            "label/{label}/values?match[]={}",
            escaped(&dashboards::substituted(&series, ""))
        );
        wanted.insert(
            place,
            Box::new(move || {
                prometheus
                    .get(&path)
                    .as_array()
                    .is_some_and(|values| !values.is_empty())
            }),
        );
    }
    for (_, name, _) in dashboards::rules("recording.yaml") {
        let query = format!("{{__name__=\"{name}\"}}");
        wanted.insert(name, Box::new(move || has_number(&prometheus.query(&query))));
    }
    wanted
}

#[test]
fn every_panel_variable_and_recorded_series_has_data_of_a_scraped_agent_under_load() {
    let Some(_kernel) = Kernel::acquire() else { return };
    if !is_installed("prometheus", "prometheus") {
        return;
    }
    let directory = tempdir().unwrap();
    let directory = directory.path();
    let Some(mut containerd) = Containerd::start(directory) else {
        return;
    };
    let config = directory.join("agent.toml");
    fs::write(&config, CONFIG).unwrap();
    let agent = NodeAgent::start(directory, "127.0.0.1:0", |command| {
        command.arg("--config").arg(&config);
        command.args(["--set", &format!("kubernetes.cri_socket={}", containerd.socket())]);
        // Nobody listens there: what is exported is lost.
        command.env("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:1");
        command.env("OTEL_EXPORTER_OTLP_TIMEOUT", "500");
    });
    let agent = Arc::new(agent);
    let edge = run_edge(&mut containerd, directory);

    let mut scrape = 0;
    let kubernetes = Server::start(move |_, _| {
        scrape += 1;
        of_kubernetes(scrape)
    });
    let [recording, alerts] =
        ["recording.yaml", "alerts.yaml"].map(|file| dashboards::hurried_rules(file, directory).display().to_string());
    let configuration = format!(
        "global: {{scrape_interval: 1s, evaluation_interval: 1s}}\nrule_files: ['{recording}', '{alerts}']\nscrape_configs:\n\
         - job_name: wasmscope\n  honor_labels: true\n  static_configs:\n  - targets: ['{}']\n    labels: {{cluster: demo, node: node-a}}\n\
         - job_name: kubernetes\n  honor_labels: true\n  static_configs:\n  - targets: ['{}']\n    labels: {{cluster: demo}}\n",
        agent.address,
        kubernetes.address(),
    );
    let prometheus = Prometheus::start(directory, &configuration, Histograms::Classic).unwrap();
    let begun = Instant::now();
    let requests = Load::start(move || {
        for path in PATHS {
            http::get(&format!("http://{edge}/{path}"));
        }
    });
    let watching = Arc::clone(&agent);
    let beside = Load::start(move || watching.run(&BESIDE));

    let mut wanted = wanted(&prometheus, begun);
    assert!(wanted.len() > 100);
    while !wanted.is_empty() {
        wanted.retain(|_, has_data| !has_data());
        assert!(requests.goes_on() && beside.goes_on(), "the load has failed");
        let missing: Vec<_> = wanted.keys().collect();
        assert!(
            begun.elapsed() < *DEADLINE,
            "no data after {:?}: {missing:#?}",
            begun.elapsed()
        );
    }
    let groups = prometheus.get("rules")["groups"].take();
    let rules: Vec<_> = groups
        .as_array()
        .unwrap()
        .iter()
        .flat_map(|group| group["rules"].as_array().unwrap())
        .collect();
    assert_eq!(
        rules.len(),
        dashboards::rules("recording.yaml").len() + dashboards::rules("alerts.yaml").len()
    );
    for rule in rules {
        assert_eq!(rule["health"], "ok", "{rule:#}");
    }
    drop((requests, beside));
}
