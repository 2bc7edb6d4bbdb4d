//! The table of scenarios, and what each consists of.

mod blocking;
mod calls;
mod coldstart;
pub mod components;
mod crossings;
mod cwasm;
mod departures;
mod forever;
mod grow;
mod hostile;
mod interruptions;
mod nested;
mod phases;
mod sites;
mod spin;
mod stall;
mod steady;
mod trap_kinds;
mod traps;
mod writes;

use std::fs::File;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Result;
use clap::builder::PossibleValue;
use tempfile::TempPath;
use wasmtime::{Config, Engine, Linker, Module};

use crate::counts::Counts;
use crate::options::Options;
use crate::session::{Session, State};

/// What host functions are made from.
#[derive(Debug)]
pub struct Setup {
    /// The command line.
    pub options: Options,
    /// Where they count.
    pub counts: Arc<Counts>,
    /// The file that `host.write` writes to.
    pub output: Arc<File>,
}

/// What a task does once its instances exist. In sync mode it must not await anything but [`Session::call`].
pub type Task = for<'a> fn(&'a mut Session, &'a Options) -> TaskFuture<'a>;

/// See [`Task`].
pub type TaskFuture<'a> = Pin<Box<dyn Future<Output = Result<()>> + Send + 'a>>;

/// The compiled guests of a scenario.
#[derive(Debug)]
pub struct Guests {
    /// Each task instantiates all of them, in this order, in one store.
    pub modules: Vec<Module>,
    /// What they are mapped from; deleted when this is dropped.
    pub file: Option<TempPath>,
}

impl From<Vec<Module>> for Guests {
    fn from(modules: Vec<Module>) -> Self {
        Self { modules, file: None }
    }
}

/// One thing that `workload` can do.
#[derive(Clone, Copy)]
pub struct Scenario {
    /// Its name on the command line.
    pub name: &'static str,
    /// What it is for, one line of help.
    pub about: &'static str,
    /// Compiles or loads the guests.
    pub guests: fn(&Engine) -> Result<Guests>,
    /// Defines the host functions.
    pub link: fn(&mut Linker<State>, &Setup) -> wasmtime::Result<()>,
    /// What each task does.
    pub task: Task,
    /// How often to print how many host calls there have been so far, if at all.
    pub heartbeat: Option<Duration>,
    /// How many tasks it can have.
    pub max_tasks: u16,
}

/// All of them.
pub const SCENARIOS: &[Scenario] = &[
    calls::SCENARIO,
    crossings::ENTER,
    crossings::LEAVE,
    crossings::YIELD,
    crossings::BURST,
    phases::SCENARIO,
    nested::SCENARIO,
    traps::SCENARIO,
    hostile::SCENARIO,
    sites::SCENARIO,
    spin::SCENARIO,
    steady::SCENARIO,
    writes::SCENARIO,
    forever::SCENARIO,
    departures::EXEC,
    departures::EXIT,
    cwasm::SCENARIO,
    blocking::SCENARIO,
    blocking::IN_PLACE,
    blocking::DETACHED,
    stall::SCENARIO,
    trap_kinds::SCENARIO,
    trap_kinds::REPORTED,
    trap_kinds::MAPPED,
    interruptions::FUEL,
    interruptions::EPOCH,
    grow::SCENARIO,
    coldstart::SCENARIO,
];

impl Scenario {
    /// Sets what its guests must be compiled with.
    pub fn configure(&self, config: &mut Config) {
        match self.name {
            "trap-kinds" | "trap-kinds-cwasm" => {
                config.wasm_gc(true);
            }
            "trap-kinds-reported" => {
                config.wasm_gc(true).signals_based_traps(false);
            }
            "fuel" => {
                config.consume_fuel(true);
            }
            "epoch" => {
                config.epoch_interruption(true);
            }
            _ => {}
        }
    }
}

/// The scenario called `name`.
pub fn find(name: &str) -> Option<&'static Scenario> {
    SCENARIOS.iter().find(|scenario| scenario.name == name)
}

/// All names with their help, for the command line.
pub fn possible_values() -> impl Iterator<Item = PossibleValue> {
    SCENARIOS
        .iter()
        .map(|scenario| PossibleValue::new(scenario.name).help(scenario.about))
        .chain(components::possible_values())
}
