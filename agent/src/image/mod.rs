//! Bounded views of binaries that nobody vouches for: wasmtime's code objects, host executables and libraries, machine code.
//!
//! Everything here is pure: bytes come in through [`ReadAt`], nothing is traced, mapped or executed, and no input makes it panic.

use std::{borrow::Cow, fmt::Write as _, fs::File, io, os::unix::fs::FileExt};

mod address_map;
mod block;
pub mod call_sites;
pub mod code_object;
mod component;
mod elf;
pub mod exchange;
pub mod gates;
pub mod host;
mod info;
mod limits;
mod lowerings;
pub mod prologue;
pub mod returns;
pub mod store_layout;
pub mod swap;
mod symbol_path;
mod symbols;
mod trap_table;
pub mod unwind_table;
pub mod vmcontext;

pub use code_object::{CodeObject, ImageError};
pub use host::HostImage;

/// Longest name kept from a traced process, bytes, the ellipsis of a cut one included.
pub const MAX_NAME_BYTES: usize = 256;

/// Bytes that can be read at any position: a file, a slice, a process's memory from the base of a mapping.
pub trait ReadAt {
    /// Reads up to `buffer.len()` bytes at `offset`; zero means the end, short reads are allowed.
    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<usize>;
}

/// Where the functions of a file are, as its symbols or its unwind table tell.
pub trait Functions {
    /// Size of the function that begins at a virtual address, bytes.
    fn function_size(&self, address: u64) -> Option<u64>;
    /// Where the byte at a virtual address is in the file.
    fn file_offset(&self, address: u64) -> Option<u64>;
}

impl Functions for HostImage {
    fn function_size(&self, address: u64) -> Option<u64> {
        Self::function_size(self, address)
    }

    fn file_offset(&self, address: u64) -> Option<u64> {
        Self::file_offset(self, address)
    }
}

impl ReadAt for [u8] {
    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<usize> {
        let rest = usize::try_from(offset)
            .ok()
            .and_then(|start| self.get(start..))
            .unwrap_or_default();
        let len = rest.len().min(buffer.len());
        buffer[..len].copy_from_slice(&rest[..len]);
        Ok(len)
    }
}

impl ReadAt for Vec<u8> {
    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<usize> {
        self.as_slice().read_at(offset, buffer)
    }
}

impl ReadAt for File {
    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<usize> {
        FileExt::read_at(self, buffer, offset)
    }
}

impl<R: ReadAt + ?Sized> ReadAt for &R {
    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<usize> {
        (**self).read_at(offset, buffer)
    }
}

/// Reads exactly `len` bytes. Memory grows with what was really read, so a length that a hostile header states costs nothing.
fn read_exact_at<R: ReadAt + ?Sized>(reader: &R, offset: u64, len: usize) -> io::Result<Vec<u8>> {
    const CHUNK_BYTES: usize = 1 << 20;
    let mut bytes = Vec::new();
    while bytes.len() < len {
        let filled = bytes.len();
        bytes.resize(len.min(filled + CHUNK_BYTES), 0);
        let position = offset
            .checked_add(filled as u64)
            .ok_or_else(|| io::Error::from(io::ErrorKind::InvalidInput))?;
        match reader.read_at(position, &mut bytes[filled..]) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(read) => bytes.truncate(filled + read),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => bytes.truncate(filled),
            Err(error) => return Err(error),
        }
    }
    Ok(bytes)
}

/// A name fit to be kept: at most [`MAX_NAME_BYTES`], cut on a character with `…`, invalid UTF-8 replaced.
///
/// Control characters stay: escaping is the business of each output.
pub fn bounded_name(bytes: &[u8]) -> Cow<'_, str> {
    const ELLIPSIS: char = '…';
    // A replacement is at most three times as long as what it replaces, so what is beyond the bound cannot matter.
    let cut = bytes.len() > MAX_NAME_BYTES;
    let name = String::from_utf8_lossy(&bytes[..bytes.len().min(MAX_NAME_BYTES)]);
    if !cut && name.len() <= MAX_NAME_BYTES {
        return name;
    }
    let mut end = MAX_NAME_BYTES - ELLIPSIS.len_utf8();
    end = end.min(name.len());
    while !name.is_char_boundary(end) {
        end -= 1;
    }
    let mut name = name.into_owned();
    name.truncate(end);
    name.push(ELLIPSIS);
    Cow::Owned(name)
}

/// The terminated string at `offset` of a string table, without its terminator; `None` outside the table.
fn string_at(table: &[u8], offset: u32) -> Option<&[u8]> {
    let rest = table.get(usize::try_from(offset).ok()?..)?;
    Some(&rest[..memchr::memchr(0, rest).unwrap_or(rest.len())])
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut text, byte| {
        // Writing to a string cannot fail.
        let _ = write!(text, "{byte:02x}");
        text
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_short_name_is_kept_as_it_is() {
        assert_eq!(bounded_name("fd_wrïte".as_bytes()), "fd_wrïte");
    }

    #[test]
    fn a_long_name_is_cut_on_a_character_and_marked() {
        let name = bounded_name("é".repeat(200).as_bytes()).into_owned();
        assert!(name.len() <= MAX_NAME_BYTES && name.ends_with("é…"), "{name}");
    }

    #[test]
    fn invalid_utf8_is_replaced_within_the_bound() {
        assert_eq!(bounded_name(b"a\xffb"), "a\u{fffd}b");
        assert!(bounded_name(&[0xff; 250]).len() <= MAX_NAME_BYTES);
    }

    #[test]
    fn a_name_cut_inside_a_character_does_not_end_in_a_replacement() {
        let mut bytes = vec![b'x'; MAX_NAME_BYTES - 1];
        bytes.extend_from_slice("é!".as_bytes());
        assert!(!bounded_name(&bytes).contains('\u{fffd}'));
    }

    #[test]
    fn a_length_beyond_the_end_is_an_error() {
        let error = read_exact_at(&[1u8, 2, 3][..], 1, usize::MAX).expect_err("there are two bytes");
        assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
    }
}
