//! `workload`: runs one scenario and prints exact counts of what it did.

use std::process::ExitCode;

use clap::Parser as _;
use wasmscope_test_hosts::options::Options;
use wasmscope_test_hosts::runner;

fn main() -> ExitCode {
    match runner::run(&Options::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("workload: {error:#}");
            ExitCode::FAILURE
        }
    }
}
