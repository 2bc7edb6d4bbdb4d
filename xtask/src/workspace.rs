//! Where things lie: the root of the repository and cargo's target directory.

use std::env;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result};

use crate::toolchain;

/// The checkout that this xtask belongs to.
#[derive(Debug)]
pub(crate) struct Workspace {
    pub(crate) root: PathBuf,
    /// Where cargo builds into, `target` or `$CARGO_TARGET_DIR`.
    pub(crate) target: PathBuf,
}

impl Workspace {
    /// From the manifest this was built from and the place of the running executable.
    pub(crate) fn find() -> Result<Self> {
        let manifest =
            env::var_os("CARGO_MANIFEST_DIR").map_or_else(|| env!("CARGO_MANIFEST_DIR").into(), PathBuf::from);
        let root = manifest.parent().context("xtask has no parent directory")?.to_owned();
        let executable = env::current_exe().context("while looking for the target directory")?;
        let target = toolchain::target_directory_of(&executable).unwrap_or_else(|| root.join("target"));
        Ok(Self { root, target })
    }

    /// A cargo command at the root, building into the same target directory.
    pub(crate) fn cargo<'a>(&self, arguments: impl IntoIterator<Item = &'a str>) -> Command {
        let mut command = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
        command
            .current_dir(&self.root)
            .env("CARGO_TARGET_DIR", &self.target)
            .args(arguments);
        command
    }

    /// An executable built with the `dev` profile.
    pub(crate) fn debug_binary(&self, name: &str) -> PathBuf {
        self.target.join("debug").join(name)
    }

    /// An executable built with the `release` profile.
    pub(crate) fn release_binary(&self, name: &str) -> PathBuf {
        self.target.join("release").join(name)
    }

    /// Where the tools that set-up installs go.
    pub(crate) fn tools(&self) -> PathBuf {
        self.target.join(toolchain::TOOLS_DIRECTORY)
    }

    /// Directories in which set-up may have left tools, this one's first.
    pub(crate) fn target_directories(&self) -> Vec<PathBuf> {
        let default = self.root.join("target");
        if default == self.target {
            vec![default]
        } else {
            vec![self.target.clone(), default]
        }
    }

    /// `path` as people would type it from the root.
    pub(crate) fn shown<'a>(&self, path: &'a Path) -> std::path::Display<'a> {
        path.strip_prefix(&self.root).unwrap_or(path).display()
    }
}
