use proptest::prelude::*;

use super::*;
use crate::{
    event::{RuntimeCall, RuntimeResult, WantedGrowth},
    span::{InterruptionCause, Place, Suspend},
};

const PID: u32 = 100;
/// Stack pointer of code whose frame holds the record at `activation`.
fn below(activation: u64) -> u64 {
    activation - 16
}
/// Imports by id: interface and function.
const IMPORTS: [(&str, &str); 4] = [
    ("host", "fetch"),
    ("wasi_snapshot_preview1", "proc_exit"),
    ("host", "proc_exit"),
    ("wasi:cli/exit@0.2.6", "exit"),
];
const WORKER_STACK: u64 = 0x7f00_0000_0000;
const FIBER: u64 = 0x7e00_0001_0000;
const FIBER_TWO: u64 = 0x7e80_0001_0000;

fn correlator() -> Correlator {
    let mut correlator = Correlator::new();
    let process = Process {
        pid: PID,
        start_ns: 1,
        command: "host".to_owned(),
        runtime_name: "wasmtime".to_owned(),
        runtime_version: Some("48".to_owned()),
        limits: Vec::new(),
        place: Place::default(),
    };
    let coverage = Coverage {
        activations: true,
        host_calls: true,
        host_call_ends: true,
        unwinds: true,
    };
    correlator.push(event(
        0,
        PID,
        EventKind::Process {
            process: Box::new(process),
            coverage,
        },
    ));
    for (id, name) in ["handle_request", "parse_rule", "level2"].into_iter().enumerate() {
        correlator.push(event(
            0,
            PID,
            EventKind::Function {
                id: id as u32,
                module: "policy".to_owned(),
                hash: "3f9ac2".to_owned(),
                index: id as u32,
                name: name.to_owned(),
            },
        ));
    }
    for (id, (module, name)) in IMPORTS.into_iter().enumerate() {
        correlator.push(event(
            0,
            PID,
            EventKind::Import {
                id: id as u32,
                module: module.to_owned(),
                name: name.to_owned(),
            },
        ));
    }
    correlator
}

fn event(at_ns: u64, tid: u32, kind: EventKind) -> Event {
    Event {
        at_ns,
        pid: PID,
        tid,
        kind,
    }
}

fn swap(old: u64, new: u64, stack_pointer: u64) -> EventKind {
    EventKind::ActivationSwap {
        old: Some(old),
        new,
        stack_pointer,
        entry: (old != 0).then_some(0),
    }
}

fn host_call(activation: u64, import: ImportId) -> EventKind {
    EventKind::HostCall {
        activation,
        entry: Some(0),
        import: Some(import),
        frame: 0,
        stack: vec![1, 0],
        truncated: false,
    }
}

fn syscall(activation: u64, duration_ns: u64) -> EventKind {
    EventKind::Syscall {
        activation,
        entry: Some(0),
        duration_ns,
        number: 0,
        result: 10,
        arguments: [0; 3],
        stack: vec![1, 0],
        truncated: false,
        handed_over_ns: None,
        is_open: false,
    }
}

fn run(events: impl IntoIterator<Item = (u64, u32, EventKind)>) -> (Vec<Trace>, Vec<Loss>) {
    let mut correlator = correlator();
    let mut last_ns = 0;
    for (at_ns, tid, kind) in events {
        last_ns = at_ns;
        correlator.push(event(at_ns, tid, kind));
    }
    correlator.settle(u64::MAX);
    correlator.finish(last_ns);
    (correlator.take_finished(), correlator.take_losses())
}

fn name(span: &Span) -> &str {
    match &span.kind {
        SpanKind::Invoke {
            function: Some(function),
        } => &function.name,
        SpanKind::HostCall { import: Some(import) } => &import.name,
        SpanKind::Syscall { name, .. } => name,
        SpanKind::Trap { code, .. } => code,
        _ => "?",
    }
}

#[test]
fn a_syscall_lies_in_its_host_call_and_that_in_its_invocation() {
    let (traces, losses) = run([
        (10, 1, swap(0, FIBER, below(FIBER))),
        (20, 1, host_call(FIBER, 0)),
        (30, 1, syscall(FIBER, 5)),
        (
            40,
            1,
            EventKind::HostCallEnd {
                frame: 0,
                succeeded: true,
            },
        ),
        (50, 1, swap(FIBER, 0, below(FIBER))),
    ]);
    assert_eq!(losses, []);
    let [trace] = &traces[..] else { panic!("{traces:?}") };
    assert_eq!(name(&trace.root), "handle_request");
    assert_eq!((trace.root.start_ns, trace.root.end_ns), (10, 50));
    assert_eq!(trace.root.outcome, Outcome::Ok);
    let [call] = &trace.root.children[..] else {
        panic!("{trace:?}")
    };
    assert_eq!(
        (name(call), call.start_ns, call.end_ns, call.end_bound),
        ("fetch", 20, 40, Bound::Exact)
    );
    let [read] = &call.children[..] else { panic!("{call:?}") };
    assert_eq!((name(read), read.start_ns, read.end_ns), ("read", 30, 35));
    assert_eq!(trace.event_count, 5);
}

#[test]
fn a_fiber_that_is_resumed_on_another_thread_stays_one_invocation() {
    let (traces, losses) = run([
        (10, 1, swap(0, FIBER, below(FIBER))),
        (20, 1, host_call(FIBER, 0)),
        // Left and entered again by code on the workers' own stacks.
        (30, 1, swap(FIBER, 0, WORKER_STACK)),
        (90, 2, swap(0, FIBER, WORKER_STACK + 4096)),
        (
            95,
            2,
            EventKind::HostCallEnd {
                frame: 0,
                succeeded: true,
            },
        ),
        (99, 2, swap(FIBER, 0, below(FIBER))),
    ]);
    assert_eq!(losses, []);
    let [trace] = &traces[..] else { panic!("{traces:?}") };
    let suspend = Suspend {
        start_ns: 30,
        end_ns: Some(90),
        from_tid: 1,
        to_tid: Some(2),
    };
    assert_eq!(trace.root.suspends, [suspend]);
    assert_eq!(trace.root.children[0].suspends, [suspend]);
    assert_eq!((trace.root.suspended_ns(), trace.root.duration_ns()), (60, 89));
}

#[test]
fn two_fibers_that_take_turns_on_one_thread_are_kept_apart() {
    let (traces, losses) = run([
        (10, 1, swap(0, FIBER, below(FIBER))),
        (20, 1, swap(FIBER, 0, WORKER_STACK)),
        (30, 1, swap(0, FIBER_TWO, below(FIBER_TWO))),
        (40, 1, syscall(FIBER_TWO, 1)),
        (50, 1, swap(FIBER_TWO, 0, WORKER_STACK)),
        (60, 1, swap(0, FIBER, WORKER_STACK)),
        (70, 1, swap(FIBER, 0, below(FIBER))),
        (80, 1, swap(0, FIBER_TWO, WORKER_STACK)),
        (90, 1, swap(FIBER_TWO, 0, below(FIBER_TWO))),
    ]);
    assert_eq!(losses, []);
    let spans: Vec<_> = traces
        .iter()
        .map(|trace| (trace.root.start_ns, trace.root.end_ns, trace.root.children.len()))
        .collect();
    assert_eq!(spans, [(10, 70, 0), (30, 90, 1)]);
}

#[test]
fn a_call_back_into_wasm_lies_in_the_host_call_that_made_it() {
    let inner = FIBER - 1024;
    let (traces, losses) = run([
        (10, 1, swap(0, FIBER, below(FIBER))),
        (20, 1, host_call(FIBER, 0)),
        (30, 1, swap(FIBER, inner, below(inner))),
        (35, 1, syscall(inner, 1)),
        (40, 1, swap(inner, FIBER, below(inner))),
        (
            50,
            1,
            EventKind::HostCallEnd {
                frame: 0,
                succeeded: true,
            },
        ),
        (60, 1, swap(FIBER, 0, below(FIBER))),
    ]);
    assert_eq!(losses, []);
    let [trace] = &traces[..] else { panic!("{traces:?}") };
    let nested = &trace.root.children[0].children[0];
    assert_eq!(
        (nested.role().as_str(), nested.start_ns, nested.end_ns),
        ("invoke", 30, 40)
    );
    assert_eq!(nested.children.len(), 1);
}

#[test]
fn a_call_back_on_a_higher_fiber_is_not_taken_for_a_return() {
    let (traces, losses) = run([
        (10, 1, swap(0, FIBER, below(FIBER))),
        (20, 1, host_call(FIBER, 0)),
        (30, 1, swap(FIBER, FIBER_TWO, below(FIBER_TWO))),
        (40, 1, swap(FIBER_TWO, FIBER, below(FIBER_TWO))),
        (
            50,
            1,
            EventKind::HostCallEnd {
                frame: 0,
                succeeded: true,
            },
        ),
        (60, 1, swap(FIBER, 0, below(FIBER))),
    ]);
    assert_eq!(losses, []);
    assert_eq!(traces.len(), 1);
    assert_eq!(traces[0].root.children[0].children.len(), 1);
}

#[test]
fn a_trap_is_told_by_its_signal_and_a_host_error_by_its_unwinding() {
    let trap = EventKind::Trap {
        activation: FIBER,
        entry: Some(0),
        code: "memory_out_of_bounds".to_owned(),
        stack: vec![1, 0],
        native_offset: 0x1c4,
        wasm_offset: Some(0x2f),
    };
    let (traces, _) = run([
        (10, 1, swap(0, FIBER, below(FIBER))),
        (20, 1, trap),
        (30, 1, swap(FIBER, 0, below(FIBER))),
        (31, 1, EventKind::Unwind),
        (40, 1, swap(0, FIBER, below(FIBER))),
        (50, 1, host_call(FIBER, 0)),
        (
            60,
            1,
            EventKind::HostCallEnd {
                frame: 0,
                succeeded: false,
            },
        ),
        (70, 1, swap(FIBER, 0, below(FIBER))),
        (71, 1, EventKind::Unwind),
        (80, 1, swap(0, FIBER, below(FIBER))),
        (85, 1, host_call(FIBER, 1)),
        (
            86,
            1,
            EventKind::HostCallEnd {
                frame: 0,
                succeeded: false,
            },
        ),
        (90, 1, swap(FIBER, 0, below(FIBER))),
        (91, 1, EventKind::Unwind),
    ]);
    let outcomes: Vec<_> = traces.iter().map(|trace| trace.root.outcome.as_str()).collect();
    assert_eq!(outcomes, ["trap", "host_error", "exit"]);
}

#[test]
fn only_what_wasi_exits_with_is_an_exit() {
    for (import, outcome) in [(0, "host_error"), (1, "exit"), (2, "host_error"), (3, "exit")] {
        let (traces, _) = run([
            (10, 1, swap(0, FIBER, below(FIBER))),
            (20, 1, host_call(FIBER, import)),
            (
                30,
                1,
                EventKind::HostCallEnd {
                    frame: 0,
                    succeeded: false,
                },
            ),
            (40, 1, swap(FIBER, 0, below(FIBER))),
            (41, 1, EventKind::Unwind),
        ]);
        assert_eq!(
            traces[0].root.outcome.as_str(),
            outcome,
            "{:?}",
            IMPORTS[import as usize]
        );
    }
    let is_exit = |module: &str, name: &str| {
        let (module, name) = (module.to_owned(), name.to_owned());
        crate::span::Import { module, name }.is_exit()
    };
    assert!(is_exit("wasi_unstable", "proc_exit"));
    assert!(is_exit("wasi:cli/exit", "exit"));
    assert!(is_exit("wasi:cli/exit@0.3.0-rc-2025-09-16", "exit-with-code"));
    for (module, name) in [
        ("wasi:cli/exit@0.2.6", "proc_exit"),
        ("wasi:cli/exiting@0.2.6", "exit"),
        ("wasi_snapshot_preview1", "exit"),
        ("test:cli/exit@0.2.6", "exit"),
        ("", "proc_exit"),
    ] {
        assert!(!is_exit(module, name), "{module} {name}");
    }
}

fn runtime_call(call: RuntimeCall) -> EventKind {
    EventKind::RuntimeCall {
        activation: FIBER,
        entry: Some(0),
        call,
        stack_pointer: below(FIBER) - 64,
        stack: vec![1, 0],
        truncated: false,
        native_offset: 9,
        wasm_offset: Some(0x2f),
    }
}

fn runtime_call_end(result: RuntimeResult) -> EventKind {
    EventKind::RuntimeCallEnd {
        stack_pointer: below(FIBER) - 64,
        result,
    }
}

const GROW: RuntimeCall = RuntimeCall::MemoryGrow(WantedGrowth {
    instance: 0x5000,
    index: 0,
    delta: 3,
    page_bytes: Some(65_536),
    maximum: None,
});
const FUEL: RuntimeCall = RuntimeCall::Interruption {
    cause: InterruptionCause::Fuel,
};

#[test]
fn growth_holds_the_syscalls_that_it_made_and_its_sizes() {
    let (traces, losses) = run([
        (10, 1, swap(0, FIBER, below(FIBER))),
        (20, 1, runtime_call(GROW)),
        (22, 1, syscall(FIBER, 4)),
        (30, 1, runtime_call_end(RuntimeResult::Grown { old: 2 })),
        (40, 1, runtime_call(GROW)),
        (50, 1, runtime_call_end(RuntimeResult::Refused)),
        (60, 1, swap(FIBER, 0, below(FIBER))),
    ]);
    assert_eq!(losses, []);
    let [grown, refused] = traces[0].root.children.as_slice() else {
        panic!("{:?}", traces[0].root)
    };
    let SpanKind::MemoryGrow(growth) = &grown.kind else {
        panic!("{grown:?}")
    };
    assert_eq!(
        (growth.old, growth.new, growth.new_bytes()),
        (Some(2), Some(5), Some(327_680))
    );
    assert_eq!(
        growth.function.as_ref().map(|function| function.name.as_str()),
        Some("parse_rule")
    );
    assert_eq!(
        (grown.end_ns, grown.end_bound, grown.children.len()),
        (30, Bound::Exact, 1)
    );
    assert_eq!(refused.outcome, Outcome::Refused);
    assert_eq!(traces[0].event_count, 7);
}

#[test]
fn an_interruption_on_two_threads_is_one_span() {
    let (traces, losses) = run([
        (10, 1, swap(0, FIBER, below(FIBER))),
        (20, 1, runtime_call(FUEL)),
        (25, 1, swap(FIBER, 0, WORKER_STACK)),
        (30, 2, swap(0, FIBER, WORKER_STACK)),
        (35, 2, runtime_call_end(RuntimeResult::Continued)),
        (60, 2, swap(FIBER, 0, below(FIBER))),
    ]);
    assert_eq!(losses, []);
    let root = &traces[0].root;
    assert_eq!((root.outcome.as_str(), root.children.len()), ("ok", 1));
    let stop = &root.children[0];
    assert_eq!(
        (stop.role().as_str(), stop.start_ns, stop.end_ns),
        ("interruption", 20, 35)
    );
    assert_eq!(stop.suspends, root.suspends);
    assert_eq!(stop.suspends.len(), 1);
}

#[test]
fn an_interruption_that_unwinds_is_a_trap_whether_or_not_it_returns_first() {
    for end in [Some(runtime_call_end(RuntimeResult::Unwinds)), None] {
        let events = [
            Some((10, 1, swap(0, FIBER, below(FIBER)))),
            Some((20, 1, runtime_call(FUEL))),
            end.map(|end| (30, 1, end)),
            Some((40, 1, swap(FIBER, 0, below(FIBER)))),
            Some((41, 1, EventKind::Unwind)),
        ];
        let (traces, losses) = run(events.into_iter().flatten());
        assert_eq!(losses, []);
        let root = &traces[0].root;
        let code = "out_of_fuel".to_owned();
        assert_eq!(root.outcome, Outcome::Trap { code });
        assert_eq!(root.children.len(), 1);
        let SpanKind::Trap {
            wasm_offset,
            native_offset,
            ..
        } = root.children[0].kind
        else {
            panic!("{root:?}")
        };
        assert_eq!((wasm_offset, native_offset), (Some(0x2f), 9));
    }
}

#[test]
fn an_invocation_dropped_while_it_paused_did_not_run_out_of_fuel() {
    let (traces, _) = run([
        (10, 1, swap(0, FIBER, below(FIBER))),
        (20, 1, runtime_call(FUEL)),
        (25, 1, swap(FIBER, 0, WORKER_STACK)),
        (30, 1, swap(0, FIBER, WORKER_STACK)),
        (35, 1, runtime_call_end(RuntimeResult::Unwinds)),
        (60, 1, swap(FIBER, 0, below(FIBER))),
        (61, 1, EventKind::Unwind),
    ]);
    assert_eq!(traces[0].root.outcome, Outcome::HostError);
    assert_eq!(traces[0].root.children[0].outcome, Outcome::HostError);
}

#[test]
fn a_growth_that_unwinds_its_guest_is_not_left_open() {
    for end in [Some(runtime_call_end(RuntimeResult::Unwinds)), None] {
        let events = [
            Some((10, 1, swap(0, FIBER, below(FIBER)))),
            Some((20, 1, runtime_call(GROW))),
            end.map(|end| (30, 1, end)),
            Some((40, 1, swap(FIBER, 0, below(FIBER)))),
            Some((41, 1, EventKind::Unwind)),
        ];
        let (traces, _) = run(events.into_iter().flatten());
        let root = &traces[0].root;
        assert_eq!(root.outcome, Outcome::HostError);
        assert_eq!(root.children[0].outcome, Outcome::HostError);
        assert_ne!(root.children[0].end_bound, Bound::Open);
    }
}

#[test]
fn what_is_raised_is_a_trap_unless_a_host_call_failed() {
    let raise = |code: Option<&str>| EventKind::Raise {
        activation: FIBER,
        entry: Some(0),
        code: code.map(str::to_owned),
        stack: vec![1, 0],
        native_offset: 9,
        wasm_offset: Some(0x2f),
    };
    let ended = |before: Vec<EventKind>| {
        let mut events = vec![(10, 1, swap(0, FIBER, below(FIBER)))];
        events.extend(before.into_iter().map(|kind| (20, 1, kind)));
        events.push((40, 1, swap(FIBER, 0, below(FIBER))));
        events.push((41, 1, EventKind::Unwind));
        let (traces, _) = run(events);
        traces[0].root.clone()
    };
    let trap = |code: &str| Outcome::Trap { code: code.to_owned() };
    let known = ended(vec![raise(Some("memory_out_of_bounds"))]);
    assert_eq!((known.outcome, known.children.len()), (trap("memory_out_of_bounds"), 1));
    let unknown = ended(vec![raise(None)]);
    assert_eq!(
        (unknown.outcome, unknown.children.len()),
        (trap("raised_by_runtime"), 1)
    );
    let failed = ended(vec![
        host_call(FIBER, 0),
        EventKind::HostCallEnd {
            frame: 0,
            succeeded: false,
        },
        raise(None),
    ]);
    assert_eq!((failed.outcome, failed.children.len()), (Outcome::HostError, 1));
    let unseen = ended(vec![host_call(FIBER, 0), raise(None)]);
    assert_eq!((unseen.outcome, unseen.children.len()), (Outcome::HostError, 1));
}

#[test]
fn what_was_running_at_the_end_is_open_not_ended() {
    let (traces, _) = run([
        (10, 1, swap(0, FIBER, below(FIBER))),
        (20, 1, host_call(FIBER, 0)),
        (30, 1, syscall(FIBER, 4)),
    ]);
    let root = &traces[0].root;
    assert_eq!((root.end_bound, root.outcome.as_str()), (Bound::Open, "unfinished"));
    assert_eq!(root.children[0].end_bound, Bound::Open);
    assert_eq!(root.end_ns, 34);
}

#[test]
fn a_host_call_whose_return_was_not_seen_ends_at_the_next_event_and_says_so() {
    let (traces, _) = run([
        (10, 1, swap(0, FIBER, below(FIBER))),
        (20, 1, host_call(FIBER, 0)),
        (30, 1, host_call(FIBER, 0)),
        (40, 1, swap(FIBER, 0, below(FIBER))),
    ]);
    let calls = &traces[0].root.children;
    assert_eq!((calls[0].end_ns, calls[0].end_bound), (30, Bound::Inferred));
    assert_eq!((calls[1].end_ns, calls[1].end_bound), (40, Bound::Inferred));
}

#[test]
fn a_lost_return_is_counted_and_does_not_bend_what_follows() {
    let (traces, losses) = run([
        (10, 1, swap(0, FIBER, below(FIBER))),
        // The swap that ended it was lost; the next one says that nothing was on top.
        (50, 1, swap(0, FIBER, below(FIBER))),
        (60, 1, swap(FIBER, 0, below(FIBER))),
    ]);
    assert_eq!(traces.len(), 2);
    assert_eq!(traces[0].root.outcome, Outcome::Unknown);
    assert_eq!(traces[1].root.outcome, Outcome::Ok);
    assert_eq!(losses[0].reason, "end_missed");
}

#[test]
fn an_activation_that_began_before_the_probes_is_open_at_its_start() {
    let (traces, _) = run([(30, 1, syscall(FIBER, 4)), (60, 1, swap(FIBER, 0, below(FIBER)))]);
    assert_eq!(
        (traces[0].root.start_bound, traces[0].root.end_bound),
        (Bound::Open, Bound::Exact)
    );
}

#[test]
fn a_loss_is_told_by_every_trace_that_was_open() {
    let loss = Loss {
        layer: "ring".to_owned(),
        reason: "ring_full".to_owned(),
        count: 7,
    };
    let (traces, _) = run([
        (10, 1, swap(0, FIBER, below(FIBER))),
        (20, 1, EventKind::Lost { loss: loss.clone() }),
        (30, 1, swap(FIBER, 0, below(FIBER))),
        (40, 1, swap(0, FIBER, below(FIBER))),
        (50, 1, swap(FIBER, 0, below(FIBER))),
    ]);
    assert_eq!(traces[0].losses, [loss]);
    assert_eq!(traces[1].losses, []);
}

#[test]
fn every_activation_has_a_trace_id_of_its_own() {
    let (traces, _) = run([
        (10, 1, swap(0, FIBER, below(FIBER))),
        (20, 1, swap(FIBER, 0, below(FIBER))),
        (30, 1, swap(0, FIBER, below(FIBER))),
        (40, 1, swap(FIBER, 0, below(FIBER))),
    ]);
    assert_ne!(traces[0].id, traces[1].id);
}

/// Any event, of few threads and activations so that they meet.
fn any_kind() -> impl Strategy<Value = EventKind> {
    let activation = prop_oneof![Just(0), Just(FIBER), Just(FIBER - 1024), Just(FIBER_TWO), any::<u64>()];
    let stack_pointer = prop_oneof![
        Just(WORKER_STACK),
        Just(below(FIBER)),
        Just(below(FIBER - 1024)),
        Just(below(FIBER_TWO)),
        any::<u64>()
    ];
    prop_oneof![
        (
            prop::option::of(activation.clone()),
            activation.clone(),
            stack_pointer,
            prop::option::of(0..4u32)
        )
            .prop_map(|(old, new, stack_pointer, entry)| EventKind::ActivationSwap {
                old,
                new,
                stack_pointer,
                entry
            }),
        (activation.clone(), 0..3u32).prop_map(|(activation, import)| host_call(activation, import)),
        any::<bool>().prop_map(|succeeded| EventKind::HostCallEnd { frame: 0, succeeded }),
        (activation.clone(), any::<u64>()).prop_map(|(activation, duration_ns)| syscall(activation, duration_ns)),
        (activation, any::<u64>(), any::<u64>(), any::<bool>()).prop_map(
            |(activation, handed_over_ns, duration_ns, open)| {
                let mut kind = of_helper(activation, handed_over_ns, duration_ns);
                if let EventKind::Syscall {
                    is_open,
                    handed_over_ns,
                    ..
                } = &mut kind
                {
                    *is_open = open;
                    *handed_over_ns = handed_over_ns.filter(|at_ns| at_ns % 2 == 0);
                }
                kind
            }
        ),
        Just(EventKind::Unwind),
        Just(EventKind::ThreadExit),
        Just(EventKind::ProcessGone),
    ]
}

fn is_well_formed(span: &Span) -> bool {
    span.start_ns <= span.end_ns && span.children.iter().all(is_well_formed)
}

proptest! {
    #[test]
    fn any_stream_gives_well_formed_traces(
        events in prop::collection::vec((any::<u64>(), 1..4u32, any_kind()), 0..200)
    ) {
        let (traces, _) = run(events);
        for trace in traces {
            prop_assert!(is_well_formed(&trace.root), "{trace:?}");
        }
    }
}

#[test]
fn without_probes_another_export_on_the_same_record_is_another_invocation() {
    let mut correlator = correlator();
    let process = Process {
        pid: PID,
        start_ns: 1,
        command: "host".to_owned(),
        runtime_name: "wasmtime".to_owned(),
        runtime_version: None,
        limits: Vec::new(),
        place: Place::default(),
    };
    let coverage = Coverage::default();
    correlator.push(event(
        0,
        PID,
        EventKind::Process {
            process: Box::new(process),
            coverage,
        },
    ));
    for (at_ns, export) in [(10, 0), (20, 0), (30, 2)] {
        let mut kind = syscall(FIBER, 1);
        if let EventKind::Syscall { entry, .. } = &mut kind {
            *entry = Some(export);
        }
        correlator.push(event(at_ns, 1, kind));
    }
    correlator.finish(40);
    let traces = correlator.take_finished();
    let seen: Vec<_> = traces
        .iter()
        .map(|trace| (name(&trace.root), trace.root.children.len()))
        .collect();
    assert_eq!(seen, [("handle_request", 2), ("level2", 1)]);
}

#[test]
fn the_end_of_one_process_does_not_judge_another() {
    let mut correlator = correlator();
    correlator.push(event(10, 1, swap(0, FIBER, below(FIBER))));
    correlator.push(event(20, 1, swap(FIBER, 0, below(FIBER))));
    let mut gone = event(21, 7, EventKind::ProcessGone);
    gone.pid = 7;
    correlator.push(gone);
    correlator.push(event(22, 1, EventKind::Unwind));
    let traces = correlator.take_finished();
    assert_eq!(traces[0].root.outcome.as_str(), "trap");
}

fn of_helper(activation: u64, handed_over_ns: u64, duration_ns: u64) -> EventKind {
    let mut kind = syscall(activation, duration_ns);
    if let EventKind::Syscall { handed_over_ns: at, .. } = &mut kind {
        *at = Some(handed_over_ns);
    }
    kind
}

#[test]
fn what_helpers_do_belongs_to_the_host_call_that_waits_and_takes_no_time_from_it() {
    let (traces, losses) = run([
        (10, 1, swap(0, FIBER, below(FIBER))),
        (20, 1, host_call(FIBER, 0)),
        // Two helpers at the same time, and the waking of one, which returned when that was at work.
        (31, 3, of_helper(FIBER, 25, 20)),
        (29, 1, syscall(FIBER, 5)),
        (40, 1, swap(FIBER, 0, WORKER_STACK)),
        (33, 4, of_helper(FIBER, 26, 40)),
        (80, 2, swap(0, FIBER, WORKER_STACK)),
        (
            90,
            2,
            EventKind::HostCallEnd {
                frame: 0,
                succeeded: true,
            },
        ),
        (100, 2, swap(FIBER, 0, below(FIBER))),
    ]);
    assert_eq!(losses, []);
    let root = &traces[0].root;
    let call = &root.children[0];
    let children: Vec<_> = call
        .children
        .iter()
        .map(|child| (child.start_ns, child.tid, child.is_on_helper()))
        .collect();
    assert_eq!(children, [(29, 1, false), (31, 3, true), (33, 4, true)]);
    assert_eq!(call.children[1].stack, call.stack);
    // 70 in all, less 40 off every thread and 5 in the syscall of its own.
    assert_eq!((call.suspended_ns(), call.self_ns()), (40, 25));
    assert_eq!(root.self_ns(), 20);
}

#[test]
fn work_handed_over_by_an_earlier_host_call_or_activation_is_nobodys() {
    let (traces, losses) = run([
        (10, 1, swap(0, FIBER, below(FIBER))),
        (20, 1, host_call(FIBER, 0)),
        (
            30,
            1,
            EventKind::HostCallEnd {
                frame: 0,
                succeeded: true,
            },
        ),
        (35, 3, of_helper(FIBER, 25, 1)),
        (40, 1, host_call(FIBER, 0)),
        (45, 3, of_helper(FIBER, 25, 1)),
        (
            50,
            1,
            EventKind::HostCallEnd {
                frame: 0,
                succeeded: true,
            },
        ),
        (60, 1, swap(FIBER, 0, below(FIBER))),
        (65, 3, of_helper(FIBER, 45, 1)),
        (70, 1, swap(0, FIBER, below(FIBER))),
        (75, 3, of_helper(FIBER, 45, 1)),
        (80, 1, swap(FIBER, 0, below(FIBER))),
    ]);
    let lost: Vec<_> = losses.iter().map(|loss| (loss.reason.as_str(), loss.count)).collect();
    assert_eq!(lost, [("helper_outlived_call", 4)]);
    assert_eq!(traces.len(), 2);
    assert!(
        traces
            .iter()
            .all(|trace| trace.root.walk().all(|span| !span.is_on_helper()))
    );
}

#[test]
fn a_thread_without_an_activation_may_wait_when_the_window_ends() {
    let open = || {
        let mut kind = syscall(0, 30);
        if let EventKind::Syscall { is_open, .. } = &mut kind {
            *is_open = true;
        }
        kind
    };
    let (traces, losses) = run([
        (10, 1, swap(0, FIBER, below(FIBER))),
        (20, 1, host_call(FIBER, 0)),
        (30, 1, open()),
        (30, 2, open()),
    ]);
    assert_eq!(losses, []);
    let call = &traces[0].root.children[0];
    let [wait] = call.children.as_slice() else {
        panic!("{call:?}")
    };
    assert_eq!((wait.end_bound, wait.end_ns), (Bound::Open, 60));
    assert_eq!((call.end_bound, call.end_ns), (Bound::Open, 60));
    assert_eq!(wait.stack, call.stack);
}

fn published(image: u64) -> EventKind {
    EventKind::ModulePublished {
        module: "policy".to_owned(),
        hash: "3f9ac2".to_owned(),
        image,
    }
}

fn first_call(activation: u64, image: u64) -> EventKind {
    EventKind::FirstCall { activation, image }
}

#[test]
fn the_first_call_has_the_phases_and_the_next_is_warm() {
    let phase = EventKind::Phase {
        phase: crate::span::PhaseKind::Compile,
        start_ns: 10,
        image: 0x1000,
        module: None,
        hash: None,
        is_first: true,
    };
    let record = WORKER_STACK;
    let (traces, losses) = run([
        (20, 1, published(0x1000)),
        (30, 1, phase),
        (40, 1, swap(0, record, below(record))),
        (50, 1, first_call(record, 0x1000)),
        (50, 1, swap(record, 0, below(record))),
        (60, 1, swap(0, record, below(record))),
        (70, 1, swap(record, 0, below(record))),
    ]);
    let known: Vec<_> = traces
        .iter()
        .map(|trace| (trace.starts.cold.len(), trace.starts.is_warm))
        .collect();
    assert_eq!(known, [(1, false), (0, true)]);
    let cold = &traces[0].starts.cold[0];
    assert_eq!((cold.invoked_ns, cold.published_ns, cold.duration_ns()), (40, 20, 20));
    assert_eq!(losses, []);
}

/// Two calls that run at once, of which the younger is the first that is known to have entered the module; then the older
/// turns out to have entered `entry`, before or after the younger ends.
fn two_at_once(entry: Option<FunctionId>, is_older_known_first: bool) -> (Vec<Trace>, Vec<Loss>) {
    let (older, younger) = (WORKER_STACK, WORKER_STACK + 0x1000_0000);
    let other = EventKind::Function {
        id: 9,
        module: "other".to_owned(),
        hash: "77aa01".to_owned(),
        index: 0,
        name: "start".to_owned(),
    };
    let leave = EventKind::ActivationSwap {
        old: Some(older),
        new: 0,
        stack_pointer: below(older),
        entry,
    };
    let younger_ends_ns = if is_older_known_first { 70 } else { 55 };
    let mut events = vec![
        (10, 1, other),
        (20, 1, published(0x1000)),
        (40, 1, swap(0, older, below(older))),
        (45, 2, swap(0, younger, below(younger))),
        (50, 2, first_call(younger, 0x1000)),
        (60, 1, leave),
        (younger_ends_ns, 2, swap(younger, 0, below(younger))),
    ];
    events.sort_by_key(|(at_ns, _, _)| *at_ns);
    run(events)
}

/// When the invocations with a cold start began.
fn cold(traces: &[Trace]) -> Vec<u64> {
    let cold = traces.iter().filter(|trace| !trace.starts.cold.is_empty());
    cold.map(|trace| trace.root.start_ns).collect()
}

#[test]
fn of_calls_that_run_at_once_the_one_that_began_first_is_the_first_of_its_module() {
    for is_older_known_first in [true, false] {
        let (traces, losses) = two_at_once(Some(0), is_older_known_first);
        assert_eq!((cold(&traces), losses), (vec![40], vec![]));
    }
    let (traces, losses) = two_at_once(Some(9), true);
    assert_eq!((cold(&traces), losses), (vec![45], vec![]));
}

#[test]
fn where_nothing_tells_which_call_was_the_first_none_is_said_to_be() {
    // What the older one entered stays unknown; or it was something else, and the younger has been told of already.
    for (entry, is_older_known_first) in [(None, true), (None, false), (Some(9), false)] {
        let (traces, losses) = two_at_once(entry, is_older_known_first);
        assert_eq!(cold(&traces), [0; 0]);
        assert_eq!(losses[0].reason, "cold_start_unassigned");
    }
}

#[test]
fn threads_whose_ends_are_not_heard_of_are_not_kept() {
    let mut correlator = correlator();
    let known = |correlator: &Correlator| correlator.processes[&PID].threads.len();
    correlator.push(event(1, 1, swap(0, WORKER_STACK, below(WORKER_STACK))));
    for tid in 2..1000 {
        correlator.push(event(2, tid, syscall(0, 1)));
    }
    correlator.settle(3);
    assert_eq!(known(&correlator), 1, "one is in a guest");
    let task_count = u32::try_from(MAX_THREADS).unwrap() + 1;
    for tid in 2..2 + task_count {
        correlator.push(event(4, tid, EventKind::Task { task: tid }));
    }
    correlator.take_losses();
    correlator.settle(5);
    assert_eq!(known(&correlator), 1);
    let losses = correlator.take_losses();
    let lost: Vec<_> = losses.iter().map(|loss| (loss.reason.as_str(), loss.count)).collect();
    assert_eq!(lost, [("thread_limit", u64::from(task_count))]);
}
