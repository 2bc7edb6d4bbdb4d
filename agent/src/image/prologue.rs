//! Where in an x86-64 function to put a uprobe for its entry: at an instruction that the kernel emulates and that still has the
//! arguments.
//!
//! An emulated instruction costs a tenth of a single-stepped one. A position inside a function is only offered if it is reached
//! exactly once per call, and arguments are only offered where the instructions before prove that they are unchanged.

use wasmscope_common::MAX_FRAME_BYTES;

use iced_x86::{
    Code, Decoder, DecoderOptions, FlowControl, Instruction, InstructionInfoFactory, Mnemonic, OpAccess, OpKind,
    Register,
};

/// Longest function looked at, bytes; the largest of wasmtime's own are below 100 KB.
pub const MAX_FUNCTION_BYTES: usize = 1 << 20;
/// Integer arguments followed.
pub const ARGUMENT_COUNT: usize = 4;
/// Stack slots followed in a prologue.
const MAX_SLOTS: usize = 64;

const RSP: usize = 4;
/// Registers of the first integer arguments, in x86 numbering.
const ARGUMENT_REGISTERS: [usize; ARGUMENT_COUNT] = [7, 6, 2, 1];

/// Where an argument is at a point of a function.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ArgLocation {
    /// In a general register, in x86 numbering: `rax rcx rdx rbx rsp rbp rsi rdi r8 … r15`.
    Register(u8),
    /// In memory, this many bytes (≥ 0) above the stack pointer.
    Stack {
        /// Bytes above the stack pointer.
        offset: u32,
    },
    /// Not known to be anywhere.
    Lost,
}

/// A place for an entry probe.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ProbePoint {
    /// Bytes from the start of the function.
    pub offset: u32,
    /// The kernel emulates the instruction; otherwise it single-steps it.
    pub emulated: bool,
    /// Where the arguments are when the probe fires, before the instruction runs.
    pub args: [ArgLocation; ARGUMENT_COUNT],
    /// Stack pointer at the probe minus that at the function's first instruction, bytes, zero or negative.
    pub sp_delta: i32,
}

impl ProbePoint {
    /// The function's first instruction.
    fn at_entry(emulated: bool) -> Self {
        let args = ARGUMENT_REGISTERS.map(|register| ArgLocation::Register(register as u8));
        Self {
            offset: 0,
            emulated,
            args,
            sp_delta: 0,
        }
    }
}

/// The cheapest place for an entry probe at which all `needed` arguments are known; the first instruction if there is no better.
///
/// `code` is the whole function: a loop that comes back to its beginning is only seen there.
pub fn entry_point(code: &[u8], address: u64, needed: [bool; ARGUMENT_COUNT]) -> ProbePoint {
    let mut state = State::at_entry();
    let mut factory = InstructionInfoFactory::new();
    // Bytes from the start up to which no branch of the function leads, the first instruction aside.
    let mut straight_end: Option<u64> = None;
    for instruction in decode(code, address) {
        let offset = instruction.ip() - address;
        if instruction.is_invalid() {
            break;
        }
        if is_emulated(&instruction, code, offset) {
            if offset == 0 {
                return ProbePoint::at_entry(true);
            }
            let straight_end = *straight_end.get_or_insert_with(|| first_branch_target(code, address));
            if offset >= straight_end {
                break;
            }
            if let Some(point) = state.probe_point(offset, needed) {
                return point;
            }
        }
        if instruction.flow_control() != FlowControl::Next || !state.apply(&instruction, &mut factory) {
            break;
        }
    }
    ProbePoint::at_entry(false)
}

pub(super) fn decode(code: &[u8], address: u64) -> impl Iterator<Item = Instruction> {
    let code = &code[..code.len().min(MAX_FUNCTION_BYTES)];
    // Instruction pointers beyond the end of the address space would wrap.
    let code = if address.checked_add(code.len() as u64).is_some() {
        code
    } else {
        &[]
    };
    let mut decoder = Decoder::with_ip(64, code, address, DecoderOptions::NONE);
    std::iter::from_fn(move || decoder.can_decode().then(|| decoder.decode()))
}

/// Offset within the function that a direct branch leads to.
pub(super) fn target_inside(instruction: &Instruction, code: &[u8], address: u64) -> Option<usize> {
    let target = instruction.near_branch_target().checked_sub(address)?;
    usize::try_from(target).ok().filter(|target| *target < code.len())
}

/// The lowest offset above zero that a branch of the function leads to; one if that cannot be told.
fn first_branch_target(code: &[u8], address: u64) -> u64 {
    const UNKNOWN: u64 = 1;
    let mut lowest = u64::MAX;
    if code.len() > MAX_FUNCTION_BYTES {
        return UNKNOWN;
    }
    for instruction in decode(code, address) {
        match instruction.flow_control() {
            _ if instruction.is_invalid() => return UNKNOWN,
            FlowControl::IndirectBranch => return UNKNOWN,
            FlowControl::UnconditionalBranch | FlowControl::ConditionalBranch | FlowControl::XbeginXabortXend => {
                if let Some(target) = target_inside(&instruction, code, address).filter(|target| *target > 0) {
                    lowest = lowest.min(target as u64);
                }
            }
            _ => {}
        }
    }
    // A target is where the repetition begins, so it is itself passed more than once.
    lowest
}

/// What `arch/x86/kernel/uprobes.c` emulates (`branch_xol_ops`, `push_xol_ops`). Kernels before 6.18 single-step no-ops of more than
/// one opcode byte: that costs, but is right.
pub(super) fn is_emulated(instruction: &Instruction, code: &[u8], offset: u64) -> bool {
    let Some(bytes) = code
        .get(offset as usize..)
        .and_then(|rest| rest.get(..instruction.len()))
    else {
        return false;
    };
    is_no_op(instruction)
        || matches!(
            bytes,
            [0x50..=0x57] | [0x41, 0x50..=0x57] | [0xeb | 0x70..=0x7f, _] | [0xe8 | 0xe9, ..] | [0x0f, 0x80..=0x8f, ..]
        )
}

pub(super) fn is_no_op(instruction: &Instruction) -> bool {
    matches!(
        instruction.code(),
        Code::Nopw | Code::Nopd | Code::Nopq | Code::Nop_rm16 | Code::Nop_rm32 | Code::Nop_rm64
    )
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Value {
    Unknown,
    Argument(usize),
    /// The stack pointer at the function's entry plus this.
    StackAddress(i64),
}

/// What is known of registers and stack at a point of the first basic block.
struct State {
    registers: [Value; 16],
    /// Eight-byte slots, by distance from the stack pointer at entry.
    slots: Vec<(i64, Value)>,
    /// An address of the stack is somewhere it is not followed, so a store through an unknown pointer may hit any slot.
    stack_escaped: bool,
}

impl State {
    fn at_entry() -> Self {
        let mut registers = [Value::Unknown; 16];
        for (argument, register) in ARGUMENT_REGISTERS.into_iter().enumerate() {
            registers[register] = Value::Argument(argument);
        }
        registers[RSP] = Value::StackAddress(0);
        Self {
            registers,
            slots: Vec::new(),
            stack_escaped: false,
        }
    }

    fn stack_pointer(&self) -> Option<i64> {
        match self.registers[RSP] {
            Value::StackAddress(distance) => Some(distance),
            _ => None,
        }
    }

    fn probe_point(&self, offset: u64, needed: [bool; ARGUMENT_COUNT]) -> Option<ProbePoint> {
        let stack_pointer = self.stack_pointer()?;
        let args = std::array::from_fn(|argument| self.locate(argument, stack_pointer));
        let all_known = args
            .iter()
            .zip(needed)
            .all(|(location, needed)| !needed || *location != ArgLocation::Lost);
        let sp_delta = i32::try_from(stack_pointer)
            .ok()
            .filter(|delta| delta.unsigned_abs() <= MAX_FRAME_BYTES)?;
        all_known.then_some(ProbePoint {
            offset: offset as u32,
            emulated: true,
            args,
            sp_delta,
        })
    }

    fn locate(&self, argument: usize, stack_pointer: i64) -> ArgLocation {
        let holds = |register: usize| self.registers[register] == Value::Argument(argument);
        let own = ARGUMENT_REGISTERS[argument];
        if let Some(register) = std::iter::once(own).chain(0..16).find(|register| holds(*register)) {
            return ArgLocation::Register(register as u8);
        }
        // Below the stack pointer, the kernel's own handling of a probe may have written.
        self.slots
            .iter()
            .filter(|(_, value)| *value == Value::Argument(argument))
            .find_map(|(slot, _)| u32::try_from(slot - stack_pointer).ok())
            .map_or(ArgLocation::Lost, |offset| ArgLocation::Stack { offset })
    }

    /// Follows one instruction; `false` if the stack pointer is lost, after which nothing can be said.
    fn apply(&mut self, instruction: &Instruction, factory: &mut InstructionInfoFactory) -> bool {
        let Some(stack_pointer) = self.stack_pointer() else {
            return false;
        };
        match instruction.code() {
            Code::Push_r64 => {
                let value = self.register(instruction.op0_register());
                self.registers[RSP] = Value::StackAddress(stack_pointer - 8);
                self.store(stack_pointer - 8, 8, value);
            }
            Code::Pop_r64 => {
                let value = self.load(stack_pointer);
                self.registers[RSP] = Value::StackAddress(stack_pointer + 8);
                self.set(instruction.op0_register(), value);
            }
            Code::Sub_rm64_imm8 | Code::Sub_rm64_imm32 | Code::Add_rm64_imm8 | Code::Add_rm64_imm32
                if instruction.op0_kind() == OpKind::Register && instruction.op0_register() == Register::RSP =>
            {
                let amount = instruction.immediate(1) as i64;
                let is_sub = instruction.mnemonic() == Mnemonic::Sub;
                let moved = if is_sub {
                    stack_pointer.checked_sub(amount)
                } else {
                    stack_pointer.checked_add(amount)
                };
                let Some(moved) = moved.filter(|moved| i32::try_from(*moved).is_ok()) else {
                    return false;
                };
                self.registers[RSP] = Value::StackAddress(moved);
            }
            Code::Mov_r64_rm64 | Code::Mov_rm64_r64 => self.apply_move(instruction),
            Code::Lea_r64_m => {
                let value = self
                    .stack_operand(instruction)
                    .map_or(Value::Unknown, Value::StackAddress);
                let from_stack = [instruction.memory_base(), instruction.memory_index()]
                    .into_iter()
                    .any(|register| matches!(self.register(register), Value::StackAddress(_)));
                self.stack_escaped |= from_stack && value == Value::Unknown;
                self.set(instruction.op0_register(), value);
            }
            _ => self.apply_other(instruction, factory),
        }
        // A function that releases more than it reserved is none that is understood here.
        self.slots.len() <= MAX_SLOTS && self.stack_pointer().is_some_and(|distance| distance <= 0)
    }

    fn apply_move(&mut self, instruction: &Instruction) {
        let value = match instruction.op1_kind() {
            OpKind::Register => self.register(instruction.op1_register()),
            _ => self
                .stack_operand(instruction)
                .map_or(Value::Unknown, |slot| self.load(slot)),
        };
        if instruction.op0_kind() == OpKind::Register {
            self.set(instruction.op0_register(), value);
            return;
        }
        if let Some(slot) = self.stack_operand(instruction) {
            self.store(slot, 8, value);
        } else {
            self.stack_escaped |= matches!(value, Value::StackAddress(_));
            self.store_somewhere(instruction);
        }
    }

    fn apply_other(&mut self, instruction: &Instruction, factory: &mut InstructionInfoFactory) {
        let info = factory.info(instruction);
        for memory in info.used_memory() {
            if !is_write(memory.access()) {
                continue;
            }
            let bytes = memory.memory_size().size() as i64;
            match self.stack_operand(instruction) {
                Some(slot) if instruction.op0_kind() == OpKind::Memory && bytes > 0 => {
                    self.store(slot, bytes, Value::Unknown);
                }
                _ => self.slots.clear(),
            }
        }
        for used in info.used_registers() {
            let register = used.register();
            if matches!(self.register(register), Value::StackAddress(_)) && register.full_register() != Register::RSP {
                self.stack_escaped = true;
            }
        }
        for used in info.used_registers() {
            if is_write(used.access()) {
                self.set(used.register(), Value::Unknown);
            }
        }
    }

    fn store_somewhere(&mut self, instruction: &Instruction) {
        let into_stack = [instruction.memory_base(), instruction.memory_index()]
            .into_iter()
            .any(|register| matches!(self.register(register), Value::StackAddress(_)));
        if into_stack || self.stack_escaped {
            self.slots.clear();
        }
    }

    /// Distance of a memory operand from the stack pointer at entry, if it is a fixed place of the stack.
    fn stack_operand(&self, instruction: &Instruction) -> Option<i64> {
        if instruction.memory_index() != Register::None || instruction.segment_prefix() != Register::None {
            return None;
        }
        match self.register(instruction.memory_base()) {
            Value::StackAddress(distance) => distance.checked_add(instruction.memory_displacement64() as i64),
            _ => None,
        }
    }

    fn register(&self, register: Register) -> Value {
        // Only whole registers hold whole values.
        if register.is_gpr64() {
            self.registers[register.number()]
        } else {
            Value::Unknown
        }
    }

    fn set(&mut self, register: Register, value: Value) {
        let full = register.full_register();
        if full.is_gpr64() {
            self.registers[full.number()] = value;
        }
    }

    fn load(&self, slot: i64) -> Value {
        self.slots
            .iter()
            .find(|(at, _)| *at == slot)
            .map_or(Value::Unknown, |(_, value)| *value)
    }

    fn store(&mut self, slot: i64, bytes: i64, value: Value) {
        self.slots
            .retain(|(at, _)| at.saturating_add(8) <= slot || *at >= slot.saturating_add(bytes));
        if value != Value::Unknown {
            self.slots.push((slot, value));
        }
    }
}

pub(super) fn is_write(access: OpAccess) -> bool {
    matches!(
        access,
        OpAccess::Write | OpAccess::CondWrite | OpAccess::ReadWrite | OpAccess::ReadCondWrite
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    const ADDRESS: u64 = 0x40_0000;
    const FIRST_TWO: [bool; ARGUMENT_COUNT] = [true, true, false, false];

    fn register(number: u8) -> ArgLocation {
        ArgLocation::Register(number)
    }

    #[test]
    fn a_function_that_begins_with_a_push_is_probed_there() {
        for code in [
            &[0x55, 0x48, 0x89, 0xe5, 0x5d, 0xc3][..],
            &[0x41, 0x57, 0x41, 0x5f, 0xc3],
        ] {
            let point = entry_point(code, ADDRESS, [true; ARGUMENT_COUNT]);
            assert_eq!((point.offset, point.emulated, point.sp_delta), (0, true, 0));
            assert_eq!(point.args, [7, 6, 2, 1].map(register));
        }
    }

    /// The shape of `array_call_trampoline` in wasmtime's command.
    #[test]
    fn arguments_are_followed_into_the_stack_and_other_registers() {
        let code = [
            0x48, 0x83, 0xec, 0x48, // sub rsp, 0x48
            0x48, 0x89, 0x7c, 0x24, 0x10, // mov [rsp+0x10], rdi
            0x48, 0x89, 0xd0, // mov rax, rdx
            0x48, 0x8b, 0x56, 0x08, // mov rdx, [rsi+8]
            0x31, 0xff, // xor edi, edi
            0x48, 0x85, 0xd2, // test rdx, rdx
            0x74, 0x05, // je
            0x48, 0x83, 0xc4, 0x48, // add rsp, 0x48
            0xc3, // ret
            0x0f, 0x0b, // ud2
        ];
        let point = entry_point(&code, ADDRESS, FIRST_TWO);
        assert_eq!((point.offset, point.emulated, point.sp_delta), (21, true, -0x48));
        assert_eq!(
            point.args,
            [
                ArgLocation::Stack { offset: 0x10 },
                register(6),
                register(0),
                register(1)
            ]
        );
    }

    #[test]
    fn a_place_without_a_needed_argument_is_not_taken() {
        let code = [
            0x48, 0x83, 0xec, 0x08, // sub rsp, 8
            0x48, 0x8b, 0x3f, // mov rdi, [rdi]
            0xe8, 0, 0, 0, 0, // call
            0xc3,
        ];
        let needs_first = entry_point(&code, ADDRESS, [true, false, false, false]);
        assert_eq!((needs_first.offset, needs_first.emulated), (0, false));
        let needs_second = entry_point(&code, ADDRESS, [false, true, false, false]);
        assert_eq!((needs_second.offset, needs_second.emulated), (7, true));
        assert_eq!(needs_second.args[0], ArgLocation::Lost);
    }

    #[test]
    fn a_slot_that_is_overwritten_is_lost() {
        for overwrite in [
            &[0x48, 0xc7, 0x44, 0x24, 0x08, 1, 0, 0, 0][..], // mov qword [rsp+8], 1
            &[0xc6, 0x44, 0x24, 0x0f, 1],                    // mov byte [rsp+15], 1
            &[0x48, 0xc7, 0x44, 0x04, 0x08, 1, 0, 0, 0],     // mov qword [rsp+rax+8], 1
        ] {
            let mut code = vec![0x48, 0x83, 0xec, 0x18, 0x48, 0x89, 0x7c, 0x24, 0x08, 0x31, 0xff]; // sub; mov [rsp+8], rdi; xor edi, edi
            code.extend(overwrite);
            code.extend([0x90, 0xc3]);
            let point = entry_point(&code, ADDRESS, [true, false, false, false]);
            assert_eq!((point.offset, point.emulated), (0, false), "{overwrite:x?}");
        }
    }

    #[test]
    fn a_store_through_an_escaped_address_of_the_stack_loses_its_slots() {
        let store = [0x48, 0x89, 0x02]; // mov [rdx], rax
        let escape = [0x48, 0x8d, 0x44, 0x24, 0x08, 0x48, 0x89, 0x06]; // lea rax, [rsp+8]; mov [rsi], rax
        let head = [0x48, 0x83, 0xec, 0x18, 0x48, 0x89, 0x7c, 0x24, 0x08, 0x31, 0xff];
        let with = [&head[..], &escape, &store, &[0x90, 0xc3]].concat();
        let without = [&head[..], &store, &[0x90, 0xc3]].concat();
        assert!(!entry_point(&with, ADDRESS, [true, false, false, false]).emulated);
        assert!(entry_point(&without, ADDRESS, [true, false, false, false]).emulated);
    }

    #[test]
    fn a_place_inside_a_loop_is_not_taken() {
        let code = [
            0x48, 0x83, 0xec, 0x08, // sub rsp, 8
            0x48, 0xff, 0xce, // top: dec rsi
            0x75, 0xfb, // jne top
            0x48, 0x83, 0xc4, 0x08, 0xc3,
        ];
        let point = entry_point(&code, ADDRESS, [true, false, false, false]);
        assert_eq!((point.offset, point.emulated), (0, false));
    }

    #[test]
    fn branches_with_an_operand_size_prefix_are_refused_as_the_kernel_does() {
        let code = [0x66, 0x74, 0x00, 0xc3];
        assert!(!entry_point(&code, ADDRESS, [false; ARGUMENT_COUNT]).emulated);
    }

    #[test]
    fn endbr_and_pause_are_no_no_ops() {
        for code in [&[0xf3, 0x0f, 0x1e, 0xfa, 0xc3][..], &[0xf3, 0x90, 0xc3]] {
            assert!(
                !entry_point(code, ADDRESS, [false; ARGUMENT_COUNT]).emulated,
                "{code:x?}"
            );
        }
        assert!(entry_point(&[0x0f, 0x1f, 0x44, 0, 0, 0xc3], ADDRESS, [true; ARGUMENT_COUNT]).emulated);
    }

    proptest::proptest! {
        #[test]
        fn no_bytes_make_it_panic(
            code in proptest::collection::vec(proptest::num::u8::ANY, 0..300), address: u64, needed: [bool; ARGUMENT_COUNT],
        ) {
            let point = entry_point(&code, address, needed);
            if point.emulated {
                assert!((point.offset as usize) < code.len() && point.sp_delta <= 0);
                for (location, needed) in point.args.iter().zip(needed) {
                    assert!(!needed || *location != ArgLocation::Lost);
                }
            }
        }
    }
}
