//! Everything that talks to `bpf(2)`: the only module that imports aya, and the only one of the agent that may be unsafe.

#![expect(unsafe_code, reason = "system calls that aya does not wrap take pointers")]

pub mod multi;
