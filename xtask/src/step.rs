//! Says what is about to be done and how long it took: a spinner on a terminal, plain lines elsewhere.

use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use indicatif::{ProgressBar, ProgressStyle};

use crate::process::Running;

const TICK: Duration = Duration::from_millis(100);
const SHOWN_FAILURE_LINES: usize = 40;

/// One thing being done.
#[derive(Debug)]
pub(crate) struct Step {
    title: String,
    started: Instant,
    spinner: ProgressBar,
}

impl Step {
    /// Announces `title`.
    pub(crate) fn start(title: impl Into<String>) -> Self {
        let title = title.into();
        let spinner = ProgressBar::new_spinner();
        if spinner.is_hidden() {
            eprintln!("{title} …");
        } else {
            let style = ProgressStyle::with_template("{spinner} {prefix} {elapsed:.dim} {wide_msg:.dim}");
            spinner.set_style(style.unwrap_or_else(|_| ProgressStyle::default_spinner()));
            spinner.set_prefix(title.clone());
            spinner.enable_steady_tick(TICK);
        }
        Self {
            title,
            started: Instant::now(),
            spinner,
        }
    }

    /// Shows `line` beside the spinner.
    pub(crate) fn note(&self, line: &str) {
        self.spinner.set_message(line.trim().to_owned());
    }

    /// Closes the step with what came of it.
    pub(crate) fn done(self, outcome: &str) {
        self.spinner.finish_and_clear();
        eprintln!("{}: {outcome} ({})", self.title, seconds(self.started.elapsed()));
    }

    /// Runs `command` as a step of its own and returns what it printed on stdout; its last lines are in the error.
    pub(crate) fn run(title: impl Into<String>, command: &mut Command) -> Result<String> {
        let step = Self::start(title);
        let result = run_noting(command, |line| step.note(line));
        match &result {
            Ok(_) => step.done("done"),
            Err(_) => step.done("failed"),
        }
        result
    }
}

/// Runs `command` to its end, handing each line it prints to `note`, and returns what it printed on stdout.
pub(crate) fn run_noting(command: &mut Command, mut note: impl FnMut(&str)) -> Result<String> {
    let shown = shown(command);
    let mut running = Running::start(command)?;
    let status = running
        .wait_noting(None, &mut note)
        .with_context(|| format!("while running `{shown}`"))?;
    if status.success() {
        return Ok(running.stdout());
    }
    let tail = running.tail(SHOWN_FAILURE_LINES);
    bail!(
        "`{shown}` failed ({status}){}{tail}",
        if tail.is_empty() { "" } else { "\n" }
    )
}

/// `command` roughly as one would type it.
pub(crate) fn shown(command: &Command) -> String {
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    words
        .map(|word| word.to_string_lossy().into_owned())
        .collect::<Vec<_>>()
        .join(" ")
}

/// `1.2 s`, or minutes and seconds from a hundred seconds on.
pub(crate) fn seconds(duration: Duration) -> String {
    let seconds = duration.as_secs_f64();
    if seconds < 100.0 {
        format!("{seconds:.1} s")
    } else {
        format!("{} min {} s", duration.as_secs() / 60, duration.as_secs() % 60)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failed_command_is_quoted_with_its_last_words() {
        let mut command = Command::new("sh");
        command.args(["-c", "echo first; echo last >&2; exit 3"]);
        let error = run_noting(&mut command, |_| ()).unwrap_err().to_string();
        assert!(error.contains("exit status: 3"), "{error}");
        assert!(error.contains("last"), "{error}");
    }

    #[test]
    fn a_command_that_cannot_start_is_named() {
        let error = run_noting(&mut Command::new("/nonexistent/tool"), |_| ()).unwrap_err();
        assert!(format!("{error:#}").contains("/nonexistent/tool"), "{error:#}");
    }

    #[test]
    fn long_times_are_in_minutes() {
        assert_eq!(seconds(Duration::from_millis(1_250)), "1.2 s");
        assert_eq!(seconds(Duration::from_secs(125)), "2 min 5 s");
    }
}
