//! Fuel and epochs: guests that are stopped, for good or for a while.

use wasmscope::span::{InterruptionCause, Outcome, Role, Span, SpanKind};
use wasmscope_tests::agent::Agent;
use wasmscope_tests::captured::Captured;
use wasmscope_tests::environment::Kernel;
use wasmscope_tests::workload::{Counts, Numbers, Workload};

use crate::trap_kinds::place;

fn traced(scenario: &str, mode: &str, tasks: &str) -> (Captured, Counts, Numbers) {
    let workload = Workload::ready(&[
        "--scenario",
        scenario,
        "--mode",
        mode,
        "--tasks",
        tasks,
        "--threads",
        "2",
        "--calls",
        "7",
    ]);
    let agent = Agent::json_of(&workload.pid());
    let (counted, notes) = workload.run_with_notes();
    let seen = agent.captured();
    seen.assert_nothing_lost();
    seen.assert_well_formed();
    assert_eq!(seen.counts().invocations, counted.invocations, "{scenario} {mode}");
    assert_eq!(seen.counts().host_calls, counted.host_calls, "{scenario} {mode}");
    assert_eq!(seen.counts().suspends, counted.suspends, "{scenario} {mode}");
    (seen, counted, notes)
}

/// Interruptions that the guest survived.
fn survived(seen: &Captured, expected: InterruptionCause) -> Vec<&Span> {
    let spans = seen.traces.iter().flat_map(|trace| trace.root.walk());
    let interruptions: Vec<_> = spans.filter(|span| span.role() == Role::Interruption).collect();
    for span in &interruptions {
        let SpanKind::Interruption(interruption) = &span.kind else {
            panic!("{span:?}")
        };
        assert_eq!(interruption.cause, expected);
        assert_eq!(span.outcome, Outcome::Ok);
        assert!(interruption.wasm_offset.is_some());
    }
    interruptions
}

/// How invocations failed, in the words of the host.
fn traps(seen: &Captured) -> Numbers {
    let mut traps = Numbers::new();
    for trace in &seen.traces {
        match &trace.root.outcome {
            Outcome::Ok => {}
            Outcome::Trap { code } => *traps.entry(format!("{code} {}", place(&trace.root))).or_default() += 1,
            other => panic!("{other:?}"),
        }
    }
    traps
}

#[test]
fn running_out_of_fuel_is_a_trap_of_its_own_and_a_pause_is_none() {
    let Some(_kernel) = Kernel::acquire() else { return };
    for mode in ["sync", "async"] {
        let (seen, counted, notes) = traced("fuel", mode, "3");
        assert_eq!(traps(&seen), notes, "{mode}");
        let pauses = survived(&seen, InterruptionCause::Fuel);
        assert_eq!(pauses.len() as u64, counted.suspends, "{mode}");
        assert_eq!(mode == "async", !pauses.is_empty());
        for pause in pauses {
            assert_eq!(pause.suspends.len(), 1, "{pause:?}");
        }
    }
}

#[test]
fn an_epoch_deadline_is_a_trap_or_an_interruption() {
    let Some(_kernel) = Kernel::acquire() else { return };
    for mode in ["sync", "async"] {
        let (seen, counted, mut notes) = traced("epoch", mode, "1");
        let continued = notes.remove("continued").expect("the callback was called");
        assert_eq!(traps(&seen), notes, "{mode}");
        let stops = survived(&seen, InterruptionCause::Epoch);
        let (suspended, at_once): (Vec<_>, Vec<_>) = stops.into_iter().partition(|stop| !stop.suspends.is_empty());
        assert_eq!(at_once.len() as u64, continued, "{mode}");
        assert_eq!(suspended.len() as u64, counted.suspends, "{mode}");
        assert_eq!(mode == "async", !suspended.is_empty());
    }
}
