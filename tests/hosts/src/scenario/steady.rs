//! `steady`: results and failures that two runs must have in common, whoever watches one of them.

use anyhow::Context as _;
use wasmtime::{Module, WasmBacktrace};

use super::{Guests, Scenario, TaskFuture};
use crate::host;
use crate::options::Options;
use crate::session::Session;

pub(super) const SCENARIO: Scenario = Scenario {
    name: "steady",
    about: "`--repeat` times a result of `--calls` rounds of host calls and a trap, whose backtraces are answers too",
    guests: |engine| {
        Ok(Guests::from(vec![Module::new(
            engine,
            include_str!("../../../guests/steady.wat"),
        )?]))
    },
    link: host::link,
    task,
    heartbeat: None,
    max_tasks: u16::MAX,
};

fn task<'a>(session: &'a mut Session, options: &'a Options) -> TaskFuture<'a> {
    Box::pin(async move {
        for round in 0..options.repeat {
            let mixed = session.call::<u32, u32>(0, "mix", options.calls + round % 3).await??;
            session.answer(&format!("mix: {mixed:#x}"));
            let failed = session.call::<u32, ()>(0, "fail", round % 5).await?;
            let error = failed.err().context("the guest did not trap")?;
            let backtrace = error.downcast_ref::<WasmBacktrace>().context("no backtrace")?;
            session.answer(&format!("fail: {}: {backtrace}", error.root_cause()));
        }
        Ok(())
    })
}
