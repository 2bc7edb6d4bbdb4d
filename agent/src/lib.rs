//! Wasmscope as a library: everything the `wasmscope` binary does, in pieces that tests and tools can use.
//!
//! `ARCHITECTURE.md` at the root of the repository says how the modules meet.

pub mod agent;
#[expect(unsafe_code, reason = "system calls and map values that aya does not wrap")]
pub mod bpf;
pub mod cli;
pub mod clock;
pub mod config;
pub mod correlate;
pub mod decode;
pub mod diagram;
pub mod errno;
pub mod event;
pub mod governor;
pub mod http;
pub mod http_request;
pub mod image;
pub mod inventory;
pub mod metrics;
pub mod pipeline;
pub mod place;
pub mod process;
pub mod recorder;
pub mod recording;
pub mod runtime;
pub mod sampling;
pub mod self_observation;
pub mod sink;
pub mod span;
pub mod syscalls;
