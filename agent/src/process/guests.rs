//! The code objects of one process: from an address to the guest function it lies in, from a callee to the import.

use std::{
    collections::{BTreeMap, HashMap},
    io,
    ops::Range,
    sync::Arc,
};

use wasmscope_common::ImportTable;

use super::memory::ProcessMemory;
use crate::{
    image::{
        CodeObject, ImageError, ReadAt,
        code_object::Symbol,
        store_layout::{LayoutError, StoreLayout},
        vmcontext::{ImportLayout, import_ordinal},
    },
    span::{Function, Import, Module},
};

/// Code objects kept of one process.
pub const MAX_OBJECTS: usize = 1024;
/// Callees remembered of one process.
const MAX_CALLEES: usize = 16_384;
/// The header page of a code object precedes its text.
const PAGE_BYTES: u64 = 4096;

/// A code object at its place.
#[derive(Debug)]
struct Loaded {
    text: Range<u64>,
    object: Arc<CodeObject>,
    modules: HashMap<u32, Arc<Module>>,
    hash: String,
    file_name: Option<String>,
}

/// All of them.
#[derive(Debug, Default)]
pub struct Guests {
    /// By start of text.
    objects: BTreeMap<u64, Loaded>,
    functions: HashMap<u64, Option<Arc<Function>>>,
    callees: HashMap<u64, CallSite>,
    callee_count: usize,
}

/// The imports seen to be called from one place.
#[derive(Debug, Default)]
struct CallSite {
    by_callee: HashMap<u64, Arc<Import>>,
}

/// Where the memory of a process is read as if it began at an image's first byte.
struct At<'a> {
    memory: &'a ProcessMemory,
    base: u64,
}

impl ReadAt for At<'_> {
    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<usize> {
        let address = self
            .base
            .checked_add(offset)
            .ok_or_else(|| io::Error::from(io::ErrorKind::InvalidInput))?;
        self.memory.read(address, buffer)
    }
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
}

impl Guests {
    /// Reads the code object whose text starts at `text`.
    pub fn add(
        &mut self,
        memory: &ProcessMemory,
        text: Range<u64>,
        file_name: Option<String>,
    ) -> Result<Added, ImageError> {
        let base = text
            .start
            .checked_sub(PAGE_BYTES)
            .ok_or(ImageError::Malformed("text address"))?;
        let reader = At { memory, base };
        let object = CodeObject::read(&reader)?;
        let hash = object.content_hash(&reader)?;
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
        let overlapping: Vec<_> = self
            .objects
            .values()
            .filter(|loaded| loaded.text.start < text.end && text.start < loaded.text.end)
            .map(|loaded| loaded.text.start)
            .collect();
        let mut added = Added::New;
        for start in overlapping {
            self.objects.remove(&start);
            added = Added::Replaced;
        }
        if self.objects.len() >= MAX_OBJECTS {
            self.objects.pop_first();
            added = Added::Replaced;
        }
        if added == Added::Replaced {
            self.functions.clear();
            self.callees.clear();
            self.callee_count = 0;
        }
        self.objects.insert(
            text.start,
            Loaded {
                text,
                object: Arc::new(object),
                modules: HashMap::new(),
                hash,
                file_name,
            },
        );
        Ok(added)
    }

    /// The first module of the code object whose text contains `address`.
    pub fn module_at(&mut self, address: u64) -> Option<Arc<Module>> {
        self.loaded(address).map(|loaded| loaded.module(0))
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
        let objects = self.objects.values().map(|loaded| &*loaded.object);
        objects.filter(|object| !object.is_pulley())
    }

    /// The guest function whose code contains `address`.
    pub fn function(&mut self, address: u64) -> Option<Arc<Function>> {
        if let Some(known) = self.functions.get(&address) {
            return known.clone();
        }
        let found = self.loaded(address).and_then(|loaded| loaded.function(address));
        if self.functions.len() >= MAX_CALLEES {
            self.functions.clear();
        }
        self.functions.insert(address, found.clone());
        found
    }

    /// The kind of trap that the instruction at `address` raises, and its offset from the start of its function.
    pub fn trap(&mut self, address: u64) -> Option<(&'static str, u64)> {
        let loaded = self.loaded(address)?;
        let offset = address - loaded.text.start;
        let code = loaded.object.trap_code(offset)?;
        let start = loaded
            .object
            .lookup(offset)
            .map_or(offset, |entry| u64::from(entry.start));
        Some((code, offset - start))
    }

    /// Learns from the import table of a caller which import a callee is; `false` if that cannot be told.
    pub fn learn_callee(&mut self, table: &ImportTable, is_code: impl Fn(u64) -> bool) -> bool {
        let Some(import) = self.import_of(table, is_code) else {
            return false;
        };
        if self.callee_count >= MAX_CALLEES {
            self.callees.clear();
            self.callee_count = 0;
        }
        self.callee_count += 1;
        let site = self.callees.entry(table.call_site).or_default();
        site.by_callee.insert(table.callee, import);
        true
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
    pub fn import(&self, call_site: u64, callee: u64) -> Option<Arc<Import>> {
        let site = self.callees.get(&call_site)?;
        if let Some(known) = site.by_callee.get(&callee) {
            return Some(known.clone());
        }
        // A new linker's function at a place that has always called the same import: guest code names imports, so it
        // still does.
        let mut imports = site.by_callee.values();
        let first = imports.next()?;
        imports.all(|import| import == first).then(|| first.clone())
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
            .and_then(|index| self.object.export_name(module_index, index))
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
            .or_else(|| self.file_name.clone())
            .unwrap_or_else(|| format!("module-{}", self.hash));
        let module = Arc::new(Module {
            name,
            hash: self.hash.clone(),
        });
        self.modules.insert(index, module.clone());
        module
    }
}
