//! `workload`, linked to a fixed address: `cargo xtask test` passes the linker's flags.

use std::process::ExitCode;

fn main() -> ExitCode {
    wasmscope_test_hosts::runner::main()
}
