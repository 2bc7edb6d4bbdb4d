//! Where a version of wasmtime keeps the places at which wasm was entered and left: read out of the trampolines that write
//! them, and checked against what is known of the version.
//!
//! `VMStoreContext` (`VMRuntimeLimits` up to wasmtime 32) has no stable layout, but every code object contains the offsets:
//! `array_to_wasm_trampoline` stores where wasm is entered, `wasm_to_array_trampoline` where it is left.

use iced_x86::{Code, FlowControl, Instruction, InstructionInfoFactory, OpKind, Register};
use wasmscope_common::{LAYOUT_ENTRY_SP, LAYOUT_GUEST_EXIT, LAYOUT_NO_HANDLER, LAYOUT_NO_RESULT};

use super::prologue::{decode, is_write};

/// Trampolines of one kind that are looked at; all of an image are made by the same code.
pub(super) const MAX_TRAMPOLINES: usize = 4;
/// Bytes of one that are looked at: the fields are written before the call, behind saves of registers and arguments.
pub(super) const MAX_TRAMPOLINE_BYTES: u32 = 1024;

/// Where the fields are, from the start of the store's record.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct StoreLayout {
    /// Bytes to the frame pointer of where wasm was left; the return address into the guest is the next word.
    pub base: u16,
    /// What the words from there on are.
    pub shape: Shape,
    /// Host functions return whether they succeeded; before that, those that fail do not return.
    pub has_result: bool,
}

/// What the words are that follow one another from [`StoreLayout::base`] on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Shape {
    /// Trampoline's exit fp, exit pc, entry sp, entry fp, entry trap handler; wasmtime 38 to 50.
    WithHandler,
    /// Trampoline's exit fp, exit pc, entry fp; wasmtime 37.
    WithoutHandler,
    /// Guest function's exit fp, exit pc, entry fp; wasmtime 27 to 36.
    GuestExit,
    /// Guest function's exit fp, exit pc, entry sp; wasmtime 24 to 26.
    GuestExitEntrySp,
}

/// Why activations cannot be followed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LayoutError {
    /// The version is not one that is known, and the image does not have the trampolines that would tell.
    #[error("wasmtime {0:?} is not known, and its code does not tell where activations are kept")]
    UnknownVersion(String),
    /// The trampolines write other fields than the version is known to have, or than one another.
    #[error("the code of wasmtime {0:?} keeps activations elsewhere than that version does")]
    Contradiction(String),
    /// The trampolines write fields that are arranged as in no known version.
    #[error("wasmtime {0:?} is not known, and arranges its activations in a new way")]
    UnknownShape(String),
}

impl StoreLayout {
    /// The layout of a major version whose source has been read: `crates/wasmtime/src/runtime/vm/vmcontext.rs`.
    pub fn of_major(major: u32) -> Option<Self> {
        let (base, shape) = match major {
            24..=26 => (0x18, Shape::GuestExitEntrySp),
            27..=32 => (0x18, Shape::GuestExit),
            33..=36 => (0x28, Shape::GuestExit),
            37 => (0x28, Shape::WithoutHandler),
            38..=42 => (0x28, Shape::WithHandler),
            43..=50 => (0x30, Shape::WithHandler),
            _ => return None,
        };
        let has_result = major >= 28;
        Some(Self {
            base,
            shape,
            has_result,
        })
    }

    /// As the programs have it, `LAYOUT_*`.
    pub fn encode(self) -> u32 {
        let flags = match self.shape {
            Shape::WithHandler => 0,
            Shape::WithoutHandler => LAYOUT_NO_HANDLER,
            Shape::GuestExit => LAYOUT_NO_HANDLER | LAYOUT_GUEST_EXIT,
            Shape::GuestExitEntrySp => LAYOUT_NO_HANDLER | LAYOUT_GUEST_EXIT | LAYOUT_ENTRY_SP,
        };
        let result = if self.has_result { 0 } else { LAYOUT_NO_RESULT };
        u32::from(self.base) | flags | result
    }

    fn exit(self) -> Exit {
        Exit {
            base: self.base,
            is_guest: matches!(self.shape, Shape::GuestExit | Shape::GuestExitEntrySp),
            has_result: self.has_result,
        }
    }

    fn entry(self) -> Entry {
        let word = |index: u16| Some(self.base + index * 8);
        match self.shape {
            Shape::WithHandler => Entry {
                stack_pointer: word(2),
                frame_pointer: word(3),
                handler: word(4),
            },
            Shape::WithoutHandler | Shape::GuestExit => Entry {
                frame_pointer: word(2),
                ..Entry::default()
            },
            Shape::GuestExitEntrySp => Entry {
                stack_pointer: word(2),
                ..Entry::default()
            },
        }
    }
}

/// What a trampoline that leaves wasm writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Exit {
    base: u16,
    is_guest: bool,
    /// It looks at what the host function returned.
    has_result: bool,
}

/// What a trampoline that enters wasm writes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Entry {
    stack_pointer: Option<u16>,
    frame_pointer: Option<u16>,
    handler: Option<u16>,
}

/// What the trampolines of an image say.
#[derive(Debug, Default)]
pub(super) struct Evidence {
    exit: Option<Exit>,
    entry: Option<Entry>,
    is_contradictory: bool,
}

impl Evidence {
    /// Takes the code of a trampoline through which hosts enter wasm.
    pub(super) fn add_entry(&mut self, code: &[u8]) {
        let stores = stores_to_field(code);
        let offset_of = |wanted: Value| {
            stores
                .iter()
                .find(|store| store.value == wanted)
                .map(|store| store.offset)
        };
        let entry = Entry {
            stack_pointer: offset_of(Value::StackPointer),
            frame_pointer: offset_of(Value::FramePointer),
            handler: offset_of(Value::Code),
        };
        if entry != Entry::default() {
            self.is_contradictory |= self.entry.is_some_and(|known| known != entry);
            self.entry = Some(entry);
        }
    }

    /// Takes the code of a trampoline through which guests call host functions.
    pub(super) fn add_exit(&mut self, code: &[u8]) {
        let stores = stores_to_field(code);
        let exit = stores.iter().find_map(|store| {
            let is_guest = match store.value {
                Value::FramePointer => false,
                Value::CallerFramePointer => true,
                _ => return None,
            };
            let next = store.offset.checked_add(8)?;
            let is_pair = |other: &Store| {
                other.value == Value::ReturnAddress && other.offset == next && other.record == store.record
            };
            stores.iter().any(is_pair).then_some(Exit {
                base: store.offset,
                is_guest,
                has_result: tests_result(code),
            })
        });
        if let Some(exit) = exit {
            self.is_contradictory |= self.exit.is_some_and(|known| known != exit);
            self.exit = Some(exit);
        }
    }

    /// The layout of the image, which says that it was made by `version`.
    pub(super) fn decide(&self, version: &str) -> Result<StoreLayout, LayoutError> {
        let major = version.split('.').next().and_then(|major| major.parse().ok());
        if let Some(known) = major.and_then(StoreLayout::of_major) {
            let agrees = !self.is_contradictory
                && self.exit.is_none_or(|exit| exit == known.exit())
                && self.entry.is_none_or(|entry| entry == known.entry());
            return agrees
                .then_some(known)
                .ok_or_else(|| LayoutError::Contradiction(version.to_owned()));
        }
        if self.is_contradictory {
            return Err(LayoutError::Contradiction(version.to_owned()));
        }
        let (Some(exit), Some(entry)) = (self.exit, self.entry) else {
            return Err(LayoutError::UnknownVersion(version.to_owned()));
        };
        let shapes = [
            Shape::WithHandler,
            Shape::WithoutHandler,
            Shape::GuestExit,
            Shape::GuestExitEntrySp,
        ];
        shapes
            .into_iter()
            .map(|shape| StoreLayout {
                base: exit.base,
                shape,
                has_result: exit.has_result,
            })
            // No trampoline of a record that large exists, and the words must not wrap.
            .filter(|layout| layout.base < 0x1000)
            .find(|layout| layout.exit() == exit && layout.entry() == entry)
            .ok_or_else(|| LayoutError::UnknownShape(version.to_owned()))
    }
}

/// What a register is known to hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Value {
    Unknown,
    /// An argument: the callee's or the caller's context.
    Context(Register),
    /// A pointer out of a context, at this offset.
    Record(Register, u64),
    StackPointer,
    /// The trampoline's own.
    FramePointer,
    /// Of the function that called the trampoline.
    CallerFramePointer,
    /// Where the trampoline returns to.
    ReturnAddress,
    /// An address within the trampoline.
    Code,
}

/// A word written to a record that a context points to.
#[derive(Clone, Copy, Debug)]
struct Store {
    record: (Register, u64),
    offset: u16,
    value: Value,
}

/// What a trampoline writes to such records before it calls anything.
fn stores_to_field(code: &[u8]) -> Vec<Store> {
    follow(code).0
}

/// Offset of the field that a trampoline calls, in the context that is its first argument, if it passes the next field as
/// second argument: `VMLowering`, which every version has had as `callee, data`.
pub(super) fn called_lowering(code: &[u8]) -> Option<u32> {
    let (callee, data) = follow(code).1?;
    let (Value::Record(Register::RDI, callee), Value::Record(Register::RDI, data)) = (callee, data) else {
        return None;
    };
    let offset = u32::try_from(callee).ok()?;
    (data == callee.checked_add(8)?).then_some(offset)
}

/// What a trampoline writes to such records before it calls anything, and whom it calls first with which second argument.
fn follow(code: &[u8]) -> (Vec<Store>, Option<(Value, Value)>) {
    let mut registers = [Value::Unknown; 16];
    registers[Register::RDI.number()] = Value::Context(Register::RDI);
    registers[Register::RSI.number()] = Value::Context(Register::RSI);
    registers[Register::RSP.number()] = Value::StackPointer;
    let mut factory = InstructionInfoFactory::new();
    let mut stores = Vec::new();
    let mut called = None;
    // Any address that leaves room for the whole trampoline will do: code refers to itself relatively.
    let address = 0x1000;
    // Where a branch that was not taken leads: from there on, registers may hold what another path left.
    let mut straight_end = u64::MAX;
    for instruction in decode(code, address) {
        if instruction.is_invalid() || instruction.ip() >= straight_end {
            break;
        }
        match instruction.flow_control() {
            FlowControl::Next => {}
            FlowControl::ConditionalBranch if instruction.near_branch_target() > instruction.ip() => {
                straight_end = straight_end.min(instruction.near_branch_target());
                continue;
            }
            FlowControl::IndirectCall if instruction.op0_kind() == OpKind::Register => {
                let callee = registers[instruction.op0_register().full_register().number()];
                called = Some((callee, registers[Register::RSI.number()]));
                break;
            }
            _ => break,
        }
        let read = |register: Register| match register {
            register if register.is_gpr64() => registers[register.number()],
            _ => Value::Unknown,
        };
        let plain_memory = instruction.memory_index() == Register::None
            && !instruction.is_ip_rel_memory_operand()
            && instruction.memory_base().is_gpr64();
        let value = match instruction.code() {
            Code::Mov_r64_rm64 | Code::Mov_rm64_r64 if instruction.op1_kind() == OpKind::Register => {
                let value = read(instruction.op1_register());
                if instruction.op0_kind() == OpKind::Memory {
                    if plain_memory
                        && let Value::Record(context, field) = read(instruction.memory_base())
                        && let Ok(offset) = u16::try_from(instruction.memory_displacement64())
                    {
                        stores.push(Store {
                            record: (context, field),
                            offset,
                            value,
                        });
                    }
                    continue;
                }
                match (instruction.op0_register(), value) {
                    (Register::RBP, Value::StackPointer) => Value::FramePointer,
                    (_, value) => value,
                }
            }
            Code::Mov_r64_rm64 if plain_memory => {
                match (read(instruction.memory_base()), instruction.memory_displacement64()) {
                    (Value::Context(context), field) => Value::Record(context, field),
                    (Value::FramePointer, 0) => Value::CallerFramePointer,
                    (Value::FramePointer, 8) => Value::ReturnAddress,
                    _ => Value::Unknown,
                }
            }
            Code::Lea_r64_m if instruction.is_ip_rel_memory_operand() => {
                let target = instruction.ip_rel_memory_address();
                let is_own = (address..address + code.len() as u64).contains(&target);
                if is_own { Value::Code } else { Value::Unknown }
            }
            _ => Value::Unknown,
        };
        forget_written(&instruction, &mut registers, &mut factory);
        if instruction.op0_kind() == OpKind::Register && instruction.op0_register().is_gpr64() {
            let register = instruction.op0_register();
            // Whatever is done to the stack pointer, it stays that.
            if register != Register::RSP && value != Value::Unknown {
                registers[register.number()] = value;
            }
        }
    }
    (stores, called)
}

/// Whether the boolean that a call returned is looked at first of all.
fn tests_result(code: &[u8]) -> bool {
    let mut instructions = decode(code, 0x1000);
    let call = instructions
        .by_ref()
        .find(|instruction| instruction.is_invalid() || instruction.flow_control() == FlowControl::IndirectCall);
    let next = instructions.next();
    call.is_some_and(|call| !call.is_invalid())
        && next.is_some_and(|next| next.code() == Code::Test_rm8_r8 && next.op0_register() == Register::AL)
}

fn forget_written(instruction: &Instruction, registers: &mut [Value; 16], factory: &mut InstructionInfoFactory) {
    for used in factory.info(instruction).used_registers() {
        let register = used.register().full_register();
        if is_write(used.access()) && register.is_gpr64() && register != Register::RSP {
            registers[register.number()] = Value::Unknown;
        }
    }
}
