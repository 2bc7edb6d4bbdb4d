//! Names of syscalls and errors.

use syscalls::Sysno;

/// Name of a syscall of the architecture this was built for, or `syscall_<n>`.
pub fn name(number: u64) -> String {
    usize::try_from(number)
        .ok()
        .and_then(Sysno::new)
        .map_or_else(|| format!("syscall_{number}"), |known| known.name().to_owned())
}

/// The error a result stands for.
pub fn errno(result: i64) -> Option<u16> {
    // The kernel's range of error values.
    (-4095..0).contains(&result).then(|| result.unsigned_abs() as u16)
}

/// The first three arguments of a call and its result without those that are addresses, or may be: these are 0. Where a process has its memory is nobody's
/// business who reads traces, and of use to whoever attacks it.
pub fn without_addresses(name: &str, arguments: [u64; 3], result: i64) -> ([u64; 3], i64) {
    let is_kept = match name {
        "close" | "close_range" | "dup" | "dup2" | "dup3" | "epoll_create" | "epoll_create1" | "epoll_ctl"
        | "eventfd" | "eventfd2" | "exit" | "exit_group" | "fadvise64" | "fallocate" | "fchdir" | "fchmod"
        | "fchown" | "fdatasync" | "flock" | "fsync" | "ftruncate" | "getsockopt" | "kill" | "listen" | "lseek"
        | "pidfd_open" | "readahead" | "setsockopt" | "shutdown" | "socket" | "sync_file_range" | "syncfs" | "tee"
        | "tgkill" | "timerfd_create" | "tkill" => [true, true, true],
        "read" | "write" | "pread64" | "pwrite64" | "readv" | "writev" | "preadv" | "pwritev" | "preadv2"
        | "pwritev2" | "recvfrom" | "sendto" | "recvmsg" | "sendmsg" | "recvmmsg" | "sendmmsg" | "getdents64"
        | "bind" | "connect" | "epoll_wait" | "epoll_pwait" | "epoll_pwait2" | "openat" | "unlinkat" | "mkdirat"
        | "faccessat" | "faccessat2" | "statx" | "renameat" | "renameat2" | "linkat" | "splice" | "copy_file_range" => {
            [true, false, true]
        }
        "accept" | "accept4" | "getsockname" | "getpeername" | "fstat" | "fstatfs" | "fgetxattr" | "openat2"
        | "newfstatat" | "fstatat" | "readlinkat" | "utimensat" | "clock_gettime" | "clock_getres" => {
            [true, false, false]
        }
        "fcntl" | "ioctl" | "timerfd_settime" | "sendfile" | "clock_nanosleep" => [true, true, false],
        "open" | "poll" | "mmap" | "mprotect" | "madvise" | "mremap" | "msync" | "getrandom" | "futex" => {
            [false, true, true]
        }
        "munmap" | "ppoll" | "memfd_create" => [false, true, false],
        _ => [false; 3],
    };
    let mut kept = arguments;
    for (argument, is_kept) in kept.iter_mut().zip(is_kept) {
        if !is_kept {
            *argument = 0;
        }
    }
    let is_address = matches!(name, "mmap" | "mremap" | "brk" | "shmat") && errno(result).is_none();
    (kept, if is_address { 0 } else { result })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_and_unknown_numbers_have_names() {
        assert_eq!(name(libc::SYS_openat as u64), "openat");
        assert_eq!(name(99_999), "syscall_99999");
    }

    #[test]
    fn only_the_kernels_error_range_is_an_error() {
        assert_eq!(errno(-2), Some(2));
        assert_eq!(errno(0), None);
        assert_eq!(errno(-4096), None);
    }

    #[test]
    fn addresses_do_not_pass_and_numbers_and_errors_do() {
        let arguments = [3, 0x7fff_dead_beef, 64];
        assert_eq!(without_addresses("read", arguments, 64), ([3, 0, 64], 64));
        assert_eq!(
            without_addresses("mmap", [0, 4_096, 3], 0x7f00_0000_0000),
            ([0, 4_096, 3], 0)
        );
        assert_eq!(without_addresses("mmap", [0x7000, 4_096, 3], -12), ([0, 4_096, 3], -12));
        assert_eq!(without_addresses("syscall_999", arguments, -14), ([0; 3], -14));
    }
}
