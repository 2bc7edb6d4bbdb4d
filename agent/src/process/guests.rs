//! The code objects of one process: from an address to the guest function it lies in, from a callee to the import.

use std::{
    cell::Cell,
    collections::{BTreeMap, HashMap},
    io,
    ops::Range,
    sync::Arc,
};

use wasmscope_common::ImportTable;

mod ways_out;

use super::{
    code_store::{CodeStore, Kept, Names, StoredCode},
    memory::ProcessMemory,
};
use crate::{
    image::{
        CodeObject, ImageError, ReadAt,
        code_object::{CodeKind, ModuleLimits, Symbol},
        store_layout::{LayoutError, StoreLayout},
        vmcontext::{ImportLayout, import_ordinal},
    },
    span::{Function, Import, Module},
};

pub use ways_out::{ImportedFunctions, WaysOut};

/// Code objects kept of one process.
pub const MAX_OBJECTS: usize = 1024;
/// Callees remembered of one process.
const MAX_CALLEES: usize = 16_384;
/// Types of imported functions looked at of one module.
const MAX_WAYS_OUT: usize = 256;
/// The header page of a code object precedes its text.
const PAGE_BYTES: u64 = 4096;
/// x86-64 `call` to an address relative to the next instruction, as guest code calls the runtime's functions.
const CALL_OPCODE: u8 = 0xe8;
const CALL_BYTES: usize = 5;

/// A code object at its place.
#[derive(Debug)]
struct Loaded {
    text: Range<u64>,
    object: Arc<StoredCode>,
    modules: HashMap<u32, Arc<Module>>,
    hash: String,
    file_name: Option<String>,
}

/// All of them.
#[derive(Debug)]
pub struct Guests {
    /// What all processes share.
    store: CodeStore,
    /// By start of text.
    objects: BTreeMap<u64, Loaded>,
    functions: Names<u64, Option<Arc<Function>>>,
    /// By return address: the runtime's function that guest code calls there.
    builtins: Names<u64, Option<Arc<str>>>,
    /// The imports seen to be called from a place, by place and callee.
    callees: Names<(u64, u64), Arc<Import>>,
    /// The callees seen at a place.
    call_sites: HashMap<u64, Vec<u64>>,
    /// Callees were forgotten of which the programs take it that they are known.
    are_callees_missing: bool,
    /// Bytes read of the process's code objects.
    read_bytes: u64,
    /// By return address in the trampoline.
    trampolines: Names<u64, Option<Arc<Import>>>,
}

/// Where the memory of a process is read as if it began at an image's first byte.
struct At<'a> {
    memory: &'a ProcessMemory,
    base: u64,
    read_bytes: Cell<u64>,
}

impl ReadAt for At<'_> {
    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<usize> {
        let address = self
            .base
            .checked_add(offset)
            .ok_or_else(|| io::Error::from(io::ErrorKind::InvalidInput))?;
        let count = self.memory.read(address, buffer)?;
        self.read_bytes.set(self.read_bytes.get().saturating_add(count as u64));
        Ok(count)
    }
}

/// A place in guest code.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Place {
    /// Bytes from the start of the function's machine code.
    pub native_offset: u64,
    /// Bytes from the start of the wasm binary.
    pub wasm_offset: Option<u32>,
}

/// A code object, as an inventory has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HeldCode {
    /// Where its text begins.
    pub text_start: u64,
    /// Its first core module.
    pub module: Arc<Module>,
    /// What was compiled.
    pub kind: CodeKind,
    /// It is mapped from a file, so it was compiled before.
    pub is_of_a_file: bool,
}

/// What adding a code object did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Added {
    /// It was known.
    Known,
    /// It is new, at a place where nothing was.
    New,
    /// It took the place of another, so names looked up before may be wrong.
    Replaced,
    /// It is new, and there was room for its names only: where an instruction comes from and how it traps is not known.
    WithoutTables,
}

/// Why a code object was not added.
#[derive(Debug, thiserror::Error)]
pub enum AddError {
    /// It is none, or it is gone.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// The process, or all of them, have as many names as are kept.
    #[error("no room for more names")]
    NoRoom,
}

impl Default for Guests {
    fn default() -> Self {
        Self::new(CodeStore::default())
    }
}

impl Guests {
    /// None, of a process that shares what it runs with others.
    pub fn new(store: CodeStore) -> Self {
        Self {
            objects: BTreeMap::new(),
            functions: Names::new(&store),
            builtins: Names::new(&store),
            callees: Names::new(&store),
            call_sites: HashMap::new(),
            are_callees_missing: false,
            read_bytes: 0,
            trampolines: Names::new(&store),
            store,
        }
    }

    /// Reads the code object whose text starts at `text`.
    pub fn add(
        &mut self,
        memory: &ProcessMemory,
        text: Range<u64>,
        file_name: Option<String>,
    ) -> Result<Added, AddError> {
        let base = text
            .start
            .checked_sub(PAGE_BYTES)
            .ok_or(AddError::Image(ImageError::Malformed("text address")))?;
        let reader = At {
            memory,
            base,
            read_bytes: Cell::new(0),
        };
        let object = CodeObject::read(&reader).and_then(|object| {
            let hash = object.content_hash(&reader)?;
            Ok((object, hash))
        });
        self.read_bytes = self.read_bytes.saturating_add(reader.read_bytes.get());
        let (object, hash) = object?;
        // The kernel's range is what was asked for; the object says what is its own.
        let end = text
            .start
            .saturating_add(object.text_bytes().next_multiple_of(PAGE_BYTES));
        let text = text.start..text.end.min(end);
        if self
            .objects
            .get(&text.start)
            .is_some_and(|known| known.hash == hash && known.text == text)
        {
            return Ok(Added::Known);
        }
        let mut added = if self.remove(&text) {
            Added::Replaced
        } else {
            Added::New
        };
        let (object, is_whole) = match self.store.keep(&hash, object, self.held_bytes()) {
            Some(Kept::Whole(object)) => (object, true),
            Some(Kept::WithoutTables(object)) => (object, false),
            None => return Err(AddError::NoRoom),
        };
        if self.objects.len() >= MAX_OBJECTS {
            self.objects.pop_first();
            added = Added::Replaced;
        }
        if added == Added::Replaced {
            self.forget_addresses();
        }
        self.objects.insert(
            text.start,
            Loaded {
                text,
                object,
                modules: HashMap::new(),
                hash,
                file_name,
            },
        );
        Ok(if is_whole { added } else { Added::WithoutTables })
    }

    /// A core module of the code object whose text contains `address`, by its number in it.
    pub fn module_of(&mut self, address: u64, index: u32) -> Option<Arc<Module>> {
        self.loaded(address).map(|loaded| loaded.module(index))
    }

    /// Whether the code object whose text contains `address` is a component.
    pub fn is_component(&mut self, address: u64) -> bool {
        self.loaded(address)
            .is_some_and(|loaded| loaded.object.kind() == CodeKind::Component)
    }

    /// All code objects, as an inventory has them.
    pub fn held(&mut self) -> impl Iterator<Item = HeldCode> {
        self.objects.values_mut().map(|loaded| HeldCode {
            text_start: loaded.text.start,
            module: loaded.module(0),
            kind: loaded.object.kind(),
            is_of_a_file: loaded.file_name.is_some(),
        })
    }

    /// Takes away what lies in a range; `false` if nothing did.
    pub fn remove(&mut self, range: &Range<u64>) -> bool {
        let count = self.objects.len();
        self.objects
            .retain(|_, loaded| loaded.text.end <= range.start || range.end <= loaded.text.start);
        let is_less = self.objects.len() < count;
        if is_less {
            self.forget_addresses();
        }
        is_less
    }

    fn forget_addresses(&mut self) {
        self.functions.clear();
        self.builtins.clear();
        self.forget_callees();
        self.trampolines.clear();
    }

    fn forget_callees(&mut self) {
        self.are_callees_missing = true;
        self.callees.clear();
        self.call_sites.clear();
    }

    /// Whether callees were forgotten since this was asked last: the programs have to announce them again.
    pub fn take_missing_callees(&mut self) -> bool {
        std::mem::take(&mut self.are_callees_missing)
    }

    /// Bytes read of code objects since this was asked last.
    pub fn take_read_bytes(&mut self) -> u64 {
        std::mem::take(&mut self.read_bytes)
    }

    /// Whether the code object whose text starts there has been read.
    pub fn holds(&self, text_start: u64) -> bool {
        self.objects.contains_key(&text_start)
    }

    fn held_bytes(&self) -> usize {
        self.objects.values().map(|loaded| loaded.object.bytes()).sum()
    }

    /// Whether an address lies in the code of one of them.
    pub fn contains(&mut self, address: u64) -> bool {
        self.loaded(address).is_some()
    }

    /// Whether there are any.
    pub fn is_empty(&self) -> bool {
        self.objects.is_empty()
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.objects.len()
    }

    /// The range that covers all their text.
    pub fn code_range(&self) -> Option<Range<u64>> {
        let start = self.objects.values().map(|loaded| loaded.text.start).min()?;
        let end = self.objects.values().map(|loaded| loaded.text.end).max()?;
        Some(start..end)
    }

    /// The versions of the runtime that made them, each once.
    pub fn engine_versions(&self) -> Vec<&str> {
        let mut versions: Vec<_> = self.native().map(CodeObject::engine_version).collect();
        versions.sort_unstable();
        versions.dedup();
        versions
    }

    /// How the runtimes that made them keep their activations, each way once.
    pub fn store_layouts(&self) -> Vec<StoreLayout> {
        let mut layouts: Vec<_> = self.native().filter_map(|object| object.store_layout().ok()).collect();
        layouts.sort_unstable_by_key(|layout| layout.encode());
        layouts.dedup();
        layouts
    }

    /// Why the activations of some cannot be followed, each reason once.
    pub fn layout_errors(&self) -> Vec<&LayoutError> {
        let mut errors: Vec<_> = self.native().filter_map(|object| object.store_layout().err()).collect();
        errors.dedup();
        errors
    }

    /// Those that the machine executes.
    fn native(&self) -> impl Iterator<Item = &CodeObject> {
        let objects = self.objects.values().map(|loaded| &**loaded.object);
        objects.filter(|object| !object.is_pulley())
    }

    /// What is not known of the code objects, in words for a person.
    pub fn limits(&self) -> Option<String> {
        let mut components = self.objects.values().map(|loaded| &loaded.object);
        components
            .find_map(|object| {
                object
                    .component()
                    .err()
                    .filter(|_| object.kind() == CodeKind::Component)
            })
            .map(|reason| format!("imports and exports of a component have no names: {reason}"))
    }

    /// The guest function whose code contains `address`.
    pub fn function(&mut self, address: u64) -> Option<Arc<Function>> {
        if let Some(known) = self.functions.get(&address) {
            return known.clone();
        }
        let found = self.loaded(address).and_then(|loaded| loaded.function(address));
        if self.functions.count() >= MAX_CALLEES {
            self.functions.clear();
        }
        self.functions.insert(address, found.clone());
        found
    }

    /// The kind of trap that the instruction at `address` raises.
    pub fn trap_code(&mut self, address: u64) -> Option<&'static str> {
        let loaded = self.loaded(address)?;
        loaded.object.trap_code(address - loaded.text.start)
    }

    /// The trap that has this number in the version that compiled the code at `address`.
    pub fn trap_name(&mut self, address: u64, code: u8) -> Option<&'static str> {
        self.loaded(address)?.object.trap_name(code)
    }

    /// Where in its function and in its wasm binary the instruction that contains `address` is.
    pub fn place(&mut self, address: u64) -> Option<Place> {
        let loaded = self.loaded(address)?;
        let offset = address - loaded.text.start;
        let start = loaded
            .object
            .lookup(offset)
            .map_or(offset, |entry| u64::from(entry.start));
        Some(Place {
            native_offset: offset - start,
            wasm_offset: loaded.object.wasm_offset(offset),
        })
    }

    /// What the module whose code contains `address` declares of its own memories and tables.
    pub fn declared_limits(&mut self, address: u64) -> Option<&ModuleLimits> {
        let loaded = self.loaded(address)?;
        let module_index = loaded.module_index(address)?;
        loaded.object.module(module_index).ok()?.limits.as_ref()
    }

    /// The runtime's function (`memory_fill`) that guest code calls right before `return_address`; `None` if what it
    /// calls there is none, or if the code is gone.
    pub fn builtin(&mut self, memory: &ProcessMemory, return_address: u64) -> Option<Arc<str>> {
        if let Some(known) = self.builtins.get(&return_address) {
            return known.clone();
        }
        let found = self.find_builtin(memory, return_address);
        if self.builtins.count() >= MAX_CALLEES {
            self.builtins.clear();
        }
        self.builtins.insert(return_address, found.clone());
        found
    }

    fn find_builtin(&mut self, memory: &ProcessMemory, return_address: u64) -> Option<Arc<str>> {
        let call_at = return_address.checked_sub(CALL_BYTES as u64)?;
        let loaded = self.loaded(call_at)?;
        let mut code = [0; CALL_BYTES];
        if memory.read(call_at, &mut code).ok()? != CALL_BYTES {
            return None;
        }
        let [CALL_OPCODE, distance @ ..] = code else {
            return None;
        };
        let target = return_address.checked_add_signed(i64::from(i32::from_le_bytes(distance)))?;
        if !loaded.text.contains(&target) {
            return None;
        }
        match loaded.symbol(target)? {
            Symbol::Builtin(name) if !name.is_empty() => Some(Arc::from(name)),
            _ => None,
        }
    }

    /// Learns from the import table of a caller which import a callee is; `false` if that cannot be told.
    pub fn learn_callee(&mut self, table: &ImportTable, is_code: impl Fn(u64) -> bool) -> bool {
        let Some(import) = self.import_of(table, is_code) else {
            return false;
        };
        if self.callees.count() >= MAX_CALLEES {
            self.forget_callees();
        }
        let (site, callee) = (table.call_site, table.callee);
        let is_new = self.callees.get(&(site, callee)).is_none();
        let is_kept = self.callees.insert((site, callee), import);
        if is_new && is_kept {
            self.call_sites.entry(site).or_default().push(callee);
        }
        is_kept
    }

    fn import_of(&mut self, table: &ImportTable, is_code: impl Fn(u64) -> bool) -> Option<Arc<Import>> {
        let loaded = self.loaded(table.call_site)?;
        let layout = ImportLayout::of_major(loaded.object.engine_major()?)?;
        let module_index = loaded.module_index(table.call_site)?;
        let count = loaded.object.function_import_count(module_index)?;
        let length = usize::try_from(table.length).ok()?.min(table.vmcontext.len());
        let ordinal = import_ordinal(&table.vmcontext[..length], layout, count, table.callee, is_code)?;
        let (module, name) = loaded.object.import(module_index, ordinal)?;
        Some(Arc::new(Import {
            module: module.to_owned(),
            name: name.to_owned(),
        }))
    }

    /// The import called from `call_site` with this callee.
    pub fn import(&mut self, call_site: u64, callee: u64) -> Option<Arc<Import>> {
        let Some(callees) = self.call_sites.get(&call_site) else {
            // Destructors of a host's resources are host functions for core modules, called by a trampoline of a component.
            return self.trampoline_import(call_site);
        };
        if let Some(known) = self.callees.get(&(call_site, callee)) {
            return Some(known.clone());
        }
        // A new linker's function at a place that has always called the same import: guest code names imports, so it
        // still does.
        let mut imports = callees
            .iter()
            .filter_map(|callee| self.callees.get(&(call_site, *callee)));
        let first = imports.next()?;
        imports.all(|import| import == first).then(|| first.clone())
    }

    /// The host function that a component calls through the trampoline which `return_address` lies in.
    pub fn trampoline_import(&mut self, return_address: u64) -> Option<Arc<Import>> {
        if let Some(known) = self.trampolines.get(&return_address) {
            return known.clone();
        }
        let loaded = self.loaded(return_address)?;
        let offset = return_address - loaded.text.start;
        let lowered = loaded.object.lowered_import(offset);
        let names = lowered.map(|import| (&import.interface, &import.function)).or_else(|| {
            let import = loaded.object.trampoline_import(offset)?;
            Some((&import.module, &import.name))
        });
        let found = names.map(|(module, name)| {
            Arc::new(Import {
                module: module.to_string(),
                name: name.to_string(),
            })
        });
        if self.trampolines.count() >= MAX_CALLEES {
            self.trampolines.clear();
        }
        self.trampolines.insert(return_address, found.clone());
        found
    }

    /// Whether `address` lies in code that the runtime has put between the functions of a component, which is no function of a
    /// guest.
    pub fn is_glue(&mut self, address: u64) -> bool {
        self.loaded(address)
            .and_then(|loaded| loaded.symbol(address))
            .is_some_and(|symbol| matches!(symbol, Symbol::ComponentTrampoline(_)))
    }

    fn loaded(&mut self, address: u64) -> Option<&mut Loaded> {
        let (_, loaded) = self.objects.range_mut(..=address).next_back()?;
        loaded.text.contains(&address).then_some(loaded)
    }
}

impl Loaded {
    fn symbol(&self, address: u64) -> Option<Symbol<'_>> {
        self.object.lookup(address - self.text.start).map(|entry| entry.symbol)
    }

    fn module_index(&self, address: u64) -> Option<u32> {
        match self.symbol(address)? {
            Symbol::Function { module_index, .. } => Some(module_index),
            _ => None,
        }
    }

    /// Functions by themselves or by the trampoline through which hosts enter them.
    fn function(&mut self, address: u64) -> Option<Arc<Function>> {
        let (module_index, index, symbol_name) = match self.symbol(address)? {
            Symbol::Function {
                module_index,
                function_index,
                name,
            } => (module_index, Some(function_index), name.map(str::to_owned)),
            Symbol::ArrayToWasm {
                module_index,
                function_index,
            } => (module_index, Some(function_index), None),
            Symbol::ModuleStart { module_index, .. } => (module_index, None, Some("(start)".to_owned())),
            _ => return None,
        };
        let name = index
            .and_then(|index| self.export_name(module_index, index))
            .map(str::to_owned)
            .or(symbol_name)
            .or_else(|| index.and_then(|index| self.function_name(module_index, index)))
            .unwrap_or_else(|| format!("function[{}]", index.unwrap_or_default()));
        Some(Arc::new(Function {
            module: self.module(module_index),
            index: index.unwrap_or_default(),
            name,
        }))
    }

    /// The component's own name for what it exports, else the core module's.
    fn export_name(&self, module: u32, function: u32) -> Option<&str> {
        let component = self.object.component().ok();
        component
            .and_then(|component| component.export_name(module, function))
            .or_else(|| self.object.export_name(module, function))
    }

    /// Name section entry of a function that is not exported.
    fn function_name(&self, module: u32, function: u32) -> Option<String> {
        self.object.symbols().find_map(|entry| match entry.symbol {
            Symbol::Function {
                module_index,
                function_index,
                name: Some(name),
            } if module_index == module && function_index == function => Some(name.to_owned()),
            _ => None,
        })
    }

    fn module(&mut self, index: u32) -> Arc<Module> {
        if let Some(known) = self.modules.get(&index) {
            return known.clone();
        }
        let name = self
            .object
            .module(index)
            .ok()
            .and_then(|module| module.name.as_deref().map(str::to_owned))
            .unwrap_or_else(|| {
                let image = self.file_name.clone();
                let image = image.unwrap_or_else(|| format!("module-{}", self.hash));
                // One name would make one module of all those of a component.
                if self.object.module_count() > 1 {
                    format!("{image}[{index}]")
                } else {
                    image
                }
            });
        let module = Arc::new(Module {
            name,
            hash: self.hash.clone(),
        });
        self.modules.insert(index, module.clone());
        module
    }
}
