//! The eBPF programs: few and generic. They know shapes of events and how to follow a thread to its guest frames;
//! offsets, sites and filters are data that the agent puts into maps. Thin entry points live in `probes/`.
#![no_std]
#![no_main]
#![allow(
    clippy::needless_borrows_for_generic_args,
    reason = "keys and values passed by value would be copied to a stack of 512 bytes"
)]
#![feature(core_intrinsics)]
#![allow(internal_features, reason = "atomic addition of map values")]
#![allow(
    unsafe_code,
    reason = "every access to maps, registers and user memory goes through helpers"
)]

mod activation;
mod aggregate;
mod calibrate;
mod maps;
mod output;
mod probes;
mod thread;
mod user;

#[panic_handler]
fn panic(_info: &core::panic::PanicInfo) -> ! {
    loop {}
}

/// The verifier lets GPL-compatible programs use tracing helpers.
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
pub static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
