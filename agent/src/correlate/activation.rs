//! One activation while it runs: its span under construction, the host call that is open, and how it came to end.

use std::{collections::BTreeMap, sync::Arc};

use super::{
    room::{OPEN_TRACES_LIMIT, Share, span_bytes},
    runtime_call::OpenRuntimeCall,
};
use crate::{
    event::Coverage,
    span::{Bound, ColdStart, Import, Outcome, Pause, Span, SpanKind, Suspend},
};

/// Spans kept of one trace; what comes later is counted as lost and told in the trace.
pub const MAX_SPANS_PER_TRACE: u64 = 200_000;
/// Reasons of losses that happen here, where a trace has no room.
pub(super) const LIMITS: [&str; 4] = [TRACE_TOO_LARGE, SUSPEND_LIMIT, COLD_START_LIMIT, OPEN_TRACES_LIMIT];
pub(super) const COLD_START_LIMIT: &str = "cold_start_limit";
const TRACE_TOO_LARGE: &str = "trace_too_large";
const SUSPEND_LIMIT: &str = "suspend_limit";
/// Code of a trap of which nothing tells which it is.
pub(super) const RAISED_BY_RUNTIME: &str = "raised_by_runtime";
/// Suspensions kept per span.
const MAX_SUSPENDS: usize = 4096;

#[derive(Debug)]
pub(super) struct Activation {
    pub(super) address: u64,
    pub(super) span: Span,
    pub(super) parent: Option<u64>,
    pub(super) open_call: Option<Span>,
    /// Stack pointer on entry of the host function that `open_call` is of; 0 if unknown.
    pub(super) open_frame: u64,
    /// What the guest has called the runtime for, inside of which no host call of this activation is open.
    pub(super) open_runtime_call: Option<OpenRuntimeCall>,
    /// The host call that ended last did not return to the guest; its import.
    pub(super) failed_call: Option<FailedCall>,
    pub(super) trap: Option<String>,
    pub(super) last_ns: u64,
    pub(super) suspended: Option<(u64, u32)>,
    pub(super) event_count: u64,
    pub(super) span_count: u64,
    /// What it and what is in it take of the room for all.
    pub(super) share: Share,
    pub(super) losses: BTreeMap<(String, String), u64>,
    /// It, or one made below it, was the first call of a module.
    pub(super) cold: Vec<ColdStart>,
    /// Its module had been called before.
    pub(super) is_warm: bool,
    /// Who it works for; known of outermost ones.
    pub(super) origin: super::request::Origin,
    /// Probes that were paused meanwhile; the end of those that still are is the largest number.
    pub(super) pauses: Vec<Pause>,
    /// The open call's end will not be seen.
    pub(super) is_muted: bool,
}

/// A host call that unwound its guest.
#[derive(Clone, Debug)]
pub(super) struct FailedCall {
    pub(super) import: Option<Arc<Import>>,
}

impl Activation {
    pub(super) fn lose(&mut self, layer: &str, reason: &str, count: u64) {
        *self.losses.entry((layer.to_owned(), reason.to_owned())).or_default() += count;
    }

    pub(super) fn add_suspend(&mut self, start_ns: u64, from_tid: u32, end_ns: u64, to_tid: u32) {
        let suspend = Suspend {
            start_ns,
            end_ns: Some(end_ns),
            from_tid,
            to_tid: Some(to_tid),
        };
        if self.span.suspends.len() >= MAX_SUSPENDS {
            self.lose("correlate", SUSPEND_LIMIT, 1);
            return;
        }
        // Its call, if there is one, has it too.
        if !self.share.take(2 * size_of::<Suspend>()) {
            self.lose("correlate", OPEN_TRACES_LIMIT, 1);
            return;
        }
        self.span.suspends.push(suspend);
        if let Some(call) = self.open_child() {
            call.suspends.push(suspend);
        }
    }

    /// What runs in it, if anything does.
    fn open_child(&mut self) -> Option<&mut Span> {
        match &mut self.open_runtime_call {
            Some(call) => Some(&mut call.span),
            None => self.open_call.as_mut(),
        }
    }

    /// Adds a completed span where it belongs: to the call that is running, else to the invocation.
    pub(super) fn add(&mut self, span: Span) {
        if self.span_count >= MAX_SPANS_PER_TRACE {
            self.lose("correlate", TRACE_TOO_LARGE, 1);
            return;
        }
        if !self.share.take(span_bytes(&span)) {
            self.lose("correlate", OPEN_TRACES_LIMIT, 1);
            return;
        }
        self.span_count += 1;
        let siblings = match self.open_child() {
            Some(call) => &mut call.children,
            None => &mut self.span.children,
        };
        // Spans come when they end; only those of helper threads can begin before one that has ended.
        let after = siblings.iter().rposition(|sibling| sibling.start_ns <= span.start_ns);
        siblings.insert(after.map_or(0, |index| index + 1), span);
    }

    /// Closes what is open in it.
    /// The guest goes on: what was raised in it, or in a host function that it called, was an exception that it has caught.
    pub(super) fn catch(&mut self) {
        self.failed_call = None;
        if self.trap.as_deref() == Some(RAISED_BY_RUNTIME) {
            self.trap = None;
            let children = &mut self.span.children;
            let is_it = |span: &Span| matches!(&span.kind, SpanKind::Trap { code, .. } if code == RAISED_BY_RUNTIME);
            if let Some(index) = children.iter().rposition(is_it) {
                children.remove(index);
            }
        }
    }

    pub(super) fn close_call(&mut self, at_ns: u64, bound: Bound, outcome: Outcome) {
        self.close_runtime_call(at_ns, bound, outcome.clone());
        if let Some(mut call) = self.open_call.take() {
            match self.silenced_ns(&call) {
                Some(silenced_ns) if bound != Bound::Exact => {
                    call.end_ns = silenced_ns.min(at_ns).max(call.start_ns);
                    call.end_bound = Bound::Open;
                    call.outcome = Outcome::Unfinished;
                }
                _ => {
                    call.end_ns = at_ns.max(call.start_ns);
                    call.end_bound = bound;
                    call.outcome = outcome;
                }
            }
            // `add` puts it into the invocation, as no call is open any more.
            self.add(call);
        }
    }
}

impl Span {
    pub(super) fn import(&self) -> Option<Arc<Import>> {
        match &self.kind {
            SpanKind::HostCall { import } => import.clone(),
            _ => None,
        }
    }
}

/// How an activation ended, from what was seen of it.
pub(super) fn outcome(activation: &Activation, coverage: Coverage, unwinding: bool) -> Outcome {
    if let Some(code) = &activation.trap {
        return Outcome::Trap { code: code.clone() };
    }
    let failed = activation.failed_call.clone().or_else(|| {
        activation
            .open_call
            .as_ref()
            // It may have ended unseen.
            .filter(|call| activation.silenced_ns(call).is_none())
            .map(|call| FailedCall { import: call.import() })
    });
    match failed {
        Some(call) if unwinding || activation.failed_call.is_some() => {
            if call.import.is_some_and(|import| import.is_exit()) {
                Outcome::Exit
            } else {
                Outcome::HostError
            }
        }
        // A host call that failed may not have been seen.
        None if unwinding && activation.may_miss_calls() => Outcome::Unknown,
        None if unwinding => Outcome::Trap {
            code: RAISED_BY_RUNTIME.to_owned(),
        },
        _ if coverage.unwinds => Outcome::Ok,
        _ => Outcome::Unknown,
    }
}

/// Ends an activation and whatever is open in it.
pub(super) fn complete(mut activation: Activation, end_ns: u64, bound: Bound, outcome: Outcome) -> Activation {
    let end_ns = end_ns.max(activation.span.start_ns);
    if let Some((start_ns, from_tid)) = activation.suspended.take() {
        let suspend = Suspend {
            start_ns,
            end_ns: None,
            from_tid,
            to_tid: None,
        };
        activation.span.suspends.push(suspend);
        if let Some(call) = activation.open_child() {
            call.suspends.push(suspend);
        }
    }
    let (call_bound, call_outcome) = match (bound, &outcome) {
        (Bound::Open, _) => (Bound::Open, Outcome::Unfinished),
        (_, Outcome::HostError | Outcome::Exit) => (Bound::Inferred, Outcome::HostError),
        _ => (Bound::Inferred, Outcome::Unknown),
    };
    activation.close_call(end_ns, call_bound, call_outcome);
    activation.span.end_ns = end_ns;
    activation.span.end_bound = bound;
    activation.span.outcome = outcome;
    activation
}
