//! Debian packages: whether they are to be had, and installing them without taking anything away.

use std::process::Command;

use anyhow::{Result, bail};

use crate::step::{Step, run_noting};
use crate::toolchain::on_path;

/// The version of `package` that apt would install, after refreshing its lists when it does not know the package.
pub(crate) fn candidate(package: &str) -> Result<String> {
    if on_path("apt-get").is_empty() {
        bail!("no apt-get here");
    }
    if let Some(version) = known_candidate(package)? {
        return Ok(version);
    }
    if let Some(mut update) = as_root(&["apt-get", "update", "--quiet"]) {
        // A broken third-party list fails the whole update and yet leaves the others refreshed.
        if let Err(error) = Step::run("refreshing apt's lists (apt-get update)", &mut update) {
            eprintln!("  {}", error.to_string().lines().last().unwrap_or_default().trim());
        }
        if let Some(version) = known_candidate(package)? {
            return Ok(version);
        }
    }
    bail!("apt knows no package `{package}`")
}

/// Installs `packages`; an error when that would remove others.
pub(crate) fn install(packages: &[&str]) -> Result<()> {
    let list = packages.join(" ");
    let mut words = vec![
        "apt-get",
        "install",
        "--yes",
        "--quiet",
        "--no-install-recommends",
        "--no-remove",
        "-o",
        "DPkg::Lock::Timeout=300",
    ];
    words.extend(packages);
    let Some(mut command) = as_root(&words) else {
        bail!("installing needs root: sudo apt-get install {list}");
    };
    Step::run(format!("installing {list} (apt-get)"), &mut command).map(drop)
}

/// Whether this process may install packages.
pub(crate) fn may_install() -> bool {
    as_root(&["true"]).is_some()
}

/// A command that runs `words` as root without asking for a password; nothing where there is no such way.
fn as_root(words: &[&str]) -> Option<Command> {
    let mut command = if rustix::process::geteuid().is_root() {
        Command::new("env")
    } else {
        let sudo = on_path("sudo").into_iter().next()?;
        let allowed = Command::new(&sudo)
            .args(["-n", "true"])
            .output()
            .is_ok_and(|output| output.status.success());
        if !allowed {
            return None;
        }
        let mut command = Command::new(sudo);
        command.args(["-n", "env"]);
        command
    };
    command.arg("DEBIAN_FRONTEND=noninteractive").args(words);
    Some(command)
}

fn known_candidate(package: &str) -> Result<Option<String>> {
    let policy = run_noting(
        Command::new("apt-cache").args(["policy", package]).env("LC_ALL", "C"),
        |_| (),
    )?;
    Ok(parse_candidate(&policy))
}

fn parse_candidate(policy: &str) -> Option<String> {
    let version = policy
        .lines()
        .find_map(|line| line.trim().strip_prefix("Candidate:"))?
        .trim();
    (version != "(none)").then(|| version.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_candidate_is_read_from_the_policy() {
        let policy = "rustc-web:\n  Installed: (none)\n  Candidate: 1.96.0+dfsg1-1~deb12u2\n  Version table:\n";
        assert_eq!(parse_candidate(policy).as_deref(), Some("1.96.0+dfsg1-1~deb12u2"));
    }

    #[test]
    fn a_package_without_a_candidate_is_not_to_be_had() {
        assert_eq!(parse_candidate("x:\n  Installed: (none)\n  Candidate: (none)\n"), None);
        assert_eq!(parse_candidate(""), None);
    }
}
