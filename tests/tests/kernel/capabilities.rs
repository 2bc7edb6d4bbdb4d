//! What each capability of the manifest is for: the agent without it, beside processes of its own user and of another.

use std::fs::{self, Permissions};
use std::os::unix::fs::{PermissionsExt as _, chown};
use std::path::Path;
use std::process::Command;

use tempfile::tempdir;
use wasmscope_tests::agent::{Agent, wasmscope};
use wasmscope_tests::environment::{self, Kernel};
use wasmscope_tests::running::Running;
use wasmscope_tests::samples;
use wasmscope_tests::workload::Workload;

const ALL: [&str; 5] = ["bpf", "perfmon", "sys_ptrace", "dac_read_search", "checkpoint_restore"];
const GUEST_USER: u32 = 10_001;
const CALLS: &str = "25";

/// `wasmscope trace` as root with all capabilities of the manifest but one, and no other.
fn tracing_without(capability: Option<&str>, metrics: &Path) -> Command {
    let held = ALL.iter().filter(|name| Some(**name) != capability);
    let bounding: Vec<_> = held.copied().collect();
    let agent = wasmscope();
    let mut command = Command::new("setpriv");
    command
        .arg(format!("--bounding-set=-all,+{}", bounding.join(",+")))
        .args(["--inh-caps=-all", "--no-new-privs"])
        .arg(agent.get_program())
        .args(["trace", "--format", "json", "--metrics-file"])
        .arg(metrics);
    command
}

/// Host calls that were seen of a program of another user, with wasmtime in it, and of one of the agent's own user, with wasmtime in a library; and what they counted.
fn seen_without(capability: Option<&str>, python: &Path) -> ([u64; 2], [u64; 2]) {
    let directory = tempdir().unwrap();
    fs::set_permissions(directory.path(), Permissions::from_mode(0o755)).unwrap();
    let program = directory.path().join("workload");
    fs::copy(environment::test_host("workload"), &program).unwrap();
    fs::set_permissions(&program, Permissions::from_mode(0o700)).unwrap();
    chown(&program, Some(GUEST_USER), Some(GUEST_USER)).unwrap();
    let user = format!("--reuid={GUEST_USER}");
    let group = format!("--regid={GUEST_USER}");
    let words = [
        &user,
        &group,
        "--clear-groups",
        program.to_str().unwrap(),
        "--calls",
        CALLS,
    ];
    let other = Workload::ready_as(Path::new("setpriv"), &words);
    // Root without capabilities: what may be done to it is a question of the user alone.
    let script = environment::tests_directory().join("python/pywasm.py");
    let script = script.to_str().unwrap();
    let words = [
        "--bounding-set=-all",
        "--inh-caps=-all",
        python.to_str().unwrap(),
        script,
        "--calls",
        CALLS,
    ];
    let own = Workload::ready_as(Path::new("setpriv"), &words);

    let metrics = directory.path().join("metrics.txt");
    let agent = Agent(Running::start(tracing_without(capability, &metrics)));
    agent.0.stderr_line(|line| line.starts_with("watching"));
    let counted = [other.run(), own.run()].map(|counts| counts.host_calls.values().sum());
    agent.interrupt();
    agent.finish();
    let seen = samples::sums(&samples::read(python, &metrics), "wasm_host_calls_total", "module");
    let seen = ["calls", "pyguest"].map(|module| seen.get(module).copied().unwrap_or_default());
    (seen, counted)
}

#[test]
fn each_capability_is_needed_for_what_the_manifest_says() {
    let Some(_kernel) = Kernel::acquire() else { return };
    let Some(python) = environment::python() else { return };
    let directory = tempdir().unwrap();
    for capability in ["bpf", "perfmon"] {
        let metrics = directory.path().join("metrics.txt");
        let finished = Running::start(tracing_without(Some(capability), &metrics)).finish();
        let finished = finished.ended_with(1);
        let said = finished.stderr_text();
        assert!(
            said.contains("needs CAP_BPF and CAP_PERFMON"),
            "without {capability}: {said}"
        );
    }
    let ([other, own], counted) = seen_without(None, python);
    assert_eq!([other, own], counted, "with all of them");
    for (capability, of_others, of_libraries) in [
        ("sys_ptrace", false, true),
        ("dac_read_search", false, true),
        ("checkpoint_restore", true, false),
    ] {
        let (seen, [other, own]) = seen_without(Some(capability), python);
        let expected = [other * u64::from(of_others), own * u64::from(of_libraries)];
        assert_eq!(seen, expected, "without {capability}");
    }
}
