//! Runs a scenario: compiles its guests, gives each task a session and spreads the tasks over threads.

use std::fs::OpenOptions;
use std::process::ExitCode;
use std::sync::{Arc, Barrier};
use std::task::{Context as TaskContext, Poll, Waker};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow, ensure};
use clap::Parser as _;
use serde_json::json;
use wasmtime::{
    Config, Engine, InstanceAllocationStrategy, InstancePre, Linker, ModuleVersionStrategy, PoolingAllocationConfig,
};

use crate::counts::Counts;
use crate::nap::{Alarm, Bed};
use crate::options::{Mode, Options};
use crate::report::{self, Report};
use crate::scenario::components::{self, ComponentScenario};
use crate::scenario::{self, Scenario, Setup};
use crate::session::{Session, State};

/// The program: does what its command line asks for.
pub fn main() -> ExitCode {
    match run(&Options::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("workload: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Does what the command line asks for.
pub fn run(options: &Options) -> Result<()> {
    if let Some(scenario) = scenario::components::find(&options.scenario) {
        return run_component(scenario, options);
    }
    let scenario = scenario::find(&options.scenario).ok_or_else(|| anyhow!("no scenario {}", options.scenario))?;
    ensure!(
        options.tasks <= scenario.max_tasks,
        "the scenario {} takes at most {} task(s), not {}",
        scenario.name,
        scenario.max_tasks,
        options.tasks
    );
    let setup = setup(options)?;
    let counts = setup.counts.clone();
    let engine = engine(Some(scenario), options)?;

    let before = match (options.wait, options.compile_after_wait) {
        (true, false) => Some((scenario.guests)(&engine)?),
        _ => None,
    };
    if options.wait {
        report::wait_for_go()?;
    }
    let guests = before.map_or_else(|| (scenario.guests)(&engine), Ok)?;
    let mut linker = Linker::new(&engine);
    (scenario.link)(&mut linker, &setup)?;
    let modules = guests.modules.iter().map(|module| linker.instantiate_pre(module));
    let modules: Vec<InstancePre<State>> = modules.collect::<wasmtime::Result<_>>()?;

    if let Some(interval) = scenario.heartbeat {
        start_heartbeat(counts.clone(), interval)?;
    }
    let elapsed = match options.mode {
        Mode::Sync => run_sync(scenario, &modules, options, &counts)?,
        Mode::Async => run_async(scenario, &modules, options, &counts)?,
    };
    report::print_json(&Report::new(options, &counts, elapsed))?;
    if options.hold {
        report::wait_for_leave()?;
    }
    Ok(())
}

/// The same for a scenario whose guest is a component.
fn run_component(scenario: &ComponentScenario, options: &Options) -> Result<()> {
    let setup = setup(options)?;
    let engine = engine(None, options)?;
    let before = match (options.wait, options.compile_after_wait) {
        (true, false) => Some((scenario.guest)(&engine)?),
        _ => None,
    };
    if options.wait {
        report::wait_for_go()?;
    }
    let guest = before.map_or_else(|| (scenario.guest)(&engine), Ok)?;
    let elapsed = components::run(scenario, &guest, &setup)?;
    report::print_json(&Report::new(options, &setup.counts, elapsed))?;
    if options.hold {
        report::wait_for_leave()?;
    }
    Ok(())
}

fn setup(options: &Options) -> Result<Setup> {
    let output = OpenOptions::new().append(true).open(&options.output);
    let output = output.with_context(|| format!("cannot open {} for writing", options.output.display()))?;
    Ok(Setup {
        options: options.clone(),
        counts: Arc::new(Counts::default()),
        output: Arc::new(output),
    })
}

fn engine(scenario: Option<&Scenario>, options: &Options) -> Result<Engine> {
    let mut config = Config::new();
    if let Some(scenario) = scenario {
        scenario.configure(&mut config);
    }
    if let Some(version) = &options.module_version {
        config.module_version(ModuleVersionStrategy::Custom(version.clone()))?;
    }
    if options.pooling {
        let instances = u32::from(options.tasks).saturating_mul(4).max(100);
        let mut pool = PoolingAllocationConfig::new();
        pool.total_core_instances(instances)
            .total_memories(instances)
            .total_tables(instances)
            .total_stacks(instances)
            .max_memories_per_module(2)
            .total_memories(instances.saturating_mul(2));
        config.allocation_strategy(InstanceAllocationStrategy::Pooling(pool));
    }
    Ok(Engine::new(&config)?)
}

/// Tasks are dealt out to plain threads, each of which runs its tasks one after the other.
fn run_sync(
    scenario: &'static Scenario,
    modules: &[InstancePre<State>],
    options: &Options,
    counts: &Arc<Counts>,
) -> Result<Duration> {
    let mut hands: Vec<Vec<Session>> = (0..options.threads).map(|_| Vec::new()).collect();
    for task in 0..usize::from(options.tasks) {
        let session = poll_once(Session::new(modules, Mode::Sync, Bed::default(), counts.clone()))??;
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
                        poll_once((scenario.task)(&mut session, options))??;
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

/// Tasks are spawned on tokio's multi-threaded runtime.
fn run_async(
    scenario: &'static Scenario,
    modules: &[InstancePre<State>],
    options: &Options,
    counts: &Arc<Counts>,
) -> Result<Duration> {
    let alarm = Alarm::start(options.nap())?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(usize::from(options.threads))
        .enable_all()
        .build()
        .context("cannot start the runtime")?;
    runtime.block_on(async {
        let mut sessions = Vec::new();
        for _ in 0..options.tasks {
            sessions.push(Session::new(modules, Mode::Async, alarm.bed(), counts.clone()).await?);
        }
        let start = Instant::now();
        let tasks: Vec<_> = sessions
            .into_iter()
            .map(|mut session| {
                let options = options.clone();
                tokio::spawn(async move { (scenario.task)(&mut session, &options).await })
            })
            .collect();
        for task in tasks {
            task.await.context("a task panicked")??;
        }
        Ok(start.elapsed())
    })
}

/// The result of a future that never has to wait.
pub(crate) fn poll_once<F: Future>(future: F) -> Result<F::Output> {
    match std::pin::pin!(future).poll(&mut TaskContext::from_waker(Waker::noop())) {
        Poll::Ready(output) => Ok(output),
        Poll::Pending => Err(anyhow!("a task waited for something in sync mode")),
    }
}

/// Prints `{"heartbeat": host calls so far}` every `interval` until the process ends.
fn start_heartbeat(counts: Arc<Counts>, interval: Duration) -> Result<()> {
    let beat = move || {
        loop {
            let calls: u64 = counts.snapshot().host_calls.values().sum();
            if report::print_json(&json!({ "heartbeat": calls })).is_err() {
                return;
            }
            std::thread::sleep(interval);
        }
    };
    std::thread::Builder::new().name("heartbeat".to_owned()).spawn(beat)?;
    Ok(())
}
