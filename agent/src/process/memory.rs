//! Reading, and only ever reading, the memory of another process.

use std::{fs::File, io, os::unix::fs::FileExt as _, path::PathBuf};

/// The memory of one process.
#[derive(Debug)]
pub struct ProcessMemory {
    file: File,
}

impl ProcessMemory {
    /// Opens it. Fails when the process is gone or may not be inspected.
    pub fn open(pid: u32) -> io::Result<Self> {
        Ok(Self {
            file: File::open(PathBuf::from(format!("/proc/{pid}/mem")))?,
        })
    }

    /// Reads up to `buffer.len()` bytes at `address`; fewer when the mapping ends.
    pub fn read(&self, address: u64, buffer: &mut [u8]) -> io::Result<usize> {
        self.file.read_at(buffer, address)
    }

    /// Reads exactly `N` bytes.
    pub fn read_array<const N: usize>(&self, address: u64) -> io::Result<[u8; N]> {
        let mut bytes = [0; N];
        self.file.read_exact_at(&mut bytes, address)?;
        Ok(bytes)
    }
}
