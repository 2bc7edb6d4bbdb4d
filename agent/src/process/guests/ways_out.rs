//! Ways by which guests leave for host functions, and what one who takes such a way tells of where those functions are.

use std::io;

use wasmscope_common::ImportTable;

use super::{Guests, Loaded, MAX_WAYS_OUT};
use crate::{
    image::{
        code_object::{CodeKind, Lowerings, Symbol},
        vmcontext::{ImportLayout, imported_functions},
    },
    process::memory::ProcessMemory,
    runtime::wasmtime::{ARRAY_CALL, CABI_ENTRYPOINT},
};

/// What a component's context begins with.
const COMPONENT_MAGIC: &[u8; 4] = b"comp";
/// What the context of a host function for core modules begins with.
const FUNCTION_MAGIC: u64 = u32::from_le_bytes(*b"ACHF") as u64;
/// Words of such a context that are looked at: the magic, then `VMFuncRef`: `array_call, wasm_call, type_index, vmctx`.
const FUNCTION_WORDS: usize = 5;
/// Words behind the lowered imports of a component that are looked at for destructors.
const MAX_POINTERS: usize = 256;
/// Bytes of a context compared to tell whether it still is the one of which a part was sent: most of them addresses in the
/// component's code, and its own.
const COMPARED_BYTES: usize = 2048;

/// What guests of one kind leave for, which is learnt as a whole.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WaysOut {
    /// Says what is learnt: of modules and of the imports of components the hash.
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
    /// There are no others that such a caller could call.
    pub is_whole: bool,
}

/// Destructors are learnt apart from what the component imports: those are seldom called.
fn destructors_key(hash: &str) -> String {
    format!("{hash} destructors")
}

impl Guests {
    /// What guests leave for of which the keys are wanted: of modules, one address for each type of function; of
    /// components, one for each function that they import, and one for each type for destructors of the host's resources.
    pub fn ways_out(&self, is_wanted: impl Fn(&str) -> bool) -> impl Iterator<Item = WaysOut> {
        let native = self.objects.values().filter(|loaded| !loaded.object.is_pulley());
        let all = native.flat_map(|loaded| {
            let (imports, destructors) = match loaded.object.kind() {
                CodeKind::Module => (Some(loaded.ways_to_arrays()), None),
                CodeKind::Component => {
                    let ways = loaded.object.lowerings().map(|lowerings| {
                        let ways = lowerings.ways().iter();
                        ways.map(|way| loaded.text.start.saturating_add(u64::from(*way)))
                            .collect()
                    });
                    (ways, loaded.drops_resources().then(|| loaded.ways_to_arrays()))
                }
            };
            let imports = imports.map(|addresses| (loaded.hash.clone(), addresses));
            let destructors = destructors.map(|addresses| (destructors_key(&loaded.hash), addresses));
            [imports, destructors].into_iter().flatten()
        });
        all.filter(move |(key, _)| is_wanted(key))
            .map(|(key, addresses)| WaysOut { key, addresses })
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
            if table.callee == table.caller {
                return loaded.lowered_functions(memory, table.caller, context, is_code);
            }
            return loaded.destructors(memory, table.callee, context, is_code);
        }
        let layout = ImportLayout::of_major(loaded.object.engine_major()?)?;
        let module_index = loaded.module_index(table.call_site)?;
        let count = loaded.object.function_import_count(module_index)?;
        let addresses = imported_functions(context, layout, count, table.callee, is_code)?;
        Some(ImportedFunctions {
            key: loaded.hash.clone(),
            path: ARRAY_CALL,
            addresses,
            is_whole: true,
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

    /// Whether guests of the component drop resources, some of which may be the host's.
    fn drops_resources(&self) -> bool {
        self.object.symbols().any(
            |entry| matches!(entry.symbol, Symbol::ComponentTrampoline(symbol) if symbol.contains("resource-drop")),
        )
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
            is_whole: true,
        })
    }

    /// The destructors of the host's resources that a component calls, of which one is `callee`. That belongs to the linker,
    /// so it is still there; the others are found if the store is.
    fn destructors(
        &self,
        memory: &ProcessMemory,
        callee: u64,
        context: &[u8],
        is_code: impl Fn(u64) -> bool,
    ) -> Option<ImportedFunctions> {
        let words: [u64; FUNCTION_WORDS] = read_words(memory, callee)?;
        let called = function_of(words, callee).filter(|function| is_code(*function))?;
        let mut addresses = vec![called];
        let mut is_whole = false;
        // They are behind the lowered imports, among pointers to other things, and where they end is not known. What is taken
        // is a function that this component can call and that knows itself, wherever it stood.
        let lowerings_end = self.object.lowerings().map_or(0, Lowerings::end);
        let pointers = context.get(lowerings_end..).unwrap_or_default().as_chunks().0;
        for pointer in pointers.iter().take(MAX_POINTERS) {
            let pointer = u64::from_le_bytes(*pointer);
            if pointer == 0 || pointer % 8 != 0 {
                continue;
            }
            let Some([array_call, wasm_call, _, context]) = read_words(memory, pointer) else {
                continue;
            };
            if !self.is_way_to_array(wasm_call) {
                continue;
            }
            is_whole |= context == callee;
            let words = read_words(memory, context);
            let known = words.and_then(|words| function_of(words, context));
            if known == Some(array_call) && is_code(array_call) {
                addresses.push(array_call);
            }
        }
        addresses.sort_unstable();
        addresses.dedup();
        Some(ImportedFunctions {
            key: destructors_key(&self.hash),
            path: ARRAY_CALL,
            addresses,
            is_whole,
        })
    }

    fn is_way_to_array(&self, address: u64) -> bool {
        self.text.contains(&address) && matches!(self.symbol(address), Some(Symbol::WasmToArray { .. }))
    }
}

/// The host function for core modules whose context has these words.
fn function_of(words: [u64; FUNCTION_WORDS], address: u64) -> Option<u64> {
    let [magic, array_call, _, _, context] = words;
    // The magic has four bytes; what follows them is padding.
    (magic & 0xffff_ffff == FUNCTION_MAGIC && context == address).then_some(array_call)
}

fn read_words<const N: usize>(memory: &ProcessMemory, address: u64) -> Option<[u64; N]> {
    let mut bytes = [[0; 8]; N];
    let count = memory.read(address, bytes.as_flattened_mut()).ok()?;
    (count == N * 8).then(|| bytes.map(u64::from_le_bytes))
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
