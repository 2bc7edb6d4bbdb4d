//! Reads of user and kernel memory that can fail but never fault, and registers of the interrupted thread.

use aya_ebpf::{
    EbpfContext as _,
    bindings::pt_regs,
    helpers::{
        bpf_get_attach_cookie,
        generated::{bpf_get_current_task, bpf_probe_read_kernel, bpf_probe_read_user},
    },
    programs::ProbeContext,
};
use wasmscope_common::{ArgumentLocation, SiteCookie};

/// Reads `T` from the memory of the current process.
#[inline(always)]
pub fn read_user<T>(into: *mut T, address: u64) -> bool {
    // SAFETY: `into` is valid for `size_of::<T>()` bytes at every call site; the helper checks the source.
    unsafe { bpf_probe_read_user(into.cast(), size_of::<T>() as u32, address as *const _) == 0 }
}

/// Reads one word of the current process.
#[inline(always)]
pub fn read_user_word(address: u64) -> Option<u64> {
    let mut value = 0u64;
    read_user(&raw mut value, address).then_some(value)
}

/// Reads `T` from kernel memory.
#[inline(always)]
pub fn read_kernel<T: Copy>(into: *mut T, address: u64) -> bool {
    // SAFETY: as in `read_user`.
    unsafe { bpf_probe_read_kernel(into.cast(), size_of::<T>() as u32, address as *const _) == 0 }
}

/// The thread pointer of the current thread, if it is known how to find it.
#[inline(always)]
pub fn thread_pointer() -> Option<u64> {
    let offset = crate::maps::global(&crate::maps::TASK_FSBASE_OFFSET);
    if offset == 0 {
        return None;
    }
    // SAFETY: the helper has no preconditions.
    let task = unsafe { bpf_get_current_task() };
    let mut value = 0u64;
    (read_kernel(&raw mut value, task + u64::from(offset)) && value != 0).then_some(value)
}

/// The registers that say what a syscall is and where it was made; the kernel keeps them next to each other (x86-64: rdx,
/// rsi, rdi, orig_rax, rip, cs, eflags, rsp at bytes 96 … 160 of `pt_regs`).
#[repr(C)]
#[derive(Clone, Copy)]
pub struct SyscallRegisters {
    pub third: u64,
    pub second: u64,
    pub first: u64,
    pub number: u64,
    pub instruction_pointer: u64,
    pub segment: u64,
    pub flags: u64,
    pub stack_pointer: u64,
}

impl SyscallRegisters {
    /// Reads them from saved registers in kernel memory.
    #[inline(always)]
    pub fn read(regs: u64) -> Option<Self> {
        let mut value = Self {
            third: 0,
            second: 0,
            first: 0,
            number: 0,
            instruction_pointer: 0,
            segment: 0,
            flags: 0,
            stack_pointer: 0,
        };
        read_kernel(&raw mut value, regs + core::mem::offset_of!(pt_regs, rdx) as u64).then_some(value)
    }
}

/// User stack pointer in saved registers in kernel memory.
#[inline(always)]
pub fn stack_pointer(regs: u64) -> u64 {
    let mut value = 0u64;
    if read_kernel(&raw mut value, regs + core::mem::offset_of!(pt_regs, rsp) as u64) {
        value
    } else {
        0
    }
}

/// A general register by its number in x86-64 encodings. The verifier wants constant offsets, hence the table.
#[inline(always)]
pub fn register(regs: &pt_regs, number: u8) -> u64 {
    match number {
        0 => regs.rax,
        1 => regs.rcx,
        2 => regs.rdx,
        3 => regs.rbx,
        4 => regs.rsp,
        5 => regs.rbp,
        6 => regs.rsi,
        7 => regs.rdi,
        8 => regs.r8,
        9 => regs.r9,
        10 => regs.r10,
        11 => regs.r11,
        12 => regs.r12,
        13 => regs.r13,
        14 => regs.r14,
        _ => regs.r15,
    }
}

/// The cookie of the site that was hit.
#[inline(always)]
pub fn cookie(ctx: &ProbeContext) -> SiteCookie {
    // SAFETY: the pointer is this program's context.
    SiteCookie(unsafe { bpf_get_attach_cookie(ctx.as_ptr()) })
}

/// An argument of the function that was hit; 0 if it is not there any more.
#[inline(always)]
pub fn argument(regs: &pt_regs, location: ArgumentLocation) -> u64 {
    match location {
        ArgumentLocation::Register(number) => register(regs, number),
        ArgumentLocation::Stack(offset) => read_user_word(regs.rsp + u64::from(offset)).unwrap_or(0),
        ArgumentLocation::Constant(value) => u64::from(value),
        ArgumentLocation::Lost => 0,
    }
}
