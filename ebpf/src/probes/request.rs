//! Requests that threads read before they enter a guest: what begins like one is sent as it is, once, and so is the moment
//! at which something is written back.
//!
//! Some hosts look at the first bytes of a connection before they read the rest; then what is read next belongs to it.
//!
//! Most of what a thread does outside of activations is none of that, and costs a comparison or two.

use aya_ebpf::helpers::bpf_get_current_pid_tgid;
use wasmscope_common::{
    CONTINUES, Descriptor, HttpRequest, MAX_GLANCE_BYTES, MAY_BE_FILE, OpenRequest, REQUEST_HEAD_BYTES, RecordKind,
    THREAD_MULTIPLEXES,
};

use crate::{
    maps::{OPEN_REQUESTS, REQUEST},
    output::{Wake, emit, header, send},
    thread::{Thread, task, watched},
    user::{SyscallRegisters, read_user, read_user_word},
};

const READ: u64 = 0;
const WRITE: u64 = 1;
const CLOSE: u64 = 3;
const POLL: u64 = 7;
const READV: u64 = 19;
const WRITEV: u64 = 20;
const SELECT: u64 = 23;
const SENDFILE: u64 = 40;
const SENDTO: u64 = 44;
const RECVFROM: u64 = 45;
const SENDMSG: u64 = 46;
const RECVMSG: u64 = 47;
const SHUTDOWN: u64 = 48;
const EPOLL_CREATE: u64 = 213;
const PSELECT6: u64 = 270;
const PPOLL: u64 = 271;
const EPOLL_CREATE1: u64 = 291;
const SENDMMSG: u64 = 307;
const IO_URING_SETUP: u64 = 425;

/// From the start of a `msghdr` to the address of its first buffer's description.
const MESSAGE_BUFFERS: u64 = 16;

/// On exit from a syscall that succeeded, of a thread without activation.
#[inline(always)]
pub fn observe(thread: &mut Thread, regs: u64, result: i64) {
    match thread.syscall {
        READ | READV | RECVFROM | RECVMSG if result > 0 => read(thread, regs, result),
        WRITE | WRITEV | SENDTO | SENDMSG | SENDMMSG | SENDFILE | CLOSE | SHUTDOWN => written(regs),
        POLL | PPOLL if SyscallRegisters::read(regs).is_some_and(|registers| registers.second > 1) => {
            thread.multiplexes = 1;
        }
        // How many descriptors are waited for takes reading all of the set.
        SELECT | PSELECT6 => thread.multiplexes = 1,
        EPOLL_CREATE | EPOLL_CREATE1 | IO_URING_SETUP => emit(
            &Descriptor {
                header: header(RecordKind::Multiplexes),
                descriptor: result as u64,
            },
            Wake::Later,
        ),
        _ => {}
    }
}

#[inline(always)]
fn read(thread: &Thread, regs: u64, result: i64) {
    let Some(registers) = SyscallRegisters::read(regs) else {
        return;
    };
    let mut buffer = registers.second;
    let mut length = result as u64;
    if thread.syscall == READV || thread.syscall == RECVMSG {
        let mut vector = buffer;
        if thread.syscall == RECVMSG {
            vector = read_user_word(buffer + MESSAGE_BUFFERS).unwrap_or(0);
        }
        let mut first = [0u64; 2];
        if !read_user(&raw mut first, vector) {
            return;
        }
        buffer = first[0];
        length = length.min(first[1]);
    }
    let descriptor = registers.first & u64::from(u32::MAX);
    let mut flags = 0;
    match read_user_word(buffer) {
        Some(start) if begins_request(start) => {}
        _ => {
            let key = OpenRequest {
                pid: (bpf_get_current_pid_tgid() >> 32) as u32,
                descriptor: descriptor as u32,
            };
            let Some(glance) = OPEN_REQUESTS.get_ptr_mut(&key) else {
                return;
            };
            // SAFETY: a pointer into a map value.
            if unsafe { core::ptr::replace(glance, 0) } == 0 {
                return;
            }
            flags = CONTINUES;
        }
    }
    let Some(config) = watched() else { return };
    let Some(record) = REQUEST.get_ptr_mut(0) else { return };
    let mut head = header(RecordKind::HttpRequest);
    head.flags = flags;
    // SAFETY: a pointer into a map value.
    head.task = task(unsafe { &*config });
    if thread.syscall == READ || thread.syscall == READV {
        head.flags |= MAY_BE_FILE;
    }
    if thread.multiplexes != 0 {
        head.flags |= THREAD_MULTIPLEXES;
    }
    let length = at_most_a_head(length);
    // SAFETY: the record of this CPU, in which nothing else runs here; it has room for as much as is read.
    let failed = unsafe {
        (*record).header = head;
        (*record).descriptor = descriptor;
        (*record).length = result as u64;
        (*record).head_length = length;
        aya_ebpf::helpers::generated::bpf_probe_read_user(
            (&raw mut (*record).head).cast(),
            length as u32,
            buffer as *const _,
        )
    };
    if failed != 0 {
        return;
    }
    let key = OpenRequest {
        pid: head.pid,
        descriptor: descriptor as u32,
    };
    if flags == 0 {
        let is_glance = u64::from(result as u64 <= MAX_GLANCE_BYTES);
        let _ = OPEN_REQUESTS.insert(&key, &is_glance, 0);
    }
    send(
        record.cast_const().cast(),
        core::mem::offset_of!(HttpRequest, head) as u64 + length,
        Wake::Later,
    );
}

/// A function of its own, so that the bound is checked on the value that is used: Linux before 6.8 does not see that two copies, such as
/// one that was kept on the stack meanwhile, are alike.
#[inline(never)]
fn at_most_a_head(length: u64) -> u64 {
    if length > REQUEST_HEAD_BYTES as u64 {
        REQUEST_HEAD_BYTES as u64
    } else {
        length
    }
}

/// The methods of which requests are followed, with the space behind them as far as that is among the first eight bytes.
#[inline(always)]
fn begins_request(start: u64) -> bool {
    is(start, b"GET ")
        || is(start, b"POST ")
        || is(start, b"PUT ")
        || is(start, b"HEAD ")
        || is(start, b"DELETE ")
        || is(start, b"PATCH ")
        || is(start, b"OPTIONS ")
}

#[inline(always)]
fn is<const LENGTH: usize>(start: u64, method: &[u8; LENGTH]) -> bool {
    let mut bytes = [0u8; 8];
    let mut index = 0;
    while index < LENGTH {
        bytes[index] = method[index];
        index += 1;
    }
    (start ^ u64::from_le_bytes(bytes)) << (64 - 8 * LENGTH as u32) == 0
}

#[inline(always)]
fn written(regs: u64) {
    let Some(registers) = SyscallRegisters::read(regs) else {
        return;
    };
    let head = header(RecordKind::RequestEnd);
    let key = OpenRequest {
        pid: head.pid,
        descriptor: registers.first as u32,
    };
    if OPEN_REQUESTS.get_ptr(&key).is_none() {
        return;
    }
    let _ = OPEN_REQUESTS.remove(&key);
    emit(
        &Descriptor {
            header: head,
            descriptor: u64::from(key.descriptor),
        },
        Wake::Later,
    );
}
