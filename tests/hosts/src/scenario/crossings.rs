//! `enter` and `leave`: one crossing of the boundary, again and again, for measuring what it costs to be seen.

use wasmtime::Module;

use super::{Guests, Scenario, TaskFuture};
use crate::host;
use crate::options::Options;
use crate::session::Session;

pub(super) const ENTER: Scenario = Scenario {
    name: "enter",
    about: "`--calls` invocations of an export that does nothing",
    guests: |engine| Ok(Guests::from(vec![Module::new(engine, GUEST)?])),
    link: host::link_add,
    task: enter,
    heartbeat: None,
    max_tasks: u16::MAX,
};

pub(super) const LEAVE: Scenario = Scenario {
    name: "leave",
    about: "`--calls` host calls that do nothing, in one invocation",
    task: leave,
    ..ENTER
};

pub(super) const BURST: Scenario = Scenario {
    name: "burst",
    about: "`leave`, then prints `calm`, waits for a line, and does `--repeat` times `enter` and three host calls",
    task: burst,
    max_tasks: 1,
    ..ENTER
};

const GUEST: &str = include_str!("../../../guests/crossings.wat");

fn enter<'a>(session: &'a mut Session, options: &'a Options) -> TaskFuture<'a> {
    Box::pin(async move {
        for _ in 0..options.calls {
            session.call::<(), ()>(0, "enter", ()).await??;
        }
        Ok(())
    })
}

fn leave<'a>(session: &'a mut Session, options: &'a Options) -> TaskFuture<'a> {
    Box::pin(async move {
        for _ in 0..options.repeat {
            let sum = session.call::<u32, u32>(0, "leave", options.calls).await??;
            anyhow::ensure!(sum == options.calls, "the guest counted {sum}");
        }
        Ok(())
    })
}

fn burst<'a>(session: &'a mut Session, options: &'a Options) -> TaskFuture<'a> {
    Box::pin(async move {
        for _ in 0..options.repeat {
            session.call::<u32, u32>(0, "leave", options.calls).await??;
        }
        println!("calm");
        std::io::stdin().read_line(&mut String::new())?;
        for _ in 0..options.repeat {
            session.call::<(), ()>(0, "enter", ()).await??;
            session.call::<u32, u32>(0, "leave", 3).await??;
        }
        Ok(())
    })
}
