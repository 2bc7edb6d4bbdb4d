//! `workload`: runs one scenario and prints exact counts of what it did.

use std::process::ExitCode;

fn main() -> ExitCode {
    wasmscope_test_hosts::runner::main()
}
