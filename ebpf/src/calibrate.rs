//! Finds, on a live thread, what the agent could not derive from the binary: the TLS slot that holds the activation, the
//! place of the store pointer in the activation record, and the layout of the store's fields.
//!
//! Nothing is taken on trust: a candidate counts only if following it gives an entry trampoline and an exit address
//! inside published guest code, and frames on the stack in use. The result is kept in the process's config.

use wasmscope_common::{
    Calibrated, Counter, LAYOUT_ALIKE, LAYOUT_GUEST_EXIT, LAYOUT_NO_HANDLER, LAYOUT_UNSUPPORTED, MAX_COPIES,
    ProcessConfig, RecordKind, STORE_WORDS, TLS_DYNAMIC, TLS_SEARCH, TLS_STATIC, TLS_UNKNOWN,
};

use crate::{
    activation::{MAX_STACK_BYTES, entry_handler, read_fields, read_limits},
    maps::count,
    output::{Wake, emit, header},
    thread::{NO_COPY, Thread, dynamic_block, slot_address},
    user::{read_user, read_user_word, thread_pointer},
};

/// Layouts tried before the agent has read a code object: wasmtime 43 to 50, 38 to 42. Both have a trap handler, which
/// other versions have no address of guest code in place of.
const EARLY_LAYOUTS: [u32; MAX_COPIES] = [0x30, 0x28, 0, 0];
/// An entry trampoline's frame and the activation record are less than this apart.
const MAX_ENTRY_BYTES: u64 = 16 << 10;
/// Words of static TLS below the thread pointer that are searched.
const TLS_WORDS: u64 = 768;
/// Words that look like a slot judged per attempt; more are too many for the verifier.
const TLS_CANDIDATES: u32 = 1;
/// Words read at a time.
const CHUNK_WORDS: usize = 32;
/// TLS blocks of shared libraries that are searched.
const TLS_MODULES: u32 = 48;

/// Whether everything is known that following an activation needs.
#[inline(always)]
pub fn is_complete(thread: &Thread) -> bool {
    thread.slot != 0 && thread.store_offset != 0 && thread.layout != 0
}

/// Answer of [`calibrate`] with a search: there is no activation, if the slot is in static TLS at all, which the agent has yet to find out.
pub const UNDECIDED: u64 = 2;

/// Answer of [`calibrate`]: there may be an activation, but not enough is known to follow it.
pub const UNKNOWN: u64 = 1;

/// Tries to complete what is known of the current process from the current thread. Returns the activation on top, 0 if
/// there is none, [`UNKNOWN`] or, with `SEARCH`, [`UNDECIDED`].
///
/// Only one program searches static TLS: the verifier has to follow the whole search in every program that contains it.
#[inline(always)]
pub fn calibrate<const SEARCH: bool>(thread: *mut Thread, config: *mut ProcessConfig, stack_pointer: u64) -> u64 {
    let answer = try_to_calibrate::<SEARCH>(thread, config, stack_pointer);
    // SAFETY: a map value, used by this program alone.
    unsafe { (*thread).forget(answer) }
}

#[inline(always)]
fn try_to_calibrate<const SEARCH: bool>(thread: *mut Thread, config: *mut ProcessConfig, stack_pointer: u64) -> u64 {
    // SAFETY: both point into map values; the thread's is used by this program alone, and racing writers of the config
    // write the same values.
    let (thread, config) = unsafe { (&mut *thread, &mut *config) };
    if thread.code_end == 0 {
        // No guest code yet: nothing could be checked against it.
        return 0;
    }
    if thread.copy == NO_COPY || config.layouts[0] == LAYOUT_UNSUPPORTED {
        return UNKNOWN;
    }
    let copy = thread.copy as usize & (MAX_COPIES - 1);
    // More than one of the words of static TLS may look like the slot.
    let attempts = if SEARCH { TLS_CANDIDATES } else { 1 };
    let resumed = thread.searched_to != 0;
    let mut attempt = 0;
    while attempt < attempts {
        attempt += 1;
        let candidate = candidate::<SEARCH>(thread, config, copy, stack_pointer);
        let slot = thread.forget(candidate);
        if slot <= UNDECIDED {
            // If judging all took more than this call, the others were at another moment.
            return if resumed { UNKNOWN } else { slot };
        }
        let activation = read_user_word(slot).unwrap_or(0) & !1;
        let activation = thread.forget(activation);
        if activation != 0 && accept(thread, config, activation, stack_pointer) {
            found(thread, config, copy, slot);
            return activation;
        }
        if slot == thread.slot && activation == 0 {
            return 0;
        }
        if thread.searched_to == 0 {
            return UNKNOWN;
        }
    }
    UNKNOWN
}

/// Keeps what has led to an activation.
#[inline(always)]
fn found(thread: &mut Thread, config: &mut ProcessConfig, copy: usize, slot: u64) {
    let known = &mut config.copies[copy];
    if thread.slot == 0 && known.tls_kind != TLS_DYNAMIC {
        known.tls_offset = (slot as i64).wrapping_sub(thread_pointer().unwrap_or(0) as i64);
        known.tls_kind = TLS_STATIC;
    }
    if known.tls_kind == TLS_DYNAMIC && known.tls_module == 0 {
        known.tls_module = thread.found_module;
    }
    known.store_offset = thread.store_offset;
    known.layout = thread.layout;
    thread.slot = slot;
    thread.copies[copy].slot = slot;
    config.calibrations += 1;
    thread.calibrations = config.calibrations;
    emit(
        &Calibrated {
            header: header(RecordKind::Calibrated),
            copy: copy as u64,
            found: *known,
        },
        Wake::Now,
    );
}

/// A place that may be the slot of a copy; 0 if there is none, [`UNKNOWN`] or [`UNDECIDED`]. Not part of its caller, so that the verifier
/// forgets how it was found.
#[inline(never)]
fn candidate<const SEARCH: bool>(
    thread: *mut Thread,
    config: *const ProcessConfig,
    copy: usize,
    stack_pointer: u64,
) -> u64 {
    // SAFETY: as in `calibrate`.
    let (thread, config) = unsafe { (&mut *thread, &*config) };
    if thread.slot != 0 {
        return thread.slot;
    }
    let copy = copy & (MAX_COPIES - 1);
    match config.copies[copy].tls_kind {
        // The thread has no block of that library, so it has never been in an activation.
        TLS_DYNAMIC if config.copies[copy].tls_module != 0 => 0,
        TLS_DYNAMIC => search_modules(thread, config, copy, stack_pointer),
        _ if !SEARCH => UNKNOWN,
        TLS_SEARCH => search_static(thread, stack_pointer),
        TLS_UNKNOWN => match search_static(thread, stack_pointer) {
            // It may be elsewhere.
            0 if config.copies[copy].file == 0 => UNDECIDED,
            0 => UNKNOWN,
            slot => slot,
        },
        _ => 0,
    }
}

/// Looks for the next word of static TLS that has the form of a slot, from where the thread's last attempt stopped.
#[inline(always)]
fn search_static(thread: &mut Thread, stack_pointer: u64) -> u64 {
    let Some(pointer) = thread_pointer() else { return 0 };
    let end = match thread.searched_to {
        0 => pointer,
        searched_to => searched_to,
    };
    let found = first_static(thread, end, stack_pointer);
    // A thread that has just begun is about to use what lies right below its static TLS as its stack.
    let is_unused_stack = stack_pointer.wrapping_sub(found) < TLS_WORDS * 8;
    thread.searched_to = if is_unused_stack { 0 } else { found };
    thread.searched_to
}

/// Address of the first word below `end` that looks like a slot, 0 if there is none.
#[inline(never)]
fn first_static(thread: *mut Thread, end: u64, stack_pointer: u64) -> u64 {
    // SAFETY: as in `calibrate`; the record is not in use yet.
    let words: *mut [u64; CHUNK_WORDS] = unsafe { (*thread).record.as_mut_ptr().cast() };
    let mut start = end;
    let mut chunk = 0u64;
    while chunk < TLS_WORDS / CHUNK_WORDS as u64 {
        chunk += 1;
        start -= CHUNK_WORDS as u64 * 8;
        if !read_user(words, start) {
            // Below the block; everything that follows is too.
            return 0;
        }
        // The highest match of the chunk, found without a branch a word: the verifier follows each branch both ways.
        let mut found = 0u64;
        let mut index = 0usize;
        while index < CHUNK_WORDS {
            // SAFETY: `words` spans the chunk and `index` is below its length.
            let word = unsafe { (*words)[index] };
            let mismatch = ((word & 7) ^ 1) | (word.wrapping_sub(stack_pointer) >> MAX_STACK_BYTES.trailing_zeros());
            let keep = core::hint::black_box((mismatch | mismatch.wrapping_neg()) >> 63);
            found = core::hint::black_box(found * keep + (start + index as u64 * 8) * (1 - keep));
            index += 1;
        }
        if found != 0 {
            return found;
        }
    }
    0
}

/// Looks at the known offset in the TLS block of every shared library, from where the thread's last attempt stopped: another
/// library may keep something there that looks like a slot.
#[inline(always)]
fn search_modules(thread: &mut Thread, config: &ProcessConfig, copy: usize, stack_pointer: u64) -> u64 {
    let Some(pointer) = thread_pointer() else { return 0 };
    let offset = config.copies[copy].tls_offset;
    let announced = thread.copies[copy].announced;
    let module = if config.other_copies == 0 {
        thread.searched_to = first_module(pointer, offset, stack_pointer, thread.searched_to);
        thread.searched_to
    } else {
        // Another copy may keep its slot at the same offset of its block, so only what this one has said it would write is
        // taken for its own, and what others have claimed never is.
        unclaimed_module(pointer, offset, stack_pointer, announced, claimed_modules(config))
    };
    if module == 0 {
        return 0;
    }
    thread.found_module = module as u32;
    dynamic_block(pointer, module as u32).wrapping_add_signed(offset)
}

/// The first library after `after` in whose TLS block the word at `offset` looks like a slot, 0 if there is none.
#[inline(never)]
fn first_module(pointer: u64, offset: i64, stack_pointer: u64, after: u64) -> u64 {
    let mut module = 1u32;
    while module < TLS_MODULES {
        let block = dynamic_block(pointer, module);
        if block != 0 {
            // Without a branch, which the verifier would follow both ways.
            let is_after = core::hint::black_box(after.wrapping_sub(u64::from(module)) >> 63);
            let word = read_user_word(block.wrapping_add_signed(offset)).unwrap_or(0) * is_after;
            if looks_like_slot(word, stack_pointer) {
                return u64::from(module);
            }
        }
        module += 1;
    }
    0
}

/// As [`first_module`], but of those not in the set `claimed`, and with this activation in the slot unless it is 0.
#[inline(never)]
fn unclaimed_module(pointer: u64, offset: i64, stack_pointer: u64, activation: u64, claimed: u64) -> u64 {
    let mut module = 1u32;
    while module < TLS_MODULES {
        let block = dynamic_block(pointer, module);
        if block != 0 && claimed >> module & 1 == 0 {
            let word = read_user_word(block.wrapping_add_signed(offset)).unwrap_or(0);
            if looks_like_slot(word, stack_pointer) && (activation == 0 || activation == word & !1) {
                return u64::from(module);
            }
        }
        module += 1;
    }
    0
}

/// A slot holds an address on the stack in use, with bit 0 set.
#[inline(always)]
fn looks_like_slot(word: u64, stack_pointer: u64) -> bool {
    word & 7 == 1 && word > stack_pointer && word - stack_pointer < MAX_STACK_BYTES
}

/// Looks for the store pointer among the first words of `activation`; on success the thread knows both offsets.
#[inline(never)]
fn accept(thread: *mut Thread, config: *const ProcessConfig, activation: u64, stack_pointer: u64) -> bool {
    // SAFETY: as in `calibrate`.
    let (thread, config) = unsafe { (&mut *thread, &*config) };
    let known = thread.layout;
    // The choice is made in memory, where the verifier does not follow it through the search.
    let mut index = 0usize;
    while index < MAX_COPIES {
        thread.window[index] = u64::from(if config.layouts[0] == 0 {
            EARLY_LAYOUTS[index]
        } else {
            config.layouts[index]
        });
        index += 1;
    }
    if known != 0 {
        thread.window[0] = u64::from(known);
        thread.window[1] = 0;
    }
    // Kept in the map, where the verifier does not follow it.
    thread.store_offset = 0;
    let mut word = 1usize;
    while word < STORE_WORDS {
        let offset = word as u64 * 8;
        word += 1;
        // The record has room for values that it does not use, where whatever was on the stack before remains: an old pointer
        // to the store, too. Only the true one stands before what links the record to others.
        if thread.store_offset != 0 && !is_linked(activation, offset) {
            continue;
        }
        let Some(store) = read_user_word(activation + offset) else {
            count(Counter::ActivationUnreadable);
            return false;
        };
        if store & 7 != 0 || store < 0x1000 {
            continue;
        }
        let mut index = 0usize;
        while index < MAX_COPIES {
            let layout = thread.window[index] as u32;
            if layout == 0 {
                break;
            }
            if read_fields(&mut thread.limits, store, layout) && plausible(thread, layout, activation, stack_pointer) {
                // The first one may be an old pointer in room that the record does not use; what is linked is not.
                if thread.store_offset == 0 || !is_linked(activation, u64::from(thread.store_offset)) {
                    thread.store_offset = offset as u32;
                    thread.layout = layout;
                }
                break;
            }
            index += 1;
        }
    }
    if thread.store_offset == 0 {
        return false;
    }
    if read_limits(thread, activation) && entry_handler(thread) != 0 {
        return true;
    }
    thread.store_offset = 0;
    thread.layout = known;
    false
}

/// Whether the store pointer at `offset` is followed by the record before, if there is one, and the place on the stack where
/// the store's fields are kept meanwhile: wasmtime 48 to 50.
#[inline(never)]
fn is_linked(activation: u64, offset: u64) -> bool {
    let kept = read_user_word(activation + offset + 16).unwrap_or(0);
    kept.wrapping_sub(activation).wrapping_add(MAX_ENTRY_BYTES) < 2 * MAX_ENTRY_BYTES
}

/// Whether the thread's limits describe a live activation of published guest code on the stack in use.
#[inline(always)]
fn plausible(thread: &Thread, layout: u32, activation: u64, stack_pointer: u64) -> bool {
    let limits = &thread.limits;
    let in_code = |address: u64| address >= thread.code_start && address < thread.code_end;
    let on_stack = |address: u64| address > stack_pointer && address - stack_pointer < MAX_STACK_BYTES;
    let is_exit = in_code(limits.exit_pc) && limits.exit_fp < limits.entry_fp;
    // The record lies in the frames of the host code that called this entry trampoline, not that of another stack.
    if !on_stack(limits.entry_fp) || limits.entry_fp >= activation || activation - limits.entry_fp >= MAX_ENTRY_BYTES {
        return false;
    }
    if layout & LAYOUT_NO_HANDLER == 0 {
        return in_code(limits.entry_handler) && (limits.exit_pc == 0 || is_exit);
    }
    if limits.exit_pc == 0 {
        // Not left yet; what has been pushed by the call that entered is looked at next.
        return layout & LAYOUT_ALIKE == 0;
    }
    if !is_exit || !on_stack(limits.exit_fp) {
        return false;
    }
    // The frame is the trampoline's, which returns to where wasm was left, or that of the guest function that called it.
    let returns_to = read_user_word(limits.exit_fp + 8).unwrap_or(0);
    in_code(returns_to) && (returns_to == limits.exit_pc) == (layout & LAYOUT_GUEST_EXIT == 0)
}

/// Looks for the slot of a copy that has said what it is about to put there, and from then on knows it. `false` if that is
/// not there yet.
#[inline(always)]
pub fn find_announced(thread: &mut Thread, config: &mut ProcessConfig, copy: usize) -> bool {
    let Some(pointer) = thread_pointer() else { return false };
    let copy = copy & (MAX_COPIES - 1);
    if config.copies[copy].tls_kind != TLS_DYNAMIC {
        return false;
    }
    if config.copies[copy].tls_module != 0 {
        let slot = slot_address(&config.copies[copy]);
        thread.copies[copy].slot = slot;
        return slot != 0 && read_user_word(slot).unwrap_or(0) & !1 == thread.copies[copy].announced;
    }
    let offset = config.copies[copy].tls_offset;
    let announced = thread.copies[copy].announced;
    let claimed = claimed_modules(config);
    let module = unclaimed_module(pointer, offset, announced - 8, announced, claimed);
    if module == 0 {
        return false;
    }
    config.copies[copy].tls_module = module as u32;
    thread.copies[copy].slot = dynamic_block(pointer, module as u32).wrapping_add_signed(offset);
    true
}

/// The set of libraries that copies are known to be.
#[inline(always)]
fn claimed_modules(config: &ProcessConfig) -> u64 {
    let mut claimed = 0u64;
    let mut copy = 0;
    while copy < MAX_COPIES {
        let module = config.copies[copy].tls_module;
        // Without a branch, which the verifier would follow both ways; those beyond are not searched.
        claimed |= core::hint::black_box(u64::from(module < TLS_MODULES)) << (module & 63);
        copy += 1;
    }
    claimed
}
