//! Numbers for functions and imports, and the events that define them.

use std::{collections::HashMap, sync::Arc};

use crate::{
    event::{Event, EventKind, FunctionId, ImportId},
    span::{Function, Import},
};

/// Gives out numbers, once each.
#[derive(Debug, Default)]
pub(super) struct Definitions {
    functions: HashMap<Arc<Function>, FunctionId>,
    imports: HashMap<Arc<Import>, ImportId>,
}

impl Definitions {
    pub(super) fn function(&mut self, function: Arc<Function>, events: &mut Vec<Event>) -> FunctionId {
        if let Some(id) = self.functions.get(&function) {
            return *id;
        }
        let id = self.functions.len() as FunctionId;
        events.push(definition(EventKind::Function {
            id,
            module: function.module.name.clone(),
            hash: function.module.hash.clone(),
            index: function.index,
            name: function.name.clone(),
        }));
        self.functions.insert(function, id);
        id
    }

    pub(super) fn import(&mut self, import: Arc<Import>, events: &mut Vec<Event>) -> ImportId {
        if let Some(id) = self.imports.get(&import) {
            return *id;
        }
        let id = self.imports.len() as ImportId;
        events.push(definition(EventKind::Import {
            id,
            module: import.module.clone(),
            name: import.name.clone(),
        }));
        self.imports.insert(import, id);
        id
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
