//! Finds, in a host without symbols, the function that swaps a thread's activation, and with it the thread-local slot
//! that holds one: by what it does, as no other function does.
//!
//! `tls::raw::replace(new)` (wasmtime 25 to 50: `crates/wasmtime/src/runtime/vm/traphandlers.rs`) stores `new | 1` in a
//! thread-local word whose former value it has read and of which it has tested bit 0. It is never inlined where async
//! support is built in, which is the default.

use std::collections::BTreeSet;

use iced_x86::{Instruction, InstructionInfoFactory, Mnemonic, OpAccess, OpKind, Register};

use super::{
    ReadAt,
    host::{HostFunction, HostImage, TlsModel, TlsSlot},
    prologue::decode,
    read_exact_at,
    unwind_table::{Extent, UnwindTable},
};

/// The function has 100 bytes, whatever the version.
const MAX_SWAP_BYTES: u64 = 512;
/// Code searched of one file; wasmtime's own command has 40 MB.
const MAX_CODE_BYTES: u64 = 512 << 20;
/// Functions looked up.
const MAX_LOOK_UPS: u32 = 1_000_000;
/// Functions looked into; wasmtime's own command has some thousands that set bit 0 of a register.
const MAX_CANDIDATES: usize = 200_000;
const CHUNK_BYTES: u64 = 1 << 20;
/// Length of `or r64, 1`.
const PATTERN_BYTES: u64 = 4;
/// What the function is called where there are symbols.
const PATH: &str = "wasmtime::runtime::vm::traphandlers::tls::raw::replace";

/// The function and its slot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ActivationSwap {
    /// The function.
    pub function: HostFunction,
    /// Where it keeps the activation.
    pub slot: TlsSlot,
}

/// The one function of a file that swaps activations; `None` if there is none, or if several might be it.
pub fn find<R: ReadAt + ?Sized>(reader: &R, image: &HostImage, table: &UnwindTable) -> Option<ActivationSwap> {
    let mut found = None;
    for function in candidates(reader, image, table) {
        let Ok(code) = read_exact_at(reader, function.file_offset, function.size as usize) else {
            continue;
        };
        let Some(slot) = swapped_slot(&code, function.address).and_then(|place| slot(reader, image, place)) else {
            continue;
        };
        if found.is_some() {
            return None;
        }
        found = Some(ActivationSwap {
            function: HostFunction {
                address: function.address,
                size: function.size,
                file_offset: function.file_offset,
                path: PATH,
            },
            slot,
        });
    }
    found
}

/// Small functions that set bit 0 of a register.
fn candidates<R: ReadAt + ?Sized>(reader: &R, image: &HostImage, table: &UnwindTable) -> Vec<Extent> {
    let mut found = Vec::new();
    let mut seen = BTreeSet::new();
    let mut left = MAX_CODE_BYTES;
    let mut look_ups = 0;
    // The function looked at last: what it holds more of needs no further look.
    let mut last = 0..0;
    for load in image.loads.iter().filter(|load| load.is_executable) {
        let end = load.file_bytes.min(left);
        left -= end;
        let mut position = 0;
        while position < end {
            // Overlapping, for an instruction across two chunks.
            let length = (CHUNK_BYTES + PATTERN_BYTES - 1).min(end - position);
            let Some(Ok(bytes)) = load
                .file_offset
                .checked_add(position)
                .map(|offset| read_exact_at(reader, offset, length as usize))
            else {
                break;
            };
            for at in memchr::memchr_iter(0x83, &bytes) {
                if !sets_bit_0(&bytes, at) {
                    continue;
                }
                let Some(address) = load.address.checked_add(position + at as u64) else {
                    continue;
                };
                if last.contains(&address) {
                    continue;
                }
                look_ups += 1;
                if look_ups > MAX_LOOK_UPS {
                    return found;
                }
                let Some(function) = table.function_at(reader, address) else {
                    continue;
                };
                last = function.address..function.address.saturating_add(function.size);
                if function.size <= MAX_SWAP_BYTES && seen.insert(function.address) {
                    found.push(function);
                    if found.len() >= MAX_CANDIDATES {
                        return found;
                    }
                }
            }
            position += CHUNK_BYTES;
        }
    }
    found
}

/// Whether the opcode byte at `at` is that of `or r64, 1`.
fn sets_bit_0(bytes: &[u8], at: usize) -> bool {
    let Some(instruction) = at.checked_sub(1).and_then(|start| bytes.get(start..start + 4)) else {
        return false;
    };
    matches!(instruction, [0x48 | 0x49, 0x83, 0xc8..=0xcf, 0x01])
}

/// What offsets into thread-local storage are relative to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Base {
    /// The thread pointer.
    Thread,
    /// The block that the library's table entry at this address names.
    Block(u64),
}

/// A place in thread-local storage.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Place {
    base: Base,
    offset: i64,
}

/// What is known of a register.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Value {
    Unknown,
    /// The argument.
    New,
    /// The argument with bit 0 set.
    Tagged,
    Constant(i64),
    /// An address within the file.
    Address(u64),
    /// The address of a place.
    At(Place),
    /// What was read from a place.
    ReadFrom(Place),
}

fn slot<R: ReadAt + ?Sized>(reader: &R, image: &HostImage, place: Place) -> Option<TlsSlot> {
    let tls = image.tls?;
    match place.base {
        Base::Thread if image.is_executable => {
            let end = tls
                .address
                .checked_add(tls.memory_bytes)?
                .checked_next_multiple_of(tls.align)?;
            let block_offset = u64::try_from(place.offset.checked_add_unsigned(end - tls.address)?).ok()?;
            (block_offset < tls.memory_bytes).then_some(TlsSlot {
                block_offset,
                model: TlsModel::LocalExec {
                    thread_pointer_offset: place.offset,
                },
            })
        }
        Base::Block(entry) if !image.is_executable => {
            // The entry is the library's number, which the loader fills in, and an offset, which is there already.
            let bytes = read_exact_at(reader, image.file_offset(entry.checked_add(8)?)?, 8).ok()?;
            let within = i64::from_le_bytes(bytes.try_into().ok()?);
            let block_offset = u64::try_from(within.checked_add(place.offset)?).ok()?;
            (block_offset < tls.memory_bytes).then_some(TlsSlot {
                block_offset,
                model: TlsModel::Dynamic,
            })
        }
        _ => None,
    }
}

/// The place that `code` swaps its argument into, if that is what it does.
///
/// One pass from the first byte to the last: the way that is taken once a thread is initialised lies in a line.
fn swapped_slot(code: &[u8], address: u64) -> Option<Place> {
    let mut values = [Value::Unknown; 16];
    values[Register::RDI.number()] = Value::New;
    let mut factory = InstructionInfoFactory::new();
    let (mut tested, mut stored) = (Vec::new(), None);
    for instruction in decode(code, address) {
        if instruction.is_invalid() {
            return None;
        }
        if instruction.mnemonic() == Mnemonic::Test
            && instruction.op0_kind() == OpKind::Register
            && is_immediate(&instruction, 1)
            && let Value::ReadFrom(place) = value(&values, instruction.op0_register().full_register())
        {
            tested.push(place);
        }
        if instruction.mnemonic() == Mnemonic::Mov
            && instruction.op0_kind() == OpKind::Memory
            && instruction.op1_kind() == OpKind::Register
            && value(&values, instruction.op1_register()) == Value::Tagged
            && let Some(place) = place(&values, &instruction)
        {
            if stored.is_some() {
                return None;
            }
            stored = Some(place);
        }
        apply(&mut values, &instruction, &mut factory);
    }
    stored.filter(|place| tested.contains(place))
}

fn is_immediate(instruction: &Instruction, wanted: u64) -> bool {
    instruction.op_count() == 2
        && !matches!(instruction.op1_kind(), OpKind::Register | OpKind::Memory)
        && instruction.immediate(1) == wanted
}

/// What is known of a 64-bit register.
fn value(values: &[Value; 16], register: Register) -> Value {
    if register.is_gpr64() {
        values[register.number()]
    } else {
        Value::Unknown
    }
}

/// The place in thread-local storage that a memory operand is.
fn place(values: &[Value; 16], instruction: &Instruction) -> Option<Place> {
    if instruction.memory_index() != Register::None || instruction.is_ip_rel_memory_operand() {
        return None;
    }
    let displacement = instruction.memory_displacement64() as i64;
    if instruction.segment_prefix() == Register::FS {
        let offset = match instruction.memory_base() {
            Register::None => displacement,
            base => match value(values, base) {
                Value::Constant(offset) => offset.checked_add(displacement)?,
                _ => return None,
            },
        };
        return Some(Place {
            base: Base::Thread,
            offset,
        });
    }
    match value(values, instruction.memory_base()) {
        Value::At(place) => Some(Place {
            offset: place.offset.checked_add(displacement)?,
            ..place
        }),
        _ => None,
    }
}

/// What an instruction makes of the registers.
fn apply(values: &mut [Value; 16], instruction: &Instruction, factory: &mut InstructionInfoFactory) {
    let result = match (instruction.mnemonic(), instruction.op1_kind()) {
        (Mnemonic::Mov, OpKind::Register) => value(values, instruction.op1_register()),
        (Mnemonic::Mov, OpKind::Memory) => match place(values, instruction) {
            // The first word of a thread's control block is its own address.
            Some(
                place @ Place {
                    base: Base::Thread,
                    offset: 0,
                },
            ) => Value::At(place),
            Some(place) => Value::ReadFrom(place),
            None => Value::Unknown,
        },
        (Mnemonic::Mov, OpKind::Immediate32to64 | OpKind::Immediate64) => {
            Value::Constant(instruction.immediate(1) as i64)
        }
        (Mnemonic::Lea, _) if instruction.is_ip_rel_memory_operand() => {
            Value::Address(instruction.ip_rel_memory_address())
        }
        (Mnemonic::Lea, _) => place(values, instruction).map_or(Value::Unknown, Value::At),
        (Mnemonic::Or, _)
            if is_immediate(instruction, 1) && value(values, instruction.op0_register()) == Value::New =>
        {
            Value::Tagged
        }
        (Mnemonic::Call, _) => {
            let block = match value(values, Register::RDI) {
                Value::Address(entry) => Value::At(Place {
                    base: Base::Block(entry),
                    offset: 0,
                }),
                _ => Value::Unknown,
            };
            for register in [
                Register::RCX,
                Register::RDX,
                Register::RSI,
                Register::RDI,
                Register::R8,
                Register::R9,
                Register::R10,
                Register::R11,
            ] {
                values[register.number()] = Value::Unknown;
            }
            values[Register::RAX.number()] = block;
            return;
        }
        _ => Value::Unknown,
    };
    for used in factory.info(instruction).used_registers() {
        let written = matches!(
            used.access(),
            OpAccess::Write | OpAccess::CondWrite | OpAccess::ReadWrite | OpAccess::ReadCondWrite
        );
        let register = used.register().full_register();
        if written && register.is_gpr64() {
            values[register.number()] = Value::Unknown;
        }
    }
    if instruction.op0_kind() == OpKind::Register && instruction.op0_register().is_gpr64() && result != Value::Unknown {
        values[instruction.op0_register().number()] = result;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// wasmtime 48.0.8, rustc 1.95, an executable.
    const EXECUTABLE: &[u8] = &[
        0x41, 0x57, 0x41, 0x56, 0x41, 0x54, 0x53, 0x50, 0x48, 0x89, 0xfb, 0x66, 0x66, 0x66, 0x64, 0x48, 0x8b, 0x04,
        0x25, 0, 0, 0, 0, 0x4c, 0x8d, 0xb8, 0x18, 0xfc, 0xff, 0xff, 0x4c, 0x8b, 0xb0, 0x18, 0xfc, 0xff, 0xff, 0x45,
        0x89, 0xf4, 0x41, 0x83, 0xe4, 0x01, 0x41, 0xf6, 0xc6, 0x01, 0x75, 0x0c, 0x48, 0x8d, 0x3d, 0xc7, 0xb3, 0x9c,
        0x00, 0xe8, 0x32, 0x85, 0xf3, 0xff, 0x4d, 0x29, 0xe6, 0x48, 0x83, 0xcb, 0x01, 0x49, 0x89, 0x1f, 0x4c, 0x89,
        0xf0, 0x48, 0x83, 0xc4, 0x08, 0x5b, 0x41, 0x5c, 0x41, 0x5e, 0x41, 0x5f, 0xc3,
    ];
    /// The C API of 50.0.1.
    const LIBRARY: &[u8] = &[
        0x41, 0x57, 0x41, 0x56, 0x53, 0x48, 0x89, 0xfb, 0x48, 0x8d, 0x3d, 0x59, 0x2e, 0x93, 0x00, 0xe8, 0x1c, 0xc5,
        0x8c, 0x00, 0x4c, 0x8d, 0xb0, 0xc0, 0x04, 0x00, 0x00, 0x48, 0x8b, 0x80, 0xc0, 0x04, 0x00, 0x00, 0xa8, 0x01,
        0x74, 0x11, 0x48, 0x83, 0xe0, 0xfe, 0x48, 0x83, 0xcb, 0x01, 0x49, 0x89, 0x1e, 0x5b, 0x41, 0x5e, 0x41, 0x5f,
        0xc3, 0x49, 0x89, 0xc7, 0xe8, 0x41, 0xa1, 0xf3, 0xff, 0x4c, 0x89, 0xf8, 0xeb, 0xe2,
    ];

    fn with(code: &[u8], at: usize, byte: u8) -> Vec<u8> {
        let mut code = code.to_vec();
        code[at] = byte;
        code
    }

    #[test]
    fn the_swap_of_an_executable_is_recognised_with_its_slot() {
        let place = Place {
            base: Base::Thread,
            offset: -0x3e8,
        };
        assert_eq!(swapped_slot(EXECUTABLE, 0x52_4150), Some(place));
    }

    #[test]
    fn the_swap_of_a_library_is_recognised_with_its_slot() {
        let place = Place {
            base: Base::Block(0x16e_a5e8),
            offset: 0x4c0,
        };
        assert_eq!(swapped_slot(LIBRARY, 0xdb_7780), Some(place));
    }

    #[test]
    fn a_function_that_does_a_little_else_is_not_taken_for_it() {
        let or = EXECUTABLE
            .windows(3)
            .position(|bytes| bytes == [0x48, 0x83, 0xcb])
            .unwrap();
        assert_eq!(
            swapped_slot(&with(EXECUTABLE, or + 3, 2), 0),
            None,
            "another bit is set"
        );
        assert_eq!(swapped_slot(&with(EXECUTABLE, 10, 0xf3), 0), None, "another argument");
        let test = EXECUTABLE
            .windows(3)
            .position(|bytes| bytes == [0x41, 0xf6, 0xc6])
            .unwrap();
        assert_eq!(
            swapped_slot(&with(EXECUTABLE, test + 3, 2), 0),
            None,
            "another bit is tested"
        );
        let read = EXECUTABLE
            .windows(3)
            .position(|bytes| bytes == [0x4c, 0x8b, 0xb0])
            .unwrap();
        assert_eq!(
            swapped_slot(&with(EXECUTABLE, read + 3, 0x10), 0),
            None,
            "another word is read"
        );
    }

    proptest::proptest! {
        #[test]
        fn no_code_makes_it_panic(start: u64, code in proptest::collection::vec(0u8.., 0..200)) {
            swapped_slot(&code, start);
            swapped_slot(&[EXECUTABLE, &code].concat(), start);
        }
    }

    #[test]
    fn a_cut_function_is_none() {
        for end in 0..EXECUTABLE.len() - 20 {
            assert_eq!(swapped_slot(&EXECUTABLE[..end], 0x52_4150), None, "{end}");
        }
    }
}
