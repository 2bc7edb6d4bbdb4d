//! Traces for the tests of diagrams: short words for spans, and arbitrary trees of them.

use std::sync::Arc;

use proptest::prelude::*;

use crate::span::{
    Bound, Capture, Function, Growth, Import, Interruption, InterruptionCause, Loss, Module, Outcome, Place, Process,
    Span, SpanKind, Suspend, Trace, TraceId,
};

pub(super) const US: u64 = 1_000;
pub(super) const MS: u64 = 1_000_000;
/// When sample traces begin.
pub(super) const START: u64 = 1_000_000_000;

pub(super) fn function(module: &str, name: &str) -> Arc<Function> {
    let module = Arc::new(Module {
        name: module.into(),
        hash: "3f9ac2b81d04".into(),
    });
    Arc::new(Function {
        module,
        index: 7,
        name: name.into(),
    })
}

/// From `start_ns` after the start of the trace, for `length_ns`.
pub(super) fn span(start_ns: u64, length_ns: u64, kind: SpanKind, children: Vec<Span>) -> Span {
    Span {
        start_ns: START + start_ns,
        end_ns: START + start_ns + length_ns,
        start_bound: Bound::Exact,
        end_bound: Bound::Exact,
        tid: 2113,
        kind,
        outcome: Outcome::Ok,
        stack: Vec::new(),
        stack_truncated: false,
        children,
        suspends: Vec::new(),
    }
}

pub(super) fn invoke(start_ns: u64, length_ns: u64, function: &Arc<Function>, children: Vec<Span>) -> Span {
    span(
        start_ns,
        length_ns,
        SpanKind::Invoke {
            function: Some(Arc::clone(function)),
        },
        children,
    )
}

pub(super) fn wasi(start_ns: u64, length_ns: u64, name: &str, children: Vec<Span>) -> Span {
    host_call(start_ns, length_ns, "wasi_snapshot_preview1", name, children)
}

pub(super) fn host_call(start_ns: u64, length_ns: u64, module: &str, name: &str, children: Vec<Span>) -> Span {
    let import = Arc::new(Import {
        module: module.into(),
        name: name.into(),
    });
    span(
        start_ns,
        length_ns,
        SpanKind::HostCall { import: Some(import) },
        children,
    )
}

pub(super) fn syscall(start_ns: u64, length_ns: u64, name: &str, args: [u64; 3], result: i64) -> Span {
    let mut span = span(
        start_ns,
        length_ns,
        SpanKind::Syscall {
            number: 0,
            name: name.into(),
            args,
            result,
            on_helper: false,
        },
        Vec::new(),
    );
    if result < 0 {
        span.outcome = Outcome::Errno { errno: -result as u16 };
    }
    span
}

pub(super) fn trap(at_ns: u64, code: &str, function: &Arc<Function>) -> Span {
    let kind = SpanKind::Trap {
        code: code.into(),
        function: Some(Arc::clone(function)),
        native_offset: 0x1c4,
        wasm_offset: Some(0x2f),
    };
    span(at_ns, 0, kind, Vec::new())
}

pub(super) fn suspend(start_ns: u64, length_ns: u64, from_tid: u32, to_tid: u32) -> Suspend {
    Suspend {
        start_ns: START + start_ns,
        end_ns: Some(START + start_ns + length_ns),
        from_tid,
        to_tid: Some(to_tid),
    }
}

pub(super) fn trace(root: Span) -> Trace {
    let event_count = 2 * root.walk().count() as u64;
    Trace {
        id: TraceId([
            0x4b, 0xf9, 0x2f, 0x35, 0x77, 0xb3, 0x4d, 0xa6, 0xa3, 0xce, 0x92, 0x9d, 0x0e, 0x0e, 0x47, 0x36,
        ]),
        process: Arc::new(Process {
            pid: 2113,
            start_ns: 5,
            command: "edge-host".into(),
            runtime_name: "wasmtime".into(),
            runtime_version: Some("48.0.8".into()),
            limits: Vec::new(),
            place: Place::default(),
        }),
        root,
        losses: Vec::new(),
        event_count,
        starts: crate::span::Starts::default(),
        parent: None,
        pauses: Vec::new(),
    }
}

pub(super) fn capture() -> Capture {
    Capture {
        start_ns: START - 250 * MS,
        end_ns: START + 4_750 * MS,
        emitted_count: 0,
        delivered_count: 0,
        losses: Vec::new(),
        kernel_release: "6.18.44".into(),
        replay_of: None,
        trace_count: 1_204,
    }
}

/// The request of the project's own example: reads a file, asks the clock often, waits for an upstream, traps.
pub(super) fn slow_request() -> Trace {
    let entered = function("policy.wasm", "handle_request");
    let parse_rule = function("policy.wasm", "parse_rule");
    let mut open_rules = wasi(
        300 * US,
        90 * US,
        "path_open",
        vec![syscall(310 * US, 41 * US, "openat", [4, 0x7f00_1000, 0], 9)],
    );
    open_rules.stack = vec![function("policy.wasm", "load_rules"), Arc::clone(&entered)];
    let mut read_rules = wasi(
        400 * US,
        1_940 * US,
        "fd_read",
        vec![syscall(420 * US, 1_830 * US, "read", [9, 0x7f00_2000, 4096], 4096)],
    );
    read_rules.stack = open_rules.stack.clone();
    let mut children = vec![open_rules, read_rules];
    for index in 0..218 {
        let mut clock = wasi(
            2_400 * US + index * 2 * US,
            700 + (index % 7) * 60,
            "clock_time_get",
            Vec::new(),
        );
        clock.stack = vec![Arc::clone(&parse_rule), Arc::clone(&entered)];
        children.push(clock);
    }
    let waiting = suspend(3_200 * US, 6_100 * US, 2113, 2117);
    let mut fetch = host_call(
        3_150 * US,
        6_240 * US,
        "edge",
        "fetch",
        vec![
            syscall(3_160 * US, 12 * US, "sendto", [11, 0, 310], 310),
            syscall(3_180 * US, 2 * US, "recvfrom", [11, 0, 65_536], -11),
            syscall(9_310 * US, 9 * US, "recvfrom", [11, 0, 65_536], 1_412),
        ],
    );
    fetch.suspends = vec![waiting];
    fetch.stack = vec![Arc::clone(&entered)];
    children.push(fetch);
    children.push(trap(12_650 * US, "memory_out_of_bounds", &parse_rule));
    let mut root = invoke(0, 12_713_402, &entered, children);
    root.outcome = Outcome::Trap {
        code: "memory_out_of_bounds".into(),
    };
    root.suspends = vec![waiting];
    trace(root)
}

/// Pieces of names that mean something to Mermaid, to HTML, to terminals or to readers.
pub(super) const HOSTILE: &[&str] = &[
    "\"",
    "'",
    "`",
    "\n",
    "\r\n",
    ";",
    "#",
    "#35;",
    "#quot;",
    "end",
    "END",
    "%%",
    "%%{init: {}}%%",
    "<script>alert(1)</script>",
    "<br/>",
    "<img src=x onerror=alert(1)>",
    "participant",
    "participant X as Y",
    "loop",
    "rect",
    "box",
    "-->>",
    "->>+",
    "-x",
    "+",
    "-",
    ":",
    "::",
    ",",
    "@{ \"type\": \"actor\" }",
    "@",
    "{",
    "}",
    "(",
    ")",
    "[",
    "]",
    "&lt;",
    "&",
    "$$x^2$$",
    "\\n",
    "\\",
    "wrap:",
    "nowrap:",
    "style x:#f00;",
    "classDef a:#b;",
    "\u{fb02}\u{b0}\u{b0}60\u{b6}\u{df}",
    "🦀",
    "👩\u{200d}💻",
    "\u{202e}gnp",
    "שלום",
    "\u{1b}[31m",
    "\u{1b}]0;t\u{7}",
    "\0",
    "\u{7f}",
    "\u{9b}2J",
    "\u{200b}",
    "\u{feff}",
    "\u{2028}",
    "e\u{301}\u{301}\u{301}",
    "字",
    "sequenceDiagram",
    "title x",
    "Note over H1: x",
    "autonumber",
    "deactivate H1",
    "as",
    " as ",
    "  ",
    "---",
    "~~~",
    "*",
    "_",
    "|",
    "=",
    "?",
    "/",
    "accTitle: x",
    "activate",
];

fn name() -> impl Strategy<Value = String> {
    prop_oneof![
        4 => prop::sample::select(vec!["fd_read", "fd_write", "clock_time_get", "poll_oneoff", "run"]).prop_map(String::from),
        2 => prop::collection::vec(prop::sample::select(HOSTILE), 1..6).prop_map(|pieces| pieces.concat()),
        1 => any::<String>(),
        1 => (prop::sample::select(HOSTILE), 100..1_000_usize).prop_map(|(piece, count)| piece.repeat(count)),
    ]
}

fn any_function() -> impl Strategy<Value = Option<Arc<Function>>> {
    prop::option::weighted(
        0.9,
        (name(), name()).prop_map(|(module, name)| function(&module, &name)),
    )
}

prop_compose! {
    fn growth()(instance in 0..3_u64, index in 0..2_u32, delta in any::<u64>(), old in any::<Option<u64>>(), new in any::<Option<u64>>(),
        page_bytes in prop::sample::select(vec![None, Some(65_536), Some(1)]), maximum in any::<Option<u64>>(), function in any_function(),
        wasm_offset in any::<Option<u32>>()) -> Growth {
        Growth { instance, index, delta, old, new, page_bytes, maximum, function, wasm_offset }
    }
}

fn kind() -> impl Strategy<Value = SpanKind> {
    prop_oneof![
        2 => any_function().prop_map(|function| SpanKind::Invoke { function }),
        4 => prop::option::weighted(0.9, (name(), name()).prop_map(|(module, name)| Arc::new(Import { module, name })))
            .prop_map(|import| SpanKind::HostCall { import }),
        4 => (any::<u64>(), prop_oneof![Just("read".to_owned()), Just("openat".to_owned()), Just("futex".to_owned()), name()],
            any::<[u64; 3]>(), any::<i64>(), any::<bool>())
            .prop_map(|(number, name, args, result, on_helper)| SpanKind::Syscall { number, name, args, result, on_helper }),
        1 => (name(), any_function(), any::<u64>(), any::<Option<u32>>()).prop_map(|(code, function, native_offset, wasm_offset)| {
            SpanKind::Trap { code, function, native_offset, wasm_offset }
        }),
        1 => growth().prop_map(SpanKind::MemoryGrow),
        1 => growth().prop_map(SpanKind::TableGrow),
        1 => (prop::sample::select(vec![InterruptionCause::Fuel, InterruptionCause::Epoch]), any_function(), any::<Option<u32>>())
            .prop_map(|(cause, function, wasm_offset)| SpanKind::Interruption(Interruption { cause, function, wasm_offset })),
    ]
}

fn outcome() -> impl Strategy<Value = Outcome> {
    prop_oneof![
        8 => Just(Outcome::Ok),
        1 => name().prop_map(|code| Outcome::Trap { code }),
        1 => Just(Outcome::HostError),
        1 => Just(Outcome::Exit),
        1 => Just(Outcome::Refused),
        2 => any::<u16>().prop_map(|errno| Outcome::Errno { errno }),
        1 => Just(Outcome::Unfinished),
        1 => Just(Outcome::Unknown),
    ]
}

fn bound() -> impl Strategy<Value = Bound> {
    prop_oneof![6 => Just(Bound::Exact), 2 => Just(Bound::Inferred), 1 => Just(Bound::Open)]
}

prop_compose! {
    fn any_suspend()(start_ns in 0..2_000_u64, length_ns in prop::option::of(0..500_u64), from_tid in 1..4_u32, to_tid in prop::option::of(1..4_u32)) -> Suspend {
        Suspend { start_ns: START + start_ns, end_ns: length_ns.map(|length| START + start_ns + length), from_tid, to_tid }
    }
}

/// A span without children, some times over; its times promise nothing.
fn any_span() -> BoxedStrategy<(Span, usize)> {
    let times = prop_oneof![
        9 => (0..2_000_u64, 0..1_000_u64),
        1 => (any::<u32>().prop_map(u64::from), any::<u32>().prop_map(u64::from)),
    ];
    let stack = prop::collection::vec(any_function(), 0..3);
    let suspends = prop::collection::vec(any_suspend(), 0..3);
    let repeats = prop_oneof![6 => Just(1_usize), 1 => 2..40_usize];
    (times, kind(), outcome(), (bound(), bound()), stack, suspends, repeats)
        .prop_map(
            |((start_ns, length_ns), kind, outcome, bounds, stack, suspends, repeats)| {
                let mut one = span(start_ns, length_ns, kind, Vec::new());
                one.outcome = outcome;
                (one.start_bound, one.end_bound) = bounds;
                one.stack = stack.into_iter().flatten().collect();
                one.suspends = suspends;
                (one, repeats)
            },
        )
        .boxed()
}

pub(super) fn any_trace() -> impl Strategy<Value = (Trace, Capture)> {
    let repeated = |(one, repeats): (Span, usize)| vec![one; repeats];
    let tree = any_span()
        .prop_map(repeated)
        .boxed()
        .prop_recursive(6, 60, 6, move |inner| {
            (any_span(), prop::collection::vec(inner, 0..6)).prop_map(move |((mut one, repeats), children)| {
                one.children = children.concat();
                repeated((one, repeats))
            })
        });
    let losses = || {
        let loss = (name(), name(), any::<u64>()).prop_map(|(layer, reason, count)| Loss { layer, reason, count });
        prop::collection::vec(loss, 0..12)
    };
    let words = || prop::collection::vec(name(), 0..12);
    (
        prop::collection::vec(tree, 0..8),
        any_function(),
        (losses(), losses()),
        words(),
        (name(), name(), prop::option::of(name())),
    )
        .prop_map(
            |(children, entered, (lost, lost_in_window), limits, (command, kernel_release, replay_of))| {
                let mut root = span(0, 1_800, SpanKind::Invoke { function: entered }, children.concat());
                root.suspends = vec![suspend(100, 700, 1, 2)];
                let mut trace = trace(root);
                trace.losses = lost;
                let process = Process {
                    command,
                    limits,
                    ..Process::clone(&trace.process)
                };
                trace.process = Arc::new(process);
                (
                    trace,
                    Capture {
                        losses: lost_in_window,
                        kernel_release,
                        replay_of,
                        ..capture()
                    },
                )
            },
        )
}
