//! Traces wait here until their pod is known, a bounded number for a bounded time.

use std::{
    collections::{HashMap, VecDeque},
    sync::Arc,
    time::{Duration, Instant},
};

use super::{Lookup, Places};
use crate::span::{Place, Process, Trace};

/// Processes whose description with names is shared among their traces.
const MAX_SHARED: usize = 4_096;

/// How often it is looked whether an answer has come, when there is nothing else to do.
const LOOK_INTERVAL: Duration = Duration::from_millis(20);

#[derive(Debug)]
struct Held {
    since: Instant,
    trace: Trace,
    /// Estimated memory, once it has had to wait.
    byte_count: usize,
}

/// Lets traces through once they say where their process runs.
#[derive(Debug)]
pub struct PlaceStage {
    places: Arc<Places>,
    held: VecDeque<Held>,
    max_held: usize,
    max_bytes: usize,
    /// By pid and start: the description as it came, and the one with names.
    shared: HashMap<(u32, u64), (Arc<Process>, Arc<Process>)>,
}

impl PlaceStage {
    /// At most `max_held` traces wait.
    pub fn new(places: Arc<Places>, max_held: usize) -> Self {
        Self {
            places,
            held: VecDeque::new(),
            max_held,
            max_bytes: usize::MAX,
            shared: HashMap::new(),
        }
    }

    /// Those that wait take so much memory at most, bytes.
    #[must_use]
    pub fn with_max_bytes(mut self, max_bytes: usize) -> Self {
        self.max_bytes = max_bytes;
        self
    }

    /// Takes traces and gives those whose pod is known, and those that have waited too long. To be called at every turn, with or without new ones:
    /// it never waits itself. Traces of one process keep their order.
    pub fn pass(&mut self, traces: Vec<Trace>) -> Vec<Trace> {
        let now = Instant::now();
        if self.held.is_empty() && traces.is_empty() {
            return Vec::new();
        }
        self.held.extend(traces.into_iter().map(|trace| Held {
            since: now,
            trace,
            byte_count: 0,
        }));
        let mut answers: HashMap<Place, Lookup> = HashMap::new();
        let mut ready = Vec::new();
        let mut waiting = VecDeque::new();
        for mut held in std::mem::take(&mut self.held) {
            let place = &held.trace.process.place;
            if !answers.contains_key(place) {
                answers.insert(place.clone(), self.places.lookup(place));
            }
            match &answers[place] {
                Lookup::Known(known) => {
                    let known = known.clone();
                    ready.push(self.filled(held.trace, known));
                }
                Lookup::Pending(_) if now.duration_since(held.since) < self.places.hold() => {
                    if held.byte_count == 0 {
                        held.byte_count = held.trace.estimated_bytes();
                    }
                    waiting.push_back(held);
                }
                Lookup::Pending(so_far) => {
                    self.places.count("hold", "timeout");
                    let so_far = so_far.clone();
                    ready.push(self.filled(held.trace, so_far));
                }
            }
        }
        self.held = waiting;
        let mut byte_count: usize = self.held.iter().map(|held| held.byte_count).sum();
        while self.held.len() > self.max_held || byte_count > self.max_bytes {
            let Some(held) = self.held.pop_front() else { break };
            byte_count -= held.byte_count;
            self.places.count("hold", "overflow");
            let so_far = self.places.named(&held.trace.process.place);
            ready.push(self.filled(held.trace, so_far));
        }
        ready
    }

    /// At the end: gives all, with what is known by now. Those that still waited are counted.
    pub fn flush(&mut self) -> Vec<Trace> {
        let mut ready = self.pass(Vec::new());
        let held = std::mem::take(&mut self.held);
        ready.extend(held.into_iter().map(|Held { trace, .. }| {
            self.places.count("hold", "shutdown");
            let place = self.places.named(&trace.process.place);
            self.filled(trace, place)
        }));
        ready
    }

    /// At the end: waits until `until`, no longer than a trace ever waits, and gives all.
    pub async fn finish(&mut self, until: Instant) -> Vec<Trace> {
        let mut ready = self.pass(Vec::new());
        while !self.held.is_empty() && Instant::now() < until {
            let look = Instant::now() + LOOK_INTERVAL;
            tokio::time::sleep_until(look.min(until).into()).await;
            ready.append(&mut self.pass(Vec::new()));
        }
        ready.append(&mut self.flush());
        ready
    }

    /// Traces that wait.
    pub fn held_count(&self) -> usize {
        self.held.len()
    }

    fn filled(&mut self, mut trace: Trace, place: Place) -> Trace {
        if trace.process.place == place {
            return trace;
        }
        let key = (trace.process.pid, trace.process.start_ns);
        if let Some((before, after)) = self.shared.get(&key)
            && (Arc::ptr_eq(before, &trace.process) || **before == *trace.process)
            && after.place == place
        {
            trace.process = after.clone();
            return trace;
        }
        let before = trace.process.clone();
        let after = Arc::new(Process {
            place,
            ..Process::clone(&before)
        });
        if self.shared.len() >= MAX_SHARED {
            self.shared.clear();
        }
        self.shared.insert(key, (before, after.clone()));
        trace.process = after;
        trace
    }
}
