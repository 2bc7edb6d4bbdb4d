//! `.wasmtime.addrmap`: from which byte of the wasm binary a machine instruction was compiled.
//!
//! Unlike the trap table, an entry holds up to the next one. Written unless the embedder turned
//! `Config::generate_address_map` off.

use super::block::{Block, word};

/// Up to wasmtime 46: code that does not come from the guest.
const NOWHERE: u32 = u32::MAX;

/// The section's bytes and how to read them.
#[derive(PartialEq)]
pub(super) struct AddressMap {
    bytes: Vec<u8>,
    major: u32,
}

impl AddressMap {
    /// `major` is a version of wasmtime whose format is known.
    pub(super) fn new(bytes: Vec<u8>, major: u32) -> Self {
        Self { bytes, major }
    }

    /// Bytes.
    pub(super) fn len(&self) -> usize {
        self.bytes.len()
    }

    /// The wasm offset of the instruction at or around this offset of the text.
    pub(super) fn lookup(&self, text_offset: u64) -> Option<u32> {
        let text_offset = u32::try_from(text_offset).ok()?;
        if self.major >= 47 {
            self.lookup_in_blocks(text_offset)
        } else {
            self.lookup_flat(text_offset)
        }
    }

    /// Up to wasmtime 46: count, that many sorted offsets of the text, that many wasm offsets.
    fn lookup_flat(&self, text_offset: u32) -> Option<u32> {
        let count = word(&self.bytes, 0)? as usize;
        let offsets_end = 4usize.checked_add(count.checked_mul(4)?)?;
        let (offsets, _) = self.bytes.get(4..offsets_end)?.as_chunks::<4>();
        let index = offsets
            .partition_point(|bytes| u32::from_le_bytes(*bytes) <= text_offset)
            .checked_sub(1)?;
        word(&self.bytes, offsets_end + 4 * index).filter(|position| *position != NOWHERE)
    }

    /// Since wasmtime 47: blocks of variable-length tokens (distance << 1 | "comes from nowhere"), each but the latter followed by a position: the first of a block as
    /// it is, the others as signed distances.
    fn lookup_in_blocks(&self, text_offset: u32) -> Option<u32> {
        let mut block = Block::find(&self.bytes, text_offset)?;
        let mut offset = block.first_offset;
        let mut last_position: Option<u32> = None;
        let mut found = None;
        for _ in 0..block.entry_count {
            let token = block.unsigned()?;
            offset = offset.checked_add(u32::try_from(token >> 1).ok()?)?;
            let position = if token & 1 != 0 {
                None
            } else {
                let position = match last_position {
                    None => u32::try_from(block.unsigned()?).ok()?,
                    Some(last) => last.checked_add_signed(i32::try_from(block.signed()?).ok()?)?,
                };
                last_position = Some(position);
                Some(position)
            };
            if offset > text_offset {
                break;
            }
            found = position;
        }
        found
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::block::BLOCK_ENTRIES;

    /// As wasmtime 47 and later write it: 300 entries, every third from nowhere, positions that rise and fall.
    fn blocks() -> (AddressMap, Vec<(u32, Option<u32>)>) {
        fn uleb(mut value: u64, to: &mut Vec<u8>) {
            while value >= 0x80 {
                to.push(value as u8 | 0x80);
                value >>= 7;
            }
            to.push(value as u8);
        }
        fn sleb(mut value: i64, to: &mut Vec<u8>) {
            loop {
                let byte = value as u8 & 0x7f;
                value >>= 7;
                if (value == 0 && byte & 0x40 == 0) || (value == -1 && byte & 0x40 != 0) {
                    return to.push(byte);
                }
                to.push(byte | 0x80);
            }
        }
        let entries: Vec<(u32, Option<u32>)> = (0..300)
            .map(|i| {
                let position = match i % 3 {
                    0 => None,
                    1 => Some(20_000 + i),
                    _ => Some(20_000 - i),
                };
                (100 + i * 3, position)
            })
            .collect();
        let (mut index, mut bodies) = (Vec::new(), Vec::new());
        for block in entries.chunks(BLOCK_ENTRIES) {
            index.extend(block[0].0.to_le_bytes());
            index.extend((bodies.len() as u32).to_le_bytes());
            let (mut offset, mut last) = (block[0].0, None);
            for (at, position) in block {
                uleb(u64::from(at - offset) << 1 | u64::from(position.is_none()), &mut bodies);
                offset = *at;
                match (position, last) {
                    (None, _) => continue,
                    (Some(position), None) => uleb(u64::from(*position), &mut bodies),
                    (Some(position), Some(last)) => sleb(i64::from(*position) - i64::from(last), &mut bodies),
                }
                last = *position;
            }
        }
        let mut bytes = 300_u32.to_le_bytes().to_vec();
        bytes.extend(3_u32.to_le_bytes());
        bytes.append(&mut index);
        bytes.append(&mut bodies);
        (AddressMap::new(bytes, 48), entries)
    }

    #[test]
    fn an_entry_holds_until_the_next_one() {
        let (map, entries) = blocks();
        assert_eq!(map.lookup(99), None);
        for (offset, position) in entries {
            for inside in 0..3 {
                assert_eq!(map.lookup(u64::from(offset + inside)), position, "{offset}+{inside}");
            }
        }
        let mut flat = 2_u32.to_le_bytes().to_vec();
        for number in [10, 20, 7, NOWHERE] {
            flat.extend(number.to_le_bytes());
        }
        let map = AddressMap::new(flat, 46);
        assert_eq!(
            [9, 10, 19, 20, 21].map(|offset| map.lookup(offset)),
            [None, Some(7), Some(7), None, None]
        );
    }

    proptest::proptest! {
        #[test]
        fn any_bytes_are_a_map(bytes in proptest::collection::vec(proptest::prelude::any::<u8>(), 0..200), offset in 0..5_000_u64) {
            for major in [46, 48] {
                let _ = AddressMap::new(bytes.clone(), major).lookup(offset);
            }
        }

        #[test]
        fn a_cut_map_is_no_trap(length in 0..900_usize, offset in 0..1_200_u64) {
            let (mut map, _) = blocks();
            map.bytes.truncate(length);
            let _ = map.lookup(offset);
        }
    }
}
