//! `writes`: one `write` after each stretch of guest work, as fast as it goes.

use wasmtime::Module;

use super::{Guests, Scenario, TaskFuture};
use crate::host;
use crate::options::Options;
use crate::session::Session;

pub(super) const SCENARIO: Scenario = Scenario {
    name: "writes",
    about: "`--calls` writes with `--work` rounds of guest arithmetic before each; for measuring overhead",
    guests: |engine| {
        Ok(Guests::from(vec![Module::new(
            engine,
            include_str!("../../../guests/writes.wat"),
        )?]))
    },
    link: host::link_write,
    task,
    heartbeat: None,
    max_tasks: u16::MAX,
};

fn task<'a>(session: &'a mut Session, options: &'a Options) -> TaskFuture<'a> {
    Box::pin(async move {
        for _ in 0..options.repeat {
            session
                .call::<(u32, u32), u32>(0, "run", (options.calls, options.work))
                .await??;
        }
        Ok(())
    })
}
