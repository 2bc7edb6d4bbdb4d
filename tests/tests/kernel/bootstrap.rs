//! Hosts without symbols: activations are exact from the first, host calls once their functions have been learnt from one.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;

use tempfile::{TempDir, tempdir};
use wasmscope::image::{HostImage, swap, unwind_table::UnwindTable};
use wasmscope::span::{Loss, Role, SpanKind};
use wasmscope_tests::agent::Agent;
use wasmscope_tests::captured::{Captured, stack_names};
use wasmscope_tests::environment::{self, Kernel};
use wasmscope_tests::running::DEADLINE;
use wasmscope_tests::workload::{Counts, FOREVER, Workload, stripped};

/// What the agent logs when it knows more host functions than before.
pub(crate) const LEARNT: &str = "host functions learnt";
/// Makes the agent say so.
pub(crate) const LOG: [(&str, &str); 1] = [("WASMSCOPE_LOG", "wasmscope=info")];

pub(crate) fn stripped_workload() -> (TempDir, PathBuf) {
    let directory = tempdir().unwrap();
    let path = directory.path().join("workload");
    stripped(&environment::test_host("workload"), &path);
    (directory, path)
}

/// Lets a workload go and waits until it has counted, while it stays.
pub(crate) fn counted_and_held(workload: &mut Workload) -> Counts {
    workload.0.send_line();
    let line = workload.0.stdout_line(|line| line.starts_with("{\"scenario\""));
    Counts::among([line.as_str()])
}

pub(crate) fn of_process(seen: &Captured, workload: &Workload) -> Captured {
    let (traces, capture) = (seen.traces.clone(), seen.capture.clone());
    Captured { traces, capture }.of_process(workload.0.pid())
}

/// Every host call has a name and the guest functions that its module has.
fn assert_named(seen: &Captured) {
    for span in seen.traces.iter().flat_map(|trace| trace.root.walk()) {
        if let SpanKind::HostCall { import } = &span.kind {
            assert!(import.is_some(), "{span:?}");
            assert_eq!(stack_names(span), ["emit", "loop_emit", "start"], "{span:?}");
        }
    }
}

/// Nothing is lost but the begins of host calls that ran while their probes were attached.
pub(crate) fn assert_lost_only_on_attaching(seen: &Captured) {
    let is_explained = |loss: &Loss| loss.reason == "host_call_end_without_begin";
    assert!(
        seen.capture.losses.iter().all(is_explained),
        "{:?}",
        seen.capture.losses
    );
    assert_eq!(seen.capture.emitted_count, seen.capture.delivered_count);
}

/// Descriptors of perf events that the agent has open.
pub(crate) fn perf_event_count(agent: &Agent) -> usize {
    fs::read_dir(format!("/proc/{}/fd", agent.0.pid()))
        .unwrap()
        .filter_map(|entry| fs::read_link(entry.unwrap().path()).ok())
        .filter(|target| target == Path::new("anon_inode:[perf_event]"))
        .count()
}

/// One process to learn from and one that is seen exactly, of one stripped binary.
fn assert_learns_and_remembers(arguments: &[&str]) {
    let (_directory, program) = stripped_workload();
    let arguments = [arguments, &["--hold"]].concat();
    let mut first = Workload::ready_as(&program, &arguments);
    let mut second = Workload::ready_as(&program, &arguments);
    let pids = ["--pid", &first.pid(), "--pid", &second.pid()];
    let agent = Agent::watching_with(pids.iter().chain(&["--format", "json"]), &LOG);
    let learnt_from = counted_and_held(&mut first);
    agent.0.stderr_line(|line| line.contains(LEARNT));
    assert_eq!(perf_event_count(&agent), 0, "of breakpoints that have done their work");
    let counted = counted_and_held(&mut second);
    agent.interrupt();
    let all = agent.captured();
    assert_lost_only_on_attaching(&all);

    let seen = of_process(&all, &second);
    seen.assert_well_formed();
    assert_named(&seen);
    assert_eq!(seen.counts(), counted);

    let seen = of_process(&all, &first);
    assert_named(&seen);
    let (found, made) = (seen.counts(), learnt_from);
    assert_eq!(found.invocations, made.invocations);
    assert_eq!(found.syscalls(), made.syscalls());
    assert_eq!(
        (found.suspends, found.resumes, found.moves),
        (made.suspends, made.resumes, made.moves)
    );
    for (name, count) in &found.host_calls {
        assert!(
            *count <= made.host_calls[name],
            "{name}: {count} of {:?}",
            made.host_calls
        );
    }
    for workload in [first, second] {
        workload.0.finish().succeeded();
    }
}

#[test]
fn a_stripped_host_is_seen_exactly_once_another_process_of_it_has_been_learnt_from() {
    let Some(_kernel) = Kernel::acquire() else { return };
    assert_learns_and_remembers(&["--tasks", "4", "--threads", "4", "--calls", "100", "--repeat", "3"]);
}

#[test]
fn fibers_of_a_stripped_host_are_seen_exactly() {
    let Some(_kernel) = Kernel::acquire() else { return };
    for allocator in [&[][..], &["--pooling"]] {
        let arguments = ["--mode", "async", "--tasks", "16", "--threads", "4", "--calls", "100"];
        assert_learns_and_remembers(&[&arguments[..], allocator].concat());
    }
}

#[test]
fn code_mapped_from_a_file_is_seen_exactly_in_a_stripped_host() {
    let Some(_kernel) = Kernel::acquire() else { return };
    let arguments = ["--scenario", "cwasm", "--calls", "50", "--repeat", "4"];
    assert_learns_and_remembers(&arguments);
    let fibers = ["--mode", "async", "--tasks", "4", "--threads", "2"];
    assert_learns_and_remembers(&[&arguments[..], &fibers].concat());
}

#[test]
fn a_copy_of_a_stripped_host_is_known_by_its_build_id() {
    let Some(_kernel) = Kernel::acquire() else { return };
    let (directory, program) = stripped_workload();
    let copy = directory.path().join("copy");
    fs::copy(&program, &copy).unwrap();
    let arguments = ["--calls", "50", "--repeat", "3", "--hold"];
    let mut first = Workload::ready_as(&program, &arguments);
    let agent = Agent::watching_with(["--format", "json"], &LOG);
    agent.0.stderr_line(|line| line.starts_with("watching every process"));
    counted_and_held(&mut first);
    agent.0.stderr_line(|line| line.contains(LEARNT));
    let mut second = Workload::ready_as(&copy, &arguments);
    agent
        .0
        .stderr_line(|line| line.contains("host functions known from another file"));
    let counted = counted_and_held(&mut second);
    agent.interrupt();
    let seen = of_process(&agent.captured(), &second);
    assert_named(&seen);
    assert_eq!(seen.counts(), counted);
}

#[test]
fn what_a_stripped_host_has_taught_is_told() {
    let Some(_kernel) = Kernel::acquire() else { return };
    let (_directory, program) = stripped_workload();
    let mut workload = Workload::ready_as(&program, &["--calls", "20", "--repeat", "2", "--hold"]);
    let agent = Agent::watching_with(["--pid", &workload.pid(), "--format", "json"], &LOG);
    let watching = agent.0.stderr_line(|line| line.starts_with("watching"));
    assert!(watching.contains("once their functions have been learnt"), "{watching}");
    counted_and_held(&mut workload);
    agent.0.stderr_line(|line| line.contains(LEARNT));
    workload.0.send_line();
    workload.0.finish().succeeded();
    let seen = agent.captured();
    let limits = &seen.traces.last().unwrap().process.limits;
    assert!(
        limits.iter().any(|limit| limit.contains("4 host functions learnt")),
        "{limits:?}"
    );
}

#[test]
fn breakpoints_that_were_never_hit_go_with_the_agent_however_it_ends() {
    let Some(_kernel) = Kernel::acquire() else { return };
    let (_directory, program) = stripped_workload();
    let arguments = ["--tasks", "4", "--threads", "2", "--calls", "50", "--repeat", "2"];
    let workload = Workload::ready_as(&program, &arguments);
    let agent = Agent::json_of(&workload.pid());
    assert!(perf_event_count(&agent) > 0);
    agent.0.signal(rustix::process::Signal::KILL);
    drop(agent);
    let again = Agent::json_of(&workload.pid());
    assert!(perf_event_count(&again) > 0, "the processor's registers are free again");
    again.0.signal(rustix::process::Signal::KILL);
    let counted = workload.run();
    assert_eq!(counted.invocations["calls/start"], 8);
    assert_eq!(counted.host_calls["host.add"], 400);
}

#[test]
fn an_agent_killed_while_it_learns_leaves_the_host_running() {
    let Some(_kernel) = Kernel::acquire() else { return };
    let (_directory, program) = stripped_workload();
    let mut workload = Workload::ready_as(&program, &FOREVER);
    workload.0.send_line();
    for _ in 0..3 {
        let agent = Agent::watching_with(["--pid", &workload.pid(), "--format", "json"], &LOG);
        agent.0.signal(rustix::process::Signal::KILL);
        drop(agent);
        let agent = Agent::watching_with(["--pid", &workload.pid(), "--format", "json"], &LOG);
        agent.0.stderr_line(|line| line.contains(LEARNT));
        agent.0.signal(rustix::process::Signal::KILL);
    }
    let agent = Agent::json_of(&workload.pid());
    agent.0.wait_for_lines(5);
    agent.interrupt();
    let seen = agent.captured();
    assert!(workload.0.is_running());
    assert!(
        seen.traces
            .iter()
            .any(|trace| trace.root.walk().any(|span| span.role() == Role::HostCall))
    );
    let begun = std::time::Instant::now();
    workload.0.signal(rustix::process::Signal::TERM);
    while workload.0.is_running() {
        assert!(begun.elapsed() < *DEADLINE);
    }
}

/// A copy of the `wasmtime` package whose library has no symbols, but for those that it exports.
fn stripped_package(python: &Path) -> TempDir {
    const WHERE: &str = "import os, wasmtime; print(os.path.dirname(wasmtime.__file__))";
    let output = Command::new(python).args(["-c", WHERE]).output().unwrap();
    let package = PathBuf::from(String::from_utf8(output.stdout).unwrap().trim());
    let directory = tempdir().unwrap();
    let status = Command::new("cp")
        .arg("-r")
        .args([package.as_path(), directory.path()])
        .status();
    assert!(status.unwrap().success());
    let library = Path::new("linux-x86_64/_libwasmtime.so");
    stripped(&package.join(library), &directory.path().join("wasmtime").join(library));
    directory
}

#[test]
fn a_stripped_c_api_library_is_seen_exactly_once_it_has_been_learnt_from() {
    let Some(_kernel) = Kernel::acquire() else { return };
    let Some(python) = environment::python() else { return };
    let package = stripped_package(python);
    let ready = |arguments: &[&str]| {
        let path = format!("PYTHONPATH={}", package.path().display());
        let script = environment::tests_directory().join("python/pywasm.py");
        let words = [&path, python.to_str().unwrap(), script.to_str().unwrap()];
        // It runs the program in its own place, as the same process.
        Workload::ready_as(Path::new("/usr/bin/env"), &[&words[..], arguments].concat())
    };
    let mut first = ready(&["--calls", "200", "--repeat", "200", "--hold"]);
    let second = ready(&["--tasks", "3", "--calls", "20", "--repeat", "5", "--trap"]);
    let pids = ["--pid", &first.pid(), "--pid", &second.pid()];
    let agent = Agent::watching_with(pids.iter().chain(&["--format", "json"]), &LOG);
    first.0.send_line();
    agent.0.stderr_line(|line| line.contains(LEARNT));
    let pid = second.0.pid();
    let counted = second.run();
    drop(first);
    let seen = agent.captured().of_process(pid);
    seen.assert_well_formed();
    assert_eq!(seen.counts(), counted);
}

#[test]
fn without_breakpoints_the_rest_is_seen_and_learning_waits_for_them() {
    let Some(_kernel) = Kernel::acquire() else { return };
    let (_directory, program) = stripped_workload();
    let arguments = ["--calls", "50", "--repeat", "4", "--hold"];
    let idle = [(); 2].map(|()| Workload::ready_as(&program, &arguments));
    let mut workload = Workload::ready_as(&program, &arguments);
    // Takes all there are, and never gets any of them hit.
    let other = Agent::json_of(&idle[0].pid());
    let another = Agent::json_of(&idle[1].pid());
    let agent = Agent::watching_with(["--pid", &workload.pid(), "--format", "json"], &LOG);
    let watching = agent.0.stderr_line(|line| line.starts_with("watching"));
    assert!(
        watching.contains("no breakpoint to learn host functions with"),
        "{watching}"
    );
    let counted = counted_and_held(&mut workload);
    drop((other, another));
    let mut next = Workload::ready_as(&program, &arguments);
    agent.interrupt();
    let seen = agent.captured();
    assert_eq!(seen.counts().invocations, counted.invocations);
    assert_eq!(seen.counts().syscalls(), counted.syscalls());
    assert_eq!(seen.counts().host_calls, [].into());
    seen.assert_nothing_lost();

    let agent = Agent::watching_with(["--pid", &next.pid(), "--format", "json"], &LOG);
    counted_and_held(&mut next);
    agent.0.stderr_line(|line| line.contains(LEARNT));
}

#[test]
fn host_calls_of_two_modules_of_a_stripped_host_are_named_each_as_its_own() {
    let Some(_kernel) = Kernel::acquire() else { return };
    let (_directory, program) = stripped_workload();
    let arguments = ["--scenario", "nested", "--calls", "10", "--repeat", "20", "--hold"];
    let mut first = Workload::ready_as(&program, &arguments);
    let mut second = Workload::ready_as(&program, &arguments);
    let pids = ["--pid", &first.pid(), "--pid", &second.pid()];
    let agent = Agent::watching_with(pids.iter().chain(&["--format", "json"]), &LOG);
    counted_and_held(&mut first);
    agent.0.stderr_line(|line| line.contains(LEARNT));
    let counted = counted_and_held(&mut second);
    agent.interrupt();
    let seen = of_process(&agent.captured(), &second);
    seen.assert_well_formed();
    assert_eq!(seen.counts(), counted);
}

#[test]
fn the_swap_of_activations_is_recognised_where_symbols_say_it_is() {
    let mut paths = ["workload", "edge-host"].map(environment::test_host).to_vec();
    // Other versions' libraries, for a person who has them.
    let others = std::env::var("WASMSCOPE_TEST_IMAGES").unwrap_or_default();
    paths.extend(others.split(':').filter(|path| !path.is_empty()).map(PathBuf::from));
    for path in paths {
        let directory = tempdir().unwrap();
        let without_symbols = directory.path().join("stripped");
        stripped(&path, &without_symbols);
        let named = HostImage::read(&File::open(&path).unwrap()).unwrap().symbols;
        let file = File::open(&without_symbols).unwrap();
        let image = HostImage::read(&file).unwrap();
        assert!(!image.has_symbol_table);
        let table = UnwindTable::read(&file, &image).unwrap();
        let found = swap::find(&file, &image, &table).expect("there is one, and only one");
        assert_eq!(vec![found.function], named.tls_replace, "{}", path.display());
        assert_eq!(Some(found.slot), named.tls_slot, "{}", path.display());
    }
}
