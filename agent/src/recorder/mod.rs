//! The flight recorder: of all traces the slowest, the failed and a random few of each (pod or process, module, export), in
//! full detail, in bounded memory, over a sliding window. Knows finished traces only; asks nothing of who makes them.
//!
//! A trace that is not wanted costs two hashes. One that is wanted is deflated ([`compact`]) outside the lock. Memory is shared
//! among pods: what is kept of the one that takes most goes first ([`keep`]).

mod api;
mod compact;
mod config;
mod keep;
mod key;
mod metrics;
mod page;
mod query;
mod random;
mod render;
pub mod time;

#[cfg(test)]
mod tests;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

pub use self::api::routes;
pub use self::config::RecorderConfig;
pub use self::metrics::RecorderCollector;
pub use self::query::{DEFAULT_LIMIT, Kept, MAX_LIMIT, MIN_ID_DIGITS, Order, Page, Query, Question, Summary, View};
pub use self::render::{Format, MAX_TEXT_BYTES, TooLong, render};

use self::keep::Keep;
use self::key::{Entry, Key};
use self::random::Random;
use crate::clock::{self, ClockAnchor};
use crate::span::{Capture, Loss, Trace, TraceId};

/// Keeps what is worth a look afterwards. Shared by whoever offers traces and whoever asks for them.
#[derive(Debug)]
pub struct Recorder {
    state: Mutex<State>,
    clock: ClockAnchor,
    kernel_release: String,
    started_ns: u64,
}

#[derive(Debug)]
struct State {
    keep: Keep,
    config: RecorderConfig,
}

/// What is true of a trace besides what is in it.
#[derive(Clone, Debug)]
pub struct Context {
    /// Its times on the wall clock.
    pub clock: ClockAnchor,
    /// The account as it was when the trace was kept: since when traces were seen, how many, on which kernel.
    pub capture: Capture,
    /// Why it was kept.
    pub kept_because: Vec<Kept>,
}

/// How full it is, and what became of what it was offered.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stats {
    /// Memory that kept traces, their index and their names take.
    pub bytes: u64,
    /// The most that it may be.
    pub max_bytes: u64,
    /// Traces kept.
    pub traces: u64,
    /// (pod or process, module, export) told apart.
    pub keys: u64,
    /// Traces offered.
    pub offered: u64,
    /// Traces that were none of the slowest, the failed or the random.
    pub not_wanted: u64,
    /// Kept ones that others took the place of.
    pub displaced: u64,
    /// Kept ones that were older than the window.
    pub window_passed: u64,
    /// Kept ones that were given up for lack of memory.
    pub over_budget: u64,
    /// Wanted ones that were too large.
    pub trace_too_large: u64,
    /// Those of exports beyond the number that is told apart.
    pub too_many_keys: u64,
}

impl Stats {
    /// What was lost though it was wanted. `window_passed` and `displaced` are no losses.
    pub fn losses(&self) -> impl Iterator<Item = Loss> + use<> {
        [
            ("over_budget", self.over_budget),
            ("trace_too_large", self.trace_too_large),
            ("too_many_keys", self.too_many_keys),
        ]
        .into_iter()
        .filter(|(_, count)| *count > 0)
        .map(|(reason, count)| Loss {
            layer: "recorder".to_owned(),
            reason: reason.to_owned(),
            count,
        })
    }
}

/// Why there is not exactly one trace.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FindError {
    /// The text is no id.
    #[error("{0}")]
    NotAnId(String),
    /// None is kept.
    #[error("no trace with that id is kept")]
    Unknown,
    /// Several begin with those digits.
    #[error("{} traces have that id or begin so, {} and {} among them; give more digits", .count, .first, .second)]
    Ambiguous {
        /// How many.
        count: usize,
        /// One of them.
        first: TraceId,
        /// Another.
        second: TraceId,
    },
}

/// A kept trace.
#[derive(Clone, Debug)]
pub struct Found {
    /// What a list says of it.
    pub summary: Summary,
    /// What is true of it besides.
    pub context: Context,
    compact: Arc<[u8]>,
    process: Arc<crate::span::Process>,
}

impl Found {
    /// The trace itself, which is made from its compact form.
    pub fn trace(&self) -> std::io::Result<Trace> {
        compact::decode(&self.compact, self.process.clone())
    }
}

impl Recorder {
    /// An empty one. `clock` ties the traces' times to the wall clock, `kernel_release` is what diagrams name.
    pub fn new(config: RecorderConfig, clock: ClockAnchor, kernel_release: String) -> Self {
        Self::with_random(config, clock, kernel_release, Random::unforeseeable())
    }

    fn with_random(config: RecorderConfig, clock: ClockAnchor, kernel_release: String, random: Random) -> Self {
        Self {
            state: Mutex::new(State {
                keep: Keep::new(&config, random),
                config,
            }),
            clock,
            kernel_release,
            started_ns: clock::monotonic_ns(),
        }
    }

    /// Offers a finished trace, which is kept or not. Never blocks for longer than a list takes to be made. Whether it was kept.
    pub fn offer(&self, trace: &Trace) -> bool {
        self.offer_at(trace, clock::monotonic_ns())
    }

    /// The same at a time of `CLOCK_MONOTONIC` that the caller knows; it should never go back.
    pub fn offer_at(&self, trace: &Trace, now_ns: u64) -> bool {
        let (place, max_bytes) = {
            let mut state = self.lock();
            let Some(place) = state.keep.offer(trace, now_ns) else {
                return false;
            };
            (place, state.config.max_trace_bytes())
        };
        let encoded = compact::encode(trace, max_bytes);
        let mut state = self.lock();
        if let Ok(compact) = encoded {
            let entry = Entry::new(trace, place.wanted, now_ns, place.offered_count, compact);
            state.keep.insert(place, entry);
            true
        } else {
            state.keep.counts.trace_too_large += 1;
            false
        }
    }

    /// Takes another configuration; what no longer fits is given up.
    pub fn reconfigure(&self, config: RecorderConfig) {
        let mut state = self.lock();
        state.keep.reconfigure(&config, clock::monotonic_ns());
        state.config = config;
    }

    /// How full it is, and what became of what it was offered.
    pub fn stats(&self) -> Stats {
        let mut state = self.lock();
        state.keep.expire(clock::monotonic_ns());
        let keep = &state.keep;
        let counts = keep.counts;
        Stats {
            bytes: keep.bytes() as u64,
            max_bytes: state.config.memory_bytes() as u64,
            traces: keep.trace_count() as u64,
            keys: keep.key_count() as u64,
            offered: counts.offered,
            not_wanted: counts.not_wanted,
            displaced: counts.displaced,
            window_passed: counts.window_passed,
            over_budget: counts.over_budget,
            trace_too_large: counts.trace_too_large,
            too_many_keys: counts.too_many_keys,
        }
    }

    /// Checks a question as of now.
    pub fn query(&self, question: Question) -> Result<Query, String> {
        question.check(ClockAnchor::now().unix_ns)
    }

    /// The kept traces that were asked for.
    pub fn list(&self, query: &Query) -> Page {
        self.list_at(query, clock::monotonic_ns())
    }

    fn list_at(&self, query: &Query, now_ns: u64) -> Page {
        let mut state = self.lock();
        state.keep.expire(now_ns);
        let keep = &state.keep;
        let views = keep.entries().map(|(key, entry)| self.view(key, entry));
        query.page(views, keep.trace_count())
    }

    /// The kept trace whose id is, or begins with, some digits; if there is none, the one that is part of such a trace of the
    /// application.
    pub fn find(&self, digits: &str) -> Result<Found, FindError> {
        let (first, last) = query::id_range(digits).map_err(FindError::NotAnId)?;
        let mut state = self.lock();
        state.keep.expire(clock::monotonic_ns());
        let of_application = |entry: &Entry| entry.application_id.is_some_and(|id| (first..=last).contains(&id));
        let mut own = state.keep.in_range(first, last).peekable();
        let mut matching: Box<dyn Iterator<Item = (&Key, &Entry)>> = if own.peek().is_some() {
            Box::new(own)
        } else {
            Box::new(state.keep.entries().filter(|(_, entry)| of_application(entry)))
        };
        let (key, entry) = matching.next().ok_or(FindError::Unknown)?;
        match matching.next() {
            None => Ok(self.found(key, entry)),
            Some((_, other)) => Err(FindError::Ambiguous {
                count: 2 + matching.count(),
                first: entry.id,
                second: other.id,
            }),
        }
    }

    fn found(&self, key: &Key, entry: &Entry) -> Found {
        let capture = Capture {
            start_ns: self.started_ns.min(entry.start_ns),
            end_ns: entry.at_ns,
            kernel_release: self.kernel_release.clone(),
            trace_count: entry.offered_count,
            ..Capture::default()
        };
        Found {
            summary: self.view(key, entry).summary(),
            context: Context {
                clock: self.clock,
                capture,
                kept_because: entry.wanted.reasons(),
            },
            compact: entry.compact.clone(),
            process: entry.process.clone(),
        }
    }

    fn view<'a>(&self, key: &'a Key, entry: &'a Entry) -> View<'a> {
        View {
            id: entry.id,
            application_id: entry.application_id,
            start_unix_ns: query::unix_ns(entry.start_ns, self.clock),
            duration_ns: entry.duration_ns,
            outcome: &entry.outcome,
            process: &entry.process,
            function: key.function.as_deref(),
            wanted: entry.wanted,
            span_count: entry.span_count,
            event_count: entry.event_count,
            loss_count: entry.loss_count,
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
