//! `cargo xtask fixtures`: records the demo anew, for the replay that machines without the right to trace are shown.

use std::fs;

use anyhow::{Context as _, Result, bail};

use crate::agent_cli::Agent;
use crate::demo::{self, FIXTURE, Files};
use crate::setup;
use crate::test::cannot_trace;
use crate::workspace::Workspace;

/// The largest recording worth carrying in the repository.
const MAX_FIXTURE_BYTES: u64 = 512 * 1024;

/// Record the demo anew into tests/fixtures (needs the right to trace).
#[derive(Debug, clap::Args)]
pub(crate) struct Options {}

/// Runs the demo and keeps its recording if every count was equal.
pub(crate) fn run(workspace: &Workspace, _: &Options) -> Result<()> {
    setup::ensure_ebpf(workspace)?;
    demo::build(workspace, &["wasmscope", "wasmscope-test-hosts"], None)?;
    if let Some(reason) = cannot_trace(&Agent(workspace.release_binary("wasmscope")))? {
        bail!("{reason}");
    }
    let files = Files::new(&workspace.target.join("demo"))?;
    if !demo::live(workspace, &files)? {
        bail!("the counts differ: {FIXTURE} is left as it was");
    }
    let size_bytes = fs::metadata(&files.recording)
        .context("while measuring the recording")?
        .len();
    if size_bytes > MAX_FIXTURE_BYTES {
        bail!("the recording has {size_bytes} bytes, more than {MAX_FIXTURE_BYTES}: {FIXTURE} is left as it was");
    }
    let fixture = workspace.root.join(FIXTURE);
    let staged = fixture.with_extension("new");
    if let Some(directory) = fixture.parent() {
        fs::create_dir_all(directory).with_context(|| format!("while creating {}", directory.display()))?;
    }
    fs::copy(&files.recording, &staged).with_context(|| format!("while writing {}", staged.display()))?;
    fs::rename(&staged, &fixture).with_context(|| format!("while replacing {FIXTURE}"))?;
    println!("\nwrote {FIXTURE} ({size_bytes} bytes)");
    Ok(())
}
