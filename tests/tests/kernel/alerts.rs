//! Alerts of `dashboards/rules` end to end: a real agent has a fault, a real Prometheus sees it, and a real Alertmanager tells a webhook, also when
//! it is over. Only for how long an alert has to hold is shortened.

use std::process::Command;
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver};
use std::time::Instant;

use rustix::process::Signal;
use serde_json::{Value, json};
use tempfile::tempdir;
use wasmscope_tests::dashboards;
use wasmscope_tests::environment::Kernel;
use wasmscope_tests::http::Server;
use wasmscope_tests::load::Load;
use wasmscope_tests::node_agent::NodeAgent;
use wasmscope_tests::prometheus::{Histograms, Prometheus, free_address, is_installed};
use wasmscope_tests::running::{DEADLINE, Running};

/// Nobody listens there: what is exported is lost.
const NO_COLLECTOR: [(&str, &str); 2] = [
    ("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:1"),
    ("OTEL_EXPORTER_OTLP_TIMEOUT", "500"),
];

/// Waits until the webhook is told this of an alert.
fn told(webhook: &Receiver<Value>, name: &str, status: &str) -> Value {
    let begun = Instant::now();
    loop {
        let rest = DEADLINE.saturating_sub(begun.elapsed());
        let message = webhook.recv_timeout(rest);
        let message = message.unwrap_or_else(|error| panic!("{name} is never {status}: {error}"));
        let alerts = message["alerts"].as_array().unwrap();
        let is_wanted = |alert: &&Value| alert["labels"]["alertname"] == name && alert["status"] == status;
        if let Some(alert) = alerts.iter().find(is_wanted) {
            return alert.clone();
        }
    }
}

/// That the link is to the paragraph that the runbook has of it.
fn assert_links_to_runbook(alert: &Value) {
    let name = alert["labels"]["alertname"].as_str().unwrap();
    let url = alert["annotations"]["runbook_url"].as_str().unwrap();
    assert!(
        url.ends_with(&format!("dashboards/runbook.md#{}", name.to_lowercase())),
        "{url}"
    );
    let runbook = std::fs::read_to_string(dashboards::directory().join("runbook.md")).unwrap();
    assert!(runbook.lines().any(|line| line == format!("### {name}")), "{name}");
}

#[test]
fn alerts_of_a_failing_export_and_of_an_agent_that_is_gone_reach_a_webhook_and_the_return_does_too() {
    let Some(_kernel) = Kernel::acquire() else { return };
    if !is_installed("prometheus-alertmanager", "prometheus-alertmanager") {
        return;
    }
    let directory = tempdir().unwrap();
    let directory = directory.path();
    let start = |listen: &str| {
        NodeAgent::start(directory, listen, |command| {
            command.envs(NO_COLLECTOR);
            // What cannot be delivered is not waited for.
            command.args(["--set", "shutdown.deadline_seconds=1"]);
        })
    };

    let (sender, webhook) = mpsc::channel();
    let receiver = Server::start(move |_, body| {
        // The test may be over.
        let _ = sender.send(serde_json::from_str(body).unwrap());
        String::new()
    });
    let config = directory.join("alertmanager.yaml");
    let text = json!({
        "route": {
            "receiver": "webhook", "group_by": ["alertname"],
            "group_wait": "0s", "group_interval": "1s", "repeat_interval": "1h",
        },
        "receivers": [{
            "name": "webhook",
            "webhook_configs": [{"url": format!("http://{}/", receiver.address()), "send_resolved": true}],
        }],
    });
    std::fs::write(&config, text.to_string()).unwrap();
    let manager = free_address();
    let mut command = Command::new("prometheus-alertmanager");
    command
        .arg(format!("--config.file={}", config.display()))
        .arg(format!("--storage.path={}", directory.join("alertmanager").display()))
        .arg(format!("--web.listen-address={manager}"))
        // One of its kind.
        .arg("--cluster.listen-address=");
    let alertmanager = Running::start(command);
    alertmanager.stderr_line(|line| line.contains("Listening on"));

    let agent = start("127.0.0.1:0");
    let address = agent.address.clone();
    let rules = dashboards::hurried_rules("alerts.yaml", directory);
    let configuration = format!(
        "global: {{scrape_interval: 1s, evaluation_interval: 1s}}\nrule_files: ['{}']\n\
         alerting: {{alertmanagers: [{{static_configs: [{{targets: ['{manager}']}}]}}]}}\nscrape_configs:\n\
         - job_name: wasmscope\n  honor_labels: true\n  static_configs:\n  - targets: ['{address}']\n    labels: {{cluster: demo, node: node-a}}\n",
        rules.display(),
    );
    let Some(_prometheus) = Prometheus::start(directory, &configuration, Histograms::Classic) else {
        return;
    };

    let agent = Arc::new(agent);
    let watching = Arc::clone(&agent);
    let load = Load::start(move || watching.run(&[&["--calls", "5", "--repeat", "20"]]));
    let failing = told(&webhook, "WasmscopeExportFailing", "firing");
    drop(load);
    let labels = json!({
        "alertname": "WasmscopeExportFailing", "severity": "warning",
        "cluster": "demo", "node": "node-a", "instance": address,
    });
    assert_eq!(failing["labels"], labels);
    assert_eq!(
        failing["annotations"]["summary"],
        "Traces of node-a do not reach the collector"
    );
    assert_links_to_runbook(&failing);

    let agent = Arc::into_inner(agent).unwrap();
    agent.running.signal(Signal::TERM);
    drop(agent.running.finish());
    let down = told(&webhook, "WasmscopeDown", "firing");
    let labels = json!({
        "alertname": "WasmscopeDown", "severity": "critical", "job": "wasmscope",
        "cluster": "demo", "node": "node-a", "instance": address,
    });
    assert_eq!(down["labels"], labels);
    assert_eq!(down["annotations"]["summary"], "The agent on node-a does not answer");
    assert_links_to_runbook(&down);

    let returned = start(&address);
    let up = told(&webhook, "WasmscopeDown", "resolved");
    assert_eq!(up["labels"], labels);
    assert_eq!(up["startsAt"], down["startsAt"], "it is the same alert");
    assert_ne!(up["endsAt"], down["endsAt"]);
    drop(returned);
}
