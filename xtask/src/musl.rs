//! Builds the test host as a static program of musl that aborts when it panics, as runwasi's shims are: Debian's compiler, the standard
//! library from its source, the system's musl.

use std::fs;
use std::path::Path;

use anyhow::{Context as _, Result, bail};

use crate::setup;
use crate::step::shown;
use crate::summary::Outcome;
use crate::workspace::Workspace;

const TARGET: &str = "x86_64-unknown-linux-musl";
/// The compiler of Debian's package `rustc-web`, whose standard library `rust-web-src` has.
const COMPILER: &str = "/usr/bin/rustc";
const LINKER: &str = "musl-gcc";
/// `musl-gcc` knows programs with an interpreter and those at a fixed address; this is a static one that relocates itself.
const STATIC_PIE: &str = "link-args=-nostartfiles -Wl,--no-dynamic-linker,-Bstatic,-ztext \
    /usr/lib/x86_64-linux-musl/rcrt1.o /usr/lib/x86_64-linux-musl/crti.o /usr/lib/x86_64-linux-musl/crtn.o -lc";
/// What must be there, and the package that has it.
const NEEDED: [(&str, &str); 4] = [
    (COMPILER, "rustc-web"),
    ("/usr/lib/rustlib/src/rust/library/std", "rust-web-src"),
    ("/usr/bin/musl-gcc", "musl-tools"),
    // `tests/hosts/musl/libunwind.a` says so.
    ("/usr/lib/llvm-19/lib/libunwind.a", "libunwind-19-dev"),
];

/// Leaves `workload-musl` beside the other test hosts.
pub(crate) fn build_host(workspace: &Workspace) -> Result<Outcome> {
    let missing: Vec<_> = NEEDED.iter().filter(|(file, _)| !Path::new(file).exists()).collect();
    if !missing.is_empty() {
        let packages: Vec<_> = missing.iter().map(|(_, package)| *package).collect();
        if let Err(error) = setup::install_packages(&packages) {
            return Ok(Outcome::LeftOut(format!("{}: {error:#}", packages.join(", "))));
        }
    }
    // A directory of its own: with another compiler, everything that builds for this machine would be built anew each time.
    let target = workspace.target.join("musl");
    let mut unwinder = std::ffi::OsString::from("native=");
    unwinder.push(workspace.root.join("tests/hosts/musl"));
    let mut command = workspace.cargo([
        "rustc",
        "--locked",
        "--release",
        "--package",
        "wasmscope-test-hosts",
        "--bin",
        "workload",
        "--target",
        TARGET,
        "-Z",
        "build-std=std,panic_abort",
        "--",
        "-C",
        "link-self-contained=no",
        "-C",
        STATIC_PIE,
        "-L",
    ]);
    command
        .arg(unwinder)
        .env("CARGO_TARGET_DIR", &target)
        .env("CARGO_TARGET_X86_64_UNKNOWN_LINUX_MUSL_LINKER", LINKER)
        .env("CARGO_PROFILE_RELEASE_PANIC", "abort")
        // Lines are not needed and take time.
        .env("CARGO_PROFILE_RELEASE_DEBUG", "0")
        .env("RUSTC", COMPILER)
        // Building the standard library is not a stable feature.
        .env("RUSTC_BOOTSTRAP", "1");
    let shown = shown(&command);
    println!("$ {shown}");
    let status = command.status().with_context(|| format!("while starting `{shown}`"))?;
    if !status.success() {
        bail!("`{shown}` failed ({status})");
    }
    let built = target.join(TARGET).join("release/workload");
    fs::copy(&built, workspace.release_binary("workload-musl"))
        .with_context(|| format!("while copying {}", built.display()))?;
    Ok(Outcome::Ok)
}
