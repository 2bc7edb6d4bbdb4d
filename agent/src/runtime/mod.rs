//! Where a runtime plugs in: an adapter looks at a host image and says which sites to probe. Adding a runtime is one file
//! here and one line in [`ADAPTERS`].
//!
//! Plans are data: the code that loads and attaches never learns a runtime's name.

mod tokio;
pub mod wasmtime;

use wasmscope_common::{
    ArgumentLocation, RuntimeCopy, SiteCookie, SiteKind, TLS_DYNAMIC, TLS_SEARCH, TLS_STATIC, TLS_UNKNOWN,
};

use crate::{
    bpf::SiteProgram,
    event::Coverage,
    image::{Functions, HostImage, ReadAt, host::HostFunction},
};

/// Every runtime that is known, in order of priority.
pub static ADAPTERS: &[&dyn RuntimeAdapter] = &[&wasmtime::Wasmtime];

/// Recognises a runtime in a host image and plans its probes.
pub trait RuntimeAdapter: Send + Sync {
    /// Value of `wasm.runtime.name`.
    fn name(&self) -> &'static str;

    /// `Ok(None)`: not mine. A plan without sites is fine: syscalls are attributed without any.
    fn plan(&self, image: &HostImage, file: &dyn ReadAt) -> Option<ProbePlan>;

    /// Plans the begins and ends of host functions that were learnt from a process, as far as they can be probed. `known`
    /// are the sites of those that were learnt before, and not in the plan.
    fn learnt(
        &self,
        known: Vec<PlannedSite>,
        functions: &[HostFunction],
        all: &dyn Functions,
        file: &dyn ReadAt,
    ) -> ProbePlan;
}

/// What to probe in one host image, and how to find activations in processes that run it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ProbePlan {
    /// Value of `wasm.runtime.name`.
    pub runtime_name: &'static str,
    /// Where to attach what.
    pub sites: Vec<PlannedSite>,
    /// Where threads keep their activation.
    pub tls: TlsPlan,
    /// Where a process has the number of the library's thread-local block, as [`HostImage::from_first_byte`] counts.
    pub tls_number: Option<u64>,
    /// What will be observed if all sites are attached.
    pub coverage: Coverage,
    /// What will not be, in words for a person.
    pub limits: Vec<String>,
    /// The host functions are not known from the file, and are to be learnt from processes that run it.
    pub learns_host_functions: bool,
    /// The function that swaps activations was recognised by what it does, which remains to be seen.
    pub recognises_swap: bool,
    /// Bytes from the thread pointer to the number of the asynchronous task that a thread runs, negative.
    pub task_offset: Option<i32>,
    /// The file's build id.
    pub build_id: Option<String>,
    /// What kind of file has the runtime in it.
    pub embedding: Embedding,
    /// The file has no symbol table.
    pub is_stripped: bool,
}

/// What kind of file has a runtime in it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Embedding {
    /// Not recognised.
    #[default]
    Unknown,
    /// An executable that uses shared libraries.
    Executable,
    /// An executable that uses none.
    StaticExecutable,
    /// The C API is exported: `libwasmtime.so`, as most languages other than Rust use it.
    CApi,
    /// A shared library that does not export it: one that was made with the runtime's Rust crate.
    Library,
}

impl Embedding {
    fn of(image: &HostImage) -> Self {
        match (image.exports_c_api, image.is_executable, image.is_static) {
            (true, _, _) => Self::CApi,
            (false, false, _) => Self::Library,
            (false, true, false) => Self::Executable,
            (false, true, true) => Self::StaticExecutable,
        }
    }

    /// The word for it in labels and answers.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Unknown => "unknown",
            Self::Executable => "executable",
            Self::StaticExecutable => "static_executable",
            Self::CApi => "c_api",
            Self::Library => "library",
        }
    }
}

/// One site.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PlannedSite {
    /// Program to run there.
    pub program: SiteProgram,
    /// What the agent is told of it.
    pub kind: SiteKind,
    /// Bytes from the start of the file.
    pub file_offset: u64,
    /// Where the program's arguments are.
    pub arguments: [ArgumentLocation; 2],
    /// Bytes between the stack pointer there and that at the function's entry.
    pub frame_bytes: u32,
    /// It counts only if this x86 condition holds there; instead of a second argument.
    pub condition: Option<u8>,
    /// The kernel emulates the instruction, which makes a hit ten times cheaper than single-stepping it.
    pub emulated: bool,
    /// Path of the function it is in.
    pub function: &'static str,
}

impl PlannedSite {
    /// What the program is told of it.
    pub fn cookie(&self) -> SiteCookie {
        let [first, second] = self.arguments;
        let cookie = SiteCookie::new(self.kind, first, second).with_frame_bytes(self.frame_bytes);
        self.condition
            .map_or(cookie, |condition| cookie.with_condition(condition))
    }
}

/// Where threads keep their activation.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum TlsPlan {
    /// Not known; the programs may find it.
    #[default]
    Unknown,
    /// In the static block of the thread, where the programs find it.
    Search,
    /// At the thread pointer plus this many bytes.
    ThreadPointer(i64),
    /// This many bytes into the image's block, wherever a process has put that.
    Block(i64),
}

impl TlsPlan {
    /// Whether the slot is in the static block of each thread, wherever there.
    pub fn is_static(self) -> bool {
        matches!(self, Self::Search | Self::ThreadPointer(_))
    }

    /// Writes it into a process's config.
    pub fn apply(self, copy: &mut RuntimeCopy) {
        (copy.tls_kind, copy.tls_offset) = match self {
            Self::Unknown => (TLS_UNKNOWN, 0),
            Self::Search => (TLS_SEARCH, 0),
            Self::ThreadPointer(offset) => (TLS_STATIC, offset),
            Self::Block(offset) => (TLS_DYNAMIC, offset),
        };
    }
}

/// The plan of the first adapter that recognises the image.
pub fn plan(image: &HostImage, file: &dyn ReadAt) -> Option<ProbePlan> {
    ADAPTERS.iter().find_map(|adapter| adapter.plan(image, file))
}

/// The plan for host functions that were learnt, as in [`RuntimeAdapter::learnt`].
pub fn learnt(
    runtime_name: &str,
    known: Vec<PlannedSite>,
    functions: &[HostFunction],
    all: &dyn Functions,
    file: &dyn ReadAt,
) -> Option<ProbePlan> {
    let adapter = ADAPTERS.iter().find(|adapter| adapter.name() == runtime_name)?;
    Some(adapter.learnt(known, functions, all, file))
}
