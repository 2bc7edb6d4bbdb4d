//! Proof that a compiler and a linker go together: they build a small eBPF program, and what comes out is one.

use std::fs;
use std::path::Path;

use anyhow::{Context as _, Result, ensure};

use super::linker::staging;
use crate::step::{Step, run_noting};
use crate::toolchain::{BPF_TARGET, CoreLibrary, Toolchain};

const MANIFEST: &str = r#"
[package]
name = "proof"
version = "0.0.0"
edition = "2024"

[workspace]

[[bin]]
name = "proof"
path = "proof.rs"

[profile.release]
debug = 2
lto = true
panic = "abort"
"#;

const PROGRAM: &str = r#"
#![no_std]
#![no_main]

#[unsafe(no_mangle)]
#[unsafe(link_section = "raw_tracepoint/sys_enter")]
pub extern "C" fn proof(context: *mut core::ffi::c_void) -> i32 {
    i32::from(context.is_null())
}

#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}
"#;

/// `e_machine` of a BPF object.
const EM_BPF: [u8; 2] = 247_u16.to_le_bytes();

/// Builds the program with `toolchain` in a directory of its own below `tools`.
pub(crate) fn prove(toolchain: &Toolchain, tools: &Path) -> Result<()> {
    let directory = staging(tools)?;
    let write = |name: &str, text: &str| {
        let path = directory.path().join(name);
        fs::write(&path, text).with_context(|| format!("while writing {}", path.display()))
    };
    write("Cargo.toml", MANIFEST)?;
    write("proof.rs", PROGRAM)?;
    let target = directory.path().join("target");
    let mut command = toolchain.cargo("build", directory.path(), &target);
    command.arg("--release");
    let wait = match toolchain.compiler.core {
        CoreLibrary::Prebuilt => "",
        CoreLibrary::Source => ", with `core` from source",
    };
    let step = Step::start(format!(
        "trying {} with {}{wait}",
        toolchain.compiler.rustc.display(),
        toolchain.linker.display()
    ));
    let result = run_noting(&mut command, |line| step.note(line)).and_then(|_| {
        let object = fs::read(target.join(BPF_TARGET).join("release/proof")).context("while reading the object")?;
        verify(&object)
    });
    step.done(if result.is_ok() { "builds eBPF" } else { "does not work" });
    result
}

fn verify(object: &[u8]) -> Result<()> {
    ensure!(object.starts_with(b"\x7fELF"), "the object is not an ELF file");
    ensure!(object.get(18..20) == Some(&EM_BPF), "the object is not for BPF");
    let has = |name: &[u8]| object.windows(name.len()).any(|window| window == name);
    ensure!(has(b"raw_tracepoint/sys_enter"), "the object lacks the program");
    ensure!(has(b".BTF\0"), "the object has no BTF");
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_object_for_another_machine_is_no_proof() {
        let mut object = b"\x7fELF".to_vec();
        object.resize(18, 0);
        object.extend(62_u16.to_le_bytes());
        assert!(verify(&object).unwrap_err().to_string().contains("not for BPF"));
    }

    #[test]
    fn an_object_without_btf_is_no_proof() {
        let mut object = b"\x7fELF".to_vec();
        object.resize(18, 0);
        object.extend(EM_BPF);
        object.extend(b"raw_tracepoint/sys_enter\0");
        assert!(verify(&object).unwrap_err().to_string().contains("no BTF"));
    }
}
