//! The mappings of a process, and the wasm code objects among them.

use std::{
    fs::File,
    io::{self, BufRead, BufReader, Read as _},
    ops::Range,
    path::PathBuf,
};

use super::memory::ProcessMemory;

/// Bytes read of one process's list of mappings: about 100,000 of them.
const MAX_MAPS_BYTES: u64 = 8 << 20;
/// wasmtime's code objects: ELF magic, 64-bit, little-endian, version 1, OS/ABI 200.
const CODE_OBJECT_MAGIC: [u8; 8] = [0x7f, b'E', b'L', b'F', 2, 1, 1, 200];
/// The header page of a code object precedes its executable range.
const PAGE_BYTES: u64 = 4096;

/// One executable mapping.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExecutableMapping {
    /// Addresses.
    pub range: Range<u64>,
    /// Offset in the file, bytes.
    pub file_offset: u64,
    /// Device and inode of the file; `None` for anonymous memory.
    pub file: Option<(String, u64)>,
    /// Path as the kernel prints it, in the process's mount namespace; untrusted.
    pub path: Option<String>,
}

/// Lists the executable mappings of a process.
pub fn executable_mappings(pid: u32) -> io::Result<Vec<ExecutableMapping>> {
    Ok(sized_mappings(pid)?.0)
}

/// As [`executable_mappings`], with the bytes that the list of all mappings has.
pub fn sized_mappings(pid: u32) -> io::Result<(Vec<ExecutableMapping>, u64)> {
    let file = File::open(PathBuf::from(format!("/proc/{pid}/maps")))?;
    let mut limited = file.take(MAX_MAPS_BYTES);
    let mappings = parse(BufReader::new(&mut limited))?;
    Ok((mappings, MAX_MAPS_BYTES - limited.limit()))
}

fn parse(reader: impl BufRead) -> io::Result<Vec<ExecutableMapping>> {
    // Lines are bytes: paths need not be UTF-8.
    reader
        .split(b'\n')
        .map(|line| line.map(|line| parse_line(&String::from_utf8_lossy(&line))))
        .filter_map(Result::transpose)
        .collect()
}

/// `start-end perms offset device inode path`, where only the path may hold spaces.
fn parse_line(line: &str) -> Option<ExecutableMapping> {
    let mut rest = line;
    let mut field = || {
        let trimmed = rest.trim_start_matches(' ');
        let (first, after) = trimmed.split_once(' ').unwrap_or((trimmed, ""));
        rest = after;
        first
    };
    let (range, permissions, offset, device, inode) = (field(), field(), field(), field(), field());
    if permissions.as_bytes().get(2) != Some(&b'x') {
        return None;
    }
    let (start, end) = range.split_once('-')?;
    let hex = |digits| u64::from_str_radix(digits, 16).ok();
    let inode: u64 = inode.parse().ok()?;
    let path = rest.trim_start_matches(' ');
    Some(ExecutableMapping {
        range: hex(start)?..hex(end)?,
        file_offset: hex(offset)?,
        file: (inode != 0).then(|| (device.to_owned(), inode)),
        path: (!path.is_empty()).then(|| path.to_owned()),
    })
}

/// The executable ranges of wasm code objects among `mappings`.
pub fn code_objects(mappings: &[ExecutableMapping], memory: &ProcessMemory) -> Vec<ExecutableMapping> {
    mappings
        .iter()
        .filter(|mapping| {
            let header = mapping.range.start.checked_sub(PAGE_BYTES);
            header.is_some_and(|header| memory.read_array(header).is_ok_and(|magic| magic == CODE_OBJECT_MAGIC))
        })
        .cloned()
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn executable_mappings_are_kept_and_others_are_not() {
        let text = b"7f0000000000-7f0000001000 r--p 00000000 00:00 0 \n\
            7f0000001000-7f0000003000 r-xp 00000000 00:00 0 \n\
            55d0c0000000-55d0c0100000 r-xp 00001000 fe:00 1234                       /opt/a b (deleted)\n";
        let found = parse(&text[..]).unwrap();
        assert_eq!(found.len(), 2);
        assert_eq!(found[0].range, 0x7f00_0000_1000..0x7f00_0000_3000);
        assert_eq!(found[0].file, None);
        assert_eq!(found[1].file, Some(("fe:00".to_owned(), 1234)));
        assert_eq!(found[1].path.as_deref(), Some("/opt/a b (deleted)"));
    }

    #[test]
    fn lines_that_make_no_sense_are_passed_over() {
        assert_eq!(
            parse(&b"\xff\xfe nonsense\n\n- r-xp\nzz-1 r-xp 0 0 0\n"[..]).unwrap(),
            []
        );
    }

    #[test]
    fn the_test_itself_has_executable_mappings() {
        assert!(!executable_mappings(std::process::id()).unwrap().is_empty());
    }
}
