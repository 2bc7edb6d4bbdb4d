//! One request: a store, an instance, a call of `handle_request`.

use std::collections::BTreeMap;

use anyhow::{Context as _, Result, ensure};
use wasmtime::{Extern, Instance, InstancePre, Store};
use wasmtime_wasi::p1::WasiP1Ctx;
use wasmtime_wasi::{FsPerms, WasiCtxBuilder};

use super::guests::{GuestName, Guests};
use crate::counts::Counts;
use crate::session::{Invoker, trap_kind};

/// What host functions find in their store.
pub(super) struct RequestState {
    pub(super) wasi: WasiP1Ctx,
    /// Path and query.
    pub(super) target: String,
    /// By name in lower case.
    pub(super) headers: BTreeMap<String, String>,
    /// What the guest has answered.
    pub(super) response: Option<Response>,
}

/// What the client gets.
pub(super) struct Response {
    pub(super) status: u16,
    pub(super) body: Vec<u8>,
}

/// Exports of guests that count the guest's own calls of an import begin with this; the rest is `module.field`.
const CALL_COUNTER_PREFIX: &str = "calls:";

/// Runs the guest called `name` on `input`. A guest that fails makes a response too, with status 500 and how it failed.
pub(super) async fn handle(
    guests: &Guests,
    name: GuestName,
    target: String,
    headers: BTreeMap<String, String>,
    input: &[u8],
) -> Result<Response> {
    if !guests.before().is_zero() {
        tokio::time::sleep(guests.before()).await;
    }
    if guests.are_handed_over() {
        let (guests, input) = (guests.clone(), input.to_vec());
        return tokio::spawn(async move { run(&guests, name, target, headers, &input).await }).await?;
    }
    run(guests, name, target, headers, input).await
}

async fn run(
    guests: &Guests,
    name: GuestName,
    target: String,
    headers: BTreeMap<String, String>,
    input: &[u8],
) -> Result<Response> {
    let guest = guests.get(name).await?;
    let mut wasi = WasiCtxBuilder::new();
    // Before the directory, which takes the setting over: guests' file syscalls happen on the guest's own thread.
    wasi.allow_blocking_current_thread(true);
    wasi.preopened_dir(guests.data(), "/", FsPerms::ReadOnly)?;
    let state = RequestState {
        wasi: wasi.build_p1(),
        target,
        headers,
        response: None,
    };
    let mut store = Store::new(guest.module().engine(), state);
    let instance = guest.instantiate_async(&mut store).await?;

    let (pointer, length) = write_input(&mut store, instance, input)?;
    let handle_request = instance.get_typed_func::<(u32, u32), u32>(&mut store, "handle_request")?;
    let key = format!("{}/handle_request", guest.module().name().unwrap_or_default());
    let invocations = guests.counts().invocations.counter(&key);
    let invoker = Invoker {
        counts: guests.counts().clone(),
    };
    let result = invoker
        .call_async(&mut store, &invocations, &handle_request, (pointer, length))
        .await;
    collect_call_counters(&mut store, guest, instance, guests.counts());
    match result {
        Ok(_status) => store.into_data().response.context("the guest did not respond"),
        Err(error) => Ok(Response {
            status: 500,
            body: format!("{}: {error:#}\n", trap_kind(&error)).into_bytes(),
        }),
    }
}

/// Copies `input` to the place that the guest has for it; returns where that is and how much fitted.
fn write_input(store: &mut Store<RequestState>, instance: Instance, input: &[u8]) -> Result<(u32, u32)> {
    let pointer = global(store, instance, "request_buffer").context("the guest exports no request_buffer")?;
    let capacity = global(store, instance, "request_capacity").context("the guest exports no request_capacity")?;
    ensure!(
        input.len() <= capacity as usize,
        "the request is longer than the guest takes"
    );
    let memory = instance
        .get_memory(&mut *store, "memory")
        .context("the guest exports no memory")?;
    memory.write(store, pointer as usize, input)?;
    Ok((pointer, input.len() as u32))
}

/// WASI functions belong to wasmtime-wasi and count nothing, so guests count their calls of them, just before each.
fn collect_call_counters(
    store: &mut Store<RequestState>,
    guest: &InstancePre<RequestState>,
    instance: Instance,
    counts: &Counts,
) {
    for export in guest.module().exports() {
        if let Some(import) = export.name().strip_prefix(CALL_COUNTER_PREFIX)
            && let Some(calls) = global(store, instance, export.name())
        {
            counts.host_calls.counter(import).add(u64::from(calls));
        }
    }
}

fn global(store: &mut Store<RequestState>, instance: Instance, name: &str) -> Option<u32> {
    let global = instance.get_export(&mut *store, name).and_then(Extern::into_global)?;
    Some(global.get(store).i32()? as u32)
}
