//! What only tests and benchmarks use: strace, bpftrace, wasmtime's Python package and Mermaid's parser.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, bail};

use super::apt;
use crate::step::{Step, run_noting};
use crate::toolchain::on_path;
use crate::workspace::Workspace;

/// The `PyPI` release whose `libwasmtime.so` the tests trace.
const WASMTIME_WHEEL: &str = "50.0.1";

/// One tool.
#[derive(Debug)]
pub(crate) enum Tool {
    /// A program that Debian packages under its own name.
    Program(&'static str),
    /// A virtual environment with the `wasmtime` wheel.
    Python { environment: PathBuf },
    /// The npm packages of `tests/mermaid`.
    Mermaid { directory: PathBuf },
}

/// Every tool that this checkout has a use for.
pub(crate) fn all(workspace: &Workspace) -> Vec<Tool> {
    let mut tools = vec![
        Tool::Program("strace"),
        Tool::Program("bpftrace"),
        Tool::Python {
            environment: workspace.tools().join("python"),
        },
    ];
    let directory = workspace.root.join("tests/mermaid");
    if directory.join("package-lock.json").is_file() {
        tools.push(Tool::Mermaid { directory });
    }
    tools
}

/// The interpreter of the virtual environment, whether or not it is there yet.
pub(crate) fn python(workspace: &Workspace) -> PathBuf {
    workspace.tools().join("python/bin/python3")
}

impl Tool {
    /// For reports.
    pub(crate) fn name(&self) -> &'static str {
        match self {
            Self::Program(name) => name,
            Self::Python { .. } => "py-wasmtime",
            Self::Mermaid { .. } => "mermaid",
        }
    }

    /// What a person would type.
    pub(crate) fn how_to(&self) -> String {
        match self {
            Self::Program(name) => format!("sudo apt-get install {name}"),
            Self::Python { environment } => format!(
                "python3 -m venv {0} && {0}/bin/python3 -m pip install wasmtime=={WASMTIME_WHEEL}",
                environment.display()
            ),
            Self::Mermaid { directory } => {
                format!("npm ci --prefix {} (needs Node.js 20 or newer)", directory.display())
            }
        }
    }

    /// Whether it is there and works.
    pub(crate) fn is_present(&self) -> bool {
        match self {
            Self::Program(name) => !on_path(name).is_empty(),
            Self::Python { environment } => has_wheel(&environment.join("bin/python3")),
            Self::Mermaid { directory } => {
                // npm writes this file last.
                let modified = |name: &str| {
                    fs::metadata(directory.join(name))
                        .and_then(|metadata| metadata.modified())
                        .ok()
                };
                !on_path("node").is_empty()
                    && modified("node_modules/.package-lock.json") >= modified("package-lock.json")
            }
        }
    }

    /// Installs it; the error names what is missing and the command that gets it.
    pub(crate) fn install(&self) -> Result<()> {
        let installed = match self {
            Self::Program(name) => apt::candidate(name).and_then(|_| apt::install(&[name])),
            Self::Python { environment } => install_wheel(environment),
            Self::Mermaid { directory } => install_packages(directory),
        };
        installed.with_context(|| format!("try `{}`", self.how_to()))?;
        if !self.is_present() {
            bail!("installed, but it does not work; try `{}`", self.how_to());
        }
        Ok(())
    }
}

fn has_wheel(python: &Path) -> bool {
    let script =
        format!("import importlib.metadata as m, wasmtime; assert m.version('wasmtime') == '{WASMTIME_WHEEL}'");
    Command::new(python)
        .args(["-c", &script])
        .output()
        .is_ok_and(|output| output.status.success())
}

fn install_wheel(environment: &Path) -> Result<()> {
    if on_path("python3").is_empty() {
        apt::install(&["python3", "python3-venv"])?;
    } else if run_noting(Command::new("python3").args(["-c", "import ensurepip, venv"]), |_| ()).is_err() {
        apt::install(&["python3-venv"])?;
    }
    let tools = environment
        .parent()
        .context("the environment has no parent directory")?;
    let staging = super::linker::staging(tools)?;
    let staged = staging.path().join("python");
    Step::run(
        "making a Python environment (python3 -m venv)",
        Command::new("python3").args(["-m", "venv"]).arg(&staged),
    )?;
    let wheel = format!("wasmtime=={WASMTIME_WHEEL}");
    let words = [
        "-m",
        "pip",
        "install",
        "--quiet",
        "--disable-pip-version-check",
        "--only-binary=:all:",
        &wheel,
    ];
    Step::run(
        format!("installing {wheel} (pip)"),
        Command::new(staged.join("bin/python3")).args(words),
    )?;
    if environment.exists() {
        fs::remove_dir_all(environment).with_context(|| format!("while removing {}", environment.display()))?;
    }
    fs::rename(&staged, environment).with_context(|| format!("while putting {} in place", environment.display()))
}

fn install_packages(directory: &Path) -> Result<()> {
    if on_path("npm").is_empty() {
        apt::candidate("npm")?;
        apt::install(&["nodejs", "npm"])?;
    }
    let words = ["ci", "--ignore-scripts", "--no-audit", "--no-fund"];
    Step::run(
        "installing the packages of tests/mermaid (npm ci)",
        Command::new("npm").args(words).current_dir(directory),
    )
    .map(drop)
}
