//! Loads and attaches the programs, and reads what they produce: the only module that imports aya, and the only one of
//! the agent that may be unsafe.

mod account;
mod aggregates;
mod attach;
mod breakpoint;
#[cfg(target_arch = "x86_64")]
pub mod cost;
mod cpu_clock;
pub mod features;
mod kernel_types;
mod load;
#[cfg(test)]
mod loops;
pub mod multi;
#[cfg(target_arch = "x86_64")]
mod probe_cost;
mod programs;
mod ring;

pub use aya::maps::MapError;

pub use account::{KernelObject, ObjectInfo, RunTime};
pub use attach::{AttachError, SiteLinks, SiteProgram, UprobeSite};
pub use breakpoint::{Breakpoint, MAX_BREAKPOINTS};
pub use cpu_clock::process_cpu_ns;
pub use kernel_types::KernelTypesError;
pub use load::{CounterValues, Kernel, LoadError, LoadOptions};
#[cfg(target_arch = "x86_64")]
pub(crate) use probe_cost::measure as measure_probe_costs;
pub use ring::Ring;
