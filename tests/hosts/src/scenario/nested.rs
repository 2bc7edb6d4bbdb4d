//! `nested`: host functions that call back into the guest, three activations deep and across modules, with syscalls at
//! each level.

use wasmtime::{Caller, Linker, Module, Result};

use super::{Guests, Scenario, Setup, TaskFuture};
use crate::counts::{Counter, HostCall};
use crate::host;
use crate::options::{Mode, Options};
use crate::session::{Invoker, Session, State};
use crate::syscalls::Syscalls;

pub(super) const SCENARIO: Scenario = Scenario {
    name: "nested",
    about: "host functions that call back into the same instance and another module, three activations deep",
    guests: |engine| {
        Ok(Guests::from(vec![
            Module::new(engine, include_str!("../../../guests/nested.wat"))?,
            Module::new(engine, include_str!("../../../guests/inner.wat"))?,
        ]))
    },
    link,
    task,
    heartbeat: None,
    max_tasks: u16::MAX,
};

fn task<'a>(session: &'a mut Session, options: &'a Options) -> TaskFuture<'a> {
    Box::pin(async move {
        for _ in 0..options.repeat {
            session.call::<u32, ()>(0, "level1", options.calls).await??;
        }
        Ok(())
    })
}

fn link(linker: &mut Linker<State>, setup: &Setup) -> Result<()> {
    host::link_write(linker, setup)?;
    host::link_nap(linker, setup)?;
    link_way_down(
        linker,
        setup,
        "descend",
        WayDown {
            instance: 0,
            export: "level2",
        },
        "nested/level2",
    )?;
    link_way_down(
        linker,
        setup,
        "cross",
        WayDown {
            instance: 1,
            export: "level3",
        },
        "inner/level3",
    )
}

/// Which guest function a host function calls.
#[derive(Clone, Copy)]
struct WayDown {
    instance: usize,
    export: &'static str,
}

/// `host.<field>()`: one `write`, the call, another `write`.
fn link_way_down(
    linker: &mut Linker<State>,
    setup: &Setup,
    field: &'static str,
    way: WayDown,
    key: &str,
) -> Result<()> {
    let call = HostCall::new(&setup.counts, "host", field);
    let syscalls = Syscalls::of(&call);
    let output = setup.output.clone();
    let invoker = Invoker {
        counts: setup.counts.clone(),
    };
    let invocations: Counter = setup.counts.invocations.counter(key);
    match setup.options.mode {
        Mode::Sync => {
            linker.func_wrap("host", field, move |mut caller: Caller<'_, State>| -> Result<()> {
                call.enter();
                syscalls.write(&*output, b"down\n")?;
                let instance = caller.data().instances[way.instance];
                let function = instance.get_typed_func::<(), ()>(&mut caller, way.export)?;
                invoker.call(&mut caller, &invocations, &function, ())?;
                syscalls.write(&*output, b"up\n")?;
                Ok(())
            })?;
        }
        Mode::Async => {
            linker.func_wrap_async("host", field, move |mut caller: Caller<'_, State>, (): ()| {
                call.enter();
                let (syscalls, output, invoker) = (syscalls.clone(), output.clone(), invoker.clone());
                let invocations = invocations.clone();
                Box::new(async move {
                    syscalls.write(&*output, b"down\n")?;
                    let instance = caller.data().instances[way.instance];
                    let function = instance.get_typed_func::<(), ()>(&mut caller, way.export)?;
                    invoker.call_async(&mut caller, &invocations, &function, ()).await?;
                    syscalls.write(&*output, b"up\n")?;
                    Ok::<(), wasmtime::Error>(())
                })
            })?;
        }
    }
    Ok(())
}
