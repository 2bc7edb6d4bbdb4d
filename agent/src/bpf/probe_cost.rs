//! What one hit of each kind of probe costs here and now, measured in a moment with the programs that are loaded already, on
//! functions of this very process.

use std::{path::Path, time::Instant};

use wasmscope_common::ArgumentLocation::Lost;
use wasmscope_common::{EMIT_ACTIVATIONS, EMIT_SYSCALLS, ProcessConfig, SiteCookie, SiteKind};

use super::{
    Kernel, Ring, SiteProgram, UprobeSite,
    cost::{CostError, VICTIMS, file_offset},
};
use crate::governor::ProbeCosts;

/// Calls timed at a time: short, yet long beside an interrupt.
const CALLS: u32 = 400;
/// Timings, of which the least counts: whatever disturbs makes it more.
const ROUNDS: u32 = 5;

/// Measures. `taken` is given every record that was in the ring, and whether it was made by this.
pub(crate) fn measure(
    kernel: &mut Kernel,
    ring: &mut Ring,
    mut taken: impl FnMut(&[u8], bool),
) -> Result<ProbeCosts, CostError> {
    let pid = std::process::id();
    let untraced_syscall_ns = time(syscall);
    let find = |what: &str| VICTIMS.iter().find(|victim| victim.what == what);
    let (Some(push), Some(jcc), Some(ret)) = (find("push r64"), find("jcc rel8"), find("ret")) else {
        return Ok(ProbeCosts::default());
    };
    let mut sites = Vec::new();
    for victim in [push, jcc, ret] {
        sites.push(UprobeSite {
            file_offset: file_offset(victim.function as usize as u64).map_err(CostError::Mappings)?,
            cookie: SiteCookie::new(SiteKind::Plain, Lost, Lost).0,
        });
    }
    let links = kernel.attach_sites(Path::new("/proc/self/exe"), SiteProgram::MarkEnd, &sites)?;
    for victim in [push, jcc, ret] {
        // The page becomes a private copy at the first hit.
        (victim.function)();
    }
    let muted_ns = time(|| (push.function)());
    let config = ProcessConfig {
        flags: EMIT_ACTIVATIONS | EMIT_SYSCALLS,
        ..ProcessConfig::default()
    };
    let watched = kernel.watch(pid, config).map_err(CostError::Watch);
    let times = [push, jcc, ret].map(|victim| time(|| (victim.function)()));
    let syscall_ns = time(syscall) - untraced_syscall_ns;
    kernel.unwatch(pid);
    kernel.forget_own_threads();
    // Waiting until nobody runs the program any more takes longer than all of the above.
    std::thread::spawn(move || drop(links));
    ring.drain(usize::MAX, |bytes| {
        taken(bytes, bytes.get(8..12) == Some(&pid.to_ne_bytes()));
    });
    watched?;
    let [push_ns, jcc_ns, ret_ns] = times;
    let record_ns = (push_ns - muted_ns).max(0.0);
    let whole = |nanoseconds: f64| nanoseconds.max(1.0) as u64;
    Ok(ProbeCosts {
        // What was measured has no activation and so neither stack nor record: the stack costs about as much as the record.
        syscall_ns: whole(syscall_ns.max(0.0) + 2.0 * record_ns),
        activation_ns: whole(push_ns + record_ns),
        host_call_ns: whole(push_ns + record_ns),
        host_call_end_ns: whole(jcc_ns),
        host_call_end_stepped_ns: whole(ret_ns),
        mark_ns: whole(push_ns),
        muted_ns: whole(muted_ns),
        is_measured: true,
    })
}

/// The cheapest syscall: it only reads a number.
fn syscall() {
    // SAFETY: it takes nothing and cannot fail.
    unsafe { libc::syscall(libc::SYS_getppid) };
}

/// Nanoseconds of one call.
fn time(call: impl Fn()) -> f64 {
    (0..ROUNDS)
        .map(|_| {
            let start = Instant::now();
            for _ in 0..CALLS {
                call();
            }
            start.elapsed().as_nanos() as f64 / f64::from(CALLS)
        })
        .fold(f64::INFINITY, f64::min)
}
