//! `trap-kinds` and `trap-kinds-reported`: every instruction that can trap, with the place at which wasmtime says that it did.

use anyhow::{Context as _, bail};
use wasmtime::{Linker, Module, Result, Trap, WasmBacktrace};

use super::{Guests, Scenario, Setup, TaskFuture};
use crate::counts::HostCall;
use crate::host;
use crate::options::Options;
use crate::session::{Session, State};

pub(super) const SCENARIO: Scenario = Scenario {
    name: "trap-kinds",
    about: "each instruction that can trap `--calls` times, a host function's error and `proc_exit`",
    guests: |engine| Ok(Guests::from(vec![Module::new(engine, GUEST)?])),
    link,
    task,
    heartbeat: None,
    max_tasks: u16::MAX,
};

/// The same guest, compiled so that it reports traps by calls of the runtime instead of signals.
pub(super) const REPORTED: Scenario = Scenario {
    name: "trap-kinds-reported",
    about: "as trap-kinds, without signals",
    ..SCENARIO
};

/// The same guest, mapped from a file compiled ahead of time.
pub(super) const MAPPED: Scenario = Scenario {
    name: "trap-kinds-cwasm",
    about: "as trap-kinds, with the guest mapped from a file compiled ahead of time",
    guests: |engine| super::cwasm::mapped(engine, GUEST),
    ..SCENARIO
};

const GUEST: &str = include_str!("../../../guests/trap_kinds.wat");

const EXPORTS: [&str; 29] = [
    "unreachable",
    "load",
    "store",
    "memory_fill",
    "memory_copy",
    "memory_init",
    "table_get",
    "table_set",
    "table_fill",
    "table_copy",
    "table_init",
    "call_out_of_bounds",
    "call_null",
    "bad_signature",
    "division",
    "overflow",
    "remainder",
    "conversion",
    "conversion_overflow",
    "stack_overflow",
    "misaligned",
    "wait_unshared",
    "null_reference",
    "array",
    "allocation",
    "cast",
    "host_error",
    "exit",
    "unreachable",
];

/// How `proc_exit` leaves.
#[derive(Debug)]
struct Exit(i32);

impl std::fmt::Display for Exit {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "exit with {}", self.0)
    }
}

impl std::error::Error for Exit {}

fn task<'a>(session: &'a mut Session, options: &'a Options) -> TaskFuture<'a> {
    Box::pin(async move {
        for _ in 0..u64::from(options.calls) * u64::from(options.repeat) {
            for export in EXPORTS {
                session.call::<(), ()>(0, "ok", ()).await??;
                let Err(error) = session.call::<(), ()>(0, export, ()).await? else {
                    bail!("{export} did not fail");
                };
                session.note(&format!("{export}: {}", how(&error)?));
            }
        }
        Ok(())
    })
}

/// `<code> in <function> at <offset in the wasm binary>`, or that it was no trap.
pub(super) fn how(error: &wasmtime::Error) -> anyhow::Result<String> {
    let Some(trap) = error.downcast_ref::<Trap>() else {
        let is_exit = error.downcast_ref::<Exit>().is_some();
        return Ok(if is_exit { "exit" } else { "host_error" }.to_owned());
    };
    let backtrace = error.downcast_ref::<WasmBacktrace>().context("no backtrace")?;
    let frame = backtrace.frames().first().context("an empty backtrace")?;
    let function = frame.func_name().unwrap_or("?");
    let place = frame
        .module_offset()
        .map_or_else(|| "?".to_owned(), |offset| format!("{offset:#x}"));
    Ok(format!("{} in {function} at {place}", code(*trap)))
}

/// `MemoryOutOfBounds` as `memory_out_of_bounds`.
fn code(trap: Trap) -> String {
    let mut code = String::new();
    for letter in format!("{trap:?}").chars() {
        if letter.is_uppercase() && !code.is_empty() {
            code.push('_');
        }
        code.extend(letter.to_lowercase());
    }
    code
}

fn link(linker: &mut Linker<State>, setup: &Setup) -> Result<()> {
    host::link_nap(linker, setup)?;
    let fail = HostCall::new(&setup.counts, "host", "fail");
    linker.func_wrap("host", "fail", move || -> Result<()> {
        fail.enter();
        Err(wasmtime::format_err!("the host refuses"))
    })?;
    let exit = HostCall::new(&setup.counts, "wasi_snapshot_preview1", "proc_exit");
    linker.func_wrap("wasi_snapshot_preview1", "proc_exit", move |code: i32| -> Result<()> {
        exit.enter();
        Err(Exit(code).into())
    })?;
    Ok(())
}
