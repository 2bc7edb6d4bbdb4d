//! The command line of `wasmscope` as xtask uses it: every flag is written here and nowhere else.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::Result;

use crate::process::Running;

/// How long the agent may take until its probes are active.
const ATTACH_LIMIT: Duration = Duration::from_mins(1);
/// How long it may take to write everything down after it was asked to end.
const END_LIMIT: Duration = Duration::from_mins(1);
/// Begins the line on stderr that says that probes are active.
const WATCHING: &str = "watching";
const NOWHERE: &str = "/dev/null";

/// How much a live trace takes down.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Depth {
    /// Counts and histograms in the kernel, no events.
    Metrics,
    /// Syscalls with their guest stacks; no probe in the process.
    Tier0,
    /// Everything that needs no filter.
    Full,
}

/// What a trace or a replay can be written as.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Format {
    Mermaid,
    Text,
    Json,
    Otlp,
}

impl Format {
    fn word(self) -> &'static str {
        match self {
            Self::Mermaid => "mermaid",
            Self::Text => "text",
            Self::Json => "json",
            Self::Otlp => "otlp",
        }
    }
}

/// A built `wasmscope`.
#[derive(Debug, Clone)]
pub(crate) struct Agent(pub(crate) PathBuf);

/// Where a live trace leaves what it saw.
#[derive(Debug, Default, Clone, Copy)]
pub(crate) struct Outputs<'a> {
    pub(crate) recording: Option<&'a Path>,
    pub(crate) metrics: Option<&'a Path>,
    /// Live traces are otherwise printed; where nobody looks, they go nowhere.
    pub(crate) discard: bool,
}

impl Agent {
    /// `wasmscope check`, which fails when tracing cannot work.
    pub(crate) fn check(&self) -> Command {
        let mut command = Command::new(&self.0);
        command.args(["check", "--no-processes"]);
        command
    }

    /// Traces process `pid` and returns when its probes are active.
    pub(crate) fn trace(&self, pid: u32, depth: Depth, outputs: Outputs<'_>) -> Result<Tracing> {
        let mut command = Command::new(&self.0);
        command.args(["trace", "--pid", &pid.to_string()]);
        match depth {
            // It insists on a place for them.
            Depth::Metrics => command
                .args(["--metrics-only", "--metrics-file"])
                .arg(outputs.metrics.unwrap_or(NOWHERE.as_ref())),
            Depth::Tier0 => command.args(["--tier", "0"]),
            Depth::Full => &mut command,
        };
        if let Some(recording) = outputs.recording {
            command.arg("--record").arg(recording);
        }
        if let Some(metrics) = outputs.metrics.filter(|_| depth != Depth::Metrics) {
            command.arg("--metrics-file").arg(metrics);
        }
        if outputs.discard && depth != Depth::Metrics {
            command.args(["--format", Format::Json.word(), "--output", NOWHERE]);
        }
        let mut running = Running::start(&mut command)?;
        running.wait_for("its probes are active", ATTACH_LIMIT, |line| {
            line.starts_with(WATCHING).then_some(())
        })?;
        Ok(Tracing(running))
    }

    /// Draws a recording, to `output` or to stdout; one that has only just been made is not labelled as a replay.
    pub(crate) fn replay(&self, recording: &Path, format: Format, output: Option<&Path>, is_replay: bool) -> Command {
        let mut command = self.replay_of(recording);
        command.args(["--format", format.word()]);
        if !is_replay {
            command.arg("--unlabelled");
        }
        if let Some(output) = output {
            command.arg("--output").arg(output);
        }
        command
    }

    /// Writes the metrics of a recording to `output`.
    pub(crate) fn replay_metrics(&self, recording: &Path, output: &Path) -> Command {
        let mut command = self.replay_of(recording);
        command
            .arg("--metrics-file")
            .arg(output)
            .args(["--format", Format::Json.word(), "--output", NOWHERE]);
        command
    }

    fn replay_of(&self, recording: &Path) -> Command {
        let mut command = Command::new(&self.0);
        command.arg("replay").arg(recording);
        command
    }
}

/// A live trace; dropping it kills the agent.
#[derive(Debug)]
pub(crate) struct Tracing(Running);

impl Tracing {
    /// Ends it as Ctrl-C would, waits until everything is written, and returns what it said on stderr.
    pub(crate) fn end(mut self) -> Result<String> {
        self.0.interrupt()?;
        let status = self.0.wait(END_LIMIT)?;
        anyhow::ensure!(
            status.success(),
            "`wasmscope trace` failed ({status})\n{}",
            self.0.tail(20)
        );
        Ok(self.0.stderr())
    }
}
