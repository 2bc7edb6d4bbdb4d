//! Syscalls that count themselves: each function makes exactly one, of the kind that its counter is named after.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::time::Duration;

use rustix::fs::{CWD, Mode, OFlags};
use rustix::io::Result;
use rustix::thread::{NanosleepRelativeResult, Timespec};

use crate::counts::{Counter, HostCall};

/// The counters of one host function's syscalls, looked up before it runs.
#[derive(Clone, Debug)]
pub struct Syscalls {
    write: Counter,
    openat: Counter,
    pread64: Counter,
    close: Counter,
    nanosleep: Counter,
}

impl Syscalls {
    /// Those made by `host_call`.
    pub fn of(host_call: &HostCall) -> Self {
        Self {
            write: host_call.syscall("write"),
            openat: host_call.syscall("openat"),
            pread64: host_call.syscall("pread64"),
            close: host_call.syscall("close"),
            nanosleep: host_call.syscall("nanosleep"),
        }
    }

    /// One `write`; returns the bytes written.
    pub fn write(&self, file: impl AsFd, bytes: &[u8]) -> Result<usize> {
        self.write.add_one();
        rustix::io::write(file, bytes)
    }

    /// One `write` of what `line` makes, after counting it: the line may tell the count.
    pub fn write_counted(
        &self,
        file: impl AsFd,
        line: impl FnOnce() -> wasmtime::Result<Vec<u8>>,
    ) -> wasmtime::Result<usize> {
        self.write.add_one();
        Ok(rustix::io::write(file, &line()?)?)
    }

    /// One `openat`, for reading.
    pub fn open(&self, path: &Path) -> Result<OwnedFd> {
        self.openat.add_one();
        // Not `open`, which is another syscall where the architecture has it.
        rustix::fs::openat(CWD, path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())
    }

    /// One `pread64` from the start of `file`; returns the bytes read.
    pub fn read_start(&self, file: BorrowedFd<'_>, buffer: &mut [u8]) -> Result<usize> {
        self.pread64.add_one();
        rustix::io::pread(file, buffer, 0)
    }

    /// One `close`.
    pub fn close(&self, file: OwnedFd) {
        self.close.add_one();
        drop(file);
    }

    /// `nanosleep` until `duration` has passed: one, and another for every signal that interrupts it.
    pub fn sleep(&self, duration: Duration) -> Result<()> {
        let mut rest = Timespec {
            tv_sec: duration.as_secs() as i64,
            tv_nsec: i64::from(duration.subsec_nanos()),
        };
        loop {
            self.nanosleep.add_one();
            match rustix::thread::nanosleep(&rest) {
                NanosleepRelativeResult::Ok => return Ok(()),
                NanosleepRelativeResult::Interrupted(left) => rest = left,
                NanosleepRelativeResult::Err(error) => return Err(error),
            }
        }
    }
}
