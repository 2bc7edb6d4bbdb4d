//! `components`: a component that imports host functions through interfaces, and exports functions in the same way.
//!
//! Components have a linker, an instance and functions of their own kind, so these scenarios bring their own runner.

use std::sync::{Arc, Barrier};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow};
use clap::builder::PossibleValue;
use rustix::fd::AsFd as _;
use tempfile::TempPath;
use wasmtime::component::{Component, ComponentNamedList, InstancePre, Lift, Linker, Lower, TypedFunc};
use wasmtime::{Engine, Store, StoreContextMut};

use super::Setup;
use crate::counts::{Counter, Counts, HostCall};
use crate::nap::{Alarm, Bed};
use crate::options::{Mode, Options};
use crate::session::Invoker;
use crate::syscalls::Syscalls;

const GUEST: &str = include_str!("../../../guests/component.wat");
const CLOCK: &str = "wasi:clocks/monotonic-clock@0.2.6";
const OPERATIONS: &str = "test:host/ops@1.0.0";
const STORE: &str = "test:host/store@1.0.0";
const RUNNER: &str = "test:guest/runner@1.0.0";

/// A scenario whose guest is a component.
#[derive(Clone, Copy)]
pub struct ComponentScenario {
    /// Its name on the command line.
    pub name: &'static str,
    /// What it is for, one line of help.
    pub about: &'static str,
    /// Compiles or loads the guest.
    pub guest: fn(&Engine) -> Result<Guest>,
}

/// All of them.
pub const SCENARIOS: &[ComponentScenario] = &[
    ComponentScenario {
        name: "components",
        about: "a component that calls host functions of three interfaces, three guest frames deep",
        guest: |engine| {
            let component = Component::new(engine, GUEST)?;
            Ok(Guest { component, file: None })
        },
    },
    ComponentScenario {
        name: "components-cwasm",
        about: "`components`, with the guest mapped from a file compiled ahead of time",
        guest: from_file,
    },
];

/// The scenario called `name`.
pub fn find(name: &str) -> Option<&'static ComponentScenario> {
    SCENARIOS.iter().find(|scenario| scenario.name == name)
}

/// All names with their help, for the command line.
pub fn possible_values() -> impl Iterator<Item = PossibleValue> {
    SCENARIOS
        .iter()
        .map(|scenario| PossibleValue::new(scenario.name).help(scenario.about))
}

/// A compiled guest.
pub struct Guest {
    component: Component,
    /// What it is mapped from; deleted when this is dropped.
    #[expect(dead_code, reason = "kept for its destructor")]
    file: Option<TempPath>,
}

#[expect(
    unsafe_code,
    reason = "wasmtime cannot check that a file is its own output; this one is"
)]
fn from_file(engine: &Engine) -> Result<Guest> {
    let compiled = engine.precompile_component(GUEST.as_bytes())?;
    let file = tempfile::Builder::new()
        .prefix("component-")
        .suffix(".cwasm")
        .tempfile();
    let path = file.context("cannot make a temporary file")?.into_temp_path();
    std::fs::write(&path, compiled).context("cannot write the compiled guest")?;
    // SAFETY: the file was made by this engine a moment ago, is readable by this user only, and stays as it is while
    // the component lives.
    let component = unsafe { Component::deserialize_file(engine, &path)? };
    Ok(Guest {
        component,
        file: Some(path),
    })
}

/// What host functions find in their store.
struct State {
    bed: Bed,
}

/// Runs all tasks of `guest`; the time from the first one's start to the last one's end.
pub fn run(guest: &Guest, setup: &Setup) -> Result<Duration> {
    let mut linker = Linker::new(guest.component.engine());
    link(&mut linker, setup)?;
    let ready = linker.instantiate_pre(&guest.component)?;
    match setup.options.mode {
        Mode::Sync => run_sync(&ready, setup),
        Mode::Async => run_async(&ready, setup),
    }
}

fn link(linker: &mut Linker<State>, setup: &Setup) -> wasmtime::Result<()> {
    let call = HostCall::new(&setup.counts, CLOCK, "now");
    let begin = Instant::now();
    linker
        .instance(CLOCK)?
        .func_wrap("now", move |_: StoreContextMut<'_, State>, (): ()| {
            call.enter();
            Ok((u64::try_from(begin.elapsed().as_nanos()).unwrap_or(u64::MAX),))
        })?;

    let call = HostCall::new(&setup.counts, OPERATIONS, "add");
    let mut operations = linker.instance(OPERATIONS)?;
    operations.func_wrap(
        "add",
        move |_: StoreContextMut<'_, State>, (left, right): (u32, u32)| {
            call.enter();
            Ok((left.wrapping_add(right),))
        },
    )?;
    let call = HostCall::new(&setup.counts, OPERATIONS, "nap");
    match setup.options.mode {
        Mode::Sync => {
            let syscalls = Syscalls::of(&call);
            let duration = setup.options.nap();
            operations.func_wrap("nap", move |_: StoreContextMut<'_, State>, (): ()| {
                call.enter();
                syscalls.sleep(duration).map_err(wasmtime::Error::from)
            })?;
        }
        Mode::Async => {
            operations.func_wrap_async("nap", move |store: StoreContextMut<'_, State>, (): ()| {
                call.enter();
                let nap = store.data().bed.nap();
                Box::new(async move {
                    nap.await;
                    Ok(())
                })
            })?;
        }
    }

    let call = HostCall::new(&setup.counts, STORE, "write");
    let syscalls = Syscalls::of(&call);
    let output = setup.output.clone();
    let mut store = linker.instance(STORE)?;
    store.func_wrap("write", move |_: StoreContextMut<'_, State>, (bytes,): (Vec<u8>,)| {
        call.enter();
        Ok((u32::try_from(syscalls.write(&*output, &bytes)?)?,))
    })?;
    let call = HostCall::new(&setup.counts, STORE, "read");
    let syscalls = Syscalls::of(&call);
    let input = setup.options.input.clone();
    // The runtime asks the guest for the memory that the bytes go to.
    let allocations = setup.counts.invocations.counter("libc/cabi_realloc");
    store.func_wrap("read", move |_: StoreContextMut<'_, State>, (length,): (u32,)| {
        call.enter();
        let mut bytes = vec![0; length.min(4096) as usize];
        let file = syscalls.open(&input)?;
        let count = syscalls.read_start(file.as_fd(), &mut bytes);
        syscalls.close(file);
        bytes.truncate(count?);
        allocations.add_one();
        Ok((bytes,))
    })
}

/// One task's store and instance.
struct Session {
    store: Store<State>,
    mode: Mode,
    start: TypedFunc<(u32,), (u32,)>,
    greet: TypedFunc<(String,), (String,)>,
    invoker: Invoker,
    counted: Counted,
}

/// Calls of the guest's functions, which are those of its core modules.
struct Counted {
    start: Counter,
    greet: Counter,
    allocations: Counter,
    cleanups: Counter,
}

impl Counted {
    fn of(counts: &Counts) -> Self {
        let counter = |name: &str| counts.invocations.counter(name);
        Self {
            start: counter(&format!("main/{RUNNER}#start")),
            greet: counter("main/greet"),
            allocations: counter("libc/cabi_realloc"),
            cleanups: counter("main/cabi_post_greet"),
        }
    }
}

impl Session {
    async fn new(ready: &InstancePre<State>, mode: Mode, bed: Bed, counts: &Arc<Counts>) -> Result<Self> {
        let mut store = Store::new(ready.engine(), State { bed });
        let instance = match mode {
            Mode::Sync => ready.instantiate(&mut store)?,
            Mode::Async => ready.instantiate_async(&mut store).await?,
        };
        let runner = instance.get_export_index(&mut store, None, RUNNER);
        let start = runner.and_then(|runner| instance.get_export_index(&mut store, Some(&runner), "start"));
        let start = start.context("the component does not export what it should")?;
        let start = instance.get_typed_func(&mut store, start)?;
        let greet = instance.get_typed_func(&mut store, "greet")?;
        Ok(Self {
            start,
            greet,
            store,
            mode,
            invoker: Invoker { counts: counts.clone() },
            counted: Counted::of(counts),
        })
    }

    async fn task(&mut self, options: &Options) -> Result<()> {
        for _ in 0..options.repeat {
            self.counted.start.add_one();
            call(self.mode, &self.invoker, &mut self.store, &self.start, (options.calls,)).await?;
        }
        // Memory for the text, the call, and what frees its result.
        self.counted.allocations.add_one();
        self.counted.greet.add_one();
        self.counted.cleanups.add_one();
        let name = ("component".to_owned(),);
        call(self.mode, &self.invoker, &mut self.store, &self.greet, name).await?;
        Ok(())
    }
}

/// Calls a function. In sync mode the future is ready when first polled.
async fn call<P, R>(
    mode: Mode,
    invoker: &Invoker,
    store: &mut Store<State>,
    function: &TypedFunc<P, R>,
    params: P,
) -> wasmtime::Result<R>
where
    P: ComponentNamedList + Lower + Send + Sync + 'static,
    R: ComponentNamedList + Lift + Send + Sync + 'static,
{
    let result = match mode {
        Mode::Sync => function.call(store, params),
        Mode::Async => invoker.watch(function.call_async(store, params)).await,
    };
    invoker.note_error(result)
}

fn run_sync(ready: &InstancePre<State>, setup: &Setup) -> Result<Duration> {
    use crate::runner::poll_once;
    let (options, counts) = (&setup.options, &setup.counts);
    let mut hands: Vec<Vec<Session>> = (0..options.threads).map(|_| Vec::new()).collect();
    for task in 0..usize::from(options.tasks) {
        let session = poll_once(Session::new(ready, Mode::Sync, Bed::default(), counts))??;
        let hand = task % hands.len();
        hands[hand].push(session);
    }
    let barrier = Barrier::new(hands.len() + 1);
    std::thread::scope(|scope| {
        let threads: Vec<_> = hands
            .into_iter()
            .map(|sessions| {
                let barrier = &barrier;
                scope.spawn(move || -> Result<()> {
                    barrier.wait();
                    for mut session in sessions {
                        poll_once(session.task(options))??;
                    }
                    Ok(())
                })
            })
            .collect();
        barrier.wait();
        let start = Instant::now();
        for thread in threads {
            thread.join().map_err(|_| anyhow!("a thread panicked"))??;
        }
        Ok(start.elapsed())
    })
}

fn run_async(ready: &InstancePre<State>, setup: &Setup) -> Result<Duration> {
    let (options, counts) = (&setup.options, &setup.counts);
    let alarm = Alarm::start(options.nap())?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(usize::from(options.threads))
        .enable_all()
        .build()
        .context("cannot start the runtime")?;
    runtime.block_on(async {
        let mut sessions = Vec::new();
        for _ in 0..options.tasks {
            sessions.push(Session::new(ready, Mode::Async, alarm.bed(), counts).await?);
        }
        let start = Instant::now();
        let tasks: Vec<_> = sessions
            .into_iter()
            .map(|mut session| {
                let options = options.clone();
                tokio::spawn(async move { session.task(&options).await })
            })
            .collect();
        for task in tasks {
            task.await.context("a task panicked")??;
        }
        Ok(start.elapsed())
    })
}
