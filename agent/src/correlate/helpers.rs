//! Syscalls that belong to an activation although it is not their thread's next event that says so: made by helper threads, or
//! never to return.

use super::Context;
use crate::span::{Role, Span};

impl Context<'_> {
    /// A helper thread made a syscall for work that was handed over by `address` at `handed_over_ns`: it belongs to the host call
    /// that was open there at that time, if that is the one which still is.
    pub(super) fn helper_leaf(&mut self, address: u64, handed_over_ns: u64, mut span: Span) {
        let Some(activation) = self.state.activations.get_mut(&address) else {
            self.count("helper_outlived_call");
            return;
        };
        // An activation that was there before the probes is known from its first event on, which may be a later one.
        let has_begun =
            |caller: &Span| handed_over_ns >= caller.start_ns || caller.start_bound == crate::span::Bound::Open;
        let is_waiting = if let Some(call) = &activation.open_call {
            has_begun(call)
        } else {
            let last = activation.span.children.last();
            let is_over = last.is_some_and(|last| last.role() == Role::HostCall && last.end_ns > handed_over_ns);
            has_begun(&activation.span) && !is_over
        };
        if !is_waiting {
            self.count("helper_outlived_call");
            return;
        }
        if let Some(call) = &activation.open_call {
            span.stack.clone_from(&call.stack);
            span.stack_truncated = call.stack_truncated;
        }
        activation.event_count += 1;
        activation.last_ns = activation.last_ns.max(span.end_ns);
        activation.add(span);
    }

    /// The thread is in a syscall that does not return, or has not yet. Threads without an activation wait for all kinds of things.
    pub(super) fn open_leaf(&mut self, mut span: Span) {
        let Some(top) = self.thread().stack.last().copied() else {
            return;
        };
        let Some(activation) = self.state.activations.get_mut(&top) else {
            return;
        };
        if let Some(call) = &activation.open_call {
            span.stack.clone_from(&call.stack);
            span.stack_truncated = call.stack_truncated;
        }
        activation.event_count += 1;
        activation.last_ns = activation.last_ns.max(span.end_ns);
        activation.add(span);
    }
}
