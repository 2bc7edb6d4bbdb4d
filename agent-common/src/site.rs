//! The cookie of a uprobe: what the site is, and where the arguments are at that instruction.

/// Where an integer argument is when the probe fires.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ArgumentLocation {
    /// In the general register with this number, in the order of x86-64 encodings (rax, rcx, rdx, rbx, rsp, rbp, rsi,
    /// rdi, r8 … r15).
    Register(u8),
    /// In memory at the stack pointer plus this many bytes; a multiple of 8 below 32,768.
    Stack(u16),
    /// Not there any more.
    Lost,
    /// Nowhere: on every path through the probe, the value is 0 or 1 as stated.
    Constant(bool),
}

const LOST: u16 = 0xffff;
const CONSTANT: u16 = 0xfffc;
/// As the second argument: no argument, but a condition in the low four bits.
const CONDITION: u64 = 0x4000;
const ON_STACK: u16 = 0x8000;
const FILE_SHIFT: u32 = 8;
const FILE_MASK: u64 = 0xfff;
/// Largest number of a file that a cookie can say.
pub const MAX_FILE_NUMBER: u32 = FILE_MASK as u32;
const FRAME_SHIFT: u32 = 20;
const FRAME_MASK: u64 = 0xfff;
/// Largest distance that a cookie can say between the stack pointer at a site and that at its function's entry, bytes.
pub const MAX_FRAME_BYTES: u32 = (FRAME_MASK as u32) << 3;

impl ArgumentLocation {
    /// Sixteen bits of a cookie.
    pub const fn encode(self) -> u16 {
        match self {
            Self::Register(register) => (register & 15) as u16,
            Self::Stack(offset) => ON_STACK | (offset >> 3),
            Self::Lost => LOST,
            Self::Constant(value) => CONSTANT | value as u16,
        }
    }

    /// Reads what [`Self::encode`] wrote.
    pub const fn decode(bits: u16) -> Self {
        if bits == LOST {
            Self::Lost
        } else if bits & !1 == CONSTANT {
            Self::Constant(bits & 1 != 0)
        } else if bits & ON_STACK != 0 {
            Self::Stack((bits & 0x0fff) << 3)
        } else {
            Self::Register((bits & 15) as u8)
        }
    }
}

/// What a site is, where that makes a difference to the agent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[repr(u8)]
pub enum SiteKind {
    /// The program says it all.
    Plain = 0,
    /// Work is handed to a helper thread. Arguments: where the address of the task may be, twice.
    HelperSpawn = 1,
    /// A helper thread is about to call what does the work, unless it calls something else. First argument: the task.
    HelperRun = 2,
    /// The work of the task in the first argument is done; or, without an argument, whatever the thread was doing is.
    HelperRest = 3,
    /// A guest asks for more linear memory.
    MemoryGrow = 4,
    /// A guest asks for a larger table.
    TableGrow = 5,
    /// A guest has used up the fuel that it was given at once.
    OutOfFuel = 6,
    /// A guest has run past its epoch deadline.
    EpochDeadline = 7,
    /// Guest code reports a trap by calling the runtime, with the trap's code as argument.
    ReportedTrap = 8,
    /// The runtime is about to unwind a guest that called it.
    Raise = 9,
    /// Makes a module or component from wasm.
    Compile = 10,
    /// Makes one from machine code that was kept: in memory, in a file.
    Deserialize = 11,
    /// Gets that code from where it was kept into memory of its own.
    ReadCode = 12,
    /// Makes it a code object.
    LoadCode = 13,
    /// Makes a code object executable.
    Publish = 14,
    /// Makes a module or component of a code object.
    Assemble = 15,
    /// Makes one core module of a code object; returns the pointer that stands for it.
    MakeModule = 16,
    /// Tells a store of a module or component. The third argument is the
    /// pointer that stands for it, or points to that.
    RegisterModule = 17,
    /// Makes an instance.
    MakeInstance = 18,
    /// Runs what an instance runs before anybody may call it.
    StartInstance = 19,
}

impl SiteKind {
    /// Every kind, in order of its number.
    pub const ALL: [Self; 20] = [
        Self::Plain,
        Self::HelperSpawn,
        Self::HelperRun,
        Self::HelperRest,
        Self::MemoryGrow,
        Self::TableGrow,
        Self::OutOfFuel,
        Self::EpochDeadline,
        Self::ReportedTrap,
        Self::Raise,
        Self::Compile,
        Self::Deserialize,
        Self::ReadCode,
        Self::LoadCode,
        Self::Publish,
        Self::Assemble,
        Self::MakeModule,
        Self::RegisterModule,
        Self::MakeInstance,
        Self::StartInstance,
    ];

    /// Whether it is a step of getting a module ready for its first call.
    pub const fn is_of_cold_start(self) -> bool {
        self as u8 >= Self::Compile as u8 && self as u8 <= Self::StartInstance as u8
    }

    /// The kind that `value` stands for.
    pub fn from_u8(value: u8) -> Option<Self> {
        Self::ALL.get(usize::from(value)).copied()
    }
}

/// What a site is and the locations of two arguments, as one attach cookie.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct SiteCookie(pub u64);

impl SiteCookie {
    /// Packs a cookie.
    pub const fn new(kind: SiteKind, first: ArgumentLocation, second: ArgumentLocation) -> Self {
        Self(kind as u64 | (first.encode() as u64) << 32 | (second.encode() as u64) << 48)
    }

    /// The same, at a place where the stack pointer is this many bytes below that at the function's entry; a multiple of
    /// 8, at most [`MAX_FRAME_BYTES`].
    #[must_use]
    pub const fn with_frame_bytes(self, bytes: u32) -> Self {
        Self(self.0 & !(FRAME_MASK << FRAME_SHIFT) | ((bytes as u64 >> 3) & FRAME_MASK) << FRAME_SHIFT)
    }

    /// Bytes between the stack pointer at the site and that at the function's entry.
    pub const fn frame_bytes(self) -> u64 {
        ((self.0 >> FRAME_SHIFT) & FRAME_MASK) << 3
    }

    /// The same, at a conditional jump, where the site counts only if its condition holds: the low four bits of the opcode.
    /// Takes the place of the second argument.
    #[must_use]
    pub const fn with_condition(self, condition: u8) -> Self {
        Self(self.0 & !(0xffff << 48) | (CONDITION | (condition & 15) as u64) << 48)
    }

    /// The condition, if the site has one.
    pub const fn condition(self) -> Option<u8> {
        let bits = self.0 >> 48;
        if bits & !15 == CONDITION {
            Some((bits & 15) as u8)
        } else {
            None
        }
    }

    /// The same site in a file with this number, of which 12 bits are kept.
    #[must_use]
    pub const fn in_file(self, file: u32) -> Self {
        Self(self.0 & !(FILE_MASK << FILE_SHIFT) | (file as u64 & FILE_MASK) << FILE_SHIFT)
    }

    /// Number of the file it is in, which tells copies of a runtime in one process apart; 0 if it has none.
    pub const fn file(self) -> u32 {
        (self.0 >> FILE_SHIFT & FILE_MASK) as u32
    }

    /// A [`SiteKind`].
    pub const fn kind(self) -> u8 {
        self.0 as u8
    }

    /// Where the first argument is.
    pub const fn first(self) -> ArgumentLocation {
        ArgumentLocation::decode((self.0 >> 32) as u16)
    }

    /// Where the second argument is.
    pub const fn second(self) -> ArgumentLocation {
        ArgumentLocation::decode((self.0 >> 48) as u16)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cookie_gives_back_what_it_was_made_of() {
        for first in [
            ArgumentLocation::Register(7),
            ArgumentLocation::Stack(0x10),
            ArgumentLocation::Lost,
            ArgumentLocation::Constant(false),
            ArgumentLocation::Constant(true),
        ] {
            for second in [
                ArgumentLocation::Register(15),
                ArgumentLocation::Stack(32_760),
                ArgumentLocation::Lost,
            ] {
                let cookie = SiteCookie::new(SiteKind::Plain, first, second).with_frame_bytes(0x158);
                assert_eq!((cookie.frame_bytes(), cookie.condition()), (0x158, None));
                assert_eq!(cookie.with_condition(13).condition(), Some(13));
                assert_eq!((cookie.kind(), cookie.first(), cookie.second()), (0, first, second));
                let cookie = cookie.in_file(7).in_file(0xabc);
                assert_eq!(
                    (cookie.kind(), cookie.file(), cookie.first(), cookie.second()),
                    (0, 0xabc, first, second)
                );
            }
        }
    }
}
