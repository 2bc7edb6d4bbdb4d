//! Where in an x86-64 function to put uprobes for its end: at every `ret`.

use iced_x86::{Code, FlowControl, Instruction, InstructionInfoFactory, Mnemonic, OpKind, Register};

use super::prologue::{MAX_FUNCTION_BYTES, decode, is_no_op, is_write, target_inside};

/// Instructions before an indirect jump that are looked at to tell whether it is a `switch`.
const RECENT_INSTRUCTIONS: usize = 16;

/// An instruction at which a function returns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ReturnPoint {
    /// The `ret`, bytes from the start of the function.
    pub offset: u32,
    /// Where to probe: the `ret`, or a no-op right before it that every path to it passes.
    pub probe_offset: u32,
    /// The kernel emulates the instruction at `probe_offset`.
    pub emulated: bool,
}

/// The exits of a function.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ReturnPoints {
    /// Every `ret`, by offset.
    pub returns: Vec<ReturnPoint>,
    /// Jumps that leave the function, or may (indirect ones that are not seen to be a `switch`), bytes from its start. If there are
    /// any, the function can end without passing one of `returns`.
    pub tail_jumps: Vec<u32>,
}

/// Why the exits of a function cannot be told.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ReturnPointsError {
    /// Longer than [`MAX_FUNCTION_BYTES`].
    #[error("longer than is looked at")]
    TooLarge,
    /// Bytes that are no instruction, or one that runs past the end.
    #[error("no instruction at {offset:#x}")]
    Undecodable {
        /// Bytes from the start of the function.
        offset: u32,
    },
    /// A branch into the middle of an instruction: data among the code, or a wrong size of the function.
    #[error("the branch at {offset:#x} leads into the middle of an instruction")]
    Overlapping {
        /// Bytes from the start of the function.
        offset: u32,
    },
}

/// Finds every exit of a function, all of whose bytes are `code`.
///
/// One pass from the first byte to the last is right, because on x86-64 ELF targets compilers keep jump tables in read-only data and
/// fill gaps with instructions; and a pass that got out of step is noticed by invalid instructions or by branches into the middle
/// of one, and is refused.
pub fn return_points(code: &[u8], address: u64) -> Result<ReturnPoints, ReturnPointsError> {
    if code.len() > MAX_FUNCTION_BYTES {
        return Err(ReturnPointsError::TooLarge);
    }
    let mut starts = vec![false; code.len()];
    let mut targets = vec![false; code.len()];
    let mut branches = Vec::new();
    let mut points = ReturnPoints::default();
    let mut recent: Vec<Instruction> = Vec::new();
    let mut factory = InstructionInfoFactory::new();
    let mut has_indirect_jump = false;
    for instruction in decode(code, address) {
        let offset = (instruction.ip() - address) as u32;
        if instruction.is_invalid() {
            return Err(ReturnPointsError::Undecodable { offset });
        }
        starts[offset as usize] = true;
        match instruction.flow_control() {
            FlowControl::Return => {
                let no_op = recent
                    .last()
                    .filter(|last| is_no_op(last))
                    .map(|last| last.ip() - address);
                let probe_offset = no_op.map_or(offset, |no_op| no_op as u32);
                points.returns.push(ReturnPoint {
                    offset,
                    probe_offset,
                    emulated: no_op.is_some(),
                });
            }
            FlowControl::IndirectBranch => {
                has_indirect_jump = true;
                if !is_switch(&instruction, &recent, &mut factory) {
                    points.tail_jumps.push(offset);
                }
            }
            FlowControl::UnconditionalBranch | FlowControl::ConditionalBranch | FlowControl::XbeginXabortXend => {
                match target_inside(&instruction, code, address) {
                    Some(target) => {
                        targets[target] = true;
                        branches.push((offset, target));
                    }
                    None => points.tail_jumps.push(offset),
                }
            }
            FlowControl::Next
            | FlowControl::Call
            | FlowControl::IndirectCall
            | FlowControl::Interrupt
            | FlowControl::Exception => {}
        }
        if recent.len() == RECENT_INSTRUCTIONS {
            recent.remove(0);
        }
        recent.push(instruction);
    }
    if let Some((offset, _)) = branches.iter().find(|(_, target)| !starts[*target]) {
        return Err(ReturnPointsError::Overlapping { offset: *offset });
    }
    for point in &mut points.returns {
        // A path that jumps straight to the `ret` would miss the no-op; where an indirect jump leads is not known.
        if targets[point.offset as usize] || has_indirect_jump {
            *point = ReturnPoint {
                probe_offset: point.offset,
                emulated: false,
                ..*point
            };
        }
    }
    Ok(points)
}

/// A jump through a table of the function's own targets, as LLVM and GCC write it: `movsxd r, [table + i*4]; add r, table; jmp r`,
/// possibly with other instructions between, or without position independence `jmp [table + i*8]`.
fn is_switch(jump: &Instruction, recent: &[Instruction], factory: &mut InstructionInfoFactory) -> bool {
    if jump.op0_kind() == OpKind::Memory {
        return jump.memory_base() == Register::None && jump.memory_index_scale() == 8;
    }
    let register = jump.op0_register();
    let mut writers = recent
        .iter()
        .rev()
        .take_while(|instruction| instruction.flow_control() == FlowControl::Next)
        .filter(|instruction| writes(instruction, register, factory));
    let (Some(add), Some(load)) = (writers.next(), writers.next()) else {
        return false;
    };
    load.code() == Code::Movsxd_r64_rm32
        && load.op1_kind() == OpKind::Memory
        && load.memory_index_scale() == 4
        && add.mnemonic() == Mnemonic::Add
        && add.op0_kind() == OpKind::Register
        && add.op1_kind() == OpKind::Register
        && add.op1_register() == load.memory_base()
}

fn writes(instruction: &Instruction, register: Register, factory: &mut InstructionInfoFactory) -> bool {
    let info = factory.info(instruction);
    info.used_registers()
        .iter()
        .any(|used| used.register().full_register() == register && is_write(used.access()))
}

#[cfg(test)]
mod tests {
    use super::*;

    const ADDRESS: u64 = 0x40_0000;

    #[test]
    fn every_ret_is_a_return_and_jumps_out_are_reported() {
        let code = [
            0x48, 0x85, 0xff, // test rdi, rdi
            0x74, 0x01, // je +1
            0xc3, // ret
            0xc2, 0x08, 0x00, // ret 8
            0xe9, 0x00, 0x10, 0x00, 0x00, // jmp outside
            0x0f, 0x84, 0x00, 0x10, 0x00, 0x00, // je outside
            0xff, 0xe0, // jmp rax
        ];
        let points = return_points(&code, ADDRESS).expect("plain code");
        assert_eq!(
            points.returns.iter().map(|point| point.offset).collect::<Vec<_>>(),
            [5, 6]
        );
        assert_eq!(points.tail_jumps, [9, 14, 20]);
        assert!(
            points
                .returns
                .iter()
                .all(|point| !point.emulated && point.probe_offset == point.offset)
        );
    }

    #[test]
    fn a_no_op_before_a_ret_is_preferred_if_no_path_avoids_it() {
        let straight = return_points(&[0x31, 0xc0, 0x90, 0xc3], ADDRESS).expect("plain code");
        assert_eq!(
            straight.returns,
            [ReturnPoint {
                offset: 3,
                probe_offset: 2,
                emulated: true
            }]
        );
        let jumped_to = return_points(&[0x74, 0x01, 0x90, 0xc3], ADDRESS).expect("plain code");
        assert_eq!(
            jumped_to.returns,
            [ReturnPoint {
                offset: 3,
                probe_offset: 3,
                emulated: false
            }]
        );
    }

    #[test]
    fn a_switch_does_not_leave_the_function() {
        let code = [
            0x48, 0x63, 0x14, 0x81, // movsxd rdx, [rcx+rax*4]
            0x48, 0x01, 0xca, // add rdx, rcx
            0x31, 0xc0, // xor eax, eax
            0xff, 0xe2, // jmp rdx
            0xc3,
        ];
        assert!(return_points(&code, ADDRESS).expect("plain code").tail_jumps.is_empty());
        let other_register = [&code[..9], &[0xff, 0xe6, 0xc3]].concat();
        assert_eq!(
            return_points(&other_register, ADDRESS).expect("plain code").tail_jumps,
            [9]
        );
    }

    #[test]
    fn code_that_cannot_be_read_in_step_is_refused() {
        assert_eq!(
            return_points(&[0x31], ADDRESS),
            Err(ReturnPointsError::Undecodable { offset: 0 })
        );
        // jmp into the immediate of a mov.
        let code = [0xeb, 0x01, 0xb8, 0xc3, 0xc3, 0xc3, 0xc3, 0xc3];
        assert_eq!(
            return_points(&code, ADDRESS),
            Err(ReturnPointsError::Overlapping { offset: 0 })
        );
    }

    proptest::proptest! {
        #[test]
        fn no_bytes_make_it_panic(code in proptest::collection::vec(proptest::num::u8::ANY, 0..300), address: u64) {
            let Ok(points) = return_points(&code, address) else { return Ok(()) };
            assert!(points.returns.iter().all(|point| (point.probe_offset as usize) < code.len()));
        }
    }
}
