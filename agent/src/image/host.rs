//! A host executable or shared library as a probe sees it: where it is mapped from, its thread-local storage, and the few of its
//! functions that mark crossings into and out of guests.

use object::{LittleEndian, elf, pod::slice_from_bytes};

pub use super::elf::ElfError as HostError;
use super::{
    ReadAt,
    elf::{E, Elf, ProgramHeader, Rela, SectionHeader, Sym as ElfSym, check_bound, read_section},
    hex, read_exact_at, string_at,
    symbol_path::rust_path,
};

/// Symbols looked at; wasmtime's own command has 83,000.
pub const MAX_HOST_SYMBOLS: u64 = 2_000_000;
/// Symbol names read; wasmtime's own command has 12 MB.
pub const MAX_HOST_NAMES_BYTES: u64 = 256 << 20;
/// Functions kept of one kind; a host has one to a few hundred.
pub const MAX_FUNCTIONS_OF_A_KIND: usize = 4096;
/// Names demangled; what the cheap filter lets through is a few thousand.
const MAX_DEMANGLED: u32 = 50_000;
/// Read-only data searched for wasmtime's messages in a host without symbols.
const MAX_SEARCHED_BYTES: u64 = 128 << 20;
const MAX_NOTES_BYTES: u64 = 64 << 10;
const MAX_DYNAMIC_BYTES: u64 = 1 << 20;
/// Symbols decoded at a time.
const SYMBOLS_PER_READ: u64 = 32 << 10;
/// Relocations looked at; the library of wasmtime 50 has 26,000.
const MAX_RELOCATIONS: u64 = 4 << 20;
/// Relocations decoded at a time.
const RELOCATIONS_PER_READ: u64 = 32 << 10;

/// A function of a host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostFunction {
    /// Virtual address in the file's own numbering.
    pub address: u64,
    /// Size, bytes; zero where the symbol does not say.
    pub size: u64,
    /// Where its first byte is in the file: the place for a uprobe.
    pub file_offset: u64,
    /// Path without generic arguments; many functions share one.
    pub path: &'static str,
}

/// The functions of a host that mark crossings, each kind by address and without duplicates.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct HostSymbols {
    /// Swaps the activation record: entry, exit, suspend, resume. Argument 0: the new record or zero.
    pub tls_replace: Vec<HostFunction>,
    /// Guest to host, core modules. Arguments: callee context, caller context, values, count.
    pub array_call_trampolines: Vec<HostFunction>,
    /// Guest to host, components. Argument 0: the component's context, argument 1: identity of the host function.
    pub cabi_entrypoints: Vec<HostFunction>,
    /// A trap or host error leaves a guest.
    pub from_runtime_box: Vec<HostFunction>,
    /// A switch of stacks, in either direction. Argument 0: top of the fiber's stack.
    pub fiber_switch: Vec<HostFunction>,
    /// `memory.grow`. Arguments: caller context, delta in pages, memory index.
    pub memory_grow: Vec<HostFunction>,
    /// `table.grow`.
    pub table_grow: Vec<HostFunction>,
    /// A host error or trap is raised in a guest's caller. Argument 0: caller context.
    pub raise: Vec<HostFunction>,
    /// Guest code compiled without signals reports a trap. Arguments: caller context, the trap's code.
    pub reported_trap: Vec<HostFunction>,
    /// The epoch deadline was reached.
    pub new_epoch: Vec<HostFunction>,
    /// Fuel ran out.
    pub out_of_gas: Vec<HostFunction>,
    /// A code object becomes executable.
    pub publish: Vec<HostFunction>,
    /// An instance is made.
    pub instance_new: Vec<HostFunction>,
    /// tokio hands a task to its pool of helper threads. Argument 1 or 2: the task.
    pub helper_spawn: Vec<HostFunction>,
    /// The loop in which a helper thread calls tasks.
    pub helper_run: Vec<HostFunction>,
    /// A task of tokio is done. Argument 0: its state, with which it begins.
    pub task_complete: Vec<HostFunction>,
    /// A thread becomes one that runs everybody's tasks.
    pub worker_run: Vec<HostFunction>,
    /// Sets the number of the task that a thread of tokio runs. Argument 0: the number.
    pub task_enter: Vec<HostFunction>,
    /// Thread-local context of tokio.
    pub task_context: Option<TlsSlot>,
    /// What else a module goes through before it is first called.
    pub loading: Loading,
    /// Thread-local pointer to the current activation record, bit 0 set once initialised.
    pub tls_slot: Option<TlsSlot>,
}

/// The functions that a module goes through before it is first called, [`HostSymbols::publish`] and
/// [`HostSymbols::instance_new`] aside. Where one calls another, both may be there: which of them were inlined depends on the
/// build. wasmtime 48: `src/compile/runtime.rs`, `src/engine.rs`, `src/runtime/module.rs`, `src/runtime/module/registry.rs`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Loading {
    /// Make a module or component from wasm.
    pub compile: Vec<HostFunction>,
    /// Make one from code that was kept.
    pub deserialize: Vec<HostFunction>,
    /// Map or copy that code.
    pub read: Vec<HostFunction>,
    /// Make it a code object.
    pub load: Vec<HostFunction>,
    /// Make a module or component of a code object.
    pub assemble: Vec<HostFunction>,
    /// Makes a core module of a code object.
    pub make_module: Vec<HostFunction>,
    /// Tells a store of a module. Arguments: the registry, 0 for a module or 1 for a component, its address.
    pub register: Vec<HostFunction>,
    /// Runs the start function of an instance.
    pub start: Vec<HostFunction>,
}

/// Where a thread-local variable is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TlsSlot {
    /// Offset in the file's thread-local block (`st_value`), bytes.
    pub block_offset: u64,
    /// How a thread finds the block.
    pub model: TlsModel,
}

/// How a thread finds the thread-local block of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TlsModel {
    /// An executable's block lies below the thread pointer: the variable is at `fs base + thread_pointer_offset` (negative).
    LocalExec {
        /// Bytes, x86-64.
        thread_pointer_offset: i64,
    },
    /// A library's block is found through the thread's vector: `*(*(fs base + 8) + 16 * module id) + block_offset`.
    Dynamic,
}

/// The thread-local segment of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TlsSegment {
    /// Virtual address of the initial image.
    pub address: u64,
    /// Size of a thread's block, bytes.
    pub memory_bytes: u64,
    /// Alignment, bytes, a power of two.
    pub align: u64,
}

/// A loaded segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LoadSegment {
    /// Virtual address.
    pub address: u64,
    /// Where it is in the file.
    pub file_offset: u64,
    /// Bytes that come from the file.
    pub file_bytes: u64,
    /// It is executable.
    pub is_executable: bool,
}

/// What shows that a file contains wasmtime, strongest first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Evidence {
    /// Symbols of the runtime itself.
    RuntimeSymbols,
    /// The exported functions of the C API.
    CApi,
    /// Only the runtime's messages: stripped, or a program that talks about wasmtime.
    Messages,
}

/// A host executable or shared library.
#[derive(Clone, Debug, PartialEq, Eq)]
#[expect(clippy::struct_excessive_bools, reason = "independent facts about one file")]
pub struct HostImage {
    /// The GNU build id, hexadecimal.
    pub build_id: Option<String>,
    /// Starts processes (position-independent or not), as opposed to a shared library.
    pub is_executable: bool,
    /// Thread-local storage.
    pub tls: Option<TlsSegment>,
    /// Loaded segments, as in the file.
    pub loads: Vec<LoadSegment>,
    /// There is a full symbol table; without one, only exported functions are known.
    pub has_symbol_table: bool,
    /// The functions that matter.
    pub symbols: HostSymbols,
    /// Address and size of every function that the symbol table has both of, by address.
    functions: Vec<(u64, u32)>,
    /// The C API is exported (`wasmtime_store_new`, `wasmtime_module_new`).
    pub exports_c_api: bool,
    /// No program interprets it: an executable without shared libraries, as a static one of musl.
    pub is_static: bool,
    /// Address of the word that the loader writes the number of the library's thread-local block into, if it has one.
    pub tls_number: Option<u64>,
}

impl HostImage {
    /// Reads headers and symbols of a host file.
    ///
    /// Symbols that cannot be read (a table that points outside the file) count as absent: a broken table must not hide the rest.
    pub fn read<R: ReadAt + ?Sized>(reader: &R) -> Result<Self, HostError> {
        let elf = Elf::read(reader)?;
        let kind = elf.header.e_type.get(E);
        if kind != elf::ET_EXEC && kind != elf::ET_DYN {
            return Err(HostError::Malformed("neither executable nor library"));
        }
        let headers = elf.program_headers(reader)?;
        let of_type = |kind| headers.iter().find(move |header| header.p_type.get(E) == kind);
        let tls = of_type(elf::PT_TLS).map(|header| TlsSegment {
            address: header.p_vaddr.get(E),
            memory_bytes: header.p_memsz.get(E),
            align: header.p_align.get(E).max(1),
        });
        let loads = headers
            .iter()
            .filter(|header| header.p_type.get(E) == elf::PT_LOAD)
            .map(|header| LoadSegment {
                address: header.p_vaddr.get(E),
                file_offset: header.p_offset.get(E),
                file_bytes: header.p_filesz.get(E),
                is_executable: header.p_flags.get(E).0 & elf::PF_X.0 != 0,
            })
            .collect();
        let has_interpreter = of_type(elf::PT_INTERP).is_some();
        let is_executable = kind == elf::ET_EXEC || is_pie(reader, of_type(elf::PT_DYNAMIC), has_interpreter);
        let mut image = Self {
            build_id: read_build_id(reader, &headers),
            is_executable,
            tls,
            loads,
            has_symbol_table: false,
            symbols: HostSymbols::default(),
            functions: Vec::new(),
            exports_c_api: false,
            is_static: is_executable && !has_interpreter,
            tls_number: None,
        };
        if tls.is_some() && !is_executable {
            image.tls_number = tls_number(reader, &elf).unwrap_or_default();
        }
        if let Some(dynamic) = elf.section_of_type(elf::SHT_DYNSYM) {
            image.exports_c_api = exports_c_api(reader, &elf, dynamic).unwrap_or(false);
        }
        if let Some(table) = elf.section_of_type(elf::SHT_SYMTAB)
            && let Ok((symbols, functions)) = image.find_symbols(reader, &elf, table)
        {
            image.has_symbol_table = true;
            image.symbols = symbols;
            image.functions = functions;
        }
        Ok(image)
    }

    /// Where the byte at a virtual address is in the file, if it comes from there.
    pub fn file_offset(&self, address: u64) -> Option<u64> {
        self.loads.iter().find_map(|load| {
            let offset = address.checked_sub(load.address)?;
            if offset < load.file_bytes {
                load.file_offset.checked_add(offset)
            } else {
                None
            }
        })
    }

    /// Bytes to an address from where the file's first byte would be, had a process mapped the whole of it as it maps the code. `None` if
    /// the code is in several segments, whose places differ.
    pub fn from_first_byte(&self, address: u64) -> Option<u64> {
        let mut codes = self.loads.iter().filter(|load| load.is_executable);
        let code = codes.next().filter(|_| codes.next().is_none())?;
        Some(address.wrapping_sub(code.address).wrapping_add(code.file_offset))
    }

    /// What shows that the file contains wasmtime, as far as its symbols tell.
    pub fn evidence(&self) -> Option<Evidence> {
        let symbols = &self.symbols;
        if !symbols.tls_replace.is_empty() || !symbols.publish.is_empty() {
            Some(Evidence::RuntimeSymbols)
        } else {
            self.exports_c_api.then_some(Evidence::CApi)
        }
    }

    fn find_symbols<R: ReadAt + ?Sized>(
        &self,
        reader: &R,
        elf: &Elf,
        table: &SectionHeader,
    ) -> Result<(HostSymbols, Vec<(u64, u32)>), HostError> {
        let mut search = Search::new(self);
        let mut functions = Vec::new();
        for_each_symbol(reader, elf, table, |symbol, name| {
            search.visit(symbol, name);
            if symbol.st_type() == elf::STT_FUNC
                && let Ok(size @ 1..) = u32::try_from(symbol.st_size.get(E))
            {
                functions.push((symbol.st_value.get(E), size));
            }
            true
        })?;
        functions.sort_unstable();
        Ok((search.finish(), functions))
    }

    /// Size of the function that begins at `address`, bytes, if a symbol tells.
    pub fn function_size(&self, address: u64) -> Option<u64> {
        let after = self.functions.partition_point(|(start, _)| *start <= address);
        let (start, size) = *self.functions.get(after.checked_sub(1)?)?;
        (start == address).then_some(u64::from(size))
    }
}

/// What shows that a file contains wasmtime, without demangling anything; for deciding which of many files deserve a full look.
pub fn looks_like_wasmtime<R: ReadAt + ?Sized>(reader: &R) -> Result<Option<Evidence>, HostError> {
    // The same in both manglings.
    const RUNTIME_FRAGMENT: &[u8] = b"8wasmtime7runtime2vm12traphandlers3tls3raw7replace";
    const MESSAGE: &[u8] = b"all fuel consumed by WebAssembly";
    let elf = Elf::read(reader)?;
    if let Some(strings) = elf.section_of_type(elf::SHT_SYMTAB).and_then(|table| elf.linked(table))
        && section_contains(reader, strings, RUNTIME_FRAGMENT, MAX_HOST_NAMES_BYTES)?
    {
        return Ok(Some(Evidence::RuntimeSymbols));
    }
    if let Some(table) = elf.section_of_type(elf::SHT_DYNSYM)
        && exports_c_api(reader, &elf, table)?
    {
        return Ok(Some(Evidence::CApi));
    }
    if let Some(data) = elf.section(b".rodata")
        && section_contains(reader, data, MESSAGE, MAX_SEARCHED_BYTES)?
    {
        return Ok(Some(Evidence::Messages));
    }
    Ok(None)
}

/// A kind of function: which paths it has, and a cheap test on the mangled name.
struct Kind {
    fragment: &'static [u8],
    paths: &'static [&'static str],
    list: fn(&mut HostSymbols) -> &mut Vec<HostFunction>,
}

const KINDS: &[Kind] = &[
    Kind {
        fragment: b"3raw7replace",
        paths: &["wasmtime::runtime::vm::traphandlers::tls::raw::replace"],
        list: |symbols| &mut symbols.tls_replace,
    },
    Kind {
        fragment: b"21array_call_trampoline",
        // `HostContext` up to wasmtime 42.
        paths: &[
            "wasmtime::runtime::func::HostFunc::array_call_trampoline",
            "wasmtime::runtime::func::HostContext::array_call_trampoline",
        ],
        list: |symbols| &mut symbols.array_call_trampolines,
    },
    Kind {
        fragment: b"15array_call_shim",
        paths: &["wasmtime::runtime::trampoline::func::array_call_shim"],
        list: |symbols| &mut symbols.array_call_trampolines,
    },
    Kind {
        fragment: b"15cabi_entrypoint",
        paths: &["wasmtime::runtime::component::func::host::HostFn::cabi_entrypoint"],
        list: |symbols| &mut symbols.cabi_entrypoints,
    },
    Kind {
        // Up to wasmtime 40. `HostFn::entrypoint` of 41 and later is called by `cabi_entrypoint`.
        fragment: b"8HostFunc10entrypoint",
        paths: &["wasmtime::runtime::component::func::host::HostFunc::entrypoint"],
        list: |symbols| &mut symbols.cabi_entrypoints,
    },
    Kind {
        fragment: b"4host18dynamic_entrypoint",
        paths: &["wasmtime::runtime::component::func::host::dynamic_entrypoint"],
        list: |symbols| &mut symbols.cabi_entrypoints,
    },
    Kind {
        fragment: b"16from_runtime_box",
        paths: &["wasmtime::runtime::trap::from_runtime_box"],
        list: |symbols| &mut symbols.from_runtime_box,
    },
    Kind {
        fragment: b"wasmtime_fiber_switch",
        paths: &[
            NAKED_FIBER_SWITCH[0],
            NAKED_FIBER_SWITCH[1],
            "wasmtime_internal_fiber::stackswitch::x86_64::wasmtime_fiber_switch",
            "wasmtime_internal_fiber::stackswitch::aarch64::wasmtime_fiber_switch",
        ],
        list: |symbols| &mut symbols.fiber_switch,
    },
    Kind {
        fragment: b"3raw11memory_grow",
        paths: &["wasmtime::runtime::vm::libcalls::raw::memory_grow"],
        list: |symbols| &mut symbols.memory_grow,
    },
    Kind {
        // Up to wasmtime 33.
        fragment: b"3raw13memory32_grow",
        paths: &["wasmtime::runtime::vm::libcalls::raw::memory32_grow"],
        list: |symbols| &mut symbols.memory_grow,
    },
    Kind {
        fragment: b"3raw10table_grow",
        paths: &["wasmtime::runtime::vm::libcalls::raw::table_grow"],
        list: |symbols| &mut symbols.table_grow,
    },
    Kind {
        fragment: b"3raw5raise",
        paths: &["wasmtime::runtime::vm::libcalls::raw::raise"],
        list: |symbols| &mut symbols.raise,
    },
    Kind {
        fragment: b"3raw4trap",
        paths: &["wasmtime::runtime::vm::libcalls::raw::trap"],
        list: |symbols| &mut symbols.reported_trap,
    },
    Kind {
        fragment: b"3raw9new_epoch",
        paths: &["wasmtime::runtime::vm::libcalls::raw::new_epoch"],
        list: |symbols| &mut symbols.new_epoch,
    },
    Kind {
        fragment: b"3raw10out_of_gas",
        paths: &["wasmtime::runtime::vm::libcalls::raw::out_of_gas"],
        list: |symbols| &mut symbols.out_of_gas,
    },
    Kind {
        fragment: b"10CodeMemory7publish",
        paths: &["wasmtime::runtime::code_memory::CodeMemory::publish"],
        list: |symbols| &mut symbols.publish,
    },
    Kind {
        fragment: b"8Instance3new",
        paths: &["wasmtime::runtime::vm::instance::Instance::new"],
        list: |symbols| &mut symbols.instance_new,
    },
    Kind {
        fragment: b"7Spawner10spawn_task",
        paths: &["tokio::runtime::blocking::pool::Spawner::spawn_task"],
        list: |symbols| &mut symbols.helper_spawn,
    },
    Kind {
        fragment: b"5Inner3run",
        paths: &["tokio::runtime::blocking::pool::Inner::run"],
        list: |symbols| &mut symbols.helper_run,
    },
    Kind {
        fragment: b"10run_worker",
        paths: &[
            "tokio::runtime::blocking::pool::LockedImpl::run_worker",
            "tokio::runtime::blocking::sharded::ShardedImpl::run_worker",
        ],
        list: |symbols| &mut symbols.helper_run,
    },
    Kind {
        fragment: b"11UnownedTask",
        paths: &["tokio::runtime::task::UnownedTask::run"],
        list: |symbols| &mut symbols.helper_run,
    },
    Kind {
        fragment: b"5State22transition_to_complete",
        paths: &["tokio::runtime::task::state::State::transition_to_complete"],
        list: |symbols| &mut symbols.task_complete,
    },
    Kind {
        fragment: b"6worker3run",
        paths: &[
            "tokio::runtime::scheduler::multi_thread::worker::run",
            "tokio::runtime::thread_pool::worker::run",
        ],
        list: |symbols| &mut symbols.worker_run,
    },
    Kind {
        fragment: b"11TaskIdGuard5enter",
        paths: &["tokio::runtime::task::core::TaskIdGuard::enter"],
        list: |symbols| &mut symbols.task_enter,
    },
    Kind {
        fragment: b"19set_current_task_id",
        paths: &["tokio::runtime::context::set_current_task_id"],
        list: |symbols| &mut symbols.task_enter,
    },
    Kind {
        fragment: b"14compile_module",
        paths: &["wasmtime::compile::code_builder::CodeBuilder::compile_module"],
        list: |symbols| &mut symbols.loading.compile,
    },
    Kind {
        fragment: b"17compile_component",
        paths: &["wasmtime::compile::code_builder::CodeBuilder::compile_component"],
        list: |symbols| &mut symbols.loading.compile,
    },
    Kind {
        fragment: b"11from_binary",
        paths: &[
            "wasmtime::runtime::module::Module::from_binary",
            "wasmtime::runtime::component::component::Component::from_binary",
        ],
        list: |symbols| &mut symbols.loading.compile,
    },
    Kind {
        fragment: b"11deserialize",
        paths: &[
            "wasmtime::runtime::module::Module::deserialize",
            "wasmtime::runtime::component::component::Component::deserialize",
        ],
        list: |symbols| &mut symbols.loading.deserialize,
    },
    Kind {
        fragment: b"16deserialize_file",
        paths: &[
            "wasmtime::runtime::module::Module::deserialize_file",
            "wasmtime::runtime::component::component::Component::deserialize_file",
        ],
        list: |symbols| &mut symbols.loading.deserialize,
    },
    Kind {
        fragment: b"21deserialize_open_file",
        paths: &[
            "wasmtime::runtime::module::Module::deserialize_open_file",
            "wasmtime::runtime::component::component::Component::deserialize_open_file",
        ],
        list: |symbols| &mut symbols.loading.deserialize,
    },
    Kind {
        fragment: b"15load_code_bytes",
        paths: &["wasmtime::engine::Engine::load_code_bytes"],
        list: |symbols| &mut symbols.loading.deserialize,
    },
    Kind {
        fragment: b"14load_code_file",
        paths: &["wasmtime::engine::Engine::load_code_file"],
        list: |symbols| &mut symbols.loading.deserialize,
    },
    Kind {
        fragment: b"7MmapVec9from_file",
        paths: &["wasmtime::runtime::vm::mmap_vec::MmapVec::from_file"],
        list: |symbols| &mut symbols.loading.read,
    },
    Kind {
        fragment: b"7MmapVec25from_slice_with_alignment",
        paths: &["wasmtime::runtime::vm::mmap_vec::MmapVec::from_slice_with_alignment"],
        list: |symbols| &mut symbols.loading.read,
    },
    Kind {
        fragment: b"9load_code",
        paths: &["wasmtime::engine::Engine::load_code"],
        list: |symbols| &mut symbols.loading.load,
    },
    Kind {
        fragment: b"10from_parts",
        paths: &[
            "wasmtime::runtime::module::Module::from_parts",
            "wasmtime::runtime::component::component::Component::from_parts",
        ],
        list: |symbols| &mut symbols.loading.assemble,
    },
    Kind {
        fragment: b"14from_parts_raw",
        paths: &["wasmtime::runtime::module::Module::from_parts_raw"],
        list: |symbols| &mut symbols.loading.make_module,
    },
    Kind {
        fragment: b"14ModuleRegistry8register",
        paths: &["wasmtime::runtime::module::registry::ModuleRegistry::register"],
        list: |symbols| &mut symbols.loading.register,
    },
    Kind {
        fragment: b"9start_raw",
        paths: &["wasmtime::runtime::instance::Instance::start_raw"],
        list: |symbols| &mut symbols.loading.start,
    },
];

/// The exported functions of the C API that load modules; what they call is inlined into them.
const C_COMPILE: [&str; 3] = ["wasmtime_module_new", "wasmtime_component_new", "wasm_module_new"];
/// As [`C_COMPILE`], from code that was kept.
const C_DESERIALIZE: [&str; 5] = [
    "wasmtime_module_deserialize",
    "wasmtime_module_deserialize_file",
    "wasmtime_component_deserialize",
    "wasmtime_component_deserialize_file",
    "wasm_module_deserialize",
];

/// The switch itself; where it exists, the function of the same name without the underscore only calls it.
const NAKED_FIBER_SWITCH: [&str; 2] = [
    "wasmtime_internal_fiber::stackswitch::x86_64::wasmtime_fiber_switch_",
    "wasmtime_internal_fiber::stackswitch::aarch64::wasmtime_fiber_switch_",
];
/// Up to wasmtime 36 the switch is assembly, with the version in its name.
const ASSEMBLY_FIBER_SWITCH: &str = "wasmtime_fiber_switch_";

struct Search<'a> {
    image: &'a HostImage,
    symbols: HostSymbols,
    crate_names: [memchr::memmem::Finder<'static>; 2],
    fragments: Vec<memchr::memmem::Finder<'static>>,
    demangled_count: u32,
}

impl<'a> Search<'a> {
    fn new(image: &'a HostImage) -> Self {
        Self {
            image,
            symbols: HostSymbols::default(),
            crate_names: [b"wasmtime".as_slice(), b"5tokio7runtime"].map(memchr::memmem::Finder::new),
            fragments: KINDS
                .iter()
                .map(|kind| memchr::memmem::Finder::new(kind.fragment))
                .collect(),
            demangled_count: 0,
        }
    }

    fn visit(&mut self, symbol: &ElfSym, name: &[u8]) {
        let kind = symbol.st_type();
        let is_defined = symbol.st_shndx.get(E) != elf::SHN_UNDEF;
        if !is_defined
            || self.demangled_count >= MAX_DEMANGLED
            || (self
                .crate_names
                .iter()
                .all(|crate_name| crate_name.find(name).is_none())
                && !name.starts_with(b"wasm_module_"))
        {
            return;
        }
        match kind {
            elf::STT_FUNC => self.visit_function(symbol, name),
            elf::STT_TLS => self.visit_thread_local(symbol, name),
            _ => {}
        }
    }

    fn visit_function(&mut self, symbol: &ElfSym, name: &[u8]) {
        if name.starts_with(ASSEMBLY_FIBER_SWITCH.as_bytes()) {
            self.add(symbol, ASSEMBLY_FIBER_SWITCH, |symbols| &mut symbols.fiber_switch);
            return;
        }
        if name.starts_with(b"wasm") {
            let named = |known: &&str| known.as_bytes() == name;
            if let Some(path) = C_COMPILE.into_iter().find(named) {
                self.add(symbol, path, |symbols| &mut symbols.loading.compile);
            } else if let Some(path) = C_DESERIALIZE.into_iter().find(named) {
                self.add(symbol, path, |symbols| &mut symbols.loading.deserialize);
            }
            return;
        }
        let candidates: Vec<&Kind> = KINDS
            .iter()
            .zip(&self.fragments)
            .filter(|(_, fragment)| fragment.find(name).is_some())
            .map(|(kind, _)| kind)
            .collect();
        if candidates.is_empty() {
            return;
        }
        self.demangled_count += 1;
        let Some(path) = str::from_utf8(name).ok().and_then(rust_path) else {
            return;
        };
        for kind in candidates {
            if let Some(path) = kind.paths.iter().find(|known| **known == path) {
                self.add(symbol, path, kind.list);
            }
        }
    }

    fn add(&mut self, symbol: &ElfSym, path: &'static str, list: fn(&mut HostSymbols) -> &mut Vec<HostFunction>) {
        let address = symbol.st_value.get(E);
        let list = list(&mut self.symbols);
        // What is not in the file cannot be probed.
        if let Some(file_offset) = self.image.file_offset(address)
            && list.len() < MAX_FUNCTIONS_OF_A_KIND
        {
            list.push(HostFunction {
                address,
                size: symbol.st_size.get(E),
                file_offset,
                path,
            });
        }
    }

    fn visit_thread_local(&mut self, symbol: &ElfSym, name: &[u8]) {
        self.demangled_count += 1;
        let Some(path) = str::from_utf8(name).ok().and_then(rust_path) else {
            return;
        };
        if is_activation_slot(&path)
            && let Some(slot) = self.image.tls_slot(symbol.st_value.get(E))
        {
            self.symbols.tls_slot = Some(slot);
        }
        if is_thread_local(&path, "tokio::runtime::context::CONTEXT::") {
            self.symbols.task_context = self.image.tls_slot(symbol.st_value.get(E));
        }
    }

    fn finish(self) -> HostSymbols {
        let mut symbols = self.symbols;
        for kind in KINDS {
            let list = (kind.list)(&mut symbols);
            list.sort_by_key(|function| function.address);
            list.dedup_by_key(|function| function.address);
        }
        if symbols
            .fiber_switch
            .iter()
            .any(|function| NAKED_FIBER_SWITCH.contains(&function.path))
        {
            symbols
                .fiber_switch
                .retain(|function| NAKED_FIBER_SWITCH.contains(&function.path));
        }
        symbols
    }
}

impl HostImage {
    fn tls_slot(&self, block_offset: u64) -> Option<TlsSlot> {
        let tls = self
            .tls
            .filter(|tls| block_offset < tls.memory_bytes && tls.align.is_power_of_two())?;
        let model = if self.is_executable {
            // Linkers end the block at the thread pointer, aligned as the segment's addresses are.
            let end = tls
                .address
                .checked_add(tls.memory_bytes)?
                .checked_next_multiple_of(tls.align)?;
            let block_bytes = end - tls.address;
            let thread_pointer_offset = i64::try_from(block_offset).ok()?.checked_sub_unsigned(block_bytes)?;
            TlsModel::LocalExec { thread_pointer_offset }
        } else {
            TlsModel::Dynamic
        };
        Some(TlsSlot { block_offset, model })
    }
}

/// `….vm.sys.unix[.std_tls].TLS` and, within, only what the standard library's macro for thread-locals makes.
fn is_activation_slot(path: &str) -> bool {
    let Some(rest) = path.strip_prefix("wasmtime::runtime::vm::sys::unix::") else {
        return false;
    };
    let rest = rest.strip_prefix("std_tls::").unwrap_or(rest);
    is_thread_local(rest, "TLS::")
}

/// Whether what follows in a path is only what the standard library's macro for thread-locals makes.
fn is_thread_local(path: &str, variable: &str) -> bool {
    path.strip_prefix(variable).is_some_and(|rest| {
        rest.split("::")
            .all(|segment| segment.starts_with('{') || matches!(segment, "VAL" | "__RUST_STD_INTERNAL_VAL"))
    })
}

/// Calls `visit` with each symbol and its name until it returns `false`.
fn for_each_symbol<R: ReadAt + ?Sized>(
    reader: &R,
    elf: &Elf,
    table: &SectionHeader,
    mut visit: impl FnMut(&ElfSym, &[u8]) -> bool,
) -> Result<(), HostError> {
    let strings = elf.linked(table).ok_or(HostError::Malformed("symbol names"))?;
    let strings = read_section(reader, strings, "symbol names", MAX_HOST_NAMES_BYTES)?;
    let count = table.sh_size.get(E) / size_of::<ElfSym>() as u64;
    check_bound("symbol count", count, MAX_HOST_SYMBOLS)?;
    let mut position = 0;
    while position < count {
        let some = SYMBOLS_PER_READ.min(count - position) as usize;
        let offset = table
            .sh_offset
            .get(E)
            .checked_add(position * size_of::<ElfSym>() as u64);
        let offset = offset.ok_or(HostError::Malformed("symbol table"))?;
        let bytes = read_exact_at(reader, offset, some * size_of::<ElfSym>())?;
        let (symbols, _) =
            slice_from_bytes::<ElfSym>(&bytes, some).map_err(|()| HostError::Malformed("symbol table"))?;
        for symbol in symbols {
            let Some(name) = string_at(&strings, symbol.st_name.get(E)) else {
                continue;
            };
            if !visit(symbol, name) {
                return Ok(());
            }
        }
        position += some as u64;
    }
    Ok(())
}

/// The word that the file's own code reads the number of its thread-local block from: the relocation of a block without a symbol.
fn tls_number<R: ReadAt + ?Sized>(reader: &R, elf: &Elf) -> Result<Option<u64>, HostError> {
    const ENTRY_BYTES: u64 = size_of::<Rela>() as u64;
    for section in &elf.sections {
        if section.sh_type.get(E) != elf::SHT_RELA {
            continue;
        }
        let count = section.sh_size.get(E) / ENTRY_BYTES;
        check_bound("relocation count", count, MAX_RELOCATIONS)?;
        let mut position = 0;
        while position < count {
            let some = RELOCATIONS_PER_READ.min(count - position);
            let offset = section.sh_offset.get(E).checked_add(position * ENTRY_BYTES);
            let offset = offset.ok_or(HostError::Malformed("section offset"))?;
            let bytes = read_exact_at(reader, offset, (some * ENTRY_BYTES) as usize)?;
            let (entries, _) =
                slice_from_bytes::<Rela>(&bytes, some as usize).map_err(|()| HostError::Malformed("relocations"))?;
            let own = |entry: &&Rela| entry.r_type(E, false) == elf::R_X86_64_DTPMOD64 && entry.r_sym(E, false) == 0;
            if let Some(found) = entries.iter().find(own) {
                return Ok(Some(found.r_offset.get(E)));
            }
            position += some;
        }
    }
    Ok(None)
}

fn exports_c_api<R: ReadAt + ?Sized>(reader: &R, elf: &Elf, table: &SectionHeader) -> Result<bool, HostError> {
    let mut found = false;
    for_each_symbol(reader, elf, table, |symbol, name| {
        found =
            matches!(name, b"wasmtime_store_new" | b"wasmtime_module_new") && symbol.st_shndx.get(E) != elf::SHN_UNDEF;
        !found
    })?;
    Ok(found)
}

fn section_contains<R: ReadAt + ?Sized>(
    reader: &R,
    section: &SectionHeader,
    needle: &[u8],
    limit: u64,
) -> Result<bool, HostError> {
    const CHUNK_BYTES: u64 = 1 << 20;
    if section.sh_type.get(E) == elf::SHT_NOBITS {
        return Ok(false);
    }
    let finder = memchr::memmem::Finder::new(needle);
    let size = section.sh_size.get(E).min(limit);
    let mut position = 0;
    while position < size {
        // Overlapping, for a needle across two chunks.
        let len = (CHUNK_BYTES + needle.len() as u64).min(size - position);
        let offset = section
            .sh_offset
            .get(E)
            .checked_add(position)
            .ok_or(HostError::Malformed("section offset"))?;
        if finder.find(&read_exact_at(reader, offset, len as usize)?).is_some() {
            return Ok(true);
        }
        position += CHUNK_BYTES;
    }
    Ok(false)
}

/// Whether a file of type `ET_DYN` is an executable: the linker says so, or it names an interpreter and no library name.
fn is_pie<R: ReadAt + ?Sized>(reader: &R, dynamic: Option<&ProgramHeader>, has_interpreter: bool) -> bool {
    let Some(dynamic) = dynamic else { return has_interpreter };
    let len = dynamic.p_filesz.get(E).min(MAX_DYNAMIC_BYTES) as usize;
    let Ok(bytes) = read_exact_at(reader, dynamic.p_offset.get(E), len) else {
        return has_interpreter;
    };
    let mut has_library_name = false;
    let count = bytes.len() / size_of::<elf::Dyn64<LittleEndian>>();
    let entries = slice_from_bytes::<elf::Dyn64<LittleEndian>>(&bytes, count).map_or(&[][..], |(entries, _)| entries);
    for entry in entries {
        match entry.d_tag.get(E) {
            elf::DT_NULL => break,
            elf::DT_FLAGS_1 if entry.d_val.get(E) & elf::DF_1_PIE.0 != 0 => return true,
            elf::DT_SONAME => has_library_name = true,
            _ => {}
        }
    }
    has_interpreter && !has_library_name
}

fn read_build_id<R: ReadAt + ?Sized>(reader: &R, headers: &[ProgramHeader]) -> Option<String> {
    headers
        .iter()
        .filter(|header| header.p_type.get(E) == elf::PT_NOTE)
        .find_map(|header| {
            let len = header.p_filesz.get(E).min(MAX_NOTES_BYTES) as usize;
            let bytes = read_exact_at(reader, header.p_offset.get(E), len).ok()?;
            let align = header.p_align.get(E).clamp(4, 8) as usize;
            let mut rest = bytes.as_slice();
            while let Some((head, after)) = rest.split_at_checked(12) {
                let [name_len, data_len, kind] = [0, 4, 8].map(|at| {
                    head[at..at + 4]
                        .iter()
                        .rev()
                        .fold(0u32, |all, byte| all << 8 | u32::from(*byte))
                });
                let padded = |len: u32| (len as usize).next_multiple_of(align);
                let data_at = (12 + name_len as usize).next_multiple_of(align) - 12;
                let data = after.get(data_at..data_at + data_len as usize)?;
                if kind == elf::NT_GNU_BUILD_ID.0 && after.starts_with(b"GNU\0") && (1..=64).contains(&data.len()) {
                    return Some(hex(data));
                }
                rest = after.get(data_at + padded(data_len)..)?;
            }
            None
        })
}
