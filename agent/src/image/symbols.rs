//! What lies where in the text of a code object, kept small: about 50 bytes a symbol, names included.

use super::bounded_name;

/// Core modules of one component.
pub(super) const MAX_MODULES: u32 = 4096;

/// A piece of machine code of the image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SymbolEntry<'a> {
    /// Offset from the start of the text, bytes.
    pub start: u32,
    /// Length, bytes; never zero.
    pub len: u32,
    /// What it is.
    pub symbol: Symbol<'a>,
}

/// What a piece of machine code is. Names are untrusted and at most [`super::MAX_NAME_BYTES`] long.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Symbol<'a> {
    /// A function of a guest.
    Function {
        /// Core module within the image.
        module_index: u32,
        /// Index in the module, imports included.
        function_index: u32,
        /// From the name section.
        name: Option<&'a str>,
    },
    /// Entered by the host to call a function.
    ArrayToWasm {
        /// Core module within the image.
        module_index: u32,
        /// The function called, imports included.
        function_index: u32,
    },
    /// Entered by guests to call a host function.
    WasmToArray {
        /// Type of the function, an index without meaning outside the image.
        signature: u32,
    },
    /// Initialisation of a module, its start function included (wasmtime 46 and later).
    ModuleStart {
        /// Core module within the image.
        module_index: u32,
        /// Entered by the host, like [`Self::ArrayToWasm`]; otherwise what that calls.
        is_entry: bool,
    },
    /// Entered by guests to call the runtime; with the builtin's name (`memory_grow`), empty if the image has no symbols.
    Builtin(&'a str),
    /// An adapter of a component.
    ComponentTrampoline(&'a str),
    /// Anything else.
    Other(&'a str),
}

#[derive(Clone, Copy, PartialEq)]
pub(super) struct NameRef {
    offset: u32,
    len: u16,
}

impl NameRef {
    pub(super) const EMPTY: Self = Self { offset: 0, len: 0 };
}

#[derive(Clone, Copy, PartialEq)]
pub(super) enum StoredSymbol {
    Function {
        module_index: u32,
        function_index: u32,
        name: NameRef,
    },
    ArrayToWasm {
        module_index: u32,
        function_index: u32,
    },
    WasmToArray {
        signature: u32,
    },
    ModuleStart {
        module_index: u32,
        is_entry: bool,
    },
    Builtin(NameRef),
    ComponentTrampoline(NameRef),
    Other(NameRef),
}

#[derive(PartialEq)]
pub(super) struct StoredEntry {
    pub start: u32,
    pub len: u32,
    pub symbol: StoredSymbol,
}

// The budget of the design is 64 bytes a symbol, the name included.
const _: () = assert!(size_of::<StoredEntry>() <= 32);

#[derive(Default, PartialEq)]
pub(super) struct SymbolStore {
    pub entries: Vec<StoredEntry>,
    names: String,
}

impl SymbolStore {
    pub(super) fn intern(&mut self, name: &[u8]) -> NameRef {
        let name = bounded_name(name);
        let offset = self.names.len() as u32;
        self.names.push_str(&name);
        NameRef {
            offset,
            len: name.len() as u16,
        }
    }

    /// Bytes that it takes.
    pub(super) fn held_bytes(&self) -> usize {
        self.entries.capacity() * size_of::<StoredEntry>() + self.names.capacity()
    }

    fn name(&self, name: NameRef) -> &str {
        let start = name.offset as usize;
        self.names.get(start..start + usize::from(name.len)).unwrap_or_default()
    }

    pub(super) fn resolve(&self, entry: &StoredEntry) -> SymbolEntry<'_> {
        let symbol = match entry.symbol {
            StoredSymbol::Function {
                module_index,
                function_index,
                name,
            } => {
                let name = (name.len > 0).then(|| self.name(name));
                Symbol::Function {
                    module_index,
                    function_index,
                    name,
                }
            }
            StoredSymbol::ArrayToWasm {
                module_index,
                function_index,
            } => Symbol::ArrayToWasm {
                module_index,
                function_index,
            },
            StoredSymbol::WasmToArray { signature } => Symbol::WasmToArray { signature },
            StoredSymbol::ModuleStart { module_index, is_entry } => Symbol::ModuleStart { module_index, is_entry },
            StoredSymbol::Builtin(name) => Symbol::Builtin(self.name(name)),
            StoredSymbol::ComponentTrampoline(name) => Symbol::ComponentTrampoline(self.name(name)),
            StoredSymbol::Other(name) => Symbol::Other(self.name(name)),
        };
        SymbolEntry {
            start: entry.start,
            len: entry.len,
            symbol,
        }
    }

    /// Sorted for lookup; of several symbols at one place the first stays.
    pub(super) fn finish(mut self) -> Self {
        self.entries.sort_by_key(|entry| entry.start);
        self.entries.dedup_by_key(|entry| entry.start);
        self.entries.shrink_to_fit();
        self.names.shrink_to_fit();
        self
    }

    /// Lowest index of a compiled function of each core module, which is that module's count of imported functions.
    pub(super) fn first_functions(&self) -> Vec<Option<u32>> {
        let mut firsts: Vec<Option<u32>> = Vec::new();
        for entry in &self.entries {
            let StoredSymbol::Function {
                module_index,
                function_index,
                ..
            } = entry.symbol
            else {
                continue;
            };
            if module_index >= MAX_MODULES {
                continue;
            }
            let slot = module_index as usize;
            firsts.resize(firsts.len().max(slot + 1), None);
            firsts[slot] = Some(firsts[slot].map_or(function_index, |first| first.min(function_index)));
        }
        firsts
    }
}

pub(super) fn parse_symbol(store: &mut SymbolStore, name: &[u8]) -> StoredSymbol {
    if let Some((module_index, rest)) = strip_indexed(name, b"wasm[") {
        if let Some((function_index, rest)) = strip_indexed(rest, b"::function[") {
            let name = match rest.strip_prefix(b"::") {
                Some(name) if !name.is_empty() => store.intern(name),
                _ => NameRef::EMPTY,
            };
            return StoredSymbol::Function {
                module_index,
                function_index,
                name,
            };
        }
        if let Some((function_index, b"")) = strip_indexed(rest, b"::array_to_wasm_trampoline[") {
            return StoredSymbol::ArrayToWasm {
                module_index,
                function_index,
            };
        }
    }
    if let Some((signature, b"::wasm_to_array_trampoline")) = strip_indexed(name, b"signatures[") {
        return StoredSymbol::WasmToArray { signature };
    }
    if let Some((module_index, abi)) = strip_indexed(name, b"module_start[") {
        return StoredSymbol::ModuleStart {
            module_index,
            is_entry: abi == b"::Array",
        };
    }
    if let Some(builtin) = name.strip_prefix(b"wasmtime_builtin_") {
        return StoredSymbol::Builtin(store.intern(builtin));
    }
    let is_component = name.starts_with(b"component-") || name == b"resource_drop_trampoline";
    let name = store.intern(name);
    if is_component {
        StoredSymbol::ComponentTrampoline(name)
    } else {
        StoredSymbol::Other(name)
    }
}

/// `prefix`, a decimal number, `]`: the number and what follows.
fn strip_indexed<'a>(name: &'a [u8], prefix: &[u8]) -> Option<(u32, &'a [u8])> {
    let rest = name.strip_prefix(prefix)?;
    let end = rest.iter().position(|byte| !byte.is_ascii_digit())?;
    let number = str::from_utf8(&rest[..end]).ok()?.parse().ok()?;
    Some((number, rest[end..].strip_prefix(b"]")?))
}
