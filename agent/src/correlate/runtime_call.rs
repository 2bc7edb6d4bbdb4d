//! Calls of the runtime by guest code: growth, interruptions by fuel and epochs, and the raising of errors.
//!
//! Such a call begins where the guest made it and is paired with its end by its stack pointer, so it may be suspended in
//! between and end on another thread. One that never returns is known by what the activation ends in.

use super::{Activation, Context, FailedCall};
use crate::{
    event::{FunctionId, RuntimeCall, RuntimeResult, WantedGrowth},
    span::{Bound, Growth, Interruption, Outcome, Span, SpanKind},
};

/// A call of the runtime that is running.
#[derive(Debug)]
pub(super) struct OpenRuntimeCall {
    pub(super) span: Span,
    stack_pointer: u64,
    native_offset: u64,
}

impl Context<'_> {
    /// A moment at which a guest trapped.
    pub(super) fn trap_span(
        &self,
        code: &str,
        stack: &[FunctionId],
        native_offset: u64,
        wasm_offset: Option<u32>,
    ) -> Span {
        let stack = self.stack(stack);
        let kind = SpanKind::Trap {
            code: code.to_owned(),
            function: stack.first().cloned(),
            native_offset,
            wasm_offset,
        };
        Span {
            outcome: Outcome::Trap { code: code.to_owned() },
            end_bound: Bound::Exact,
            stack,
            ..self.open_span(kind)
        }
    }

    /// A call of the runtime that begins.
    pub(super) fn runtime_call_span(
        &mut self,
        call: RuntimeCall,
        stack: &[FunctionId],
        truncated: bool,
        wasm_offset: Option<u32>,
    ) -> Span {
        let stack = self.stack(stack);
        let function = stack.first().cloned();
        let instance = match &call {
            RuntimeCall::MemoryGrow(wanted) | RuntimeCall::TableGrow(wanted) => {
                self.state.instances.number(wanted.instance)
            }
            RuntimeCall::Interruption { .. } => 0,
        };
        let growth = |wanted: WantedGrowth| Growth {
            instance,
            index: wanted.index,
            delta: wanted.delta,
            old: None,
            new: None,
            page_bytes: wanted.page_bytes,
            maximum: wanted.maximum,
            function: function.clone(),
            wasm_offset,
        };
        let kind = match call {
            RuntimeCall::MemoryGrow(wanted) => SpanKind::MemoryGrow(growth(wanted)),
            RuntimeCall::TableGrow(wanted) => SpanKind::TableGrow(growth(wanted)),
            RuntimeCall::Interruption { cause } => SpanKind::Interruption(Interruption {
                cause,
                function,
                wasm_offset,
            }),
        };
        Span {
            stack,
            stack_truncated: truncated,
            ..self.open_span(kind)
        }
    }

    fn open_span(&self, kind: SpanKind) -> Span {
        Span {
            start_ns: self.at_ns,
            end_ns: self.at_ns,
            start_bound: Bound::Exact,
            end_bound: Bound::Open,
            tid: self.tid,
            kind,
            outcome: Outcome::Unfinished,
            stack: Vec::new(),
            stack_truncated: false,
            children: Vec::new(),
            suspends: Vec::new(),
        }
    }

    pub(super) fn runtime_call(
        &mut self,
        address: u64,
        entry: Option<FunctionId>,
        stack_pointer: u64,
        native_offset: u64,
        span: Span,
    ) {
        let at_ns = self.at_ns;
        let Some(activation) = self.activation(address, entry) else {
            self.count("runtime_call_without_activation");
            return;
        };
        // Guest code was running, so whatever it called before is over.
        activation.close_call(at_ns, Bound::Inferred, Outcome::Unknown);
        activation.catch();
        activation.open_runtime_call = Some(OpenRuntimeCall {
            span,
            stack_pointer,
            native_offset,
        });
    }

    pub(super) fn runtime_call_end(&mut self, stack_pointer: u64, result: RuntimeResult) {
        let at_ns = self.at_ns;
        // On top of its thread, where it is known which that is.
        let top = self.thread().stack.last().copied();
        let is_it = |activation: &Activation| {
            let call = activation.open_runtime_call.as_ref();
            call.is_some_and(|call| call.stack_pointer == stack_pointer)
        };
        let activations = &mut self.state.activations;
        let address = top
            .filter(|top| activations.get(top).is_some_and(is_it))
            .or_else(|| activations.values().find(|one| is_it(one)).map(|one| one.address));
        let Some(activation) = address.and_then(|address| activations.get_mut(&address)) else {
            self.count("runtime_call_end_without_begin");
            return;
        };
        activation.event_count += 1;
        activation.last_ns = activation.last_ns.max(at_ns);
        match result {
            RuntimeResult::Continued => activation.close_runtime_call(at_ns, Bound::Exact, Outcome::Ok),
            RuntimeResult::Refused => activation.close_runtime_call(at_ns, Bound::Exact, Outcome::Refused),
            RuntimeResult::Grown { old } => {
                if let Some(growth) = activation.open_runtime_call.as_mut().and_then(OpenRuntimeCall::growth) {
                    growth.old = Some(old);
                    growth.new = old.checked_add(growth.delta);
                }
                activation.close_runtime_call(at_ns, Bound::Exact, Outcome::Ok);
            }
            RuntimeResult::Unwinds => activation.fail_runtime_call(at_ns, Bound::Exact),
        }
    }

    /// `span` is the trap; `is_known` where what failed can fail in one way only.
    pub(super) fn raise(&mut self, address: u64, entry: Option<FunctionId>, is_known: bool, span: Span) {
        let at_ns = self.at_ns;
        let Some(activation) = self.activation(address, entry) else {
            self.count("trap_without_activation");
            return;
        };
        activation.unwind_runtime_call(at_ns);
        // What raises again has caught what it raised before.
        if activation.failed_call.is_none() {
            activation.catch();
        }
        if activation.trap.is_some() || activation.failed_call.is_some() {
            return;
        }
        // A host call whose end is not probed is what failed, unless something else is known to be.
        if !is_known && activation.open_call.is_some() {
            return;
        }
        activation.close_call(at_ns, Bound::Inferred, Outcome::Unknown);
        if let SpanKind::Trap { code, .. } = &span.kind {
            activation.trap = Some(code.clone());
        }
        activation.add(span);
    }
}

impl OpenRuntimeCall {
    fn growth(&mut self) -> Option<&mut Growth> {
        match &mut self.span.kind {
            SpanKind::MemoryGrow(growth) | SpanKind::TableGrow(growth) => Some(growth),
            _ => None,
        }
    }

    /// The interruption that ends the guest: one during which its fiber left its thread had been survived already.
    fn deadly_interruption(&self) -> Option<&Interruption> {
        match &self.span.kind {
            SpanKind::Interruption(interruption) if self.span.suspends.is_empty() => Some(interruption),
            _ => None,
        }
    }
}

impl Activation {
    pub(super) fn close_runtime_call(&mut self, at_ns: u64, bound: Bound, outcome: Outcome) {
        if let Some(OpenRuntimeCall { mut span, .. }) = self.open_runtime_call.take() {
            span.end_ns = at_ns.max(span.start_ns);
            span.end_bound = bound;
            span.outcome = outcome;
            self.add(span);
        }
    }

    /// The guest is unwound, out of a call of the runtime if one is open.
    pub(super) fn unwind_runtime_call(&mut self, at_ns: u64) {
        self.fail_runtime_call(at_ns, Bound::Inferred);
    }

    fn fail_runtime_call(&mut self, at_ns: u64, bound: Bound) {
        let Some(call) = self.open_runtime_call.take() else {
            return;
        };
        let Some(Interruption {
            cause,
            function,
            wasm_offset,
        }) = call.deadly_interruption().cloned()
        else {
            // A limiter's error, or the invocation was dropped while it was suspended.
            self.failed_call = Some(FailedCall { import: None });
            self.open_runtime_call = Some(call);
            self.close_runtime_call(at_ns, bound, Outcome::HostError);
            return;
        };
        let code = cause.trap_code().to_owned();
        let at_ns = at_ns.max(call.span.start_ns);
        self.trap = Some(code.clone());
        // What ran on behalf of the interruption ran in the invocation.
        self.span.children.extend(call.span.children);
        self.add(Span {
            start_ns: at_ns,
            end_ns: at_ns,
            end_bound: Bound::Exact,
            kind: SpanKind::Trap {
                code: code.clone(),
                function,
                native_offset: call.native_offset,
                wasm_offset,
            },
            outcome: Outcome::Trap { code },
            children: Vec::new(),
            ..call.span
        });
    }
}
