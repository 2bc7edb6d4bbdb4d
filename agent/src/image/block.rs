//! How wasmtime writes tables about offsets of the text, since version 47: in blocks of entries of variable length, found through an
//! index (wasmtime-environ 48: `address_map.rs`, `trap_encoding.rs`).

/// Entries of one block.
pub(super) const BLOCK_ENTRIES: usize = 128;

/// The block that has the entry for an offset, if there is one.
pub(super) struct Block<'a> {
    /// What has not been taken yet.
    pub(super) body: &'a [u8],
    /// The offset that the first entry's distance counts from.
    pub(super) first_offset: u32,
    /// Entries in it.
    pub(super) entry_count: usize,
}

impl<'a> Block<'a> {
    /// Counts of entries and blocks, an index of (first offset, position), the blocks.
    pub(super) fn find(bytes: &'a [u8], text_offset: u32) -> Option<Self> {
        let entry_count = word(bytes, 0)? as usize;
        let block_count = word(bytes, 4)? as usize;
        let bodies_at = 8usize.checked_add(block_count.checked_mul(8)?)?;
        let (index, _) = bytes.get(8..bodies_at)?.as_chunks::<8>();
        let first_offset = |entry: &[u8; 8]| u32::from_le_bytes([entry[0], entry[1], entry[2], entry[3]]);
        let block = index
            .partition_point(|entry| first_offset(entry) <= text_offset)
            .checked_sub(1)?;
        let body_at = u32::from_le_bytes(*index.get(block)?.last_chunk()?) as usize;
        Some(Self {
            body: bytes.get(bodies_at.checked_add(body_at)?..)?,
            first_offset: first_offset(&index[block]),
            entry_count: BLOCK_ENTRIES.min(entry_count.checked_sub(block * BLOCK_ENTRIES)?),
        })
    }

    /// A byte.
    pub(super) fn byte(&mut self) -> Option<u8> {
        let (first, rest) = self.body.split_first()?;
        self.body = rest;
        Some(*first)
    }

    /// An unsigned LEB128 number.
    pub(super) fn unsigned(&mut self) -> Option<u64> {
        let mut value = 0;
        for shift in (0..64).step_by(7) {
            let byte = self.byte()?;
            value |= u64::from(byte & 0x7f) << shift;
            if byte & 0x80 == 0 {
                return Some(value);
            }
        }
        None
    }

    /// A signed LEB128 number.
    pub(super) fn signed(&mut self) -> Option<i64> {
        let mut value = 0;
        for shift in (0..63).step_by(7) {
            let byte = self.byte()?;
            value |= i64::from(byte & 0x7f) << shift;
            if byte & 0x80 == 0 {
                let unused = 64 - (shift + 7);
                return Some((value << unused) >> unused);
            }
        }
        None
    }
}

/// The little-endian word at a position.
pub(super) fn word(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(*bytes.get(at..)?.first_chunk()?))
}
