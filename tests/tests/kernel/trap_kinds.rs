//! Every instruction that can trap, where it did, with signals and without.

use wasmscope::span::{Outcome, Role, Span, SpanKind};
use wasmscope_tests::agent::Agent;
use wasmscope_tests::captured::Captured;
use wasmscope_tests::environment::Kernel;
use wasmscope_tests::workload::{Numbers, Workload};

fn traced(scenario: &str, mode: &str) -> (Captured, Numbers) {
    let workload = Workload::ready(&[
        "--scenario",
        scenario,
        "--mode",
        mode,
        "--tasks",
        "2",
        "--threads",
        "2",
        "--calls",
        "3",
    ]);
    let agent = Agent::json_of(&workload.pid());
    let (counted, notes) = workload.run_with_notes();
    let mut seen = agent.captured();
    seen.assert_nothing_lost();
    seen.assert_well_formed();
    // Passive segments are set up by code that no export names, when an instance is made.
    seen.traces.retain(|trace| !is_setup(&trace.root));
    assert_eq!(seen.counts().invocations, counted.invocations, "{scenario} {mode}");
    assert_eq!(seen.counts().host_calls, counted.host_calls, "{scenario} {mode}");
    (seen, notes)
}

fn is_setup(root: &Span) -> bool {
    match &root.kind {
        SpanKind::Invoke {
            function: Some(function),
        } => function.name == "(start)",
        _ => root.children.is_empty() && root.outcome == Outcome::Ok,
    }
}

/// How invocations ended, in the words of the host.
pub(crate) fn endings(seen: &Captured) -> Numbers {
    let mut endings = Numbers::new();
    for trace in &seen.traces {
        let SpanKind::Invoke {
            function: Some(function),
        } = &trace.root.kind
        else {
            panic!("{:?}", trace.root)
        };
        let how = match &trace.root.outcome {
            Outcome::Ok => continue,
            Outcome::Trap { code } => format!("{code} {}", place(&trace.root)),
            other => other.as_str().to_owned(),
        };
        *endings.entry(format!("{}: {how}", function.name)).or_default() += 1;
    }
    endings
}

/// Where the only trap of an invocation was, in the words of the host.
pub(crate) fn place(root: &Span) -> String {
    let traps: Vec<_> = root.walk().filter(|span| span.role() == Role::Trap).collect();
    let [
        Span {
            kind: SpanKind::Trap {
                function, wasm_offset, ..
            },
            ..
        },
    ] = traps.as_slice()
    else {
        panic!("not one trap: {traps:?}")
    };
    let offset = wasm_offset.map_or_else(|| "?".to_owned(), |offset| format!("{offset:#x}"));
    format!(
        "in {} at {offset}",
        function.as_ref().map_or("?", |function| &function.name)
    )
}

/// What the host says, less the one code that nothing outside the host shows.
fn expected(notes: Numbers) -> Numbers {
    let unknown = |how: String| how.replace("atomic_wait_non_shared_memory", "raised_by_runtime");
    notes.into_iter().map(|(how, count)| (unknown(how), count)).collect()
}

#[test]
fn each_kind_of_trap_is_told_with_its_function_and_wasm_offset() {
    let Some(_kernel) = Kernel::acquire() else { return };
    for mode in ["sync", "async"] {
        let (seen, notes) = traced("trap-kinds", mode);
        assert_eq!(notes.len(), 28, "{notes:?}");
        assert_eq!(endings(&seen), expected(notes), "{mode}");
    }
}

#[test]
fn traps_of_code_mapped_from_a_file_are_told_alike() {
    let Some(_kernel) = Kernel::acquire() else { return };
    let (seen, notes) = traced("trap-kinds-cwasm", "sync");
    assert_eq!(endings(&seen), expected(notes));
}

#[test]
fn traps_that_guest_code_reports_without_signals_are_told_alike() {
    let Some(_kernel) = Kernel::acquire() else { return };
    for mode in ["sync", "async"] {
        let (seen, notes) = traced("trap-kinds-reported", mode);
        assert_eq!(endings(&seen), expected(notes), "{mode}");
    }
}
