//! What happens to a trace after the event loop, in order. A stage is a few lines in [`Stages::take`], and what it holds a field.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::sync::{mpsc, watch};

use super::drain::{Schedule, Transit};
use super::exports::{Exports, Prepared};
use super::queue::Waiting;
use crate::config::Config;
use crate::metrics::Metrics;
use crate::place::{PlaceStage, Places};
use crate::recorder::Recorder;
use crate::sink::otlp::{ExportCounts, StartError};
use crate::span::Trace;

/// How often what sinks have lost is brought into the metrics.
const LOSSES_INTERVAL: Duration = Duration::from_secs(1);
/// How often it is looked whether a pod that traces wait for is known.
const HELD_INTERVAL: Duration = Duration::from_millis(100);
/// Traces handled at once.
const MAX_BATCH: usize = 256;

/// The stages.
pub(super) struct Stages {
    /// Who knows pods by name.
    pub(super) places: Arc<Places>,
    /// Where traces are counted.
    pub(super) metrics: Arc<Metrics>,
    /// Where some are kept.
    pub(super) recorder: Arc<Recorder>,
    /// The way to the collector.
    pub(super) exports: Exports,
    /// How many wait for the names of their pod.
    pub(super) held: AtomicU64,
    /// How many traces have come through.
    pub(super) transit: Arc<Transit>,
    /// What has not come through.
    pub(super) waiting: Waiting,
}

impl Stages {
    /// Takes traces until there are no more senders; what the exporter still has is then its own to send. At most `max_held`, of `max_held_bytes` at most,
    /// wait for the names of their pod, and none once `stop` says that there is no more time for names.
    pub(super) async fn run(
        &self,
        mut traces: mpsc::Receiver<Trace>,
        max_held: usize,
        max_held_bytes: usize,
        mut stop: watch::Receiver<Option<Schedule>>,
    ) {
        let mut place = PlaceStage::new(self.places.clone(), max_held).with_max_bytes(max_held_bytes);
        let mut batch = Vec::new();
        let mut losses = tokio::time::interval(LOSSES_INTERVAL);
        let mut held = tokio::time::interval(HELD_INTERVAL);
        let mut is_open = true;
        let no_more_time = async move {
            let schedule = stop.wait_for(Option::is_some).await.map(|schedule| *schedule);
            // Otherwise nobody is left who could say until when.
            if let Ok(Some(schedule)) = schedule {
                tokio::time::sleep_until(schedule.names.into()).await;
            }
        };
        tokio::pin!(no_more_time);
        let mut has_time = true;
        while is_open || place.held_count() > 0 {
            tokio::select! {
                count = traces.recv_many(&mut batch, MAX_BATCH), if is_open => {
                    is_open = count > 0;
                    self.take_all(place.pass(std::mem::take(&mut batch)));
                }
                _ = held.tick(), if place.held_count() > 0 => self.take_all(place.pass(Vec::new())),
                _ = losses.tick() => self.count_losses(),
                () = &mut no_more_time, if has_time => has_time = false,
            }
            if !has_time {
                self.take_all(place.flush());
            }
            self.held.store(place.held_count() as u64, Ordering::Relaxed);
        }
    }

    /// How many traces wait for the names of their pod.
    pub(super) fn held_count(&self) -> u64 {
        self.held.load(Ordering::Relaxed)
    }

    /// Makes what a new configuration needs; nothing has changed yet.
    pub(super) fn prepare(&self, config: &Config) -> Result<Prepared, StartError> {
        self.exports.prepare(&config.traces)
    }

    /// Puts in force what can be changed while running. Cannot fail.
    pub(super) fn commit(&self, prepared: Prepared, config: &Config) {
        self.exports.commit(prepared);
        self.recorder.reconfigure(config.recorder.clone());
    }

    fn take_all(&self, traces: Vec<Trace>) {
        for trace in traces {
            self.take(&Arc::new(trace));
        }
    }

    /// All stages, for one trace. None of them may wait.
    fn take(&self, trace: &Arc<Trace>) {
        self.metrics.observe_trace(trace);
        let is_recorded = self.recorder.offer(trace);
        let is_exported = self.exports.offer(Arc::clone(trace));
        // An example is one that can be looked up.
        if is_exported || is_recorded && !self.exports.is_exporting() {
            self.metrics.exemplify(trace);
        }
        self.transit.through.fetch_add(1, Ordering::Relaxed);
        self.waiting.leaves(trace);
    }

    /// Lets the exporter send what it has.
    pub(super) async fn finish(&self, deadline: Duration) -> ExportCounts {
        let counts = self.exports.finish(deadline).await;
        self.count_losses();
        counts
    }

    fn count_losses(&self) {
        self.metrics.set_pod_resolutions(&self.places.counts());
        for loss in self.exports.count_exported().losses() {
            self.metrics.set_loss_total(&loss);
        }
    }
}
