//! What watched processes hold, for the inventory: runtimes with their versions, and code objects.

use super::{Pipeline, watching::UNKNOWN_RUNTIME};
use crate::{process::guests::HeldCode, runtime::Embedding};

/// What one process holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Holding {
    /// Which.
    pub pid: u32,
    /// When it started, as in [`crate::span::Process`].
    pub start_ns: u64,
    /// Value of `wasm.runtime.name`; `unknown` if no file is known to have a runtime.
    pub runtime_name: &'static str,
    /// Versions that its code objects were made by, each once; untrusted.
    pub versions: Vec<String>,
    /// Of each file with a runtime in it: what kind, and whether it is stripped.
    pub files: Vec<(Embedding, bool)>,
    /// Code objects that were published. One whose owner has given it up since is among them until another takes its place.
    pub code: Vec<HeldCode>,
}

impl Pipeline {
    /// Processes that are watched now.
    pub fn watched_pids(&self) -> Vec<u32> {
        self.processes.keys().copied().collect()
    }

    /// What one of them holds.
    pub fn holding(&mut self, pid: u32) -> Option<Holding> {
        let watched = self.processes.get_mut(&pid)?;
        let versions = watched.guests.engine_versions();
        Some(Holding {
            pid,
            start_ns: watched.facts.start_ns,
            runtime_name: watched
                .hosts
                .first()
                .map_or(UNKNOWN_RUNTIME, |host| host.plan.runtime_name),
            versions: versions.into_iter().map(str::to_owned).collect(),
            files: watched
                .hosts
                .iter()
                .map(|host| (host.plan.embedding, host.plan.is_stripped))
                .collect(),
            code: watched.guests.held().collect(),
        })
    }
}
