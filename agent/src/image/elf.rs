//! The little of a 64-bit little-endian ELF file that is needed here, read piece by piece and bounded.

use std::io;

use object::{
    LittleEndian, elf,
    pod::{from_bytes, slice_from_bytes},
};

use super::{ReadAt, read_exact_at, string_at};

pub(super) type FileHeader = elf::FileHeader64<LittleEndian>;
pub(super) type SectionHeader = elf::SectionHeader64<LittleEndian>;
pub(super) type ProgramHeader = elf::ProgramHeader64<LittleEndian>;
pub(super) type Sym = elf::Sym64<LittleEndian>;
pub(super) type Rela = elf::Rela64<LittleEndian>;

/// Sections looked at; debug information brings a few dozen, `-ffunction-sections` is gone once linked.
pub(super) const MAX_SECTIONS: usize = 1024;
/// Program headers looked at.
pub(super) const MAX_PROGRAM_HEADERS: usize = 256;
/// Section names are short; the table of names of a linked file is below a kilobyte.
const MAX_SECTION_NAMES_BYTES: u64 = 256 << 10;

pub(super) const E: LittleEndian = LittleEndian;

/// Why a file could not be read as ELF.
#[derive(Debug, thiserror::Error)]
pub enum ElfError {
    /// Reading failed, the end included.
    #[error("reading: {0}")]
    Io(#[from] io::Error),
    /// Not a 64-bit little-endian ELF file.
    #[error("not a 64-bit little-endian ELF file")]
    NotElf,
    /// A header contradicts itself.
    #[error("malformed ELF: {0}")]
    Malformed(&'static str),
    /// A bound of this program was exceeded.
    #[error("{what} of {size} exceeds the bound of {limit}")]
    TooLarge {
        /// What is too large.
        what: &'static str,
        /// Its stated size, bytes or items.
        size: u64,
        /// The bound.
        limit: u64,
    },
}

/// Header and section headers of one file.
pub(super) struct Elf {
    pub header: FileHeader,
    pub sections: Vec<SectionHeader>,
    names: Vec<u8>,
}

impl Elf {
    pub(super) fn read<R: ReadAt + ?Sized>(reader: &R) -> Result<Self, ElfError> {
        let header = read_header(reader)?;
        let count = usize::from(header.e_shnum.get(E));
        check_bound("section count", count as u64, MAX_SECTIONS as u64)?;
        if count == 0 {
            return Ok(Self {
                header,
                sections: Vec::new(),
                names: Vec::new(),
            });
        }
        if usize::from(header.e_shentsize.get(E)) != size_of::<SectionHeader>() {
            return Err(ElfError::Malformed("size of a section header"));
        }
        let bytes = read_exact_at(reader, header.e_shoff.get(E), count * size_of::<SectionHeader>())?;
        let (sections, _) =
            slice_from_bytes::<SectionHeader>(&bytes, count).map_err(|()| ElfError::Malformed("section headers"))?;
        let sections = sections.to_vec();
        let names = match sections.get(usize::from(header.e_shstrndx.get(E).0)) {
            Some(section) => read_section(reader, section, "section names", MAX_SECTION_NAMES_BYTES)?,
            None => Vec::new(),
        };
        Ok(Self {
            header,
            sections,
            names,
        })
    }

    pub(super) fn section(&self, name: &[u8]) -> Option<&SectionHeader> {
        self.sections
            .iter()
            .find(|section| string_at(&self.names, section.sh_name.get(E)) == Some(name))
    }

    pub(super) fn section_of_type(&self, kind: elf::SectionType) -> Option<&SectionHeader> {
        self.sections.iter().find(|section| section.sh_type.get(E) == kind)
    }

    /// The string table that a symbol table names.
    pub(super) fn linked(&self, section: &SectionHeader) -> Option<&SectionHeader> {
        self.sections.get(usize::try_from(section.sh_link.get(E)).ok()?)
    }

    pub(super) fn program_headers<R: ReadAt + ?Sized>(&self, reader: &R) -> Result<Vec<ProgramHeader>, ElfError> {
        let count = usize::from(self.header.e_phnum.get(E));
        check_bound("program header count", count as u64, MAX_PROGRAM_HEADERS as u64)?;
        if count == 0 {
            return Ok(Vec::new());
        }
        if usize::from(self.header.e_phentsize.get(E)) != size_of::<ProgramHeader>() {
            return Err(ElfError::Malformed("size of a program header"));
        }
        let bytes = read_exact_at(reader, self.header.e_phoff.get(E), count * size_of::<ProgramHeader>())?;
        let (headers, _) =
            slice_from_bytes::<ProgramHeader>(&bytes, count).map_err(|()| ElfError::Malformed("program headers"))?;
        Ok(headers.to_vec())
    }
}

pub(super) fn read_header<R: ReadAt + ?Sized>(reader: &R) -> Result<FileHeader, ElfError> {
    let bytes = match read_exact_at(reader, 0, size_of::<FileHeader>()) {
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Err(ElfError::NotElf),
        other => other?,
    };
    let (header, _) = from_bytes::<FileHeader>(&bytes).map_err(|()| ElfError::NotElf)?;
    let ident = &header.e_ident;
    if ident.magic != elf::ELFMAG || ident.class != elf::ELFCLASS64 || ident.data != elf::ELFDATA2LSB {
        return Err(ElfError::NotElf);
    }
    Ok(*header)
}

pub(super) fn read_section<R: ReadAt + ?Sized>(
    reader: &R,
    section: &SectionHeader,
    what: &'static str,
    limit: u64,
) -> Result<Vec<u8>, ElfError> {
    if section.sh_type.get(E) == elf::SHT_NOBITS {
        return Ok(Vec::new());
    }
    let size = section.sh_size.get(E);
    check_bound(what, size, limit)?;
    Ok(read_exact_at(reader, section.sh_offset.get(E), size as usize)?)
}

pub(super) fn check_bound(what: &'static str, size: u64, limit: u64) -> Result<(), ElfError> {
    if size > limit {
        return Err(ElfError::TooLarge { what, size, limit });
    }
    Ok(())
}
