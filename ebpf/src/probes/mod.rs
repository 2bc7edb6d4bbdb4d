//! Entry points, one file per thing that happens.

mod activation;
mod breakpoint;
mod helper;
mod host_call;
mod mark;
mod process;
mod request;
mod syscall;
mod trap;
