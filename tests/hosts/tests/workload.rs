//! What `workload` counts, its protocol on stdin and stdout, and its exit codes.

#![expect(clippy::unwrap_used, reason = "the helpers are part of the tests")]

use std::collections::BTreeMap;
use std::io::{BufRead as _, BufReader, Write as _};
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Output, Stdio};

use serde::Deserialize;

type Numbers = BTreeMap<String, u64>;

#[derive(Debug, PartialEq, Deserialize)]
struct Counts {
    invocations: Numbers,
    host_calls: Numbers,
    syscalls: Numbers,
    syscalls_by_host_call: BTreeMap<String, Numbers>,
    traps: Numbers,
    suspends: u64,
    resumes: u64,
    moves: u64,
}

fn numbers<const N: usize>(entries: [(&str, u64); N]) -> Numbers {
    entries.map(|(name, count)| (name.to_owned(), count)).into()
}

fn workload(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_workload"));
    command.args(arguments);
    command
}

fn run(arguments: &[&str]) -> Output {
    workload(arguments).stdin(Stdio::null()).output().unwrap()
}

/// The counts of a run that must succeed and print one line.
fn counts(arguments: &[&str]) -> Counts {
    let output = run(arguments);
    assert!(output.status.success(), "{arguments:?}: {output:?}");
    let text = String::from_utf8(output.stdout).unwrap();
    assert_eq!(text.lines().count(), 1, "{text}");
    serde_json::from_str(&text).unwrap()
}

/// A running workload; killed when dropped.
struct Running {
    child: Child,
    stdin: Option<ChildStdin>,
    stdout: BufReader<ChildStdout>,
}

impl Running {
    fn start(arguments: &[&str]) -> Self {
        let mut child = workload(arguments)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let stdin = child.stdin.take();
        let stdout = BufReader::new(child.stdout.take().unwrap());
        Self { child, stdin, stdout }
    }

    fn line(&mut self) -> String {
        let mut line = String::new();
        self.stdout.read_line(&mut line).unwrap();
        line
    }

    fn send_line(&mut self) {
        self.stdin.as_mut().unwrap().write_all(b"go\n").unwrap();
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _already_gone = self.child.kill();
        let _status = self.child.wait();
    }
}

#[test]
fn calls_makes_as_many_host_calls_of_each_kind_as_asked_for() {
    let counts = counts(&[
        "--tasks",
        "3",
        "--threads",
        "2",
        "--calls",
        "7",
        "--repeat",
        "2",
        "--nap-us",
        "1",
    ]);
    assert_eq!(counts.invocations, numbers([("calls/start", 6)]));
    let host_calls = [
        ("host.add", 42),
        ("host.nap", 42),
        ("host.write", 42),
        ("host.read_file", 42),
    ];
    assert_eq!(counts.host_calls, numbers(host_calls));
    let syscalls = [
        ("write", 42),
        ("openat", 42),
        ("pread64", 42),
        ("close", 42),
        ("nanosleep", 42),
    ];
    assert_eq!(counts.syscalls, numbers(syscalls));
    assert_eq!(counts.syscalls_by_host_call["host.write"], numbers([("write", 42)]));
    assert_eq!((counts.suspends, counts.resumes, counts.moves), (0, 0, 0));
}

#[test]
fn a_counted_write_really_writes() {
    let file = tempfile::NamedTempFile::new().unwrap();
    let path = file.path().to_str().unwrap();
    let counts = counts(&["--scenario", "writes", "--calls", "25", "--work", "1", "--output", path]);
    assert_eq!(counts.syscalls, numbers([("write", 25)]));
    assert_eq!(std::fs::read_to_string(path).unwrap(), "one line of text\n".repeat(25));
}

#[test]
fn each_nap_of_async_calls_suspends_a_fiber_once() {
    let counts = counts(&["--mode", "async", "--tasks", "5", "--threads", "2", "--calls", "20"]);
    assert_eq!(counts.host_calls["host.nap"], 100);
    assert_eq!((counts.suspends, counts.resumes), (100, 100));
    assert!(!counts.syscalls.contains_key("nanosleep"), "{counts:?}");
}

#[test]
fn fibers_are_resumed_on_other_threads_than_they_left() {
    let counts = counts(&["--mode", "async", "--tasks", "4", "--threads", "4", "--calls", "100"]);
    assert_eq!(counts.resumes, 400);
    assert!(counts.moves > 0 && counts.moves <= counts.resumes, "{counts:?}");
}

#[test]
fn the_pooling_allocator_changes_no_count() {
    let arguments = ["--mode", "async", "--tasks", "8", "--threads", "2", "--calls", "5"];
    let usual = counts(&arguments);
    let pooled = counts(&[&arguments[..], &["--pooling"]].concat());
    assert_eq!(
        pooled,
        Counts {
            moves: pooled.moves,
            ..usual
        }
    );
}

#[test]
fn nested_enters_three_levels_with_syscalls_at_each() {
    for (mode, suspends) in [("sync", 0), ("async", 36)] {
        let arguments = [
            "--scenario",
            "nested",
            "--mode",
            mode,
            "--tasks",
            "2",
            "--threads",
            "2",
            "--calls",
            "6",
            "--nap-us",
            "50",
        ];
        let counts = counts(&arguments);
        assert_eq!(
            counts.invocations,
            numbers([("nested/level1", 2), ("nested/level2", 12), ("inner/level3", 12)])
        );
        let host_calls = [
            ("host.descend", 12),
            ("host.cross", 12),
            ("host.write", 36),
            ("host.nap", 12),
        ];
        assert_eq!(counts.host_calls, numbers(host_calls), "{mode}");
        assert_eq!(counts.syscalls["write"], 36 + 2 * 12 + 2 * 12, "{mode}");
        // The nap at the third level takes the fibers of all three levels off the thread.
        assert_eq!((counts.suspends, counts.resumes), (suspends, suspends), "{mode}");
    }
}

#[test]
fn traps_ends_invocations_in_every_way() {
    let kinds = [
        ("memory_out_of_bounds", 4),
        // Once by the task, once by a host function that goes on.
        ("unreachable", 8),
        ("integer_division_by_zero", 4),
        ("integer_overflow", 4),
        ("stack_overflow", 4),
        ("indirect_call_to_null", 4),
        ("bad_signature", 4),
        ("table_out_of_bounds", 4),
        ("host_error", 4),
        ("uncaught_exception", 4),
    ];
    for mode in ["sync", "async"] {
        let counts = counts(&["--scenario", "traps", "--mode", mode, "--tasks", "2", "--calls", "2"]);
        assert_eq!(counts.traps, numbers(kinds), "{mode}");
        assert_eq!(counts.invocations["traps/ok"], 40, "{mode}");
        // One goes on after another's trap, and one catches an exception of its own.
        assert_eq!(counts.invocations.values().sum::<u64>(), 40 + 44 + 4 + 4, "{mode}");
    }
}

#[test]
fn hostile_names_reach_the_imports_and_the_exports() {
    let counts = counts(&["--scenario", "hostile", "--calls", "2"]);
    let longest = counts.invocations.keys().map(String::len).max().unwrap();
    assert!(longest > 10_000);
    for text in ["-->>", "\n", "\"", "%%{init", "\u{202e}", "<img", "\u{1b}"] {
        assert!(
            counts.invocations.keys().any(|name| name.contains(text)),
            "{text:?} in no export"
        );
        assert!(
            counts.host_calls.keys().any(|name| name.contains(text)),
            "{text:?} in no import"
        );
    }
    assert_eq!(counts.invocations["/go"], 2, "the module whose name is not UTF-8");
    let total: u64 = counts.host_calls.values().sum();
    assert_eq!(counts.syscalls, numbers([("write", total)]));
    assert_eq!(counts.invocations.values().sum::<u64>(), total);
    assert_eq!(counts.invocations.len(), counts.host_calls.len());
}

#[test]
fn code_compiled_ahead_of_time_counts_as_compiled_now_and_leaves_no_file() {
    let directory = tempfile::tempdir().unwrap();
    let usual = counts(&["--calls", "3"]);
    let output = workload(&["--scenario", "cwasm", "--calls", "3"])
        .env("TMPDIR", directory.path())
        .output()
        .unwrap();
    let mapped: Counts = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(mapped, usual);
    assert_eq!(directory.path().read_dir().unwrap().count(), 0);
}

#[test]
fn spin_stays_in_the_guest() {
    let counts = counts(&["--scenario", "spin", "--calls", "3", "--work", "10", "--repeat", "4"]);
    assert_eq!(counts.invocations, numbers([("spin/spin", 4)]));
    assert_eq!((counts.host_calls, counts.syscalls), (Numbers::new(), Numbers::new()));
}

#[test]
fn a_waiting_workload_runs_nothing_before_it_is_told_to() {
    for late in [&[][..], &["--compile-after-wait"]] {
        let file = tempfile::NamedTempFile::new().unwrap();
        let path = file.path().to_str().unwrap();
        let arguments = [
            "--scenario",
            "writes",
            "--calls",
            "3",
            "--work",
            "1",
            "--wait",
            "--output",
            path,
        ];
        let mut running = Running::start(&[&arguments[..], late].concat());
        assert_eq!(running.line(), "ready\n");
        assert_eq!(file_length(file.path()), 0);
        running.send_line();
        let counts: Counts = serde_json::from_str(&running.line()).unwrap();
        assert_eq!(counts.syscalls, numbers([("write", 3)]));
        assert!(running.child.wait().unwrap().success());
        assert_eq!(file_length(file.path()), 3 * 17);
    }
}

fn file_length(path: &Path) -> u64 {
    path.metadata().unwrap().len()
}

#[test]
fn a_workload_that_is_never_told_to_run_fails() {
    let output = run(&["--wait"]);
    assert_eq!(output.status.code(), Some(1));
    assert_eq!(output.stdout, b"ready\n");
    assert!(
        String::from_utf8_lossy(&output.stderr).contains("stdin ended"),
        "{output:?}"
    );
}

#[test]
fn a_held_workload_leaves_when_stdin_ends() {
    let mut running = Running::start(&["--scenario", "spin", "--calls", "1", "--hold"]);
    let counts: Counts = serde_json::from_str(&running.line()).unwrap();
    assert_eq!(counts.invocations["spin/spin"], 1);
    assert_eq!(running.child.try_wait().unwrap(), None);
    running.stdin = None;
    assert!(running.child.wait().unwrap().success());
}

#[test]
fn forever_reports_progress_until_killed() {
    #[derive(Deserialize)]
    struct Beat {
        heartbeat: u64,
    }
    for mode in ["sync", "async"] {
        let mut running = Running::start(&[
            "--scenario",
            "forever",
            "--mode",
            mode,
            "--tasks",
            "2",
            "--threads",
            "2",
        ]);
        let beats: Vec<u64> = (0..4)
            .map(|_| serde_json::from_str::<Beat>(&running.line()).unwrap().heartbeat)
            .collect();
        assert!(beats[3] > beats[1], "{mode}: {beats:?}");
        assert_eq!(running.child.try_wait().unwrap(), None);
    }
}

#[test]
fn a_process_that_departs_in_a_host_call_has_told_its_counts_before() {
    for (scenario, syscall) in [("exec-mid-call", "execve"), ("exit-mid-call", "exit_group")] {
        for mode in ["sync", "async"] {
            let counts = counts(&["--scenario", scenario, "--mode", mode, "--threads", "3"]);
            assert_eq!(
                counts.syscalls,
                numbers([("write", 2), (syscall, 1)]),
                "{scenario} {mode}"
            );
            assert_eq!(counts.invocations.values().sum::<u64>(), 1, "{scenario} {mode}");
        }
    }
}

#[test]
fn a_scenario_that_ends_the_process_takes_one_task() {
    let output = run(&["--scenario", "exec-mid-call", "--tasks", "2"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(output.stdout.is_empty());
    assert!(
        String::from_utf8_lossy(&output.stderr).contains("at most 1 task"),
        "{output:?}"
    );
}

#[test]
fn bad_arguments_are_refused_with_the_usage_exit_code() {
    for arguments in [
        ["--scenario", "nonsense"],
        ["--mode", "both"],
        ["--tasks", "0"],
        ["--threads", "-1"],
    ] {
        assert_eq!(run(&arguments).status.code(), Some(2), "{arguments:?}");
    }
}

#[test]
fn an_output_that_cannot_be_opened_is_named_in_the_error() {
    let output = run(&["--output", "/no/such/directory/file"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(
        String::from_utf8_lossy(&output.stderr).contains("/no/such/directory/file"),
        "{output:?}"
    );
}

#[test]
fn components_make_as_many_calls_of_each_kind_as_asked_for() {
    for name in ["components", "components-cwasm"] {
        for (mode, suspends) in [("sync", 0), ("async", 42)] {
            let arguments = [
                "--tasks",
                "3",
                "--threads",
                "2",
                "--calls",
                "7",
                "--repeat",
                "2",
                "--nap-us",
                "1",
            ];
            let counts = counts(&[&["--scenario", name, "--mode", mode][..], &arguments].concat());
            let invocations = [
                ("main/test:guest/runner@1.0.0#start", 6),
                ("main/greet", 3),
                ("main/cabi_post_greet", 3),
                ("libc/cabi_realloc", 45),
            ];
            assert_eq!(counts.invocations, numbers(invocations));
            let host_calls = [
                ("wasi:clocks/monotonic-clock@0.2.6.now", 42),
                ("test:host/ops@1.0.0.add", 42),
                ("test:host/ops@1.0.0.nap", 42),
                ("test:host/store@1.0.0.write", 42),
                ("test:host/store@1.0.0.read", 42),
            ];
            assert_eq!(counts.host_calls, numbers(host_calls));
            assert_eq!(counts.syscalls["write"], 42);
            assert_eq!((counts.suspends, counts.resumes), (suspends, suspends));
        }
    }
}

#[test]
fn a_failing_component_fails_in_both_ways() {
    let counts = counts(&["--scenario", "components-failing", "--repeat", "3"]);
    assert_eq!(counts.traps, numbers([("host_error", 3), ("unreachable", 3)]));
    assert_eq!(counts.host_calls, numbers([("test:host/ops@1.0.0.fail", 3)]));
}
