//! `cwasm`: `calls` from code compiled ahead of time, mapped from a file.

use anyhow::{Context as _, Result};
use wasmtime::{Engine, Module};

use super::{Guests, Scenario, calls};

pub(super) const SCENARIO: Scenario = Scenario {
    name: "cwasm",
    about: "`calls`, with the guest mapped from a file compiled ahead of time",
    guests: |engine| mapped(engine, calls::GUEST),
    ..calls::SCENARIO
};

/// A guest that is compiled into a file, which is then mapped.
#[expect(
    unsafe_code,
    reason = "wasmtime cannot check that a file is its own output; this one is"
)]
pub(super) fn mapped(engine: &Engine, guest: &str) -> Result<Guests> {
    let compiled = engine.precompile_module(guest.as_bytes())?;
    let file = tempfile::Builder::new().prefix("guest-").suffix(".cwasm").tempfile();
    let path = file.context("cannot make a temporary file")?.into_temp_path();
    std::fs::write(&path, compiled).context("cannot write the compiled guest")?;
    // SAFETY: the file was made by this engine a moment ago, is readable by this user only, and stays as it is while
    // the module lives.
    let module = unsafe { Module::deserialize_file(engine, &path)? };
    Ok(Guests {
        modules: vec![module],
        file: Some(path),
    })
}
