//! What is asked in vain is refused at once, in one line, with nothing started.

use std::process::Command;

use tempfile::tempdir;
use wasmscope_tests::agent::{run, unprivileged, wasmscope};
use wasmscope_tests::environment::Kernel;
use wasmscope_tests::running::Finished;
use wasmscope_tests::workload::Workload;

fn trace(arguments: &[&str]) -> Command {
    let mut command = wasmscope();
    command.arg("trace").args(arguments);
    command
}

/// One line, which contains each of `words`.
#[track_caller]
fn assert_one_line(finished: &Finished, words: &[&str]) {
    assert_eq!(finished.stderr.len(), 1, "{:?}", finished.stderr);
    for word in words {
        assert!(
            finished.stderr[0].contains(word),
            "no {word:?} in {:?}",
            finished.stderr
        );
    }
}

#[test]
fn without_privileges_a_trace_names_what_is_missing_and_the_fix() {
    let Some(_kernel) = Kernel::acquire() else { return };
    let workload = Workload::ready(&["--calls", "1"]);
    for target in [&["--pid", &workload.pid()][..], &["--", "/bin/true"], &[]] {
        let mut command = unprivileged();
        command.args(["trace", "--duration", "1"]).args(target);
        let finished = run(command).ended_with(1);
        let text = finished.stderr_text();
        for word in ["not permitted", "sudo", "setcap", "cap_bpf", "cap_perfmon"] {
            assert!(text.contains(word), "no {word:?} in {text}");
        }
    }
    workload.run();
}

#[test]
fn without_privileges_check_says_that_tracing_cannot_work() {
    let Some(_kernel) = Kernel::acquire() else { return };
    let mut command = unprivileged();
    command.arg("check");
    let finished = run(command).ended_with(1);
    let text = finished.stdout.join("\n");
    for word in ["tracing cannot work here", "CAP_BPF", "CAP_PERFMON", "setcap"] {
        assert!(text.contains(word), "no {word:?} in {text}");
    }
}

#[test]
fn with_privileges_check_says_that_tracing_works_and_lists_the_process() {
    let Some(_kernel) = Kernel::acquire() else { return };
    let workload = Workload::ready(&["--calls", "1"]);
    let mut command = wasmscope();
    command.arg("check");
    let finished = run(command).succeeded();
    let text = finished.stdout.join("\n");
    assert!(text.contains("tracing works here"), "{text}");
    let pid = workload.pid();
    let line = finished
        .stdout
        .iter()
        .find(|line| line.split_whitespace().any(|word| word == pid));
    assert!(
        line.unwrap_or_else(|| panic!("{text}"))
            .contains("wasmtime · tiers 0 1"),
        "{line:?}"
    );
    workload.run();
}

#[test]
fn wrong_usage_exits_with_2() {
    for arguments in [
        &["trace", "--no-such-option"][..],
        &["trace", "--pid", "0"],
        &["trace", "--pid", "1", "--", "true"],
        &["trace", "--format", "yaml"],
        &["trace", "--duration", "0"],
        &["trace", "--tier", "2"],
        &["replay"],
        &["no-such-command"],
        &[],
    ] {
        let mut command = wasmscope();
        command.args(arguments);
        run(command).ended_with(2);
    }
}

#[test]
fn a_process_that_is_not_there_is_named() {
    let Some(_kernel) = Kernel::acquire() else { return };
    // Above the largest pid that Linux gives out.
    let finished = run(trace(&["--pid", "4194305"])).ended_with(1);
    assert_one_line(&finished, &["4194305"]);
}

#[test]
fn a_program_that_is_not_there_is_named() {
    for name in ["no-such-program", "/no/such/program"] {
        let finished = run(trace(&["--", name])).ended_with(1);
        assert_one_line(&finished, &[name]);
    }
}

#[test]
fn an_output_that_cannot_be_written_stops_the_trace_before_the_program_starts() {
    let directory = tempdir().unwrap();
    let proof = directory.path().join("started");
    let proof_path = proof.to_str().unwrap();
    for option in ["-o", "--record", "--metrics-file"] {
        let arguments = [option, "/no/such/directory/file", "--", "touch", proof_path];
        let finished = run(trace(&arguments)).ended_with(1);
        assert_one_line(&finished, &["/no/such/directory/file"]);
        assert!(!proof.exists(), "{option}: the program was started");
    }
}

#[test]
fn the_exit_code_of_the_traced_program_is_passed_on() {
    let Some(_kernel) = Kernel::acquire() else { return };
    let directory = tempdir().unwrap();
    let output = directory.path().join("traces.json");
    let arguments = [
        "--format",
        "json",
        "-o",
        output.to_str().unwrap(),
        "--",
        "sh",
        "-c",
        "exit 7",
    ];
    run(trace(&arguments)).ended_with(7);
}

#[test]
fn a_trace_of_a_process_without_wasm_ends_with_it_and_says_that_there_was_nothing_to_draw() {
    let Some(_kernel) = Kernel::acquire() else { return };
    let finished = run(trace(&["--", "/bin/true"])).ended_with(1);
    assert!(
        finished.stderr_text().contains("nothing to draw"),
        "{}",
        finished.stderr_text()
    );
}
