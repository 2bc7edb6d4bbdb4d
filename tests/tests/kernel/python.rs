//! `wasmtime` as it comes from PyPI, through its C API.

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
    seen.assert_nothing_lost();
    seen.assert_well_formed();
    assert_eq!(seen.counts(), counted);
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
    seen.assert_nothing_lost();
    assert_eq!(seen.counts().syscalls(), counted.syscalls());
}
