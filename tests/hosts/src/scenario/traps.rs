//! `traps`: every way in which an invocation can end, with calls that succeed in between.

use anyhow::{bail, ensure};
use wasmtime::{Caller, Linker, Module, Result};

use super::{Guests, Scenario, Setup, TaskFuture};
use crate::counts::{HostCall, TRAP_KINDS};
use crate::host;
use crate::options::{Mode, Options};
use crate::session::{Invoker, Session, State, trap_kind};

pub(super) const SCENARIO: Scenario = Scenario {
    name: "traps",
    about: "each kind of trap and a host function's error `--calls` times, a call that succeeds before each",
    guests: |engine| {
        Ok(Guests::from(vec![Module::new(
            engine,
            include_str!("../../../guests/traps.wat"),
        )?]))
    },
    link,
    task,
    heartbeat: None,
    max_tasks: u16::MAX,
};

/// Exports, each named after how it ends. Nothing ends as WASI's programs do: those have scenarios of their own.
fn failing_exports() -> impl Iterator<Item = &'static str> {
    let is_of_others = |kind: &str| matches!(kind, "other_trap" | "exit");
    TRAP_KINDS.into_iter().filter(move |kind| !is_of_others(kind))
}

fn task<'a>(session: &'a mut Session, options: &'a Options) -> TaskFuture<'a> {
    Box::pin(async move {
        for _ in 0..u64::from(options.calls) * u64::from(options.repeat) {
            for export in failing_exports() {
                session.call::<(), ()>(0, "ok", ()).await??;
                match session.call::<(), ()>(0, export, ()).await? {
                    Ok(()) => bail!("{export} did not fail"),
                    Err(error) => ensure!(trap_kind(&error) == export, "{export} ended in {error:?}"),
                }
            }
            session.call::<(), ()>(0, "survive", ()).await??;
            session.call::<(), ()>(0, "caught", ()).await??;
        }
        Ok(())
    })
}

fn link(linker: &mut Linker<State>, setup: &Setup) -> Result<()> {
    host::link_write(linker, setup)?;
    let fail = HostCall::new(&setup.counts, "host", "fail");
    linker.func_wrap("host", "fail", move || -> Result<()> {
        fail.enter();
        Err(wasmtime::format_err!("the host refuses"))
    })?;

    // `host.attempt() -> whether the guest's export `unreachable` trapped`.
    let attempt = HostCall::new(&setup.counts, "host", "attempt");
    let invoker = Invoker {
        counts: setup.counts.clone(),
    };
    let invocations = setup.counts.invocations.counter("traps/unreachable");
    match setup.options.mode {
        Mode::Sync => {
            linker.func_wrap("host", "attempt", move |mut caller: Caller<'_, State>| -> Result<u32> {
                attempt.enter();
                let instance = caller.data().instances[0];
                let function = instance.get_typed_func::<(), ()>(&mut caller, "unreachable")?;
                Ok(u32::from(
                    invoker.call(&mut caller, &invocations, &function, ()).is_err(),
                ))
            })?;
        }
        Mode::Async => {
            linker.func_wrap_async("host", "attempt", move |mut caller: Caller<'_, State>, (): ()| {
                attempt.enter();
                let (invoker, invocations) = (invoker.clone(), invocations.clone());
                Box::new(async move {
                    let instance = caller.data().instances[0];
                    let function = instance.get_typed_func::<(), ()>(&mut caller, "unreachable")?;
                    let result = invoker.call_async(&mut caller, &invocations, &function, ()).await;
                    Ok::<u32, wasmtime::Error>(u32::from(result.is_err()))
                })
            })?;
        }
    }
    Ok(())
}
