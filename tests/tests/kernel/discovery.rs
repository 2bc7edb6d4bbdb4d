//! Processes that start to run wasm while the whole machine is watched.

use wasmscope_tests::agent::Agent;
use wasmscope_tests::environment::Kernel;
use wasmscope_tests::workload::Workload;

#[test]
fn a_process_that_compiles_after_tracing_began_is_noticed() {
    let Some(_kernel) = Kernel::acquire() else { return };
    let agent = Agent::watching(["--format", "json"]);
    agent.0.stderr_line(|line| line.starts_with("watching every process"));
    let arguments = [
        "--tasks",
        "2",
        "--threads",
        "2",
        "--calls",
        "50",
        "--repeat",
        "10",
        "--compile-after-wait",
    ];
    let workload = Workload::ready(&arguments);
    let pid = workload.0.pid();
    let counted = workload.run();
    agent.interrupt();
    let seen = agent.captured().of_process(pid);

    // What is seen is on its host call, and what is missing is counted.
    let (found, made) = (seen.counts(), counted.syscalls());
    for (host_call, syscalls) in &found.syscalls_by_host_call {
        for (name, count) in syscalls {
            let made = counted
                .syscalls_by_host_call
                .get(host_call)
                .and_then(|syscalls| syscalls.get(name));
            assert!(Some(count) <= made, "{count} {name} in {host_call}, made: {made:?}");
        }
    }
    let (found, made): (u64, u64) = (found.syscalls().values().sum(), made.values().sum());
    let lost: u64 = seen.capture.losses.iter().map(|loss| loss.count).sum();
    assert!(
        found + lost >= made,
        "{found} seen + {lost} lost of {made}: {:?}",
        seen.capture.losses
    );
    assert!(found > made / 2, "{found} of {made}");
}

#[test]
fn a_process_that_was_there_before_is_found() {
    let Some(_kernel) = Kernel::acquire() else { return };
    let workload = Workload::ready(&["--tasks", "2", "--threads", "2", "--calls", "20"]);
    let pid = workload.0.pid();
    let agent = Agent::watching(["--format", "json"]);
    agent.0.stderr_line(|line| line.starts_with("watching every process"));
    let counted = workload.run();
    agent.interrupt();
    let seen = agent.captured().of_process(pid);
    seen.assert_well_formed();
    assert_eq!(seen.counts(), counted);
}

#[test]
fn a_window_with_a_length_ends_by_itself() {
    let Some(_kernel) = Kernel::acquire() else { return };
    let mut workload = Workload::ready(&["--scenario", "forever", "--tasks", "2", "--threads", "2"]);
    let agent = Agent::watching(["--pid", &workload.pid(), "--format", "json", "--duration", "0.5"]);
    workload.0.send_line();
    let seen = agent.captured();
    assert!(seen.capture.end_ns - seen.capture.start_ns >= 500_000_000);
    assert!(!seen.traces.is_empty());
    assert!(workload.0.is_running());
}
