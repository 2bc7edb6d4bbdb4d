//! `fuel` and `epoch`: guests that are stopped, for good or for a while. Time passes when the guest says so, so what happens is known.

use anyhow::{bail, ensure};
use wasmtime::{Linker, Module, Result, UpdateDeadline};

use super::trap_kinds::how;
use super::{Guests, Scenario, Setup, TaskFuture};
use crate::counts::HostCall;
use crate::options::{Mode, Options};
use crate::session::{Session, State};

pub(super) const FUEL: Scenario = Scenario {
    name: "fuel",
    about: "`--calls` guests that run out of fuel; in async mode as many that are stopped every 1000 units",
    guests: |engine| {
        Ok(Guests::from(vec![Module::new(
            engine,
            include_str!("../../../guests/interrupted.wat"),
        )?]))
    },
    link,
    task: burn,
    heartbeat: None,
    max_tasks: u16::MAX,
};

pub(super) const EPOCH: Scenario = Scenario {
    name: "epoch",
    about: "`--calls` guests that run into their deadline, and as many that are given more time",
    task: run_late,
    max_tasks: 1,
    ..FUEL
};

/// More than any of the guests uses.
const PLENTY: u64 = 1 << 40;

fn burn<'a>(session: &'a mut Session, options: &'a Options) -> TaskFuture<'a> {
    Box::pin(async move {
        for _ in 0..u64::from(options.calls) * u64::from(options.repeat) {
            session.store().set_fuel(500)?;
            let Err(error) = session.call::<u32, ()>(0, "work", 1_000_000).await? else {
                bail!("there was enough fuel");
            };
            session.note(&how(&error)?);
            session.store().set_fuel(PLENTY)?;
            session.call::<u32, ()>(0, "work", 1_000).await??;
            if options.mode == Mode::Sync {
                continue;
            }
            // Each stop is one suspension, and nothing else suspends this guest.
            session.store().fuel_async_yield_interval(Some(1_000))?;
            let before = session.counts().suspends.get();
            session.call::<u32, ()>(0, "work", 1_000).await??;
            let stops = session.counts().suspends.get() - before;
            ensure!(options.tasks > 1 || stops > 0, "the guest was not stopped");
            session.store().set_fuel(2_500)?;
            let Err(error) = session.call::<u32, ()>(0, "work", 1_000_000).await? else {
                bail!("there was enough fuel");
            };
            session.note(&how(&error)?);
            session.store().fuel_async_yield_interval(None)?;
        }
        Ok(())
    })
}

fn run_late<'a>(session: &'a mut Session, options: &'a Options) -> TaskFuture<'a> {
    Box::pin(async move {
        for _ in 0..u64::from(options.calls) * u64::from(options.repeat) {
            let store = session.store();
            store.epoch_deadline_trap();
            store.set_epoch_deadline(3);
            let Err(error) = session.call::<u32, ()>(0, "watch", 100).await? else {
                bail!("there was enough time");
            };
            session.note(&how(&error)?);

            let continued = session.counts().notes.counter("continued");
            let store = session.store();
            store.set_epoch_deadline(2);
            store.epoch_deadline_callback(move |_| {
                continued.add_one();
                Ok(UpdateDeadline::Continue(2))
            });
            session.call::<u32, ()>(0, "watch", 20).await??;
            if options.mode == Mode::Async {
                let store = session.store();
                store.set_epoch_deadline(2);
                store.epoch_deadline_async_yield_and_update(2);
                session.call::<u32, ()>(0, "watch", 20).await??;
            }
            session.store().set_epoch_deadline(PLENTY);
        }
        Ok(())
    })
}

fn link(linker: &mut Linker<State>, setup: &Setup) -> Result<()> {
    let call = HostCall::new(&setup.counts, "host", "tick");
    let engine = linker.engine().clone();
    linker.func_wrap("host", "tick", move || {
        call.enter();
        engine.increment_epoch();
    })?;
    Ok(())
}
