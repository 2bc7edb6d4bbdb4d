//! `cargo xtask docs`: writes the pages that are made of the code, and the manifests and goldens that are made of the chart.

use anyhow::{Context as _, Result, ensure};

use crate::setup;
use crate::workspace::Workspace;

/// Write docs/configuration.md, docs/metrics.md, deploy/manifests and the goldens of the chart anew; the tests that compare them do it.
#[derive(Debug, clap::Args)]
pub(crate) struct Options {}

/// Runs the tests that compare, told to write.
pub(crate) fn run(workspace: &Workspace, _options: &Options) -> Result<()> {
    setup::ensure_ebpf(workspace)?;
    for reason in setup::ensure_tools(workspace, &["py-wasmtime"])? {
        eprintln!("missing: {reason}");
    }
    let words = [
        "test",
        "--locked",
        "--package",
        "wasmscope-tests",
        "--test",
        "docs",
        "--test",
        "deploy",
    ];
    let status = workspace
        .cargo(words)
        .env("WASMSCOPE_UPDATE", "1")
        .env("WASMSCOPE_TEST_PYTHON", setup::python(workspace))
        .status()
        .context("while starting cargo")?;
    ensure!(status.success(), "not everything could be written");
    Ok(())
}
