//! A recording, replayed where there are no privileges.

use std::os::unix::fs::PermissionsExt as _;

use tempfile::tempdir;
use wasmscope_tests::agent::{Agent, run, unprivileged};
use wasmscope_tests::captured::Captured;
use wasmscope_tests::environment::Kernel;
use wasmscope_tests::workload::Workload;

#[test]
fn a_replay_without_privileges_says_what_the_live_trace_said() {
    let Some(_kernel) = Kernel::acquire() else { return };
    let scenarios: [&[&str]; 3] = [
        &["--mode", "async", "--tasks", "8", "--threads", "4", "--calls", "20"],
        &[
            "--scenario",
            "nested",
            "--mode",
            "async",
            "--tasks",
            "2",
            "--calls",
            "10",
        ],
        &["--scenario", "traps", "--tasks", "2", "--threads", "2", "--calls", "3"],
    ];
    for arguments in scenarios {
        let directory = tempdir().unwrap();
        std::fs::set_permissions(directory.path(), std::fs::Permissions::from_mode(0o755)).unwrap();
        let recording = directory.path().join("run.rec");
        let workload = Workload::ready(arguments);
        let pid = workload.pid();
        let words = [
            "--pid",
            &pid,
            "--format",
            "json",
            "--record",
            recording.to_str().unwrap(),
        ];
        let agent = Agent::watching(words);
        workload.run();
        let live = agent.captured();

        let mut command = unprivileged();
        command.arg("replay").arg(&recording).args(["--format", "json"]);
        let mut replayed = Captured::parse(&run(command).succeeded().stdout);
        assert!(replayed.capture.replay_of.is_some(), "it is labelled as a replay");
        replayed.capture.replay_of = None;
        assert_eq!(replayed.capture, live.capture, "{arguments:?}");
        let by_id = |captured: &Captured| {
            let mut traces = captured.traces.clone();
            traces.sort_by(|a, b| a.trace_id.cmp(&b.trace_id));
            traces
        };
        assert!(!live.traces.is_empty());
        for (replayed, live) in by_id(&replayed).iter().zip(by_id(&live)) {
            assert_eq!(*replayed, live, "{arguments:?}");
        }
        assert_eq!(replayed.traces.len(), live.traces.len());
    }
}

#[test]
fn a_file_that_is_no_recording_is_refused_in_one_line() {
    let directory = tempdir().unwrap();
    for (name, bytes) in [
        ("empty", &b""[..]),
        ("binary", b"\x7fELF\0\xff"),
        ("json", b"{\"a\": 1}\n"),
        ("cut", b"{\"wasmscope_rec"),
    ] {
        let file = directory.path().join(name);
        std::fs::write(&file, bytes).unwrap();
        let mut command = wasmscope_tests::agent::wasmscope();
        command.arg("replay").arg(&file);
        let finished = run(command).ended_with(1);
        assert_eq!(finished.stderr.len(), 1, "{name}: {:?}", finished.stderr);
        assert_eq!(finished.stdout, Vec::<String>::new());
    }
}
