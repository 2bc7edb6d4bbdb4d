//! Ordinary wasmtime embeddings that know nothing of Wasmscope, and the exact counts that they take of themselves.
//!
//! Tests trace the binaries of this crate from outside and compare what was seen with these counts for equality.

pub mod counts;
pub mod edge;
pub mod host;
pub mod limiter;
pub mod nap;
pub mod options;
pub mod report;
pub mod runner;
pub mod scenario;
pub mod session;
pub mod syscalls;
