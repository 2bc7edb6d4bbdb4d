//! What the kernel has counted, and what cold starts have cost, on its way into the metrics: every second, with the names of
//! the pods.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::cli::cold::ColdCount;
use crate::event::{Event, EventKind};
use crate::inventory::Inventory;
use crate::metrics::Metrics;
use crate::pipeline::{AggregateRow, Pipeline};
use crate::place::{Lookup, Places};
use crate::span::{Place, Process};

/// How often the kernel's counts are read.
pub(super) const INTERVAL: Duration = Duration::from_secs(1);
/// Counts that may wait for the name of their pod; more go on without.
const MAX_HELD: usize = 16_384;

/// Something that waits for the name of its pod.
#[derive(Debug)]
enum Held {
    Row(AggregateRow),
    Cold(ColdCount),
}

impl Held {
    fn process(&self) -> Option<&Arc<Process>> {
        match self {
            Self::Row(row) => row.process.as_ref(),
            Self::Cold(count) => Some(&count.process),
        }
    }

    fn set_process(&mut self, process: Arc<Process>) {
        match self {
            Self::Row(row) => row.process = Some(process),
            Self::Cold(count) => count.process = process,
        }
    }

    fn observe(&self, metrics: &Metrics) {
        match self {
            Self::Row(row) => metrics.observe_aggregate(row),
            Self::Cold(count) => count.observe(metrics),
        }
    }
}

/// Counts and processes between kernel and metrics.
#[derive(Debug)]
pub(super) struct Counts {
    places: Arc<Places>,
    inventory: Arc<Inventory>,
    held: VecDeque<(Instant, Held)>,
    running: HashMap<u32, Process>,
    /// Ended, and their last rows may be to come.
    ended: Vec<Process>,
}

impl Counts {
    pub(super) fn new(places: Arc<Places>, inventory: Arc<Inventory>) -> Self {
        Self {
            places,
            inventory,
            held: VecDeque::new(),
            running: HashMap::new(),
            ended: Vec::new(),
        }
    }

    /// Notes which processes there are.
    pub(super) fn event(&mut self, event: &Event) {
        match &event.kind {
            EventKind::Process { process, .. } => {
                self.running.insert(event.pid, Process::clone(process));
            }
            EventKind::ProcessGone => self.ended.extend(self.running.remove(&event.pid)),
            _ => {}
        }
    }

    /// Takes what a cold start has cost, or that an instance was made.
    pub(super) fn cold(&mut self, count: ColdCount) {
        self.held.push_back((Instant::now(), Held::Cold(count)));
    }

    /// Brings what is new into the metrics. With `is_last`, nothing waits any longer.
    pub(super) fn collect(&mut self, pipeline: &mut Pipeline, metrics: &Metrics, is_last: bool) {
        let now = Instant::now();
        // Their rows are among those that come now.
        let ended = std::mem::take(&mut self.ended);
        let rows = pipeline.collect_aggregates();
        metrics.observe_kernel(pipeline);
        for row in &rows {
            self.inventory.row(row);
        }
        self.held.extend(rows.into_iter().map(|row| (now, Held::Row(row))));
        let excess = self.held.len().saturating_sub(MAX_HELD);
        for (index, (since, held)) in std::mem::take(&mut self.held).into_iter().enumerate() {
            let may_wait = !is_last && index >= excess && now.duration_since(since) < self.places.hold();
            match self.placed(held, may_wait) {
                Ok(held) => held.observe(metrics),
                Err(held) => self.held.push_back((since, held)),
            }
        }
        for process in ended {
            let owner = (process.pid, process.start_ns);
            let is_waited_for = |held: &Held| {
                held.process()
                    .is_some_and(|process| (process.pid, process.start_ns) == owner)
            };
            if self.held.iter().any(|(_, held)| is_waited_for(held)) {
                self.ended.push(process);
            } else {
                metrics.process_gone(&process);
                // Its successor in the same process, after an exec, has the same series' names or others.
                if let Some(running) = self.running.get(&process.pid) {
                    metrics.process_runs(running);
                }
            }
        }
        metrics.expire();
    }

    /// The process with the names of its pod, as far as they are known by now.
    pub(super) fn named(&self, process: &Arc<Process>) -> Arc<Process> {
        with_place(process, self.places.named(&process.place))
    }

    /// With the names of its pod, or as it is if they may still come.
    fn placed(&self, mut held: Held, may_wait: bool) -> Result<Held, Held> {
        let Some(process) = held.process() else { return Ok(held) };
        let place = match self.places.lookup(&process.place) {
            Lookup::Pending(_) if may_wait => return Err(held),
            Lookup::Known(place) | Lookup::Pending(place) => place,
        };
        let process = with_place(process, place);
        held.set_process(process);
        Ok(held)
    }
}

fn with_place(process: &Arc<Process>, place: Place) -> Arc<Process> {
    if process.place == place {
        return Arc::clone(process);
    }
    Arc::new(Process {
        place,
        ..Process::clone(process)
    })
}
