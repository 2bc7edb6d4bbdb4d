//! The way into the ring buffer. Every record goes through [`emit`], every failure is counted there.

use aya_ebpf::{
    bindings::{BPF_RB_FORCE_WAKEUP, BPF_RB_NO_WAKEUP},
    helpers::{bpf_get_current_pid_tgid, bpf_ktime_get_ns},
};
use wasmscope_common::{Counter, MAX_FRAMES, MAX_RECORD_BYTES, RecordHeader, RecordKind};

use crate::maps::{EVENTS, count, take_agent_sleeps};

/// Whether the agent is to be woken at once. Waking costs far more than the record, so only control events do it, and the first
/// record after a quiet time; the agent looks for the others on a timer.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Wake {
    Now,
    Later,
}

/// `CLOCK_MONOTONIC`, nanoseconds.
#[inline(always)]
pub fn now() -> u64 {
    // SAFETY: the helper has no preconditions.
    unsafe { bpf_ktime_get_ns() }
}

/// A header for the current thread and this moment.
#[inline(always)]
pub fn header(kind: RecordKind) -> RecordHeader {
    header_at(kind, now())
}

/// A header for the current thread and a moment that has been noted.
#[inline(always)]
pub fn header_at(kind: RecordKind, at_ns: u64) -> RecordHeader {
    let id = bpf_get_current_pid_tgid();
    RecordHeader {
        kind: kind as u8,
        flags: 0,
        frame_count: 0,
        tid: id as u32,
        pid: (id >> 32) as u32,
        task: 0,
        at_ns,
    }
}

/// Sends a record without frames.
#[inline(always)]
pub fn emit<T>(record: &T, wake: Wake) {
    const { assert!(size_of::<T>() <= MAX_RECORD_BYTES) };
    // SAFETY: a reference is valid for reads of its size.
    let bytes = unsafe { core::slice::from_raw_parts((&raw const *record).cast::<u8>(), size_of::<T>()) };
    send(bytes.as_ptr(), bytes.len() as u64, wake);
}

/// Sends a record that ends in frames, without those that are not in use. `frames_at` is the constant offset of its
/// frames.
#[inline(always)]
pub fn emit_with_frames<T>(record: *const T, frames_at: usize, frame_count: u64) {
    // The bound is checked here, on the value itself, so that the verifier sees it.
    let frame_count = if frame_count > MAX_FRAMES as u64 {
        MAX_FRAMES as u64
    } else {
        frame_count
    };
    send(record.cast(), frames_at as u64 + frame_count * 8, Wake::Later);
}

#[inline(always)]
pub fn send(bytes: *const u8, length: u64, wake: Wake) {
    count(Counter::Emitted);
    let flags = if wake == Wake::Now || take_agent_sleeps() {
        BPF_RB_FORCE_WAKEUP
    } else {
        BPF_RB_NO_WAKEUP
    };
    // SAFETY: the map is a ring buffer, and `bytes` is valid for `length` bytes.
    let failed = unsafe {
        aya_ebpf::helpers::generated::bpf_ringbuf_output(
            (&raw const EVENTS).cast_mut().cast(),
            bytes.cast_mut().cast(),
            length,
            u64::from(flags),
        )
    };
    if failed != 0 {
        count(Counter::RingFull);
    }
}
