//! `phases`: what it is told to do, line by line, so that a test decides when which boundary is crossed how often.

use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use wasmtime::Module;

use super::{Guests, Scenario, TaskFuture};
use crate::host;
use crate::options::Options;
use crate::session::Session;

pub(super) const SCENARIO: Scenario = Scenario {
    name: "phases",
    about: "for each line on stdin, `enter N` (invocations), `leave N` (host calls in one) or `write N` (writes in one), then prints `done`",
    guests: |engine| {
        let crossings = Module::new(engine, include_str!("../../../guests/crossings.wat"))?;
        let writes = Module::new(engine, include_str!("../../../guests/writes.wat"))?;
        Ok(Guests::from(vec![crossings, writes]))
    },
    link: |linker, setup| {
        host::link_add(linker, setup)?;
        host::link_write(linker, setup)
    },
    task,
    heartbeat: None,
    max_tasks: 1,
};

/// Work of the host's own before and after what a line asks for, so that the latter is not all that the process does.
const BURN: Duration = Duration::from_millis(20);

fn burn() {
    let begun = Instant::now();
    while begun.elapsed() < BURN {
        std::hint::spin_loop();
    }
}

fn task<'a>(session: &'a mut Session, _: &'a Options) -> TaskFuture<'a> {
    Box::pin(async move {
        loop {
            let mut line = String::new();
            if std::io::stdin().read_line(&mut line)? == 0 {
                return Ok(());
            }
            let (what, count) = line.trim().split_once(' ').context("a line is a word and a number")?;
            let count: u32 = count.parse()?;
            burn();
            match what {
                "enter" => {
                    for _ in 0..count {
                        session.call::<(), ()>(0, "enter", ()).await??;
                    }
                }
                "leave" => {
                    session.call::<u32, u32>(0, "leave", count).await??;
                }
                "write" => {
                    session.call::<(u32, u32), u32>(1, "run", (count, 1)).await??;
                }
                _ => bail!("{what} is not known"),
            }
            burn();
            println!("done");
        }
    })
}
