//! `sites`: one guest function that calls the host from many places, each of them a row of what is counted.

use std::fmt::Write as _;

use wasmtime::Module;

use super::{Guests, Scenario, TaskFuture};
use crate::host;
use crate::options::Options;
use crate::session::Session;

/// Places that call.
const SITES: usize = 3_000;

pub(super) const SCENARIO: Scenario = Scenario {
    name: "sites",
    about: "`--repeat` invocations of a function that calls the host from 3,000 places",
    guests: |engine| Ok(Guests::from(vec![Module::new(engine, guest())?])),
    link: host::link_add,
    task,
    heartbeat: None,
    max_tasks: u16::MAX,
};

fn guest() -> String {
    let mut calls = String::new();
    for site in 0..SITES {
        let _ = writeln!(calls, "(drop (call $host_add (i32.const {site}) (i32.const 1)))");
    }
    format!(
        r#"(module $sites
            (import "host" "add" (func $host_add (param i32 i32) (result i32)))
            (func $from_everywhere (export "from_everywhere") {calls}))"#
    )
}

fn task<'a>(session: &'a mut Session, options: &'a Options) -> TaskFuture<'a> {
    Box::pin(async move {
        for _ in 0..options.repeat {
            session.call::<(), ()>(0, "from_everywhere", ()).await??;
        }
        Ok(())
    })
}
