//! Which field of a structure an x86-64 function exchanges for another value: it is read, and the next that happens to it is
//! that something else is written there.

use iced_x86::{FlowControl, Instruction, Mnemonic, OpKind, Register};

use super::prologue::{MAX_FUNCTION_BYTES, decode};

/// Largest structure.
const MAX_FIELD_OFFSET: u64 = 1024;
/// Instructions between reading and writing.
const MAX_DISTANCE: usize = 4;

/// Bytes from the start of the structure to the only word that is exchanged; `None` if there is none or more than one. What is
/// on the stack is no field.
pub fn exchanged_field(code: &[u8], address: u64) -> Option<i64> {
    if code.len() > MAX_FUNCTION_BYTES {
        return None;
    }
    let instructions: Vec<_> = decode(code, address)
        .take_while(|instruction| !instruction.is_invalid())
        .collect();
    let mut found = None;
    for (index, read) in instructions.iter().enumerate() {
        let Some((base, offset)) = field(read, 1) else { continue };
        if read.op0_kind() != OpKind::Register || !read.op0_register().is_gpr64() {
            continue;
        }
        let is_written = instructions[index + 1..]
            .iter()
            .take(MAX_DISTANCE)
            .take_while(|next| next.flow_control() == FlowControl::Next)
            .any(|write| {
                field(write, 0) == Some((base, offset))
                    && write.op1_kind() == OpKind::Register
                    && write.op1_register().is_gpr64()
                    && write.op1_register() != read.op0_register()
            });
        // What the base register holds must not be what was just read.
        if is_written && read.op0_register() != base {
            if found.is_some_and(|other| other != offset) {
                return None;
            }
            found = Some(offset);
        }
    }
    found
}

/// Base register and offset of a 64-bit move's memory operand.
fn field(instruction: &Instruction, operand: u32) -> Option<(Register, i64)> {
    let base = instruction.memory_base();
    let offset = instruction.memory_displacement64();
    (instruction.mnemonic() == Mnemonic::Mov
        && instruction.op_kind(operand) == OpKind::Memory
        && instruction.memory_index() == Register::None
        && instruction.segment_prefix() == Register::None
        && base.is_gpr64()
        && base != Register::RSP
        && base != Register::RBP
        && offset < MAX_FIELD_OFFSET)
        .then_some((base, offset as i64))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_field_that_gets_another_value_is_found() {
        // mov rbx,rdi; mov rcx,[rax+0x30]; mov [rax+0x30],rbx; mov rax,rcx; ret
        let code = [
            0x48, 0x89, 0xfb, 0x48, 0x8b, 0x48, 0x30, 0x48, 0x89, 0x58, 0x30, 0x48, 0x89, 0xc8, 0xc3,
        ];
        assert_eq!(exchanged_field(&code, 0x1000), Some(0x30));
    }

    #[test]
    fn a_field_that_is_only_read_or_changed_in_place_is_none() {
        // mov rcx,[rax+0x30]; mov [rax+0x38],rbx; ret
        assert_eq!(
            exchanged_field(&[0x48, 0x8b, 0x48, 0x30, 0x48, 0x89, 0x58, 0x38, 0xc3], 0),
            None
        );
        // mov rcx,[rax+0x30]; inc rcx; mov [rax+0x30],rcx; ret
        let code = [0x48, 0x8b, 0x48, 0x30, 0x48, 0xff, 0xc1, 0x48, 0x89, 0x48, 0x30, 0xc3];
        assert_eq!(exchanged_field(&code, 0), None);
    }

    #[test]
    fn two_fields_are_none() {
        let one = [0x48, 0x8b, 0x48, 0x30, 0x48, 0x89, 0x58, 0x30];
        let other = [0x48, 0x8b, 0x48, 0x38, 0x48, 0x89, 0x58, 0x38];
        assert_eq!(exchanged_field(&[one, other].concat(), 0), None);
    }
}
