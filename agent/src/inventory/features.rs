//! The inventory as a file that the *local* source of Node Feature Discovery reads, which makes labels of the node of it.
//!
//! Its format is that of `source/local/local.go` of node-feature-discovery: a line is `name=value`; a line `# +expiry-time=` (RFC 3339) says until when
//! those below it count; files larger than 64 kB and those whose names begin with a dot are not read. Names and values are those of Kubernetes
//! labels: at most 63 letters, digits, `-`, `_` and `.`, a letter or digit at both ends. What does not fit is left out or replaced, never escaped.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs::{self, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use jiff::Timestamp;
use tracing::{info, warn};

use super::{Inventory, InventoryConfig, Snapshot};
use crate::clock::ClockAnchor;

/// Namespace that Node Feature Discovery takes labels in without being told to.
const NAMESPACE: &str = "feature.node.kubernetes.io/";
/// Longest name (after the namespace) and longest value of a label, bytes.
const MAX_LABEL_BYTES: usize = 63;
/// How often it is looked whether there is something to write.
const LOOK_INTERVAL: Duration = Duration::from_millis(500);

/// Keeps the file current, on a thread of its own; the file goes when this does.
#[derive(Debug)]
pub struct FeaturesFile {
    stop: Option<mpsc::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl FeaturesFile {
    /// Starts to write it, if the configuration names one.
    pub fn start(config: &InventoryConfig, inventory: Arc<Inventory>) -> io::Result<Option<Self>> {
        let Some(path) = config.nfd_features_file.clone() else {
            return Ok(None);
        };
        let (stop, stopped) = mpsc::channel();
        let writer = Writer {
            path,
            max_modules: config.nfd_max_modules,
            expiry: Duration::from_secs(config.nfd_expiry_seconds),
            inventory,
        };
        let thread = std::thread::Builder::new()
            .name("features".to_owned())
            .spawn(move || writer.run(&stopped))?;
        Ok(Some(Self {
            stop: Some(stop),
            thread: Some(thread),
        }))
    }
}

impl Drop for FeaturesFile {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

struct Writer {
    path: PathBuf,
    max_modules: usize,
    expiry: Duration,
    inventory: Arc<Inventory>,
}

impl Writer {
    fn run(&self, stopped: &mpsc::Receiver<()>) {
        let mut written: Option<(String, Instant)> = None;
        let mut is_failing = false;
        while stopped.recv_timeout(LOOK_INTERVAL) == Err(RecvTimeoutError::Timeout) {
            let snapshot = self.inventory.snapshot();
            if snapshot.generation == 0 {
                // Nobody has looked yet, which is not the same as that there is nothing.
                continue;
            }
            let labels = labels(&snapshot, self.max_modules);
            let is_current = written
                .as_ref()
                .is_some_and(|(text, at)| *text == labels && at.elapsed() < self.expiry / 2);
            if is_current {
                continue;
            }
            match replace(&self.path, &text(&labels, unix_seconds() + self.expiry.as_secs())) {
                Ok(()) => {
                    if is_failing || written.is_none() {
                        info!(path = %self.path.display(), "features of the node written");
                    }
                    is_failing = false;
                    written = Some((labels, Instant::now()));
                }
                Err(error) if !is_failing => {
                    is_failing = true;
                    warn!(path = %self.path.display(), %error, "features of the node cannot be written");
                }
                Err(_) => {}
            }
        }
        if written.is_some()
            && let Err(error) = fs::remove_file(&self.path)
        {
            warn!(path = %self.path.display(), %error, "features of the node stay until they expire");
        }
    }
}

/// As the clock has it now: it may have been set since the agent started.
fn unix_seconds() -> u64 {
    ClockAnchor::now().unix_ns / 1_000_000_000
}

/// The file's text. `expiry` is in seconds since 1970.
pub(super) fn text(labels: &str, expiry: u64) -> String {
    let time = Timestamp::from_second(expiry.cast_signed()).unwrap_or(Timestamp::MAX);
    format!("# Written by wasmscope, which removes it when it ends.\n# +expiry-time={time}\n{labels}")
}

/// The lines with labels. What is held by most processes comes first in the choice of modules.
pub(super) fn labels(snapshot: &Snapshot, max_modules: usize) -> String {
    let mut labels = BTreeMap::new();
    labels.insert("wasm".to_owned(), (snapshot.processes > 0).to_string());
    for row in &snapshot.runtimes {
        let runtime = &row.key.runtime;
        let mut add = |name: String| {
            if let Some(name) = label(&name) {
                labels.insert(name, "true".to_owned());
            }
        };
        add(format!("wasm-runtime.{runtime}"));
        // Of the version, its first number: that is what a guest compiled ahead of time has to match.
        let major = row.key.version.split('.').next().unwrap_or_default();
        if (1..=9).contains(&major.len()) && major.bytes().all(|byte| byte.is_ascii_digit()) {
            add(format!("wasm-runtime.{runtime}-{major}"));
        }
    }
    for row in snapshot.modules.iter().take(max_modules) {
        let Some(name) = label(&format!("wasm-module.{}", row.module_hash)) else {
            continue;
        };
        labels.insert(name, label(&row.module).unwrap_or_default());
        if row.warm_processes > 0
            && let Some(name) = label(&format!("wasm-module-warm.{}", row.module_hash))
        {
            labels.insert(name, "true".to_owned());
        }
    }
    let mut text = String::new();
    for (name, value) in labels {
        let _ = writeln!(text, "{NAMESPACE}{name}={value}");
    }
    text
}

/// Text as the name or value of a label: other characters become `_`, and what is left at the ends is cut; `None` if nothing is left.
pub(super) fn label(untrusted: &str) -> Option<String> {
    let replaced = untrusted.chars().map(|c| match c {
        c if c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.') => c,
        _ => '_',
    });
    let is_end = |c: char| !c.is_ascii_alphanumeric();
    // Where it begins is found first, so that the bound is that of what is kept.
    let kept: String = replaced.skip_while(|c| is_end(*c)).take(MAX_LABEL_BYTES).collect();
    let kept = kept.trim_end_matches(is_end);
    (!kept.is_empty()).then(|| kept.to_owned())
}

/// Writes a file so that nobody sees half of it: beside it, under a name that is not read, and then renamed.
pub(super) fn replace(path: &Path, text: &str) -> io::Result<()> {
    let name = path.file_name().ok_or(io::ErrorKind::InvalidInput)?;
    let mut hidden = std::ffi::OsString::from(".");
    hidden.push(name);
    hidden.push(".new");
    let temporary = path.with_file_name(hidden);
    match fs::remove_file(&temporary) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    // Nothing that was there before is followed or written to.
    let mut file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o644)
        .open(&temporary)?;
    let written = file
        .write_all(text.as_bytes())
        .and_then(|()| fs::rename(&temporary, path));
    if written.is_err() {
        let _ = fs::remove_file(&temporary);
    }
    written
}
