//! Builds the eBPF programs in `ebpf/` and leaves the object at `$OUT_DIR/wasmscope.bpf.o` for the agent to embed.
//!
//! `WASMSCOPE_EBPF_OBJECT=FILE` names a ready object instead, for packagers who build it in a step of its own.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

#[allow(dead_code, reason = "shared with xtask, which uses more of it")]
#[path = "../xtask/src/toolchain.rs"]
mod toolchain;

use toolchain::{Search, Toolchain};

const READY_OBJECT: &str = "WASMSCOPE_EBPF_OBJECT";

fn main() -> ExitCode {
    match provide_object() {
        Ok(()) => ExitCode::SUCCESS,
        Err(message) => {
            eprintln!("\nerror: {message}\n");
            ExitCode::FAILURE
        }
    }
}

fn provide_object() -> Result<(), String> {
    let out_directory = PathBuf::from(variable("OUT_DIR")?);
    let workspace = Path::new(&variable("CARGO_MANIFEST_DIR")?)
        .parent()
        .ok_or("the agent has no parent directory")?
        .to_owned();
    let object = out_directory.join("wasmscope.bpf.o");

    println!("cargo::rerun-if-env-changed={READY_OBJECT}");
    println!("cargo::rerun-if-changed=build.rs");
    if let Some(ready) = env::var_os(READY_OBJECT) {
        let ready = PathBuf::from(ready);
        println!("cargo::rerun-if-changed={}", ready.display());
        return copy(&ready, &object).map_err(|error| format!("{READY_OBJECT}: {error}"));
    }
    if env::var_os("DOCS_RS").is_some() {
        // No BPF tools there, and documentation does not need the bytes.
        return fs::write(&object, []).map_err(|error| format!("{}: {error}", object.display()));
    }
    for input in [
        "ebpf/src",
        "ebpf/Cargo.toml",
        "ebpf/Cargo.lock",
        "agent-common/src",
        "agent-common/Cargo.toml",
        "xtask/src/toolchain.rs",
    ] {
        // Relative to the package: another clone that shares the target directory must not be answered with the object of
        // this one.
        println!("cargo::rerun-if-changed=../{input}");
    }

    let own_target_directory = toolchain::target_directory_of(&out_directory);
    let target_directories: Vec<_> = own_target_directory
        .iter()
        .cloned()
        .chain([workspace.join("target")])
        .collect();
    let toolchain = find_toolchain(&target_directories)?;
    println!("cargo::rerun-if-changed={}", toolchain.compiler.rustc.display());
    println!("cargo::rerun-if-changed={}", toolchain.linker.display());

    // One directory for every profile of the agent: the object is the same but for its messages.
    let ebpf_target_directory = own_target_directory.unwrap_or(out_directory).join("ebpf");
    let debug = variable("PROFILE")? == "debug";
    let mut cargo = toolchain.cargo("build", &workspace.join("ebpf"), &ebpf_target_directory);
    cargo.args(["--release", "--locked"]);
    if debug {
        cargo.args(["--features", "log"]);
    }
    let status = cargo
        .status()
        .map_err(|error| format!("{}: {error}", cargo.get_program().display()))?;
    if !status.success() {
        return Err(format!(
            "building the eBPF programs failed ({status})\n  with {}\n  and {}\n  \
             if the tools are at fault, `cargo xtask setup` checks and repairs them",
            toolchain.compiler,
            toolchain.linker.display()
        ));
    }
    copy(
        &ebpf_target_directory
            .join(toolchain::BPF_TARGET)
            .join("release/wasmscope-ebpf"),
        &object,
    )
}

/// The pair that `cargo xtask setup` proved, or else the first one that looks right.
fn find_toolchain(target_directories: &[PathBuf]) -> Result<Toolchain, String> {
    let pinned = target_directories
        .iter()
        .find_map(|directory| Toolchain::read_pinned(directory));
    if let Some(pinned) = pinned {
        return Ok(pinned);
    }
    let search = Search::run(target_directories);
    match (search.compilers.first(), search.linkers.first()) {
        (Some(compiler), Some(linker)) => Ok(Toolchain {
            compiler: compiler.clone(),
            linker: linker.clone(),
        }),
        _ => Err(explain(&search)),
    }
}

fn explain(search: &Search) -> String {
    let mut lines = vec!["the eBPF programs cannot be built:".to_owned()];
    if search.compilers.is_empty() {
        lines.push(format!(
            "  no Rust compiler with `core` for {} found",
            toolchain::BPF_TARGET
        ));
        lines.extend(search.rejected.iter().map(|reason| format!("    {reason}")));
    }
    if search.linkers.is_empty() {
        lines.push("  `bpf-linker` not found".to_owned());
    }
    lines.push("  run `cargo xtask setup` to install what is missing".to_owned());
    lines.join("\n")
}

fn variable(name: &str) -> Result<String, String> {
    env::var(name).map_err(|error| format!("{name}: {error}"))
}

fn copy(from: &Path, to: &Path) -> Result<(), String> {
    fs::copy(from, to)
        .map(drop)
        .map_err(|error| format!("{}: {error}", from.display()))
}
