//! `wasmscope agent` as a node runs it: from before and after the workloads to the end of its drain.

use std::path::Path;

use rustix::process::Signal;
use tempfile::TempDir;
use wasmscope_tests::agent::{run, wasmscope};
use wasmscope_tests::environment::{self, Kernel};
use wasmscope_tests::http;
use wasmscope_tests::otlp_receiver::{Answer, Receiver};
use wasmscope_tests::running::{DEADLINE, Running};
use wasmscope_tests::samples::{self, Sample, sums};
use wasmscope_tests::workload::{Counts, FOREVER, Numbers, Workload};

/// A running agent with a lock and a file of its own.
pub(crate) struct Node {
    pub(crate) agent: Running,
    address: String,
    directory: TempDir,
}

impl Node {
    pub(crate) fn start(variables: &[(&str, &str)]) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let agent = Running::start(command(directory.path(), variables));
        let line = agent.stderr_line(|line| line.contains("serving HTTP"));
        let address = line.rsplit_once("address=").unwrap().1.trim().to_owned();
        agent.stderr_line(|line| line.ends_with("ready"));
        Self {
            agent,
            address,
            directory,
        }
    }

    pub(crate) fn get(&self, path: &str) -> String {
        http::get(&format!("http://{}{path}", self.address))
    }

    /// Sums of a family, by one label.
    fn sums(&self, python: &Path, name: &str, label: &str) -> Numbers {
        sums(&self.scrape(python), name, label)
    }

    /// All metrics at one moment.
    pub(crate) fn scrape(&self, python: &Path) -> Vec<Sample> {
        let file = self.directory.path().join("scrape.txt");
        let response = self.get("/metrics");
        std::fs::write(&file, response.split_once("\r\n\r\n").unwrap().1).unwrap();
        samples::read(python, &file)
    }

    /// Gives it another configuration file, and waits until it has taken it.
    pub(crate) fn reload(&self, python: &Path, text: &str) {
        let results = || self.sums(python, "wasmscope_config_reloads_total", "result");
        let before = results();
        std::fs::write(self.directory.path().join("agent.toml"), text).unwrap();
        self.agent.signal(Signal::HUP);
        let begun = std::time::Instant::now();
        while results() == before {
            assert!(begun.elapsed() < *DEADLINE, "{text} is not taken");
        }
        assert_eq!(results().get("failure"), before.get("failure"), "{text}");
    }

    /// Waits until a sum of the metrics is `wanted`.
    pub(crate) fn wait_for(&self, python: &Path, name: &str, label: &str, wanted: &Numbers) {
        let begun = std::time::Instant::now();
        loop {
            let seen = self.sums(python, name, label);
            if seen == *wanted {
                return;
            }
            assert!(begun.elapsed() < *DEADLINE, "{seen:?} is not {wanted:?}");
        }
    }

    /// Waits until of so many traces that were kept so many have been taken by a collector, are lost on the way to it, and wait.
    pub(crate) fn settles(&self, python: &Path, kept: u64, [exported, lost, waiting]: [u64; 3]) {
        assert_eq!(kept, exported + lost + waiting);
        let begun = std::time::Instant::now();
        loop {
            let samples = self.scrape(python);
            let decisions = sums(&samples, "wasmscope_traces_sampled_total", "decision");
            let now_kept: u64 = ["kept", "parent_kept", "failed_kept"]
                .map(|kept| decisions[kept])
                .iter()
                .sum();
            let now_exported: u64 = sums(&samples, "wasmscope_traces_exported_total", "").values().sum();
            let mut losses = lost_on_export(&samples);
            // Of traces that were taken.
            losses.remove("spans_rejected");
            let now_lost: u64 = losses.values().sum();
            let now_waiting = sums(&samples, "wasmscope_queue_depth", "queue")["export"];
            if (now_kept, now_exported, now_lost, now_waiting) == (kept, exported, lost, waiting) {
                return;
            }
            assert!(
                begun.elapsed() < *DEADLINE,
                "of {now_kept} traces {now_exported} exported, {now_waiting} waiting, lost: {losses:?}"
            );
        }
    }

    /// Starts a workload that works when it is told to, and waits until the agent has looked at it.
    pub(crate) fn ready(&self, python: &Path, arguments: &[&str]) -> Workload {
        let looks = self.looks(python);
        let workload = Workload::ready(arguments);
        let begun = std::time::Instant::now();
        while self.looks(python) == looks {
            assert!(begun.elapsed() < *DEADLINE, "the agent does not look at a new process");
        }
        workload
    }

    /// Times that a process has been looked at.
    pub(crate) fn looks(&self, python: &Path) -> u64 {
        let kinds = self.sums(python, "wasmscope_events_total", "kind");
        kinds.get("process").copied().unwrap_or(0)
    }
}

/// What was lost on the way to the collector, by reason.
pub(crate) fn lost_on_export(samples: &[Sample]) -> Numbers {
    let of_layer = |sample: &&Sample| sample.labels.get("layer").is_some_and(|layer| layer == "export");
    let losses: Vec<_> = samples.iter().filter(of_layer).cloned().collect();
    sums(&losses, "wasmscope_events_lost_total", "reason")
}

fn command(directory: &Path, variables: &[(&str, &str)]) -> std::process::Command {
    let file = directory.join("agent.toml");
    if !file.exists() {
        std::fs::write(&file, "[log]\nfilter = \"info\"\n").unwrap();
    }
    let mut command = wasmscope();
    command
        .args(["agent", "--listen", "127.0.0.1:0", "--config"])
        .arg(file)
        .arg("--set")
        .arg(format!("instance.lock_file={}", directory.join("agent.lock").display()))
        .envs(variables.iter().copied());
    command
}

fn add(total: &mut Numbers, counts: Numbers) {
    for (name, count) in counts {
        *total.entry(name).or_default() += count;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_counts_what_ran_before_and_after_it_survives_reloads_and_delivers_every_span() {
    let Some(_kernel) = Kernel::acquire() else { return };
    let Some(python) = environment::python() else { return };
    let receiver = Receiver::start(Answer::Accept).unwrap();
    let before = Workload::ready(&["--calls", "20", "--repeat", "3"]);
    let node = Node::start(&[
        ("OTEL_EXPORTER_OTLP_ENDPOINT", &receiver.endpoint()),
        ("WASMSCOPE_TRACES__SAMPLING__TRACES_PER_SECOND", "1000000"),
        ("WASMSCOPE_TRACES__SAMPLING__BURST", "1000000"),
        // Nothing is to be paused, whatever it costs.
        ("WASMSCOPE_GOVERNOR__ENABLED", "false"),
    ]);
    assert!(node.get("/readyz").starts_with("HTTP/1.1 200"));
    assert!(node.get("/healthz").starts_with("HTTP/1.1 200"));

    let file = node.directory.path().join("agent.toml");
    std::fs::write(&file, "[log]\nfiltre = \"debug\"\n").unwrap();
    node.agent.signal(Signal::HUP);
    let line = node.agent.stderr_line(|line| line.contains("reload failed"));
    assert!(line.contains("line 2"), "{line}");
    std::fs::write(&file, "[log]\nfilter = \"info\"\n[capture]\nring_mib = 4\n").unwrap();
    node.agent.signal(Signal::HUP);
    let line = node.agent.stderr_line(|line| line.contains("take a restart"));
    assert!(line.contains("capture"), "{line}");
    let reloads = Numbers::from([("success".to_owned(), 1), ("failure".to_owned(), 1)]);
    node.wait_for(python, "wasmscope_config_reloads_total", "result", &reloads);

    let second = run(command(node.directory.path(), &[])).ended_with(1).stderr_text();
    assert!(second.contains(&format!("pid {}", node.agent.pid())), "{second}");

    let mut counted: Counts = before.run();
    // It works once the agent has looked at it, and its rows are read while it lives: so none of its calls is missed, and all can be named.
    let mut holding = node.ready(python, &["--calls", "10", "--repeat", "2", "--hold"]);
    holding.0.send_line();
    let after = Counts::among([holding.0.stdout_line(|line| line.starts_with("{\"scenario\"")).as_str()]);
    add(&mut counted.host_calls, after.host_calls);
    node.wait_for(python, "wasm_host_calls_total", "import", &counted.host_calls);
    holding.0.finish().succeeded();
    add(&mut counted.invocations, after.invocations);
    let made = counted.invocations.values().sum();
    node.settles(python, made, [made, 0, 0]);

    node.agent.signal(Signal::TERM);
    node.agent.finish().succeeded();
    for (call, numbers) in after.syscalls_by_host_call {
        add(counted.syscalls_by_host_call.entry(call).or_default(), numbers);
    }
    crate::export::assert_spans_equal(&receiver.spans(), &counted);
}

#[test]
fn an_agent_that_is_killed_leaves_the_workload_running() {
    let Some(_kernel) = Kernel::acquire() else { return };
    let mut workload = Workload::start(&FOREVER);
    let node = Node::start(&[]);
    node.agent.signal(Signal::KILL);
    drop(node);
    assert!(workload.0.is_running());
    // Its lock went with it.
    let next = Node::start(&[]);
    next.agent.signal(Signal::TERM);
    next.agent.finish().succeeded();
    assert!(workload.0.is_running());
}
