//! The agent on the real kernel, tracing real programs: what it says they did is compared with what they counted themselves.
//!
//! Needs root (or the capabilities that `wasmscope check` names), and leaves itself out loudly without them.

#![expect(clippy::unwrap_used, reason = "helpers of tests may fail as tests do")]

mod agent;
mod aggregates;
mod alerts;
mod bootstrap;
mod calls;
mod capabilities;
mod cold_start;
mod command_line;
mod components;
mod departures;
mod discovery;
mod drain;
mod export;
mod governor;
mod governor_levels;
mod grow;
mod growth;
mod helper_threads;
mod hostile;
mod interruptions;
mod inventory;
mod linking;
mod log;
mod metrics;
mod nested;
mod node;
mod panels;
mod parents;
mod pods;
mod python;
mod replay;
mod rows;
mod runwasi;
mod sampling;
mod scrape;
mod soak;
mod stripped;
mod stripped_components;
mod traced_metrics;
mod trap_kinds;
mod traps;
mod unknown_version;
mod untouched;
mod versions;
