//! The host functions of the service, under the import module `host`.

use std::fs::File;
use std::sync::Arc;
use std::time::Duration;

use wasmtime::{Caller, Extern, Linker, Result};

use super::request::{RequestState, Response};
use crate::counts::{Counts, HostCall};
use crate::syscalls::Syscalls;

type GuestCaller<'a> = Caller<'a, RequestState>;

/// Longest guest text that the host takes, bytes.
const TEXT_BYTES_MAX: u32 = 64 * 1024;

/// Defines all of them; `log` writes to `log_file`, `fetch` takes as long as `upstream`.
pub(super) fn link(
    linker: &mut Linker<RequestState>,
    counts: &Counts,
    log_file: Arc<File>,
    upstream: Duration,
) -> Result<()> {
    link_get_header(linker, counts)?;
    link_fetch(linker, counts, upstream)?;
    link_log(linker, counts, log_file)?;
    link_respond(linker, counts)?;
    let fail = HostCall::new(counts, "host", "fail");
    linker.func_wrap("host", "fail", move || -> Result<()> {
        fail.enter();
        Err(wasmtime::format_err!("the backend refused the connection"))
    })?;
    Ok(())
}

/// `get_header(name, name_length, buffer, capacity) -> length`, or -1 if there is no such header or it does not fit.
fn link_get_header(linker: &mut Linker<RequestState>, counts: &Counts) -> Result<()> {
    let call = HostCall::new(counts, "host", "get_header");
    linker.func_wrap(
        "host",
        "get_header",
        move |mut caller: GuestCaller<'_>, name: u32, name_length: u32, buffer: u32, capacity: u32| -> Result<i32> {
            call.enter();
            let (memory, state) = guest_memory(&mut caller)?;
            let name = slice(memory, name, name_length)?;
            let Some(value) = std::str::from_utf8(name).ok().and_then(|name| state.headers.get(name)) else {
                return Ok(-1);
            };
            if value.len() > capacity as usize {
                return Ok(-1);
            }
            let length = value.len() as u32;
            slice(memory, buffer, length)?.copy_from_slice(value.as_bytes());
            Ok(length as i32)
        },
    )?;
    Ok(())
}

/// `fetch(target, length) -> status`: waits as one waits for a server elsewhere. The fiber is suspended meanwhile.
fn link_fetch(linker: &mut Linker<RequestState>, counts: &Counts, upstream: Duration) -> Result<()> {
    let call = HostCall::new(counts, "host", "fetch");
    linker.func_wrap_async(
        "host",
        "fetch",
        move |mut caller: GuestCaller<'_>, (target, length): (u32, u32)| {
            call.enter();
            Box::new(async move {
                let (memory, _) = guest_memory(&mut caller)?;
                let known = slice(memory, target, length)?.starts_with(b"/");
                tokio::time::sleep(upstream).await;
                Ok::<u32, wasmtime::Error>(if known { 200 } else { 404 })
            })
        },
    )?;
    Ok(())
}

/// `log(text, length)`: one `write`.
fn link_log(linker: &mut Linker<RequestState>, counts: &Counts, log_file: Arc<File>) -> Result<()> {
    let call = HostCall::new(counts, "host", "log");
    let syscalls = Syscalls::of(&call);
    linker.func_wrap(
        "host",
        "log",
        move |mut caller: GuestCaller<'_>, text: u32, length: u32| -> Result<()> {
            call.enter();
            let (memory, state) = guest_memory(&mut caller)?;
            let mut line = state.target.as_bytes().to_vec();
            line.extend_from_slice(b": ");
            line.extend_from_slice(slice(memory, text, length)?);
            line.push(b'\n');
            syscalls.write(&*log_file, &line)?;
            Ok(())
        },
    )?;
    Ok(())
}

/// `respond(status, body, length)`: what the client will get.
fn link_respond(linker: &mut Linker<RequestState>, counts: &Counts) -> Result<()> {
    let call = HostCall::new(counts, "host", "respond");
    linker.func_wrap(
        "host",
        "respond",
        move |mut caller: GuestCaller<'_>, status: u32, body: u32, length: u32| -> Result<()> {
            call.enter();
            let (memory, state) = guest_memory(&mut caller)?;
            let status = u16::try_from(status).map_err(|_| wasmtime::format_err!("{status} is no HTTP status"))?;
            state.response = Some(Response {
                status,
                body: slice(memory, body, length)?.to_vec(),
            });
            Ok(())
        },
    )?;
    Ok(())
}

fn guest_memory<'a>(caller: &'a mut GuestCaller<'_>) -> Result<(&'a mut [u8], &'a mut RequestState)> {
    let memory = caller.get_export("memory").and_then(Extern::into_memory);
    let memory = memory.ok_or_else(|| wasmtime::format_err!("the guest exports no memory"))?;
    Ok(memory.data_and_store_mut(caller))
}

fn slice(memory: &mut [u8], pointer: u32, length: u32) -> Result<&mut [u8]> {
    wasmtime::ensure!(length <= TEXT_BYTES_MAX, "{length} bytes are more than the host takes");
    let start = pointer as usize;
    let bytes = memory.get_mut(start..start + length as usize);
    bytes.ok_or_else(|| wasmtime::format_err!("{length} bytes at {pointer} are outside of the guest's memory"))
}
