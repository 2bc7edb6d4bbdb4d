//! The traced programs, and what they say they did.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::path::Path;
use std::process::Command;

use serde::Deserialize;

use crate::environment;
use crate::running::{Finished, Running};

/// Counts by name.
pub type Numbers = BTreeMap<String, u64>;

/// A workload without end, on two threads, that leaves a traced machine time to breathe.
pub const FOREVER: [&str; 6] = ["--scenario", "forever", "--threads", "2", "--nap-us", "2000"];
/// Code of the trap that the instruction `unreachable` raises.
pub const UNREACHABLE: &str = "unreachable_code_reached";
/// What an exception that its guest does not catch is to the agent: something that the runtime was asked to raise.
pub const UNCAUGHT_EXCEPTION: &str = "raised_by_runtime";

/// Either what a program counted of itself, or what was seen of it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
pub struct Counts {
    /// Calls of exports, by `module/export`.
    pub invocations: Numbers,
    /// Calls of imports, by `module.field`.
    pub host_calls: Numbers,
    /// Syscalls by the host call that made them, then by name.
    pub syscalls_by_host_call: BTreeMap<String, Numbers>,
    /// Invocations that failed, by how.
    pub traps: Numbers,
    /// Times that fibers left their threads, once for each of the nested invocations on them.
    pub suspends: u64,
    /// Times that they were resumed.
    pub resumes: u64,
    /// Times that they were resumed on another thread.
    pub moves: u64,
    /// What invocations answered, where the program tells: nothing that tracing sees.
    #[serde(default)]
    pub answers: Numbers,
}

/// A running program that speaks `workload`'s protocol; killed when dropped.
#[derive(Debug)]
pub struct Workload(pub Running);

impl Workload {
    /// Starts `workload` with `--wait` and waits until it is ready.
    pub fn ready(arguments: &[&str]) -> Self {
        Self::ready_as(&environment::test_host("workload"), arguments)
    }

    /// As [`Self::ready`], for another binary.
    pub fn ready_as(program: &Path, arguments: &[&str]) -> Self {
        let mut command = Command::new(program);
        command.args(arguments).arg("--wait");
        let workload = Self(Running::start(command));
        workload.0.stdout_line(|line| line == "ready");
        workload
    }

    /// Starts a program of `tests/python` in the same way.
    pub fn ready_python(python: &Path, script: &str, arguments: &[&str]) -> Self {
        let script = environment::tests_directory().join("python").join(script);
        let words: Vec<&str> = script.to_str().into_iter().chain(arguments.iter().copied()).collect();
        Self::ready_as(python, &words)
    }

    /// Starts `workload`, which goes at once.
    pub fn start(arguments: &[&str]) -> Self {
        let mut command = Command::new(environment::test_host("workload"));
        command.args(arguments);
        Self(Running::start(command))
    }

    /// Its process id, as an argument.
    pub fn pid(&self) -> String {
        self.0.pid().to_string()
    }

    /// As [`Self::run`], with what only its scenario counts.
    pub fn run_with_notes(mut self) -> (Counts, Numbers) {
        #[derive(Deserialize)]
        struct Line {
            notes: Numbers,
        }
        self.0.send_line();
        let finished = self.0.finish().succeeded();
        let line = finished.stdout.iter().find(|line| line.starts_with("{\"scenario\""));
        let line: Line = serde_json::from_str(line.expect("the workload prints its counts")).expect("notes are JSON");
        (Counts::of(&finished), line.notes)
    }

    /// Lets it go, and waits for its counts and its end.
    pub fn run(mut self) -> Counts {
        self.0.send_line();
        Counts::of(&self.0.finish().succeeded())
    }
}

impl Counts {
    /// What is among the lines that a program printed.
    pub fn of(finished: &Finished) -> Self {
        Self::among(finished.stdout.iter().map(String::as_str))
    }

    /// The line of counts among `lines`.
    pub fn among<'a>(lines: impl IntoIterator<Item = &'a str>) -> Self {
        let line = lines.into_iter().find(|line| line.starts_with("{\"scenario\""));
        let mut counts: Self =
            serde_json::from_str(line.expect("the workload prints its counts")).expect("counts are JSON");
        // The agent has wasmtime's own word for one, and none for the other.
        for (ours, its) in [("unreachable", UNREACHABLE), ("uncaught_exception", UNCAUGHT_EXCEPTION)] {
            if let Some(count) = counts.traps.remove(ours) {
                counts.traps.insert(its.to_owned(), count);
            }
        }
        counts
    }

    /// Syscalls by name.
    pub fn syscalls(&self) -> Numbers {
        let mut all = Numbers::new();
        for (name, count) in self.syscalls_by_host_call.values().flatten() {
            *all.entry(name.clone()).or_default() += count;
        }
        all
    }
}

/// The same binary without its symbols, at `path`.
pub fn stripped(program: &Path, path: &Path) {
    let arguments: [&OsStr; 3] = ["-o".as_ref(), path.as_ref(), program.as_ref()];
    let status = Command::new("strip")
        .args(arguments)
        .status()
        .expect("strip (binutils) can be run");
    assert!(status.success(), "strip: {status}");
}
