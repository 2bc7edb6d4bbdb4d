//! Cold starts as metrics: phases as they end, and the first call of each module as its trace completes.

use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
    time::Duration,
};

use crate::{
    event::{Coverage, Event, EventKind},
    metrics::{ColdStartPhase, Metrics},
    span::{PhaseKind, Process, SpanKind, Trace},
};

/// Processes whose phases are observed at once.
const MAX_PROCESSES: usize = 4096;
/// Modules that may wait for their first call at once in a recording that does not say which calls are the first.
const MAX_COLD_MODULES: usize = 4096;

/// Something to be counted, with the process that it is counted for.
#[derive(Debug)]
pub(crate) struct ColdCount {
    pub(crate) process: Arc<Process>,
    module: Option<String>,
    what: What,
}

#[derive(Debug)]
enum What {
    Instantiation,
    ColdStart,
    Phase(ColdStartPhase, Duration),
}

impl ColdCount {
    /// Counts it.
    pub(crate) fn observe(&self, metrics: &Metrics) {
        let (process, module) = (&*self.process, self.module.as_deref());
        match self.what {
            What::Instantiation => metrics.observe_instantiation(process, module),
            What::ColdStart => metrics.count_cold_start(process, module),
            What::Phase(phase, duration) => metrics.observe_cold_start(process, module, phase, duration),
        }
    }
}

/// What the phases seen so far belong to.
#[derive(Debug, Default)]
pub(crate) struct ColdModules {
    processes: HashMap<u32, (Arc<Process>, Coverage)>,
    /// Where it is not told which calls are the first (a host without symbols, an old recording): by process and hash, when
    /// the module was published.
    published_ns: HashMap<(u32, String), u64>,
    /// Processes whose last traces are yet to come: those complete because the process is gone.
    gone: HashSet<u32>,
}

impl ColdModules {
    /// Hands out what an event adds.
    pub(crate) fn event(&mut self, event: &Event, mut give: impl FnMut(ColdCount)) {
        match &event.kind {
            EventKind::Process { process, coverage } => {
                if self.gone.remove(&event.pid) {
                    self.published_ns.retain(|(pid, _), _| *pid != event.pid);
                }
                if self.processes.len() < MAX_PROCESSES || self.processes.contains_key(&event.pid) {
                    self.processes
                        .insert(event.pid, (Arc::new(Process::clone(process)), *coverage));
                }
            }
            EventKind::Phase {
                phase,
                start_ns,
                module,
                is_first,
                ..
            } => {
                let Some((process, _)) = self.processes.get(&event.pid) else {
                    return;
                };
                let mut count = |what| {
                    give(ColdCount {
                        process: Arc::clone(process),
                        module: module.clone(),
                        what,
                    });
                };
                if *phase == PhaseKind::Instantiate {
                    count(What::Instantiation);
                }
                if *is_first {
                    let duration = Duration::from_nanos(event.at_ns.saturating_sub(*start_ns));
                    count(What::Phase((*phase).into(), duration));
                }
            }
            EventKind::ModulePublished { hash, image, .. } => {
                let is_told = self
                    .processes
                    .get(&event.pid)
                    .is_some_and(|(_, coverage)| coverage.activations);
                if self.published_ns.len() >= MAX_COLD_MODULES {
                    let gone = std::mem::take(&mut self.gone);
                    self.published_ns.retain(|(pid, _), _| !gone.contains(pid));
                }
                if (*image == 0 || !is_told) && self.published_ns.len() < MAX_COLD_MODULES {
                    self.published_ns.insert((event.pid, hash.clone()), event.at_ns);
                }
            }
            EventKind::ProcessGone => {
                self.processes.remove(&event.pid);
                if self.published_ns.keys().any(|(pid, _)| *pid == event.pid) {
                    self.gone.insert(event.pid);
                }
            }
            _ => {}
        }
    }

    /// Hands out what a trace adds.
    pub(crate) fn trace(&mut self, trace: &Trace, mut give: impl FnMut(ColdCount)) {
        let mut count = |module: &str, what| {
            give(ColdCount {
                process: Arc::clone(&trace.process),
                module: Some(module.to_owned()),
                what,
            });
        };
        for cold in &trace.starts.cold {
            let module = cold.module.name.as_str();
            count(module, What::ColdStart);
            let waited = Duration::from_nanos(cold.invoked_ns.saturating_sub(cold.published_ns));
            count(module, What::Phase(ColdStartPhase::PublishToInvoke, waited));
            if let Some(call) = trace.root.walk().find(|span| cold.is_of(span)) {
                let duration = Duration::from_nanos(call.duration_ns());
                count(module, What::Phase(ColdStartPhase::FirstCall, duration));
            }
        }
        if let Some((module, waited)) = self.first_by_hash(trace) {
            count(module, What::Phase(ColdStartPhase::PublishToInvoke, waited));
        }
    }

    /// Traces complete in the order in which they end, so a slow first call may be overtaken by a fast second one; the time
    /// to the earliest of those that are known is told.
    fn first_by_hash<'a>(&mut self, trace: &'a Trace) -> Option<(&'a str, Duration)> {
        let SpanKind::Invoke {
            function: Some(function),
        } = &trace.root.kind
        else {
            return None;
        };
        if self.published_ns.is_empty() {
            return None;
        }
        let key = (trace.process.pid, function.module.hash.clone());
        let published_ns = self.published_ns.remove(&key)?;
        let waited = Duration::from_nanos(trace.root.start_ns.saturating_sub(published_ns));
        Some((function.module.name.as_str(), waited))
    }
}
