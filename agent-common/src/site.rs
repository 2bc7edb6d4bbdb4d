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
}

const LOST: u16 = 0xffff;
const ON_STACK: u16 = 0x8000;
const FILE_SHIFT: u32 = 8;
const FILE_MASK: u64 = 0xff_ffff;

impl ArgumentLocation {
    /// Sixteen bits of a cookie.
    pub const fn encode(self) -> u16 {
        match self {
            Self::Register(register) => (register & 15) as u16,
            Self::Stack(offset) => ON_STACK | (offset >> 3),
            Self::Lost => LOST,
        }
    }

    /// Reads what [`Self::encode`] wrote.
    pub const fn decode(bits: u16) -> Self {
        if bits == LOST {
            Self::Lost
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
}

impl SiteKind {
    /// Every kind, in order of its number.
    pub const ALL: [Self; 1] = [Self::Plain];

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

    /// The same site in a file with this number, of which 24 bits are kept.
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
        ] {
            for second in [
                ArgumentLocation::Register(15),
                ArgumentLocation::Stack(32_760),
                ArgumentLocation::Lost,
            ] {
                let cookie = SiteCookie::new(SiteKind::Plain, first, second);
                assert_eq!((cookie.kind(), cookie.first(), cookie.second()), (0, first, second));
                let cookie = cookie.in_file(7).in_file(0xabcdef);
                assert_eq!(
                    (cookie.kind(), cookie.file(), cookie.first(), cookie.second()),
                    (0, 0xabcdef, first, second)
                );
            }
        }
    }
}
