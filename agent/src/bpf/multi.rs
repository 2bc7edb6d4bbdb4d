//! Owns `uprobe.multi`: one BPF link for any number of uprobe sites in one file, each with its cookie.
//!
//! aya 0.14 loads uprobe programs without the attach type that such links demand. So the object that aya has loaded is parsed
//! a second time, its programs are pointed at the maps aya has created (globals included: `.rodata`, `.data` and `.bss` are
//! maps as well), and the one that is wanted is loaded and attached here. One link is attached and detached as a whole, where
//! closing perf-event uprobes waits for a grace period each.

use std::collections::HashSet;
use std::ffi::{CStr, CString, c_char};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::{io, mem, ptr};

use aya::Ebpf;
use aya::maps::Map;
use aya_obj::generated::{
    BPF_ALU64, BPF_EXIT, BPF_F_SLEEPABLE, BPF_JMP, BPF_K, BPF_MOV, bpf_attach_type, bpf_attr, bpf_cmd, bpf_insn,
    bpf_prog_type,
};
use aya_obj::{Function, Object, ProgramSection};

/// Verifier output kept of a failed load. The kernel keeps the end of a longer log, which is where the reason is.
const VERIFIER_LOG_BYTES: usize = 256 * 1024;

/// Loads that the kernel may break off with `EAGAIN` (a signal was pending) before that counts as a failure.
const MAX_LOAD_ATTEMPTS: u32 = 5;

/// A place in a file where a program is to run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct MultiSite {
    /// Bytes from the start of the file (not a virtual address) to the first byte of an instruction.
    pub file_offset: u64,
    /// What `bpf_get_attach_cookie` answers at this site.
    pub cookie: u64,
}

/// Why a multi-site uprobe could not be used.
#[derive(Debug, thiserror::Error)]
pub enum MultiError {
    /// Perf-event uprobes are the alternative.
    #[error("this kernel has no uprobe.multi links (they came with Linux 6.6)")]
    Unsupported,
    /// Neither present nor absent: the probe itself was refused, as without `CAP_BPF` and `CAP_PERFMON`.
    #[error("cannot find out whether the kernel has uprobe.multi links")]
    Probe {
        /// What the kernel answered.
        source: io::Error,
    },
    /// The bytes are not a BPF object.
    #[error("cannot parse the BPF object")]
    Parse {
        /// Where parsing ended.
        source: Box<aya_obj::ParseError>,
    },
    /// The object has no such program, or it is not an entry uprobe.
    #[error("the BPF object has no uprobe program named {program}")]
    UnknownProgram {
        /// The name asked for.
        program: String,
    },
    /// The object defines a map that was not passed in.
    #[error("no file descriptor was given for the map {map} of the BPF object")]
    MissingMap {
        /// Its name in the object.
        map: String,
    },
    /// The program could not be pointed at its maps or functions.
    #[error("cannot link the BPF program {program}")]
    Link {
        /// The program's name.
        program: String,
        /// What did not fit.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The kernel did not accept the program.
    #[error(
        "the kernel does not accept the BPF program {program} (its verifier says: {})",
        last_line(verifier_log)
    )]
    Load {
        /// The program's name.
        program: String,
        /// What the kernel answered.
        source: io::Error,
        /// The end of the verifier's output, possibly empty.
        verifier_log: String,
    },
    /// The path cannot be passed to the kernel.
    #[error("the path {path:?} contains a NUL byte")]
    Path {
        /// The path as given.
        path: PathBuf,
    },
    /// The kernel did not create the link; no site is attached.
    ///
    /// `ENOENT`, `EACCES`, `EPERM`: the path. `EBADF`: not a regular file. `EINVAL`: no sites, or an offset outside the file.
    /// `ENOTSUPP` (524): bytes that are no instruction or one that cannot be probed. `ESRCH`: no such process. `EIO`: the
    /// file system keeps no pages that could be patched. `E2BIG`: more than 2^20 sites.
    #[error("cannot attach {site_count} uprobes to {path:?}")]
    Attach {
        /// The file.
        path: PathBuf,
        /// How many sites were asked for.
        site_count: usize,
        /// What the kernel answered.
        source: io::Error,
    },
}

/// A uprobe program loaded for `uprobe.multi` links. Links keep working after it is dropped.
#[derive(Debug)]
pub struct MultiProgram {
    program: OwnedFd,
}

/// Attached sites. They are detached when this is dropped, and by the kernel when the process ends, however it ends.
///
/// Dropping waits until no program runs for the link any more: tens of milliseconds, whatever the number of sites.
#[derive(Debug)]
#[must_use = "the sites are detached when the link is dropped"]
pub struct MultiLink {
    _link: OwnedFd,
}

/// What a verifier's log ends in: the reason, before the statistics.
fn last_line(verifier_log: &str) -> &str {
    let lines = || verifier_log.lines().filter(|line| !line.trim().is_empty());
    let reason = lines().rfind(|line| !line.starts_with("processed "));
    reason.or_else(|| lines().next_back()).unwrap_or("nothing")
}

impl MultiProgram {
    /// Its descriptor.
    pub(super) fn descriptor(&self) -> BorrowedFd<'_> {
        self.program.as_fd()
    }

    /// Loads the entry-uprobe program `program` of `object`, sharing `maps` with the programs that already use them.
    ///
    /// `object` holds the bytes that have been given to [`aya::EbpfLoader::load`], aligned as it demands. `maps` must hold every map
    /// of the object by its name there, `.rodata`, `.data`, `.bss` and `AYA_LOGS` included; [`map_fds`] lists them as long as
    /// none has been taken from the `Ebpf`. Globals have the values that aya has put into those maps.
    pub fn load<'a>(
        object: &[u8],
        program: &str,
        maps: impl IntoIterator<Item = (&'a str, BorrowedFd<'a>)>,
    ) -> Result<Self, MultiError> {
        let mut object = Object::parse(object).map_err(|source| MultiError::Parse {
            source: Box::new(source),
        })?;
        let unknown = || MultiError::UnknownProgram {
            program: program.to_owned(),
        };
        let definition = object.programs.get(program).ok_or_else(unknown)?;
        let ProgramSection::UProbe { sleepable } = definition.section else {
            return Err(unknown());
        };
        let function_key = definition.function_key();
        let license = definition.license.clone();
        supported()?;

        let type_info = load_type_info(&mut object);
        relocate(
            &mut object,
            program,
            &maps
                .into_iter()
                .map(|(name, fd)| (name, fd.as_raw_fd()))
                .collect::<Vec<_>>(),
        )?;
        let function = object.functions.get(&function_key).ok_or_else(unknown)?;
        let request = ProgramRequest {
            name: program,
            license: &license,
            instructions: &function.instructions,
            flags: if sleepable { BPF_F_SLEEPABLE } else { 0 },
            debug_info: type_info.as_ref().map(|type_info| (type_info.as_fd(), function)),
        };
        let program = load_with_verifier_log(&request)?;
        Ok(Self { program })
    }

    /// Runs the program at all of `sites` in the file at `path`, in processes that have it mapped and in those that will.
    /// Either every site is attached or none.
    ///
    /// `path` is resolved once, as seen by the caller, links followed; what counts from then on is the inode, so containers
    /// that share an image layer share the sites. A container's file is `/proc/PID/root/…`; a process's, even when it is
    /// deleted, replaced, unmounted or a memfd, is `/proc/PID/exe` or `/proc/PID/map_files/START-END` (hexadecimal without
    /// the leading zeros of `/proc/PID/maps`). These need `CAP_SYS_PTRACE`, `map_files` `CAP_CHECKPOINT_RESTORE` as well;
    /// the link itself needs no capability beyond those of loading.
    ///
    /// A mapping that is writable when this is called, or later when it is made, gets no breakpoints, also not when `mprotect`
    /// turns it executable (as wasmtime does with `.cwasm` files): attach then, or attach again and drop the older link.
    ///
    /// The offsets must be starts of instructions: the kernel checks only that some instruction can be decoded there, and
    /// only in processes that have the file mapped. A breakpoint elsewhere changes what a process does, or the data it reads.
    pub fn attach(&self, path: &Path, sites: &[MultiSite]) -> Result<MultiLink, MultiError> {
        let c_path =
            CString::new(path.as_os_str().as_bytes()).map_err(|_| MultiError::Path { path: path.to_owned() })?;
        match create_link(self.program.as_fd(), &c_path, sites) {
            Ok(link) => Ok(MultiLink { _link: link }),
            Err(source) => Err(MultiError::Attach {
                path: path.to_owned(),
                site_count: sites.len(),
                source,
            }),
        }
    }

    /// As [`Self::attach`], for a file that is open (`O_PATH` suffices): what has been examined is what gets probed, whoever
    /// renames files meanwhile. Needs `/proc`.
    pub fn attach_file(&self, file: BorrowedFd<'_>, sites: &[MultiSite]) -> Result<MultiLink, MultiError> {
        self.attach(Path::new(&format!("/proc/self/fd/{}", file.as_raw_fd())), sites)
    }
}

/// The maps of `loaded` as [`MultiProgram::load`] wants them. Maps that have been taken out of it are missing.
pub fn map_fds(loaded: &Ebpf) -> impl Iterator<Item = (&str, BorrowedFd<'_>)> {
    loaded.maps().map(|(name, map)| (name, map_fd(map)))
}

/// Asks the kernel whether it has `uprobe.multi` links, by trying.
///
/// Answers [`MultiError::Unsupported`] before Linux 6.6, and [`MultiError::Probe`] when the caller may not find out.
pub fn supported() -> Result<(), MultiError> {
    let instructions = [
        instruction(BPF_ALU64 | BPF_MOV | BPF_K, 0, 0, 0, 0),
        instruction(BPF_JMP | BPF_EXIT, 0, 0, 0, 0),
    ];
    let request = ProgramRequest {
        name: "probe",
        license: c"GPL",
        instructions: &instructions,
        flags: 0,
        debug_info: None,
    };
    // Kernels before 6.6 load this too, not knowing what they promise. The link tells: only a kernel that knows such links
    // gets as far as finding that `/` is not a regular file.
    let program = load_program(&request, &mut []).map_err(|source| match source.raw_os_error() {
        Some(libc::EINVAL) => MultiError::Unsupported,
        _ => MultiError::Probe { source },
    })?;
    let site = MultiSite {
        file_offset: 0,
        cookie: 0,
    };
    let refused = create_link(program.as_fd(), c"/", &[site]).err();
    match refused.and_then(|error| error.raw_os_error()) {
        Some(libc::EBADF) => Ok(()),
        Some(errno @ (libc::EPERM | libc::EACCES)) => Err(MultiError::Probe {
            source: io::Error::from_raw_os_error(errno),
        }),
        _ => Err(MultiError::Unsupported),
    }
}

/// Points every function of `object` at the maps and at the functions it calls.
fn relocate(object: &mut Object, program: &str, maps: &[(&str, RawFd)]) -> Result<(), MultiError> {
    let link_error = |source| MultiError::Link {
        program: program.to_owned(),
        source,
    };
    let definitions = mem::take(&mut object.maps);
    let mut bound = Vec::with_capacity(definitions.len());
    for (name, definition) in &definitions {
        let &(_, fd) = maps
            .iter()
            .find(|(given, _)| given == name)
            .ok_or_else(|| MultiError::MissingMap { map: name.clone() })?;
        bound.push((name.as_str(), fd, definition));
    }
    let text_sections: HashSet<usize> = object.functions.keys().map(|&(section, _)| section).collect();
    // Maps first: calls are relocated into copies of the functions called.
    object
        .relocate_maps(bound.into_iter(), &text_sections)
        .map_err(|source| link_error(Box::new(source)))?;
    object
        .relocate_calls(&text_sections)
        .map_err(|source| link_error(Box::new(source)))
}

/// Loads the object's type information, without which functions passed to helpers such as `bpf_loop` are refused and global
/// functions are verified another way than in aya's copy. As in aya, going without it is not an error.
fn load_type_info(object: &mut Object) -> Option<OwnedFd> {
    let btf = object.fixup_and_sanitize_btf(aya::features().btf()?).ok()??.to_bytes();
    let mut attributes = zeroed_attributes();
    attributes.__bindgen_anon_7.btf = address_of(&btf);
    attributes.__bindgen_anon_7.btf_size = btf.len() as u32;
    // SAFETY: BPF_BTF_LOAD reads `btf_size` bytes at `btf`, which `btf` holds until after the call.
    unsafe { bpf_fd(bpf_cmd::BPF_BTF_LOAD, &mut attributes) }.ok()
}

/// What a program is loaded from.
struct ProgramRequest<'a> {
    name: &'a str,
    license: &'a CStr,
    instructions: &'a [bpf_insn],
    flags: u32,
    debug_info: Option<(BorrowedFd<'a>, &'a Function)>,
}

fn load_with_verifier_log(request: &ProgramRequest<'_>) -> Result<OwnedFd, MultiError> {
    // Writing the log slows the verifier down, so it is asked for only once there is a failure to explain.
    load_program(request, &mut []).or_else(|source| {
        let mut log = vec![0; VERIFIER_LOG_BYTES];
        load_program(request, &mut log).map_err(|_| {
            let end = log.iter().position(|&byte| byte == 0).unwrap_or(log.len());
            MultiError::Load {
                program: request.name.to_owned(),
                source,
                verifier_log: String::from_utf8_lossy(&log[..end]).into_owned(),
            }
        })
    })
}

fn load_program(request: &ProgramRequest<'_>, log: &mut [u8]) -> io::Result<OwnedFd> {
    let mut attributes = zeroed_attributes();
    attributes.__bindgen_anon_3.prog_type = bpf_prog_type::BPF_PROG_TYPE_KPROBE as u32;
    attributes.__bindgen_anon_3.expected_attach_type = bpf_attach_type::BPF_TRACE_UPROBE_MULTI as u32;
    attributes.__bindgen_anon_3.insns = address_of(request.instructions);
    attributes.__bindgen_anon_3.insn_cnt = request.instructions.len() as u32;
    attributes.__bindgen_anon_3.license = request.license.as_ptr() as u64;
    attributes.__bindgen_anon_3.prog_flags = request.flags;
    let mut name = [0; 16];
    // The last byte stays NUL.
    for (to, from) in name.iter_mut().take(15).zip(request.name.bytes()) {
        *to = from as c_char;
    }
    attributes.__bindgen_anon_3.prog_name = name;

    let (function_info, line_info);
    if let Some((type_info, function)) = request.debug_info {
        attributes.__bindgen_anon_3.prog_btf_fd = type_info.as_raw_fd() as u32;
        if function.func_info_rec_size > 0 {
            function_info = function.func_info.func_info_bytes();
            attributes.__bindgen_anon_3.func_info = address_of(&function_info);
            attributes.__bindgen_anon_3.func_info_cnt = function.func_info.len() as u32;
            attributes.__bindgen_anon_3.func_info_rec_size = function.func_info_rec_size as u32;
        }
        if function.line_info_rec_size > 0 {
            line_info = function.line_info.line_info_bytes();
            attributes.__bindgen_anon_3.line_info = address_of(&line_info);
            attributes.__bindgen_anon_3.line_info_cnt = function.line_info.len() as u32;
            attributes.__bindgen_anon_3.line_info_rec_size = function.line_info_rec_size as u32;
        }
    }
    if !log.is_empty() {
        attributes.__bindgen_anon_3.log_level = 1;
        attributes.__bindgen_anon_3.log_size = log.len() as u32;
        attributes.__bindgen_anon_3.log_buf = log.as_mut_ptr() as u64;
    }

    let mut attempt = 1;
    loop {
        // SAFETY: BPF_PROG_LOAD reads `insn_cnt` instructions, a NUL-terminated license and the counted info records, and writes
        // `log_size` bytes of log. All of them are owned or borrowed by locals and arguments that outlive the call.
        match unsafe { bpf_fd(bpf_cmd::BPF_PROG_LOAD, &mut attributes) } {
            Err(error) if error.raw_os_error() == Some(libc::EAGAIN) && attempt < MAX_LOAD_ATTEMPTS => attempt += 1,
            result => return result,
        }
    }
}

fn create_link(program: BorrowedFd<'_>, path: &CStr, sites: &[MultiSite]) -> io::Result<OwnedFd> {
    let offsets: Vec<u64> = sites.iter().map(|site| site.file_offset).collect();
    let cookies: Vec<u64> = sites.iter().map(|site| site.cookie).collect();
    let site_count = u32::try_from(sites.len()).map_err(|_| io::Error::from_raw_os_error(libc::E2BIG))?;
    let mut attributes = zeroed_attributes();
    attributes.link_create.__bindgen_anon_1.prog_fd = program.as_raw_fd() as u32;
    attributes.link_create.attach_type = bpf_attach_type::BPF_TRACE_UPROBE_MULTI as u32;
    attributes.link_create.__bindgen_anon_3.uprobe_multi.path = path.as_ptr() as u64;
    attributes.link_create.__bindgen_anon_3.uprobe_multi.offsets = address_of(&offsets);
    attributes.link_create.__bindgen_anon_3.uprobe_multi.cookies = address_of(&cookies);
    attributes.link_create.__bindgen_anon_3.uprobe_multi.cnt = site_count;
    // SAFETY: BPF_LINK_CREATE reads a NUL-terminated path and `cnt` words each at `offsets` and `cookies`, all of which outlive
    // the call.
    unsafe { bpf_fd(bpf_cmd::BPF_LINK_CREATE, &mut attributes) }
}

/// Performs a command that answers with a new file descriptor (which is close-on-exec).
///
/// # Safety
///
/// `command` must answer with a file descriptor, and every address in `attributes` that it uses must be valid for as many
/// bytes as it reads or writes there.
unsafe fn bpf_fd(command: bpf_cmd, attributes: &mut bpf_attr) -> io::Result<OwnedFd> {
    // SAFETY: `attributes` is as large as said; what it points to is the caller's promise.
    let result = unsafe {
        libc::syscall(
            libc::SYS_bpf,
            command as libc::c_long,
            ptr::from_mut(attributes),
            size_of::<bpf_attr>(),
        )
    };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the descriptor is new, so nothing else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(result as RawFd) })
}

fn zeroed_attributes() -> bpf_attr {
    // SAFETY: a union of structures of integers, for all of which zero is a value.
    unsafe { mem::zeroed() }
}

fn address_of<T>(slice: &[T]) -> u64 {
    slice.as_ptr() as u64
}

fn instruction(code: u32, to: u8, from: u8, offset: i16, immediate: i32) -> bpf_insn {
    bpf_insn {
        code: code as u8,
        _bitfield_align_1: [],
        _bitfield_1: bpf_insn::new_bitfield_1(to, from),
        off: offset,
        imm: immediate,
    }
}

fn map_fd(map: &Map) -> BorrowedFd<'_> {
    let data = match map {
        Map::Array(data)
        | Map::ArrayOfMaps(data)
        | Map::BloomFilter(data)
        | Map::CgroupArray(data)
        | Map::CgroupStorage(data)
        | Map::CgrpStorage(data)
        | Map::CpuMap(data)
        | Map::DevMap(data)
        | Map::DevMapHash(data)
        | Map::HashMap(data)
        | Map::HashOfMaps(data)
        | Map::InodeStorage(data)
        | Map::LpmTrie(data)
        | Map::LruHashMap(data)
        | Map::PerCpuArray(data)
        | Map::PerCpuCgroupStorage(data)
        | Map::PerCpuHashMap(data)
        | Map::PerCpuLruHashMap(data)
        | Map::PerfEventArray(data)
        | Map::ProgramArray(data)
        | Map::Queue(data)
        | Map::ReusePortSockArray(data)
        | Map::RingBuf(data)
        | Map::SkStorage(data)
        | Map::SockHash(data)
        | Map::SockMap(data)
        | Map::Stack(data)
        | Map::StackTraceMap(data)
        | Map::Unsupported(data)
        | Map::XskMap(data) => data,
    };
    data.fd().as_fd()
}

#[cfg(test)]
mod tests {
    use std::error::Error as _;
    use std::fs::{self, File};
    use std::hint::black_box;

    use aya::maps::{Array, IterableMap as _, MapData};
    use aya_obj::generated::{
        BPF_ADD, BPF_ATOMIC, BPF_CALL, BPF_DW, BPF_IMM, BPF_JEQ, BPF_LD, BPF_MEM, BPF_PSEUDO_MAP_FD, BPF_STX, BPF_W,
        BPF_X, bpf_func_id,
    };

    use super::*;

    #[test]
    fn calls_are_counted_under_the_cookie_of_their_site_until_the_link_is_dropped() {
        let Some((program, counts)) = counting_program() else {
            return;
        };
        let executable = File::open("/proc/self/exe").unwrap();

        let link = program
            .attach_file(executable.as_fd(), &[site(first, 3), site(second, 5)])
            .unwrap();
        drop(program);
        (0..7).for_each(|_| call(first));
        (0..2).for_each(|_| call(second));
        drop(link);
        call(first);

        assert_eq!(all(&counts), [0, 0, 0, 7, 0, 2, 0, 0]);
    }

    #[test]
    fn one_site_outside_the_file_attaches_none() {
        let Some((program, counts)) = counting_program() else {
            return;
        };
        let outside = MultiSite {
            file_offset: 1 << 40,
            cookie: 2,
        };

        let error = program
            .attach(Path::new("/proc/self/exe"), &[site(third, 1), outside])
            .unwrap_err();
        call(third);

        assert!(
            matches!(&error, MultiError::Attach { site_count: 2, source, .. } if source.raw_os_error() == Some(libc::EINVAL))
        );
        assert_eq!(all(&counts), [0; 8]);
    }

    #[test]
    fn a_refused_program_comes_with_the_reason() {
        if skipped() {
            return;
        }
        let error = load_with_verifier_log(&request(&[instruction(BPF_JMP | BPF_EXIT, 0, 0, 0, 0)])).unwrap_err();

        assert!(error.to_string().contains("R0 !read_ok"), "{error}");
        assert!(error.source().is_some());
    }

    #[test]
    fn bytes_that_are_no_object_are_refused() {
        let error = MultiProgram::load(b"\x7fELF but not really", "program", []).unwrap_err();

        assert!(matches!(error, MultiError::Parse { .. }), "{error}");
    }

    #[test]
    fn a_path_with_a_nul_byte_is_refused() {
        let Some((program, _counts)) = counting_program() else {
            return;
        };
        let error = program.attach(Path::new("/proc/self/exe\0"), &[]).unwrap_err();

        assert!(matches!(error, MultiError::Path { .. }), "{error}");
    }

    /// Whether this kernel or the rights of this process rule out testing on the kernel.
    fn skipped() -> bool {
        match supported() {
            Ok(()) => false,
            Err(error) => {
                eprintln!("skipped, needs Linux 6.6, CAP_BPF and CAP_PERFMON: {error}");
                true
            }
        }
    }

    fn request(instructions: &[bpf_insn]) -> ProgramRequest<'_> {
        ProgramRequest {
            name: "counting_program",
            license: c"GPL",
            instructions,
            flags: 0,
            debug_info: None,
        }
    }

    /// A program that adds one to the element of the array that the cookie names.
    fn counting_program() -> Option<(MultiProgram, Array<MapData, u64>)> {
        if skipped() {
            return None;
        }
        let counts = Array::<MapData, u64>::create(8, 0).unwrap();
        let map_fd = counts.map().fd().as_fd().as_raw_fd();
        let call_helper = |helper: bpf_func_id| instruction(BPF_JMP | BPF_CALL, 0, 0, 0, helper as i32);
        let instructions = [
            call_helper(bpf_func_id::BPF_FUNC_get_attach_cookie),
            instruction(BPF_STX | BPF_MEM | BPF_W, 10, 0, -4, 0),
            instruction(BPF_ALU64 | BPF_MOV | BPF_X, 2, 10, 0, 0),
            instruction(BPF_ALU64 | BPF_ADD | BPF_K, 2, 0, 0, -4),
            instruction(BPF_LD | BPF_IMM | BPF_DW, 1, BPF_PSEUDO_MAP_FD as u8, 0, map_fd),
            instruction(0, 0, 0, 0, 0),
            call_helper(bpf_func_id::BPF_FUNC_map_lookup_elem),
            instruction(BPF_JMP | BPF_JEQ | BPF_K, 0, 0, 2, 0),
            instruction(BPF_ALU64 | BPF_MOV | BPF_K, 1, 0, 0, 1),
            instruction(BPF_STX | BPF_ATOMIC | BPF_DW, 0, 1, 0, BPF_ADD as i32),
            instruction(BPF_ALU64 | BPF_MOV | BPF_K, 0, 0, 0, 0),
            instruction(BPF_JMP | BPF_EXIT, 0, 0, 0, 0),
        ];
        let program = load_with_verifier_log(&request(&instructions)).unwrap();
        Some((MultiProgram { program }, counts))
    }

    fn all(counts: &Array<MapData, u64>) -> Vec<u64> {
        counts.iter().map(Result::unwrap).collect()
    }

    fn call(function: fn() -> u32) {
        black_box(black_box(function)());
    }

    /// The start of a function of this executable.
    fn site(function: fn() -> u32, cookie: u64) -> MultiSite {
        let address = function as usize as u64;
        let maps = fs::read_to_string("/proc/self/maps").unwrap();
        let file_offset = maps.lines().find_map(|line| {
            let mut words = line.split(' ');
            let (start, end) = words.next()?.split_once('-')?;
            let number = |digits| u64::from_str_radix(digits, 16).ok();
            let (start, end, offset) = (number(start)?, number(end)?, number(words.nth(1)?)?);
            (start..end).contains(&address).then(|| address - start + offset)
        });
        MultiSite {
            file_offset: file_offset.unwrap(),
            cookie,
        }
    }

    // Each test calls its own, as tests run at the same time in one process.
    #[inline(never)]
    fn first() -> u32 {
        black_box(1)
    }

    #[inline(never)]
    fn second() -> u32 {
        black_box(2)
    }

    #[inline(never)]
    fn third() -> u32 {
        black_box(3)
    }
}
