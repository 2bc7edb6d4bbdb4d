//! A hardware breakpoint on a guest's way to host functions, armed for one hit where a host has no symbols: the caller's
//! import table says where those functions are, or the component's context, which has one for those that it imports.

use aya_ebpf::{macros::perf_event, programs::PerfEventContext};
use wasmscope_common::{EMIT_HOST_CALLS, HOST_FUNCTIONS_SOUGHT, RecordKind};

use super::host_call::send_table;
use crate::{output::header, thread::watched, user::read_user_word};

/// What a `VMComponentContext` begins with.
const COMPONENT_MAGIC: u32 = u32::from_le_bytes(*b"comp");

/// On entry of `signatures[T]::wasm_to_array_trampoline(callee, caller, …)`, or of the trampoline of a component's lowered
/// import, whose callee is the component. A result of 1 lets the hit count against the one that the breakpoint is armed for.
#[perf_event]
pub fn host_function_sought(ctx: PerfEventContext) -> u32 {
    let Some(config) = watched() else { return 0 };
    // SAFETY: a pointer into a map value.
    if unsafe { (*config).flags } & EMIT_HOST_CALLS == 0 {
        return 0;
    }
    // SAFETY: the context of a perf event starts with the thread's registers.
    let (callee, caller, stack_pointer) = unsafe { ((*ctx.ctx).regs.rdi, (*ctx.ctx).regs.rsi, (*ctx.ctx).regs.rsp) };
    let call_site = read_user_word(stack_pointer).unwrap_or(0);
    let magic = read_user_word(callee).unwrap_or(0) as u32;
    let caller = if magic == COMPONENT_MAGIC { callee } else { caller };
    let head = header(RecordKind::ImportTable);
    u32::from(send_table(&head, call_site, callee, caller, HOST_FUNCTIONS_SOUGHT))
}
