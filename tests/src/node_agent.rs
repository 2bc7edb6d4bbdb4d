//! `wasmscope agent`, with a lock and a port of the test's own.

use std::path::Path;
use std::process::Command;
use std::time::Instant;

use crate::agent::wasmscope;
use crate::http;
use crate::running::{DEADLINE, Running};
use crate::workload::Workload;

/// A running agent that is ready; killed when dropped.
#[derive(Debug)]
pub struct NodeAgent {
    /// Its process.
    pub running: Running,
    /// Where it answers.
    pub address: String,
}

impl NodeAgent {
    /// Listens on `listen`, keeps its lock in `directory`, and is configured further by `configure`.
    pub fn start(directory: &Path, listen: &str, configure: impl FnOnce(&mut Command)) -> Self {
        let mut command = wasmscope();
        let lock = directory.join("lock");
        command
            .args(["agent", "--listen", listen, "--set"])
            .arg(format!("instance.lock_file={}", lock.display()));
        configure(&mut command);
        let running = Running::start(command);
        let line = running.stderr_line(|line| line.contains("serving HTTP"));
        let (_, address) = line.rsplit_once("address=").expect("it says where");
        let address = address.trim().to_owned();
        running.stderr_line(|line| line.ends_with("ready"));
        Self { running, address }
    }

    /// Processes that it has looked at so far.
    pub fn looked_at(&self) -> u64 {
        const COUNTER: &str = "wasmscope_events_total{kind=\"process\"} ";
        let text = http::body(&format!("http://{}/metrics", self.address));
        let line = text.lines().find_map(|line| line.strip_prefix(COUNTER));
        line.map_or(0, |count| count.parse().expect("counters are numbers"))
    }

    /// Runs workloads with these arguments at once, each of which works when all have been looked at. They may fail.
    pub fn run(&self, workloads: &[&[&str]]) {
        let before = self.looked_at();
        let mut all: Vec<_> = workloads.iter().map(|arguments| Workload::ready(arguments)).collect();
        let begun = Instant::now();
        while self.looked_at() < before + all.len() as u64 {
            assert!(begun.elapsed() < *DEADLINE, "the agent does not look at what runs");
        }
        for workload in &mut all {
            workload.0.send_line();
        }
        for workload in all {
            drop(workload.0.finish());
        }
    }
}
