//! What the running kernel and this process's privileges allow, found out by trying.

use std::path::Path;

use rustix::thread::{CapabilitySet, capabilities};

use super::{
    breakpoint,
    kernel_types::{VMLINUX_BTF, task_offsets},
    load::{Kernel, LoadError, LoadOptions},
    multi,
};

/// How bad it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Severity {
    /// It is there.
    Fine,
    /// Something is seen less well, or costs more.
    Degraded,
    /// Nothing can be traced.
    Blocking,
}

/// One thing that was looked at.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// What.
    pub name: &'static str,
    /// The verdict.
    pub severity: Severity,
    /// What was seen, in a few words.
    pub detail: String,
    /// What its lack costs and what to do about it.
    pub remedy: &'static str,
}

/// Capabilities, with what each is for.
const CAPABILITIES: [(&str, CapabilitySet, &str, Severity); 5] = [
    (
        "CAP_BPF",
        CapabilitySet::BPF,
        "loads programs and maps: without it nothing starts; run as root or `setcap cap_bpf+ep`",
        Severity::Blocking,
    ),
    (
        "CAP_PERFMON",
        CapabilitySet::PERFMON,
        "loads and attaches tracing programs: without it nothing starts; run as root or `setcap cap_perfmon+ep`",
        Severity::Blocking,
    ),
    (
        "CAP_SYS_PTRACE",
        CapabilitySet::SYS_PTRACE,
        "looks at processes of other users or with other capabilities: without it those are not seen",
        Severity::Degraded,
    ),
    (
        "CAP_DAC_READ_SEARCH",
        CapabilitySet::DAC_READ_SEARCH,
        "opens memory and binaries that only their owner may open: without it processes of other users are not seen",
        Severity::Degraded,
    ),
    (
        "CAP_CHECKPOINT_RESTORE",
        CapabilitySet::CHECKPOINT_RESTORE,
        "opens mapped libraries (libwasmtime.so): without it guests of hosts that use one are not seen",
        Severity::Degraded,
    ),
];

/// Looks at everything.
pub fn probe() -> Vec<Finding> {
    let mut findings = capability_findings();
    findings.push(architecture());
    findings.push(types());
    findings.push(match multi::supported() {
        Ok(()) => fine("uprobe.multi", "one link for all sites of a binary"),
        Err(multi::MultiError::Unsupported) => Finding {
            name: "uprobe.multi",
            severity: Severity::Degraded,
            detail: "needs Linux ≥ 6.6".to_owned(),
            remedy: "one perf event a site is used instead: detaching takes 0.1 s a site",
        },
        Err(error) => Finding {
            name: "uprobe.multi",
            severity: Severity::Degraded,
            detail: error.to_string(),
            remedy: "needs the capabilities above",
        },
    });
    findings.push(match breakpoint::supported() {
        Ok(()) => fine(
            "hardware breakpoints",
            "host functions of stripped programs can be learnt",
        ),
        Err(error) => Finding {
            name: "hardware breakpoints",
            severity: Severity::Degraded,
            detail: error.to_string(),
            remedy: "host calls of stripped programs stay unseen: end what else uses breakpoints, or keep symbols",
        },
    });
    findings.push(load());
    findings.push(pid_namespace());
    findings
}

fn capability_findings() -> Vec<Finding> {
    let effective = capabilities(None).map_or(CapabilitySet::empty(), |sets| sets.effective);
    // Before CAP_BPF and CAP_PERFMON existed, and still, this one covers both.
    let admin = effective.contains(CapabilitySet::SYS_ADMIN);
    CAPABILITIES
        .into_iter()
        .map(|(name, capability, remedy, severity)| {
            let covered = admin && matches!(name, "CAP_BPF" | "CAP_PERFMON" | "CAP_CHECKPOINT_RESTORE");
            if effective.contains(capability) || covered {
                fine(name, "")
            } else {
                Finding {
                    name,
                    severity,
                    detail: "not held".to_owned(),
                    remedy,
                }
            }
        })
        .collect()
}

fn architecture() -> Finding {
    if cfg!(target_arch = "x86_64") {
        fine("architecture", std::env::consts::ARCH)
    } else {
        Finding {
            name: "architecture",
            severity: Severity::Blocking,
            detail: std::env::consts::ARCH.to_owned(),
            remedy: "the programs read x86-64 registers; other architectures are not supported yet",
        }
    }
}

fn types() -> Finding {
    match task_offsets() {
        Ok(offsets) => fine(
            "kernel types (BTF)",
            &format!("task_struct.thread.fsbase at {}", offsets.fsbase),
        ),
        Err(error) => Finding {
            name: "kernel types (BTF)",
            severity: Severity::Blocking,
            detail: if Path::new(VMLINUX_BTF).exists() {
                error.to_string()
            } else {
                format!("{VMLINUX_BTF} is missing")
            },
            remedy: "run a kernel built with CONFIG_DEBUG_INFO_BTF (all current distributions do)",
        },
    }
}

/// The real thing, as `trace` does it.
fn load() -> Finding {
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_io().build() {
        Ok(runtime) => runtime,
        Err(error) => return failed(&error.to_string(), "the event loop cannot be started"),
    };
    let _guard = runtime.enter();
    match Kernel::load(LoadOptions {
        ring_bytes: 1 << 20,
        watch_new_wasm: false,
        new_process_flags: 0,
    }) {
        Ok(_) => fine("eBPF programs", "loaded and attached"),
        Err(LoadError::NotPermitted) => failed(
            "operation not permitted",
            "run as root (`sudo wasmscope …`) or grant the capabilities above",
        ),
        Err(error) => failed(&error.to_string(), "run Linux ≥ 6.1; `WASMSCOPE_LOG=debug` tells more"),
    }
}

/// The programs see pids of the kernel's own namespace.
fn pid_namespace() -> Finding {
    // The kernel's first pid namespace has this fixed number.
    const INITIAL: &str = "pid:[4026531836]";
    match std::fs::read_link("/proc/self/ns/pid") {
        Ok(link) if link.as_os_str() == INITIAL => fine("pid namespace", "the host's"),
        Ok(_) => Finding {
            name: "pid namespace",
            severity: Severity::Blocking,
            detail: "not the host's".to_owned(),
            remedy: "run with the host's pids (Kubernetes: hostPID: true; docker: --pid=host)",
        },
        Err(error) => failed(&error.to_string(), "mount /proc"),
    }
}

fn failed(detail: &str, remedy: &'static str) -> Finding {
    Finding {
        name: "eBPF programs",
        severity: Severity::Blocking,
        detail: detail.to_owned(),
        remedy,
    }
}

fn fine(name: &'static str, detail: &str) -> Finding {
    Finding {
        name,
        severity: Severity::Fine,
        detail: detail.to_owned(),
        remedy: "",
    }
}
