//! What a process is, from `/proc`.

use std::{fs, io};

/// Longest command name kept, bytes; the kernel's own limit is 16.
const MAX_COMMAND_BYTES: usize = 64;

/// Facts about a process that do not change while it runs one image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ProcessFacts {
    /// Command name; untrusted.
    pub command: String,
    /// When it started, nanoseconds of `CLOCK_BOOTTIME` (in steps of a clock tick, 10 ms).
    pub start_ns: u64,
}

/// Reads them.
pub fn facts(pid: u32) -> io::Result<ProcessFacts> {
    let stat = fs::read(format!("/proc/{pid}/stat"))?;
    let stat = String::from_utf8_lossy(&stat);
    // The name is in parentheses and may itself hold any byte, parentheses included: the last one ends it.
    let malformed = || io::Error::new(io::ErrorKind::InvalidData, "malformed /proc/PID/stat");
    let open = stat.find('(').ok_or_else(malformed)?;
    let close = stat.rfind(')').ok_or_else(malformed)?;
    let command = stat.get(open + 1..close).ok_or_else(malformed)?;
    // Field 22, counted from 1; the first field after the name is the third.
    let ticks: u64 = stat
        .get(close + 1..)
        .and_then(|rest| rest.split_ascii_whitespace().nth(22 - 3))
        .and_then(|field| field.parse().ok())
        .ok_or_else(malformed)?;
    let tick_ns = 1_000_000_000 / rustix::param::clock_ticks_per_second().max(1);
    Ok(ProcessFacts {
        command: command.chars().take(MAX_COMMAND_BYTES).collect(),
        start_ns: ticks.saturating_mul(tick_ns),
    })
}

/// Every process there is, by pid.
pub fn all_pids() -> io::Result<Vec<u32>> {
    Ok(fs::read_dir("/proc")?
        .filter_map(Result::ok)
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .collect())
}

/// Whether a process is still there. One whose main thread has ended lives on in its other threads.
pub fn is_alive(pid: u32) -> bool {
    fs::read_to_string(format!("/proc/{pid}/stat"))
        .ok()
        .and_then(|stat| {
            let close = stat.rfind(')')?;
            let mut fields = stat.get(close + 1..)?.split_ascii_whitespace();
            let state = fields.next()?;
            // Field 20, counted from 1; the state is the third.
            let thread_count: u64 = fields.nth(20 - 3 - 1)?.parse().ok()?;
            Some(!matches!(state, "Z" | "X") || thread_count > 1)
        })
        .unwrap_or(false)
}

/// The syscall that a thread waits in, and its first three arguments; `None` if it is running.
pub fn running_syscall(pid: u32, tid: u32) -> Option<(u64, [u64; 3])> {
    let text = fs::read_to_string(format!("/proc/{pid}/task/{tid}/syscall")).ok()?;
    let mut fields = text.split_ascii_whitespace();
    // -1 outside of a syscall.
    let number = fields.next()?.parse().ok()?;
    let mut arguments = [0; 3];
    for argument in &mut arguments {
        *argument = u64::from_str_radix(fields.next()?.strip_prefix("0x")?, 16).ok()?;
    }
    Some((number, arguments))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_test_itself_is_described() {
        let facts = facts(std::process::id()).unwrap();
        assert!(!facts.command.is_empty());
        assert!(facts.start_ns > 0);
        assert!(is_alive(std::process::id()));
    }

    #[test]
    fn a_thread_that_waits_is_in_its_syscall() {
        let (reader, writer) = std::io::pipe().unwrap();
        let (tell, told) = std::sync::mpsc::channel();
        let thread = std::thread::spawn(move || {
            tell.send(rustix::thread::gettid()).unwrap();
            std::io::Read::read(&mut &reader, &mut [0; 16]).unwrap()
        });
        let tid = told.recv().unwrap().as_raw_nonzero().get().unsigned_abs();
        let found = loop {
            match running_syscall(std::process::id(), tid) {
                Some((0, arguments)) => break arguments,
                _ => std::thread::yield_now(),
            }
        };
        assert_eq!(found[2], 16);
        drop(writer);
        assert_eq!(thread.join().unwrap(), 0);
    }

    #[test]
    fn a_process_that_does_not_exist_is_an_error() {
        assert!(facts(u32::MAX / 4).is_err());
        assert!(!is_alive(u32::MAX / 4));
    }
}
