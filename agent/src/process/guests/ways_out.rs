//! Ways by which guests leave for host functions, and what one who takes such a way tells of where those functions are.

use std::io;

use wasmscope_common::ImportTable;

use super::{Guests, Loaded, MAX_WAYS_OUT};
use crate::{
    image::{
        code_object::{CodeKind, Symbol},
        vmcontext::{ImportLayout, imported_functions},
    },
    process::memory::ProcessMemory,
    runtime::wasmtime::{ARRAY_CALL, CABI_ENTRYPOINT},
};

/// What a component's context begins with.
const COMPONENT_MAGIC: &[u8; 4] = b"comp";
/// Bytes of a context compared to tell whether it still is the one of which a part was sent: most of them addresses in the
/// component's code, and its own.
const COMPARED_BYTES: usize = 2048;

/// What guests of one kind leave for, which is learnt as a whole.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WaysOut {
    /// Hash of the module or component.
    pub key: String,
    /// Addresses that are passed.
    pub addresses: Vec<u64>,
}

/// What a caller's context says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ImportedFunctions {
    /// As in [`WaysOut`].
    pub key: String,
    /// Path of what these functions are in the host.
    pub path: &'static str,
    /// Their addresses.
    pub addresses: Vec<u64>,
}

impl Guests {
    /// What guests leave for of which the keys are wanted: of modules, one address for each type of function; of
    /// components, one for each function that they import.
    pub fn ways_out(&self, is_wanted: impl Fn(&str) -> bool) -> impl Iterator<Item = WaysOut> {
        let native = self.objects.values().filter(|loaded| !loaded.object.is_pulley());
        native
            .filter(move |loaded| is_wanted(&loaded.hash))
            .filter_map(|loaded| {
                let addresses = match loaded.object.kind() {
                    CodeKind::Module => loaded.ways_to_arrays(),
                    CodeKind::Component => {
                        let ways = loaded.object.lowerings()?.ways().iter();
                        ways.map(|way| loaded.text.start.saturating_add(u64::from(*way)))
                            .collect()
                    }
                };
                let key = loaded.hash.clone();
                Some(WaysOut { key, addresses })
            })
    }

    /// Whether there is a component whose code does not tell where its host functions are.
    pub fn hides_ways_out(&self) -> bool {
        self.objects.values().any(|loaded| {
            let imports = loaded.object.component().map(|names| names.lowered_imports().len());
            loaded.object.kind() == CodeKind::Component
                && !loaded.object.is_pulley()
                && loaded.object.lowerings().is_none()
                && imports.map_or(true, |count| count > 0)
        })
    }

    /// What the context of a caller says of the functions that it imports; `None` if it says nothing that is believed.
    pub fn imported_functions(
        &mut self,
        memory: &ProcessMemory,
        table: &ImportTable,
        is_code: impl Fn(u64) -> bool,
    ) -> Option<ImportedFunctions> {
        let length = usize::try_from(table.length).ok()?.min(table.vmcontext.len());
        let context = &table.vmcontext[..length];
        let loaded = self.loaded(table.call_site)?;
        if context.starts_with(COMPONENT_MAGIC) {
            // A destructor of the host's resources, which a trampoline of the component calls, is none of what it imports.
            if table.callee != table.caller {
                return None;
            }
            return loaded.lowered_functions(memory, table.caller, context, is_code);
        }
        let layout = ImportLayout::of_major(loaded.object.engine_major()?)?;
        let module_index = loaded.module_index(table.call_site)?;
        let count = loaded.object.function_import_count(module_index)?;
        let addresses = imported_functions(context, layout, count, table.callee, is_code)?;
        Some(ImportedFunctions {
            key: loaded.hash.clone(),
            path: ARRAY_CALL,
            addresses,
        })
    }
}

impl Loaded {
    fn ways_to_arrays(&self) -> Vec<u64> {
        let ways = self
            .object
            .symbols()
            .filter(|entry| matches!(entry.symbol, Symbol::WasmToArray { .. }))
            .map(|entry| self.text.start.saturating_add(u64::from(entry.start)));
        ways.take(MAX_WAYS_OUT).collect()
    }

    /// The host functions in a component's context, of which `context` is the beginning.
    fn lowered_functions(
        &self,
        memory: &ProcessMemory,
        address: u64,
        context: &[u8],
        is_code: impl Fn(u64) -> bool,
    ) -> Option<ImportedFunctions> {
        let lowerings = self.object.lowerings()?;
        let rest = if lowerings.end() > context.len() {
            read_whole(memory, address, context, lowerings.end())
        } else {
            None
        };
        let whole = rest.as_deref().unwrap_or(context);
        let mut addresses: Vec<_> = lowerings.functions(whole).collect();
        if addresses.is_empty() || !addresses.iter().all(|address| is_code(*address)) {
            return None;
        }
        addresses.sort_unstable();
        addresses.dedup();
        Some(ImportedFunctions {
            key: self.hash.clone(),
            path: CABI_ENTRYPOINT,
            addresses,
        })
    }
}

/// A context of which the kernel has sent the beginning, read while its owner may be gone already: `None` unless that
/// beginning is still there, before and after.
fn read_whole(memory: &ProcessMemory, address: u64, beginning: &[u8], length: usize) -> Option<Vec<u8>> {
    let compared = beginning.len().checked_sub(COMPARED_BYTES)?;
    let read = |from: usize, to: usize| -> io::Result<Vec<u8>> {
        let mut bytes = vec![0; to - from];
        let count = memory.read(address.saturating_add(from as u64), &mut bytes)?;
        bytes.truncate(count);
        Ok(bytes)
    };
    let rest = read(compared, length).ok()?;
    let again = read(compared, beginning.len()).ok()?;
    let expected = &beginning[compared..];
    let is_same = rest.starts_with(expected) && again == expected && rest.len() == length - compared;
    is_same.then(|| [&beginning[..compared], &rest].concat())
}
