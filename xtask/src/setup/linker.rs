//! `bpf-linker`, built by `cargo install` against an LLVM that is at least the compiler's, and put in place only when it runs.

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, bail};

use super::apt;
use crate::step::{Step, run_noting};
use crate::toolchain::{Compiler, is_executable, isolate, on_path};

/// The version to install; others that are found and work are used as they are.
const VERSION: &str = "0.13.0";
/// The LLVM releases that version has a feature for.
const LLVM_MAJORS: std::ops::RangeInclusive<u32> = 21..=23;
const STAGING_PREFIX: &str = "staging-";

/// Removes what an interrupted set-up left.
pub(crate) fn remove_leftovers(tools: &Path) -> Result<()> {
    for entry in fs::read_dir(tools).with_context(|| format!("while reading {}", tools.display()))? {
        let entry = entry?;
        if entry.file_name().to_string_lossy().starts_with(STAGING_PREFIX) {
            let path = entry.path();
            fs::remove_dir_all(&path).with_context(|| format!("while removing {}", path.display()))?;
        }
    }
    Ok(())
}

/// A new directory beside the final place, which [`remove_leftovers`] knows.
pub(crate) fn staging(tools: &Path) -> Result<tempfile::TempDir> {
    let made = tempfile::Builder::new().prefix(STAGING_PREFIX).tempdir_in(tools);
    made.with_context(|| format!("while making a directory in {}", tools.display()))
}

/// Builds `bpf-linker` for what `compiler` emits and returns where it is.
pub(crate) fn install(compiler: &Compiler, tools: &Path) -> Result<PathBuf> {
    let needed = compiler.llvm_major;
    if needed > *LLVM_MAJORS.end() {
        bail!(
            "{compiler} emits LLVM {needed}; bpf-linker {VERSION} reads up to LLVM {}",
            LLVM_MAJORS.end()
        );
    }
    let llvm = match Llvm::find(needed) {
        Some(llvm) => llvm,
        None => install_llvm(needed)?,
    };
    let staging = staging(tools)?;
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    isolate(&mut command);
    if let Some(toolchain) = std::env::var_os("RUSTUP_TOOLCHAIN") {
        // The rustc that goes with this very cargo.
        command.env("RUSTUP_TOOLCHAIN", toolchain);
    }
    command
        .args([
            "install",
            "bpf-linker",
            "--version",
            &format!("={VERSION}"),
            "--locked",
            "--no-default-features",
            "--no-track",
        ])
        .args(["--features", &format!("llvm-{}", llvm.major), "--root"])
        .arg(staging.path())
        // Kept until it is built, so that an interrupted build goes on where it stopped.
        .env("CARGO_TARGET_DIR", tools.join("build"))
        .env("LLVM_PREFIX", &llvm.prefix)
        .env("CARGO_ENCODED_RUSTFLAGS", llvm.flags());
    let title = format!(
        "building bpf-linker {VERSION} with LLVM {} from {} (cargo install)",
        llvm.major,
        llvm.prefix.display()
    );
    Step::run(title, &mut command)?;

    let built = staging.path().join("bin/bpf-linker");
    run_noting(Command::new(&built).arg("--version"), |_| ()).context("the bpf-linker that was built does not run")?;
    let place = tools.join("bin/bpf-linker");
    fs::rename(&built, &place).with_context(|| format!("while putting {} in place", place.display()))?;
    fs::remove_dir_all(tools.join("build")).context("while removing the build directory of bpf-linker")?;
    Ok(place)
}

/// An LLVM with development files.
#[derive(Debug)]
struct Llvm {
    major: u32,
    prefix: PathBuf,
    libraries: PathBuf,
}

impl Llvm {
    /// The oldest one installed that reads what LLVM `needed` wrote.
    fn find(needed: u32) -> Option<Self> {
        let prefix = std::env::var_os("LLVM_PREFIX").map(PathBuf::from);
        let named = |major| on_path(&format!("llvm-config-{major}")).into_iter().next();
        let debian = |major| PathBuf::from(format!("/usr/lib/llvm-{major}/bin/llvm-config"));
        let mut configs: Vec<PathBuf> = prefix
            .map(|prefix| prefix.join("bin/llvm-config"))
            .into_iter()
            .collect();
        configs.extend(LLVM_MAJORS.flat_map(|major| named(major).into_iter().chain([debian(major)])));
        configs.extend(on_path("llvm-config"));
        let fit = |llvm: &Self| LLVM_MAJORS.contains(&llvm.major) && llvm.major >= needed && llvm.is_complete();
        configs
            .iter()
            .filter(|config| is_executable(config))
            .filter_map(|config| Self::ask(config))
            .find(fit)
    }

    fn ask(config: &Path) -> Option<Self> {
        let output = Command::new(config)
            .args(["--version", "--prefix", "--libdir"])
            .output()
            .ok()?;
        let text = String::from_utf8(output.stdout).ok()?;
        let mut lines = text.lines();
        let major = lines.next()?.split('.').next()?.parse().ok()?;
        Some(Self {
            major,
            prefix: lines.next()?.into(),
            libraries: lines.next()?.into(),
        })
    }

    /// The name without a version is what the linker looks for, and only development packages have it.
    fn is_complete(&self) -> bool {
        self.libraries.join("libLLVM.so").exists()
    }

    fn flags(&self) -> OsString {
        let mut flags = OsString::from("-L");
        flags.push(&self.libraries);
        // Found again at run time, wherever it lies.
        flags.push("\u{1f}-Clink-arg=-Wl,-rpath,");
        flags.push(&self.libraries);
        flags
    }
}

fn install_llvm(needed: u32) -> Result<Llvm> {
    let oldest = needed.max(*LLVM_MAJORS.start());
    eprintln!("bpf-linker needs the development files of LLVM {oldest} or newer, which are not here");
    let mut failures = Vec::new();
    for major in oldest..=*LLVM_MAJORS.end() {
        let package = format!("llvm-{major}-dev");
        match apt::candidate(&package).and_then(|_| apt::install(&[&package])) {
            Ok(()) => {
                return Llvm::find(needed)
                    .with_context(|| format!("`{package}` is installed, but LLVM is not where it should be"));
            }
            Err(error) => failures.push(format!("  {package}: {error:#}")),
        }
        crate::interrupt::check()?;
    }
    bail!(
        "LLVM {oldest} or newer (at most {}) is missing and could not be installed:\n{}\n\
         to get it: sudo apt-get install llvm-{oldest}-dev, or set LLVM_PREFIX to where it is, or put a working `bpf-linker` on PATH",
        LLVM_MAJORS.end(),
        failures.join("\n")
    )
}
