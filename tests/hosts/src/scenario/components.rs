//! `components`: a component that imports host functions through interfaces, and exports functions in the same way.
//!
//! Components have a linker, an instance and functions of their own kind, so these scenarios bring their own runner.

use std::sync::{Arc, Barrier};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow, ensure};
use clap::builder::PossibleValue;
use rustix::fd::AsFd as _;
use tempfile::TempPath;
use wasmtime::component::{
    Component, ComponentNamedList, Instance, InstancePre, Lift, Linker, Lower, ResourceTable, TypedFunc,
};
use wasmtime::{Engine, Store, StoreContextMut};
use wasmtime_wasi::{WasiCtx, WasiCtxView, WasiView};

use super::Setup;
use crate::counts::{Counts, HostCall};
use crate::nap::{Alarm, Bed};
use crate::options::{Mode, Options};
use crate::session::Invoker;
use crate::syscalls::Syscalls;

const GUEST: &str = include_str!("../../../guests/component.wat");
const WASI_GUEST: &str = include_str!("../../../guests/wasi_component.wat");
const CLOCK: &str = "wasi:clocks/monotonic-clock@0.2.6";
const OPERATIONS: &str = "test:host/ops@1.0.0";
const STORE: &str = "test:host/store@1.0.0";
const RUNNER: &str = "test:guest/runner@1.0.0";
const COMMAND: &str = "wasi:cli/run@0.2.6";
/// Rounds that the guest of `wasi-components` makes in one run.
const WASI_ROUNDS: u64 = 20;

/// A scenario whose guest is a component.
#[derive(Clone, Copy)]
pub struct ComponentScenario {
    /// Its name on the command line.
    pub name: &'static str,
    /// What it is for, one line of help.
    pub about: &'static str,
    /// Compiles or loads the guest.
    pub guest: fn(&Engine) -> Result<Guest>,
    link: fn(&mut Linker<State>, &Setup) -> wasmtime::Result<()>,
    task: Task,
}

/// What a task does once its instance exists. In sync mode it must not await anything but [`Session::call`].
type Task = for<'a> fn(&'a mut Session, &'a Options) -> super::TaskFuture<'a>;

/// All of them.
pub const SCENARIOS: &[ComponentScenario] = &[
    ComponentScenario {
        name: "components",
        about: "a component that calls host functions of three interfaces, three guest frames deep",
        guest: |engine| from_text(engine, GUEST),
        link,
        task,
    },
    ComponentScenario {
        name: "components-cwasm",
        about: "`components`, with the guest mapped from a file compiled ahead of time",
        guest: from_file,
        link,
        task,
    },
    ComponentScenario {
        name: "components-failing",
        about: "the same component, which traps and is unwound by a host function's error in turn",
        guest: |engine| from_text(engine, GUEST),
        link,
        task: failing_task,
    },
    ComponentScenario {
        name: "components-leave",
        about: "`--calls` host calls of a component that do nothing, in one invocation",
        guest: |engine| from_text(engine, include_str!("../../../guests/component_crossings.wat")),
        link,
        task: |session, options| {
            Box::pin(async move {
                session.count(&["crossings/leave"]);
                let (sum,): (u32,) = session.call(None, "leave", (options.calls,)).await?;
                ensure!(sum == options.calls, "the guest counted {sum}");
                Ok(())
            })
        },
    },
    ComponentScenario {
        name: "wasi-components",
        about: "a command of WASI 0.2 that looks at the clock, draws numbers and drops resources, and exits at last",
        guest: |engine| from_text(engine, WASI_GUEST),
        link: |linker, setup| match setup.options.mode {
            Mode::Sync => wasmtime_wasi::p2::add_to_linker_sync(linker),
            Mode::Async => wasmtime_wasi::p2::add_to_linker_async(linker),
        },
        task: wasi_task,
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

fn from_text(engine: &Engine, text: &str) -> Result<Guest> {
    let component = Component::new(engine, text)?;
    Ok(Guest { component, file: None })
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
    wasi: WasiCtx,
    resources: ResourceTable,
}

impl State {
    fn new(bed: Bed) -> Self {
        Self {
            bed,
            wasi: WasiCtx::builder().build(),
            resources: ResourceTable::new(),
        }
    }
}

impl WasiView for State {
    fn ctx(&mut self) -> WasiCtxView<'_> {
        WasiCtxView {
            ctx: &mut self.wasi,
            table: &mut self.resources,
        }
    }
}

/// Runs all tasks of `guest`; the time from the first one's start to the last one's end.
pub fn run(scenario: &ComponentScenario, guest: &Guest, setup: &Setup) -> Result<Duration> {
    let mut linker = Linker::new(guest.component.engine());
    (scenario.link)(&mut linker, setup)?;
    let ready = linker.instantiate_pre(&guest.component)?;
    match setup.options.mode {
        Mode::Sync => run_sync(&ready, scenario.task, setup),
        Mode::Async => run_async(&ready, scenario.task, setup),
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
    let call = HostCall::new(&setup.counts, OPERATIONS, "fail");
    operations.func_wrap(
        "fail",
        move |_: StoreContextMut<'_, State>, (): ()| -> wasmtime::Result<()> {
            call.enter();
            Err(wasmtime::format_err!("the host was asked to fail"))
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
    instance: Instance,
    ready: InstancePre<State>,
    mode: Mode,
    invoker: Invoker,
}

impl Session {
    async fn new(ready: &InstancePre<State>, mode: Mode, bed: Bed, counts: &Arc<Counts>) -> Result<Self> {
        let mut store = Store::new(ready.engine(), State::new(bed));
        let instance = match mode {
            Mode::Sync => ready.instantiate(&mut store)?,
            Mode::Async => ready.instantiate_async(&mut store).await?,
        };
        Ok(Self {
            store,
            instance,
            ready: ready.clone(),
            mode,
            invoker: Invoker { counts: counts.clone() },
        })
    }

    /// Adds to the counters of guest functions, which are those of its core modules.
    fn count(&self, functions: &[&str]) {
        for function in functions {
            self.invoker.counts.invocations.counter(function).add_one();
        }
    }

    /// Calls an export, of an exported instance or of the component itself. In sync mode the future is ready when first
    /// polled.
    async fn call<P, R>(&mut self, instance: Option<&str>, function: &str, params: P) -> Result<R>
    where
        P: ComponentNamedList + Lower + Send + Sync + 'static,
        R: ComponentNamedList + Lift + Send + Sync + 'static,
    {
        let store = &mut self.store;
        let within = instance.and_then(|name| self.instance.get_export_index(&mut *store, None, name));
        let index = self
            .instance
            .get_export_index(&mut *store, within.as_ref(), function)
            .context("the component does not export what it should")?;
        let function: TypedFunc<P, R> = self.instance.get_typed_func(&mut *store, index)?;
        let result = match self.mode {
            Mode::Sync => function.call(store, params),
            Mode::Async => self.invoker.watch(function.call_async(store, params)).await,
        };
        Ok(self.invoker.note_error(result)?)
    }
}

fn task<'a>(session: &'a mut Session, options: &'a Options) -> super::TaskFuture<'a> {
    Box::pin(async move {
        for _ in 0..options.repeat {
            session.count(&["main/test:guest/runner@1.0.0#start"]);
            let _sum: (u32,) = session.call(Some(RUNNER), "start", (options.calls,)).await?;
        }
        // Memory for the text, the call, and what frees its result.
        session.count(&["libc/cabi_realloc", "main/greet", "main/cabi_post_greet"]);
        let _text: (String,) = session.call(None, "greet", ("component".to_owned(),)).await?;
        Ok(())
    })
}

fn failing_task<'a>(session: &'a mut Session, options: &'a Options) -> super::TaskFuture<'a> {
    Box::pin(async move {
        for _ in 0..options.repeat {
            for alone in [false, true] {
                session.count(&["main/stumble"]);
                let result: Result<()> = session.call(None, "stumble", (alone,)).await;
                ensure!(result.is_err(), "the guest did not fail");
                // An instance that has failed cannot be entered again.
                let bed = session.store.data().bed.clone();
                *session = Session::new(&session.ready, session.mode, bed, &session.invoker.counts).await?;
            }
        }
        Ok(())
    })
}

fn wasi_task<'a>(session: &'a mut Session, options: &'a Options) -> super::TaskFuture<'a> {
    Box::pin(async move {
        for _ in 0..options.repeat {
            session.count(&["main/wasi:cli/run@0.2.6#run"]);
            let (result,): (Result<(), ()>,) = session.call(Some(COMMAND), "run", ()).await?;
            result.map_err(|()| anyhow!("the guest says that it failed"))?;
            // The host functions are wasmtime's own: how often the guest calls each is written in it.
            let counts = &session.invoker.counts.host_calls;
            for name in [
                "wasi:clocks/monotonic-clock@0.2.6.now",
                "wasi:random/random@0.2.6.get-random-u64",
                "wasi:clocks/monotonic-clock@0.2.6.subscribe-duration",
                "wasi:io/poll@0.2.6.[method]pollable.ready",
                "wasi:io/poll@0.2.6.[resource-drop]pollable",
            ] {
                counts.counter(name).add(WASI_ROUNDS);
            }
        }
        session.count(&["main/quit"]);
        let counts = &session.invoker.counts.host_calls;
        counts.counter("wasi:cli/exit@0.2.6.exit").add_one();
        let result: Result<()> = session.call(None, "quit", ()).await;
        ensure!(result.is_err(), "the guest did not exit");
        Ok(())
    })
}

fn run_sync(ready: &InstancePre<State>, task: Task, setup: &Setup) -> Result<Duration> {
    use crate::runner::poll_once;
    let (options, counts) = (&setup.options, &setup.counts);
    let mut hands: Vec<Vec<Session>> = (0..options.threads).map(|_| Vec::new()).collect();
    for index in 0..usize::from(options.tasks) {
        let session = poll_once(Session::new(ready, Mode::Sync, Bed::default(), counts))??;
        let hand = index % hands.len();
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
                        poll_once(task(&mut session, options))??;
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

fn run_async(ready: &InstancePre<State>, task: Task, setup: &Setup) -> Result<Duration> {
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
                tokio::spawn(async move { task(&mut session, &options).await })
            })
            .collect();
        for task in tasks {
            task.await.context("a task panicked")??;
        }
        Ok(start.elapsed())
    })
}
