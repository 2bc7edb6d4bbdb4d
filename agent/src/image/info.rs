//! `.wasmtime.info`: names of modules, imports and exports, and (for images without symbols) the table of compiled functions.
//!
//! The section is postcard of wasmtime's own structures, which have no schema and change with versions. Only what has been stable is
//! decoded from a known start: the first fields of a module. The rest is *found*: a structure is accepted where its many internal
//! constraints hold, and only if that is so at exactly one place (not counting a few bytes that fit by chance where many do). The true
//! structure always satisfies them, so a single hit is the truth, and an image that was made to confuse costs its own names only.

use std::{ops::Range, sync::Arc};

use super::{
    bounded_name,
    limits::{ModuleLimits, decode_limits},
};

/// Items of one sequence: functions (a large guest has 100,000), imports, exports.
const MAX_ITEMS: u64 = 1_000_000;
/// Numbers and strings decoded while looking for structures: bounds time to tens of milliseconds.
const MAX_SCAN_STEPS: u64 = 8_000_000;
/// Namespaces in a function table: two per core module and a few more.
const MAX_NAMESPACES: u64 = 20_000;
/// The text is padded to a page of the largest kind, 64 KiB, after its last function.
const MAX_TEXT_PADDING: u64 = 64 << 10;
/// A SHA-256 of the guest's bytes stands between a module's function names and what follows.
const CHECKSUM_BYTES: usize = 32;

/// How a version of wasmtime writes the first fields of a module.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Layout {
    /// A module begins with its index in the artifact.
    has_module_index: bool,
    /// Strings are interned before everything else.
    has_string_pool: bool,
    /// What lies between the exports and the types of memories and tables is as in wasmtime 46 to 50.
    has_known_limits: bool,
}

impl Layout {
    /// The layout of a major version, if it is one whose source has been read.
    pub(super) fn of_major(major: u32) -> Option<Self> {
        Some(match major {
            24..=37 => Self {
                has_module_index: false,
                has_string_pool: false,
                has_known_limits: false,
            },
            38..=42 => Self {
                has_module_index: true,
                has_string_pool: false,
                has_known_limits: false,
            },
            43..=50 => Self {
                has_module_index: true,
                has_string_pool: true,
                has_known_limits: major >= 46,
            },
            _ => return None,
        })
    }
}

/// What an import or export is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[expect(missing_docs, reason = "the words of the specification")]
pub enum ItemKind {
    Function,
    Table,
    Memory,
    Global,
    Tag,
}

impl ItemKind {
    fn from_raw(raw: u32) -> Option<Self> {
        Some(match raw {
            0 => Self::Function,
            1 => Self::Table,
            2 => Self::Memory,
            3 => Self::Global,
            4 => Self::Tag,
            _ => return None,
        })
    }
}

/// An import of a core module; names are untrusted and bounded.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ModuleImport {
    /// Module name, the interface.
    pub module: Arc<str>,
    /// Field name.
    pub name: Arc<str>,
    /// What is imported.
    pub kind: ItemKind,
}

/// An export of a core module; its name is untrusted and bounded.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ModuleExport {
    /// Name.
    pub name: Arc<str>,
    /// What is exported.
    pub kind: ItemKind,
    /// Index in the module's index space of that kind.
    pub index: u32,
}

/// Names of one core module.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ModuleNames {
    /// From the name section.
    pub name: Option<Arc<str>>,
    /// In the module's order.
    pub imports: Vec<ModuleImport>,
    /// In the module's order.
    pub exports: Vec<ModuleExport>,
    /// Declared limits of memories and tables; `None` where they cannot be read.
    pub limits: Option<ModuleLimits>,
    /// Positions in `imports` of the functions: the n-th is function n of the module.
    function_imports: Vec<u32>,
    /// (function index, position in `exports`), sorted, the first export of each function only.
    function_exports: Vec<(u32, u32)>,
}

/// What an `Arc<str>` takes beside its bytes.
pub(super) const SHARED_BYTES: usize = 16;

impl ModuleNames {
    /// Bytes that it takes, at most: as if no two strings were one.
    pub(super) fn held_bytes(&self) -> usize {
        let text = |name: &Arc<str>| name.len() + SHARED_BYTES;
        let imports = self
            .imports
            .iter()
            .map(|import| text(&import.module) + text(&import.name));
        let exports = self.exports.iter().map(|export| text(&export.name));
        let limits = self.limits.as_ref().map_or(0, |limits| {
            size_of_val(limits.memories.as_slice()) + size_of_val(limits.tables.as_slice())
        });
        size_of::<Self>()
            + limits
            + imports.sum::<usize>()
            + exports.sum::<usize>()
            + self.imports.capacity() * size_of::<ModuleImport>()
            + self.exports.capacity() * size_of::<ModuleExport>()
            + self.function_imports.capacity() * size_of::<u32>()
            + self.function_exports.capacity() * size_of::<(u32, u32)>()
    }

    /// Imported functions, which are also the first function indices.
    pub fn function_import_count(&self) -> u32 {
        self.function_imports.len() as u32
    }

    /// The import that is function `ordinal` of the module.
    pub fn function_import(&self, ordinal: u32) -> Option<&ModuleImport> {
        self.imports.get(*self.function_imports.get(ordinal as usize)? as usize)
    }

    /// The first name under which a function is exported.
    pub fn function_export(&self, function_index: u32) -> Option<&str> {
        let found = self
            .function_exports
            .binary_search_by_key(&function_index, |(index, _)| *index)
            .ok()?;
        Some(&self.exports.get(self.function_exports[found].1 as usize)?.name)
    }

    fn index(mut self) -> Self {
        let positions = |is_function: &dyn Fn(usize) -> bool, count: usize| -> Vec<u32> {
            (0..count).filter(|i| is_function(*i)).map(|i| i as u32).collect()
        };
        self.function_imports = positions(&|i| self.imports[i].kind == ItemKind::Function, self.imports.len());
        self.function_exports = positions(&|i| self.exports[i].kind == ItemKind::Function, self.exports.len())
            .into_iter()
            .map(|i| (self.exports[i as usize].index, i))
            .collect();
        self.function_exports.sort_unstable();
        self.function_exports.dedup_by_key(|(index, _)| *index);
        self
    }
}

/// The names of the only core module of a module artifact, and where they lie in `info`.
pub(super) fn module_names(info: &[u8], layout: Layout) -> Option<(ModuleNames, Range<usize>)> {
    let mut cursor = Cursor::new(info);
    let mut names = decode_module(&mut cursor, layout, 0)?.index();
    let end = info.len() - cursor.bytes.len();
    names.limits = module_limits(&mut cursor, layout, &names);
    Some((names, 0..end))
}

/// The names of each core module of a component, and where they lie in `info`.
///
/// `accept` is told a module's index and its count of function imports and says whether that can be.
pub(super) fn component_modules(
    info: &[u8],
    layout: Layout,
    module_count: u32,
    accept: impl Fn(u32, u32) -> bool,
) -> Vec<Option<(ModuleNames, Range<usize>)>> {
    let mut found: Vec<Option<(ModuleNames, Range<usize>)>> = vec![None; module_count as usize];
    if !layout.has_module_index {
        return found;
    }
    let mut certainties = vec![Certainty::default(); module_count as usize];
    let mut steps = 0;
    for start in 0..info.len() {
        let mut cursor = Cursor::new(&info[start..]);
        cursor.steps = steps;
        let index = cursor.varint_u32().filter(|index| *index < module_count);
        let names = index.and_then(|index| {
            cursor.bytes = &info[start..];
            decode_module(&mut cursor, layout, index)
        });
        steps = cursor.steps;
        if steps > MAX_SCAN_STEPS {
            return vec![None; module_count as usize];
        }
        let (Some(index), Some(names)) = (index, names) else {
            continue;
        };
        let names = names.index();
        let is_nothing = names.imports.is_empty() && names.exports.is_empty();
        if is_nothing || !accept(index, names.function_import_count()) {
            continue;
        }
        let range = start..info.len() - cursor.bytes.len();
        let mut names = names;
        names.limits = module_limits(&mut cursor, layout, &names);
        steps = cursor.steps;
        if steps > MAX_SCAN_STEPS {
            return vec![None; module_count as usize];
        }
        let slot = index as usize;
        if certainties[slot].is_better(range.len()) {
            found[slot] = Some((names, range));
        }
    }
    for (slot, certainty) in found.iter_mut().zip(certainties) {
        if !certainty.is_certain() {
            *slot = None;
        }
    }
    found
}

/// How many places look like one module. A few bytes that fit together occur by chance, many do not.
#[derive(Clone, Copy, Default)]
struct Certainty {
    short_count: u32,
    long_count: u32,
}

impl Certainty {
    const SHORT_BYTES: usize = 16;

    /// Counts one more place; `true` if it should be believed rather than those before.
    fn is_better(&mut self, bytes: usize) -> bool {
        if bytes >= Self::SHORT_BYTES {
            self.long_count += 1;
            return true;
        }
        self.short_count += 1;
        self.long_count == 0
    }

    fn is_certain(self) -> bool {
        self.long_count == 1 || (self.long_count == 0 && self.short_count == 1)
    }
}

fn module_limits(cursor: &mut Cursor<'_>, layout: Layout, names: &ModuleNames) -> Option<ModuleLimits> {
    layout.has_known_limits.then(|| decode_limits(cursor, names))?
}

fn decode_module(cursor: &mut Cursor<'_>, layout: Layout, module_index: u32) -> Option<ModuleNames> {
    if layout.has_module_index && cursor.varint_u32()? != module_index {
        return None;
    }
    let pool = if layout.has_string_pool {
        let count = cursor.count()?;
        let mut pool = Vec::new();
        for _ in 0..count {
            pool.push(cursor.string()?);
        }
        Some(pool)
    } else {
        None
    };
    let mut names = ModuleNames::default();
    let mut strings = Strings {
        pool: pool.as_deref(),
        kept: vec![None; pool.as_ref().map_or(0, Vec::len)],
    };
    names.name = match cursor.byte()? {
        0 => None,
        1 => Some(strings.take(cursor)?),
        _ => return None,
    };
    for _ in 0..cursor.count()? {
        if cursor.byte()? != 0 {
            return None;
        }
        let module = strings.take(cursor)?;
        let name = strings.take(cursor)?;
        let kind = ItemKind::from_raw(cursor.varint_u32()?)?;
        cursor.varint_u32()?;
        names.imports.push(ModuleImport { module, name, kind });
    }
    for _ in 0..cursor.count()? {
        let name = strings.take(cursor)?;
        let kind = ItemKind::from_raw(cursor.varint_u32()?)?;
        let index = cursor.varint_u32()?;
        names.exports.push(ModuleExport { name, kind, index });
    }
    // A string is interned because something uses it.
    strings.kept.iter().all(Option::is_some).then_some(names)
}

/// Strings as written: in place, or as one-based positions in the pool.
struct Strings<'a> {
    pool: Option<&'a [&'a str]>,
    kept: Vec<Option<Arc<str>>>,
}

impl Strings<'_> {
    fn take(&mut self, cursor: &mut Cursor<'_>) -> Option<Arc<str>> {
        let Some(pool) = self.pool else {
            return Some(Arc::from(&*bounded_name(cursor.string()?.as_bytes())));
        };
        let position = (cursor.varint_u32()? as usize).checked_sub(1)?;
        let kept = self.kept.get_mut(position)?;
        Some(Arc::clone(kept.get_or_insert_with(|| {
            Arc::from(&*bounded_name(pool[position].as_bytes()))
        })))
    }
}

/// A function of the table of compiled functions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct TableFunction {
    pub start: u32,
    pub len: u32,
    pub key: FunctionKey,
}

/// What a compiled function is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum FunctionKey {
    Function {
        module: u32,
        defined_index: u32,
    },
    ArrayToWasm {
        module: u32,
        defined_index: u32,
    },
    WasmToArray {
        signature: u32,
    },
    Builtin,
    /// Of a lowered import or of what the runtime offers to components; by index among them.
    ComponentTrampoline {
        index: u32,
    },
    ResourceDrop,
    ModuleStart {
        module: u32,
        is_entry: bool,
    },
    Other,
}

/// The table of compiled functions, and where it lies in `info`; for wasmtime 47 to 50, the versions that can leave symbols out.
pub(super) fn function_table(info: &[u8], text_bytes: u64) -> Option<(Vec<TableFunction>, Range<usize>)> {
    let mut found = None;
    let mut steps = 0;
    let mut start = 0;
    while start < info.len() {
        let mut cursor = Cursor::new(&info[start..]);
        cursor.steps = steps;
        let table = decode_function_table(&mut cursor, text_bytes);
        steps = cursor.steps;
        if steps > MAX_SCAN_STEPS {
            return None;
        }
        let Some(table) = table else {
            start += 1;
            continue;
        };
        let end = info.len() - cursor.bytes.len();
        if found.is_some() {
            return None;
        }
        found = Some((table, start..end));
        start = end;
    }
    found
}

fn decode_function_table(cursor: &mut Cursor<'_>, text_bytes: u64) -> Option<Vec<TableFunction>> {
    const KIND_SHIFT: u32 = 28;
    const HAS_SOURCE: u32 = 0;
    const ARRAY_ABI: u32 = 1;
    let namespaces = cursor.ascending(true)?;
    let count = namespaces.len();
    if count == 0 || namespaces.iter().any(|namespace| namespace >> KIND_SHIFT > 9) {
        return None;
    }
    let starts = cursor.ascending(false)?;
    let sparse_starts = cursor.ascending(false)?;
    let source_starts = cursor.ascending(false)?;
    let zero_based = |starts: &[u32]| starts.len() == count && starts[0] == 0;
    if !zero_based(&starts) || !zero_based(&sparse_starts) || !zero_based(&source_starts) {
        return None;
    }
    let mut sparse = Vec::new();
    for _ in 0..cursor.count()? {
        sparse.push(cursor.varint_u32()?);
    }
    let mut locations: Vec<(u32, u32)> = Vec::new();
    let mut text_end = 0;
    for _ in 0..cursor.count()? {
        let (start, len) = (cursor.varint_u32()?, cursor.varint_u32()?);
        if u64::from(start) < text_end || u64::from(start) + u64::from(len) > text_bytes {
            return None;
        }
        text_end = u64::from(start) + u64::from(len);
        locations.push((start, len));
    }
    if locations.is_empty() || text_bytes - text_end > MAX_TEXT_PADDING || *starts.last()? as usize >= locations.len() {
        return None;
    }
    let mut functions = Vec::with_capacity(locations.len());
    let (mut sparse_count, mut source_count) = (0, 0);
    for (position, namespace) in namespaces.iter().enumerate() {
        let first = starts[position] as usize;
        let last = starts.get(position + 1).map_or(locations.len(), |next| *next as usize);
        let (kind, low) = (namespace >> KIND_SHIFT, namespace & ((1 << KIND_SHIFT) - 1));
        let is_dense = !matches!(kind, 1 | 3 | 4 | 9);
        if sparse_starts[position] as usize != sparse_count || source_starts[position] as usize != source_count {
            return None;
        }
        let locations = locations.get(first..last)?;
        for (offset, (start, len)) in locations.iter().enumerate() {
            let index = if is_dense {
                offset as u32
            } else {
                *sparse.get(sparse_count + offset)?
            };
            let key = match kind {
                0 => FunctionKey::Function {
                    module: low,
                    defined_index: index,
                },
                1 => FunctionKey::ArrayToWasm {
                    module: low,
                    defined_index: index,
                },
                2 => FunctionKey::WasmToArray { signature: index },
                3 => FunctionKey::Builtin,
                6 => FunctionKey::ComponentTrampoline { index },
                7 => FunctionKey::ResourceDrop,
                9 => FunctionKey::ModuleStart {
                    module: low,
                    is_entry: index == ARRAY_ABI,
                },
                _ => FunctionKey::Other,
            };
            // A gap in a dense namespace is written as an empty function.
            if *len > 0 {
                functions.push(TableFunction {
                    start: *start,
                    len: *len,
                    key,
                });
            }
        }
        sparse_count += if is_dense { 0 } else { locations.len() };
        source_count += if kind == HAS_SOURCE { locations.len() } else { 0 };
    }
    if sparse_count != sparse.len() || cursor.count()? as usize != source_count {
        return None;
    }
    for _ in 0..source_count {
        cursor.varint_u32()?;
    }
    Some(functions)
}

/// Function names of one module: (function index, position in the section of names).
pub(super) type FunctionNames = Vec<(u32, Range<usize>)>;

/// The function names of each module. `windows` says between which positions of `info` each module's list lies.
///
/// All lists together must cover `names_bytes`, the size of the section of names, exactly; otherwise none is believed.
pub(super) fn function_names(info: &[u8], windows: &[Range<usize>], names_bytes: usize) -> Option<Vec<FunctionNames>> {
    let mut covered = 0;
    let mut steps = 0;
    let mut lists = Vec::new();
    for window in windows {
        let mut found: Option<FunctionNames> = None;
        for start in window.clone() {
            let mut cursor = Cursor::new(info.get(start..window.end)?);
            cursor.steps = steps;
            let list = decode_function_names(&mut cursor, covered, names_bytes);
            steps = cursor.steps;
            if steps > MAX_SCAN_STEPS {
                return None;
            }
            // The last module of a component is followed by the component's checksum too.
            let rest = cursor.bytes.len();
            let Some(list) = list.filter(|_| rest == CHECKSUM_BYTES || rest == 2 * CHECKSUM_BYTES) else {
                continue;
            };
            // A longer list cannot be a coincidence where a shorter one can.
            if found.as_ref().is_none_or(|found| list.len() > found.len()) {
                found = Some(list);
            }
        }
        let found = found.unwrap_or_default();
        covered = found.last().map_or(covered, |(_, range)| range.end);
        lists.push(found);
    }
    (covered == names_bytes).then_some(lists)
}

fn decode_function_names(cursor: &mut Cursor<'_>, covered: usize, names_bytes: usize) -> Option<FunctionNames> {
    let mut end = covered;
    let mut names = FunctionNames::new();
    for _ in 0..cursor.count()? {
        let (index, offset, len) = (cursor.varint_u32()?, cursor.varint_u32()?, cursor.varint_u32()?);
        if offset as usize != end || names.last().is_some_and(|(previous, _)| *previous >= index) {
            return None;
        }
        end = end.checked_add(len as usize).filter(|end| *end <= names_bytes)?;
        names.push((index, offset as usize..end));
    }
    (end > covered).then_some(names)
}

/// Postcard, as much as is needed.
pub(super) struct Cursor<'a> {
    bytes: &'a [u8],
    steps: u64,
}

impl<'a> Cursor<'a> {
    pub(super) fn new(bytes: &'a [u8]) -> Self {
        Self { bytes, steps: 0 }
    }

    pub(super) fn byte(&mut self) -> Option<u8> {
        self.steps += 1;
        let (first, rest) = self.bytes.split_first()?;
        self.bytes = rest;
        Some(*first)
    }

    pub(super) fn varint_u32(&mut self) -> Option<u32> {
        let mut value = 0u64;
        for shift in (0..35).step_by(7) {
            let byte = self.byte()?;
            value |= u64::from(byte & 0x7f) << shift;
            if byte & 0x80 == 0 {
                return u32::try_from(value).ok();
            }
        }
        None
    }

    pub(super) fn varint_u64(&mut self) -> Option<u64> {
        let mut value = 0u128;
        for shift in (0..70).step_by(7) {
            let byte = self.byte()?;
            value |= u128::from(byte & 0x7f) << shift;
            if byte & 0x80 == 0 {
                return u64::try_from(value).ok();
            }
        }
        None
    }

    /// A length of a sequence, each item of which takes at least a byte.
    pub(super) fn count(&mut self) -> Option<u64> {
        let count = u64::from(self.varint_u32()?);
        (count <= MAX_ITEMS && count <= self.bytes.len() as u64).then_some(count)
    }

    pub(super) fn string(&mut self) -> Option<&'a str> {
        let len = self.varint_u32()? as usize;
        let (string, rest) = self.bytes.split_at_checked(len)?;
        self.steps += len as u64 / 64;
        self.bytes = rest;
        str::from_utf8(string).ok()
    }

    /// A sequence of numbers that never fall, and if `strictly`, always rise.
    fn ascending(&mut self, strictly: bool) -> Option<Vec<u32>> {
        let count = self.count()?;
        if count > MAX_NAMESPACES {
            return None;
        }
        let mut values: Vec<u32> = Vec::new();
        for _ in 0..count {
            let value = self.varint_u32()?;
            if values
                .last()
                .is_some_and(|last| value < *last || strictly && value == *last)
            {
                return None;
            }
            values.push(value);
        }
        Some(values)
    }
}
