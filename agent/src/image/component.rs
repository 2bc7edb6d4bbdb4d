//! What `.wasmtime.info` says of a component: which host function each lowered import is, which core function each export lifts, and
//! what core modules call the trampolines they are given.
//!
//! The section begins with the component itself, so unlike modules nothing has to be looked for. What is decoded has to agree with
//! the counts that follow it, and indices with what they point to; else nothing of it is believed.

use std::{collections::HashMap, sync::Arc};

use super::{
    bounded_name,
    info::{Cursor, SHARED_BYTES},
};

/// Module name of functions that a component imports outside of any interface, as component tools call it.
const WORLD: &str = "$root";
/// Instances exported by instances; tools write one level.
const MAX_EXPORT_DEPTH: u32 = 4;
/// Names of exports looked at.
const MAX_EXPORTS: usize = 10_000;
/// Lowered imports.
const MAX_LOWERINGS: usize = 10_000;
/// Parts of an import's path joined to its name; tools write one.
const MAX_PATH_PARTS: usize = 8;

/// How a version of wasmtime writes a component (wasmtime-environ: `src/component/info.rs`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Layout {
    /// Optional strings that go with the type of an import or with an export.
    item_strings: u32,
    /// An instantiation says which component it belongs to.
    has_owner: bool,
}

impl Layout {
    /// The layout of a major version, if it is one whose source has been read and whose images have been decoded.
    pub(super) fn of_major(major: u32) -> Option<Self> {
        let (item_strings, has_owner) = match major {
            36..=41 => (0, false),
            42..=45 => (0, true),
            46..=47 => (1, true),
            48..=50 => (2, true),
            _ => return None,
        };
        Some(Self {
            item_strings,
            has_owner,
        })
    }
}

/// An imported function of a component; names are untrusted and bounded.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ComponentImport {
    /// The interface, `wasi:clocks/monotonic-clock@0.2.6`; `$root` for a function outside of any.
    pub interface: Arc<str>,
    /// The function, `now`.
    pub function: Arc<str>,
}

/// Names of a component.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ComponentNames {
    /// By the index that the symbols of trampolines bear.
    lowered: Vec<ComponentImport>,
    /// By core module and function.
    lifted: HashMap<(u32, u32), Arc<str>>,
    /// By index among all trampolines: a core module, and which of its imports it is given that trampoline for.
    given: HashMap<u32, (u32, u32)>,
}

impl ComponentNames {
    /// Bytes that it takes, at most: as if no two strings were one.
    pub(super) fn held_bytes(&self) -> usize {
        let text = |name: &Arc<str>| name.len() + SHARED_BYTES;
        let lowered = self.lowered.iter();
        let lowered = lowered.map(|import| text(&import.interface) + text(&import.function));
        size_of::<Self>()
            + lowered.sum::<usize>()
            + self.lifted.values().map(text).sum::<usize>()
            + self.lowered.capacity() * size_of::<ComponentImport>()
            + self.lifted.capacity() * size_of::<((u32, u32), Arc<str>)>()
            + self.given.capacity() * size_of::<(u32, (u32, u32))>()
    }

    /// Lowered imports. One import is lowered once for each set of options that the component lowers it with.
    pub fn lowered_imports(&self) -> &[ComponentImport] {
        &self.lowered
    }

    /// A core module that imports the trampoline with this index among all of them, and the position of that import.
    pub(super) fn given(&self, trampoline: u32) -> Option<(u32, u32)> {
        self.given.get(&trampoline).copied()
    }

    /// The export that is this function of a core module: `run`, or `wasi:cli/run@0.2.6#run` within an instance.
    pub fn export_name(&self, module_index: u32, function_index: u32) -> Option<&str> {
        self.lifted.get(&(module_index, function_index)).map(|name| &**name)
    }
}

/// An item of a component that is exported, as far as it matters.
enum Item<'a> {
    Function(Core),
    Instance(Vec<(&'a str, u32)>),
    Other,
}

/// What a core module can be given, as far as it matters.
#[derive(Clone, Copy)]
enum Core {
    /// A function of an instance of a core module.
    Function {
        instance: u32,
        index: u32,
    },
    /// A trampoline, by its index among all of them.
    Trampoline(u32),
    Other,
}

/// How many of each kind the initializers make, which must be the counts written after them.
#[derive(Clone, Copy, Default, PartialEq, Eq)]
struct Made {
    memories: u32,
    tables: u32,
    reallocs: u32,
    callbacks: u32,
    post_returns: u32,
}

/// The names of a component artifact.
pub(super) fn component_names(info: &[u8], layout: Layout) -> Option<ComponentNames> {
    let mut reader = Reader {
        cursor: Cursor::new(info),
        layout,
        given: HashMap::new(),
    };
    reader.number()?;
    let mut interfaces = Vec::new();
    for _ in 0..reader.cursor.count()? {
        interfaces.push(reader.cursor.string()?);
        reader.item_strings()?;
        reader.type_definition()?;
    }
    let mut imports = Vec::new();
    for _ in 0..reader.cursor.count()? {
        let interface = *interfaces.get(reader.number()? as usize)?;
        let mut path = Vec::new();
        for _ in 0..reader.cursor.count()? {
            path.push(reader.cursor.string()?);
        }
        imports.push((interface, path));
    }
    let exports = reader.exports()?;
    let mut items = Vec::new();
    for _ in 0..reader.cursor.count()? {
        items.push(reader.item()?);
    }
    let (instances, lowerings) = reader.initializers(imports.len())?;

    let mut lifted = HashMap::new();
    let mut budget = MAX_EXPORTS;
    add_exports(
        &mut lifted,
        &mut budget,
        &exports,
        &items,
        &instances,
        "",
        MAX_EXPORT_DEPTH,
    );
    if lowerings.len() > MAX_LOWERINGS {
        return None;
    }
    let lowered = lowerings.into_iter().map(|import| {
        let (interface, path) = &imports[import];
        let (interface, function) = match path.as_slice() {
            [] => (WORLD, (*interface).to_owned()),
            path => (*interface, joined(path)),
        };
        ComponentImport {
            interface: Arc::from(&*bounded_name(interface.as_bytes())),
            function: Arc::from(&*bounded_name(function.as_bytes())),
        }
    });
    Some(ComponentNames {
        lowered: lowered.collect(),
        lifted,
        given: reader.given,
    })
}

fn add_exports(
    lifted: &mut HashMap<(u32, u32), Arc<str>>,
    budget: &mut usize,
    exports: &[(&str, u32)],
    items: &[Item<'_>],
    instances: &[Option<u32>],
    prefix: &str,
    depth: u32,
) {
    for (name, item) in exports {
        // Instances may export each other, so what is bounded is the names looked at.
        let Some(left) = budget.checked_sub(1) else { return };
        *budget = left;
        let name = format!("{prefix}{}", bounded_name(name.as_bytes()));
        match items.get(*item as usize) {
            Some(Item::Function(Core::Function { instance, index })) => {
                if let Some(Some(module)) = instances.get(*instance as usize) {
                    let name = Arc::from(&*bounded_name(name.as_bytes()));
                    lifted.entry((*module, *index)).or_insert(name);
                }
            }
            Some(Item::Instance(exports)) if depth > 0 => {
                add_exports(
                    lifted,
                    budget,
                    exports,
                    items,
                    instances,
                    &format!("{name}#"),
                    depth - 1,
                );
            }
            _ => {}
        }
    }
}

/// Parts of a path, no more of each than a name may have.
fn joined(path: &[&str]) -> String {
    let parts = path
        .iter()
        .take(MAX_PATH_PARTS)
        .map(|part| bounded_name(part.as_bytes()));
    parts.collect::<Vec<_>>().join(".")
}

struct Reader<'a> {
    cursor: Cursor<'a>,
    layout: Layout,
    given: HashMap<u32, (u32, u32)>,
}

impl<'a> Reader<'a> {
    fn number(&mut self) -> Option<u32> {
        self.cursor.varint_u32()
    }

    fn is_some(&mut self) -> Option<bool> {
        match self.cursor.byte()? {
            0 => Some(false),
            1 => Some(true),
            _ => None,
        }
    }

    /// `ComponentExternData`
    fn item_strings(&mut self) -> Option<()> {
        for _ in 0..self.layout.item_strings {
            if self.is_some()? {
                self.cursor.string()?;
            }
        }
        Some(())
    }

    /// `TypeDef`
    fn type_definition(&mut self) -> Option<()> {
        const INTERFACE: u32 = 3;
        const LAST: u32 = 6;
        // `InterfaceType`: up to `String` they are what they are, the rest have an index.
        const FIRST_WITH_INDEX: u32 = 13;
        match self.number()? {
            INTERFACE => {
                if self.number()? >= FIRST_WITH_INDEX {
                    self.number()?;
                }
            }
            0..=LAST => {
                self.number()?;
            }
            _ => return None,
        }
        Some(())
    }

    /// `NameMap` of exports: names and positions among the items.
    fn exports(&mut self) -> Option<Vec<(&'a str, u32)>> {
        let mut exports = Vec::new();
        for _ in 0..self.cursor.count()? {
            exports.push((self.cursor.string()?, self.number()?));
            self.item_strings()?;
        }
        // Names under which other versions are found.
        for _ in 0..self.cursor.count()? {
            for _ in 0..3 {
                self.cursor.string()?;
            }
        }
        Some(exports)
    }

    /// `Export`
    fn item(&mut self) -> Option<Item<'a>> {
        Some(match self.number()? {
            0 => {
                self.number()?;
                let function = self.core_definition()?;
                self.number()?;
                Item::Function(function)
            }
            1 | 2 => {
                self.number()?;
                self.number()?;
                Item::Other
            }
            3 => {
                self.number()?;
                Item::Instance(self.exports()?)
            }
            4 => {
                self.type_definition()?;
                Item::Other
            }
            _ => return None,
        })
    }

    /// `CoreDef`
    fn core_definition(&mut self) -> Option<Core> {
        Some(match self.number()? {
            0 => {
                let instance = self.number()?;
                if self.is_named_item()? {
                    return Some(Core::Other);
                }
                // `EntityIndex`
                let kind = self.number().filter(|kind| *kind <= 4)?;
                let index = self.number()?;
                if kind == 0 {
                    Core::Function { instance, index }
                } else {
                    Core::Other
                }
            }
            2 => Core::Trampoline(self.number()?),
            1 | 3 => {
                self.number()?;
                Core::Other
            }
            4 => Core::Other,
            _ => return None,
        })
    }

    /// `ExportItem`: whether it is a name, which is then read.
    fn is_named_item(&mut self) -> Option<bool> {
        match self.number()? {
            0 => Some(false),
            1 => {
                self.cursor.string()?;
                Some(true)
            }
            _ => None,
        }
    }

    /// `CoreExport` of a memory or a table
    fn core_export(&mut self) -> Option<()> {
        self.number()?;
        if !self.is_named_item()? {
            self.number()?;
        }
        Some(())
    }

    /// `GlobalInitializer`s and the counts after them: the module of each instance, where that is one of the component's own, and the
    /// import of each lowering.
    fn initializers(&mut self, import_count: usize) -> Option<(Vec<Option<u32>>, Vec<usize>)> {
        let mut instances = Vec::new();
        let mut lowerings = Vec::new();
        let mut made = Made::default();
        for _ in 0..self.cursor.count()? {
            match self.number()? {
                0 => self.instantiation(&mut instances)?,
                1 => {
                    if self.number()? as usize != lowerings.len() {
                        return None;
                    }
                    let import = self.number()? as usize;
                    lowerings.push(Some(import).filter(|import| *import < import_count)?);
                }
                2 => self.numbered(&mut made.memories, Self::core_export)?,
                3 => self.numbered(&mut made.reallocs, Self::any_core_definition)?,
                4 => self.numbered(&mut made.callbacks, Self::any_core_definition)?,
                5 => self.numbered(&mut made.post_returns, Self::any_core_definition)?,
                6 => self.numbered(&mut made.tables, Self::core_export)?,
                7 => self.resource()?,
                _ => return None,
            }
        }
        let instance_count = self.number()?;
        self.number()?;
        let said = Made {
            memories: self.number()?,
            tables: self.number()?,
            reallocs: self.number()?,
            callbacks: self.number()?,
            post_returns: self.number()?,
        };
        (said == made && instance_count as usize == instances.len()).then_some((instances, lowerings))
    }

    /// Something with an index of its own, which counts up.
    fn numbered(&mut self, made: &mut u32, read: impl FnOnce(&mut Self) -> Option<()>) -> Option<()> {
        if self.number()? != *made {
            return None;
        }
        *made += 1;
        read(self)
    }

    fn any_core_definition(&mut self) -> Option<()> {
        self.core_definition().map(|_| ())
    }

    /// `InstantiateModule`: of which module, if it is one of the component's own.
    fn instantiation(&mut self, instances: &mut Vec<Option<u32>>) -> Option<()> {
        let module = match self.number()? {
            0 => {
                let module = self.number()?;
                for position in 0..self.cursor.count()? as u32 {
                    if let Core::Trampoline(trampoline) = self.core_definition()? {
                        self.given.entry(trampoline).or_insert((module, position));
                    }
                }
                Some(module)
            }
            1 => {
                self.number()?;
                for _ in 0..self.cursor.count()? {
                    self.cursor.string()?;
                    for _ in 0..self.cursor.count()? {
                        self.cursor.string()?;
                        self.core_definition()?;
                    }
                }
                None
            }
            _ => return None,
        };
        if self.layout.has_owner && self.is_some()? {
            self.number()?;
        }
        instances.push(module);
        Some(())
    }

    /// `Resource`
    fn resource(&mut self) -> Option<()> {
        // Of the core types, resources are represented by `i32` or `i64`.
        self.number()?;
        self.number().filter(|representation| *representation <= 1)?;
        if self.is_some()? {
            self.core_definition()?;
        }
        self.number()?;
        Some(())
    }
}

/// The index of a lowered import in the symbol of its trampoline: `component-trampolines[2]-wasm-call-component-lower-import[0]`,
/// up to wasmtime 38 `component-lower-import[0]_wasm_call`.
pub(super) fn lowered_index(symbol: &str) -> Option<usize> {
    let (_, rest) = symbol.split_once("component-lower-import[")?;
    let (index, end) = rest.split_once(']')?;
    if matches!(end, "" | "_wasm_call" | "_array_call") {
        index.parse().ok()
    } else {
        None
    }
}

/// The index among all trampolines in the symbol of one, `component-trampolines[2]-wasm-call-component-resource-drop[0]`; wasmtime
/// 39 and later.
pub(super) fn trampoline_index(symbol: &str) -> Option<u32> {
    let (index, _) = symbol.strip_prefix("component-trampolines[")?.split_once(']')?;
    index.parse().ok()
}

/// The symbol that the trampoline of a lowered import has where there are symbols.
pub(super) fn lowered_symbol(index: u32) -> String {
    format!("component-lower-import[{index}]")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn symbols_of_lowered_imports_have_had_three_forms() {
        for symbol in [
            "component-trampolines[2]-wasm-call-component-lower-import[7]".to_owned(),
            "component-lower-import[7]_wasm_call".to_owned(),
            lowered_symbol(7),
        ] {
            assert_eq!(lowered_index(&symbol), Some(7), "{symbol}");
        }
        for symbol in [
            "component-resource-drop[7]",
            "component-lower-import[x]",
            "component-lower-import[7",
            "run",
        ] {
            assert_eq!(lowered_index(symbol), None, "{symbol}");
        }
    }

    proptest::proptest! {
        #[test]
        fn no_bytes_make_it_panic(bytes in proptest::collection::vec(0u8..8, 0..300)) {
            for major in 36..=50 {
                component_names(&bytes, Layout::of_major(major).expect("they are known"));
            }
        }

        #[test]
        fn no_symbol_makes_it_panic(symbol in "(component-lower-import\\[)?[0-9\\]_a-z]{0,30}") {
            lowered_index(&symbol);
        }
    }
}
