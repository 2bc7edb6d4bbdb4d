//! Syscalls for people: the arguments that mean something without the memory they point to, results, names of errors.
//!
//! Only numbers are known of a call. Values are the same on x86-64 and arm64 unless a comment says so.

use syscalls::Errno;

use super::label::{bytes, counted, grouped};

/// Arguments of one call, or what several have in common: `None` where they differ.
pub(super) type Args = [Option<u64>; 3];

/// `fd 9, 4,096 B`; empty when nothing about the arguments means something.
pub(super) fn arguments(name: &str, args: Args) -> String {
    let [first, second, third] = args;
    let fd = |value: Option<u64>| value.map(descriptor);
    let size = |value: Option<u64>| value.map(bytes);
    let parts: Vec<Option<String>> = match name {
        "read" | "write" | "pread64" | "pwrite64" | "recvfrom" | "sendto" | "getdents64" => {
            vec![fd(first), size(third)]
        }
        "readv" | "writev" | "preadv" | "pwritev" | "preadv2" | "pwritev2" => {
            vec![fd(first), third.map(|count| counted(count, "buffer"))]
        }
        "close" | "fstat" | "fsync" | "fdatasync" | "fchdir" | "syncfs" | "flock" | "fchmod" | "fchown" | "dup"
        | "dup2" | "dup3" | "accept" | "accept4" | "listen" | "connect" | "bind" | "recvmsg" | "sendmsg"
        | "recvmmsg" | "sendmmsg" | "getsockname" | "getpeername" | "shutdown" | "setsockopt" | "getsockopt"
        | "fadvise64" | "ioctl" | "timerfd_settime" | "fgetxattr" | "fstatfs" => vec![fd(first)],
        "openat" => vec![directory(first), third.map(open_flags)],
        "openat2" | "newfstatat" | "fstatat" | "statx" | "unlinkat" | "mkdirat" | "readlinkat" | "faccessat"
        | "faccessat2" | "renameat" | "renameat2" | "linkat" | "utimensat" => vec![directory(first)],
        "open" => vec![second.map(open_flags)],
        "lseek" => vec![
            fd(first),
            match (second, third) {
                (Some(offset), Some(0)) => Some(format!("to {}", grouped(offset))),
                (Some(offset), Some(1)) => Some(format!("by {}", offset as i64)),
                (_, Some(2)) => Some("from the end".into()),
                _ => None,
            },
        ],
        "ftruncate" => vec![fd(first), size(second)],
        "fcntl" => vec![fd(first), second.map(|command| fcntl_command(command).into())],
        "mmap" | "mprotect" => vec![size(second), third.map(protection)],
        "munmap" | "mremap" | "msync" | "getrandom" => vec![size(second)],
        "madvise" => vec![size(second), third.map(|advice| advice_word(advice).into())],
        "futex" => vec![second.map(|operation| futex_word(operation).into())],
        "epoll_ctl" => vec![
            fd(first),
            second.map(|operation| epoll_word(operation).into()),
            fd(third),
        ],
        "epoll_wait" | "epoll_pwait" | "epoll_pwait2" => {
            vec![fd(first), third.map(|count| format!("at most {}", grouped(count)))]
        }
        "poll" | "ppoll" => vec![second.map(|count| counted(count, "fd"))],
        "sendfile" | "splice" | "tee" => {
            vec![fd(first).map(|fd| format!("{} {fd}", if name == "sendfile" { "to" } else { "from" }))]
        }
        "clock_gettime" | "clock_nanosleep" | "clock_getres" => vec![first.map(|clock| clock_word(clock).into())],
        "socket" => vec![first.map(|family| family_word(family).into())],
        "kill" => vec![
            first.map(|pid| format!("pid {}", pid as i32)),
            second.map(|signal| format!("signal {signal}")),
        ],
        "tgkill" => vec![
            second.map(|tid| format!("thread {}", tid as i32)),
            third.map(|signal| format!("signal {signal}")),
        ],
        "exit" | "exit_group" => vec![first.map(|status| format!("status {}", status as i32))],
        _ => Vec::new(),
    };
    parts.into_iter().flatten().collect::<Vec<_>>().join(", ")
}

/// What a successful call returned, if that says something: `4,096 B`, `fd 9`, `2 ready`.
pub(super) fn result(name: &str, value: i64) -> Option<String> {
    let count = u64::try_from(value).ok()?;
    match name {
        _ if moves_bytes(name) => Some(bytes(count)),
        "open" | "openat" | "openat2" | "socket" | "accept" | "accept4" | "dup" | "dup2" | "dup3" | "epoll_create"
        | "epoll_create1" | "eventfd" | "eventfd2" | "timerfd_create" | "memfd_create" | "pidfd_open" => {
            Some(descriptor(count))
        }
        "epoll_wait" | "epoll_pwait" | "epoll_pwait2" | "poll" | "ppoll" | "select" | "pselect6" => {
            Some(if count == 0 {
                "timed out".into()
            } else {
                format!("{} ready", grouped(count))
            })
        }
        "lseek" => Some(format!("at {}", grouped(count))),
        "futex" if count > 0 => Some(format!("{} woken", grouped(count))),
        // Addresses.
        "mmap" | "mremap" | "brk" => None,
        _ if count == 0 => None,
        _ => Some(grouped(count)),
    }
}

/// Its result is a number of bytes.
pub(super) fn moves_bytes(name: &str) -> bool {
    matches!(
        name,
        "read"
            | "write"
            | "readv"
            | "writev"
            | "pread64"
            | "pwrite64"
            | "preadv"
            | "pwritev"
            | "preadv2"
            | "pwritev2"
            | "recvfrom"
            | "sendto"
            | "recvmsg"
            | "sendmsg"
            | "sendfile"
            | "splice"
            | "tee"
            | "copy_file_range"
            | "getrandom"
            | "getdents64"
    )
}

/// `-ENOENT`, as tracers write it; the number where it has no name.
pub(super) fn error(errno: u16) -> String {
    // Kept inside the kernel, but a trace of syscall exits can see it; missing in the crate's table.
    if errno == 515 {
        return "-ENOIOCTLCMD".into();
    }
    Errno::new(i32::from(errno))
        .name()
        .map_or_else(|| format!("-errno {errno}"), |name| format!("-{name}"))
}

fn descriptor(value: u64) -> String {
    format!("fd {}", value as i32)
}

fn directory(value: Option<u64>) -> Option<String> {
    const AT_FDCWD: i32 = -100;
    value.map(|fd| {
        if fd as i32 == AT_FDCWD {
            "in cwd".into()
        } else {
            format!("in dir {}", descriptor(fd))
        }
    })
}

fn open_flags(flags: u64) -> String {
    let mut text = String::from(match flags & 3 {
        0 => "read-only",
        1 => "write-only",
        _ => "read-write",
    });
    for (bit, word) in [(0o100, "create"), (0o1000, "truncate"), (0o2000, "append")] {
        if flags & bit != 0 {
            text.push(' ');
            text.push_str(word);
        }
    }
    text
}

fn protection(bits: u64) -> String {
    let letters = [(1, 'r'), (2, 'w'), (4, 'x')].map(|(bit, letter)| if bits & bit == 0 { '-' } else { letter });
    if letters == ['-'; 3] {
        "no access".into()
    } else {
        letters.iter().collect()
    }
}

fn fcntl_command(command: u64) -> &'static str {
    match command {
        0 | 1030 => "duplicate",
        1 | 2 => "descriptor flags",
        3 => "get flags",
        4 => "set flags",
        5..=7 | 36..=38 => "lock",
        _ => "other command",
    }
}

fn advice_word(advice: u64) -> &'static str {
    match advice {
        3 => "will need",
        4 => "don't need",
        8 => "free",
        14 => "huge pages",
        15 => "no huge pages",
        _ => "other advice",
    }
}

fn futex_word(operation: u64) -> &'static str {
    // Without FUTEX_PRIVATE_FLAG and FUTEX_CLOCK_REALTIME.
    match operation & 0x7f {
        0 | 9 => "wait",
        1 | 10 => "wake",
        3 | 4 => "requeue",
        5 => "wake two",
        6 | 8 | 13 => "lock",
        7 => "unlock",
        _ => "other operation",
    }
}

fn epoll_word(operation: u64) -> &'static str {
    match operation {
        1 => "add",
        2 => "remove",
        3 => "modify",
        _ => "other operation",
    }
}

fn clock_word(clock: u64) -> &'static str {
    match clock {
        0 => "realtime",
        1 => "monotonic",
        2 => "process CPU",
        3 => "thread CPU",
        4 => "monotonic raw",
        5 => "realtime coarse",
        6 => "monotonic coarse",
        7 => "boottime",
        11 => "TAI",
        _ => "other clock",
    }
}

fn family_word(family: u64) -> &'static str {
    match family {
        1 => "unix",
        2 => "IPv4",
        10 => "IPv6",
        16 => "netlink",
        _ => "other family",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all(args: [u64; 3]) -> Args {
        args.map(Some)
    }

    #[test]
    fn arguments_read_like_words() {
        assert_eq!(arguments("read", all([9, 0x7f00, 4096])), "fd 9, 4,096 B");
        assert_eq!(
            arguments("openat", all([-100_i64 as u64, 0x7f00, 0o1101])),
            "in cwd, write-only create truncate"
        );
        assert_eq!(arguments("mmap", all([0, 65_536, 5])), "64.0 KiB, r-x");
        assert_eq!(arguments("futex", all([1, 128, 2])), "wait");
        assert_eq!(arguments("no_such_call", all([1, 2, 3])), "");
    }

    #[test]
    fn arguments_that_differ_are_left_out() {
        assert_eq!(arguments("read", [Some(9), None, None]), "fd 9");
        assert_eq!(arguments("read", [None, None, None]), "");
    }

    #[test]
    fn results_say_what_they_count() {
        assert_eq!(result("read", 4096).as_deref(), Some("4,096 B"));
        assert_eq!(result("openat", 9).as_deref(), Some("fd 9"));
        assert_eq!(result("epoll_wait", 0).as_deref(), Some("timed out"));
        assert_eq!(result("mmap", 0x7fff_0000), None);
        assert_eq!(result("close", 0), None);
        assert_eq!(result("read", -2), None);
    }

    #[test]
    fn errors_have_their_names() {
        assert_eq!(
            [2, 11, 512, 4095].map(error),
            ["-ENOENT", "-EAGAIN", "-ERESTARTSYS", "-errno 4095"]
        );
    }

    #[test]
    fn nothing_that_is_told_is_an_address() {
        let raw = [9, 4_096, 64];
        let mut told_count = 0;
        for number in 0..1_000 {
            let name = crate::syscalls::name(number);
            let (kept, _) = crate::syscalls::without_addresses(&name, raw, 0);
            assert_eq!(arguments(&name, all(raw)), arguments(&name, all(kept)), "{name}");
            told_count += usize::from(!arguments(&name, all(raw)).is_empty());
        }
        assert!(told_count > 80, "{told_count}");
    }
}
