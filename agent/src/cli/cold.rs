//! Cold starts: how long a module that has just become executable waits for its first call.

use std::{collections::HashMap, time::Duration};

use crate::{
    event::{Event, EventKind},
    metrics::{ColdStartPhase, Metrics},
    span::{SpanKind, Trace},
};

/// Modules that may wait for their first call at once; later ones are not timed until some have been called.
const MAX_COLD_MODULES: usize = 4096;

/// Modules that have not been called yet, by process and hash, with when they were published.
#[derive(Debug, Default)]
pub(super) struct ColdModules {
    published_ns: HashMap<(u32, String), u64>,
}

impl ColdModules {
    pub(super) fn event(&mut self, event: &Event) {
        match &event.kind {
            EventKind::ModulePublished { hash, .. } if self.published_ns.len() < MAX_COLD_MODULES => {
                self.published_ns.insert((event.pid, hash.clone()), event.at_ns);
            }
            EventKind::ProcessGone => self.published_ns.retain(|(pid, _), _| *pid != event.pid),
            _ => {}
        }
    }

    /// Times the first call. Traces complete in the order in which they end, so a slow first call may be overtaken by a
    /// fast second one; the time to the earliest of those that are known is told.
    pub(super) fn trace(&mut self, trace: &Trace, metrics: &Metrics) {
        let SpanKind::Invoke {
            function: Some(function),
        } = &trace.root.kind
        else {
            return;
        };
        if self.published_ns.is_empty() {
            return;
        }
        let key = (trace.process.pid, function.module.hash.clone());
        if let Some(published_ns) = self.published_ns.remove(&key) {
            let waited = Duration::from_nanos(trace.root.start_ns.saturating_sub(published_ns));
            metrics.observe_cold_start(&trace.process, ColdStartPhase::PublishToInvoke, waited);
        }
    }
}
