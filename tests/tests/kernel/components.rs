//! Components: host calls by interface and function, invocations by the component's own exports, in both modes, from both kinds of code, with
//! and without symbols in the host.

use std::path::Path;

use tempfile::tempdir;
use wasmscope::span::{Outcome, Role, Span, SpanKind};
use wasmscope_tests::agent::Agent;
use wasmscope_tests::captured::{Captured, is_counted, name_of, stack_names};
use wasmscope_tests::environment::{self, Kernel};
use wasmscope_tests::workload::{Counts, Numbers, UNREACHABLE, Workload, stripped};

const START: &str = "main/test:guest/runner@1.0.0#start";
const GREET: &str = "main/greet";
const ALLOCATE: &str = "libc/cabi_realloc";
const CLEAN_UP: &str = "main/cabi_post_greet";
const STACK: [&str; 3] = ["emit", "loop_emit", "test:guest/runner@1.0.0#start"];
/// Host calls of one round.
pub(crate) const ROUND: u64 = 5;

fn traced(arguments: &[&str]) -> (Captured, Counts) {
    let arguments = [&["--scenario"], arguments].concat();
    let workload = Workload::ready(&arguments);
    let agent = Agent::json_of(&workload.pid());
    let counted = workload.run();
    (agent.captured(), counted)
}

fn function_of(span: &Span) -> String {
    match &span.kind {
        SpanKind::Invoke { function } => name_of(function.as_deref()),
        other => panic!("{other:?} is no invocation"),
    }
}

pub(crate) fn import_of(span: &Span) -> String {
    match &span.kind {
        SpanKind::HostCall { import: Some(import) } => format!("{}.{}", import.module, import.name),
        other => panic!("{other:?} is no host call with a name"),
    }
}

/// What the workload runs, to the letter, with every call where it belongs.
#[track_caller]
fn assert_equal(seen: &Captured, counted: &Counts) {
    seen.assert_nothing_lost();
    assert_same(seen, counted, &Outcome::Ok);
}

#[track_caller]
pub(crate) fn assert_same(seen: &Captured, counted: &Counts, outcome: &Outcome) {
    seen.assert_well_formed();
    assert_eq!(&seen.counts(), counted);
    let of_a_round = [
        "wasi:clocks/monotonic-clock@0.2.6.now",
        "test:host/ops@1.0.0.add",
        "test:host/store@1.0.0.write",
        "test:host/ops@1.0.0.nap",
        "test:host/store@1.0.0.read",
    ];
    for trace in &seen.traces {
        let root = &trace.root;
        assert_eq!(&root.outcome, outcome, "{}", trace.trace_id);
        let name = function_of(root);
        if name != START {
            assert!([GREET, ALLOCATE, CLEAN_UP].contains(&name.as_str()), "{name}");
            assert_eq!(root.children, []);
            continue;
        }
        for (call, import) in root.children.iter().zip(of_a_round.iter().cycle()) {
            assert_eq!(import_of(call), *import);
            assert_eq!(call.outcome, Outcome::Ok);
            assert_eq!(stack_names(call), STACK);
            // Only for what it gives back does a host call need the guest's memory.
            let invoked: Vec<_> = call
                .children
                .iter()
                .filter(|child| child.role() == Role::Invoke)
                .collect();
            assert_eq!(invoked.len(), usize::from(import.ends_with("read")), "{call:?}");
            assert!(invoked.iter().all(|invoked| function_of(invoked) == ALLOCATE));
            for syscall in call.children.iter().filter(|child| child.role() == Role::Syscall) {
                assert_eq!(stack_names(syscall), STACK);
            }
        }
    }
}

#[test]
fn components_on_several_threads_are_seen_exactly() {
    let Some(_kernel) = Kernel::acquire() else { return };
    let arguments = [
        "components",
        "--tasks",
        "16",
        "--threads",
        "4",
        "--calls",
        "125",
        "--nap-us",
        "20",
    ];
    let (seen, counted) = traced(&arguments);
    assert_eq!(counted.host_calls.values().sum::<u64>(), 10_000);
    assert_eq!(counted.host_calls.len() as u64, ROUND);
    assert_eq!((counted.invocations[START], counted.invocations[CLEAN_UP]), (16, 16));
    assert_eq!(counted.invocations[ALLOCATE], 16 * (125 + 1));
    assert_equal(&seen, &counted);
}

#[test]
fn fibers_of_components_keep_their_calls() {
    let Some(_kernel) = Kernel::acquire() else { return };
    for allocator in [&[][..], &["--pooling"]] {
        let arguments = [
            "components",
            "--mode",
            "async",
            "--tasks",
            "16",
            "--threads",
            "4",
            "--calls",
            "125",
        ];
        let (seen, counted) = traced(&[&arguments, allocator].concat());
        assert_eq!(counted.host_calls.values().sum::<u64>(), 10_000);
        assert_eq!(counted.suspends, 2000);
        assert!(counted.moves > 0, "{counted:?}");
        assert_equal(&seen, &counted);
        for trace in seen.traces.iter().filter(|trace| function_of(&trace.root) == START) {
            for call in &trace.root.children {
                assert_eq!(
                    call.suspends.len(),
                    usize::from(import_of(call).ends_with("nap")),
                    "{call:?}"
                );
            }
        }
    }
}

#[test]
fn a_component_compiled_ahead_of_time_is_seen_exactly() {
    let Some(_kernel) = Kernel::acquire() else { return };
    for mode in ["sync", "async"] {
        let arguments = [
            "components-cwasm",
            "--mode",
            mode,
            "--tasks",
            "4",
            "--threads",
            "2",
            "--calls",
            "20",
            "--repeat",
            "3",
        ];
        let (seen, counted) = traced(&arguments);
        assert_equal(&seen, &counted);
    }
}

#[test]
fn a_component_that_is_compiled_under_trace_is_seen_from_its_first_call() {
    let Some(_kernel) = Kernel::acquire() else { return };
    let (seen, counted) = traced(&["components", "--calls", "20", "--compile-after-wait"]);
    assert_equal(&seen, &counted);
}

/// Syscalls by name, of those that were made for `emit`.
fn made_for_emit(seen: &Captured) -> Numbers {
    let mut numbers = Numbers::new();
    for trace in &seen.traces {
        for span in trace.root.walk().filter(|span| span.role() == Role::Syscall) {
            let SpanKind::Syscall { name, .. } = &span.kind else {
                continue;
            };
            if is_counted(name) {
                assert_eq!(function_of(&trace.root), START);
                assert_eq!(stack_names(span), STACK, "{span:?}");
                *numbers.entry(name.clone()).or_default() += 1;
            }
        }
    }
    numbers
}

fn assert_syscalls(program: &Path, options: &[&str], name: &str) -> Captured {
    let mut all = None;
    for mode in ["sync", "async"] {
        let arguments = [
            "--scenario",
            name,
            "--mode",
            mode,
            "--tasks",
            "6",
            "--threads",
            "3",
            "--calls",
            "50",
        ];
        let workload = Workload::ready_as(program, &arguments);
        let pid = workload.pid();
        let agent = Agent::watching(["--pid", &pid, "--format", "json"].iter().chain(options));
        let counted = workload.run();
        let seen = agent.captured();
        assert_eq!(
            made_for_emit(&seen),
            counted.syscalls(),
            "{mode}; losses: {:?}",
            seen.capture.losses
        );
        if !options.contains(&"0") {
            let found = seen.counts();
            assert_eq!(found.invocations, counted.invocations, "{name} {mode}");
            assert_eq!(
                (found.suspends, found.resumes, found.moves),
                (counted.suspends, counted.resumes, counted.moves)
            );
        }
        seen.assert_lost_only_before_calibration();
        all = Some(seen);
    }
    all.unwrap()
}

#[test]
fn syscalls_of_components_in_a_stripped_host_have_their_guest_functions() {
    let Some(_kernel) = Kernel::acquire() else { return };
    let directory = tempdir().unwrap();
    let program = directory.path().join("workload");
    stripped(&environment::test_host("workload"), &program);
    for name in ["components", "components-cwasm"] {
        assert_syscalls(&program, &[], name);
    }
}

#[test]
fn tier_0_sees_the_same_syscalls_of_components() {
    let Some(_kernel) = Kernel::acquire() else { return };
    let seen = assert_syscalls(&environment::test_host("workload"), &["--tier", "0"], "components");
    seen.assert_nothing_lost();
}

#[test]
fn a_wasi_command_is_seen_exactly_down_to_the_resources_that_it_drops_and_its_exit() {
    let Some(_kernel) = Kernel::acquire() else { return };
    for mode in ["sync", "async"] {
        let arguments = [
            "wasi-components",
            "--mode",
            mode,
            "--tasks",
            "4",
            "--threads",
            "2",
            "--repeat",
            "5",
        ];
        let (seen, counted) = traced(&arguments);
        seen.assert_nothing_lost();
        seen.assert_well_formed();
        let counts = seen.counts();
        assert_eq!(counts.host_calls, counted.host_calls, "{mode}");
        assert_eq!(counts.invocations, counted.invocations, "{mode}");
        assert_eq!(counts.traps, counted.traps, "{mode}");
        // Each task ends so.
        assert_eq!(counted.traps, Numbers::from([("exit".to_owned(), 4)]));
        assert_eq!(
            counted.host_calls["wasi:io/poll@0.2.6.[resource-drop]pollable"],
            4 * 5 * 20
        );
        for call in seen.traces.iter().flat_map(|trace| &trace.root.children) {
            if call.role() == Role::HostCall {
                let stack: &[&str] = match import_of(call).as_str() {
                    "wasi:cli/exit@0.2.6.exit" => &["quit"],
                    _ => &["round", "wasi:cli/run@0.2.6#run"],
                };
                assert_eq!(stack_names(call), stack, "{call:?}");
            }
        }
    }
}

#[test]
fn failures_of_components_are_told_apart() {
    let Some(_kernel) = Kernel::acquire() else { return };
    for mode in ["sync", "async"] {
        let arguments = [
            "components-failing",
            "--mode",
            mode,
            "--tasks",
            "4",
            "--threads",
            "2",
            "--repeat",
            "10",
        ];
        let (seen, counted) = traced(&arguments);
        seen.assert_nothing_lost();
        seen.assert_well_formed();
        assert_eq!(seen.counts(), counted, "{mode}");
        assert_eq!((counted.traps["host_error"], counted.traps[UNREACHABLE]), (40, 40));
        for trace in &seen.traces {
            assert_eq!(function_of(&trace.root), "main/stumble");
            let calls: Vec<_> = trace
                .root
                .children
                .iter()
                .filter(|child| child.role() == Role::HostCall)
                .collect();
            let failed = usize::from(trace.root.outcome == Outcome::HostError);
            assert_eq!(calls.len(), failed, "{:?}", trace.root);
            assert!(calls.iter().all(|call| call.outcome == Outcome::HostError), "{calls:?}");
        }
    }
}

#[test]
fn nothing_is_said_to_be_missing_of_components() {
    let Some(_kernel) = Kernel::acquire() else { return };
    let (seen, _) = traced(&["components", "--calls", "1"]);
    assert_eq!(seen.traces[0].process.limits, [""; 0]);
}

#[test]
fn components_of_wasmtime_from_pypi_are_seen_exactly() {
    let Some(_kernel) = Kernel::acquire() else { return };
    let Some(python) = environment::python() else { return };
    let arguments = ["--tasks", "3", "--calls", "20", "--repeat", "5"];
    let workload = Workload::ready_python(python, "pycomponent.py", &arguments);
    let agent = Agent::json_of(&workload.pid());
    let counted = workload.run();
    let seen = agent.captured();
    assert_eq!(seen.counts(), counted, "losses: {:?}", seen.capture.losses);
    assert_equal(&seen, &counted);
}
