//! From a thread to its activation, and from there along frame pointers through the guest's frames.
//!
//! wasmtime 24 to 50: the TLS slot holds the address of a `CallThreadState`, bit 0 set; that points to the store's
//! `VMStoreContext`, whose exit fields are fresh whenever host code runs below wasm. What the fields are differs between
//! versions; here they are brought into one form.

use wasmscope_common::{
    Counter, LAYOUT_BASE, LAYOUT_ENTRY_SP, LAYOUT_GUEST_EXIT, LAYOUT_NO_HANDLER, MAX_COPIES, MAX_FRAMES, ProcessConfig,
};

use crate::{
    maps::count,
    thread::{Frame, Limits, Thread, WINDOW_WORDS, slot_address},
    user::{read_user, read_user_word},
};

/// Stacks are smaller than this.
pub const MAX_STACK_BYTES: u64 = 64 << 20;

/// Set in the result of [`walk`] and [`walk_from_exit`] when the chain did not end at the entry frame.
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

/// The activation of any copy of the runtime but `except` that is nearest above the stack pointer, 0 if there is none. The
/// thread's `innermost` says of which copy it is.
///
/// Records lie in frames of the code that enters wasm, so of two on one stack the lower is the inner one; one on another
/// stack is further away.
#[inline(never)]
pub fn innermost(thread: *mut Thread, config: *const ProcessConfig, stack_pointer: u64, except: u32) -> u64 {
    let mut nearest = u64::MAX;
    let mut found = 0;
    let mut copy = 0;
    while copy < MAX_COPIES {
        let activation = top_of_copy(thread, config, copy, except);
        let distance = activation.wrapping_sub(stack_pointer);
        if activation != 0 && distance < nearest {
            nearest = distance;
            found = activation;
            // SAFETY: a map value, used by this program alone.
            unsafe { (*thread).innermost = copy as u32 };
        }
        copy += 1;
    }
    found
}

/// The activation of one copy of the runtime on top of the current thread, 0 if there is none or it is `except`.
///
/// A function of its own, as the loop around it would else be entered in its middle: Linux before 6.3 refuses that.
#[inline(never)]
fn top_of_copy(thread: *mut Thread, config: *const ProcessConfig, copy: usize, except: u32) -> u64 {
    // SAFETY: both point into map values; the thread's is used by this program alone.
    let (thread, config) = unsafe { (&mut *thread, &*config) };
    let index = copy & (MAX_COPIES - 1);
    let slot = match thread.copies[index].slot {
        0 => slot_address(&config.copies[index]),
        slot => slot,
    };
    thread.copies[index].slot = slot;
    if slot == 0 || copy as u32 == except {
        return 0;
    }
    read_user_word(slot).unwrap_or(0) & !1
}

/// Which of two activations, one of which may be 0, is the inner one.
#[inline(always)]
pub fn inner(one: u64, other: u64, stack_pointer: u64) -> u64 {
    let is_between = other > stack_pointer && other < one && one - stack_pointer < MAX_STACK_BYTES;
    if one == 0 || is_between { other } else { one }
}

/// Reads the store's entry and exit fields of `activation` into `thread.limits`.
#[inline(always)]
pub fn read_limits(thread: &mut Thread, activation: u64) -> bool {
    let Some(store) = read_user_word(activation + u64::from(thread.store_offset)) else {
        return false;
    };
    read_fields(&mut thread.limits, store, thread.layout)
}

/// Reads the fields of a store with this layout.
#[inline(always)]
pub fn read_fields(limits: &mut Limits, store: u64, layout: u32) -> bool {
    if !read_user(&raw mut *limits, store + u64::from(layout & LAYOUT_BASE)) {
        return false;
    }
    if layout & LAYOUT_NO_HANDLER != 0 {
        // A stack pointer serves as well as the frame pointer above it: no guest frame lies between them.
        limits.entry_fp = limits.entry_sp;
        limits.entry_handler = 0;
    }
    true
}

/// An address in the trampoline through which wasm was entered: where there is no trap handler, the return address of
/// the call that the trampoline made, as it lies on the stack. After the call it may be overwritten, but not by another.
#[inline(always)]
pub fn entry_handler(thread: &mut Thread) -> u64 {
    if thread.limits.entry_handler == 0 && thread.layout & LAYOUT_NO_HANDLER != 0 {
        return peek_entry(thread);
    }
    thread.limits.entry_handler
}

/// Words of a trampoline's frame that are searched for the return address, up to its frame pointer.
const ENTRY_WORDS: usize = WINDOW_WORDS;

#[inline(never)]
fn peek_entry(thread: *mut Thread) -> u64 {
    // SAFETY: this thread's own entry.
    let thread = unsafe { &mut *thread };
    let entry = thread.limits.entry_fp;
    if entry == 0 {
        return 0;
    }
    if thread.layout & LAYOUT_ENTRY_SP != 0 {
        return match read_user_word(entry - 8) {
            Some(address) if is_call_return(address, thread) => address,
            _ => 0,
        };
    }
    if !read_user(&raw mut thread.window, entry.wrapping_sub(ENTRY_WORDS as u64 * 8)) {
        return 0;
    }
    // The called function has pushed the trampoline's frame pointer below the return address: a pair that no rest of an
    // earlier call makes. It is found without a branch a word, as the verifier follows each both ways.
    let code_bytes = thread.code_end.wrapping_sub(thread.code_start);
    let mut found = 0u64;
    let mut index = 1usize;
    while index < ENTRY_WORDS {
        let word = thread.window[index];
        let pushed = thread.window[index - 1] ^ entry;
        // The sign tells whether the one is below the other: neither is larger than an address space.
        let distance = word.wrapping_sub(thread.code_start);
        let is_code = (distance.wrapping_sub(code_bytes) & !distance) >> 63;
        let is_pushed = 1 ^ (pushed | pushed.wrapping_neg()) >> 63;
        let is_return = core::hint::black_box(is_code & is_pushed);
        found = core::hint::black_box(found * (1 - is_return) + word * is_return);
        index += 1;
    }
    if is_call_return(found, thread) { found } else { 0 }
}

/// Whether `address` is in guest code, behind a direct call.
#[inline(always)]
fn is_call_return(address: u64, thread: &Thread) -> bool {
    /// `call rel32`, with which trampolines call their function.
    const CALL: u8 = 0xe8;
    const CALL_BYTES: u64 = 5;
    let mut opcode = 0u8;
    address >= thread.code_start
        && address < thread.code_end
        && read_user(&raw mut opcode, address - CALL_BYTES)
        && opcode == CALL
}

/// Walks the guest frames from the trampoline through which wasm was left. Returns how many addresses were written to
/// `frames`, or'ed with [`TRUNCATED`]. `stack_pointer` is the thread's.
#[inline(always)]
pub fn walk_from_exit(thread: &mut Thread, frames: &mut [u64; MAX_FRAMES], stack_pointer: u64) -> u64 {
    let walked = follow_from_exit(thread, frames, stack_pointer);
    thread.forget(walked)
}

#[inline(always)]
fn follow_from_exit(thread: &mut Thread, frames: &mut [u64; MAX_FRAMES], stack_pointer: u64) -> u64 {
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
    frames[0] = thread.limits.exit_pc;
    if thread.layout & LAYOUT_GUEST_EXIT != 0 {
        // Nothing proves that the fields are fresh, but entering another activation of the store or leaving this one by a
        // signal are the only ways in which they get stale.
        if thread.trapped != 0 || base >= thread.limits.entry_fp {
            count(Counter::NoGuestFrames);
            return 0;
        }
        return follow(thread, frames, base, window);
    }
    // The trampoline's own frame: its return address is the exit pc, which proves that the fields are fresh. They are not
    // before the guest's first exit, nor when it was left by a signal.
    if thread.trapped != 0 || thread.frame.return_address != thread.limits.exit_pc {
        count(Counter::NoGuestFrames);
        return 0;
    }
    let fp = thread.frame.caller_fp;
    follow(thread, frames, fp, window)
}

/// No address is this close above it.
const NO_WINDOW: u64 = u64::MAX;

/// Walks from the frame pointer of the function that `frames[0]` lies in. The answer is as of [`walk_from_exit`].
#[inline(always)]
pub fn walk(thread: &mut Thread, frames: &mut [u64; MAX_FRAMES], fp: u64) -> u64 {
    let walked = follow(thread, frames, fp, NO_WINDOW);
    thread.forget(walked)
}

/// As [`walk`]; `window` is the address that `thread.window` was read from.
#[inline(always)]
fn follow(thread: &mut Thread, frames: &mut [u64; MAX_FRAMES], mut fp: u64, window: u64) -> u64 {
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
        if caller_fp >= entry_fp {
            if caller_fp != entry_fp && thread.layout & LAYOUT_ENTRY_SP == 0 {
                count(Counter::StackBroken);
                return used as u64 | TRUNCATED;
            }
            // The return address is in the entry trampoline: `fp` was the outermost guest frame.
            if thread.layout & LAYOUT_NO_HANDLER != 0 {
                thread.limits.entry_handler = thread.frame.return_address;
            }
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
