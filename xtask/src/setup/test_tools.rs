//! What only tests and benchmarks use: strace, bpftrace, containerd, Prometheus, wasmtime's Python packages, Mermaid's parser and the definitions of the
//! Prometheus operator.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, bail};

use super::apt;
use crate::step::{Step, run_noting};
use crate::toolchain::on_path;
use crate::workspace::Workspace;

/// Names the wheel whose `libwasmtime.so` the tests trace; a copy in the environment tells what that was made for.
const REQUIREMENTS: &str = "requirements.txt";

/// One tool.
#[derive(Debug)]
pub(crate) enum Tool {
    /// A program that Debian packages under its own name.
    Program(&'static str),
    /// A program that comes in a package of another name.
    Packaged {
        /// Where it is, from the root.
        file: &'static str,
        package: &'static str,
    },
    /// A virtual environment with what `requirements` lists.
    Python {
        environment: PathBuf,
        requirements: PathBuf,
    },
    /// wasmtime's Python package in every version that tests run against, each in a directory of its own.
    Wheels {
        python: PathBuf,
        directory: PathBuf,
        versions: Vec<String>,
    },
    /// The npm packages that a folder of tests lists.
    Npm { name: &'static str, directory: PathBuf },
}

/// Every tool that this checkout has a use for.
pub(crate) fn all(workspace: &Workspace) -> Vec<Tool> {
    let mut tools = vec![
        Tool::Program("strace"),
        Tool::Program("bpftrace"),
        // Certificates of a kubelet.
        Tool::Program("openssl"),
        // Pods for the tests of who runs where.
        Tool::Program("containerd"),
        Tool::Program("runc"),
        Tool::Packaged {
            file: "/usr/share/doc/busybox-static",
            package: "busybox-static",
        },
        // Pods with addresses, for the agent as its manifest deploys it.
        Tool::Packaged {
            file: "/usr/lib/cni/ptp",
            package: "containernetworking-plugins",
        },
        // Checks rules and runs their tests, and is scraped into by the tests of dashboards.
        Tool::Program("prometheus"),
        // What alerts go through.
        Tool::Program("prometheus-alertmanager"),
    ];
    let requirements = workspace.root.join("tests/python").join(REQUIREMENTS);
    if requirements.is_file() {
        tools.push(Tool::Python {
            environment: workspace.tools().join("python"),
            requirements,
        });
    }
    let versions = fs::read_to_string(workspace.root.join("tests/python/versions.txt")).unwrap_or_default();
    if !versions.is_empty() {
        tools.push(Tool::Wheels {
            python: python(workspace),
            directory: wheels(workspace),
            versions: versions.lines().map(str::to_owned).collect(),
        });
    }
    for (name, folder) in [("mermaid", "tests/mermaid"), ("prometheus-operator", "tests/crds")] {
        let directory = workspace.root.join(folder);
        if directory.join("package-lock.json").is_file() {
            tools.push(Tool::Npm { name, directory });
        }
    }
    tools
}

/// What building `tests/runwasi-shim` takes beside the compilers that building the agent needs.
pub(crate) fn of_shim() -> Vec<Tool> {
    vec![
        // Youki, by which the shim makes containers, links it.
        Tool::Packaged {
            file: "/usr/include/seccomp.h",
            package: "libseccomp-dev",
        },
        Tool::Program("pkg-config"),
    ]
}

/// What a virtual machine takes beside what its tests run.
pub(crate) fn of_second_kernel() -> Vec<Tool> {
    let packages = [
        ("/usr/bin/qemu-system-x86_64", "qemu-system-x86"),
        ("/usr/sbin/mke2fs", "e2fsprogs"),
        ("/usr/bin/objcopy", "binutils"),
        ("/usr/bin/xz", "xz-utils"),
    ];
    packages.map(|(file, package)| Tool::Packaged { file, package }).into()
}

/// The interpreter of the virtual environment, whether or not it is there yet.
pub(crate) fn python(workspace: &Workspace) -> PathBuf {
    workspace.tools().join("python/bin/python3")
}

/// Where [`Tool::Wheels`] are, whether or not they are there yet.
pub(crate) fn wheels(workspace: &Workspace) -> PathBuf {
    workspace.tools().join("wheels")
}

impl Tool {
    /// For reports.
    pub(crate) fn name(&self) -> &'static str {
        match self {
            Self::Program(name) | Self::Npm { name, .. } => name,
            Self::Packaged { package, .. } => package,
            Self::Python { .. } => "py-wasmtime",
            Self::Wheels { .. } => "py-wasmtime, all versions",
        }
    }

    /// What a person would type.
    pub(crate) fn how_to(&self) -> String {
        match self {
            Self::Program(name) => format!("sudo apt-get install {name}"),
            Self::Packaged { package, .. } => format!("sudo apt-get install {package}"),
            Self::Python { requirements, .. } => format!("python3 -m pip install -r {}", requirements.display()),
            Self::Wheels {
                directory, versions, ..
            } => {
                let each = versions.iter().map(|version| {
                    let target = directory.join(version);
                    format!(
                        "python3 -m pip install --target {} wasmtime=={version}",
                        target.display()
                    )
                });
                each.collect::<Vec<_>>().join(" && ")
            }
            Self::Npm { directory, .. } => {
                format!("npm ci --prefix {} (needs Node.js 20 or newer)", directory.display())
            }
        }
    }

    /// Whether it is there and works.
    pub(crate) fn is_present(&self) -> bool {
        match self {
            Self::Program(name) => !on_path(name).is_empty(),
            Self::Packaged { file, .. } => Path::new(file).exists(),
            Self::Python {
                environment,
                requirements,
            } => {
                let made_for = fs::read(environment.join(REQUIREMENTS)).ok();
                made_for.is_some() && made_for == fs::read(requirements).ok() && imports_wasmtime(environment)
            }
            Self::Wheels {
                directory, versions, ..
            } => versions
                .iter()
                .all(|version| directory.join(version).join("wasmtime/__init__.py").is_file()),
            Self::Npm { directory, .. } => {
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
            Self::Packaged { package, .. } => apt::candidate(package).and_then(|_| apt::install(&[package])),
            Self::Python {
                environment,
                requirements,
            } => install_wheel(environment, requirements),
            Self::Wheels {
                python,
                directory,
                versions,
            } => versions
                .iter()
                .try_for_each(|version| install_version(python, &directory.join(version), version)),
            Self::Npm { directory, .. } => install_packages(directory),
        };
        installed.with_context(|| format!("try `{}`", self.how_to()))?;
        if !self.is_present() {
            bail!("installed, but it does not work; try `{}`", self.how_to());
        }
        Ok(())
    }
}

fn imports_wasmtime(environment: &Path) -> bool {
    let mut python = Command::new(environment.join("bin/python3"));
    python
        .args(["-c", "import wasmtime"])
        .output()
        .is_ok_and(|output| output.status.success())
}

fn install_wheel(environment: &Path, requirements: &Path) -> Result<()> {
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
    let mut pip = Command::new(staged.join("bin/python3"));
    pip.args([
        "-m",
        "pip",
        "install",
        "--quiet",
        "--disable-pip-version-check",
        "--only-binary=:all:",
        "-r",
    ])
    .arg(requirements);
    Step::run("installing wasmtime for Python (pip)", &mut pip)?;
    fs::copy(requirements, staged.join(REQUIREMENTS))
        .with_context(|| format!("while copying {}", requirements.display()))?;
    if environment.exists() {
        fs::remove_dir_all(environment).with_context(|| format!("while removing {}", environment.display()))?;
    }
    fs::rename(&staged, environment).with_context(|| format!("while putting {} in place", environment.display()))
}

fn install_version(python: &Path, directory: &Path, version: &str) -> Result<()> {
    if directory.join("wasmtime/__init__.py").is_file() {
        return Ok(());
    }
    let parent = directory.parent().context("the wheel has no parent directory")?;
    fs::create_dir_all(parent).with_context(|| format!("while making {}", parent.display()))?;
    let staging = super::linker::staging(parent)?;
    let staged = staging.path().join(version);
    let mut pip = Command::new(python);
    pip.args([
        "-m",
        "pip",
        "install",
        "--quiet",
        "--disable-pip-version-check",
        "--only-binary=:all:",
        "--target",
    ])
    .arg(&staged)
    .arg(format!("wasmtime=={version}"));
    Step::run(format!("installing wasmtime {version} for Python (pip)"), &mut pip)?;
    fs::rename(&staged, directory).with_context(|| format!("while putting {} in place", directory.display()))
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
