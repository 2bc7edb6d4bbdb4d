//! `edge-host`: an HTTP service that runs WebAssembly guests.

use std::process::ExitCode;

use clap::Parser as _;
use wasmscope_test_hosts::edge;

fn main() -> ExitCode {
    match edge::run(&edge::Options::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("edge-host: {error:#}");
            ExitCode::FAILURE
        }
    }
}
