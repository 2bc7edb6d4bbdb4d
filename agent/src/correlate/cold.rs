//! Which invocation was the first of its module, and what had come before.

use std::{collections::HashMap, sync::Arc};

use super::{Activation, Context, ProcessState};
use crate::{
    event::EventKind,
    span::{ColdStart, Module, Phase, PhaseKind, SpanKind},
};

/// Modules loaded and not yet called that are remembered of one process.
const MAX_LOADED: usize = 1024;
/// Modules remembered as having been called, of one process.
const MAX_CALLED: usize = 4096;
/// Phases kept of one cold start: a component has two for each of its modules.
const MAX_PHASES: usize = 64;

/// What is known of a process's modules.
#[derive(Debug, Default)]
pub(super) struct Modules {
    /// Not called yet, by where their code is.
    loaded: HashMap<u64, Loaded>,
    /// By hash: invocations that began later than this were not the first.
    called_ns: HashMap<String, u64>,
}

#[derive(Debug)]
struct Loaded {
    module: Arc<Module>,
    published_ns: u64,
    phases: Vec<Phase>,
}

impl ProcessState {
    /// Takes what happened to a module before it was called; `false` if there is no room for it.
    pub(super) fn module_event(&mut self, at_ns: u64, tid: u32, event: EventKind) -> bool {
        let loaded = &mut self.modules.loaded;
        match event {
            EventKind::ModulePublished { module, hash, image } if image != 0 => {
                if loaded.len() >= MAX_LOADED
                    && let Some(oldest) = loaded.iter().min_by_key(|(_, loaded)| loaded.published_ns)
                {
                    let oldest = *oldest.0;
                    loaded.remove(&oldest);
                }
                loaded.insert(
                    image,
                    Loaded {
                        module: Arc::new(Module { name: module, hash }),
                        published_ns: at_ns,
                        phases: Vec::new(),
                    },
                );
            }
            EventKind::Phase {
                phase,
                start_ns,
                image,
                is_first: true,
                ..
            } => {
                if let Some(loaded) = loaded.get_mut(&image) {
                    if loaded.phases.len() >= MAX_PHASES {
                        return false;
                    }
                    loaded.phases.push(Phase {
                        kind: phase,
                        start_ns,
                        end_ns: at_ns,
                        tid,
                    });
                }
            }
            _ => {}
        }
        true
    }
}

impl Modules {
    /// An activation has become known by name. It is warm if its module had been called before it began.
    pub(super) fn judge(&mut self, activation: &mut Activation) {
        let SpanKind::Invoke {
            function: Some(function),
        } = &activation.span.kind
        else {
            return;
        };
        let hash = &function.module.hash;
        match self.called_ns.get(hash) {
            Some(called_ns) => activation.is_warm = activation.cold.is_empty() && *called_ns < activation.span.start_ns,
            None => self.called(hash, activation.span.start_ns),
        }
    }

    fn called(&mut self, hash: &str, at_ns: u64) {
        if self.called_ns.len() >= MAX_CALLED {
            self.called_ns.clear();
        }
        self.called_ns.insert(hash.to_owned(), at_ns);
    }
}

impl Context<'_> {
    /// An activation is the first that is known to have entered a code object.
    pub(super) fn first_call(&mut self, address: u64, image: u64) {
        let Some(mut loaded) = self.state.modules.loaded.remove(&image) else {
            return;
        };
        let hash = loaded.module.hash.clone();
        let start_ns = self
            .state
            .activations
            .get(&address)
            .map(|activation| activation.span.start_ns);
        // What an activation entered is known only when it ends or calls out, so one that began earlier and has not been
        // named may have been the first.
        let is_first = start_ns.is_some_and(|start_ns| {
            !self.state.activations.values().any(|other| {
                other.address != address
                    && other.span.start_ns < start_ns
                    && matches!(other.span.kind, SpanKind::Invoke { function: None })
            })
        });
        let (Some(start_ns), true, true) = (start_ns, is_first, self.state.coverage.activations) else {
            // Where activations come and go unseen, there may have been any number before.
            if self.state.coverage.activations {
                self.count("cold_start_unassigned");
            }
            if let Some(activation) = self.state.activations.get_mut(&address) {
                activation.is_warm = false;
            }
            let at_ns = self.at_ns;
            self.state.modules.called(&hash, at_ns);
            return;
        };
        self.state.modules.called(&hash, start_ns);
        loaded
            .phases
            .sort_by_key(|phase| (phase.start_ns, phase.kind == PhaseKind::Publish));
        if let Some(activation) = self.state.activations.get_mut(&address) {
            activation.is_warm = false;
            activation.cold.push(ColdStart {
                invoked_ns: start_ns,
                tid: activation.span.tid,
                module: loaded.module,
                published_ns: loaded.published_ns,
                phases: loaded.phases,
            });
        }
    }
}
