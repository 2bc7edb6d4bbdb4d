//! `wasmtime` as it comes from the Python package index, through its C API.

use wasmscope_tests::agent::Agent;
use wasmscope_tests::environment::{self, Kernel};
use wasmscope_tests::workload::Workload;

#[test]
fn wasmtime_from_pypi_is_seen_exactly() {
    let Some(_kernel) = Kernel::acquire() else { return };
    let Some(python) = environment::python() else { return };
    let arguments = ["--tasks", "3", "--calls", "20", "--repeat", "5", "--trap"];
    let workload = Workload::ready_python(python, "pywasm.py", &arguments);
    let agent = Agent::json_of(&workload.pid());
    let counted = workload.run();
    let seen = agent.captured();
    assert_eq!(seen.counts(), counted, "losses: {:?}", seen.capture.losses);
    seen.assert_well_formed();
    seen.assert_nothing_lost();
}

#[test]
fn a_library_that_publishes_its_code_under_trace_is_noticed() {
    let Some(_kernel) = Kernel::acquire() else { return };
    let Some(python) = environment::python() else { return };
    let workload = Workload::ready_python(
        python,
        "pywasm.py",
        &["--calls", "10", "--repeat", "20", "--compile-after-wait"],
    );
    let agent = Agent::json_of(&workload.pid());
    let counted = workload.run();
    let seen = agent.captured();
    let (lost, losses) = (seen.lost("kernel", "uncalibrated"), &seen.capture.losses);
    let (found, made) = (seen.counts().syscalls(), counted.syscalls());
    for (name, count) in &found {
        assert!(
            *count <= made.get(name).copied().unwrap_or(0),
            "{count} {name} seen of {made:?}"
        );
    }
    let (found, made) = (found.values().sum::<u64>(), made.values().sum::<u64>());
    assert!(found > 0 && found + lost >= made, "{found} seen of {made}: {losses:?}");
}
