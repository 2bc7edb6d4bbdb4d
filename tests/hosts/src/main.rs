//! Hosts.
fn main(){}
