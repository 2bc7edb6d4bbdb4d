//! Loads and attaches the programs, and reads what they produce: the only module that imports aya, and the only one of
//! the agent that may be unsafe.

mod aggregates;
mod attach;
mod breakpoint;
#[cfg(target_arch = "x86_64")]
pub mod cost;
pub mod features;
mod kernel_types;
mod load;
pub mod multi;
mod ring;

pub use aya::maps::MapError;

pub use attach::{AttachError, SiteLinks, SiteProgram, UprobeSite};
pub use breakpoint::{Breakpoint, MAX_BREAKPOINTS};
pub use kernel_types::KernelTypesError;
pub use load::{CounterValues, Kernel, LoadError, LoadOptions};
pub use ring::Ring;
