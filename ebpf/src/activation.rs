//! From a thread to its activation, and from there along frame pointers through the guest's frames.
//!
//! wasmtime 37 to 50: the TLS slot holds the address of a `CallThreadState`, bit 0 set; that points to the store's
//! `VMStoreContext`, whose exit fields are fresh whenever host code runs below wasm.

use wasmscope_common::{Counter, MAX_FRAMES};

use crate::{
    maps::count,
    thread::{Frame, Thread, WINDOW_WORDS},
    user::{read_user, read_user_word},
};

/// Stacks are smaller than this.
pub const MAX_STACK_BYTES: u64 = 64 << 20;

/// Set in the result of [`walk`] when the chain did not end at the entry frame.
pub const TRUNCATED: u64 = 1 << 32;

/// The activation on top of the current thread, 0 if there is none.
#[inline(always)]
pub fn top(thread: &Thread) -> u64 {
    if thread.slot == 0 {
        return 0;
    }
    // An unreadable slot is a thread on its way out.
    read_user_word(thread.slot).unwrap_or(0) & !1
}

/// Reads the store's entry and exit fields of `activation` into `thread.limits`.
#[inline(always)]
pub fn read_limits(thread: &mut Thread, activation: u64) -> bool {
    let Some(store) = read_user_word(activation + u64::from(thread.store_offset)) else {
        return false;
    };
    read_user(&raw mut thread.limits, store + u64::from(thread.limits_base))
}

/// Walks the guest frames from the trampoline through which wasm was left. Returns how many addresses were written to
/// `frames`, or'ed with [`TRUNCATED`]. `stack_pointer` is the thread's.
#[inline(always)]
pub fn walk_from_exit(thread: &mut Thread, frames: &mut [u64; MAX_FRAMES], stack_pointer: u64) -> u64 {
    let base = thread.limits.exit_fp;
    // What lies below the stack pointer is dead: the fields are those of frames that have been left, as after a trap or
    // between the end of a nested activation and the restoring of its caller's fields.
    if base <= stack_pointer || base - stack_pointer > MAX_STACK_BYTES {
        count(Counter::NoGuestFrames);
        return 0;
    }
    // One wide read costs as much as a narrow one. It fails near the top of the stack, where little is left to walk.
    let window = if read_user(&raw mut thread.window, base) {
        thread.frame = Frame {
            caller_fp: thread.window[0],
            return_address: thread.window[1],
        };
        base
    } else if read_user(&raw mut thread.frame, base) {
        NO_WINDOW
    } else {
        count(Counter::NoGuestFrames);
        return 0;
    };
    // The trampoline's own frame: its return address is the exit pc, which proves that the fields are fresh. They are not
    // before the guest's first exit, nor when it was left by a signal.
    if thread.trapped != 0 || thread.frame.return_address != thread.limits.exit_pc {
        count(Counter::NoGuestFrames);
        return 0;
    }
    frames[0] = thread.limits.exit_pc;
    let fp = thread.frame.caller_fp;
    walk(thread, frames, fp, window)
}

/// No address is this close above it.
pub const NO_WINDOW: u64 = u64::MAX;

/// Walks from the frame pointer of the function that `frames[0]` lies in. `window` is the address that `thread.window`
/// was read from.
#[inline(always)]
pub fn walk(thread: &mut Thread, frames: &mut [u64; MAX_FRAMES], mut fp: u64, window: u64) -> u64 {
    let entry_fp = thread.limits.entry_fp;
    let mut used = 1usize;
    while used < MAX_FRAMES {
        let index = fp.wrapping_sub(window) / 8;
        if index < WINDOW_WORDS as u64 - 1 {
            let index = index as usize & (WINDOW_WORDS - 1);
            thread.frame = Frame {
                caller_fp: thread.window[index],
                return_address: thread.window[(index + 1) & (WINDOW_WORDS - 1)],
            };
        } else if !read_user(&raw mut thread.frame, fp) {
            count(Counter::StackBroken);
            return used as u64 | TRUNCATED;
        }
        let caller_fp = thread.frame.caller_fp;
        if caller_fp == entry_fp {
            // The return address is in the entry trampoline: `fp` was the outermost guest frame.
            return used as u64;
        }
        // Stacks grow down, so each caller's frame is higher; anything else is not a frame chain.
        if caller_fp <= fp {
            count(Counter::StackBroken);
            return used as u64 | TRUNCATED;
        }
        frames[used] = thread.frame.return_address;
        fp = caller_fp;
        used += 1;
    }
    count(Counter::StackTooDeep);
    used as u64 | TRUNCATED
}
