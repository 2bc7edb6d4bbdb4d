//! Small traces for the tests of this folder.

use std::sync::Arc;

use crate::span::{Bound, Function, Import, Module, Outcome, Process, Span, SpanKind, Trace, TraceId};

pub(crate) fn process() -> Arc<Process> {
    Arc::new(Process {
        pid: 2113,
        start_ns: 77,
        command: "edge-host".to_owned(),
        runtime_name: "wasmtime".to_owned(),
        runtime_version: Some("48".to_owned()),
        limits: Vec::new(),
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
        },
        at_ns,
        at_ns,
    )
}
