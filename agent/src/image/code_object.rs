//! A code object of wasmtime: the ELF image that it keeps in memory, or in a `.cwasm` file, for every compiled module or component.
//!
//! The image is never relocated or patched when it is loaded, so what is read here from memory and from a file is the same. The one
//! exception is a uprobe, which writes breakpoints into the text of a *file-backed* mapping: hash those from the file.

use std::{collections::BTreeSet, fmt};

use object::{elf, pod::slice_from_bytes};
use sha2::{Digest, Sha256};

pub use super::component::{ComponentImport, ComponentNames};
pub use super::elf::ElfError as ImageError;
pub use super::info::{ItemKind, ModuleExport, ModuleImport, ModuleNames};
pub use super::limits::{MemoryLimits, ModuleLimits, TableLimits};
pub use super::lowerings::Lowerings;
pub use super::symbols::{Symbol, SymbolEntry};
use super::{
    MAX_NAME_BYTES, ReadAt,
    address_map::AddressMap,
    bounded_name, component,
    elf::{E, Elf, Sym, read_header, read_section},
    hex,
    info::{self, FunctionKey, Layout},
    read_exact_at,
    store_layout::{Evidence, LayoutError, MAX_TRAMPOLINE_BYTES, MAX_TRAMPOLINES, StoreLayout},
    string_at,
    symbols::{MAX_MODULES, NameRef, StoredEntry, StoredSymbol, SymbolStore, parse_symbol},
    trap_table::TrapTable,
};

/// Largest image considered. Text is located by 32-bit offsets in wasmtime's own tables; real images stay below 200 MB.
pub const MAX_IMAGE_BYTES: u64 = 1 << 30;
/// Symbols kept of one image; a guest of 100,000 functions has about twice as many.
pub const MAX_SYMBOLS: usize = 500_000;
/// Bytes of text and of metadata that [`CodeObject::content_hash`] covers; beyond it, only sizes count.
pub const MAX_HASHED_BYTES: u64 = 256 << 20;
/// Symbol names: at most 96 characters for a function, written once.
const MAX_SYMBOL_NAMES_BYTES: u64 = 64 << 20;
const MAX_INFO_BYTES: u64 = 64 << 20;
const MAX_TRAPS_BYTES: u64 = 32 << 20;
/// Two to eight bytes for every instruction that comes from the guest's own.
const MAX_ADDRESS_MAP_BYTES: u64 = 64 << 20;
const MAX_FUNCTION_NAMES_BYTES: u64 = 64 << 20;

/// `e_ident[EI_OSABI]` of wasmtime's artifacts.
const OS_ABI_WASMTIME: u8 = 200;
const FLAG_MODULE: u32 = 1;
const FLAG_COMPONENT: u32 = 2;
const FLAGS_PULLEY: u32 = 4 | 8;

/// What was compiled.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum CodeKind {
    /// A core module.
    Module,
    /// A component: any number of core modules and adapters.
    Component,
}

/// Why a piece of information is missing although the image is wasmtime's.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Unavailable {
    /// The image does not contain it.
    #[error("not in the image")]
    Absent,
    /// Written by a version of wasmtime whose format is not known here.
    #[error("the format of wasmtime {0:?} is not known")]
    UnknownVersion(String),
    /// It does not decode, or contradicts the rest of the image.
    #[error("does not decode")]
    Malformed,
    /// A bound of this program was exceeded.
    #[error("too large")]
    TooLarge,
}

/// Where the symbols come from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SymbolSource {
    /// The symbol table.
    SymbolTable,
    /// The symbol table, of which only the first [`MAX_SYMBOLS`] were kept.
    SymbolTableCut,
    /// The runtime's own table of functions: the image was compiled without symbols.
    FunctionTable,
    /// There are none.
    None(Unavailable),
}

/// A decoded code object. Holds no text.
#[derive(PartialEq)]
pub struct CodeObject {
    engine_version: String,
    kind: CodeKind,
    is_pulley: bool,
    text_offset: u64,
    text_bytes: u64,
    symbols: SymbolStore,
    symbol_source: SymbolSource,
    modules: Vec<Result<ModuleNames, Unavailable>>,
    component: Result<ComponentNames, Unavailable>,
    traps: Result<TrapTable, Unavailable>,
    address_map: Result<AddressMap, Unavailable>,
    store_layout: Result<StoreLayout, LayoutError>,
    lowerings: Option<Lowerings>,
    /// Offset and size of each, bytes.
    hashed_sections: Vec<(u64, u64)>,
}

impl fmt::Debug for CodeObject {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CodeObject")
            .field("engine_version", &self.engine_version)
            .field("kind", &self.kind)
            .field("text_offset", &self.text_offset)
            .field("text_bytes", &self.text_bytes)
            .field("symbols", &self.symbols.entries.len())
            .field("symbol_source", &self.symbol_source)
            .finish_non_exhaustive()
    }
}

/// Whether an ELF image of wasmtime starts at the reader's first byte: one read of 64 bytes.
pub fn is_code_object<R: ReadAt + ?Sized>(reader: &R) -> bool {
    read_header(reader).is_ok_and(|header| header.e_ident.os_abi.0 == OS_ABI_WASMTIME)
}

impl CodeObject {
    /// Reads everything but the text. Offset zero of `reader` is the first byte of the image.
    ///
    /// An error means that this is no code object, or that it cannot be located in memory. Whatever else cannot be had is a typed
    /// reason at the place where it would be.
    pub fn read<R: ReadAt + ?Sized>(reader: &R) -> Result<Self, ImageError> {
        let elf = Elf::read(reader)?;
        if elf.header.e_ident.os_abi.0 != OS_ABI_WASMTIME || elf.header.e_type.get(E) != elf::ET_REL {
            return Err(ImageError::Malformed("not written by wasmtime"));
        }
        let flags = elf.header.e_flags.get(E).0;
        let kind = match flags & (FLAG_MODULE | FLAG_COMPONENT) {
            FLAG_MODULE => CodeKind::Module,
            FLAG_COMPONENT => CodeKind::Component,
            _ => return Err(ImageError::Malformed("neither module nor component")),
        };
        let text = elf.section(b".text").ok_or(ImageError::Malformed("no text"))?;
        let (text_offset, text_bytes) = (text.sh_offset.get(E), text.sh_size.get(E));
        let image_bytes = text_offset.saturating_add(text_bytes);
        super::elf::check_bound("image", image_bytes, MAX_IMAGE_BYTES)?;
        let engine_version = read_engine_version(reader, &elf)?;
        let major = engine_version
            .split('.')
            .next()
            .and_then(|major| major.parse::<u32>().ok());
        let layout = major.and_then(Layout::of_major);
        let known_major = major.filter(|_| layout.is_some());

        let (mut symbols, mut symbol_source) = match read_symbols(reader, &elf, text_bytes) {
            Ok((symbols, cut)) if !symbols.entries.is_empty() => (
                symbols,
                if cut {
                    SymbolSource::SymbolTableCut
                } else {
                    SymbolSource::SymbolTable
                },
            ),
            Ok(_) => (SymbolStore::default(), SymbolSource::None(Unavailable::Absent)),
            Err(reason) => (SymbolStore::default(), SymbolSource::None(reason)),
        };
        let info = optional_section(reader, &elf, b".wasmtime.info", MAX_INFO_BYTES);
        let unknown_version = || Unavailable::UnknownVersion(engine_version.clone());
        let component = match (&info, kind) {
            (_, CodeKind::Module) => Err(Unavailable::Absent),
            (Err(reason), _) => Err(reason.clone()),
            (Ok(info), _) => major
                .and_then(component::Layout::of_major)
                .ok_or_else(unknown_version)
                .and_then(|layout| component::component_names(info, layout).ok_or(Unavailable::Malformed)),
        };
        let lowered_count = component.as_ref().map_or(0, |names| names.lowered_imports().len());
        let has_table = known_major.is_some_and(|major| major >= 47);
        if let (SymbolSource::None(Unavailable::Absent), Ok(info)) = (&symbol_source, &info) {
            let function_names = optional_section(reader, &elf, b".name.wasm", MAX_FUNCTION_NAMES_BYTES).ok();
            let table = layout.filter(|_| has_table).ok_or_else(unknown_version);
            match table.and_then(|layout| {
                symbols_of_table(info, function_names.as_deref(), layout, kind, text_bytes, lowered_count)
            }) {
                Ok(found) => (symbols, symbol_source) = (found, SymbolSource::FunctionTable),
                Err(reason) => symbol_source = SymbolSource::None(reason),
            }
        }
        let modules = match (&info, layout) {
            (Ok(info), Some(layout)) => read_names(info, layout, kind, &symbols),
            (Ok(_), None) => vec![Err(unknown_version())],
            (Err(reason), _) => vec![Err(reason.clone())],
        };
        let component = component.and_then(|names| checked_component(names, &symbols));
        let traps = known_major.ok_or_else(unknown_version).and_then(|major| {
            optional_section(reader, &elf, b".wasmtime.traps", MAX_TRAPS_BYTES)
                .map(|bytes| TrapTable::new(bytes, major))
        });
        let address_map = known_major.ok_or_else(unknown_version).and_then(|major| {
            optional_section(reader, &elf, b".wasmtime.addrmap", MAX_ADDRESS_MAP_BYTES)
                .map(|bytes| AddressMap::new(bytes, major))
        });
        let hashed = [b".text".as_slice(), b".wasmtime.info", b".rodata.wasm", b".name.wasm"];
        let hashed_sections = hashed
            .iter()
            .filter_map(|name| elf.section(name))
            .map(|section| (section.sh_offset.get(E), section.sh_size.get(E)))
            .collect();
        let is_pulley = flags & FLAGS_PULLEY != 0;
        let store_layout = layout_evidence(reader, &symbols, text_offset).decide(&engine_version);
        let lowerings = component
            .as_ref()
            .ok()
            .filter(|_| !is_pulley)
            .and_then(|names| Lowerings::read(reader, &symbols, text_offset, names.lowered_imports().len()));
        Ok(Self {
            engine_version,
            kind,
            is_pulley,
            text_offset,
            text_bytes,
            symbols,
            symbol_source,
            modules,
            component,
            traps,
            address_map,
            store_layout,
            lowerings,
            hashed_sections,
        })
    }

    /// Version as the runtime wrote it, `48` or `36.0.0`; untrusted, and whatever the embedder chose if it set one of its own.
    pub fn engine_version(&self) -> &str {
        &self.engine_version
    }

    /// The number before the first dot of [`Self::engine_version`].
    pub fn engine_major(&self) -> Option<u32> {
        self.engine_version.split('.').next()?.parse().ok()
    }

    /// What was compiled.
    pub fn kind(&self) -> CodeKind {
        self.kind
    }

    /// Compiled for wasmtime's interpreter: the text is never executed by the machine.
    pub fn is_pulley(&self) -> bool {
        self.is_pulley
    }

    /// Where an instance of the component keeps the host functions that it calls; `None` for modules, and if the code does not
    /// tell.
    pub fn lowerings(&self) -> Option<&Lowerings> {
        self.lowerings.as_ref()
    }

    /// Where the runtime that made this keeps the places at which it enters and leaves wasm.
    pub fn store_layout(&self) -> Result<StoreLayout, &LayoutError> {
        self.store_layout.as_ref().copied()
    }

    /// Where the text begins, bytes from the start of the image; the same in memory and in a file.
    pub fn text_offset(&self) -> u64 {
        self.text_offset
    }

    /// Size of the text, bytes.
    pub fn text_bytes(&self) -> u64 {
        self.text_bytes
    }

    /// Where the symbols come from, or why there are none.
    pub fn symbol_source(&self) -> &SymbolSource {
        &self.symbol_source
    }

    /// What lies at an offset from the start of the text.
    pub fn lookup(&self, text_offset: u64) -> Option<SymbolEntry<'_>> {
        let text_offset = u32::try_from(text_offset).ok()?;
        let position = self
            .symbols
            .entries
            .partition_point(|entry| entry.start <= text_offset)
            .checked_sub(1)?;
        let entry = &self.symbols.entries[position];
        (text_offset - entry.start < entry.len).then(|| self.symbols.resolve(entry))
    }

    /// Everything in the text, by offset.
    pub fn symbols(&self) -> impl ExactSizeIterator<Item = SymbolEntry<'_>> {
        self.symbols.entries.iter().map(|entry| self.symbols.resolve(entry))
    }

    /// Names of a core module, or why there are none.
    pub fn module(&self, module_index: u32) -> Result<&ModuleNames, Unavailable> {
        match self.modules.get(module_index as usize) {
            Some(module) => module.as_ref().map_err(Clone::clone),
            None => match self.modules.first() {
                // One reason for the whole image stands in the first place.
                Some(Err(reason @ Unavailable::UnknownVersion(_))) => Err(reason.clone()),
                _ => Err(Unavailable::Absent),
            },
        }
    }

    /// Bytes that it takes, estimated: a name's own allocations are counted, what they round up to is not.
    pub fn held_bytes(&self) -> usize {
        let modules = self.modules.iter().flatten().map(ModuleNames::held_bytes);
        size_of::<Self>()
            + self.address_map.as_ref().map_or(0, AddressMap::len)
            + self.traps.as_ref().map_or(0, TrapTable::len)
            + self.symbols.held_bytes()
            + modules.sum::<usize>()
            + self.component.as_ref().map_or(0, ComponentNames::held_bytes)
            + self.lowerings.as_ref().map_or(0, Lowerings::held_bytes)
    }

    /// Forgets the tables of addresses and traps: names are left.
    pub fn drop_tables(&mut self) {
        self.address_map = Err(Unavailable::TooLarge);
        self.traps = Err(Unavailable::TooLarge);
    }

    /// Core modules in the image.
    pub fn module_count(&self) -> usize {
        self.modules.len()
    }

    /// Name of the first core module that has one: the module's own for a module.
    pub fn name(&self) -> Option<&str> {
        self.modules.iter().flatten().find_map(|module| module.name.as_deref())
    }

    /// The first name under which a function is exported by its core module.
    pub fn export_name(&self, module_index: u32, function_index: u32) -> Option<&str> {
        self.module(module_index).ok()?.function_export(function_index)
    }

    /// Module and name of the imported function `ordinal` of a core module.
    pub fn import(&self, module_index: u32, ordinal: u32) -> Option<(&str, &str)> {
        let import = self.module(module_index).ok()?.function_import(ordinal)?;
        Some((&import.module, &import.name))
    }

    /// Count of imported functions of a core module, if its names are known.
    pub fn function_import_count(&self, module_index: u32) -> Option<u32> {
        Some(self.module(module_index).ok()?.function_import_count())
    }

    /// Names of the component, or why there are none.
    pub fn component(&self) -> Result<&ComponentNames, Unavailable> {
        self.component.as_ref().map_err(Clone::clone)
    }

    /// The host function that the trampoline at an offset of the text was made for.
    pub fn lowered_import(&self, text_offset: u64) -> Option<&ComponentImport> {
        let Symbol::ComponentTrampoline(symbol) = self.lookup(text_offset)?.symbol else {
            return None;
        };
        let index = component::lowered_index(symbol)?;
        self.component.as_ref().ok()?.lowered_imports().get(index)
    }

    /// What a core module of the component calls the trampoline at an offset of the text. Unlike lowered imports, what the runtime
    /// itself offers to components (dropping resources) has no other name.
    pub fn trampoline_import(&self, text_offset: u64) -> Option<&ModuleImport> {
        let Symbol::ComponentTrampoline(symbol) = self.lookup(text_offset)?.symbol else {
            return None;
        };
        let trampoline = component::trampoline_index(symbol)?;
        let (module, position) = self.component.as_ref().ok()?.given(trampoline)?;
        self.module(module).ok()?.imports.get(position as usize)
    }

    /// The trap raised by the instruction at exactly this offset of the text, in wasmtime's words (`unreachable_code_reached`).
    pub fn trap_code(&self, text_offset: u64) -> Option<&'static str> {
        self.traps.as_ref().ok()?.lookup(text_offset)
    }

    /// The trap that has this number in this version of wasmtime.
    pub fn trap_name(&self, code: u8) -> Option<&'static str> {
        self.traps.as_ref().ok()?.name(code)
    }

    /// Which byte of the wasm binary the instruction that contains this offset of the text was compiled from. For a
    /// component, counted from the start of the component.
    pub fn wasm_offset(&self, text_offset: u64) -> Option<u32> {
        self.address_map.as_ref().ok()?.lookup(text_offset)
    }

    /// Why [`Self::trap_code`] has no answers at all, if so.
    pub fn traps_unavailable(&self) -> Option<&Unavailable> {
        self.traps.as_ref().err()
    }

    /// First 12 hexadecimal digits of a SHA-256 over text, metadata, data and names: the same guest compiled by the same version
    /// with the same settings has the same on every node, compiled there or loaded from a file or from bytes. Nothing of it depends
    /// on where it lies: code objects are position-independent and are not relocated. Another version of the runtime, other settings
    /// of the compiler or another set of CPU features make another hash, as they make other code. `reader` is that which
    /// [`Self::read`] was given.
    pub fn content_hash<R: ReadAt + ?Sized>(&self, reader: &R) -> Result<String, ImageError> {
        const CHUNK_BYTES: u64 = 1 << 20;
        let mut hash = Sha256::new();
        let mut budget = MAX_HASHED_BYTES;
        for (offset, size) in self.hashed_sections.iter().copied() {
            hash.update(size.to_le_bytes());
            let end = size.min(budget);
            budget -= end;
            let mut position = 0;
            while position < end {
                let len = CHUNK_BYTES.min(end - position);
                let start = offset
                    .checked_add(position)
                    .ok_or(ImageError::Malformed("section offset"))?;
                hash.update(read_exact_at(reader, start, len as usize)?);
                position += len;
            }
        }
        Ok(hex(&hash.finalize()[..6]))
    }
}

/// What the trampolines say of the runtime's records.
fn layout_evidence<R: ReadAt + ?Sized>(reader: &R, symbols: &SymbolStore, text_offset: u64) -> Evidence {
    let mut evidence = Evidence::default();
    let code = |entry: &SymbolEntry<'_>| {
        let offset = text_offset.saturating_add(u64::from(entry.start));
        read_exact_at(reader, offset, entry.len.min(MAX_TRAMPOLINE_BYTES) as usize).unwrap_or_default()
    };
    let of_kind = |is_wanted: fn(&Symbol<'_>) -> bool| {
        let entries = symbols.entries.iter().map(|entry| symbols.resolve(entry));
        entries
            .filter(move |entry| is_wanted(&entry.symbol))
            .take(MAX_TRAMPOLINES)
    };
    for entry in of_kind(|symbol| matches!(symbol, Symbol::ArrayToWasm { .. })) {
        evidence.add_entry(&code(&entry));
    }
    for entry in of_kind(|symbol| matches!(symbol, Symbol::WasmToArray { .. })) {
        evidence.add_exit(&code(&entry));
    }
    evidence
}

fn read_engine_version<R: ReadAt + ?Sized>(reader: &R, elf: &Elf) -> Result<String, ImageError> {
    let section = elf
        .section(b".wasmtime.engine")
        .ok_or(ImageError::Malformed("no engine"))?;
    let head = section.sh_size.get(E).min(2 + MAX_NAME_BYTES as u64) as usize;
    let bytes = read_exact_at(reader, section.sh_offset.get(E), head)?;
    // A format byte that has always been zero, the length, the version.
    let [0, len, rest @ ..] = bytes.as_slice() else {
        return Err(ImageError::Malformed("engine"));
    };
    let version = rest
        .get(..usize::from(*len))
        .ok_or(ImageError::Malformed("engine version"))?;
    Ok(bounded_name(version).into_owned())
}

fn optional_section<R: ReadAt + ?Sized>(
    reader: &R,
    elf: &Elf,
    name: &[u8],
    limit: u64,
) -> Result<Vec<u8>, Unavailable> {
    let section = elf.section(name).ok_or(Unavailable::Absent)?;
    read_section(reader, section, "section", limit).map_err(|error| reason(&error))
}

fn reason(error: &ImageError) -> Unavailable {
    match error {
        ImageError::TooLarge { .. } => Unavailable::TooLarge,
        ImageError::Io(_) | ImageError::NotElf | ImageError::Malformed(_) => Unavailable::Malformed,
    }
}

/// The symbols of the text, and whether there were more than are kept.
fn read_symbols<R: ReadAt + ?Sized>(
    reader: &R,
    elf: &Elf,
    text_bytes: u64,
) -> Result<(SymbolStore, bool), Unavailable> {
    let section = elf.section_of_type(elf::SHT_SYMTAB).ok_or(Unavailable::Absent)?;
    let strings = elf.linked(section).ok_or(Unavailable::Malformed)?;
    let strings = read_section(reader, strings, "symbol names", MAX_SYMBOL_NAMES_BYTES).map_err(|e| reason(&e))?;
    let stated = section.sh_size.get(E) / size_of::<Sym>() as u64;
    let count = stated.min(MAX_SYMBOLS as u64) as usize;
    let bytes = read_exact_at(reader, section.sh_offset.get(E), count * size_of::<Sym>())
        .map_err(|_| Unavailable::Malformed)?;
    let (table, _) = slice_from_bytes::<Sym>(&bytes, count).map_err(|()| Unavailable::Malformed)?;
    let mut store = SymbolStore::default();
    for symbol in table {
        let (start, len) = (symbol.st_value.get(E), symbol.st_size.get(E));
        let is_inside = len > 0 && start.checked_add(len).is_some_and(|end| end <= text_bytes);
        if symbol.st_type() != elf::STT_FUNC || !is_inside {
            continue;
        }
        let Some(name) = string_at(&strings, symbol.st_name.get(E)) else {
            continue;
        };
        let symbol = parse_symbol(&mut store, name);
        store.entries.push(StoredEntry {
            start: start as u32,
            len: len as u32,
            symbol,
        });
    }
    Ok((store.finish(), stated > MAX_SYMBOLS as u64))
}

/// Names of each core module, checked against the symbols: the functions that are imported are those that were not compiled.
fn read_names(
    info: &[u8],
    layout: Layout,
    kind: CodeKind,
    symbols: &SymbolStore,
) -> Vec<Result<ModuleNames, Unavailable>> {
    let firsts = symbols.first_functions();
    let agrees = |module: u32, imports: u32| match firsts.get(module as usize) {
        Some(Some(first)) => *first == imports,
        _ => true,
    };
    match kind {
        CodeKind::Module => {
            let names = info::module_names(info, layout).filter(|(names, _)| agrees(0, names.function_import_count()));
            vec![names.map(|(names, _)| names).ok_or(Unavailable::Malformed)]
        }
        CodeKind::Component => info::component_modules(info, layout, firsts.len() as u32, agrees)
            .into_iter()
            .map(|names| names.map(|(names, _)| names).ok_or(Unavailable::Malformed))
            .collect(),
    }
}

/// Names of a component, checked against the symbols: there are no more trampolines of lowered imports than such imports.
fn checked_component(names: ComponentNames, symbols: &SymbolStore) -> Result<ComponentNames, Unavailable> {
    let beyond = names.lowered_imports().len();
    let agrees = symbols.entries.iter().all(|entry| match symbols.resolve(entry).symbol {
        Symbol::ComponentTrampoline(symbol) => component::lowered_index(symbol).is_none_or(|index| index < beyond),
        _ => true,
    });
    agrees.then_some(names).ok_or(Unavailable::Malformed)
}

/// Symbols for an image that was compiled without them.
fn symbols_of_table(
    info: &[u8],
    function_names: Option<&[u8]>,
    layout: Layout,
    kind: CodeKind,
    text_bytes: u64,
    lowered_count: usize,
) -> Result<SymbolStore, Unavailable> {
    let (functions, table) = info::function_table(info, text_bytes).ok_or(Unavailable::Malformed)?;
    if functions.len() > MAX_SYMBOLS {
        return Err(Unavailable::TooLarge);
    }
    let module_count = functions
        .iter()
        .filter_map(|function| match function.key {
            FunctionKey::Function { module, .. } if module < MAX_MODULES => Some(module + 1),
            _ => None,
        })
        .max()
        .unwrap_or(0);
    let modules = match kind {
        CodeKind::Module => vec![info::module_names(info, layout)],
        CodeKind::Component => info::component_modules(info, layout, module_count, |_, _| true),
    };
    let mut windows = Vec::new();
    for (position, module) in modules.iter().enumerate() {
        let Some((_, range)) = module else { break };
        let end = match (kind, modules.get(position + 1)) {
            (CodeKind::Module, _) => table.start,
            (CodeKind::Component, Some(Some((_, next)))) => next.start,
            (CodeKind::Component, _) => info.len(),
        };
        windows.push(range.end..end.max(range.end));
    }
    let text_of_names = function_names.unwrap_or_default();
    let lists = if windows.len() == modules.len() {
        info::function_names(info, &windows, text_of_names.len()).unwrap_or_default()
    } else {
        Vec::new()
    };

    // The table does not say which of the trampolines are those of lowered imports, but both are in one order.
    let trampolines: BTreeSet<_> = functions
        .iter()
        .filter_map(|function| match function.key {
            FunctionKey::ComponentTrampoline { index } => Some(index),
            _ => None,
        })
        .collect();
    let all_lowered = trampolines.len() == lowered_count;

    let mut store = SymbolStore::default();
    // A defined function's index counts from the imported ones, so without those it has no index.
    let function_index = |module: u32, defined: u32| -> Option<u32> {
        let (names, _) = modules.get(module as usize)?.as_ref()?;
        names.function_import_count().checked_add(defined)
    };
    let index_or_malformed = |module: u32, defined: u32| function_index(module, defined).ok_or(Unavailable::Malformed);
    for function in functions {
        let symbol = match function.key {
            FunctionKey::Function { module, defined_index } => {
                let function_index = index_or_malformed(module, defined_index)?;
                let names = lists.get(module as usize).map(Vec::as_slice).unwrap_or_default();
                let name = match names.binary_search_by_key(&function_index, |(index, _)| *index) {
                    Ok(found) => store.intern(text_of_names.get(names[found].1.clone()).unwrap_or_default()),
                    Err(_) => NameRef::EMPTY,
                };
                StoredSymbol::Function {
                    module_index: module,
                    function_index,
                    name,
                }
            }
            FunctionKey::ArrayToWasm { module, defined_index } => {
                let function_index = index_or_malformed(module, defined_index)?;
                StoredSymbol::ArrayToWasm {
                    module_index: module,
                    function_index,
                }
            }
            FunctionKey::WasmToArray { signature } => StoredSymbol::WasmToArray { signature },
            FunctionKey::ModuleStart { module, is_entry } => StoredSymbol::ModuleStart {
                module_index: module,
                is_entry,
            },
            FunctionKey::Builtin => StoredSymbol::Builtin(NameRef::EMPTY),
            FunctionKey::ComponentTrampoline { index } if all_lowered => {
                let name = component::lowered_symbol(index);
                StoredSymbol::ComponentTrampoline(store.intern(name.as_bytes()))
            }
            FunctionKey::ComponentTrampoline { .. } | FunctionKey::ResourceDrop => {
                StoredSymbol::ComponentTrampoline(NameRef::EMPTY)
            }
            FunctionKey::Other => StoredSymbol::Other(NameRef::EMPTY),
        };
        store.entries.push(StoredEntry {
            start: function.start,
            len: function.len,
            symbol,
        });
    }
    Ok(store.finish())
}

/// Code objects for tests of those who keep them.
#[cfg(test)]
pub(crate) mod testing {
    use super::*;

    /// One with a symbol and so many bytes of address map.
    pub(crate) fn object_with(number: u32, map_bytes: usize) -> CodeObject {
        let mut symbols = SymbolStore::default();
        let name = symbols.intern(format!("function {number}").as_bytes());
        symbols.entries.push(StoredEntry {
            start: 0,
            len: 16,
            symbol: StoredSymbol::Other(name),
        });
        CodeObject {
            engine_version: "48".to_owned(),
            kind: CodeKind::Module,
            is_pulley: false,
            text_offset: 4096,
            text_bytes: 4096,
            symbols: symbols.finish(),
            symbol_source: SymbolSource::SymbolTable,
            modules: Vec::new(),
            component: Err(Unavailable::Absent),
            traps: Err(Unavailable::Absent),
            address_map: Ok(AddressMap::new(vec![0; map_bytes], 48)),
            store_layout: Err(LayoutError::UnknownVersion(String::new())),
            lowerings: None,
            hashed_sections: Vec::new(),
        }
    }
}
