//! `enter`, `leave` and `yield`: one crossing of the boundary, again and again, for measuring what it costs to be seen.

use wasmtime::{Caller, Linker, Module};

use super::{Guests, Scenario, Setup, TaskFuture};
use crate::counts::HostCall;
use crate::host;
use crate::options::{Mode, Options};
use crate::session::{Session, State};

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

pub(super) const YIELD: Scenario = Scenario {
    name: "yield",
    about: "`--calls` host calls that give up their thread for a moment, which in async mode suspends the guest",
    link: link_yield,
    task: leave_by_thousand,
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

/// `host.add`, which yields before it answers.
fn link_yield(linker: &mut Linker<State>, setup: &Setup) -> wasmtime::Result<()> {
    if setup.options.mode == Mode::Sync {
        return host::link_add(linker, setup);
    }
    let call = HostCall::new(&setup.counts, "host", "add");
    linker.func_wrap_async("host", "add", move |_: Caller<'_, State>, (left, right): (i32, i32)| {
        call.enter();
        Box::new(async move {
            tokio::task::yield_now().await;
            left.wrapping_add(right)
        })
    })?;
    Ok(())
}

/// A span keeps no more than some thousands of suspensions.
fn leave_by_thousand<'a>(session: &'a mut Session, options: &'a Options) -> TaskFuture<'a> {
    Box::pin(async move {
        let mut left = options.calls;
        while left > 0 {
            let count = left.min(1000);
            session.call::<u32, u32>(0, "leave", count).await??;
            left -= count;
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
