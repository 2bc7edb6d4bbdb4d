//! Command line of `workload`.

use std::path::PathBuf;
use std::time::Duration;

use clap::builder::PossibleValuesParser;
use clap::{Parser, ValueEnum};

use crate::scenario;

/// How guests are called.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Mode {
    /// `Func::call`: the guest runs on the calling thread's own stack, and sleeps block it.
    Sync,
    /// `Func::call_async` under tokio: the guest runs on a fiber, which sleeps suspend and any worker thread may
    /// resume.
    Async,
}

impl Mode {
    /// The word for it on the command line and in the report.
    pub fn name(self) -> &'static str {
        match self {
            Self::Sync => "sync",
            Self::Async => "async",
        }
    }
}

/// Runs guests that make host calls that make syscalls, and prints one line of JSON with how many of each there were.
#[derive(Clone, Debug, Parser)]
#[command(name = "workload", version)]
#[expect(
    clippy::struct_excessive_bools,
    reason = "each is a flag of its own on the command line"
)]
pub struct Options {
    /// What to run.
    #[arg(long, default_value = "calls", value_parser = PossibleValuesParser::new(scenario::possible_values()))]
    pub scenario: String,

    /// How guests are called.
    #[arg(long, value_enum, default_value_t = Mode::Sync)]
    pub mode: Mode,

    /// Independent tasks, each with its own store and instances.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=4096))]
    pub tasks: u16,

    /// Threads that tasks run on.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=256))]
    pub threads: u16,

    /// Host calls of each kind in one invocation.
    #[arg(long, default_value_t = 10)]
    pub calls: u32,

    /// Invocations of the entry export by each task.
    #[arg(long, default_value_t = 1)]
    pub repeat: u32,

    /// Rounds of guest arithmetic between host calls (`writes`) or in one stretch (`spin`); 2800 take about 5 µs.
    #[arg(long, default_value_t = 2_800)]
    pub work: u32,

    /// Microseconds that `host.nap` sleeps in sync mode, and between the wake-ups of nappers in async mode.
    #[arg(long, default_value_t = 200, value_parser = clap::value_parser!(u64).range(1..=1_000_000))]
    pub nap_us: u64,

    /// Use wasmtime's pooling allocator.
    #[arg(long)]
    pub pooling: bool,

    /// The version that compiled code says it is of, whatever it is.
    #[arg(long)]
    pub module_version: Option<String>,

    /// Print `ready`, then wait for a line on stdin before the first instance is made.
    #[arg(long)]
    pub wait: bool,

    /// With `--wait`, compile guests after the wait instead of before it.
    #[arg(long, requires = "wait")]
    pub compile_after_wait: bool,

    /// After printing the counts, wait for a line or the end of stdin before exiting.
    #[arg(long)]
    pub hold: bool,

    /// File that `host.write` writes to.
    #[arg(long, default_value = "/dev/null")]
    pub output: PathBuf,

    /// File that `host.read_file` reads the start of.
    #[arg(long, default_value = "/dev/zero")]
    pub input: PathBuf,
}

impl Options {
    /// `nap_us` as a duration.
    pub fn nap(&self) -> Duration {
        Duration::from_micros(self.nap_us)
    }
}
