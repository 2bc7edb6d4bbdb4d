//! What crosses the boundary between the eBPF programs and the agent: ring records, map values, site cookies, counters.
//!
//! Every type is plain data with an explicit layout, asserted at compile time, so that both sides agree without a build
//! step. Nothing here knows a runtime by name; offsets and sites are data that the agent computes.
#![no_std]

mod aggregate;
mod counters;
mod records;
mod site;
mod state;

pub use aggregate::{
    AggregateKey, AggregateStats, BUCKET_COUNT, BUCKET_SCALE, CALL_UNFINISHED, DETAIL_OTHER, ENDED_BY_FAILED_CALL,
    ENDED_BY_ITSELF, ENDED_IN_CALL, ENDED_UNSEEN, ENDED_UNSURE, KIND_BITS, KIND_HOST_CALL, KIND_INVOCATION, KIND_NONE,
    KIND_SYSCALL, MAX_ROWS, MAX_ROWS_PER_PROCESS, MAX_SHARDS, OTHER_ROWS, OpenActivation, OpenKey, PARENT_UNKNOWN,
    ZERO_SECONDS_LOG2, bucket_of,
};
pub use counters::{COUNTER_SLOTS, Counter};
pub use records::{
    ActivationSwap, COMPONENT_CALL, CONTINUES, Calibrated, CodePublished, DOES_NOT_RETURN, Descriptor,
    HOST_FUNCTIONS_SOUGHT, HelperSyscall, HostCall, HostCallEnd, HttpRequest, IMPORT_TABLE_BYTES,
    IMPORT_TABLE_CHUNK_BYTES, ImportTable, MARK_ARGUMENTS, MAX_FRAMES, MAX_GLANCE_BYTES, MAX_RECORD_BYTES, MAY_BE_FILE,
    Mark, MarkEnd, ProcessEvent, REQUEST_HEAD_BYTES, RecordHeader, RecordKind, SLOT_UNKNOWN, STACK_TRUNCATED, Syscall,
    THREAD_MULTIPLEXES, Trap, Unwind,
};
pub use site::{ArgumentLocation, MAX_FILE_NUMBER, MAX_FRAME_BYTES, SiteCookie, SiteKind};
pub use state::{
    AGGREGATE_CALLS, AGGREGATE_INVOCATIONS, AGGREGATE_SYSCALLS, EMIT_ACTIVATIONS, EMIT_HOST_CALLS, EMIT_REQUESTS,
    EMIT_SYSCALLS, HIT_ACTIVATION, HIT_HELPER, HIT_HOST_CALL, HIT_HOST_CALL_END, HIT_KINDS, HIT_MARK, HIT_SYSCALL,
    HandedOver, HelperTask, KEEP_TLS_ON_EXEC, LAYOUT_ALIKE, LAYOUT_BASE, LAYOUT_ENTRY_SP, LAYOUT_GUEST_EXIT,
    LAYOUT_NO_HANDLER, LAYOUT_NO_RESULT, LAYOUT_UNSUPPORTED, MAX_COPIES, MAX_PROCESSES, MAX_TABLES_PER_CALL_SITE,
    MAX_THREADS, MAX_THREADS_PER_PROCESS, Observed, OpenRequest, ProbeHits, ProcessConfig, RuntimeCopy, STORE_WORDS,
    SeenCallSite, SeenCallee, THREAD_BYTES, TLS_DYNAMIC, TLS_SEARCH, TLS_STATIC, TLS_UNKNOWN, ThreadHead,
    WATCH_NEW_WASM,
};
