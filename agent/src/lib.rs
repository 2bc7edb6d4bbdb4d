//! Wasmscope as a library: everything the `wasmscope` binary does, in pieces that tests and tools can use.
//!
//! `ARCHITECTURE.md` at the root of the repository says how the modules meet.

pub mod clock;
pub mod diagram;
pub mod span;
