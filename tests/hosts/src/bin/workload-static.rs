//! `workload`, statically linked and position-independent: `cargo xtask test` passes the linker's flags.

use std::process::ExitCode;

fn main() -> ExitCode {
    wasmscope_test_hosts::runner::main()
}
