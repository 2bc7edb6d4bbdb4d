//! A compiler with `core` for the BPF target: from Debian, or rustup's nightly with `rust-src`.

use std::process::Command;

use anyhow::{Context as _, Result, bail};

use super::apt;
use crate::step::Step;
use crate::toolchain::{BPF_TARGET, OLDEST_RUST_MINOR, on_path};

/// What a person can do where this program cannot.
pub(crate) const HOW_TO: &str = "sudo apt-get install rustc-web libstd-rust-web-dev-bpf (or rust-web-src)
or: rustup toolchain install nightly --profile minimal --component rust-src";

/// Packages that together give a compiler and `core`, best first.
const DEBIAN_CHOICES: [[&str; 2]; 2] = [["rustc-web", "libstd-rust-web-dev-bpf"], ["rustc-web", "rust-web-src"]];

enum Way {
    Debian,
    Rustup,
}

/// Tries each way in turn; the error says what went wrong with every one of them.
pub(crate) fn install(rejected: &[String]) -> Result<()> {
    eprintln!("no Rust compiler (1.{OLDEST_RUST_MINOR} or newer) with `core` for {BPF_TARGET} here:");
    for reason in rejected {
        eprintln!("  {reason}");
    }
    let mut failures = Vec::new();
    // Where packages may be installed they are the quicker way: `core` comes ready-made.
    for way in [Way::Debian, Way::Rustup] {
        let (name, result) = match way {
            Way::Debian => ("Debian packages", from_debian()),
            Way::Rustup => ("rustup", from_rustup()),
        };
        match result {
            Ok(()) => return Ok(()),
            Err(error) => failures.push(format!("  {name}: {error:#}")),
        }
        crate::interrupt::check()?;
    }
    bail!(
        "a compiler for {BPF_TARGET} is missing and could not be installed:\n{}\nto get one:\n{HOW_TO}",
        failures.join("\n")
    )
}

fn from_debian() -> Result<()> {
    if !apt::may_install() {
        bail!("installing packages needs root, or sudo without a password");
    }
    let mut failures = Vec::new();
    for packages in DEBIAN_CHOICES {
        match from_packages(packages) {
            Ok(()) => return Ok(()),
            Err(error) => failures.push(format!("{error:#}")),
        }
        crate::interrupt::check()?;
    }
    bail!("{}", failures.join("; "))
}

fn from_packages(packages: [&str; 2]) -> Result<()> {
    let [compiler, _] = packages;
    for package in packages {
        let version = apt::candidate(package)?;
        let minor: u32 = version
            .split('.')
            .nth(1)
            .and_then(|minor| minor.parse().ok())
            .unwrap_or(0);
        if package == compiler && minor < OLDEST_RUST_MINOR {
            bail!("`{package}` is {version}, older than 1.{OLDEST_RUST_MINOR}");
        }
    }
    apt::install(&packages)
}

fn from_rustup() -> Result<()> {
    if on_path("rustup").is_empty() {
        bail!("not installed");
    }
    let listed = Command::new("rustup")
        .args(["toolchain", "list"])
        .output()
        .context("while asking rustup for toolchains")?;
    let has_nightly = String::from_utf8_lossy(&listed.stdout)
        .lines()
        .any(|line| line.starts_with("nightly-"));
    let words: &[&str] = if has_nightly {
        // The component alone, so that a nightly someone else relies on stays the one it is.
        &["component", "add", "rust-src", "--toolchain", "nightly"]
    } else {
        &[
            "toolchain",
            "install",
            "nightly",
            "--profile",
            "minimal",
            "--component",
            "rust-src",
        ]
    };
    Step::run(
        format!("rustup {}", words.join(" ")),
        Command::new("rustup").args(words),
    )
    .map(drop)
}
