//! The `wasmscope` command.

use std::process::ExitCode;

/// Traces are made on one thread and freed on others, in waves: an allocator that gives back what it does not need keeps the
/// agent's memory near what it holds, where the C library's keeps the sum of the largest waves of every thread.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    wasmscope::cli::run()
}
