//! `stall`: a host call that waits for a line on stdin, on the guest's own thread or, in async mode, on a helper thread.

use wasmtime::{Caller, Linker, Module, Result};

use super::{Guests, Scenario, Setup, TaskFuture};
use crate::counts::HostCall;
use crate::options::{Mode, Options};
use crate::session::{Session, State};

pub(super) const SCENARIO: Scenario = Scenario {
    name: "stall",
    about: "one host call that reads a line from stdin, by the guest's own thread or, with --mode async, by a helper",
    guests: |engine| {
        Ok(Guests::from(vec![Module::new(
            engine,
            include_str!("../../../guests/stall.wat"),
        )?]))
    },
    link,
    task,
    heartbeat: None,
    max_tasks: 1,
};

fn task<'a>(session: &'a mut Session, _options: &'a Options) -> TaskFuture<'a> {
    Box::pin(async move { Ok(session.call::<(), ()>(0, "run", ()).await??) })
}

fn link(linker: &mut Linker<State>, setup: &Setup) -> Result<()> {
    let call = HostCall::new(&setup.counts, "host", "stall");
    let reads = call.syscall("read");
    let wait = move || -> Result<()> {
        reads.add_one();
        rustix::io::read(std::io::stdin(), &mut [0; 16])?;
        Ok(())
    };
    match setup.options.mode {
        Mode::Sync => linker.func_wrap("host", "stall", move || {
            call.enter();
            wait()
        })?,
        Mode::Async => linker.func_wrap_async("host", "stall", move |_: Caller<'_, State>, (): ()| {
            call.enter();
            let wait = wait.clone();
            Box::new(async move { tokio::task::spawn_blocking(wait).await? })
        })?,
    };
    Ok(())
}
