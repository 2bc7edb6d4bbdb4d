//! Tasks of this repository; `cargo xtask --help` lists them.
mod toolchain;
fn main() {}
