//! Host binaries on disk, looked at once each: which file a process runs, and the plan for it.

use std::{
    collections::HashMap,
    fs::File,
    io,
    os::{fd::AsRawFd as _, unix::fs::MetadataExt as _},
    path::{Path, PathBuf},
    sync::Arc,
};

use rustix::fs::{Mode, OFlags};

use super::maps::ExecutableMapping;
use crate::{
    image::{
        HostImage,
        host::{HostError, looks_like_wasmtime},
    },
    runtime::{self, ProbePlan},
};

/// Host images remembered.
const MAX_HOSTS: usize = 4096;

/// A file by identity rather than path: containers see one file under many paths. The modification time tells a file that
/// was replaced in place.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct FileId {
    device: u64,
    inode: u64,
    modified_ns: i128,
    size: u64,
}

/// A host binary with a runtime in it.
#[derive(Debug)]
pub struct Host {
    /// Which file.
    pub file_id: FileId,
    /// The file that was examined. It stays open, so that probes go where the examination says, whatever its path leads
    /// to by then.
    file: File,
    /// What to probe.
    pub plan: ProbePlan,
    /// Tells it apart from other files in the cookies of its sites; never 0.
    pub number: u32,
}

impl Host {
    /// A path to the file that was examined, good while this lives.
    pub fn path(&self) -> PathBuf {
        PathBuf::from(format!("/proc/self/fd/{}", self.file.as_raw_fd()))
    }
}

/// Remembers what files are.
#[derive(Debug, Default)]
pub struct Hosts {
    known: HashMap<FileId, Option<Arc<Host>>>,
    numbers: u32,
}

/// Numbers that cookies have room for.
const MAX_NUMBER: u32 = 0xff_ffff;

impl Hosts {
    /// The files with a runtime in them that a process runs: its executable and its libraries, each once.
    pub fn of_process(&mut self, pid: u32, mappings: &[ExecutableMapping]) -> Vec<Arc<Host>> {
        let executable = PathBuf::from(format!("/proc/{pid}/exe"));
        let libraries = mappings
            .iter()
            .filter(|mapping| mapping.file.is_some())
            .filter(|mapping| mapping.path.as_deref().is_some_and(may_be_library))
            .map(|mapping| {
                let range = &mapping.range;
                // Opens the very file that is mapped, whatever its path leads to by now.
                PathBuf::from(format!("/proc/{pid}/map_files/{:x}-{:x}", range.start, range.end))
            });
        let mut hosts: Vec<Arc<Host>> = Vec::new();
        for path in std::iter::once(executable).chain(libraries) {
            if let Ok(Some(host)) = self.look_up(&path)
                && hosts.iter().all(|known| known.file_id != host.file_id)
            {
                hosts.push(host);
            }
        }
        hosts
    }

    /// What the file at `path` is.
    pub fn look_up(&mut self, path: &Path) -> io::Result<Option<Arc<Host>>> {
        // Without O_NONBLOCK, opening a FIFO would wait for its writer.
        let file = File::from(rustix::fs::open(
            path,
            OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC | OFlags::NOCTTY,
            Mode::empty(),
        )?);
        let metadata = file.metadata()?;
        if !metadata.is_file() {
            return Ok(None);
        }
        let file_id = FileId {
            device: metadata.dev(),
            inode: metadata.ino(),
            modified_ns: i128::from(metadata.mtime()) * 1_000_000_000 + i128::from(metadata.mtime_nsec()),
            size: metadata.size(),
        };
        if let Some(known) = self.known.get(&file_id) {
            return Ok(known.clone());
        }
        // What cannot be read now may be later, so it is not remembered.
        let number = self.numbers % MAX_NUMBER + 1;
        let host = examine(file, file_id, number)?;
        self.numbers = number;
        if self.known.len() >= MAX_HOSTS {
            self.known.clear();
        }
        self.known.insert(file_id, host.clone());
        Ok(host)
    }
}

fn examine(file: File, file_id: FileId, number: u32) -> io::Result<Option<Arc<Host>>> {
    // Most files are something else, which is cheaper to see than to rule out by their symbols.
    if readable(looks_like_wasmtime(&file))?.flatten().is_none() {
        return Ok(None);
    }
    let Some(image) = readable(HostImage::read(&file))? else {
        return Ok(None);
    };
    let plan = runtime::plan(&image, &file);
    Ok(plan.map(|plan| {
        Arc::new(Host {
            file_id,
            file,
            plan,
            number,
        })
    }))
}

/// `None` for what is malformed, and will be the next time; an error for what may be readable then.
fn readable<T>(result: Result<T, HostError>) -> io::Result<Option<T>> {
    match result {
        Ok(value) => Ok(Some(value)),
        Err(HostError::Io(error)) if error.kind() != io::ErrorKind::UnexpectedEof => Err(error),
        Err(_) => Ok(None),
    }
}

/// Libraries that are looked into: by name, as a process maps dozens.
fn may_be_library(path: &str) -> bool {
    let name = path.rsplit('/').next().unwrap_or_default();
    name.contains(".so") && ["wasm", "extism", "spin"].iter().any(|word| name.contains(word))
}
