//! Hardware breakpoints on guest code, armed for one hit, to learn where a host without symbols has its functions.
//!
//! They are perf events, one a CPU for all processes: guest code of a process runs on whichever thread, and threads come
//! and go. The kernel takes them away when their descriptors are closed, however the agent ends.

use std::{
    io, mem,
    os::fd::{AsFd as _, AsRawFd as _, FromRawFd as _, OwnedFd, RawFd},
};

use aya::{Ebpf, programs::PerfEvent};
use aya_obj::generated::{perf_event_attr, perf_event_sample_format, perf_type_id};

use super::load::Kernel;

/// A CPU of x86-64 takes four; one is left to debuggers.
pub const MAX_BREAKPOINTS: usize = 3;
/// The program.
const PROGRAM: &str = "host_function_sought";
/// `HW_BREAKPOINT_X`
const ON_EXECUTION: u32 = 4;
const PERF_FLAG_FD_CLOEXEC: libc::c_ulong = 8;

/// A breakpoint at one address of every process, to which its program pays attention in those that are watched. Disarmed
/// after the first hit on each CPU, and when dropped.
#[derive(Debug)]
#[must_use = "the breakpoint is taken away when this is dropped"]
pub struct Breakpoint {
    _events: Vec<OwnedFd>,
}

impl Kernel {
    /// Arms a breakpoint at a user address. `ENOSPC`: something else uses the registers that it needs.
    pub fn break_at(&self, address: u64) -> io::Result<Breakpoint> {
        let program = program(&self.ebpf)?;
        let cpus = aya::util::online_cpus().map_err(|(_, error)| error)?;
        let mut events = Vec::with_capacity(cpus.len());
        for cpu in cpus {
            let Ok(cpu) = i32::try_from(cpu) else { continue };
            let event = open(address, cpu)?;
            control(&event, PERF_EVENT_IOC_SET_BPF, program)?;
            // Enables it for one hit.
            control(&event, PERF_EVENT_IOC_REFRESH, 1)?;
            events.push(event);
        }
        Ok(Breakpoint { _events: events })
    }
}

/// Whether a breakpoint can be had on the first CPU. It is not armed.
pub(super) fn supported() -> io::Result<()> {
    let cpus = aya::util::online_cpus().map_err(|(_, error)| error)?;
    let first = cpus.first().and_then(|cpu| i32::try_from(*cpu).ok()).unwrap_or(0);
    open(supported as *const () as u64, first).map(drop)
}

/// Loads the program, unless the kernel does not want it: breakpoints are then not to be had.
pub(super) fn load(ebpf: &mut Ebpf) {
    let loaded = ebpf
        .program_mut(PROGRAM)
        .and_then(|program| <&mut PerfEvent>::try_from(program).ok())
        .map(PerfEvent::load);
    if let Some(Err(error)) = loaded {
        tracing::warn!(
            error = &error as &dyn std::error::Error,
            "no breakpoints: host functions of stripped programs cannot be learnt"
        );
    }
}

fn program(ebpf: &Ebpf) -> io::Result<RawFd> {
    let unsupported = || io::Error::from(io::ErrorKind::Unsupported);
    let program = ebpf.program(PROGRAM).ok_or_else(unsupported)?;
    let program = <&PerfEvent>::try_from(program).map_err(|_| unsupported())?;
    Ok(program.fd().map_err(|_| unsupported())?.as_fd().as_raw_fd())
}

/// `_IOW('$', 8, u32)`
const PERF_EVENT_IOC_SET_BPF: libc::c_ulong = 0x4004_2408;
/// `_IO('$', 2)`
const PERF_EVENT_IOC_REFRESH: libc::c_ulong = 0x2402;

fn control(event: &OwnedFd, request: libc::c_ulong, argument: i32) -> io::Result<()> {
    // SAFETY: both requests take a number, and the descriptor is open.
    let result = unsafe { libc::ioctl(event.as_raw_fd(), request, libc::c_long::from(argument)) };
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

fn open(address: u64, cpu: i32) -> io::Result<OwnedFd> {
    // SAFETY: a structure of integers and unions of them, for all of which zero is a value.
    let mut attributes: perf_event_attr = unsafe { mem::zeroed() };
    attributes.type_ = perf_type_id::PERF_TYPE_BREAKPOINT as u32;
    attributes.size = size_of::<perf_event_attr>() as u32;
    attributes.__bindgen_anon_1.sample_period = 1;
    attributes.sample_type = perf_event_sample_format::PERF_SAMPLE_IP as u64;
    attributes.bp_type = ON_EXECUTION;
    attributes.__bindgen_anon_3.bp_addr = address;
    attributes.__bindgen_anon_4.bp_len = size_of::<libc::c_long>() as u64;
    attributes.set_disabled(1);
    attributes.set_exclude_kernel(1);
    attributes.set_exclude_hv(1);
    // SAFETY: the kernel reads `size` bytes of attributes, which outlive the call. All processes, one CPU, no group.
    let result = unsafe {
        libc::syscall(
            libc::SYS_perf_event_open,
            &raw const attributes,
            -1,
            cpu,
            -1,
            PERF_FLAG_FD_CLOEXEC,
        )
    };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the descriptor is new, so nothing else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(result as RawFd) })
}
