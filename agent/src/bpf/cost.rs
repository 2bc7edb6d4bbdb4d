//! What one hit of a probe costs on this kernel, by the instruction it is on: measured on functions of this very process, so
//! that nobody else pays.

use std::{hint::black_box, io, time::Instant};

use wasmscope_common::ArgumentLocation::Lost;
use wasmscope_common::{EMIT_ACTIVATIONS, ProcessConfig, SiteCookie, SiteKind};

use super::{AttachError, Kernel, LoadError, LoadOptions, MapError, Ring, SiteProgram, UprobeSite};
use crate::process::maps;

/// Calls timed at a time.
const CALLS: u32 = 4000;
/// Room for the records of one timing, bytes.
const RING_BYTES: u32 = 4 << 20;

/// What a hit costs.
#[derive(Clone, Debug, PartialEq)]
pub struct HitCost {
    /// The instruction probed, and what the program does.
    pub what: &'static str,
    /// Whether the kernel is expected to emulate it rather than to single-step a copy.
    pub emulated: bool,
    /// Nanoseconds for a call without the probe, one for each round.
    pub untraced_ns: Vec<f64>,
    /// Nanoseconds that the probe adds, one for each round.
    pub added_ns: Vec<f64>,
}

/// Why costs could not be measured.
#[derive(Debug, thiserror::Error)]
pub enum CostError {
    /// The programs.
    #[error("cannot load the eBPF programs")]
    Load(#[from] LoadError),
    /// The sites.
    #[error(transparent)]
    Attach(#[from] AttachError),
    /// This process could not be watched.
    #[error("cannot watch this process")]
    Watch(#[source] MapError),
    /// Something to wait on.
    #[error("cannot start the runtime")]
    Runtime(#[source] io::Error),
    /// This process's mappings.
    #[error("cannot find the measured functions")]
    Mappings(#[source] io::Error),
}

macro_rules! victims {
    ($($name:ident: $what:literal, $emulated:literal, $code:literal;)*) => {
        $(
            core::arch::global_asm!(
                ".pushsection .text.wasmscope_cost,\"ax\",@progbits",
                ".balign 64",
                concat!(".globl ", stringify!($name)),
                concat!(".type ", stringify!($name), ",@function"),
                concat!(stringify!($name), ":"),
                $code,
                "ret",
                concat!(".size ", stringify!($name), ", .-", stringify!($name)),
                ".popsection",
            );
        )*
        // SAFETY: each is defined above, takes and returns nothing, and keeps every register that callers rely on.
        unsafe extern "C" {
            $(safe fn $name();)*
        }
        pub(super) const VICTIMS: &[Victim] = &[$(Victim { what: $what, emulated: $emulated, function: $name },)*];
    };
}

/// A function whose first instruction is probed.
pub(super) struct Victim {
    pub(super) what: &'static str,
    emulated: bool,
    pub(super) function: extern "C" fn(),
}

victims! {
    wasmscope_cost_nop: "nop", true, "nop";
    wasmscope_cost_push: "push r64", true, "push rbp\n pop rbp";
    wasmscope_cost_jmp: "jmp rel8", true, "jmp 2f\n 2:";
    wasmscope_cost_jcc: "jcc rel8", true, "je 2f\n 2:";
    wasmscope_cost_call: "call rel32", true, "call 2f\n 2: pop rax";
    wasmscope_cost_sub: "sub rsp, imm8", false, "sub rsp, 8\n add rsp, 8";
    wasmscope_cost_mov: "mov r64, r64", false, "mov rax, rdi";
    wasmscope_cost_endbr: "endbr64", false, "endbr64";
    wasmscope_cost_ret: "ret", false, "";
}

/// Measures in interleaved rounds: each round times each instruction without and with its probe.
pub fn measure(rounds: u32) -> Result<Vec<HitCost>, CostError> {
    // The ring is registered with a runtime, although nobody waits for it here.
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.map_err(CostError::Runtime)?;
    let _entered = runtime.enter();
    let (mut kernel, mut ring) = Kernel::load(LoadOptions {
        ring_bytes: RING_BYTES,
        watch_new_wasm: false,
        new_process_flags: 0,
    })?;
    let mut costs: Vec<_> = VICTIMS
        .iter()
        .map(|victim| HitCost {
            what: victim.what,
            emulated: victim.emulated,
            untraced_ns: Vec::new(),
            added_ns: Vec::new(),
        })
        .collect();
    let mut recorded = HitCost {
        what: "push r64, with a record",
        emulated: true,
        untraced_ns: Vec::new(),
        added_ns: Vec::new(),
    };
    for _ in 0..rounds {
        for (victim, cost) in VICTIMS.iter().zip(&mut costs) {
            time(&mut kernel, &mut ring, victim, cost)?;
        }
        let pid = std::process::id();
        let config = ProcessConfig {
            flags: EMIT_ACTIVATIONS,
            ..ProcessConfig::default()
        };
        kernel.watch(pid, config).map_err(CostError::Watch)?;
        let timed = time(&mut kernel, &mut ring, &VICTIMS[1], &mut recorded);
        kernel.unwatch(pid);
        timed?;
    }
    costs.push(recorded);
    Ok(costs)
}

fn time(kernel: &mut Kernel, ring: &mut Ring, victim: &Victim, cost: &mut HitCost) -> Result<(), CostError> {
    let site = UprobeSite {
        file_offset: file_offset(victim.function as usize as u64).map_err(CostError::Mappings)?,
        cookie: SiteCookie::new(SiteKind::Plain, Lost, Lost).0,
    };
    let untraced = call(victim);
    let executable = std::path::Path::new("/proc/self/exe");
    let links = kernel.attach_sites(executable, SiteProgram::MarkEnd, &[site])?;
    // The page becomes a private copy at the first hit.
    (victim.function)();
    let traced = call(victim);
    kernel.detach(links);
    ring.drain(usize::MAX, |_| {});
    cost.untraced_ns.push(untraced);
    cost.added_ns.push(traced - untraced);
    Ok(())
}

fn call(victim: &Victim) -> f64 {
    let function = black_box(victim.function);
    let start = Instant::now();
    for _ in 0..CALLS {
        function();
    }
    start.elapsed().as_nanos() as f64 / f64::from(CALLS)
}

pub(super) fn file_offset(address: u64) -> io::Result<u64> {
    maps::executable_mappings(std::process::id())?
        .into_iter()
        .find(|mapping| mapping.range.contains(&address))
        .map(|mapping| address - mapping.range.start + mapping.file_offset)
        .ok_or_else(|| io::Error::from(io::ErrorKind::NotFound))
}
