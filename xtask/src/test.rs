//! `cargo xtask test`: the whole test ladder in one command, from formatting to the real kernel.

use std::fs;
use std::io::{BufRead as _, BufReader};
use std::path::PathBuf;
use std::process::{Command, ExitCode, Stdio};
use std::time::Instant;

use anyhow::{Context as _, Result, bail};

use crate::agent_cli::Agent;
use crate::gallery;
use crate::interrupt;
use crate::musl;
use crate::second_kernel;
use crate::setup;
use crate::step::shown;
use crate::summary::{Count, Outcome, Summary};
use crate::workspace::Workspace;

/// Run every check: formatting, lints, unit tests, then tests on the real kernel where this process may trace.
///
/// What cannot run here is named at the end; with CI=true in the environment that is a failure.
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// Leave out the tests that trace real processes.
    #[arg(long)]
    fast: bool,
    /// Also run the slow tests: a host of static musl, a guest that is a pod, run by a runwasi shim under containerd, pods on a second kernel in
    /// an emulated machine, and a picture of each dashboard. Building all, once, takes half an hour.
    #[arg(long, conflicts_with = "fast")]
    slow: bool,
    /// Run only tests whose name contains this, and no lints.
    #[arg(long, value_name = "NAME")]
    only: Option<String>,
}

const FORMAT: &str = "format";
const LINTS: &str = "lints";
const UNIT: &str = "unit and snapshot tests";
const HOSTS: &str = "test hosts";
const HOST_TESTS: &str = "tests of the test hosts";
const LINKED_HOSTS: &str = "test hosts linked in other ways";
const MUSL_HOST: &str = "test host of static musl";
/// The one test that traces it.
const MUSL_TEST: &str = "linking::a_static_musl_host_is_seen_exactly";
const TOOLS: &str = "tools for tests";
const KERNEL: &str = "tests on the real kernel";
const INTEGRATION: &str = "integration tests";
const SHIM: &str = "runwasi shim";
const SLOW: &str = "slow tests on the real kernel";
/// What needs the shim.
const SHIM_TEST: &str = "runwasi::a_guest_that_a_runwasi_shim_runs_as_a_pod_is_named_and_traced_as_it_counts_itself";
const SECOND_KERNEL: &str = "tests on a second kernel";
const GALLERY: &str = "pictures of the dashboards";
/// The shim's binary; containerd finds it by this name.
const SHIM_BINARY: &str = "containerd-shim-wasmtime-v1";
/// The test target of `wasmscope-tests` that traces real processes; its others run anywhere.
const KERNEL_TARGET: &str = "kernel";

/// Runs the stages and prints what they came to.
pub(crate) fn run(workspace: &Workspace, options: &Options) -> Result<ExitCode> {
    let mut stages = Stages {
        workspace,
        summary: Summary::default(),
    };
    stages.run("set-up", || setup::ensure_ebpf(workspace).map(|_| Outcome::Ok))?;
    if stages.summary.is_success() {
        stages.run_all(options)?;
    }
    let summary = stages.summary;

    println!("\n== summary");
    let left_out: Vec<_> = summary.left_out().collect();
    for (name, reason) in &left_out {
        println!("!! LEFT OUT: {name}: {reason}");
    }
    let is_ci = std::env::var_os("CI").is_some_and(|value| value == "true");
    let is_complete = left_out.is_empty() || options.fast;
    if is_ci && !is_complete {
        println!("!! CI=true: leaving out tests is a failure");
    }
    if !options.slow && !options.fast {
        println!(
            "the slow stage (a host of static musl, a guest as a pod of a runwasi shim, pods on a second kernel, pictures of the dashboards) was not asked for: cargo xtask test --slow"
        );
    }
    println!("{summary}");
    let is_success = summary.is_success() && (is_complete || !is_ci);
    Ok(if is_success {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

struct Stages<'a> {
    workspace: &'a Workspace,
    summary: Summary,
}

impl Stages<'_> {
    fn run_all(&mut self, options: &Options) -> Result<()> {
        let workspace = self.workspace;
        let filter = options.only.as_deref();
        if filter.is_none() {
            self.run(FORMAT, || {
                run_all([
                    workspace.cargo(["fmt", "--all", "--check"]),
                    workspace.cargo(["fmt", "--manifest-path", "ebpf/Cargo.toml", "--check"]),
                ])
            })?;
            self.run(LINTS, || {
                let words = [
                    "clippy",
                    "--workspace",
                    "--all-targets",
                    "--locked",
                    "--",
                    "-D",
                    "warnings",
                ];
                run_all([workspace.cargo(words), lint_ebpf(workspace)])
            })?;
        }
        self.run(UNIT, || {
            let mut command = workspace.cargo([
                "test",
                "--workspace",
                "--exclude",
                "wasmscope-tests",
                // These embed wasmtime, which takes minutes to compile: they are tested as they are built, below.
                "--exclude",
                "wasmscope-test-hosts",
                "--locked",
                "--no-fail-fast",
            ]);
            command.arg("--").args(filter);
            run_tests(&mut command)
        })?;
        if options.fast {
            self.summary.add(
                INTEGRATION,
                std::time::Duration::ZERO,
                Outcome::LeftOut("--fast".to_owned()),
            );
            return Ok(());
        }
        self.run(HOSTS, || {
            run_all([
                workspace.cargo(["build", "--locked", "--package", "wasmscope", "--bins"]),
                workspace.cargo([
                    "build",
                    "--locked",
                    "--release",
                    "--package",
                    "wasmscope-test-hosts",
                    "--bins",
                ]),
            ])
        })?;
        self.run(HOST_TESTS, || {
            let mut command = workspace.cargo([
                "test",
                "--locked",
                "--release",
                "--package",
                "wasmscope-test-hosts",
                "--no-fail-fast",
                "--",
            ]);
            command.args(filter);
            run_tests(&mut command)
        })?;
        self.run(LINKED_HOSTS, || {
            // Their flags change nothing but how they are linked, so wasmtime is not compiled again.
            let linked = |name, flag| {
                let words = [
                    "rustc",
                    "--locked",
                    "--release",
                    "--package",
                    "wasmscope-test-hosts",
                    "--bin",
                ];
                let mut command = workspace.cargo(words);
                command.args([name, "--", "-C", flag]);
                command
            };
            run_all([
                linked("workload-static", "target-feature=+crt-static"),
                linked("workload-fixed", "relocation-model=static"),
            ])
        })?;
        if options.slow && filter.is_none_or(|filter| MUSL_TEST.contains(filter)) {
            self.run(MUSL_HOST, || musl::build_host(workspace))?;
        }
        self.run(TOOLS, || {
            let missing = setup::ensure_test_tools(workspace)?;
            Ok(if missing.is_empty() {
                Outcome::Ok
            } else {
                Outcome::LeftOut(missing.join("; "))
            })
        })?;
        let cannot_trace = cannot_trace(&Agent(workspace.debug_binary("wasmscope")))
            .unwrap_or_else(|error| Some(format!("{error:#}")));
        self.run(INTEGRATION, || {
            let mut command = workspace.cargo(["test", "--locked", "--package", "wasmscope-tests", "--no-fail-fast"]);
            if cannot_trace.is_some() {
                command.arg("--lib");
                for target in test_targets(workspace)?
                    .iter()
                    .filter(|target| *target != KERNEL_TARGET)
                {
                    command.args(["--test", target]);
                }
            }
            command.args(["--", "--test-threads=1"]).args(filter);
            set_paths(&mut command, workspace);
            run_tests(&mut command)
        })?;
        if let Some(reason) = &cannot_trace {
            let reason = Outcome::LeftOut(reason.clone());
            self.summary.add(KERNEL, std::time::Duration::ZERO, reason);
        }
        match (options.slow, cannot_trace) {
            (false, _) => Ok(()),
            (true, None) => self.run_slow(filter),
            (true, Some(reason)) => {
                let reason = Outcome::LeftOut(reason);
                self.summary.add(SLOW, std::time::Duration::ZERO, reason);
                Ok(())
            }
        }
    }

    /// What takes long to build: the tests that are ignored otherwise.
    fn run_slow(&mut self, filter: Option<&str>) -> Result<()> {
        let workspace = self.workspace;
        // Beside the rest, for its crates are others.
        let target = workspace.target.join("runwasi-shim");
        self.run_on_second_kernel(filter)?;
        if filter.is_none() {
            self.run(GALLERY, || {
                gallery::run(workspace, &gallery::Options::default()).map(|()| Outcome::Ok)
            })?;
        }
        if filter.is_some_and(|filter| !SHIM_TEST.contains(filter) && !MUSL_TEST.contains(filter)) {
            return Ok(());
        }
        self.run(SHIM, || {
            let missing = setup::ensure_shim_tools(workspace)?;
            if !missing.is_empty() {
                bail!("{}", missing.join("; "));
            }
            let manifest = "tests/runwasi-shim/Cargo.toml";
            let mut command = workspace.cargo(["build", "--locked", "--release", "--manifest-path", manifest]);
            command.env("CARGO_TARGET_DIR", &target);
            run_all([command])
        })?;
        self.run(SLOW, || {
            let mut command = workspace.cargo([
                "test",
                "--locked",
                "--package",
                "wasmscope-tests",
                "--test",
                KERNEL_TARGET,
                "--",
                "--test-threads=1",
                "--ignored",
            ]);
            command
                .args(filter)
                .env("WASMSCOPE_TEST_SHIM", target.join("release").join(SHIM_BINARY));
            set_paths(&mut command, workspace);
            run_tests(&mut command)
        })
    }

    /// Pods where cgroups are of version 2 alone, and on the oldest kernel that nodes are expected to have.
    fn run_on_second_kernel(&mut self, filter: Option<&str>) -> Result<()> {
        let workspace = self.workspace;
        let is_wanted = |test: &str| filter.is_none_or(|filter| filter.starts_with(test) || test.contains(filter));
        let tests: Vec<_> = second_kernel::TESTS
            .iter()
            .copied()
            .filter(|test| is_wanted(test))
            .collect();
        if tests.is_empty() {
            return Ok(());
        }
        self.run(SECOND_KERNEL, || {
            let missing = setup::ensure_second_kernel_tools(workspace)?;
            if !missing.is_empty() {
                bail!("{}", missing.join("; "));
            }
            let outcome = run_tests(&mut second_kernel::machine(workspace, &tests)?)?;
            match outcome {
                // Each name is that of one test at least.
                Outcome::Tests(count) if count.passed + count.failed < tests.len() as u64 => {
                    bail!("the machine has ended before its tests")
                }
                outcome => Ok(outcome),
            }
        })
    }

    /// Runs one stage; only an interruption ends the run.
    fn run(&mut self, name: &'static str, stage: impl FnOnce() -> Result<Outcome>) -> Result<()> {
        println!("\n== {name}");
        let started = Instant::now();
        let outcome = stage().unwrap_or_else(|error| {
            eprintln!("{name}: {error:#}");
            Outcome::Failed(error.to_string().lines().next().unwrap_or_default().to_owned())
        });
        interrupt::check()?;
        self.summary.add(name, started.elapsed(), outcome);
        Ok(())
    }
}

/// Tells integration tests where everything is that they run.
fn set_paths(command: &mut Command, workspace: &Workspace) {
    command
        .env("WASMSCOPE_BIN", workspace.debug_binary("wasmscope"))
        .env("WASMSCOPE_TEST_HOSTS_DIR", workspace.target.join("release"))
        .env("WASMSCOPE_TEST_PYTHON", setup::python(workspace))
        .env("WASMSCOPE_TEST_WHEELS", setup::wheels(workspace));
}

/// Begins the verdict of `wasmscope check`.
const CANNOT: &str = "tracing cannot work here";

/// Why `wasmscope check` says that tracing cannot work here.
pub(crate) fn cannot_trace(agent: &Agent) -> Result<Option<String>> {
    let mut command = agent.check();
    let output = command
        .output()
        .with_context(|| format!("while running `{}`", shown(&command)))?;
    if output.status.success() {
        return Ok(None);
    }
    let said = [output.stdout, output.stderr].map(|bytes| String::from_utf8_lossy(&bytes).into_owned());
    Ok(Some(
        reason(&said.join("\n")).unwrap_or_else(|| output.status.to_string()),
    ))
}

/// The sentence in which `wasmscope check` sums up, or its last words.
fn reason(said: &str) -> Option<String> {
    let lines: Vec<_> = said.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
    let verdict = lines.iter().position(|line| line.contains(CANNOT));
    let from = verdict.or_else(|| lines.len().checked_sub(1))?;
    Some(lines[from..].join(" "))
}

/// The integration test targets, by cargo's layout: files in `tests/tests`, and folders with a `main.rs`.
fn test_targets(workspace: &Workspace) -> Result<Vec<String>> {
    let directory = workspace.root.join("tests/tests");
    let entries = fs::read_dir(&directory).with_context(|| format!("while reading {}", directory.display()))?;
    let is_target = |path: &PathBuf| path.join("main.rs").is_file() || path.extension().is_some_and(|end| end == "rs");
    let targets = entries.flatten().map(|entry| entry.path()).filter(is_target);
    let mut names: Vec<_> = targets
        .filter_map(|path| Some(path.file_stem()?.to_string_lossy().into_owned()))
        .collect();
    names.sort();
    Ok(names)
}

/// The programs are lints' business on the host target: the compiler for theirs need not come with a clippy.
fn lint_ebpf(workspace: &Workspace) -> Command {
    let mut command = workspace.cargo([
        "clippy",
        "--manifest-path",
        "ebpf/Cargo.toml",
        "--locked",
        "--features",
        "log",
    ]);
    command
        .args(["--", "-D", "warnings"])
        // The programs use a language feature that only their own compiler offers without this.
        .env("RUSTC_BOOTSTRAP", "1")
        .env("CARGO_TARGET_DIR", workspace.target.join("ebpf"));
    command
}

fn run_all(commands: impl IntoIterator<Item = Command>) -> Result<Outcome> {
    for mut command in commands {
        let shown = shown(&command);
        println!("$ {shown}");
        let status = command.status().with_context(|| format!("while starting `{shown}`"))?;
        if !status.success() {
            bail!("`{shown}` failed ({status})");
        }
    }
    Ok(Outcome::Ok)
}

/// Runs a `cargo test`, shows what it prints and counts the results.
fn run_tests(command: &mut Command) -> Result<Outcome> {
    let shown = shown(command);
    println!("$ {shown}");
    let mut child = command
        .stdout(Stdio::piped())
        .spawn()
        .with_context(|| format!("while starting `{shown}`"))?;
    let mut count = Count::default();
    if let Some(stdout) = child.stdout.take() {
        for line in BufReader::new(stdout).split(b'\n') {
            let line = line.context("while reading test results")?;
            let line = String::from_utf8_lossy(&line);
            println!("{line}");
            count.add_line(&line);
        }
    }
    let status = child.wait()?;
    if !status.success() && count.failed == 0 {
        bail!("`{shown}` failed ({status})");
    }
    Ok(Outcome::Tests(count))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_reason_is_the_verdict_of_the_check() {
        let said = "kernel 5.4\n  ring buffer   FAILS\ntracing cannot work here:\n  ring buffer: run a newer kernel\n";
        assert_eq!(
            reason(said).as_deref(),
            Some("tracing cannot work here: ring buffer: run a newer kernel")
        );
    }

    #[test]
    fn without_a_verdict_the_last_words_are_the_reason() {
        assert_eq!(
            reason("\nwasmscope: unknown option\n").as_deref(),
            Some("wasmscope: unknown option")
        );
        assert_eq!(reason(""), None);
    }
}
