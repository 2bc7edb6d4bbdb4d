//! Where in an x86-64 function to put uprobes around its calls through pointers: right before each, where the first argument
//! is known, and right after it.

use iced_x86::{FlowControl, Instruction, Mnemonic, OpKind, Register};

use super::prologue::{ArgLocation, MAX_FUNCTION_BYTES, decode, is_emulated};

/// Instructions after a call that are looked at for one that the kernel emulates.
const MAX_AFTER: usize = 8;

/// `rdi` in x86 numbering.
const FIRST_ARGUMENT: u8 = 7;

/// A call through a pointer in a register or behind one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IndirectCall {
    /// Where to probe before the call, bytes from the start of the function: the instruction that puts its first argument in
    /// place if that comes right before it, else the call. A probe there does not touch the stack.
    pub before: u32,
    /// Where the first argument is at `before`.
    pub argument: ArgLocation,
    /// Where to probe after the call, bytes from the start of the function: the first instruction, or a later one that every
    /// return from the call reaches without another call, and perhaps other paths.
    pub after: u32,
    /// The kernel emulates the instruction at `after`.
    pub after_is_emulated: bool,
}

/// Finds a function's calls through pointers, all of whose bytes are `code`; those through the table of imported functions are
/// not among them. Bytes that are no instructions end the search.
pub fn indirect_calls(code: &[u8], address: u64) -> Vec<IndirectCall> {
    let mut calls = Vec::new();
    if code.len() > MAX_FUNCTION_BYTES {
        return calls;
    }
    let instructions: Vec<_> = decode(code, address)
        .take_while(|instruction| !instruction.is_invalid())
        .collect();
    let offset = |instruction: &Instruction| (instruction.ip() - address) as u32;
    for (index, call) in instructions.iter().enumerate() {
        if call.flow_control() != FlowControl::IndirectCall || call.is_ip_rel_memory_operand() {
            continue;
        }
        let Some(next) = instructions.get(index + 1) else { break };
        let source = index.checked_sub(1).and_then(|previous| {
            let previous = &instructions[previous];
            Some((offset(previous), moved_into_first_argument(previous)?))
        });
        let (before, register) = source.unwrap_or((offset(call), FIRST_ARGUMENT));
        let cheap = cheap_after(&instructions[index + 1..], code, address);
        calls.push(IndirectCall {
            before,
            argument: ArgLocation::Register(register),
            after: offset(cheap.unwrap_or(next)),
            after_is_emulated: cheap.is_some(),
        });
    }
    calls
}

/// The first instruction that the kernel emulates and to which straight code leads.
fn cheap_after<'a>(rest: &'a [Instruction], code: &[u8], address: u64) -> Option<&'a Instruction> {
    for instruction in rest.iter().take(MAX_AFTER) {
        if is_emulated(instruction, code, instruction.ip() - address) {
            return Some(instruction);
        }
        if instruction.flow_control() != FlowControl::Next {
            return None;
        }
    }
    None
}

/// The register that `mov rdi, register` reads, in x86 numbering.
fn moved_into_first_argument(instruction: &Instruction) -> Option<u8> {
    let is_move = instruction.mnemonic() == Mnemonic::Mov
        && instruction.op0_register() == Register::RDI
        && instruction.op1_kind() == OpKind::Register
        && instruction.op1_register().is_gpr64();
    is_move.then(|| instruction.op1_register().number() as u8)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_call_is_probed_where_its_argument_is_put_in_place() {
        // mov rax,[r13+0x10]; mov rdi,r13; call [rax]; ret
        let code = [0x49, 0x8b, 0x45, 0x10, 0x4c, 0x89, 0xef, 0xff, 0x10, 0xc3];
        let call = IndirectCall {
            before: 4,
            argument: ArgLocation::Register(13),
            after: 9,
            after_is_emulated: false,
        };
        assert_eq!(indirect_calls(&code, 0x1000), [call]);
    }

    #[test]
    fn a_call_whose_argument_was_there_before_is_probed_itself() {
        // mov rax,[rdi+0x10]; call rax; ret
        let code = [0x48, 0x8b, 0x47, 0x10, 0xff, 0xd0, 0xc3];
        let call = IndirectCall {
            before: 4,
            argument: ArgLocation::Register(FIRST_ARGUMENT),
            after: 6,
            after_is_emulated: false,
        };
        assert_eq!(indirect_calls(&code, 0), [call]);
    }

    #[test]
    fn after_a_call_the_first_cheap_instruction_is_taken() {
        // call [rax]; mov rax,-0x40; cmp rax,1; je -0xf; ret
        let code = [
            0xff, 0x10, 0x48, 0xc7, 0xc0, 0xc0, 0xff, 0xff, 0xff, 0x48, 0x83, 0xf8, 0x01, 0x74, 0xf1, 0xc3,
        ];
        let [call] = indirect_calls(&code, 0x1000)[..] else {
            panic!("one call")
        };
        assert_eq!((call.after, call.after_is_emulated), (13, true));
    }

    #[test]
    fn calls_of_known_functions_are_left_alone() {
        // mov rdi,r13; call [rip+0x10]; mov rdi,r13; call +0; ret
        let code = [
            0x4c, 0x89, 0xef, 0xff, 0x15, 0x10, 0, 0, 0, 0x4c, 0x89, 0xef, 0xe8, 0, 0, 0, 0, 0xc3,
        ];
        assert_eq!(indirect_calls(&code, 0), []);
    }
}
