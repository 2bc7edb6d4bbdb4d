//! What `workload` says on stdout and waits for on stdin.

use std::io::{BufRead as _, Write as _};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use serde::Serialize;

use crate::counts::{Counts, Snapshot};
use crate::options::Options;

/// The one line printed at the end.
#[derive(Debug, Serialize)]
pub struct Report<'a> {
    /// [`Options::scenario`].
    pub scenario: &'a str,
    /// [`Options::mode`].
    pub mode: &'static str,
    /// Time from the first task's start to the last one's end, nanoseconds; compiling and instantiating are not in it.
    pub elapsed_ns: u64,
    /// What happened.
    #[serde(flatten)]
    pub counts: Snapshot,
}

impl<'a> Report<'a> {
    /// Of a run of `options` that took `elapsed`.
    pub fn new(options: &'a Options, counts: &Counts, elapsed: Duration) -> Self {
        let elapsed_ns = u64::try_from(elapsed.as_nanos()).unwrap_or(u64::MAX);
        Self {
            scenario: &options.scenario,
            mode: options.mode.name(),
            elapsed_ns,
            counts: counts.snapshot(),
        }
    }
}

/// Prints `value` as one line of JSON.
pub fn print_json(value: &impl Serialize) -> Result<()> {
    print_line(&serde_json::to_string(value)?)
}

/// Prints `line`.
pub fn print_line(line: &str) -> Result<()> {
    let mut stdout = std::io::stdout().lock();
    writeln!(stdout, "{line}")
        .and_then(|()| stdout.flush())
        .context("cannot write to stdout")
}

/// Says `ready` and waits to be told to go on.
pub fn wait_for_go() -> Result<()> {
    print_line("ready")?;
    let mut line = String::new();
    let count = std::io::stdin()
        .lock()
        .read_line(&mut line)
        .context("cannot read stdin")?;
    ensure!(count > 0, "stdin ended before the line that starts the run (--wait)");
    Ok(())
}

/// Waits for a line or the end of stdin.
pub fn wait_for_leave() -> Result<()> {
    std::io::stdin()
        .lock()
        .read_line(&mut String::new())
        .context("cannot read stdin")?;
    Ok(())
}
