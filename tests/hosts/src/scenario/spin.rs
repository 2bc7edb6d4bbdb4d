//! `spin`: guest CPU time without a single host call.

use wasmtime::Module;

use super::{Guests, Scenario, TaskFuture};
use crate::options::Options;
use crate::session::Session;

pub(super) const SCENARIO: Scenario = Scenario {
    name: "spin",
    about: "`--calls` stretches of `--work` rounds of guest arithmetic, no host calls",
    guests: |engine| {
        Ok(Guests::from(vec![Module::new(
            engine,
            include_str!("../../../guests/spin.wat"),
        )?]))
    },
    link: |_, _| Ok(()),
    task,
    heartbeat: None,
    max_tasks: u16::MAX,
};

fn task<'a>(session: &'a mut Session, options: &'a Options) -> TaskFuture<'a> {
    Box::pin(async move {
        for _ in 0..options.repeat {
            session
                .call::<(u32, u32), u32>(0, "spin", (options.calls, options.work))
                .await??;
        }
        Ok(())
    })
}
