//! Diagrams of known traces, as people see them.

use std::sync::Arc;

use crate::span::{
    Bound, Capture, Growth, Interruption, InterruptionCause, Loss, Outcome, Process, Span, SpanKind, Suspend, Trace,
};

use super::model::Step;
use super::samples::{
    HOSTILE, MS, US, capture, function, host_call, invoke, slow_request, span, suspend, syscall, trace, trap, wasi,
};
use super::{Format, MAX_DIAGRAM_CHARS, Options, draw, sequence};

/// Asserts both formats against snapshots `mermaid_<name>` and `text_<name>`, without the version.
macro_rules! assert_drawn {
    ($name:literal, $trace:expr, $capture:expr) => {
        let (trace, capture): (Trace, Capture) = ($trace, $capture);
        for format in Format::ALL {
            let text = draw(
                &trace,
                &capture,
                &Options {
                    format: *format,
                    ..Options::default()
                },
            );
            let text = text.replace(concat!("wasmscope ", env!("CARGO_PKG_VERSION")), "wasmscope [version]");
            insta::assert_snapshot!(format!("{}_{}", format.name(), $name), text);
        }
    };
}

fn simple_root() -> Span {
    let entered = function("transform.wasm", "run");
    invoke(
        0,
        840 * US,
        &entered,
        vec![
            wasi(
                20 * US,
                60 * US,
                "fd_read",
                vec![syscall(25 * US, 31 * US, "readv", [0, 0, 1], 512)],
            ),
            wasi(
                400 * US,
                95 * US,
                "fd_write",
                vec![syscall(410 * US, 70 * US, "writev", [1, 0, 2], 1_024)],
            ),
        ],
    )
}

#[test]
fn a_simple_request() {
    assert_drawn!("simple", trace(simple_root()), capture());
}

#[test]
fn the_span_that_a_trace_hangs_under_is_named_first_and_in_the_closing_note() {
    let parent = crate::span::Parent::parse(
        b"00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
        crate::span::ParentSource::Request,
    );
    let under = Trace {
        parent,
        ..trace(simple_root())
    };
    for format in Format::ALL {
        let options = Options {
            format: *format,
            ..Options::default()
        };
        let drawn = draw(&under, &capture(), &options);
        let (note, call) = (drawn.find("traceparent 0af76519…319c"), drawn.find("run"));
        assert!(
            note.is_some() && note < call.and_then(|_| drawn.find("fd_read")),
            "{drawn}"
        );
        let named = "under trace 0af7651916cd43dd8448eb211c80319c span b7ad6b7169203331, named by the request";
        assert!(drawn.contains(named), "{drawn}");
    }
}

#[test]
fn a_slow_request_that_traps() {
    assert_drawn!("slow_request", slow_request(), capture());
}

#[test]
fn a_host_call_that_calls_back_into_another_guest() {
    let plugin = function("plugin.wasm", "on_event");
    let callback = invoke(
        220 * US,
        300 * US,
        &plugin,
        vec![wasi(
            300 * US,
            12 * US,
            "random_get",
            vec![syscall(302 * US, 8 * US, "getrandom", [0, 32, 0], 32)],
        )],
    );
    let root = invoke(
        0,
        900 * US,
        &function("main.wasm", "start"),
        vec![host_call(200 * US, 400 * US, "events", "dispatch", vec![callback])],
    );
    assert_drawn!("nested", trace(root), capture());
}

#[test]
fn a_fiber_that_moves_between_threads() {
    let first = suspend(150 * US, 2 * MS, 2113, 2117);
    let second = suspend(2_300 * US, 900 * US, 2117, 2117);
    let mut fetch = host_call(100 * US, 3_200 * US, "edge", "fetch", vec![]);
    fetch.suspends = vec![first, second];
    let mut root = invoke(0, 3_500 * US, &function("proxy.wasm", "handle"), vec![fetch]);
    // The activation lists them too.
    root.suspends = vec![first, second];
    assert_drawn!("suspended", trace(root), capture());
}

fn on_helper(mut span: Span, thread: u32) -> Span {
    if let SpanKind::Syscall { on_helper, .. } = &mut span.kind {
        *on_helper = true;
    }
    span.tid = thread;
    span
}

#[test]
fn helper_threads_that_work_while_the_guest_waits() {
    let waiting = suspend(150 * US, 650 * US, 2113, 2117);
    let mut fetch = host_call(
        100 * US,
        800 * US,
        "edge",
        "fetch",
        vec![
            syscall(120 * US, 50 * US, "futex", [0, 129, 1], 1),
            on_helper(syscall(140 * US, 400 * US, "openat", [0xffff_ff9c, 0, 0], 9), 2120),
            // At the same time as the one before, and after which the guest had gone on.
            on_helper(syscall(200 * US, 500 * US, "pread64", [8, 0, 64], 64), 2121),
        ],
    );
    fetch.suspends = vec![waiting];
    let mut leave = host_call(950 * US, 40 * US, "edge", "leave", Vec::new());
    let mut exit = syscall(960 * US, 0, "exit_group", [3, 0, 0], 0);
    exit.outcome = Outcome::Unfinished;
    exit.end_bound = Bound::Open;
    leave.children = vec![exit];
    leave.outcome = Outcome::Unfinished;
    leave.end_bound = Bound::Open;
    let mut root = invoke(0, MS, &function("proxy.wasm", "handle"), vec![fetch, leave]);
    root.suspends = vec![waiting];
    root.outcome = Outcome::Unfinished;
    root.end_bound = Bound::Open;
    let totals = sequence(&trace(root.clone()), &capture(), &Options::default()).totals;
    assert_eq!((totals.helper_count, totals.helper_ns), (2, 900 * US));
    // 30 µs of the syscall of its own were not suspended.
    assert_eq!((totals.kernel_ns, totals.suspended_ns), (30 * US, 650 * US));
    assert_eq!((totals.host_ns, totals.guest_ns), (160 * US, 160 * US));
    assert_drawn!("helpers", trace(root), capture());
}

#[test]
fn a_trap_in_a_nested_guest_unwinds_both() {
    let inner = function("plugin.wasm", "on_event");
    let mut callback = invoke(120 * US, 80 * US, &inner, vec![trap(190 * US, "unreachable", &inner)]);
    callback.outcome = Outcome::Trap {
        code: "unreachable".into(),
    };
    let mut dispatch = host_call(100 * US, 110 * US, "events", "dispatch", vec![callback]);
    dispatch.outcome = Outcome::HostError;
    let mut root = invoke(0, 300 * US, &function("main.wasm", "start"), vec![dispatch]);
    root.outcome = Outcome::HostError;
    assert_drawn!("nested_trap", trace(root), capture());
}

#[test]
fn growth_and_interruptions_go_to_the_host() {
    let asker = function("image.wasm", "resize");
    let of_memory = Growth {
        instance: 0x7f00,
        index: 0,
        delta: 16,
        old: Some(1),
        new: Some(17),
        page_bytes: Some(65_536),
        maximum: Some(20),
        function: Some(Arc::clone(&asker)),
        wasm_offset: Some(0x63),
    };
    let refused = Growth {
        old: None,
        new: None,
        ..of_memory.clone()
    };
    let of_table = Growth {
        page_bytes: None,
        maximum: None,
        ..of_memory.clone()
    };
    let protect = syscall(11 * US, 4 * US, "mprotect", [0, 0, 0], 0);
    let mut refused = span(30 * US, 2 * US, SpanKind::MemoryGrow(refused), vec![]);
    refused.outcome = Outcome::Refused;
    let interruption = Interruption {
        cause: InterruptionCause::Epoch,
        function: Some(Arc::clone(&asker)),
        wasm_offset: Some(0x70),
    };
    let mut stop = span(50 * US, 40 * US, SpanKind::Interruption(interruption), vec![]);
    stop.suspends = vec![suspend(52 * US, 36 * US, 11, 12)];
    let mut root = invoke(
        0,
        100 * US,
        &function("image.wasm", "handle"),
        vec![
            span(10 * US, 8 * US, SpanKind::MemoryGrow(of_memory), vec![protect]),
            refused,
            span(40 * US, 2 * US, SpanKind::TableGrow(of_table), vec![]),
            stop,
            trap(99 * US, "out_of_fuel", &asker),
        ],
    );
    root.suspends = vec![suspend(52 * US, 36 * US, 11, 12)];
    root.outcome = Outcome::Trap {
        code: "out_of_fuel".into(),
    };
    assert_drawn!("growth_and_interruptions", trace(root), capture());
}

#[test]
fn a_failed_syscall_has_the_name_of_its_error() {
    let mut open = wasi(
        10 * US,
        30 * US,
        "path_open",
        vec![syscall(15 * US, 9 * US, "openat", [4, 0, 0], -2)],
    );
    open.stack = vec![function("tool.wasm", "read_config")];
    let mut exit = wasi(60 * US, 5 * US, "proc_exit", vec![]);
    exit.outcome = Outcome::Exit;
    let mut root = invoke(0, 70 * US, &function("tool.wasm", "_start"), vec![open, exit]);
    root.outcome = Outcome::Exit;
    assert_drawn!("errno_and_exit", trace(root), capture());
}

#[test]
fn ten_thousand_calls_fold_into_loops() {
    let mut children = Vec::new();
    for index in 0..5_000_u64 {
        let start = index * 20 * US;
        children.push(wasi(start, 700 + index % 13 * 50, "clock_time_get", vec![]));
        children.push(wasi(
            start + 5 * US,
            6 * US,
            "fd_write",
            vec![syscall(
                start + 6 * US,
                4 * US + index % 5 * 100,
                "writev",
                [1, 0, 1],
                64,
            )],
        ));
    }
    let trace = trace(invoke(0, 101 * MS, &function("chatty.wasm", "run"), children));
    let text = draw(&trace, &capture(), &Options::default());
    assert!(text.lines().count() < 25, "{text}");
    assert_drawn!("loops", trace, capture());
}

#[test]
fn many_different_calls_are_folded_by_importance() {
    let names = [
        "fd_read",
        "fd_write",
        "poll_oneoff",
        "clock_time_get",
        "random_get",
        "fd_seek",
    ];
    let mut random = 17_u64;
    let children = (0..3_000_u64).map(|index| {
        random = random
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        let name = names[(random >> 33) as usize % names.len()];
        let length = if index % 500 == 250 {
            9 * MS
        } else {
            1 + (random >> 40) % 5_000
        };
        wasi(index * 10 * MS, length, name, vec![])
    });
    let trace = trace(invoke(
        0,
        30_000 * MS,
        &function("busy.wasm", "run"),
        children.collect(),
    ));
    let options = Options {
        max_calls: 8,
        ..Options::default()
    };
    let sequence = sequence(&trace, &capture(), &options);
    assert_eq!(sequence.totals.drawn_count, 8);
    let text = Format::Mermaid
        .render(&sequence, 0)
        .replace(env!("CARGO_PKG_VERSION"), "[version]");
    insta::assert_snapshot!("mermaid_folded", text);
}

#[test]
fn hostile_names_are_only_text() {
    let entered = function(&HOSTILE.concat(), "a\"b<script>alert(1)</script>;\nend");
    let children = HOSTILE
        .iter()
        .enumerate()
        .map(|(index, name)| host_call(index as u64 * US, 500, name, name, vec![]));
    let mut trace = trace(invoke(0, MS, &entered, children.collect()));
    trace.process = Arc::new(Process {
        command: "x\u{1b}[2J\nend".into(),
        limits: vec![HOSTILE.concat()],
        ..Process::clone(&trace.process)
    });
    assert_drawn!("hostile", trace, capture());
}

#[test]
fn losses_are_exact_and_replays_say_so() {
    let mut trace = trace(simple_root());
    trace.losses = vec![Loss {
        layer: "ring".into(),
        reason: "full".into(),
        count: 3,
    }];
    trace.process = Arc::new(Process {
        limits: vec!["stripped: activations are inferred from syscalls".into()],
        ..Process::clone(&trace.process)
    });
    let capture = Capture {
        losses: vec![
            Loss {
                layer: "ring".into(),
                reason: "full".into(),
                count: 12,
            },
            Loss {
                layer: "decode".into(),
                reason: "short_record".into(),
                count: 1,
            },
        ],
        replay_of: Some("demo of 2026-11-22, recorded on Linux 6.18.44".into()),
        ..capture()
    };
    assert_drawn!("losses", trace, capture);
}

#[test]
fn ends_that_were_not_seen_are_marked() {
    let mut read = wasi(
        20 * US,
        60 * US,
        "fd_read",
        vec![syscall(25 * US, 31 * US, "readv", [0, 0, 1], 512)],
    );
    read.end_bound = Bound::Inferred;
    let mut unnamed = span(100 * US, 50 * US, SpanKind::HostCall { import: None }, vec![]);
    unnamed.start_bound = Bound::Inferred;
    let mut poll = wasi(200 * US, 500 * US, "poll_oneoff", vec![]);
    (poll.end_bound, poll.outcome) = (Bound::Open, Outcome::Unfinished);
    poll.suspends = vec![Suspend {
        start_ns: poll.start_ns + 50 * US,
        end_ns: None,
        from_tid: 2113,
        to_tid: None,
    }];
    let mut root = invoke(
        0,
        700 * US,
        &function("server.wasm", "serve"),
        vec![read, unnamed, poll],
    );
    (root.start_bound, root.end_bound, root.outcome) = (Bound::Open, Bound::Open, Outcome::Unfinished);
    assert_drawn!("unseen_ends", trace(root), capture());
}

#[test]
fn an_empty_trace_is_still_a_diagram() {
    let root = span(0, 0, SpanKind::Invoke { function: None }, vec![]);
    assert_drawn!("empty", trace(root), Capture::default());
}

#[test]
fn calls_that_differ_inside_are_folded_when_room_is_short() {
    let children = (0..400_u64).map(|index| {
        let start = index * 100 * US;
        let reads = (0..=index * index / 7 % 4)
            .map(|read| syscall(start + read * 10 * US, 5 * US, "read", [3, 0, 64], 64))
            .collect();
        wasi(start, 60 * US, "fd_read", reads)
    });
    let trace = trace(invoke(0, 41 * MS, &function("reader.wasm", "run"), children.collect()));
    let sequence = sequence(&trace, &capture(), &Options::default());
    let loops: Vec<&Step> = sequence
        .steps
        .iter()
        .filter(|step| matches!(step, Step::LoopBegin { .. }))
        .collect();
    assert_eq!(loops.len(), 1, "{loops:?}");
    assert_eq!((sequence.totals.drawn_count, sequence.totals.repeated_count), (2, 399));
}

#[test]
fn deep_nesting_is_cut_not_followed_on_the_stack() {
    let module = function("recursive.wasm", "descend");
    let mut deepest = invoke(0, 10 * US, &module, vec![]);
    for level in 1..600_u64 {
        deepest = if level % 2 == 1 {
            host_call(0, (10 + level) * US, "host", "again", vec![deepest])
        } else {
            invoke(0, (10 + level) * US, &module, vec![deepest])
        };
    }
    deepest = invoke(0, MS, &module, vec![deepest]);
    let options = Options {
        max_calls: usize::MAX,
        ..Options::default()
    };
    let sequence = sequence(&trace(deepest), &capture(), &options);
    assert_eq!(sequence.totals.call_count, 601);
    assert!(Format::Mermaid.render(&sequence, 0).chars().count() < MAX_DIAGRAM_CHARS);
}

#[test]
fn own_times_agree_with_the_spans_where_spans_keep_their_promises() {
    let trace = slow_request();
    let sequence = sequence(&trace, &capture(), &Options::default());
    let own = |role| {
        trace
            .root
            .walk()
            .filter(|span| span.role() == role)
            .map(Span::self_ns)
            .sum::<u64>()
    };
    assert_eq!(sequence.totals.guest_ns, own(crate::span::Role::Invoke));
    assert_eq!(sequence.totals.host_ns, own(crate::span::Role::HostCall));
    assert_eq!(sequence.totals.kernel_ns, own(crate::span::Role::Syscall));
    assert_eq!(sequence.totals.suspended_ns, 6_100 * US);
}

#[test]
fn a_suspension_that_only_the_activation_lists_is_drawn_in_the_host_call_it_happened_in() {
    let mut root = invoke(
        0,
        MS,
        &function("a.wasm", "run"),
        vec![host_call(100 * US, 500 * US, "edge", "fetch", vec![])],
    );
    root.suspends = vec![suspend(150 * US, 400 * US, 1, 2)];
    let sequence = sequence(&trace(root), &capture(), &Options::default());
    let order: Vec<bool> = sequence
        .steps
        .iter()
        .map(|step| matches!(step, Step::Suspended { .. }))
        .collect();
    assert_eq!(order, [false, false, true, false, false]);
    assert_eq!(sequence.totals.host_ns, 100 * US);
}

#[test]
fn formats_are_found_by_name() {
    assert_eq!("mermaid".parse(), Ok(Format::Mermaid));
    let unknown = "visio".parse::<Format>().expect_err("no such format");
    assert_eq!(
        unknown.to_string(),
        "no diagram format of that name; there are: mermaid, text"
    );
}
