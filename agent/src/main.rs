//! The `wasmscope` command.

use std::process::ExitCode;

fn main() -> ExitCode {
    wasmscope::cli::run()
}
