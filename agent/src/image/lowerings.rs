//! Where a component keeps the host functions that it has lowered: read out of the trampolines that call them.
//!
//! `VMComponentContext` has no stable layout, but the trampoline of each lowered import loads its function and that function's
//! data from there, two words next to each other.

use super::{
    ReadAt, component, read_exact_at,
    store_layout::{MAX_TRAMPOLINE_BYTES, called_lowering},
    symbols::{Symbol, SymbolStore},
};

/// Trampolines that are looked at of one component.
const MAX_TRAMPOLINES: usize = 256;
/// Bytes from one function to the next: function and data (`VMLowering`).
const STRIDE: u32 = 16;
/// Largest context considered: it has 48 bytes for every trampoline.
const MAX_CONTEXT_BYTES: u32 = 1 << 20;

/// The host functions of a component, within its context.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Lowerings {
    /// Bytes from the start of the context to the first function.
    base: u32,
    /// How many there are.
    count: u32,
    /// Offsets of the trampolines in the text.
    ways: Vec<u32>,
}

impl Lowerings {
    /// Bytes that it takes beside itself.
    pub(super) fn held_bytes(&self) -> usize {
        self.ways.capacity() * size_of::<u32>()
    }

    /// Reads the trampolines of a component that lowers `count` imports; `None` if they do not say, or contradict one another.
    pub(super) fn read<R: ReadAt + ?Sized>(
        reader: &R,
        symbols: &SymbolStore,
        text_offset: u64,
        count: usize,
    ) -> Option<Self> {
        let count = u32::try_from(count).ok()?;
        let mut base = None;
        let mut ways = Vec::new();
        let trampolines = symbols
            .entries
            .iter()
            .map(|entry| symbols.resolve(entry))
            .filter_map(|entry| match entry.symbol {
                // Hosts that call an import which a component exports again go another way.
                Symbol::ComponentTrampoline(symbol) if !symbol.contains("array") => {
                    Some((component::lowered_index(symbol)?, entry))
                }
                _ => None,
            });
        for (index, entry) in trampolines.take(MAX_TRAMPOLINES) {
            let offset = text_offset.saturating_add(u64::from(entry.start));
            let code = read_exact_at(reader, offset, entry.len.min(MAX_TRAMPOLINE_BYTES) as usize).unwrap_or_default();
            let Some(field) = called_lowering(&code) else { continue };
            let index = u32::try_from(index).ok().filter(|index| *index < count)?;
            let found = field.checked_sub(index.checked_mul(STRIDE)?)?;
            if base.is_some_and(|base| base != found) {
                return None;
            }
            base = Some(found);
            ways.push(entry.start);
        }
        let base = base?;
        let end = base.checked_add(count.checked_mul(STRIDE)?)?;
        (end <= MAX_CONTEXT_BYTES).then_some(Self { base, count, ways })
    }

    /// Bytes of the context up to behind the last function.
    pub fn end(&self) -> usize {
        (self.base + self.count * STRIDE) as usize
    }

    /// Offsets in the text of the trampolines that guests call these functions through; at most 256.
    pub fn ways(&self) -> &[u32] {
        &self.ways
    }

    /// The functions' addresses, in order, as far as the context was read.
    pub fn functions(&self, context: &[u8]) -> impl Iterator<Item = u64> {
        let array = context.get(self.base as usize..).unwrap_or_default();
        array
            .as_chunks::<{ STRIDE as usize }>()
            .0
            .iter()
            .take(self.count as usize)
            .filter_map(|lowering| lowering.first_chunk().map(|callee| u64::from_le_bytes(*callee)))
    }
}
