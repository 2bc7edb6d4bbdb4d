//! The host functions that most scenarios share, under the import module `host`.

use std::path::Path;
use std::sync::Arc;

use rustix::fd::AsFd as _;
use wasmtime::{Caller, Linker, Result};

use crate::counts::HostCall;
use crate::options::Mode;
use crate::scenario::Setup;
use crate::session::State;
use crate::syscalls::Syscalls;

/// The bytes of the guest memory exported as `memory` that begin at `pointer`.
pub fn guest_bytes<'a>(caller: &'a mut Caller<'_, State>, pointer: u32, length: u32) -> Result<&'a mut [u8]> {
    let memory = caller.get_export("memory").and_then(wasmtime::Extern::into_memory);
    let memory = memory.ok_or_else(|| wasmtime::format_err!("the guest exports no memory"))?;
    let start = pointer as usize;
    let bytes = start
        .checked_add(length as usize)
        .and_then(|end| memory.data_mut(caller).get_mut(start..end));
    bytes.ok_or_else(|| wasmtime::format_err!("{length} bytes at {pointer} are outside of the guest's memory"))
}

/// Defines `add`, `nap`, `write` and `read_file`.
pub fn link(linker: &mut Linker<State>, setup: &Setup) -> Result<()> {
    link_add(linker, setup)?;
    link_nap(linker, setup)?;
    link_write(linker, setup)?;
    link_read_file(linker, setup)
}

/// `host.add(a, b) -> a + b`: no syscall.
pub fn link_add(linker: &mut Linker<State>, setup: &Setup) -> Result<()> {
    let call = HostCall::new(&setup.counts, "host", "add");
    linker.func_wrap("host", "add", move |left: i32, right: i32| {
        call.enter();
        left.wrapping_add(right)
    })?;
    Ok(())
}

/// `host.nap()`: in sync mode `nanosleep`, in async mode one suspend of the fiber and no syscall.
pub fn link_nap(linker: &mut Linker<State>, setup: &Setup) -> Result<()> {
    let call = HostCall::new(&setup.counts, "host", "nap");
    match setup.options.mode {
        Mode::Sync => {
            let syscalls = Syscalls::of(&call);
            let duration = setup.options.nap();
            linker.func_wrap("host", "nap", move || {
                call.enter();
                syscalls.sleep(duration).map_err(wasmtime::Error::from)
            })?;
        }
        Mode::Async => {
            linker.func_wrap_async("host", "nap", move |caller: Caller<'_, State>, (): ()| {
                call.enter();
                Box::new(caller.data().bed.nap())
            })?;
        }
    }
    Ok(())
}

/// `host.write(pointer, length) -> bytes written`: one `write`.
pub fn link_write(linker: &mut Linker<State>, setup: &Setup) -> Result<()> {
    let call = HostCall::new(&setup.counts, "host", "write");
    let syscalls = Syscalls::of(&call);
    let output = setup.output.clone();
    linker.func_wrap(
        "host",
        "write",
        move |mut caller: Caller<'_, State>, pointer: u32, length: u32| -> Result<u32> {
            call.enter();
            let bytes = guest_bytes(&mut caller, pointer, length)?;
            Ok(syscalls.write(&*output, bytes)? as u32)
        },
    )?;
    Ok(())
}

/// `host.read_file(pointer, length) -> bytes read`: one `openat`, one `pread64`, one `close`.
pub fn link_read_file(linker: &mut Linker<State>, setup: &Setup) -> Result<()> {
    let call = HostCall::new(&setup.counts, "host", "read_file");
    let syscalls = Syscalls::of(&call);
    let input: Arc<Path> = Arc::from(setup.options.input.as_path());
    linker.func_wrap(
        "host",
        "read_file",
        move |mut caller: Caller<'_, State>, pointer: u32, length: u32| -> Result<u32> {
            call.enter();
            let buffer = guest_bytes(&mut caller, pointer, length)?;
            let file = syscalls.open(&input)?;
            let count = syscalls.read_start(file.as_fd(), buffer);
            syscalls.close(file);
            Ok(count? as u32)
        },
    )?;
    Ok(())
}
