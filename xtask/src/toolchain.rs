//! Finds what turns `ebpf/` into an object: a compiler that has `core` for the BPF target, and `bpf-linker`.
//!
//! `agent/build.rs` includes this file by path, so it uses the standard library only and knows nothing of installing.

use std::collections::BTreeSet;
use std::env;
use std::ffi::{OsStr, OsString};
use std::fmt;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::UNIX_EPOCH;

/// The target of the eBPF programs.
pub(crate) const BPF_TARGET: &str = "bpfel-unknown-none";
/// The oldest compiler that takes the eBPF crate and what it depends on (`1.N`).
pub(crate) const OLDEST_RUST_MINOR: u32 = 95;
/// Below a target directory: what `cargo xtask setup` installed.
pub(crate) const TOOLS_DIRECTORY: &str = "tools";

const PINNED_FILE: &str = "ebpf-toolchain";

/// How a compiler comes by `core` for the BPF target.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum CoreLibrary {
    /// Ready-made, as in Debian's `libstd-rust-web-dev-bpf`.
    Prebuilt,
    /// From source with `-Z build-std=core`, as with rustup's `rust-src`.
    Source,
}

/// A compiler that can build for the BPF target.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Compiler {
    pub(crate) rustc: PathBuf,
    /// The `cargo` that came with it; building `core` from source wants the one that knows that source.
    pub(crate) cargo: Option<PathBuf>,
    pub(crate) core: CoreLibrary,
    /// Such as `1.96.0`.
    pub(crate) version: String,
    /// The linker's LLVM must be this or newer.
    pub(crate) llvm_major: u32,
}

impl fmt::Display for Compiler {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let core = match self.core {
            CoreLibrary::Prebuilt => "core ready-made",
            CoreLibrary::Source => "core from source",
        };
        let Self {
            rustc,
            version,
            llvm_major,
            ..
        } = self;
        write!(formatter, "{} ({version}, LLVM {llvm_major}, {core})", rustc.display())
    }
}

/// A compiler and a linker that go together.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Toolchain {
    pub(crate) compiler: Compiler,
    pub(crate) linker: PathBuf,
}

/// What was looked at and found unfit, with the reason, for an error that helps.
#[derive(Debug, Default)]
pub(crate) struct Search {
    pub(crate) compilers: Vec<Compiler>,
    pub(crate) linkers: Vec<PathBuf>,
    pub(crate) rejected: Vec<String>,
}

impl Toolchain {
    /// Reads back what [`Self::pin`] wrote; nothing when either tool has changed or gone since.
    pub(crate) fn read_pinned(target_directory: &Path) -> Option<Self> {
        let text = fs::read_to_string(target_directory.join(TOOLS_DIRECTORY).join(PINNED_FILE)).ok()?;
        let mut lines = text.lines();
        let rustc = PathBuf::from(lines.next()?);
        let linker = PathBuf::from(lines.next()?);
        if lines.next()? != fingerprint(&rustc)? || lines.next()? != fingerprint(&linker)? {
            return None;
        }
        let compiler = Compiler::inspect(&rustc).ok()?;
        Some(Self { compiler, linker })
    }

    /// Remembers this pair for later builds into `target_directory`.
    pub(crate) fn pin(&self, target_directory: &Path) -> io::Result<()> {
        let unreadable = || io::Error::other("a tool vanished while it was being recorded");
        let rustc_mark = fingerprint(&self.compiler.rustc).ok_or_else(unreadable)?;
        let linker_mark = fingerprint(&self.linker).ok_or_else(unreadable)?;
        let directory = target_directory.join(TOOLS_DIRECTORY);
        fs::create_dir_all(&directory)?;
        let (rustc, linker) = (self.compiler.rustc.display(), self.linker.display());
        let staged = directory.join(format!("{PINNED_FILE}.{}", std::process::id()));
        fs::write(&staged, format!("{rustc}\n{linker}\n{rustc_mark}\n{linker_mark}\n"))?;
        fs::rename(&staged, directory.join(PINNED_FILE))
    }

    /// `cargo SUBCOMMAND` for the BPF target in `package`, with nothing of the surrounding build leaking in.
    pub(crate) fn cargo(&self, subcommand: &str, package: &Path, target_directory: &Path) -> Command {
        let surrounding = env::var_os("CARGO").map_or_else(|| PathBuf::from("cargo"), PathBuf::from);
        let cargo = match (self.compiler.core, &self.compiler.cargo) {
            (CoreLibrary::Source, Some(cargo)) => cargo.clone(),
            _ => surrounding,
        };
        let mut command = Command::new(cargo);
        command
            .current_dir(package)
            .arg(subcommand)
            .args(["--target", BPF_TARGET]);
        if self.compiler.core == CoreLibrary::Source {
            command.args(["-Z", "build-std=core"]);
        }
        isolate(&mut command);
        let mut flags = OsString::from("-Clinker=");
        flags.push(&self.linker);
        flags.push("\u{1f}-Clink-arg=--btf");
        command
            .env("CARGO_TARGET_DIR", target_directory)
            .env("RUSTC", &self.compiler.rustc)
            // `aya-ebpf` uses feature gates on this target.
            .env("RUSTC_BOOTSTRAP", "1")
            .env("CARGO_ENCODED_RUSTFLAGS", flags);
        command
    }
}

/// Removes from `command` what an outer cargo, clippy or rustup would impose on an inner one, wrappers from configuration included.
pub(crate) fn isolate(command: &mut Command) {
    const KEPT: [&str; 5] = [
        "CARGO_HOME",
        "CARGO_HTTP_",
        "CARGO_MAKEFLAGS",
        "CARGO_NET_",
        "CARGO_REGISTR",
    ];
    for (name, _) in env::vars_os() {
        let text = name.to_string_lossy();
        let imposed = text.starts_with("CARGO") && !KEPT.iter().any(|kept| text.starts_with(kept));
        if imposed
            || text.starts_with("RUSTC")
            || text.starts_with("RUSTDOC")
            || text == "RUSTFLAGS"
            || text == "RUSTUP_TOOLCHAIN"
        {
            command.env_remove(&name);
        }
    }
    // Empty means none, also where a configuration file names one.
    command.env("RUSTC_WRAPPER", "").env("RUSTC_WORKSPACE_WRAPPER", "");
}

impl Compiler {
    /// What the compiler at `rustc` can do for the BPF target; the error is the reason it cannot be used.
    pub(crate) fn inspect(rustc: &Path) -> Result<Self, String> {
        let shown = rustc.display();
        let sysroot = PathBuf::from(output(rustc, &["--print", "sysroot"])?.trim());
        let verbose = output(rustc, &["-vV"])?;
        let field = |name: &str| {
            verbose
                .lines()
                .find_map(|line| line.strip_prefix(name))
                .map(str::trim)
                .unwrap_or_default()
                .to_owned()
        };
        let version = field("release:");
        let minor: u32 = version
            .split('.')
            .nth(1)
            .and_then(|part| part.parse().ok())
            .unwrap_or(0);
        if minor < OLDEST_RUST_MINOR {
            return Err(format!(
                "{shown}: version {version} is older than 1.{OLDEST_RUST_MINOR}"
            ));
        }
        let llvm = field("LLVM version:");
        let llvm_major = llvm.split('.').next().and_then(|part| part.parse().ok()).unwrap_or(0);
        let libraries = sysroot.join("lib/rustlib");
        let core = if has_core(&libraries.join(BPF_TARGET).join("lib")) {
            CoreLibrary::Prebuilt
        } else if libraries.join("src/rust/library/core/src/lib.rs").is_file() {
            CoreLibrary::Source
        } else {
            return Err(format!(
                "{shown}: has neither `core` for {BPF_TARGET} nor the source of it (`rust-src`)"
            ));
        };
        // A rustup proxy answers for another binary; name that one, so that the answer cannot change with the directory.
        let own = sysroot.join("bin/rustc");
        let cargo = Some(sysroot.join("bin/cargo")).filter(|path| path.is_file());
        let rustc = if own.is_file() { own } else { rustc.to_owned() };
        Ok(Self {
            rustc,
            cargo,
            core,
            version,
            llvm_major,
        })
    }
}

impl Search {
    /// Looks in `PATH`, `/usr/bin` and rustup's toolchains for compilers; in the target directories, cargo's home and `PATH` for linkers.
    pub(crate) fn run(target_directories: &[PathBuf]) -> Self {
        let mut found = Self::default();
        let mut seen = BTreeSet::new();
        for rustc in rustc_candidates() {
            match Compiler::inspect(&rustc) {
                Ok(compiler) => {
                    if seen.insert(compiler.rustc.clone()) {
                        found.compilers.push(compiler);
                    }
                }
                Err(reason) => found.rejected.push(reason),
            }
        }
        // `core` ready-made saves a minute on every cold build.
        found
            .compilers
            .sort_by_key(|compiler| compiler.core == CoreLibrary::Source);
        found.linkers = linker_candidates(target_directories);
        found
    }
}

/// The target directory that `inside` lies in: `$CARGO_TARGET_DIR`, or else the nearest one above it that bears cargo's marks.
pub(crate) fn target_directory_of(inside: &Path) -> Option<PathBuf> {
    if let Some(named) = directory_from("CARGO_TARGET_DIR")
        && inside.starts_with(&named)
    {
        return Some(named);
    }
    // Cargo tags only directories that it made itself, and writes the other file at the end of its first run.
    let is_marked = |directory: &&Path| {
        ["CACHEDIR.TAG", ".rustc_info.json"]
            .iter()
            .any(|name| directory.join(name).is_file())
    };
    inside.ancestors().skip(1).find(is_marked).map(Path::to_owned)
}

/// `$CARGO_HOME`, or `~/.cargo`.
pub(crate) fn cargo_home() -> Option<PathBuf> {
    directory_from("CARGO_HOME").or_else(|| Some(directory_from("HOME")?.join(".cargo")))
}

/// Every executable file called `name` on `PATH`, first match first.
pub(crate) fn on_path(name: &str) -> Vec<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    env::split_paths(&path)
        .map(|directory| directory.join(name))
        .filter(|file| is_executable(file))
        .collect()
}

/// Whether `file` is a regular file that someone may execute.
pub(crate) fn is_executable(file: &Path) -> bool {
    use std::os::unix::fs::PermissionsExt as _;
    fs::metadata(file).is_ok_and(|metadata| metadata.is_file() && metadata.permissions().mode() & 0o111 != 0)
}

fn rustc_candidates() -> Vec<PathBuf> {
    let mut candidates = on_path("rustc");
    candidates.push(PathBuf::from("/usr/bin/rustc"));
    if let Some(home) = directory_from("RUSTUP_HOME").or_else(|| Some(directory_from("HOME")?.join(".rustup"))) {
        let mut toolchains: Vec<_> = fs::read_dir(home.join("toolchains"))
            .into_iter()
            .flatten()
            .filter_map(|entry| Some(entry.ok()?.path().join("bin/rustc")))
            .collect();
        // A nightly's own cargo and source are made for `-Z build-std`; others work too.
        toolchains.sort_by_key(|path| (!path.to_string_lossy().contains("nightly"), path.clone()));
        candidates.extend(toolchains);
    }
    candidates.retain(|file| is_executable(file));
    let mut seen = BTreeSet::new();
    candidates.retain(|file| seen.insert(file.clone()));
    candidates
}

fn linker_candidates(target_directories: &[PathBuf]) -> Vec<PathBuf> {
    let installed = target_directories
        .iter()
        .map(|directory| directory.join(TOOLS_DIRECTORY));
    let homes = installed.chain(cargo_home());
    let mut candidates: Vec<_> = homes
        .map(|home| home.join("bin/bpf-linker"))
        .filter(|file| is_executable(file))
        .collect();
    candidates.extend(on_path("bpf-linker"));
    let mut seen = BTreeSet::new();
    candidates.retain(|file| seen.insert(file.clone()));
    candidates
}

fn has_core(directory: &Path) -> bool {
    let is_core = |name: &OsStr| {
        let name = name.to_string_lossy();
        name.starts_with("libcore-") && name.ends_with(".rlib")
    };
    fs::read_dir(directory).is_ok_and(|entries| entries.flatten().any(|entry| is_core(&entry.file_name())))
}

fn directory_from(variable: &str) -> Option<PathBuf> {
    env::var_os(variable)
        .filter(|value| !value.is_empty())
        .map(PathBuf::from)
}

/// Changes when the file does; cheap, and not meant to resist forgery.
fn fingerprint(file: &Path) -> Option<String> {
    let metadata = fs::metadata(file).ok()?;
    let modified_ns = metadata.modified().ok()?.duration_since(UNIX_EPOCH).ok()?.as_nanos();
    Some(format!("{} {modified_ns}", metadata.len()))
}

fn output(program: &Path, arguments: &[&str]) -> Result<String, String> {
    let mut command = Command::new(program);
    isolate(&mut command);
    let shown = program.display();
    let output = command
        .args(arguments)
        .output()
        .map_err(|error| format!("{shown}: {error}"))?;
    if !output.status.success() {
        let stderr = String::from_utf8_lossy(&output.stderr);
        return Err(format!("{shown}: {}", stderr.lines().next().unwrap_or("failed")));
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    /// A compiler of version `release` that answers as rustc does, with a sysroot in `directory`.
    fn fake_rustc(directory: &Path, release: &str) -> PathBuf {
        let sysroot = directory.display();
        let rustc = directory.join("bin/rustc");
        fs::create_dir_all(directory.join("bin")).unwrap();
        let script = format!(
            "#!/bin/sh\ncase $1 in --print) echo {sysroot};; *) echo 'release: {release}'; echo 'LLVM version: 22.1.8';; esac\n"
        );
        write_executable(&rustc, &script);
        rustc
    }

    fn write_executable(path: &Path, text: &str) {
        fs::write(path, text).unwrap();
        fs::set_permissions(path, fs::Permissions::from_mode(0o755)).unwrap();
    }

    fn add_core(directory: &Path) {
        let libraries = directory.join("lib/rustlib").join(BPF_TARGET).join("lib");
        fs::create_dir_all(&libraries).unwrap();
        fs::write(libraries.join("libcore-0123.rlib"), "").unwrap();
    }

    #[test]
    fn a_compiler_with_core_ready_made_is_usable() {
        let directory = tempfile::tempdir().unwrap();
        add_core(directory.path());
        let compiler = Compiler::inspect(&fake_rustc(directory.path(), "1.96.0")).unwrap();
        assert_eq!((compiler.core, compiler.llvm_major), (CoreLibrary::Prebuilt, 22));
    }

    #[test]
    fn a_compiler_with_the_source_of_core_is_usable() {
        let directory = tempfile::tempdir().unwrap();
        let source = directory.path().join("lib/rustlib/src/rust/library/core/src");
        fs::create_dir_all(&source).unwrap();
        fs::write(source.join("lib.rs"), "").unwrap();
        let compiler = Compiler::inspect(&fake_rustc(directory.path(), "1.97.0-nightly")).unwrap();
        assert_eq!(compiler.core, CoreLibrary::Source);
    }

    #[test]
    fn a_compiler_without_core_says_what_it_lacks() {
        let directory = tempfile::tempdir().unwrap();
        let reason = Compiler::inspect(&fake_rustc(directory.path(), "1.96.0")).unwrap_err();
        assert!(reason.contains("rust-src"), "{reason}");
    }

    #[test]
    fn an_old_compiler_says_that_it_is_old() {
        let directory = tempfile::tempdir().unwrap();
        add_core(directory.path());
        let reason = Compiler::inspect(&fake_rustc(directory.path(), "1.63.0")).unwrap_err();
        assert!(reason.contains("1.63.0 is older"), "{reason}");
    }

    #[test]
    fn what_was_pinned_holds_until_a_tool_changes() {
        let directory = tempfile::tempdir().unwrap();
        add_core(directory.path());
        let compiler = Compiler::inspect(&fake_rustc(directory.path(), "1.96.0")).unwrap();
        let linker = directory.path().join("bpf-linker");
        write_executable(&linker, "first");
        let toolchain = Toolchain {
            compiler,
            linker: linker.clone(),
        };
        toolchain.pin(directory.path()).unwrap();
        assert_eq!(Toolchain::read_pinned(directory.path()), Some(toolchain));

        write_executable(&linker, "a longer second");
        assert_eq!(Toolchain::read_pinned(directory.path()), None);
    }

    #[test]
    fn the_target_directory_is_the_nearest_one_that_cargo_has_marked() {
        let directory = tempfile::tempdir().unwrap();
        let inside = directory.path().join("debug/build/x/out");
        fs::create_dir_all(&inside).unwrap();
        assert_eq!(target_directory_of(&inside), None);
        fs::write(directory.path().join("CACHEDIR.TAG"), "").unwrap();
        assert_eq!(target_directory_of(&inside).as_deref(), Some(directory.path()));
    }

    #[test]
    fn an_inner_cargo_inherits_no_wrapper_and_keeps_its_home() {
        let mut command = Command::new("cargo");
        isolate(&mut command);
        let value = |name: &str| {
            command
                .get_envs()
                .find(|(key, _)| *key == name)
                .map(|(_, value)| value.map(OsStr::to_owned))
        };
        assert_eq!(value("RUSTC_WORKSPACE_WRAPPER"), Some(Some(OsString::new())));
        // Set by the cargo that runs this test.
        assert_eq!(value("CARGO_PKG_NAME"), Some(None));
        assert_eq!(value("CARGO_HOME"), None);
    }
}
