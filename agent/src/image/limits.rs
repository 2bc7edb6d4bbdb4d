//! `.wasmtime.info`: how large the memories and tables of a core module may become, as it declares.
//!
//! wasmtime 46 to 50: `crates/environ/src/module.rs`, `Module`. The fields after a module's exports are decoded one by one, and believed
//! only if the counts of imports that they state are those of the imports before.

use super::info::{Cursor, ItemKind, ModuleNames};

/// Of a module's own memories and tables, those that it imports left out.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ModuleLimits {
    /// In the module's order.
    pub memories: Vec<MemoryLimits>,
    /// In the module's order.
    pub tables: Vec<TableLimits>,
    /// It imports memories or tables, so that what its code grows may be another module's.
    pub imports_growable: bool,
}

/// Of a memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemoryLimits {
    /// Bytes of a page.
    pub page_bytes: u64,
    /// Pages at first.
    pub minimum: u64,
    /// Pages at most, if it says.
    pub maximum: Option<u64>,
}

/// Of a table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TableLimits {
    /// Elements at first.
    pub minimum: u64,
    /// Elements at most, if it says.
    pub maximum: Option<u64>,
}

/// Variants of `WasmHeapType` that name a type of the module: functions, exceptions, continuations, arrays, structs.
const CONCRETE_HEAP_TYPES: [u32; 5] = [3, 6, 9, 15, 17];
const LAST_HEAP_TYPE: u32 = 18;

/// `cursor` is behind the exports of the module that has these `names`.
pub(super) fn decode_limits(cursor: &mut Cursor<'_>, names: &ModuleNames) -> Option<ModuleLimits> {
    startup(cursor)?;
    for _ in 0..cursor.count()? {
        for _ in 0..cursor.count()? {
            cursor.varint_u32()?;
        }
    }
    memory_initialization(cursor)?;
    for _ in 0..cursor.count()? {
        reference_type(cursor)?;
        cursor.varint_u64()?;
    }
    for _ in 0..cursor.count()? {
        let (start, end) = (cursor.varint_u32()?, cursor.varint_u32()?);
        (start <= end).then_some(())?;
    }
    for _ in 0..cursor.count()? {
        type_index(cursor)?;
    }
    let imported = |kind| names.imports.iter().filter(|import| import.kind == kind).count() as u64;
    for kind in [
        ItemKind::Function,
        ItemKind::Table,
        ItemKind::Memory,
        ItemKind::Global,
        ItemKind::Tag,
    ] {
        (cursor.varint_u64()? == imported(kind)).then_some(())?;
    }
    flag(cursor)?;
    cursor.varint_u64()?;
    let function_count = cursor.count()?;
    for _ in 0..function_count {
        type_index(cursor)?;
        cursor.varint_u32()?;
    }
    let mut tables = Vec::new();
    for _ in 0..cursor.count()? {
        let (minimum, maximum) = limits(cursor)?;
        reference_type(cursor)?;
        tables.push(TableLimits { minimum, maximum });
    }
    let mut memories = Vec::new();
    for _ in 0..cursor.count()? {
        let (minimum, maximum) = limits(cursor)?;
        flag(cursor)?;
        // What the proposal for custom page sizes allows.
        let page_bytes = match cursor.byte()? {
            0 => 1,
            16 => 1 << 16,
            _ => return None,
        };
        memories.push(MemoryLimits {
            page_bytes,
            minimum,
            maximum,
        });
    }
    let is_known = names.exports.iter().all(|export| match export.kind {
        ItemKind::Function => u64::from(export.index) < function_count,
        ItemKind::Table => (export.index as usize) < tables.len(),
        ItemKind::Memory => (export.index as usize) < memories.len(),
        ItemKind::Global | ItemKind::Tag => true,
    });
    is_known.then_some(())?;
    Some(ModuleLimits {
        memories: memories.get(imported(ItemKind::Memory) as usize..)?.to_vec(),
        tables: tables.get(imported(ItemKind::Table) as usize..)?.to_vec(),
        imports_growable: imported(ItemKind::Memory) + imported(ItemKind::Table) > 0,
    })
}

fn startup(cursor: &mut Cursor<'_>) -> Option<()> {
    match cursor.varint_u32()? {
        0 => Some(()),
        1 | 2 => type_index(cursor),
        _ => None,
    }
}

fn memory_initialization(cursor: &mut Cursor<'_>) -> Option<()> {
    match cursor.varint_u32()? {
        0 => return Some(()),
        1 => {}
        _ => return None,
    }
    for _ in 0..cursor.count()? {
        if flag(cursor)? {
            cursor.varint_u64()?;
            cursor.varint_u32()?;
        }
    }
    Some(())
}

fn type_index(cursor: &mut Cursor<'_>) -> Option<()> {
    (cursor.varint_u32()? <= 2).then_some(())?;
    cursor.varint_u32()?;
    Some(())
}

fn reference_type(cursor: &mut Cursor<'_>) -> Option<()> {
    flag(cursor)?;
    let heap_type = cursor.varint_u32()?;
    if CONCRETE_HEAP_TYPES.contains(&heap_type) {
        return type_index(cursor);
    }
    (heap_type <= LAST_HEAP_TYPE).then_some(())
}

fn limits(cursor: &mut Cursor<'_>) -> Option<(u64, Option<u64>)> {
    // Indices of 32 or 64 bits.
    (cursor.varint_u32()? <= 1).then_some(())?;
    let minimum = cursor.varint_u64()?;
    let maximum = if flag(cursor)? {
        Some(cursor.varint_u64()?)
    } else {
        None
    };
    maximum
        .is_none_or(|maximum| minimum <= maximum)
        .then_some((minimum, maximum))
}

fn flag(cursor: &mut Cursor<'_>) -> Option<bool> {
    match cursor.byte()? {
        0 => Some(false),
        1 => Some(true),
        _ => None,
    }
}
