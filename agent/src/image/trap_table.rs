//! `.wasmtime.traps`: which trap a machine instruction raises, as wasmtime's compiler noted it.

use super::block::{Block, word};

/// Codes that are not of the numbered set: broken invariants of the compiler and the collector.
const GC_HEAP_CORRUPT: u8 = 0xfe;
const INTERNAL_ASSERT: u8 = 0xff;

/// Codes 0 to 10, the same in every version known.
const COMMON: [&str; 11] = [
    "stack_overflow",
    "memory_out_of_bounds",
    "heap_misaligned",
    "table_out_of_bounds",
    "indirect_call_to_null",
    "bad_signature",
    "integer_overflow",
    "integer_division_by_zero",
    "bad_conversion_to_integer",
    "unreachable_code_reached",
    "interrupt",
];
/// Codes from 11 on up to wasmtime 41; those after the first four moved between 24 and 36.
const BEFORE_42: [&str; 4] = [
    "always_trap_adapter",
    "out_of_fuel",
    "atomic_wait_non_shared_memory",
    "null_reference",
];
/// Codes 15 to 23 of wasmtime 36 to 41.
const SINCE_36_BEFORE_42: [&str; 9] = [
    "array_out_of_bounds",
    "allocation_too_large",
    "cast_failure",
    "cannot_enter_component",
    "no_async_result",
    "unhandled_tag",
    "continuation_already_consumed",
    "disabled_opcode",
    "async_deadlock",
];
/// Codes from 11 on since wasmtime 42, which have only been added to.
const SINCE_42: [&str; 43] = [
    "out_of_fuel",
    "atomic_wait_non_shared_memory",
    "null_reference",
    "array_out_of_bounds",
    "allocation_too_large",
    "cast_failure",
    "cannot_enter_component",
    "no_async_result",
    "unhandled_tag",
    "continuation_already_consumed",
    "disabled_opcode",
    "async_deadlock",
    "cannot_leave_component",
    "cannot_block_sync_task",
    "invalid_char",
    "debug_assert_string_encoding_finished",
    "debug_assert_equal_code_units",
    "debug_assert_pointer_aligned",
    "debug_assert_upper_bits_unset",
    "string_out_of_bounds",
    "list_out_of_bounds",
    "invalid_discriminant",
    "unaligned_pointer",
    "task_cancel_not_cancelled",
    "task_cancel_or_return_twice",
    "subtask_cancel_after_terminal",
    "task_return_invalid",
    "waitable_set_drop_has_waiters",
    "subtask_drop_not_resolved",
    "thread_new_indirect_invalid_type",
    "thread_new_indirect_uninitialized",
    "backpressure_overflow",
    "unsupported_callback_code",
    "cannot_resume_thread",
    "concurrent_future_stream_op",
    "reference_count_overflow",
    "stream_op_too_big",
    "waitable_sync_and_async",
    "uncaught_exception",
    "read_from_dropped_stream",
    "write_to_dropped_stream",
    "write_to_dropped_future",
    "lift_dropped_stream",
];

/// The section's bytes and how to read them.
#[derive(PartialEq)]
pub(super) struct TrapTable {
    bytes: Vec<u8>,
    major: u32,
}

impl TrapTable {
    /// `major` is a version of wasmtime whose format is known.
    pub(super) fn new(bytes: Vec<u8>, major: u32) -> Self {
        Self { bytes, major }
    }

    /// Bytes.
    pub(super) fn len(&self) -> usize {
        self.bytes.len()
    }

    /// The trap that the instruction at exactly this offset of the text raises.
    pub(super) fn lookup(&self, text_offset: u64) -> Option<&'static str> {
        let text_offset = u32::try_from(text_offset).ok()?;
        let code = if self.major >= 47 {
            self.lookup_in_blocks(text_offset)
        } else {
            self.lookup_flat(text_offset)
        }?;
        code_name(code, self.major)
    }

    /// The trap that has this number.
    pub(super) fn name(&self, code: u8) -> Option<&'static str> {
        code_name(code, self.major)
    }

    /// Up to wasmtime 46: count, that many sorted offsets, that many codes.
    fn lookup_flat(&self, text_offset: u32) -> Option<u8> {
        let count = word(&self.bytes, 0)? as usize;
        let offsets = self.bytes.get(4..4usize.checked_add(count.checked_mul(4)?)?)?;
        let codes = self.bytes.get(4 + offsets.len()..)?;
        let (offsets, _) = offsets.as_chunks::<4>();
        let index = offsets
            .binary_search_by_key(&text_offset, |bytes| u32::from_le_bytes(*bytes))
            .ok()?;
        codes.get(index).copied()
    }

    /// Since wasmtime 47: blocks of a default code and variable-length tokens (distance << 1 | "a code of its own follows").
    fn lookup_in_blocks(&self, text_offset: u32) -> Option<u8> {
        let mut block = Block::find(&self.bytes, text_offset)?;
        let default_code = block.byte()?;
        let mut offset = block.first_offset;
        for _ in 0..block.entry_count {
            let token = block.unsigned()?;
            offset = offset.checked_add(u32::try_from(token >> 1).ok()?)?;
            let code = if token & 1 == 0 { default_code } else { block.byte()? };
            if offset >= text_offset {
                return (offset == text_offset).then_some(code);
            }
        }
        None
    }
}

fn code_name(code: u8, major: u32) -> Option<&'static str> {
    let index = usize::from(code);
    let name = match index.checked_sub(COMMON.len()) {
        None => COMMON.get(index),
        Some(_) if code == INTERNAL_ASSERT => return Some("internal_assert"),
        Some(_) if code == GC_HEAP_CORRUPT => return Some("gc_heap_corrupt"),
        Some(rest) if major >= 42 => SINCE_42.get(rest),
        Some(rest) if rest < BEFORE_42.len() => BEFORE_42.get(rest),
        Some(rest) if (36..42).contains(&major) => SINCE_36_BEFORE_42.get(rest - BEFORE_42.len()),
        Some(_) => None,
    };
    name.copied()
}
