//! `blocking`, `blocking-in-place`, `blocking-detached`: host functions that hand their syscalls to tokio's helper threads, WASI's
//! among them.

use std::os::fd::AsFd as _;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::ensure;
use tokio::task::{JoinHandle, block_in_place, spawn_blocking};
use wasmtime::{Caller, Linker, Module, Result};
use wasmtime_wasi::p1::{self, WasiP1Ctx};
use wasmtime_wasi::{FsPerms, WasiCtxBuilder};

use super::{Guests, Scenario, Setup, TaskFuture};
use crate::counts::{Counts, HostCall};
use crate::options::{Mode, Options};
use crate::session::{Session, State};
use crate::syscalls::Syscalls;

pub(super) const SCENARIO: Scenario = Scenario {
    name: "blocking",
    about: "with --mode async: files read through WASI and by the host, by helper threads that the guest waits for",
    guests: |engine| {
        Ok(Guests::from(vec![Module::new(
            engine,
            include_str!("../../../guests/blocking.wat"),
        )?]))
    },
    link,
    task: |session, options| run(session, options, "read"),
    heartbeat: None,
    max_tasks: u16::MAX,
};

pub(super) const IN_PLACE: Scenario = Scenario {
    name: "blocking-in-place",
    about: "with --mode async: files read by the guest's own thread, whose other work a helper thread takes over",
    task: |session, options| run(session, options, "in_place"),
    ..SCENARIO
};

pub(super) const DETACHED: Scenario = Scenario {
    name: "blocking-detached",
    about: "with --mode async: files opened by helper threads after the host call that asked for it is over",
    task: |session, options| run(session, options, "detached"),
    max_tasks: 1,
    ..SCENARIO
};

/// Bytes read at a time.
const READ_BYTES: usize = 64;
/// What the guest sees of the host's files: one, called `input`.
const DIRECTORY: &str = "/";

fn run<'a>(session: &'a mut Session, options: &'a Options, export: &'static str) -> TaskFuture<'a> {
    Box::pin(async move {
        ensure!(options.mode == Mode::Async, "helper threads need --mode async");
        let directory = tempfile::tempdir()?;
        std::fs::write(directory.path().join("input"), [b'x'; READ_BYTES])?;
        session.state_mut().wasi = Some(wasi(directory.path())?);
        for _ in 0..options.repeat {
            if export == "read" {
                session.counts().count_wasi(options.calls);
            }
            session.call::<u32, ()>(0, export, options.calls).await??;
        }
        Ok(())
    })
}

fn wasi(directory: &Path) -> anyhow::Result<WasiP1Ctx> {
    let mut wasi = WasiCtxBuilder::new();
    wasi.preopened_dir(directory, DIRECTORY, FsPerms::ReadOnly)?;
    Ok(wasi.build_p1())
}

impl Counts {
    /// What `calls` rounds of the guest make of WASI's functions, and those of syscalls: WASI does not count them itself.
    fn count_wasi(&self, calls: u32) {
        for (field, syscalls) in [
            ("path_open", &["openat2", "statx"][..]),
            ("fd_read", &["pread64"]),
            ("fd_close", &["close"]),
        ] {
            let name = format!("wasi_snapshot_preview1.{field}");
            self.host_calls.counter(&name).add(u64::from(calls));
            for syscall in syscalls {
                self.syscalls_of(&name).counter(syscall).add(u64::from(calls));
            }
        }
    }
}

fn link(linker: &mut Linker<State>, setup: &Setup) -> Result<()> {
    p1::add_to_linker_async(linker, |state: &mut State| {
        state.wasi.as_mut().expect("the task has made one")
    })?;
    link_read_elsewhere(linker, setup)?;
    link_read_twice(linker, setup)?;
    link_in_place(linker, setup)?;
    link_detached(linker, setup)
}

/// One file, start to end: one `openat`, one `pread64`, one `close`.
fn read(syscalls: &Syscalls, path: &Path) -> Result<u32> {
    let mut buffer = [0; READ_BYTES];
    let file = syscalls.open(path)?;
    let count = syscalls.read_start(file.as_fd(), &mut buffer);
    syscalls.close(file);
    Ok(count? as u32)
}

/// `read_elsewhere() -> bytes read`: by a helper.
fn link_read_elsewhere(linker: &mut Linker<State>, setup: &Setup) -> Result<()> {
    let call = HostCall::new(&setup.counts, "host", "read_elsewhere");
    let syscalls = Syscalls::of(&call);
    let input: Arc<Path> = Arc::from(setup.options.input.as_path());
    linker.func_wrap_async("host", "read_elsewhere", move |_: Caller<'_, State>, (): ()| {
        call.enter();
        let (syscalls, input) = (syscalls.clone(), input.clone());
        Box::new(async move { spawn_blocking(move || read(&syscalls, &input)).await? })
    })?;
    Ok(())
}

/// `read_twice() -> bytes read`: by two helpers at the same time, the second of which was asked by the first.
fn link_read_twice(linker: &mut Linker<State>, setup: &Setup) -> Result<()> {
    let call = HostCall::new(&setup.counts, "host", "read_twice");
    let syscalls = Syscalls::of(&call);
    let input: Arc<Path> = Arc::from(setup.options.input.as_path());
    linker.func_wrap_async("host", "read_twice", move |_: Caller<'_, State>, (): ()| {
        call.enter();
        let (syscalls, input) = (syscalls.clone(), input.clone());
        Box::new(async move {
            let first = spawn_blocking(move || {
                let second = spawn_blocking({
                    let (syscalls, input) = (syscalls.clone(), input.clone());
                    move || read(&syscalls, &input)
                });
                read(&syscalls, &input).map(|count| (count, second))
            });
            let (first, second) = first.await??;
            Ok(first + second.await??)
        })
    })?;
    Ok(())
}

/// `in_place() -> bytes read`: by the guest's own thread.
fn link_in_place(linker: &mut Linker<State>, setup: &Setup) -> Result<()> {
    let call = HostCall::new(&setup.counts, "host", "in_place");
    let syscalls = Syscalls::of(&call);
    let input: Arc<Path> = Arc::from(setup.options.input.as_path());
    linker.func_wrap("host", "in_place", move || -> Result<u32> {
        call.enter();
        block_in_place(|| read(&syscalls, &input))
    })?;
    Ok(())
}

/// What a task has left to a helper, and what makes that go.
type Left = Option<(JoinHandle<()>, Arc<AtomicBool>)>;

/// `detached()`: leaves an `openat` and a `close` to a helper, which makes them when `settle()` is waiting for it.
fn link_detached(linker: &mut Linker<State>, setup: &Setup) -> Result<()> {
    let call = HostCall::new(&setup.counts, "host", "detached");
    let input: Arc<Path> = Arc::from(setup.options.input.as_path());
    let left: Arc<Mutex<Left>> = Arc::default();
    let taken = left.clone();
    linker.func_wrap("host", "detached", move || {
        call.enter();
        let go = Arc::new(AtomicBool::new(false));
        let task = spawn_blocking({
            let (go, input) = (go.clone(), input.clone());
            move || {
                // Without a syscall of its own.
                while !go.load(Ordering::Acquire) {
                    std::hint::spin_loop();
                }
                // Not counted: nobody waits for it.
                drop(std::fs::File::open(&input));
            }
        });
        *left.lock().unwrap_or_else(PoisonError::into_inner) = Some((task, go));
    })?;
    let settle = HostCall::new(&setup.counts, "host", "settle");
    linker.func_wrap_async("host", "settle", move |_: Caller<'_, State>, (): ()| {
        settle.enter();
        let left = taken.lock().unwrap_or_else(PoisonError::into_inner).take();
        Box::new(async move {
            if let Some((task, go)) = left {
                go.store(true, Ordering::Release);
                task.await?;
            }
            Ok(())
        })
    })?;
    Ok(())
}
