//! `calls`: every kind of host call, from three guest frames deep.

use wasmtime::Module;

use super::{Guests, Scenario, TaskFuture};
use crate::host;
use crate::options::Options;
use crate::session::Session;

pub(super) const SCENARIO: Scenario = Scenario {
    name: "calls",
    about: "host calls with no, one and several syscalls, and one that sleeps, three guest frames deep",
    guests: |engine| Ok(Guests::from(vec![Module::new(engine, GUEST)?])),
    link: host::link,
    task,
    heartbeat: None,
    max_tasks: u16::MAX,
};

/// Its text.
pub(super) const GUEST: &str = include_str!("../../../guests/calls.wat");

fn task<'a>(session: &'a mut Session, options: &'a Options) -> TaskFuture<'a> {
    Box::pin(async move {
        for _ in 0..options.repeat {
            session.call::<u32, u32>(0, "start", options.calls).await??;
        }
        Ok(())
    })
}
