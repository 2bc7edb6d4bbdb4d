//! What tests on the real kernel need: the programs under test, the privileges, Python and Node; and what is said when it is not there.

use std::ffi::OsString;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};

/// The kernel, for one test at a time: programs of several agents would compete for two cores and lose records.
#[derive(Debug)]
pub struct Kernel {
    _alone: MutexGuard<'static, ()>,
}

static ALONE: Mutex<()> = Mutex::new(());

impl Kernel {
    /// `None`, after saying so, if this process may not trace. With `CI=true` that is a failure.
    pub fn acquire() -> Option<Self> {
        static WHY_NOT: OnceLock<Option<String>> = OnceLock::new();
        let alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
        let why_not = WHY_NOT.get_or_init(|| {
            let output = Command::new(agent()).args(["check", "--no-processes"]).output();
            let output = output.expect("the agent can be run");
            let text = String::from_utf8_lossy(&output.stdout);
            (!output.status.success()).then(|| {
                text.split("tracing cannot work here:")
                    .last()
                    .unwrap_or_default()
                    .to_owned()
            })
        });
        match why_not {
            None => Some(Self { _alone: alone }),
            Some(why_not) => {
                left_out(why_not);
                None
            }
        }
    }
}

/// Says that the test that calls this is left out, past the harness's capture. With `CI=true` that is a failure.
pub fn left_out(why: &str) {
    let test = std::thread::current().name().unwrap_or("a test").to_owned();
    let why = why.split_whitespace().collect::<Vec<_>>().join(" ");
    assert!(!is_ci(), "{test} cannot run here, and CI=true: {why}");
    // Not `eprintln!`, which the harness swallows.
    let _ = writeln!(std::io::stderr(), "!! LEFT OUT: {test}: {why}");
}

fn is_ci() -> bool {
    std::env::var_os("CI").is_some_and(|value| value == "true")
}

/// The `wasmscope` binary: `WASMSCOPE_BIN`, else the one that cargo builds beside the tests.
pub fn agent() -> &'static Path {
    static AGENT: OnceLock<PathBuf> = OnceLock::new();
    AGENT.get_or_init(|| {
        std::env::var_os("WASMSCOPE_BIN").map_or_else(
            || {
                cargo(&["build", "--locked", "--package", "wasmscope", "--bins"]);
                target_directory().join("debug/wasmscope")
            },
            PathBuf::from,
        )
    })
}

/// A test host: in `WASMSCOPE_TEST_HOSTS_DIR`, else the release build that cargo makes beside the tests.
pub fn test_host(name: &str) -> PathBuf {
    static HOSTS: OnceLock<PathBuf> = OnceLock::new();
    let directory = HOSTS.get_or_init(|| {
        std::env::var_os("WASMSCOPE_TEST_HOSTS_DIR").map_or_else(
            || {
                cargo(&[
                    "build",
                    "--locked",
                    "--release",
                    "--package",
                    "wasmscope-test-hosts",
                    "--bins",
                ]);
                target_directory().join("release")
            },
            PathBuf::from,
        )
    });
    directory.join(name)
}

/// How a test host is linked, where that is not as usual.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Linking {
    /// Without an interpreter: `workload-static`.
    Static,
    /// At the addresses that the file says: `workload-fixed`.
    Fixed,
    /// Without an interpreter, against musl, and without unwinding: `workload-musl`.
    Musl,
}

/// A test host that is linked in another way than usual. `None`, after saying so as [`left_out`] does, if it is not.
pub fn linked_host(linking: Linking) -> Option<PathBuf> {
    const EXECUTABLE: u8 = 2;
    const INTERPRETER: &[u8] = b"/ld-linux-x86-64.so.2\0";
    const HEAD_BYTES: usize = 4096;
    /// A function that only musl has.
    const MUSL: &[u8] = b"\0libc_start_main_stage2\0";
    let name = match linking {
        Linking::Static => "workload-static",
        Linking::Fixed => "workload-fixed",
        Linking::Musl => "workload-musl",
    };
    let path = test_host(name);
    if linking == Linking::Musl && !path.exists() {
        left_out(&format!("{name} is built by `cargo xtask test --slow`"));
        return None;
    }
    let bytes = std::fs::read(&path).expect("test hosts are built");
    let head = &bytes[..bytes.len().min(HEAD_BYTES)];
    let is_fixed = head.get(16) == Some(&EXECUTABLE);
    let has_interpreter = head.windows(INTERPRETER.len()).any(|window| window == INTERPRETER);
    let is_as_named = match linking {
        Linking::Static => !has_interpreter,
        Linking::Fixed => is_fixed,
        Linking::Musl => !has_interpreter && bytes.windows(MUSL.len()).any(|window| window == MUSL),
    };
    if is_as_named {
        return Some(path);
    }
    left_out(&format!(
        "{name} was built without its linker flags, which `cargo xtask test` passes"
    ));
    None
}

/// A Python with everything of `tests/python/requirements.txt`: `WASMSCOPE_TEST_PYTHON`, else a virtual environment beside the tests, made
/// on first use. `None`, after saying so as [`left_out`] does, if there is none.
pub fn python() -> Option<&'static Path> {
    static PYTHON: OnceLock<Result<PathBuf, String>> = OnceLock::new();
    match PYTHON.get_or_init(find_python) {
        Ok(python) => Some(python),
        Err(why) => {
            left_out(why);
            None
        }
    }
}

/// The versions of wasmtime for Python that tests run against, oldest first.
pub fn wheel_versions() -> impl Iterator<Item = &'static str> {
    include_str!("../python/versions.txt").lines()
}

/// Directory with the package `wasmtime` in one of [`wheel_versions`]: in `WASMSCOPE_TEST_WHEELS`, else beside the tests, made on first
/// use. `None`, after saying so as [`left_out`] does, if there is none.
pub fn wheel(version: &str) -> Option<String> {
    let parent =
        std::env::var_os("WASMSCOPE_TEST_WHEELS").map_or_else(|| target_directory().join("wheels"), PathBuf::from);
    let wheel = parent.join(version);
    if !wheel.join("wasmtime/__init__.py").is_file() {
        let python = python()?;
        let words = ["-m", "pip", "install", "--quiet", "--only-binary=:all:", "--target"];
        let mut pip = Command::new(python);
        pip.args(words).arg(&wheel).arg(format!("wasmtime=={version}"));
        if let Err(why) = run(&mut pip) {
            left_out(&why);
            return None;
        }
    }
    Some(wheel.to_str().expect("cargo's directories are UTF-8").to_owned())
}

fn find_python() -> Result<PathBuf, String> {
    const NEEDED: &str = "import wasmtime, prometheus_client.openmetrics.parser, helm_python, kubernetes_validate";
    let environment = target_directory().join("python-venv");
    let python =
        std::env::var_os("WASMSCOPE_TEST_PYTHON").map_or_else(|| environment.join("bin/python"), PathBuf::from);
    let has_all = || {
        let output = Command::new(&python).args(["-c", NEEDED]).output();
        output.is_ok_and(|output| output.status.success())
    };
    if has_all() {
        return Ok(python);
    }
    let requirements = tests_directory().join("python/requirements.txt");
    if std::env::var_os("WASMSCOPE_TEST_PYTHON").is_none() {
        let words: [OsString; 3] = ["-m".into(), "venv".into(), environment.into()];
        run(Command::new("python3").args(words))?;
        run(Command::new(&python)
            .args(["-m", "pip", "install", "--quiet", "--requirement"])
            .arg(&requirements))?;
    }
    if has_all() {
        Ok(python)
    } else {
        Err(format!(
            "{} lacks what {} lists",
            python.display(),
            requirements.display()
        ))
    }
}

fn run(command: &mut Command) -> Result<(), String> {
    match command.output() {
        Ok(output) if output.status.success() => Ok(()),
        Ok(output) => Err(format!(
            "{command:?} failed: {}",
            String::from_utf8_lossy(&output.stderr)
        )),
        Err(error) => Err(format!("{command:?}: {error}")),
    }
}

/// Fails unless the real Mermaid takes the diagrams in `files`. Says so as [`left_out`] does where Node or the packages of `tests/mermaid`
/// are missing.
pub fn assert_mermaid_parses(files: &[PathBuf]) {
    let directory = tests_directory().join("mermaid");
    if !directory.join("node_modules").is_dir() {
        left_out(&format!(
            "no packages in {}: npm ci --prefix tests/mermaid",
            directory.display()
        ));
        return;
    }
    match Command::new("node")
        .arg(directory.join("parse.mjs"))
        .args(files)
        .output()
    {
        Err(error) => left_out(&format!("node: {error}")),
        Ok(output) => assert!(
            output.status.success(),
            "{}{}",
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr)
        ),
    }
}

/// `tests/` in the source tree.
pub fn tests_directory() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// Where cargo builds.
pub fn target_directory() -> PathBuf {
    let test = std::env::current_exe().expect("a test knows its binary");
    // <target>/debug/deps/<test>
    test.ancestors().nth(3).expect("cargo's layout").to_owned()
}

fn cargo(words: &[&str]) {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let status = Command::new(cargo)
        .args(words)
        .arg("--quiet")
        .env("CARGO_TARGET_DIR", target_directory())
        .current_dir(tests_directory())
        .status()
        .expect("cargo can be run");
    assert!(status.success(), "cargo {} failed", words.join(" "));
}
