//! Offsets inside kernel structures, from the running kernel's own type information (BTF).

use btf_rs::{Btf, Type};

/// Where the kernel publishes its types.
pub(super) const VMLINUX_BTF: &str = "/sys/kernel/btf/vmlinux";

/// Byte offsets that the programs need; 0 where they could not be found.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct TaskOffsets {
    /// `task_struct.thread.fsbase`: the thread pointer of x86-64.
    pub(super) fsbase: u32,
    /// `task_struct.mm`.
    pub(super) mm: u32,
    /// `task_struct.tgid`.
    pub(super) tgid: u32,
}

/// Why they could not be found.
#[derive(Debug, thiserror::Error)]
pub enum KernelTypesError {
    /// The kernel was built without it, or it cannot be read.
    #[error("cannot read the kernel's type information at {VMLINUX_BTF}")]
    Unreadable(#[source] std::io::Error),
    /// Nobody knows how to read it.
    #[error("the kernel's type information at {VMLINUX_BTF} is not understood")]
    Unknown(#[source] btf_rs::Error),
    /// It is there, but not as expected.
    #[error("the kernel's type information has no {0}")]
    Missing(&'static str),
}

/// Looks the offsets up.
pub(super) fn task_offsets() -> Result<TaskOffsets, KernelTypesError> {
    // All at once: from the file, each type would be a system call.
    let bytes = std::fs::read(VMLINUX_BTF).map_err(KernelTypesError::Unreadable)?;
    let btf = Btf::from_bytes(&bytes).map_err(KernelTypesError::Unknown)?;
    let offset = |path: &[&str], words: &'static str| {
        member_offset(&btf, "task_struct", path).ok_or(KernelTypesError::Missing(words))
    };
    Ok(TaskOffsets {
        fsbase: offset(&["thread", "fsbase"], "task_struct.thread.fsbase")?,
        mm: offset(&["mm"], "task_struct.mm")?,
        tgid: offset(&["tgid"], "task_struct.tgid")?,
    })
}

/// Byte offset of a member of a member … of a structure.
fn member_offset(btf: &Btf, structure: &str, path: &[&str]) -> Option<u32> {
    let mut current = btf
        .resolve_types_by_name(structure)
        .ok()?
        .into_iter()
        .find_map(|kind| {
            if let Type::Struct(found) = kind {
                Some(found)
            } else {
                None
            }
        })?;
    let mut bits = 0;
    for (depth, name) in path.iter().enumerate() {
        let member = current
            .members
            .iter()
            .find(|member| btf.resolve_name(*member).is_ok_and(|found| found == *name))?;
        bits += member.bit_offset();
        if depth + 1 < path.len() {
            let mut kind = btf.resolve_chained_type(member).ok()?;
            current = loop {
                kind = match kind {
                    Type::Struct(found) => break found,
                    Type::Typedef(other) => btf.resolve_chained_type(&other).ok()?,
                    Type::Const(other) | Type::Volatile(other) => btf.resolve_chained_type(&other).ok()?,
                    _ => return None,
                };
            };
        }
    }
    Some(bits / 8)
}
