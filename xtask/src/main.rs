//! Hosts.
fn main() {}
