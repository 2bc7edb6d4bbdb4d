//! The tracers that are compared: how each is attached to a process, known to be ready, and ended.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};

use crate::agent_cli::{Agent, Depth, Outputs, Tracing};
use crate::process::Running;
use crate::toolchain::on_path;
use crate::workspace::Workspace;

const TRACEFS: &str = "/sys/kernel/tracing";
const READY_LIMIT: Duration = Duration::from_mins(1);
const END_LIMIT: Duration = Duration::from_mins(1);

/// What is measured beside the untraced run, in the order of the table.
pub(crate) const SUBJECTS: [Subject; 5] = [
    Subject::Wasmscope(Depth::Metrics),
    Subject::Wasmscope(Depth::Tier0),
    Subject::Wasmscope(Depth::Full),
    Subject::Bpftrace,
    Subject::Strace,
];

/// One tracer in one mode.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Subject {
    Wasmscope(Depth),
    /// The same two tracepoints, a start time per thread and a histogram per syscall.
    Bpftrace,
    /// `strace -f -c`.
    Strace,
}

/// An attached tracer; dropping it kills it.
#[derive(Debug)]
pub(crate) enum Attached {
    Wasmscope(Tracing),
    Other(Running),
}

impl Subject {
    /// For the table.
    pub(crate) fn title(self) -> &'static str {
        match self {
            Self::Wasmscope(Depth::Metrics) => "wasmscope, metrics only",
            Self::Wasmscope(Depth::Tier0) => "wasmscope, tier 0 (every syscall with its guest stack)",
            Self::Wasmscope(Depth::Full) => "wasmscope, full trace",
            Self::Bpftrace => "bpftrace, syscall enter and exit, histogram",
            Self::Strace => "strace -f -c",
        }
    }

    /// Attaches to process `pid` and returns when it is watching. Wasmscope writes what it counted to `metrics` when it ends.
    pub(crate) fn attach(self, workspace: &Workspace, pid: u32, metrics: Option<&Path>) -> Result<Attached> {
        match self {
            Self::Wasmscope(depth) => {
                let agent = Agent(workspace.release_binary("wasmscope"));
                let outputs = Outputs {
                    discard: true,
                    metrics,
                    ..Outputs::default()
                };
                agent.trace(pid, depth, outputs).map(Attached::Wasmscope)
            }
            Self::Bpftrace => {
                let mut running = Running::start(bpftrace()?.args(["-e", &bpftrace_script(pid)]))?;
                // Printed by a timer, which is attached with the probes.
                running.wait_for("its probes are active", READY_LIMIT, |line| {
                    (line == "watching").then_some(())
                })?;
                Ok(Attached::Other(running))
            }
            Self::Strace => {
                let mut running = Running::start(program("strace")?.args(["-f", "-c", "-p", &pid.to_string()]))?;
                running.wait_for("it is attached", READY_LIMIT, |line| {
                    line.contains(" attached").then_some(())
                })?;
                Ok(Attached::Other(running))
            }
        }
    }
}

impl Attached {
    /// Ends it and returns the syscalls that it says it counted, where it does.
    pub(crate) fn end(self) -> Result<Option<u64>> {
        match self {
            Self::Wasmscope(tracing) => tracing.end().map(|_| None),
            Self::Other(mut running) => {
                running.interrupt()?;
                running.wait(END_LIMIT)?;
                let said = format!("{}\n{}", running.stdout(), running.stderr());
                let counted = bpftrace_count(&said).or_else(|| strace_count(&said));
                ensure!(
                    counted.is_some(),
                    "it does not say what it counted\n{}",
                    running.tail(10)
                );
                Ok(counted)
            }
        }
    }
}

fn program(name: &str) -> Result<Command> {
    on_path(name)
        .first()
        .map(Command::new)
        .with_context(|| format!("`{name}` is not installed"))
}

/// Where tracefs is not mounted, bpftrace sees it in a mount namespace of its own and the machine stays as it is.
fn bpftrace() -> Result<Command> {
    let bpftrace = program("bpftrace")?;
    if Path::new(TRACEFS).join("events").is_dir() {
        return Ok(bpftrace);
    }
    let script = format!("mount -t tracefs tracefs {TRACEFS} && exec \"$@\"");
    let mut command = program("unshare")?;
    command
        .args(["--mount", "sh", "-c", &script, "sh"])
        .arg(bpftrace.get_program());
    Ok(command)
}

fn bpftrace_script(pid: u32) -> String {
    format!(
        "tracepoint:raw_syscalls:sys_enter /pid == {pid}/ {{ @start[tid] = nsecs; }} \
         tracepoint:raw_syscalls:sys_exit /@start[tid]/ {{ @took_ns[args->id] = hist(nsecs - @start[tid]); \
         @total = count(); delete(@start[tid]); }} \
         interval:ms:100 /!@told/ {{ @told = 1; printf(\"watching\\n\"); }}"
    )
}

fn bpftrace_count(said: &str) -> Option<u64> {
    said.lines()
        .find_map(|line| line.strip_prefix("@total: ")?.trim().parse().ok())
}

/// The third number of the line `100.00  1.234  5  200001  3 total`.
fn strace_count(said: &str) -> Option<u64> {
    let line = said.lines().find(|line| line.trim_end().ends_with(" total"))?;
    line.split_whitespace().nth(3)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_are_read_from_what_tracers_print() {
        assert_eq!(
            bpftrace_count("Attaching 3 probes...\n@told: 1\n@total: 4242\n"),
            Some(4242)
        );
        let table = "% time     seconds  usecs/call     calls    errors syscall\n100.00    0.120000           1    100012         2 total\n";
        assert_eq!(strace_count(table), Some(100_012));
        assert_eq!(strace_count("strace: Process 1 detached"), None);
    }
}
