//! Tests of pods on a second kernel, with cgroups of version 2 alone: Debian's 6.12 in a virtual machine that has of this one only the files
//! that the tests need, each at its own path. Processors are emulated, so it takes minutes and its times mean nothing.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, bail};

use crate::setup;
use crate::step::{Step, run_noting};
use crate::workspace::Workspace;

/// The tests that run there.
pub(crate) const TESTS: [&str; 2] = ["pods::", "node::"];
/// Depend on the newest kernel of their kind, for Debian 12 and 13. What the machine boots from is built in, so nothing but this and the disk is
/// needed.
const META_PACKAGES: [&str; 2] = ["linux-image-6.12-cloud-amd64", "linux-image-cloud-amd64"];
/// Networks of pods need it.
const MODULES: [&str; 1] = ["drivers/net/veth.ko.xz"];
/// What tests run, and what that is linked with.
const PROGRAMS: [&str; 10] = [
    "bash",
    "containerd",
    "containerd-shim-runc-v2",
    "ctr",
    "ldd",
    "mkfifo",
    "prometheus",
    "runc",
    "strip",
    "unshare",
];
const FILES: [&str; 3] = ["/bin/busybox", "/usr/lib/cni/host-local", "/usr/lib/cni/ptp"];
/// Its presence says which busybox that is.
const FOLDERS: [&str; 1] = ["/usr/share/doc/busybox-static"];
/// Written by its own name.
const INIT: &str = include_str!("second_kernel/init.sh");
/// With room for what the tests write.
const DISK: &str = "3G";
const MEMORY_MIB: &str = "3072";
/// An emulated processor is tens of times slower.
const DEADLINE_SECONDS: &str = "1800";
const LIMIT_SECONDS: &str = "3600";

/// Has the machine's disk made; the command that runs it prints what the tests print.
pub(crate) fn machine(workspace: &Workspace, tests: &[&str]) -> Result<Command> {
    let folder = workspace.target.join("second-kernel");
    fs::create_dir_all(&folder).with_context(|| format!("while creating {}", folder.display()))?;
    let kernel = Kernel::fetch(&folder)?;
    let disk = folder.join("disk");
    make_disk(workspace, &kernel, tests, &folder.join("root"), &disk)?;
    let mut command = Command::new("timeout");
    command
        .args([LIMIT_SECONDS, "qemu-system-x86_64"])
        .args([
            "-accel",
            "tcg,thread=multi",
            "-cpu",
            "max",
            "-smp",
            "2",
            "-m",
            MEMORY_MIB,
        ])
        .args(["-nographic", "-no-reboot", "-net", "none", "-kernel"])
        .arg(&kernel.image)
        .arg("-drive")
        .arg(format!("file={},if=none,id=disk,format=raw", disk.display()))
        .args(["-device", "nvme,drive=disk,serial=1"])
        .args([
            "-append",
            "console=ttyS0 root=/dev/nvme0n1 rw init=/init quiet panic=-1",
        ]);
    Ok(command)
}

/// A kernel of Debian's, unpacked and not installed.
struct Kernel {
    image: PathBuf,
    modules: PathBuf,
}

impl Kernel {
    fn fetch(folder: &Path) -> Result<Self> {
        let depends = META_PACKAGES.iter().find_map(|package| {
            let depends = run_noting(Command::new("apt-cache").args(["depends", package]), |_| ()).ok()?;
            let words = depends
                .split_whitespace()
                .find(|word| word.starts_with("linux-image-") && word != package)?;
            Some(words.to_owned())
        });
        let package = depends
            .as_deref()
            .with_context(|| format!("apt knows none of {}", META_PACKAGES.join(", ")))?;
        let release = package.trim_start_matches("linux-image-");
        let unpacked = folder.join(package);
        let kernel = Self {
            image: unpacked.join("boot").join(format!("vmlinuz-{release}")),
            modules: unpacked.join("lib/modules").join(release).join("kernel"),
        };
        if kernel.image.is_file() {
            return Ok(kernel);
        }
        let download = folder.join("download");
        fs::create_dir_all(&download)?;
        Step::run(
            format!("downloading {package} (apt-get)"),
            Command::new("apt-get")
                .args(["download", package])
                .current_dir(&download),
        )?;
        let file = fs::read_dir(&download)?
            .flatten()
            .map(|entry| entry.path())
            .find(|path| path.extension().is_some_and(|end| end == "deb"))
            .context("apt-get has left no package")?;
        Step::run(
            format!("unpacking {package}"),
            Command::new("dpkg").arg("--extract").arg(file).arg(&unpacked),
        )?;
        fs::remove_dir_all(&download)?;
        if !kernel.image.is_file() {
            bail!("{package} has no {}", kernel.image.display());
        }
        Ok(kernel)
    }
}

fn make_disk(workspace: &Workspace, kernel: &Kernel, words: &[&str], root: &Path, disk: &Path) -> Result<()> {
    let step = Step::start("making the disk of the virtual machine");
    if root.exists() {
        fs::remove_dir_all(root)?;
    }
    for folder in ["dev", "lib/modules", "proc", "root", "run", "sys", "tmp", "var/lib"] {
        fs::create_dir_all(root.join(folder))?;
    }
    for module in MODULES {
        let packed = root
            .join("lib/modules")
            .join(Path::new(module).file_name().context("modules have names")?);
        let file = kernel.modules.join(module);
        fs::copy(&file, &packed).with_context(|| format!("while copying {}", file.display()))?;
        run_noting(Command::new("xz").arg("--decompress").arg(&packed), |_| ())?;
    }

    let tests = kernel_tests(workspace)?;
    let agent = workspace.debug_binary("wasmscope");
    let hosts = workspace.target.join("release");
    let own = [tests.clone(), agent.clone(), hosts.join("workload-static")];
    let python = setup::python(workspace);
    let mut files: BTreeSet<PathBuf> = FILES.iter().map(PathBuf::from).collect();
    for program in PROGRAMS {
        files.insert(which(program)?);
    }
    let environment = workspace.tools().join("python");
    files.insert(environment.join("pyvenv.cfg"));
    files.insert(python.clone());
    let mut linked = BTreeSet::new();
    for file in files.iter().chain(&own) {
        linked.extend(libraries(file)?);
    }
    let (standard_library, extensions) = standard_library(&python)?;
    for extension in &extensions {
        linked.extend(libraries(extension)?);
    }
    files.extend(linked);
    for file in &files {
        let there = below(root, file)?;
        fs::copy(file, &there).with_context(|| format!("while copying {}", file.display()))?;
    }
    for folder in FOLDERS.iter().map(PathBuf::from).chain([
        standard_library,
        environment.join("lib"),
        workspace.root.join("deploy"),
        workspace.root.join("tests/python"),
    ]) {
        let there = below(root, &folder)?;
        let mut command = Command::new("cp");
        command
            .args(["--recursive", "--no-target-directory"])
            .arg(&folder)
            .arg(there);
        run_noting(&mut command, |_| ())?;
    }
    for file in own {
        let there = below(root, &file)?;
        // Debug information would be most of the disk.
        let mut strip = Command::new("objcopy");
        run_noting(strip.arg("--strip-debug").arg(&file).arg(&there), |_| ())?;
    }
    let variables = [
        ("WASMSCOPE_BIN", agent.as_path()),
        ("WASMSCOPE_TEST_HOSTS_DIR", &hosts),
        ("WASMSCOPE_TEST_PYTHON", &python),
        ("WASMSCOPE_TEST_DEADLINE_SECONDS", Path::new(DEADLINE_SECONDS)),
        ("CARGO_TARGET_DIR", &workspace.target),
    ];
    let lines: Vec<_> = variables
        .iter()
        .map(|(name, value)| format!("export {name}='{}'", value.display()))
        .collect();
    fs::write(root.join("variables"), lines.join("\n") + "\n")?;
    fs::write(root.join("program"), tests.display().to_string())?;
    fs::write(root.join("words"), words.join(" "))?;
    fs::write(root.join("init"), INIT)?;
    make_executable(&root.join("init"))?;

    if disk.exists() {
        fs::remove_file(disk)?;
    }
    let mut command = Command::new("mke2fs");
    command.args(["-q", "-t", "ext4", "-d"]).arg(root).arg(disk).arg(DISK);
    run_noting(&mut command, |_| ())?;
    fs::remove_dir_all(root)?;
    step.done("done");
    Ok(())
}

fn make_executable(file: &Path) -> Result<()> {
    use std::os::unix::fs::PermissionsExt as _;
    Ok(fs::set_permissions(file, fs::Permissions::from_mode(0o755))?)
}

/// The same path below `root`, in a folder that is there.
fn below(root: &Path, path: &Path) -> Result<PathBuf> {
    let there = root.join(path.strip_prefix("/")?);
    let folder = there.parent().context("it is in a folder")?;
    fs::create_dir_all(folder).with_context(|| format!("while creating {}", folder.display()))?;
    Ok(there)
}

fn which(program: &str) -> Result<PathBuf> {
    let found = crate::toolchain::on_path(program).into_iter().next();
    found.with_context(|| format!("no {program} here"))
}

/// What a file is linked with; nothing if it is not.
fn libraries(file: &Path) -> Result<Vec<PathBuf>> {
    let output = Command::new("ldd").arg(file).output().context("while running ldd")?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    Ok(text
        .split_whitespace()
        .filter(|word| word.starts_with('/') && !word.ends_with(':'))
        .map(PathBuf::from)
        .collect())
}

/// The executable of the tests on the real kernel.
fn kernel_tests(workspace: &Workspace) -> Result<PathBuf> {
    let words = [
        "test",
        "--locked",
        "--package",
        "wasmscope-tests",
        "--test",
        "kernel",
        "--no-run",
    ];
    let mut command = workspace.cargo(words);
    command.arg("--message-format=json");
    let messages = run_noting(&mut command, |_| ())?;
    let executable = messages.lines().rev().find_map(|line| {
        let message: serde_json::Value = serde_json::from_str(line).ok()?;
        (message["target"]["name"] == "kernel").then(|| message["executable"].as_str().map(PathBuf::from))?
    });
    executable.context("cargo names no executable of the kernel tests")
}

/// The folder of Python's own modules, and those of them that are linked.
fn standard_library(python: &Path) -> Result<(PathBuf, Vec<PathBuf>)> {
    const SCRIPT: &str = "import sysconfig; print(sysconfig.get_path('stdlib'))";
    let printed = run_noting(Command::new(python).args(["-c", SCRIPT]), |_| ())?;
    let folder = PathBuf::from(printed.trim());
    let extensions = folder.join("lib-dynload");
    let entries = fs::read_dir(&extensions).with_context(|| format!("while reading {}", extensions.display()))?;
    Ok((folder, entries.flatten().map(|entry| entry.path()).collect()))
}
