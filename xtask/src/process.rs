//! A child process whose lines can be waited for, and that never outlives the value that stands for it.

use std::collections::VecDeque;
use std::io::{BufRead as _, BufReader, Read, Write as _};
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use rustix::process::{Pid, Signal, kill_process};

use crate::interrupt;

/// Lines kept per stream; older ones are forgotten.
const MAX_LINES: usize = 10_000;
/// Bytes kept of one line.
const MAX_LINE_BYTES: usize = 64 * 1024;
/// Lines on their way from the readers.
const QUEUE_LINES: usize = 1_000;
/// How often a wait looks whether someone asked to stop.
const INTERRUPT_POLL: Duration = Duration::from_millis(100);

/// Which of the child's streams a line came from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Stream {
    Stdout,
    Stderr,
}

/// A started process; dropping it kills it.
#[derive(Debug)]
pub(crate) struct Running {
    name: String,
    child: Child,
    lines: Receiver<(Stream, String)>,
    kept: VecDeque<(Stream, String)>,
    stdin: Option<ChildStdin>,
    status: Option<ExitStatus>,
}

impl Running {
    /// Starts `command` with both output streams read line by line and nothing on stdin.
    pub(crate) fn start(command: &mut Command) -> Result<Self> {
        Self::spawn(command.stdin(Stdio::null()))
    }

    /// Like [`Self::start`], with a stdin that stays open until [`Self::close_stdin`].
    pub(crate) fn start_with_stdin(command: &mut Command) -> Result<Self> {
        Self::spawn(command.stdin(Stdio::piped()))
    }

    fn spawn(command: &mut Command) -> Result<Self> {
        let name = command.get_program().to_string_lossy().into_owned();
        let mut child = command
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .with_context(|| format!("while starting `{name}`"))?;
        let (sender, lines) = sync_channel(QUEUE_LINES);
        if let Some(stdout) = child.stdout.take() {
            read_lines(stdout, Stream::Stdout, sender.clone());
        }
        if let Some(stderr) = child.stderr.take() {
            read_lines(stderr, Stream::Stderr, sender);
        }
        let stdin = child.stdin.take();
        Ok(Self {
            name,
            child,
            lines,
            kept: VecDeque::new(),
            stdin,
            status: None,
        })
    }

    /// The process id.
    pub(crate) fn id(&self) -> u32 {
        self.child.id()
    }

    /// Waits for a line that `wanted` makes something of.
    pub(crate) fn wait_for<T>(&mut self, what: &str, limit: Duration, wanted: impl Fn(&str) -> Option<T>) -> Result<T> {
        let deadline = Instant::now() + limit;
        while let Some(line) = self
            .next_line(Some(deadline))
            .with_context(|| format!("while waiting for {what}"))?
        {
            if let Some(value) = wanted(&line) {
                return Ok(value);
            }
        }
        let status = self.child.wait()?;
        self.status = Some(status);
        bail!("`{}` ended ({status}) before {what}\n{}", self.name, self.tail(20))
    }

    /// Reads what has been printed meanwhile, so that it never waits for a reader.
    pub(crate) fn catch_up(&mut self) {
        while let Ok((stream, line)) = self.lines.try_recv() {
            self.keep(stream, line);
        }
    }

    fn keep(&mut self, stream: Stream, line: String) {
        if self.kept.len() == MAX_LINES {
            self.kept.pop_front();
        }
        self.kept.push_back((stream, line));
    }

    /// Waits for the end, by `deadline` where there is one.
    pub(crate) fn wait(&mut self, limit: Duration) -> Result<ExitStatus> {
        self.wait_noting(Some(Instant::now() + limit), &mut |_| ())
    }

    /// Waits for the end and hands over each line on the way.
    pub(crate) fn wait_noting(&mut self, deadline: Option<Instant>, note: &mut dyn FnMut(&str)) -> Result<ExitStatus> {
        while let Some(line) = self.next_line(deadline)? {
            note(&line);
        }
        let status = match self.status {
            Some(status) => status,
            None => self.child.wait()?,
        };
        self.status = Some(status);
        Ok(status)
    }

    /// Asks it to end as Ctrl-C would.
    pub(crate) fn interrupt(&self) -> Result<()> {
        let pid = Pid::from_child(&self.child);
        kill_process(pid, Signal::INT).with_context(|| format!("while stopping `{}`", self.name))
    }

    /// Writes one line to its stdin.
    pub(crate) fn send_line(&mut self, line: &str) -> Result<()> {
        let stdin = self
            .stdin
            .as_mut()
            .with_context(|| format!("`{}` has no stdin", self.name))?;
        writeln!(stdin, "{line}")
            .and_then(|()| stdin.flush())
            .with_context(|| format!("while writing to `{}`", self.name))
    }

    /// Ends its stdin.
    pub(crate) fn close_stdin(&mut self) {
        self.stdin = None;
    }

    /// What it has printed on stdout so far, up to the line last read.
    pub(crate) fn stdout(&self) -> String {
        self.joined(Stream::Stdout)
    }

    /// What it has printed on stderr so far, up to the line last read.
    pub(crate) fn stderr(&self) -> String {
        self.joined(Stream::Stderr)
    }

    /// The last `count` lines of both streams.
    pub(crate) fn tail(&self, count: usize) -> String {
        let from = self.kept.len().saturating_sub(count);
        self.kept
            .iter()
            .skip(from)
            .map(|(_, line)| format!("  {line}"))
            .collect::<Vec<_>>()
            .join("\n")
    }

    fn joined(&self, wanted: Stream) -> String {
        let lines = self.kept.iter().filter(|(stream, _)| *stream == wanted);
        lines.map(|(_, line)| line.as_str()).collect::<Vec<_>>().join("\n")
    }

    /// The next line of either stream; nothing when both have ended.
    fn next_line(&mut self, deadline: Option<Instant>) -> Result<Option<String>> {
        loop {
            interrupt::check()?;
            let poll = match deadline {
                Some(deadline) => {
                    let left = deadline.saturating_duration_since(Instant::now());
                    if left.is_zero() {
                        bail!("`{}` took too long\n{}", self.name, self.tail(20));
                    }
                    left.min(INTERRUPT_POLL)
                }
                None => INTERRUPT_POLL,
            };
            match self.lines.recv_timeout(poll) {
                Ok((stream, line)) => {
                    self.keep(stream, line.clone());
                    return Ok(Some(line));
                }
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return Ok(None),
            }
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if self.status.is_none() {
            // Both fail only when it is gone already.
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}

fn read_lines(stream: impl Read + Send + 'static, which: Stream, sender: SyncSender<(Stream, String)>) {
    thread::spawn(move || {
        let mut reader = BufReader::new(stream);
        let mut bytes = Vec::new();
        loop {
            bytes.clear();
            match reader
                .by_ref()
                .take(MAX_LINE_BYTES as u64)
                .read_until(b'\n', &mut bytes)
            {
                Ok(0) | Err(_) => return,
                Ok(_) => {}
            }
            let line = String::from_utf8_lossy(&bytes);
            if sender.send((which, line.trim_end().to_owned())).is_err() {
                return;
            }
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMIT: Duration = Duration::from_secs(20);

    fn shell(script: &str) -> Command {
        let mut command = Command::new("sh");
        command.args(["-c", script]);
        command
    }

    #[test]
    fn waits_for_the_line_that_matters() {
        let mut running = Running::start(&mut shell("echo noise; echo 'port 17'; exec sleep 100")).unwrap();
        let port = running
            .wait_for("its port", LIMIT, |line| {
                line.strip_prefix("port ")?.parse::<u16>().ok()
            })
            .unwrap();
        assert_eq!(port, 17);
    }

    #[test]
    fn an_early_end_is_an_error_with_what_was_said() {
        let mut running = Running::start(&mut shell("echo 'no such guest' >&2; exit 4")).unwrap();
        let error = running
            .wait_for("its port", LIMIT, |_| None::<()>)
            .unwrap_err()
            .to_string();
        assert!(
            error.contains("exit status: 4") && error.contains("no such guest"),
            "{error}"
        );
    }

    #[test]
    fn a_wait_is_bounded() {
        let mut running = Running::start(&mut shell("exec sleep 100")).unwrap();
        assert!(running.wait(Duration::from_millis(50)).is_err());
    }

    #[test]
    fn dropping_kills() {
        let running = Running::start(&mut shell("exec sleep 100")).unwrap();
        let pid = running.id();
        drop(running);
        assert!(!std::path::Path::new(&format!("/proc/{pid}")).exists());
    }

    #[test]
    fn stdin_stays_open_until_it_is_closed() {
        let mut running = Running::start_with_stdin(&mut shell("read a; echo got $a; read b; echo end")).unwrap();
        running.send_line("one").unwrap();
        running
            .wait_for("an answer", LIMIT, |line| (line == "got one").then_some(()))
            .unwrap();
        running.close_stdin();
        assert!(running.wait(LIMIT).unwrap().success());
        assert_eq!(running.stdout(), "got one\nend");
    }
}
