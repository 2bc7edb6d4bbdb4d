//! Versions of wasmtime, and several of them in one process, through the C API of the Python package.

use wasmscope::span::SpanKind;
use wasmscope_tests::agent::Agent;
use wasmscope_tests::captured::{self, Captured};
use wasmscope_tests::environment::{self, Kernel};
use wasmscope_tests::workload::{Counts, Workload};

/// A run of `pywasm.py` with some versions, which is complete only if all of them are there.
fn workload(versions: &[&str], arguments: &[&str]) -> Option<Workload> {
    let python = environment::python()?;
    let wheels: Option<Vec<_>> = versions.iter().map(|version| environment::wheel(version)).collect();
    let wheels = wheels?;
    let libraries = wheels.iter().flat_map(|wheel| ["--library", wheel]);
    let words: Vec<_> = libraries.chain(arguments.iter().copied()).collect();
    Some(Workload::ready_python(python, "pywasm.py", &words))
}

#[track_caller]
fn assert_equal(versions: &[&str], seen: &Captured, counted: &Counts) {
    assert_eq!(
        &seen.counts(),
        counted,
        "{versions:?}, losses: {:?}",
        seen.capture.losses
    );
    seen.assert_well_formed();
}

/// Attached while the guests are compiled and have not been called.
fn run(versions: &[&str], arguments: &[&str]) -> Option<Captured> {
    let workload = workload(versions, arguments)?;
    let agent = Agent::json_of(&workload.pid());
    let counted = workload.run();
    let seen = agent.captured();
    assert_equal(versions, &seen, &counted);
    seen.assert_nothing_lost();
    if !counted.host_calls.is_empty() {
        seen.assert_called_from("start", &["emit", "loop_emit", "start"]);
    }
    Some(seen)
}

/// Attached before any library is loaded; what runs until all of them are seen to be watched is not counted.
fn run_loaded_late(versions: &[&str], arguments: &[&str]) -> Option<()> {
    let arguments = [&["--load-after-wait", "--warm-up"], arguments].concat();
    let mut workload = workload(versions, &arguments)?;
    let agent = Agent::json_of(&workload.pid());
    workload.0.send_line();
    for number in 1..=versions.len() {
        let module = if number == 1 {
            "\"warm_pyguest\"".to_owned()
        } else {
            format!("\"warm_pyguest{number}\"")
        };
        agent
            .0
            .stdout_line(|line| line.contains(&module) && line.contains("read_file"));
    }
    let counted = workload.run();
    let mut seen = agent.captured().without_modules("warm_");
    // The very first ones of those that warm up may have no name; none of the others lacks one.
    let is_named = |trace: &captured::Trace| matches!(&trace.root.kind, SpanKind::Invoke { function: Some(_) });
    let named = seen.traces.iter().filter(|trace| is_named(trace));
    let first_ns = named
        .map(|trace| trace.root.start_ns)
        .min()
        .expect("there are invocations");
    seen.traces
        .retain(|trace| is_named(trace) || trace.root.start_ns > first_ns);
    assert_equal(versions, &seen, &counted);
    assert_eq!(seen.capture.emitted_count, seen.capture.delivered_count);
    Some(())
}

#[test]
fn every_version_is_seen_exactly() {
    let Some(_kernel) = Kernel::acquire() else { return };
    for version in environment::wheel_versions() {
        let arguments = ["--tasks", "3", "--calls", "20", "--repeat", "5", "--trap"];
        let Some(seen) = run(&[version], &arguments) else {
            return;
        };
        let of = seen.traces.first().expect("there are invocations");
        let major = version.split('.').next().expect("a version");
        let said = of.process.runtime_version.as_deref().expect("the code says it");
        assert_eq!(said.split('.').next(), Some(major));
        let limits = &of.process.limits;
        assert!(!limits.iter().any(|limit| limit.contains("not followed")), "{limits:?}");
    }
}

#[test]
fn an_export_that_calls_nothing_is_named_in_every_version() {
    let Some(_kernel) = Kernel::acquire() else { return };
    for version in environment::wheel_versions() {
        if run(&[version], &["--quick", "--calls", "3", "--repeat", "20"]).is_none() {
            return;
        }
    }
}

#[test]
fn a_library_loaded_under_trace_is_seen_exactly_once_it_is_watched() {
    let Some(_kernel) = Kernel::acquire() else { return };
    for version in environment::wheel_versions() {
        if run_loaded_late(&[version], &["--calls", "10", "--repeat", "5", "--trap"]).is_none() {
            return;
        }
    }
}

#[test]
fn two_copies_in_one_process_are_told_apart() {
    let Some(_kernel) = Kernel::acquire() else { return };
    for versions in [["36.0.0", "50.0.1"], ["48.0.0", "24.0.0"], ["48.0.0", "50.0.1"]] {
        // Each thread uses one of them.
        let arguments = ["--tasks", "4", "--calls", "20", "--repeat", "5", "--trap", "--quick"];
        if run(&versions, &arguments).is_none() {
            return;
        }
    }
}

#[test]
fn a_guest_called_by_a_host_function_of_another_copy_is_its_callee() {
    let Some(_kernel) = Kernel::acquire() else { return };
    for versions in [["36.0.0", "50.0.1"], ["50.0.1", "24.0.0"]] {
        let Some(seen) = run(&versions, &["--calls", "4", "--repeat", "3", "--nest"]) else {
            return;
        };
        // The inner invocations are within host calls of the outer ones.
        assert_eq!(seen.traces.len(), 3);
    }
}

#[test]
fn a_third_and_a_fourth_copy_loaded_under_trace_are_followed() {
    let Some(_kernel) = Kernel::acquire() else { return };
    let versions: Vec<_> = environment::wheel_versions().collect();
    let _ = run_loaded_late(&versions, &["--tasks", "8", "--calls", "10", "--repeat", "3", "--trap"]);
}
