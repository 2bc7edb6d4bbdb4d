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
/// Modules of a process of which it is not known yet which activation was the first; of more nothing is said.
const MAX_UNDECIDED: usize = 64;
/// Reason of a loss: a cold start of which nothing tells which activation it was part of.
pub(super) const UNASSIGNED: &str = "cold_start_unassigned";
/// Phases kept of one cold start: a component has two for each of its modules.
const MAX_PHASES: usize = 64;

/// What is known of a process's modules.
#[derive(Debug, Default)]
pub(super) struct Modules {
    /// Not called yet, by where their code is.
    loaded: HashMap<u64, Loaded>,
    /// By hash: invocations that began later than this were not the first.
    called_ns: HashMap<String, u64>,
    /// Called, and it is not known yet by which activation first.
    undecided: Vec<Undecided>,
}

/// An activation is known by where it lies and when it began, as its place is used again.
type Known = (u64, u64);

#[derive(Debug)]
struct Undecided {
    loaded: Loaded,
    /// The first so far.
    first: Known,
    /// Began earlier, and nothing tells yet what they entered.
    older: Vec<Known>,
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

    /// Cold starts that will not be told of, as the process is gone.
    pub(super) fn undecided_count(&self) -> usize {
        self.undecided.len()
    }

    fn called(&mut self, hash: &str, at_ns: u64) {
        if self.called_ns.len() >= MAX_CALLED {
            self.called_ns.clear();
        }
        let called_ns = self.called_ns.entry(hash.to_owned()).or_insert(at_ns);
        *called_ns = at_ns.min(*called_ns);
    }
}

impl Context<'_> {
    /// An activation is the first that is known to have entered a code object.
    pub(super) fn first_call(&mut self, address: u64, image: u64) {
        let Some(loaded) = self.state.modules.loaded.remove(&image) else {
            return;
        };
        let hash = loaded.module.hash.clone();
        let start_ns = self.state.activations.get_mut(&address).map(|activation| {
            activation.is_warm = false;
            activation.span.start_ns
        });
        let at_ns = self.at_ns;
        let (Some(start_ns), true) = (start_ns, self.state.coverage.activations) else {
            // Where activations come and go unseen, there may have been any number before.
            if self.state.coverage.activations {
                self.count(UNASSIGNED);
            }
            self.state.modules.called(&hash, at_ns);
            return;
        };
        // What an activation entered is known only when it ends or calls out, so one that began earlier and has not been
        // named may have been the first.
        let unnamed = self.state.activations.values().filter(|other| {
            other.address != address
                && other.span.start_ns < start_ns
                && matches!(other.span.kind, SpanKind::Invoke { function: None })
        });
        let older: Vec<_> = unnamed.map(|other| (other.address, other.span.start_ns)).collect();
        let is_first = older.is_empty();
        self.state
            .modules
            .called(&hash, if is_first { start_ns } else { at_ns });
        if !is_first && self.state.modules.undecided.len() >= MAX_UNDECIDED {
            self.count(UNASSIGNED);
            return;
        }
        self.state.modules.undecided.push(Undecided {
            loaded,
            first: (address, start_ns),
            older,
        });
        self.settle_cold_starts();
    }

    /// Looks at what has become of the activations that may have been the first of a module.
    pub(super) fn settle_cold_starts(&mut self) {
        if self.state.modules.undecided.is_empty() {
            return;
        }
        for mut undecided in std::mem::take(&mut self.state.modules.undecided) {
            let Some(is_decided) = undecided.look(&self.state.activations) else {
                self.count(UNASSIGNED);
                continue;
            };
            if !is_decided {
                self.state.modules.undecided.push(undecided);
                continue;
            }
            let (address, start_ns) = undecided.first;
            match self.state.activations.get_mut(&address) {
                Some(activation) if activation.span.start_ns == start_ns => activation.starts_cold(undecided.loaded),
                // Its trace is complete already.
                _ => self.count(UNASSIGNED),
            }
        }
    }
}

impl Undecided {
    /// Whether the first is known; nothing if it never will be.
    fn look(&mut self, activations: &HashMap<u64, Activation>) -> Option<bool> {
        for (address, start_ns) in std::mem::take(&mut self.older) {
            let activation = activations.get(&address)?;
            if activation.span.start_ns != start_ns {
                return None;
            }
            match &activation.span.kind {
                SpanKind::Invoke {
                    function: Some(function),
                } => {
                    // The same module may be there twice, and have been called before.
                    let is_of_it = function.module.hash == self.loaded.module.hash && !activation.is_warm;
                    if is_of_it && start_ns < self.first.1 {
                        self.first = (address, start_ns);
                    }
                }
                _ => self.older.push((address, start_ns)),
            }
        }
        let first_ns = self.first.1;
        self.older.retain(|(_, start_ns)| *start_ns < first_ns);
        Some(self.older.is_empty())
    }
}

impl Activation {
    fn starts_cold(&mut self, mut loaded: Loaded) {
        loaded
            .phases
            .sort_by_key(|phase| (phase.start_ns, phase.kind == PhaseKind::Publish));
        self.is_warm = false;
        self.cold.push(ColdStart {
            invoked_ns: self.span.start_ns,
            tid: self.span.tid,
            module: loaded.module,
            published_ns: loaded.published_ns,
            phases: loaded.phases,
        });
    }
}
