//! Where the functions of a host begin and end, from the table that exceptions are thrown by: it is loaded with the
//! program, so stripping leaves it.

use object::elf;

use super::{
    Functions, ReadAt,
    elf::{E, Elf, ElfError, check_bound},
    host::{HostImage, LoadSegment},
    read_exact_at,
};

/// Functions listed; wasmtime's own command has 120,000.
const MAX_ENTRIES: u64 = 4 << 20;
/// What every linker writes: version 1, encodings `pcrel sdata4`, `udata4`, `datarel sdata4`.
const HEADER: [u8; 4] = [1, 0x1b, 0x03, 0x3b];
const HEADER_BYTES: u64 = 12;
const ENTRY_BYTES: u64 = 8;
/// Length, the distance to what entries have in common, begin, length of the function; four bytes each.
const FRAME_BYTES: usize = 16;

/// The functions of one file by address (`.eh_frame_hdr`).
#[derive(Debug)]
pub struct UnwindTable {
    /// Start of the table in memory, which its entries are relative to.
    address: u64,
    /// Function and its frame description, relative to `address`; by function.
    entries: Vec<(i32, i32)>,
    loads: Vec<LoadSegment>,
}

/// One function.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Extent {
    /// Virtual address in the file's own numbering.
    pub address: u64,
    /// Length, bytes.
    pub size: u64,
    /// Where its first byte is in the file.
    pub file_offset: u64,
}

impl UnwindTable {
    /// Reads the table of a file, `image` being the same file.
    pub fn read<R: ReadAt + ?Sized>(reader: &R, image: &HostImage) -> Result<Self, ElfError> {
        let headers = Elf::read(reader)?.program_headers(reader)?;
        let table = headers
            .iter()
            .find(|header| header.p_type.get(E) == elf::PT_GNU_EH_FRAME)
            .ok_or(ElfError::Malformed("no table of functions"))?;
        let (address, offset) = (table.p_vaddr.get(E), table.p_offset.get(E));
        let header = read_exact_at(reader, offset, HEADER_BYTES as usize)?;
        if header[..4] != HEADER {
            return Err(ElfError::Malformed("table of functions"));
        }
        let count = u64::from(word(&header, 8).unwrap_or(0));
        check_bound("function count", count, MAX_ENTRIES)?;
        let entries_at = offset
            .checked_add(HEADER_BYTES)
            .ok_or(ElfError::Malformed("table of functions"))?;
        let bytes = read_exact_at(reader, entries_at, (count * ENTRY_BYTES) as usize)?;
        let entries: Vec<_> = bytes
            .as_chunks::<8>()
            .0
            .iter()
            .filter_map(|entry| Some((word(entry, 0)? as i32, word(entry, 4)? as i32)))
            .collect();
        if !entries.is_sorted_by_key(|(function, _)| *function) {
            return Err(ElfError::Malformed("order of the table of functions"));
        }
        Ok(Self {
            address,
            entries,
            loads: image.loads.clone(),
        })
    }

    /// The function that `address` lies in.
    pub fn function_at<R: ReadAt + ?Sized>(&self, reader: &R, address: u64) -> Option<Extent> {
        let relative = i32::try_from(i128::from(address) - i128::from(self.address)).ok()?;
        let next = self.entries.partition_point(|(function, _)| *function <= relative);
        let (function, frame) = *self.entries.get(next.checked_sub(1)?)?;
        let start = self.address.checked_add_signed(i64::from(function))?;
        let frame = self.address.checked_add_signed(i64::from(frame))?;
        let bytes = read_exact_at(reader, self.file_offset(frame)?, FRAME_BYTES).ok()?;
        // Written another way than everybody does, this is another address.
        let begin = frame
            .checked_add(8)?
            .checked_add_signed(i64::from(word(&bytes, 8)? as i32))?;
        let size = u64::from(word(&bytes, 12)?);
        (begin == start && address - start < size).then_some(())?;
        Some(Extent {
            address: start,
            size,
            file_offset: self.executable_offset(start, size)?,
        })
    }

    /// The function that begins with the byte at `file_offset`.
    pub fn function_from<R: ReadAt + ?Sized>(&self, reader: &R, file_offset: u64) -> Option<Extent> {
        let address = self.loads.iter().filter(|load| load.is_executable).find_map(|load| {
            let offset = file_offset.checked_sub(load.file_offset)?;
            (offset < load.file_bytes).then(|| load.address.checked_add(offset))?
        })?;
        self.function_at(reader, address)
            .filter(|function| function.file_offset == file_offset)
    }

    /// The functions of the table, `file` being that which it was read from.
    pub fn functions<'a>(&'a self, file: &'a dyn ReadAt) -> impl Functions {
        TableAndFile { table: self, file }
    }

    fn file_offset(&self, address: u64) -> Option<u64> {
        self.loads.iter().find_map(|load| {
            let offset = address.checked_sub(load.address)?;
            (offset < load.file_bytes).then(|| load.file_offset.checked_add(offset))?
        })
    }

    fn executable_offset(&self, address: u64, size: u64) -> Option<u64> {
        self.loads.iter().filter(|load| load.is_executable).find_map(|load| {
            let offset = address.checked_sub(load.address)?;
            let fits = offset < load.file_bytes && size <= load.file_bytes - offset;
            fits.then(|| load.file_offset.checked_add(offset))?
        })
    }
}

/// The table has where functions begin, the file how long they are.
struct TableAndFile<'a> {
    table: &'a UnwindTable,
    file: &'a dyn ReadAt,
}

impl Functions for TableAndFile<'_> {
    fn function_size(&self, address: u64) -> Option<u64> {
        let function = self.table.function_at(self.file, address)?;
        (function.address == address).then_some(function.size)
    }

    fn file_offset(&self, address: u64) -> Option<u64> {
        self.table.file_offset(address)
    }
}

fn word(bytes: &[u8], at: usize) -> Option<u32> {
    bytes.get(at..at + 4)?.try_into().ok().map(u32::from_le_bytes)
}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use super::*;

    fn own() -> (File, HostImage) {
        let file = File::open("/proc/self/exe").unwrap();
        let image = HostImage::read(&file).unwrap();
        (file, image)
    }

    #[test]
    fn every_function_of_this_program_begins_and_ends_somewhere() {
        let (file, image) = own();
        let table = UnwindTable::read(&file, &image).unwrap();
        assert!(table.entries.len() > 1000);
        let mut last_end = 0;
        for (start, _) in table.entries.iter().step_by(97) {
            let start = table.address.checked_add_signed(i64::from(*start)).unwrap();
            let function = table.function_at(&file, start).unwrap();
            assert_eq!(function.address, start);
            assert!(function.size > 0 && start >= last_end, "{function:?}");
            last_end = start + function.size;
            assert_eq!(table.function_at(&file, last_end - 1), Some(function));
            assert_eq!(table.function_from(&file, function.file_offset), Some(function));
            // Of one byte only, the next may begin there.
            assert!(function.size == 1 || table.function_from(&file, function.file_offset + 1).is_none());
        }
    }

    proptest::proptest! {
        #[test]
        fn no_table_makes_it_panic(
            address: u64,
            entries in proptest::collection::vec((-64i32..64, proptest::num::i32::ANY), 0..8),
            load_address: u64,
            file_offset in 0u64..128,
            bytes in proptest::collection::vec(0u8.., 0..128),
            asked: u64,
        ) {
            let loads = vec![LoadSegment { address: load_address, file_offset, file_bytes: 64, is_executable: true }];
            let mut entries = entries;
            entries.sort_unstable();
            let table = UnwindTable { address, entries, loads };
            table.function_at(&bytes, asked);
            table.function_at(&bytes, address.wrapping_add(asked % 64));
            table.function_from(&bytes, asked % 256);
        }
    }
}
