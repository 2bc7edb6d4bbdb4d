//! Small traces for the tests of this folder.

use std::sync::Arc;

use crate::span::{
    Bound, Function, Growth, Import, Interruption, InterruptionCause, Module, Outcome, Place, Process, Span, SpanKind,
    Trace, TraceId,
};

pub(crate) fn process() -> Arc<Process> {
    Arc::new(Process {
        pid: 2113,
        start_ns: 77,
        command: "edge-host".to_owned(),
        runtime_name: "wasmtime".to_owned(),
        runtime_version: Some("48".to_owned()),
        limits: Vec::new(),
        place: Place::default(),
    })
}

pub(crate) fn trace(root: Span) -> Trace {
    Trace {
        id: TraceId([0x4b; 16]),
        process: process(),
        root,
        losses: Vec::new(),
        event_count: 5,
        starts: crate::span::Starts::default(),
        parent: None,
        pauses: Vec::new(),
    }
}

pub(crate) fn function(name: &str) -> Arc<Function> {
    let module = Arc::new(Module {
        name: "policy.wasm".to_owned(),
        hash: "3f9ac2000000".to_owned(),
    });
    Arc::new(Function {
        module,
        index: 7,
        name: name.to_owned(),
    })
}

pub(crate) fn span(kind: SpanKind, start_ns: u64, end_ns: u64) -> Span {
    Span {
        start_ns,
        end_ns,
        start_bound: Bound::Exact,
        end_bound: Bound::Exact,
        tid: 11,
        kind,
        outcome: Outcome::Ok,
        stack: Vec::new(),
        stack_truncated: false,
        children: Vec::new(),
        suspends: Vec::new(),
    }
}

pub(crate) fn invoke(name: &str, start_ns: u64, end_ns: u64) -> Span {
    span(
        SpanKind::Invoke {
            function: Some(function(name)),
        },
        start_ns,
        end_ns,
    )
}

pub(crate) fn host_call(name: &str, start_ns: u64, end_ns: u64) -> Span {
    let import = Import {
        module: "wasi_snapshot_preview1".to_owned(),
        name: name.to_owned(),
    };
    let mut span = span(
        SpanKind::HostCall {
            import: Some(Arc::new(import)),
        },
        start_ns,
        end_ns,
    );
    span.stack = vec![function("load_rules")];
    span
}

pub(crate) fn syscall(name: &str, start_ns: u64, end_ns: u64) -> Span {
    let kind = SpanKind::Syscall {
        number: 1,
        name: name.to_owned(),
        args: [3, 0x7fff_0000, 64],
        result: 64,
        on_helper: false,
    };
    let mut span = span(kind, start_ns, end_ns);
    span.stack = vec![function("load_rules")];
    span
}

pub(crate) fn trap(code: &str, at_ns: u64) -> Span {
    span(
        SpanKind::Trap {
            code: code.to_owned(),
            function: Some(function("parse_rule")),
            native_offset: 0x1c4,
            wasm_offset: Some(0x2f),
        },
        at_ns,
        at_ns,
    )
}

/// `memory.grow` by two pages.
pub(crate) fn growth(old: Option<u64>, at_ns: u64) -> Span {
    let growth = Growth {
        instance: 0x7f00,
        index: 0,
        delta: 2,
        old,
        new: old.map(|old| old + 2),
        page_bytes: Some(65_536),
        maximum: Some(20),
        function: Some(function("resize")),
        wasm_offset: Some(0x63),
    };
    span(SpanKind::MemoryGrow(growth), at_ns, at_ns + 5)
}

pub(crate) fn interruption(cause: InterruptionCause, at_ns: u64) -> Span {
    let interruption = Interruption {
        cause,
        function: Some(function("resize")),
        wasm_offset: Some(0x70),
    };
    span(SpanKind::Interruption(interruption), at_ns, at_ns + 5)
}
