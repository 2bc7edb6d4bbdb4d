//! `coldstart`: modules that are compiled, deserialized and mapped while the process runs, instantiated and called, each
//! step between two looks at the clock that probes use too.

use anyhow::{Context as _, Result, ensure};
use rustix::time::{ClockId, clock_gettime};
use serde::Serialize;
use serde_json::json;
use wasmtime::component::{self, Component};
use wasmtime::{Engine, Linker, Module, Store};

use super::{Guests, Scenario, TaskFuture};
use crate::host;
use crate::options::{Mode, Options};
use crate::report;
use crate::session::{Invoker, Session};

/// Functions of a guest that takes milliseconds to load.
const LARGE: u32 = 6_000;
/// Functions of any other guest.
const SMALL: u32 = 20;
/// Rounds of a start function: some milliseconds.
const START_ROUNDS: u32 = 4_000_000;
/// Instances made of each module, each of which is called `--repeat` times.
const INSTANCES: u32 = 2;

/// Loaded before anybody looks. It makes a syscall, which is what shows where the runtime keeps its activations.
const EARLIER: &str = r#"(module $earlier
  (import "host" "write" (func $write (param i32 i32) (result i32)))
  (memory (export "memory") 1)
  (func (export "run") (result i32) (call $write (i32.const 0) (i32.const 6))))"#;

pub(super) const SCENARIO: Scenario = Scenario {
    name: "coldstart",
    about: "modules compiled, deserialized, mapped, instantiated and called, with the host's own times of each step",
    guests: |engine| Ok(Guests::from(vec![Module::new(engine, EARLIER)?])),
    link: host::link_write,
    task,
    heartbeat: None,
    max_tasks: 1,
};

/// A step of the host's, in nanoseconds of `CLOCK_MONOTONIC`.
#[derive(Debug, Serialize)]
struct Step {
    module: &'static str,
    #[serde(rename = "step")]
    name: &'static str,
    start_ns: u64,
    end_ns: u64,
}

#[derive(Debug, Default)]
struct Steps(Vec<Step>);

impl Steps {
    fn add<R>(&mut self, module: &'static str, step: &'static str, act: impl FnOnce() -> R) -> R {
        let start_ns = now_ns();
        let result = act();
        self.end(module, step, start_ns);
        result
    }

    fn end(&mut self, module: &'static str, step: &'static str, start_ns: u64) {
        let end_ns = now_ns();
        self.0.push(Step {
            module,
            name: step,
            start_ns,
            end_ns,
        });
    }
}

fn now_ns() -> u64 {
    let now = clock_gettime(ClockId::Monotonic);
    now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64
}

/// A guest of so many functions, none of which is like another guest's; with a start function if it has rounds.
fn guest(name: &str, functions: u32, start_rounds: u32) -> String {
    use std::fmt::Write as _;
    let seed: u32 = name.bytes().map(u32::from).sum();
    let mut text = format!("(module ${name}\n  (memory 1)\n  (global $sum (mut i32) (i32.const 0))\n");
    for index in 0..functions {
        let _ = writeln!(
            text,
            "  (func $f{index} (param i32) (result i32)
                (i32.xor (i32.mul (local.get 0) (i32.const {})) (i32.rotl (local.get 0) (i32.const {}))))",
            seed + index,
            index % 31
        );
    }
    if start_rounds > 0 {
        let _ = writeln!(
            text,
            "  (func $start (local i32)
                (loop $next
                  (global.set $sum (call $f0 (i32.add (global.get $sum) (local.get 0))))
                  (local.set 0 (i32.add (local.get 0) (i32.const 1)))
                  (br_if $next (i32.lt_u (local.get 0) (i32.const {start_rounds})))))
              (start $start)"
        );
    }
    text + "  (func (export \"run\") (result i32) (call $f0 (global.get $sum))))"
}

fn task<'a>(session: &'a mut Session, options: &'a Options) -> TaskFuture<'a> {
    Box::pin(async move {
        let engine = session.engine();
        let invoker = session.invoker();
        let mut steps = Steps::default();
        for _ in 0..2 {
            session.call::<(), u32>(0, "run", ()).await??;
        }

        // What is no module in the end is none that was loaded.
        ensure!(Module::new(&engine, "(module (func (result i32)))").is_err());

        let text = guest("compiled", LARGE, 0);
        let compiled = steps.add("compiled", "compile", || Module::new(&engine, text))?;
        run(&invoker, options, &mut steps, "compiled", &compiled).await?;

        let loaded = deserialized(&engine, &mut steps, "deserialized", LARGE)?;
        run(&invoker, options, &mut steps, "deserialized", &loaded).await?;

        let (in_place, _file) = mapped(&engine, &mut steps, "mapped", LARGE)?;
        run(&invoker, options, &mut steps, "mapped", &in_place).await?;

        let text = guest("starting", SMALL, START_ROUNDS);
        let starting = steps.add("starting", "compile", || Module::new(&engine, text))?;
        run(&invoker, options, &mut steps, "starting", &starting).await?;

        // The same guest three ways, all of it there at the same time: each is loaded, and each is cold.
        let copied = deserialized(&engine, &mut steps, "thrice", SMALL)?;
        run(&invoker, options, &mut steps, "thrice", &copied).await?;
        let (from_file, _file) = mapped(&engine, &mut steps, "thrice", SMALL)?;
        run(&invoker, options, &mut steps, "thrice", &from_file).await?;
        let text = guest("thrice", SMALL, 0);
        let again = steps.add("thrice", "compile", || Module::new(&engine, text))?;
        run(&invoker, options, &mut steps, "thrice", &again).await?;
        run(&invoker, options, &mut steps, "thrice", &copied).await?;

        let text = guest("uncalled", SMALL, 0);
        let uncalled = steps.add("uncalled", "compile", || Module::new(&engine, text))?;

        component(&invoker, options, &mut steps, &engine).await?;
        // Their code stays as long as the process: what looks at it from outside is late by nature.
        std::mem::forget([compiled, loaded, in_place, starting, copied, from_file, again, uncalled]);
        report::print_json(&json!({ "steps": steps.0 }))
    })
}

#[expect(
    unsafe_code,
    reason = "wasmtime cannot check that bytes are its own output; these are"
)]
fn deserialized(engine: &Engine, steps: &mut Steps, name: &'static str, functions: u32) -> Result<Module> {
    let kept = engine.precompile_module(guest(name, functions, 0).as_bytes())?;
    // SAFETY: made by this engine a moment ago.
    let module = steps.add(name, "deserialize", || unsafe { Module::deserialize(engine, &kept) })?;
    Ok(module)
}

#[expect(
    unsafe_code,
    reason = "wasmtime cannot check that a file is its own output; this one is"
)]
fn mapped(
    engine: &Engine,
    steps: &mut Steps,
    name: &'static str,
    functions: u32,
) -> Result<(Module, tempfile::TempPath)> {
    let kept = engine.precompile_module(guest(name, functions, 0).as_bytes())?;
    let file = tempfile::Builder::new().prefix("mapped-").suffix(".cwasm").tempfile();
    let path = file.context("cannot make a temporary file")?.into_temp_path();
    std::fs::write(&path, kept).context("cannot write the compiled guest")?;
    let load = || {
        // SAFETY: the file was made by this engine a moment ago, is readable by this user only, and stays as it is.
        unsafe { Module::deserialize_file(engine, &path) }
    };
    let module = steps.add(name, "deserialize", load)?;
    Ok((module, path))
}

/// Makes instances of a module, and calls each.
async fn run(
    invoker: &Invoker,
    options: &Options,
    steps: &mut Steps,
    name: &'static str,
    module: &Module,
) -> Result<()> {
    let linker = Linker::new(module.engine());
    for _ in 0..INSTANCES {
        let mut store = Store::new(module.engine(), ());
        let start_ns = now_ns();
        let instance = match options.mode {
            Mode::Sync => linker.instantiate(&mut store, module)?,
            Mode::Async => linker.instantiate_async(&mut store, module).await?,
        };
        steps.end(name, "instantiate", start_ns);
        let function = instance.get_typed_func::<(), i32>(&mut store, "run")?;
        let invocations = invoker.counts.invocations.counter(&format!("{name}/run"));
        for _ in 0..options.repeat {
            let start_ns = now_ns();
            match options.mode {
                Mode::Sync => invoker.call(&mut store, &invocations, &function, ())?,
                Mode::Async => invoker.call_async(&mut store, &invocations, &function, ()).await?,
            };
            steps.end(name, "call", start_ns);
        }
    }
    Ok(())
}

/// The same with a component of one core module.
async fn component(invoker: &Invoker, options: &Options, steps: &mut Steps, engine: &Engine) -> Result<()> {
    let core = guest("part", SMALL, 0).replacen("(module $part", "(core module $part", 1);
    let text = format!(
        "(component {core}
           (core instance $instance (instantiate $part))
           (func (export \"run\") (result s32) (canon lift (core func $instance \"run\"))))"
    );
    let component = steps.add("part", "compile", || Component::new(engine, text))?;
    // As in `task`.
    std::mem::forget(component.clone());
    let linker = component::Linker::new(engine);
    let invocations = invoker.counts.invocations.counter("part/run");
    for _ in 0..INSTANCES {
        let mut store = Store::new(engine, ());
        let start_ns = now_ns();
        let instance = match options.mode {
            Mode::Sync => linker.instantiate(&mut store, &component)?,
            Mode::Async => linker.instantiate_async(&mut store, &component).await?,
        };
        steps.end("part", "instantiate", start_ns);
        let function = instance.get_typed_func::<(), (i32,)>(&mut store, "run")?;
        for _ in 0..options.repeat {
            invocations.add_one();
            let start_ns = now_ns();
            match options.mode {
                Mode::Sync => function.call(&mut store, ())?,
                Mode::Async => function.call_async(&mut store, ()).await?,
            };
            steps.end("part", "call", start_ns);
        }
    }
    Ok(())
}
