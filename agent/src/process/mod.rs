//! Processes as the agent sees them from outside: their memory, their mappings, what they are. Everything read here is
//! written by tenants and bounded.

pub mod code_store;
pub mod describe;
pub mod guests;
pub mod hosts;
pub mod looks;
pub mod maps;
pub mod memory;
pub mod patience;
pub mod reading;
