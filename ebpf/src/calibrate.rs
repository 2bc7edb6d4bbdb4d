//! Finds, on a live thread, what the agent could not derive from the binary: the TLS slot that holds the activation, the
//! place of the store pointer in the activation record, and the layout of the store's fields.
//!
//! Nothing is taken on trust: a candidate counts only if following it gives an entry trampoline and an exit address
//! inside published guest code, and frames on the stack in use. The result is kept in the process's config.

use wasmscope_common::{
    Calibrated, Counter, ProcessConfig, RecordKind, STORE_WORDS, TLS_DYNAMIC, TLS_SEARCH, TLS_STATIC, TLS_UNKNOWN,
};

use crate::{
    activation::MAX_STACK_BYTES,
    maps::count,
    output::{Wake, emit, header},
    thread::{Thread, dynamic_block},
    user::{read_user, read_user_word, thread_pointer},
};

/// `last_wasm_exit_trampoline_fp` in `VMStoreContext`: wasmtime 43 to 50, 38 to 42.
const LIMITS_BASES: [u32; 2] = [0x30, 0x28];
/// An entry trampoline's frame and the activation record are less than this apart.
const MAX_ENTRY_BYTES: u64 = 16 << 10;
/// Words of static TLS below the thread pointer that are searched.
const TLS_WORDS: u64 = 768;
/// Words that look like a slot judged per attempt; more are too many for the verifier.
const TLS_CANDIDATES: u32 = 3;
/// Words read at a time.
const CHUNK_WORDS: usize = 32;
/// TLS blocks of shared libraries that are searched.
const TLS_MODULES: u32 = 48;

/// Whether everything is known that following an activation needs.
#[inline(always)]
pub fn is_complete(thread: &Thread) -> bool {
    thread.slot != 0 && thread.store_offset != 0 && thread.limits_base != 0
}

/// Answer of [`calibrate`]: there may be an activation, but not enough is known to follow it.
pub const UNKNOWN: u64 = 1;

/// Tries to complete what is known of the current process from the current thread. Returns the activation on top, 0 if
/// there is none, or [`UNKNOWN`].
///
/// Only one program searches static TLS: the verifier has to follow the whole search in every program that contains it.
#[inline(always)]
pub fn calibrate<const SEARCH: bool>(thread: *mut Thread, config: *mut ProcessConfig, stack_pointer: u64) -> u64 {
    // SAFETY: both point into map values; the thread's is used by this program alone, and racing writers of the config
    // write the same values.
    let (thread, config) = unsafe { (&mut *thread, &mut *config) };
    if config.code_end == 0 {
        // No guest code yet: nothing could be checked against it.
        return 0;
    }
    let activation = if thread.slot != 0 {
        let activation = read_user_word(thread.slot).unwrap_or(0) & !1;
        if activation != 0 && !accept(thread, config, activation, stack_pointer) {
            return UNKNOWN;
        }
        activation
    } else {
        match config.tls_kind {
            TLS_DYNAMIC => search_modules(thread, config, stack_pointer),
            _ if !SEARCH => UNKNOWN,
            TLS_SEARCH => search_static(thread, config, stack_pointer),
            TLS_UNKNOWN => match search_static(thread, config, stack_pointer) {
                // It may be elsewhere.
                0 => UNKNOWN,
                found => found,
            },
            _ => 0,
        }
    };
    if activation == 0 || activation == UNKNOWN {
        return activation;
    }
    config.store_offset = thread.store_offset;
    config.limits_base = thread.limits_base;
    emit(
        &Calibrated {
            header: header(RecordKind::Calibrated),
            tls_kind: config.tls_kind,
            tls_module: config.tls_module,
            tls_offset: config.tls_offset,
            store_offset: config.store_offset,
            limits_base: config.limits_base,
        },
        Wake::Now,
    );
    activation
}

/// Looks at the words of static TLS that have the form of a slot: a few of them, from where the thread's last attempt
/// stopped.
#[inline(always)]
fn search_static(thread: &mut Thread, config: &mut ProcessConfig, stack_pointer: u64) -> u64 {
    let Some(pointer) = thread_pointer() else { return 0 };
    let resumed = thread.searched_to != 0;
    let mut attempt = 0;
    while attempt < TLS_CANDIDATES {
        attempt += 1;
        let end = if thread.searched_to == 0 {
            pointer
        } else {
            thread.searched_to
        };
        let slot = first_static(thread, end, stack_pointer);
        thread.searched_to = slot;
        if slot == 0 {
            // All have been judged; if that took more than this attempt, the others were at another moment.
            return if resumed { UNKNOWN } else { 0 };
        }
        let activation = read_user_word(slot).unwrap_or(0) & !1;
        if activation != 0 && accept(thread, config, activation, stack_pointer) {
            thread.slot = slot;
            config.tls_offset = (slot as i64).wrapping_sub(pointer as i64);
            config.tls_kind = TLS_STATIC;
            return activation;
        }
    }
    UNKNOWN
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

/// Looks at the known offset in the TLS block of every shared library.
#[inline(always)]
fn search_modules(thread: &mut Thread, config: &mut ProcessConfig, stack_pointer: u64) -> u64 {
    let Some(pointer) = thread_pointer() else { return 0 };
    let module = first_module(pointer, config.tls_offset, stack_pointer);
    if module == 0 {
        return 0;
    }
    let slot = dynamic_block(pointer, module as u32).wrapping_add_signed(config.tls_offset);
    let activation = read_user_word(slot).unwrap_or(0) & !1;
    if activation == 0 || !accept(thread, config, activation, stack_pointer) {
        return UNKNOWN;
    }
    thread.slot = slot;
    config.tls_module = module as u32;
    activation
}

/// The first library in whose TLS block the word at `offset` looks like a slot, 0 if there is none.
#[inline(never)]
fn first_module(pointer: u64, offset: i64, stack_pointer: u64) -> u64 {
    let mut module = 1u32;
    while module < TLS_MODULES {
        let block = dynamic_block(pointer, module);
        if block != 0 {
            let word = read_user_word(block.wrapping_add_signed(offset)).unwrap_or(0);
            if looks_like_slot(word, stack_pointer) {
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
    // Kept in the map, where the verifier does not follow it.
    thread.store_offset = 0;
    let mut word = 1usize;
    while word < STORE_WORDS {
        let offset = word as u64 * 8;
        word += 1;
        let Some(store) = read_user_word(activation + offset) else {
            count(Counter::ActivationUnreadable);
            return false;
        };
        if store & 7 != 0 || store < 0x1000 {
            continue;
        }
        let mut layout = 0usize;
        while layout < LIMITS_BASES.len() {
            let base = LIMITS_BASES[layout];
            layout += 1;
            if config.limits_base != 0 && config.limits_base != base {
                continue;
            }
            if read_user(&raw mut thread.limits, store + u64::from(base))
                && plausible(thread, config, activation, stack_pointer)
            {
                // The record has room for values that it does not use, where whatever was on the stack before remains:
                // an old pointer to the store, too. Only the true one stands before what links the record to others.
                if thread.store_offset != 0 && !is_linked(activation, offset) {
                    if is_linked(activation, u64::from(thread.store_offset)) {
                        continue;
                    }
                    thread.store_offset = 0;
                    return false;
                }
                thread.store_offset = offset as u32;
                thread.limits_base = base;
            }
        }
    }
    thread.store_offset != 0
}

/// Whether the store pointer at `offset` is followed by the record before, if there is one, and the place on the stack where
/// the store's fields are kept meanwhile: wasmtime 48 to 50.
#[inline(never)]
fn is_linked(activation: u64, offset: u64) -> bool {
    let kept = read_user_word(activation + offset + 16).unwrap_or(0);
    kept.wrapping_sub(activation).wrapping_add(MAX_ENTRY_BYTES) < 2 * MAX_ENTRY_BYTES
}

/// Whether `thread.limits` describes a live activation of published guest code on the stack in use.
#[inline(always)]
fn plausible(thread: &Thread, config: &ProcessConfig, activation: u64, stack_pointer: u64) -> bool {
    let limits = &thread.limits;
    let in_code = |address: u64| address >= config.code_start && address < config.code_end;
    let on_stack = |address: u64| address > stack_pointer && address - stack_pointer < MAX_STACK_BYTES;
    in_code(limits.entry_handler)
        && on_stack(limits.entry_fp)
        // The record lies in the frames of the host code that called this entry trampoline, not that of another stack.
        && limits.entry_fp < activation
        && activation - limits.entry_fp < MAX_ENTRY_BYTES
        && (limits.exit_pc == 0 || (in_code(limits.exit_pc) && limits.exit_fp < limits.entry_fp))
}
