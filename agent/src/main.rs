//! The `wasmscope` command.

use std::process::ExitCode;

/// Traces come in waves, are made on one thread and freed on others: the C library's allocator keeps the sum of the largest
/// waves of every thread, this one gives back what has not been used for a second (see `.cargo/config.toml`).
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

fn main() -> ExitCode {
    wasmscope::cli::run()
}
