//! `cargo xtask`: the tasks of this repository, one file each.

mod agent_cli;
mod bench;
mod demo;
mod docs;
mod fixtures;
mod gallery;
mod http;
mod interrupt;
mod musl;
mod process;
mod second_kernel;
mod setup;
mod soak;
mod step;
mod summary;
mod test;
mod toolchain;
mod workspace;

use std::process::ExitCode;

use anyhow::Result;
use clap::{Parser, Subcommand};

use crate::workspace::Workspace;

/// Tasks of the Wasmscope repository. Each one first sets up what it needs.
#[derive(Debug, Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask")]
struct Options {
    #[command(subcommand)]
    task: Task,
}

#[derive(Debug, Subcommand)]
enum Task {
    Setup(setup::Options),
    Demo(demo::Options),
    Test(test::Options),
    #[command(subcommand)]
    Bench(bench::Bench),
    Fixtures(fixtures::Options),
    Docs(docs::Options),
    Soak(soak::Options),
    Gallery(gallery::Options),
}

fn main() -> ExitCode {
    let options = Options::parse();
    match run(options.task) {
        Ok(code) => code,
        Err(error) if interrupt::requested() => {
            eprintln!("stopped: {error:#}");
            ExitCode::from(130)
        }
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(task: Task) -> Result<ExitCode> {
    interrupt::install()?;
    let workspace = Workspace::find()?;
    match task {
        Task::Setup(options) => setup::run(&workspace, &options),
        Task::Demo(options) => demo::run(&workspace, &options).map(|()| ExitCode::SUCCESS),
        Task::Test(options) => test::run(&workspace, &options),
        Task::Bench(bench) => bench::run(&workspace, &bench).map(|()| ExitCode::SUCCESS),
        Task::Fixtures(options) => fixtures::run(&workspace, &options).map(|()| ExitCode::SUCCESS),
        Task::Docs(options) => docs::run(&workspace, &options).map(|()| ExitCode::SUCCESS),
        Task::Soak(options) => soak::run(&workspace, &options),
        Task::Gallery(options) => gallery::run(&workspace, &options).map(|()| ExitCode::SUCCESS),
    }
}
