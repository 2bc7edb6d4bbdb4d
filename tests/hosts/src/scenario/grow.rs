//! `grow`: memories and tables that grow, are at their maximum, or are kept from growing by a limiter.

use anyhow::{Context as _, ensure};
use wasmtime::Module;

use super::{Guests, Scenario, TaskFuture};
use crate::limiter::Verdict;
use crate::options::{Mode, Options};
use crate::session::Session;

pub(super) const SCENARIO: Scenario = Scenario {
    name: "grow",
    about: "50 memory.grow and table.grow each in one instance per task, of which some fail",
    guests: |engine| {
        Ok(Guests::from(vec![Module::new(
            engine,
            include_str!("../../../guests/grow.wat"),
        )?]))
    },
    link: |_, _| Ok(()),
    task,
    heartbeat: None,
    max_tasks: u16::MAX,
};

/// Something that grows: its export, and the one that grows it.
#[derive(Clone, Copy)]
struct Thing {
    what: &'static str,
    export: &'static str,
    maximum: &'static str,
}

const MEMORY: Thing = Thing {
    what: "memory",
    export: "memory_grow",
    maximum: "80",
};
const OTHER: Thing = Thing {
    what: "other",
    export: "other_grow",
    maximum: "?",
};
const TABLE: Thing = Thing {
    what: "handlers",
    export: "table_grow",
    maximum: "90",
};

fn task<'a>(session: &'a mut Session, options: &'a Options) -> TaskFuture<'a> {
    Box::pin(async move {
        session.store().limiter(|state| &mut state.limiter);
        for round in 0..10 {
            for thing in [MEMORY, TABLE] {
                grow(session, thing, 1 + round % 3).await?;
                grow(session, thing, 0).await?;
                // More than the maximum.
                grow(session, thing, 100).await?;
                session.store().data_mut().limiter.verdict = Verdict::Refuse;
                grow(session, thing, 1).await?;
                session.store().data_mut().limiter.verdict = Verdict::Fail;
                grow(session, thing, 2).await?;
                session.store().data_mut().limiter.verdict = Verdict::Allow;
            }
        }
        grow(session, OTHER, 3).await?;
        let before = size(session, MEMORY)?;
        let after = session.call::<u32, u32>(0, "grow_by_page", 5).await??;
        let after = u64::from(after);
        ensure!(after == before + 5 && after == size(session, MEMORY)?);
        for page in before..before + 5 {
            session.note(&format!("memory {page}+1={} of {}", page + 1, MEMORY.maximum));
        }
        if options.mode == Mode::Async {
            // The limiter takes its time: the guest is suspended while it grows.
            session.store().limiter_async(|state| &mut state.slow_limiter);
            grow(session, MEMORY, 1).await?;
            grow(session, TABLE, 1).await?;
        }
        Ok(())
    })
}

fn size(session: &mut Session, thing: Thing) -> anyhow::Result<u64> {
    let instance = session.store().data().instances[0];
    let store = session.store();
    let found = instance.get_export(&mut *store, thing.what).context("no such export")?;
    Ok(match found {
        wasmtime::Extern::Memory(memory) => memory.size(&*store),
        wasmtime::Extern::Table(table) => table.size(&*store),
        _ => anyhow::bail!("{} does not grow", thing.what),
    })
}

async fn grow(session: &mut Session, thing: Thing, delta: u32) -> anyhow::Result<()> {
    let before = size(session, thing)?;
    let result = session.call::<u32, i32>(0, thing.export, delta).await?;
    let after = size(session, thing)?;
    let how = match result {
        Ok(-1) => {
            ensure!(before == after, "refused, but grown");
            "refused".to_owned()
        }
        Ok(old) => {
            ensure!(i64::from(old) == before as i64, "the guest was told another size");
            return {
                session.note(&format!("{} {before}+{delta}={after} of {}", thing.what, thing.maximum));
                Ok(())
            };
        }
        Err(_) => {
            ensure!(before == after, "failed, but grown");
            "host_error".to_owned()
        }
    };
    session.note(&format!("{} +{delta} {how} of {}", thing.what, thing.maximum));
    Ok(())
}
