//! `cargo xtask setup`: finds or installs what building the eBPF programs and running the tests needs.

mod apt;
mod compiler;
mod linker;
mod proof;
mod test_tools;

use std::fs::{self, File};
use std::path::Path;
use std::process::ExitCode;

use anyhow::{Context as _, Result, bail};

use crate::toolchain::{Search, Toolchain, on_path};
use crate::workspace::Workspace;

pub(crate) use apt::install as install_packages;
use test_tools::Tool;
pub(crate) use test_tools::{python, wheels};

/// Debian package of the protobuf compiler.
const PROTOC_PACKAGE: &str = "protobuf-compiler";

/// Find or install what building needs; does nothing when all is there.
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// Only report; exit with 1 when something is missing.
    #[arg(long)]
    check: bool,
    /// Also what the tests and benchmarks use: strace, bpftrace, wasmtime for Python, Mermaid.
    #[arg(long)]
    tests: bool,
}

/// Sets up, or with `--check` reports.
pub(crate) fn run(workspace: &Workspace, options: &Options) -> Result<ExitCode> {
    if options.check {
        return check(workspace, options.tests);
    }
    let toolchain = ensure_ebpf(workspace)?;
    println!("compiler    {}", toolchain.compiler);
    println!("bpf-linker  {}", toolchain.linker.display());
    if options.tests {
        let missing = ensure_test_tools(workspace)?;
        for reason in &missing {
            eprintln!("missing: {reason}");
        }
        if !missing.is_empty() {
            bail!("{} of the tools for tests could not be installed", missing.len());
        }
    }
    println!("all there");
    Ok(ExitCode::SUCCESS)
}

/// A compiler and a linker that were seen to build an eBPF program together; installs them where they are missing.
pub(crate) fn ensure_ebpf(workspace: &Workspace) -> Result<Toolchain> {
    ensure_build_tools()?;
    if let Some(pinned) = Toolchain::read_pinned(&workspace.target) {
        return Ok(pinned);
    }
    let tools = workspace.tools();
    fs::create_dir_all(tools.join("bin")).with_context(|| format!("while creating {}", tools.display()))?;
    let _lock = lock(&tools)?;
    linker::remove_leftovers(&tools)?;

    let directories = workspace.target_directories();
    let mut search = Search::run(&directories);
    let mut failures = Vec::new();
    if search.compilers.is_empty() {
        compiler::install(&search.rejected)?;
        search = Search::run(&directories);
    }
    let proven = first_proven(&search, &tools, &mut failures)?;
    let toolchain = if let Some(toolchain) = proven {
        toolchain
    } else {
        let Some(compiler) = search.compilers.first() else {
            bail!(
                "no usable compiler after installing one:\n  {}",
                search.rejected.join("\n  ")
            );
        };
        for failure in &failures {
            eprintln!("not usable: {failure}");
        }
        let linker = linker::install(compiler, &tools)?;
        let toolchain = Toolchain {
            compiler: compiler.clone(),
            linker,
        };
        proof::prove(&toolchain, &tools).context("the tools are installed, but do not build an eBPF program")?;
        toolchain
    };
    toolchain
        .pin(&workspace.target)
        .context("while recording the tools that were found")?;
    Ok(toolchain)
}

/// What building the agent takes beside a compiler: the bindings of the container runtime interface are generated, and the
/// allocator has a makefile.
fn ensure_build_tools() -> Result<()> {
    let mut missing = Vec::new();
    if !has_protoc() {
        missing.push(PROTOC_PACKAGE);
    }
    if on_path("make").is_empty() {
        missing.push("make");
    }
    if !missing.is_empty() {
        apt::install(&missing).with_context(|| format!("{} is needed to build the agent", missing.join(" and ")))?;
    }
    Ok(())
}

fn has_protoc() -> bool {
    std::env::var_os("PROTOC").is_some() || !on_path("protoc").is_empty()
}

/// Installs what tests use and returns what could not be had, each with its reason.
pub(crate) fn ensure_test_tools(workspace: &Workspace) -> Result<Vec<String>> {
    ensure_all(workspace, test_tools::all(workspace))
}

/// The same for what building the shim of the slow tests takes beside a compiler.
pub(crate) fn ensure_shim_tools(workspace: &Workspace) -> Result<Vec<String>> {
    ensure_all(workspace, test_tools::of_shim())
}

/// The same for the machine that has the second kernel.
pub(crate) fn ensure_second_kernel_tools(workspace: &Workspace) -> Result<Vec<String>> {
    let tools = test_tools::all(workspace)
        .into_iter()
        .chain(test_tools::of_second_kernel());
    ensure_all(workspace, tools.collect())
}

/// The same for some of them, by name.
pub(crate) fn ensure_tools(workspace: &Workspace, names: &[&str]) -> Result<Vec<String>> {
    let all = test_tools::all(workspace);
    ensure_all(
        workspace,
        all.into_iter().filter(|tool| names.contains(&tool.name())).collect(),
    )
}

fn ensure_all(workspace: &Workspace, tools: Vec<Tool>) -> Result<Vec<String>> {
    let absent: Vec<_> = tools.into_iter().filter(|tool| !tool.is_present()).collect();
    if absent.is_empty() {
        return Ok(Vec::new());
    }
    let tools = workspace.tools();
    fs::create_dir_all(&tools).with_context(|| format!("while creating {}", tools.display()))?;
    let _lock = lock(&tools)?;
    let mut missing = Vec::new();
    for tool in absent {
        crate::interrupt::check()?;
        if let Err(error) = tool.install() {
            missing.push(format!("{}: {error:#}", tool.name()));
        }
    }
    Ok(missing)
}

fn first_proven(search: &Search, tools: &Path, failures: &mut Vec<String>) -> Result<Option<Toolchain>> {
    for compiler in &search.compilers {
        for linker in &search.linkers {
            let toolchain = Toolchain {
                compiler: compiler.clone(),
                linker: linker.clone(),
            };
            match proof::prove(&toolchain, tools) {
                Ok(()) => return Ok(Some(toolchain)),
                Err(error) => failures.push(format!("{compiler} with {}: {error:#}", linker.display())),
            }
            crate::interrupt::check()?;
        }
    }
    Ok(None)
}

fn check(workspace: &Workspace, tests: bool) -> Result<ExitCode> {
    let mut all_there = true;
    let mut say = |name: &str, found: Result<String, String>| {
        let (word, detail) = match found {
            Ok(detail) => ("ok", detail),
            Err(detail) => {
                all_there = false;
                ("MISSING", detail)
            }
        };
        println!("{name:<12}{word:<9}{detail}");
    };
    say(
        "protoc",
        if has_protoc() {
            Ok(String::new())
        } else {
            Err(format!("apt-get install {PROTOC_PACKAGE}"))
        },
    );
    let (compiler, linker) = find(workspace)?;
    say("compiler", compiler);
    say("bpf-linker", linker);
    if tests {
        for tool in test_tools::all(workspace) {
            let found = if tool.is_present() {
                Ok(String::new())
            } else {
                Err(tool.how_to())
            };
            say(tool.name(), found);
        }
    }
    Ok(if all_there {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

/// What was found, in words, or how to get it.
type Finding = Result<String, String>;

/// The compiler and the linker that would be used; installs nothing.
fn find(workspace: &Workspace) -> Result<(Finding, Finding)> {
    let shown = |toolchain: &Toolchain| {
        (
            Ok(toolchain.compiler.to_string()),
            Ok(toolchain.linker.display().to_string()),
        )
    };
    if let Some(pinned) = Toolchain::read_pinned(&workspace.target) {
        return Ok(shown(&pinned));
    }
    let tools = workspace.tools();
    fs::create_dir_all(&tools).with_context(|| format!("while creating {}", tools.display()))?;
    let search = Search::run(&workspace.target_directories());
    let mut failures = Vec::new();
    if let Some(proven) = first_proven(&search, &tools, &mut failures)? {
        return Ok(shown(&proven));
    }
    let compiler = search.compilers.first().map(ToString::to_string);
    failures.push("`cargo xtask setup` builds one with cargo and LLVM's development files".to_owned());
    let linker = failures.join("; ").lines().map(str::trim).collect::<Vec<_>>().join(" ");
    Ok((
        compiler.ok_or_else(|| compiler::HOW_TO.replace('\n', "; ")),
        Err(linker),
    ))
}

/// Keeps a second set-up into the same directory waiting until the first is done.
fn lock(tools: &Path) -> Result<File> {
    let path = tools.join("setup.lock");
    let file = File::create(&path).with_context(|| format!("while creating {}", path.display()))?;
    if file.try_lock().is_err() {
        eprintln!("waiting for another set-up in {} to end …", tools.display());
        file.lock()
            .with_context(|| format!("while locking {}", path.display()))?;
    }
    Ok(file)
}
