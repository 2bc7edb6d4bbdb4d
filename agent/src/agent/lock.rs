//! One agent per node: a lock file that the kernel unlocks however the agent ends.
//!
//! The file has to be the node's: an agent in a container mounts the directory from the host. An abstract socket would be bound to the network
//! namespace, which a `DaemonSet` without `hostNetwork` does not share.

use std::fs::{File, OpenOptions};
use std::io::{self, Read as _, Seek as _, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, OFlags, flock};
use thiserror::Error;

/// Held while the agent runs.
#[derive(Debug)]
pub struct InstanceLock {
    _file: File,
}

/// Why there is no lock.
#[derive(Debug, Error)]
pub enum LockError {
    /// Another agent has it.
    #[error("another agent runs on this node: pid {pid} holds {path}")]
    Held {
        /// What it wrote: its process id, as in its own pid namespace.
        pid: String,
        /// The file.
        path: PathBuf,
    },
    /// The file cannot be made or locked.
    #[error("cannot lock {path}: {source}; set instance.lock_file to where this user may write")]
    Cannot {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

impl InstanceLock {
    /// Takes it, at once or not at all.
    pub fn take(path: &Path) -> Result<Self, LockError> {
        let cannot = |source| LockError::Cannot {
            path: path.to_owned(),
            source,
        };
        if let Some(directory) = path.parent() {
            std::fs::create_dir_all(directory).map_err(cannot)?;
        }
        let mut file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            // Whoever can open it can hold the lock.
            .mode(0o600)
            .custom_flags(OFlags::NOFOLLOW.bits().cast_signed())
            .open(path)
            .map_err(cannot)?;
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(rustix::io::Errno::WOULDBLOCK) => {
                let mut text = String::new();
                // Without it, the message still says which file.
                let _ = file.take(32).read_to_string(&mut text);
                let pid: String = text.chars().take_while(char::is_ascii_digit).collect();
                return Err(LockError::Held {
                    pid: if pid.is_empty() { "unknown".to_owned() } else { pid },
                    path: path.to_owned(),
                });
            }
            Err(error) => return Err(cannot(error.into())),
        }
        let write = |file: &mut File| {
            file.set_len(0)?;
            file.rewind()?;
            writeln!(file, "{}", std::process::id())
        };
        write(&mut file).map_err(cannot)?;
        Ok(Self { _file: file })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_second_one_is_told_who_has_it_and_the_next_one_gets_it() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("run/agent.lock");
        let first = InstanceLock::take(&path).unwrap();
        let error = InstanceLock::take(&path).unwrap_err().to_string();
        assert!(error.contains(&format!("pid {}", std::process::id())), "{error}");
        drop(first);
        InstanceLock::take(&path).unwrap();
    }

    #[test]
    fn a_link_is_not_followed() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("agent.lock");
        std::os::unix::fs::symlink(directory.path().join("elsewhere"), &path).unwrap();
        assert!(matches!(InstanceLock::take(&path), Err(LockError::Cannot { .. })));
    }
}
