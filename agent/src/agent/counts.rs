//! What the kernel has counted, on its way into the metrics: read every second, with the names of the pods.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::event::{Event, EventKind};
use crate::inventory::Inventory;
use crate::metrics::Metrics;
use crate::pipeline::{AggregateRow, Pipeline};
use crate::place::{Lookup, Places};
use crate::span::Process;

/// How often the kernel's counts are read.
pub(super) const INTERVAL: Duration = Duration::from_secs(1);
/// Rows that may wait for the name of their pod; more go on without.
const MAX_HELD_ROWS: usize = 16_384;

/// Rows and processes between kernel and metrics.
#[derive(Debug)]
pub(super) struct Counts {
    places: Arc<Places>,
    inventory: Arc<Inventory>,
    held: VecDeque<(Instant, AggregateRow)>,
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

    /// Brings what is new into the metrics. With `is_last`, nothing waits any longer.
    pub(super) fn collect(&mut self, pipeline: &mut Pipeline, metrics: &Metrics, is_last: bool) {
        let now = Instant::now();
        // Their rows are among those that come now.
        let ended = std::mem::take(&mut self.ended);
        let rows = pipeline.collect_aggregates();
        for row in &rows {
            self.inventory.row(row);
        }
        self.held.extend(rows.into_iter().map(|row| (now, row)));
        let excess = self.held.len().saturating_sub(MAX_HELD_ROWS);
        for (index, (since, row)) in std::mem::take(&mut self.held).into_iter().enumerate() {
            let may_wait = !is_last && index >= excess && now.duration_since(since) < self.places.hold();
            match self.placed(row, may_wait) {
                Ok(row) => metrics.observe_aggregate(&row),
                Err(row) => self.held.push_back((since, row)),
            }
        }
        for process in ended {
            let owner = (process.pid, process.start_ns);
            let is_waited_for = |row: &AggregateRow| {
                row.process
                    .as_ref()
                    .is_some_and(|process| (process.pid, process.start_ns) == owner)
            };
            if self.held.iter().any(|(_, row)| is_waited_for(row)) {
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

    /// The row with the names of its pod, or as it is if they may still come.
    fn placed(&self, mut row: AggregateRow, may_wait: bool) -> Result<AggregateRow, AggregateRow> {
        let Some(process) = &row.process else { return Ok(row) };
        let place = match self.places.lookup(&process.place) {
            Lookup::Pending(_) if may_wait => return Err(row),
            Lookup::Known(place) | Lookup::Pending(place) => place,
        };
        if process.place != place {
            row.process = Some(Arc::new(Process {
                place,
                ..Process::clone(process)
            }));
        }
        Ok(row)
    }
}
