//! Child processes of tests: what they print, line by line, and an end for each of them however the test ends.

use std::io::{BufRead, BufReader, Read, Write as _};
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::sync::{Arc, Condvar, LazyLock, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// How long anything may take. Only a test that fails ever waits so long. An emulated processor needs longer: `WASMSCOPE_TEST_DEADLINE_SECONDS`.
pub static DEADLINE: LazyLock<Duration> = LazyLock::new(|| {
    let seconds = std::env::var("WASMSCOPE_TEST_DEADLINE_SECONDS").ok();
    seconds.map_or(Duration::from_mins(2), |seconds| {
        Duration::from_secs(seconds.parse().expect("a number of seconds"))
    })
});

/// A running child; killed when dropped.
#[derive(Debug)]
pub struct Running {
    child: Child,
    stdin: Option<ChildStdin>,
    stdout: Lines,
    stderr: Lines,
}

/// A child that has ended by itself.
#[derive(Debug)]
pub struct Finished {
    /// How.
    pub status: ExitStatus,
    /// Its standard output.
    pub stdout: Vec<String>,
    /// Its standard error.
    pub stderr: Vec<String>,
}

/// What a child has written to one of its outputs so far.
#[derive(Clone, Debug, Default)]
struct Lines(Arc<(Mutex<Written>, Condvar)>);

#[derive(Debug, Default)]
struct Written {
    lines: Vec<String>,
    is_closed: bool,
}

impl Running {
    /// Starts `command` with pipes at its input and outputs.
    pub fn start(mut command: Command) -> Self {
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap_or_else(|error| panic!("cannot start {command:?}: {error}"));
        let stdout = Lines::of(child.stdout.take().expect("it is piped"));
        let stderr = Lines::of(child.stderr.take().expect("it is piped"));
        Self {
            stdin: child.stdin.take(),
            child,
            stdout,
            stderr,
        }
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Sends it one line.
    pub fn send_line(&mut self) {
        self.send("go");
    }

    /// Sends it this line.
    pub fn send(&mut self, line: &str) {
        let stdin = self.stdin.as_mut().expect("its input is open");
        stdin
            .write_all(format!("{line}\n").as_bytes())
            .expect("it reads its input");
    }

    /// Ends its input.
    pub fn close_stdin(&mut self) {
        self.stdin = None;
    }

    /// Sends it a signal, unless it has ended.
    pub fn signal(&self, signal: rustix::process::Signal) {
        let pid = rustix::process::Pid::from_child(&self.child);
        rustix::process::kill_process(pid, signal).expect("it was not waited for, so it can be sent signals");
    }

    /// Waits for the first line of standard output that is `wanted`.
    pub fn stdout_line(&self, wanted: impl FnMut(&str) -> bool) -> String {
        self.stdout.find(wanted).unwrap_or_else(|| self.nothing("stdout"))
    }

    /// Waits for the first line of standard error that is `wanted`.
    pub fn stderr_line(&self, wanted: impl FnMut(&str) -> bool) -> String {
        self.stderr.find(wanted).unwrap_or_else(|| self.nothing("stderr"))
    }

    /// Lines of standard output so far.
    pub fn stdout_lines(&self) -> Vec<String> {
        self.stdout.lock().lines.clone()
    }

    /// Waits until there are `count` lines of standard output.
    pub fn wait_for_lines(&self, count: usize) {
        assert!(
            self.stdout.wait(|written| written.lines.len() >= count),
            "fewer than {count} lines: {}",
            self.story()
        );
    }

    /// Whether it still runs.
    pub fn is_running(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }

    /// Waits until it has ended by itself, its input closed.
    pub fn finish(mut self) -> Finished {
        self.stdin = None;
        let begun = Instant::now();
        let status = loop {
            if let Some(status) = self.child.try_wait().expect("it is a child") {
                break status;
            }
            assert!(begun.elapsed() < *DEADLINE, "it does not end: {}", self.story());
            std::thread::sleep(Duration::from_millis(2));
        };
        Finished {
            status,
            stdout: self.stdout.all(),
            stderr: self.stderr.all(),
        }
    }

    fn nothing(&self, what: &str) -> ! {
        panic!("the line that was waited for never came on {what}: {}", self.story())
    }

    fn story(&self) -> String {
        let end_of = |lines: &Lines| {
            let written = lines.lock();
            let first = written.lines.len().saturating_sub(20);
            let shown: Vec<_> = written.lines[first..]
                .iter()
                .map(|line| line.chars().take(300).collect::<String>())
                .collect();
            shown.join("\n")
        };
        format!(
            "pid {}\nstdout:\n{}\nstderr:\n{}",
            self.pid(),
            end_of(&self.stdout),
            end_of(&self.stderr)
        )
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // Both fail only if it has ended and been waited for.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Finished {
    /// Standard error as one text.
    pub fn stderr_text(&self) -> String {
        self.stderr.join("\n")
    }

    /// Itself, if it ended with exit code 0 and did not panic.
    #[expect(clippy::return_self_not_must_use, reason = "the check may be all that is wanted")]
    #[track_caller]
    pub fn succeeded(self) -> Self {
        self.ended_with(0)
    }

    /// Itself, if it ended with this exit code and did not panic.
    #[expect(clippy::return_self_not_must_use, reason = "the check may be all that is wanted")]
    #[track_caller]
    pub fn ended_with(self, code: i32) -> Self {
        let text = self.stderr_text();
        assert_eq!(self.status.code(), Some(code), "{}: {text}", self.status);
        assert!(!text.contains("panicked"), "{text}");
        self
    }
}

impl Lines {
    fn of(output: impl Read + Send + 'static) -> Self {
        let lines = Self::default();
        let writer = lines.clone();
        std::thread::spawn(move || {
            let mut output = BufReader::new(output);
            let mut line = Vec::new();
            while output.read_until(b'\n', &mut line).is_ok_and(|count| count > 0) {
                let text = String::from_utf8_lossy(line.strip_suffix(b"\n").unwrap_or(&line)).into_owned();
                writer.change(|written| written.lines.push(text));
                line.clear();
            }
            writer.change(|written| written.is_closed = true);
        });
        lines
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Written> {
        self.0.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn change(&self, change: impl FnOnce(&mut Written)) {
        change(&mut self.lock());
        self.0.1.notify_all();
    }

    /// Waits until `condition` holds; `false` if it never will or the time is up.
    fn wait(&self, mut condition: impl FnMut(&Written) -> bool) -> bool {
        let begun = Instant::now();
        let mut written = self.lock();
        loop {
            if condition(&written) {
                return true;
            }
            let rest = DEADLINE.saturating_sub(begun.elapsed());
            if written.is_closed || rest.is_zero() {
                return false;
            }
            written = self
                .0
                .1
                .wait_timeout(written, rest)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
    }

    fn find(&self, mut wanted: impl FnMut(&str) -> bool) -> Option<String> {
        let mut seen = 0;
        let mut found = None;
        self.wait(|written| {
            let position = written.lines[seen..].iter().position(|line| wanted(line));
            found = position.map(|position| written.lines[seen + position].clone());
            seen = written.lines.len();
            found.is_some()
        });
        found
    }

    /// All of it, once nobody can write to it any more.
    fn all(&self) -> Vec<String> {
        self.wait(|written| written.is_closed);
        std::mem::take(&mut self.lock().lines)
    }
}
