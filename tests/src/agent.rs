//! `wasmscope` as a user runs it.

use std::ffi::OsStr;
use std::process::Command;

use crate::captured::Captured;
use crate::environment;
use crate::running::{Finished, Running};

/// A running `wasmscope trace`; killed when dropped.
#[derive(Debug)]
pub struct Agent(pub Running);

impl Agent {
    /// Starts `wasmscope trace` with `arguments` and waits until its probes are active.
    pub fn watching<A: AsRef<OsStr>>(arguments: impl IntoIterator<Item = A>) -> Self {
        Self::watching_with(arguments, &[])
    }

    /// As [`Self::watching`], with variables in its environment.
    pub fn watching_with<A: AsRef<OsStr>>(arguments: impl IntoIterator<Item = A>, variables: &[(&str, &str)]) -> Self {
        let mut command = wasmscope();
        command.arg("trace").args(arguments).envs(variables.iter().copied());
        let agent = Self(Running::start(command));
        agent.0.stderr_line(|line| line.starts_with("watching"));
        agent
    }

    /// Traces the process `pid` to standard output, as JSON.
    pub fn json_of(pid: &str) -> Self {
        Self::watching(["--pid", pid, "--format", "json"])
    }

    /// Presses Ctrl-C.
    pub fn interrupt(&self) {
        self.0.signal(rustix::process::Signal::INT);
    }

    /// Waits until it has ended by itself, with success.
    pub fn finish(self) -> Finished {
        self.0.finish().succeeded()
    }

    /// As [`Self::finish`], for an agent that wrote JSON to standard output.
    pub fn captured(self) -> Captured {
        Captured::parse(&self.finish().stdout)
    }
}

/// The command, without arguments and with no configuration of the caller's.
pub fn wasmscope() -> Command {
    let mut command = Command::new(environment::agent());
    for (name, _) in std::env::vars_os() {
        if name.as_encoded_bytes().starts_with(b"OTEL_") {
            command.env_remove(name);
        }
    }
    command.env_remove("WASMSCOPE_LOG");
    command
}

/// The command as an unprivileged user runs it.
pub fn unprivileged() -> Command {
    let mut command = Command::new("setpriv");
    command
        .args([
            "--reuid=65534",
            "--regid=65534",
            "--clear-groups",
            "--bounding-set=-all",
            "--inh-caps=-all",
        ])
        .arg(environment::agent());
    command
}

/// Runs a command that ends at once.
pub fn run(command: Command) -> Finished {
    Running::start(command).finish()
}
