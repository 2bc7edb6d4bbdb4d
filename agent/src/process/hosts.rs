//! Host binaries on disk, looked at once each: which file a process runs, and the plan for it.

use std::{
    collections::{HashMap, VecDeque},
    fs::File,
    io,
    os::{fd::AsRawFd as _, unix::fs::MetadataExt as _},
    path::{Path, PathBuf},
    sync::Arc,
};

use rustix::fs::{Mode, OFlags};

use super::{looks::LibraryLook, maps::ExecutableMapping, memory::ProcessMemory, patience::Patience};
use crate::{
    image::{
        HostImage, ReadAt as _,
        host::{HostError, HostFunction, looks_like_wasmtime},
        unwind_table::UnwindTable,
    },
    runtime::{self, PlannedSite, ProbePlan},
};

/// Files remembered.
const MAX_FILES: usize = 4096;
/// Files with a runtime in them at a time: each stays open, with its sites attached. Later ones are treated as having none.
const MAX_HOSTS: u32 = 512;
const _: () = assert!(MAX_HOSTS <= wasmscope_common::MAX_FILE_NUMBER);

/// A file by identity rather than path: containers see one file under many paths. The modification time tells a file that
/// was replaced in place.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
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
    /// Where its functions are, if some are to be learnt.
    functions: Option<UnwindTable>,
    /// Tells it apart from other files in the cookies of its sites; never 0.
    pub number: u32,
}

/// Bytes of a function compared to tell whether it is the one in the file.
const COMPARED_BYTES: u64 = 64;
/// What a debugger or another tracer puts in the place of an instruction.
const BREAKPOINT_INSTRUCTION: u8 = 0xcc;

impl Host {
    /// A path to the file that was examined, good while this lives.
    pub fn path(&self) -> PathBuf {
        PathBuf::from(format!("/proc/self/fd/{}", self.file.as_raw_fd()))
    }

    /// The function that starts at an address of a process, if it is one of this file. `mappings` are the process's; an
    /// error says that it cannot be looked at, as when it is gone.
    pub fn function_in(
        &self,
        address: u64,
        mappings: &[ExecutableMapping],
        memory: &ProcessMemory,
        path: &'static str,
    ) -> io::Result<Option<HostFunction>> {
        let mapping = mappings
            .iter()
            .find(|mapping| mapping.range.contains(&address))
            .ok_or(io::ErrorKind::NotFound)?;
        let file_offset = mapping.file_offset.checked_add(address - mapping.range.start);
        let function = file_offset
            .filter(|_| mapping.file.is_some())
            .and_then(|file_offset| self.function_from(file_offset, path));
        let Some(function) = function else { return Ok(None) };
        // A mapping of another file can have a function at the same place, but not the same one.
        let here = self.first_bytes(&function);
        let mut there = vec![0; here.len()];
        let length = memory.read(address, &mut there)?;
        if length == 0 {
            return Err(io::ErrorKind::NotFound.into());
        }
        let is_same = length == here.len()
            && here
                .iter()
                .zip(&there)
                .all(|(here, there)| here == there || *there == BREAKPOINT_INSTRUCTION);
        Ok(is_same.then_some(function))
    }

    /// The function of this file that starts at an offset.
    pub fn function_from(&self, file_offset: u64, path: &'static str) -> Option<HostFunction> {
        let found = self.functions.as_ref()?.function_from(&self.file, file_offset)?;
        Some(HostFunction {
            address: found.address,
            size: found.size,
            file_offset: found.file_offset,
            path,
        })
    }

    /// How a function begins.
    pub fn first_bytes(&self, function: &HostFunction) -> Vec<u8> {
        let mut bytes = vec![0; function.size.min(COMPARED_BYTES) as usize];
        let length = self.file.read_at(function.file_offset, &mut bytes).unwrap_or(0);
        bytes.truncate(length);
        bytes
    }

    /// Plans probes on functions that have been learnt, beside those that are `known`.
    pub fn plan_learnt(&self, known: Vec<PlannedSite>, functions: &[HostFunction]) -> Option<ProbePlan> {
        let all = self.functions.as_ref()?.functions(&self.file);
        runtime::learnt(self.plan.runtime_name, known, functions, &all, &self.file)
    }
}

/// A host that a process runs.
#[derive(Debug)]
pub struct Found {
    /// It.
    pub host: Arc<Host>,
    /// Where in the process's memory the loader puts the number of the host's thread-local block, if it does.
    pub tls_number_at: Option<u64>,
}

impl Found {
    fn executable(host: Arc<Host>) -> Self {
        Self {
            host,
            tls_number_at: None,
        }
    }

    fn mapped(host: Arc<Host>, mapping: &ExecutableMapping) -> Self {
        let first_byte = mapping.range.start.wrapping_sub(mapping.file_offset);
        Self {
            tls_number_at: host.plan.tls_number.map(|offset| first_byte.wrapping_add(offset)),
            host,
        }
    }
}

/// Remembers what files are.
#[derive(Debug, Default)]
pub struct Hosts {
    known: HashMap<FileId, Option<Arc<Host>>>,
    patience: Patience,
    host_count: u32,
    /// Numbers that may be given again, the one that has been free longest first: records that bear it are long handled.
    free_numbers: VecDeque<u32>,
}

impl Hosts {
    /// The files with a runtime in them that a process runs: its executable and those of its libraries that `look` takes, each
    /// once.
    pub fn of_process(&mut self, pid: u32, mappings: &[ExecutableMapping], look: &mut LibraryLook<'_>) -> Vec<Found> {
        let mut hosts: Vec<Found> = Vec::new();
        if look.is_stalled() {
            return hosts;
        }
        match self.look_up(Path::new(&format!("/proc/{pid}/exe"))) {
            Ok(Some(host)) => hosts.push(Found::executable(host)),
            Err(error) if error.kind() == io::ErrorKind::TimedOut => look.stall(),
            _ => {}
        }
        for mapping in mappings {
            if look.is_stalled() {
                break;
            }
            let Some(file) = &mapping.file else { continue };
            if !mapping.path.as_deref().is_some_and(may_be_library) || !look.takes(file) {
                continue;
            }
            let range = &mapping.range;
            // Opens the very file that is mapped, whatever its path leads to by now.
            let path = PathBuf::from(format!("/proc/{pid}/map_files/{:x}-{:x}", range.start, range.end));
            let found = match self.look_up(&path) {
                Ok(found) => found,
                Err(error) => {
                    if error.kind() == io::ErrorKind::TimedOut {
                        look.stall();
                    }
                    continue;
                }
            };
            look.was_looked_at(file);
            if let Some(host) = found
                && hosts.iter().all(|known| known.host.file_id != host.file_id)
            {
                hosts.push(Found::mapped(host, mapping));
            }
        }
        hosts
    }

    /// What the file at `path` is. [`io::ErrorKind::TimedOut`] if it does not answer.
    pub fn look_up(&mut self, path: &Path) -> io::Result<Option<Arc<Host>>> {
        let path = path.to_owned();
        let opened = self.patience.wait_for(move || open(&path));
        let Some((file, file_id)) = opened.unwrap_or(Err(io::ErrorKind::TimedOut.into()))? else {
            return Ok(None);
        };
        if let Some(known) = self.known.get(&file_id) {
            return Ok(known.clone());
        }
        // What cannot be read now may be later, so it is not remembered.
        let is_new = self.host_count < MAX_HOSTS;
        let number = if is_new {
            Some(self.host_count + 1)
        } else {
            self.free_numbers.front().copied()
        };
        let number_or_none = number.unwrap_or(0);
        let examined = self.patience.wait_for(move || examine(file, file_id, number_or_none));
        let host = examined.unwrap_or(Err(io::ErrorKind::TimedOut.into()))?;
        if host.is_some() {
            if number.is_none() {
                return Ok(None);
            }
            if is_new {
                self.host_count += 1;
            } else {
                self.free_numbers.pop_front();
            }
        }
        if self.known.len() >= MAX_FILES {
            // Hosts stay: their sites bear their numbers.
            self.known.retain(|_, host| host.is_some());
        }
        self.known.insert(file_id, host.clone());
        Ok(host)
    }

    /// Files with a runtime in them that are known.
    pub fn count(&self) -> usize {
        self.known.values().flatten().count()
    }

    /// No process runs the file any more, and its sites are detached.
    pub fn forget(&mut self, file_id: FileId) {
        if let Some(host) = self.known.remove(&file_id).flatten() {
            self.free_numbers.push_back(host.number);
        }
    }
}

/// `None` for what is no file.
fn open(path: &Path) -> io::Result<Option<(File, FileId)>> {
    // Without O_NONBLOCK, opening a FIFO would wait for its writer.
    let file = File::from(rustix::fs::open(
        path,
        OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC | OFlags::NOCTTY,
        Mode::empty(),
    )?);
    let metadata = file.metadata()?;
    let file_id = FileId {
        device: metadata.dev(),
        inode: metadata.ino(),
        modified_ns: i128::from(metadata.mtime()) * 1_000_000_000 + i128::from(metadata.mtime_nsec()),
        size: metadata.size(),
    };
    Ok(metadata.is_file().then_some((file, file_id)))
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
        let functions = plan
            .learns_host_functions
            .then(|| UnwindTable::read(&file, &image).ok())
            .flatten();
        Arc::new(Host {
            file_id,
            file,
            plan,
            functions,
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
