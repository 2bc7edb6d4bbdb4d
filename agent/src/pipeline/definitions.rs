//! Numbers for functions and imports, and the events that define them.
//!
//! What no process has any more is forgotten, so that the tables are bounded by what runs, not by what has ever run. One that
//! comes back gets another number.

use std::{collections::HashMap, hash::Hash, sync::Arc};

use crate::{
    event::{Event, EventKind, FunctionId, ImportId},
    span::{Function, Import},
};

/// Definitions at which it is first looked whether all are in use.
const FIRST_SWEEP: usize = 4096;

/// Gives out numbers, once each.
#[derive(Debug, Default)]
pub(super) struct Definitions {
    functions: Table<Function>,
    imports: Table<Import>,
}

#[derive(Debug)]
struct Table<T> {
    ids: HashMap<Arc<T>, u32>,
    next: u32,
    /// How many there are when unused ones are next looked for.
    sweep_at: usize,
}

impl<T> Default for Table<T> {
    fn default() -> Self {
        Self {
            ids: HashMap::new(),
            next: 0,
            sweep_at: FIRST_SWEEP,
        }
    }
}

impl<T: Eq + Hash> Table<T> {
    /// The number of a definition, and whether it is new.
    fn id(&mut self, definition: &Arc<T>) -> (u32, bool) {
        if let Some(id) = self.ids.get(definition) {
            return (*id, false);
        }
        let id = self.next;
        // After four thousand million, the first ones are long forgotten.
        self.next = self.next.wrapping_add(1);
        self.ids.insert(Arc::clone(definition), id);
        (id, true)
    }

    /// Takes out what nobody else holds, when twice as much is there as was in use the last time.
    fn unused(&mut self) -> Vec<u32> {
        let mut unused = Vec::new();
        if self.ids.len() < self.sweep_at {
            return unused;
        }
        self.ids.retain(|definition, id| {
            let is_used = Arc::strong_count(definition) > 1;
            if !is_used {
                unused.push(*id);
            }
            is_used
        });
        self.sweep_at = FIRST_SWEEP.max(self.ids.len() * 2);
        unused
    }
}

impl Definitions {
    pub(super) fn function(&mut self, function: &Arc<Function>, events: &mut Vec<Event>) -> FunctionId {
        let (id, is_new) = self.functions.id(function);
        if is_new {
            events.push(definition(EventKind::Function {
                id,
                module: function.module.name.clone(),
                hash: function.module.hash.clone(),
                index: function.index,
                name: function.name.clone(),
            }));
        }
        id
    }

    pub(super) fn import(&mut self, import: &Arc<Import>, events: &mut Vec<Event>) -> ImportId {
        let (id, is_new) = self.imports.id(import);
        if is_new {
            events.push(definition(EventKind::Import {
                id,
                module: import.module.clone(),
                name: import.name.clone(),
            }));
        }
        id
    }

    /// Forgets what no process has any more, now and then. To be called when all events that refer to it are out.
    pub(super) fn forget_unused(&mut self, events: &mut Vec<Event>) {
        let (functions, imports) = (self.functions.unused(), self.imports.unused());
        if !functions.is_empty() || !imports.is_empty() {
            events.push(definition(EventKind::Forgotten { functions, imports }));
        }
    }

    /// How many there are.
    pub(super) fn len(&self) -> usize {
        self.functions.ids.len() + self.imports.ids.len()
    }
}

fn definition(kind: EventKind) -> Event {
    Event {
        at_ns: 0,
        pid: 0,
        tid: 0,
        kind,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn import(name: usize) -> Arc<Import> {
        Arc::new(Import {
            module: "env".to_owned(),
            name: name.to_string(),
        })
    }

    #[test]
    fn what_nobody_holds_is_forgotten_and_gets_another_number_when_it_comes_back() {
        let mut definitions = Definitions::default();
        let mut events = Vec::new();
        let kept = import(0);
        assert_eq!(definitions.import(&kept, &mut events), 0);
        for name in 1..FIRST_SWEEP {
            definitions.import(&import(name), &mut events);
        }
        events.clear();
        definitions.forget_unused(&mut events);
        let EventKind::Forgotten { imports, functions } = &events[0].kind else {
            panic!("{events:?}");
        };
        assert_eq!((imports.len(), functions.len()), (FIRST_SWEEP - 1, 0));
        assert!(!imports.contains(&0));
        assert_eq!(definitions.len(), 1);
        events.clear();
        assert_eq!(definitions.import(&kept, &mut events), 0);
        assert!(events.is_empty());
        assert_eq!(definitions.import(&import(1), &mut events), FIRST_SWEEP as u32);
        assert_eq!(events.len(), 1);
    }

    #[test]
    fn as_many_as_ever_come_and_go_no_more_are_kept_than_at_a_first_sweep() {
        let mut definitions = Definitions::default();
        for name in 0..10 * FIRST_SWEEP {
            let mut events = Vec::new();
            definitions.import(&import(name), &mut events);
            definitions.forget_unused(&mut events);
            assert!(definitions.len() < FIRST_SWEEP);
        }
    }
}
