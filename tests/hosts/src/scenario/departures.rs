//! `exec-mid-call` and `exit-mid-call`: the process goes away in the middle of a host call.
//!
//! The counts are printed by the host function itself, as the last thing it does, with one `write` that they include.

use std::os::unix::process::CommandExt as _;
use std::process::Command;
use std::time::Duration;

use wasmtime::{Linker, Module, Result};

use super::{Guests, Scenario, Setup, TaskFuture};
use crate::counts::HostCall;
use crate::host;
use crate::options::Options;
use crate::report::Report;
use crate::session::{Session, State};
use crate::syscalls::Syscalls;

pub(super) const EXEC: Scenario = Scenario {
    name: "exec-mid-call",
    about: "a host function prints the counts and executes /bin/true",
    guests: |engine| {
        Ok(Guests::from(vec![Module::new(
            engine,
            include_str!("../../../guests/departures.wat"),
        )?]))
    },
    link,
    task: leave_by_exec,
    heartbeat: None,
    max_tasks: 1,
};

pub(super) const EXIT: Scenario = Scenario {
    name: "exit-mid-call",
    about: "a host function prints the counts and ends the process with exit code 0",
    task: leave_by_exit,
    ..EXEC
};

fn leave_by_exec<'a>(session: &'a mut Session, _options: &'a Options) -> TaskFuture<'a> {
    Box::pin(async move { Ok(session.call::<(), ()>(0, "leave_by_exec", ()).await??) })
}

fn leave_by_exit<'a>(session: &'a mut Session, _options: &'a Options) -> TaskFuture<'a> {
    Box::pin(async move { Ok(session.call::<(), ()>(0, "leave_by_exit", ()).await??) })
}

fn link(linker: &mut Linker<State>, setup: &Setup) -> Result<()> {
    host::link_write(linker, setup)?;
    link_departure(linker, setup, "exec", "execve", || {
        let error = Command::new("/bin/true").exec();
        Err(wasmtime::Error::from(error).context("cannot execute /bin/true"))
    })?;
    link_departure(linker, setup, "exit", "exit_group", || std::process::exit(0))
}

/// `host.<field>()`: counts `syscall`, prints the counts and departs.
fn link_departure(
    linker: &mut Linker<State>,
    setup: &Setup,
    field: &str,
    syscall: &str,
    depart: impl Fn() -> Result<()> + Send + Sync + 'static,
) -> Result<()> {
    let call = HostCall::new(&setup.counts, "host", field);
    let syscalls = Syscalls::of(&call);
    let departures = call.syscall(syscall);
    let options = setup.options.clone();
    let counts = setup.counts.clone();
    linker.func_wrap("host", field, move || -> Result<()> {
        call.enter();
        departures.add_one();
        syscalls.write_counted(std::io::stdout(), || {
            let report = Report::new(&options, &counts, Duration::ZERO);
            let mut line = serde_json::to_vec(&report)?;
            line.push(b'\n');
            wasmtime::Result::Ok(line)
        })?;
        depart()
    })?;
    Ok(())
}
