//! The event loop, on a thread of its own: nothing that happens to a trace afterwards can keep it from the ring.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use tokio::sync::watch;
use tracing::{info, warn};

use super::counts::{self, Counts};
use super::drain::{Schedule, Transit};
use super::health::Health;
use super::queue::TraceSender;
use crate::cli::cold::ColdModules;
use crate::event::{Event, EventKind};
use crate::governor::GovernorConfig;
use crate::inventory::Inventory;
use crate::metrics::Metrics;
use crate::pipeline::{Output, Pipeline, WatchReport};
use crate::self_observation::SelfObservation;
use crate::span::{Capture, Loss};

/// How often it is looked whether the watched processes still live.
const LIVENESS_INTERVAL: Duration = Duration::from_millis(200);
/// How often it is told how the loop fares.
const OBSERVATION_INTERVAL: Duration = Duration::from_secs(1);

/// Where the loop puts what it makes.
pub(super) struct Collector {
    /// Traces, for the stages.
    pub(super) traces: TraceSender,
    /// Counted here is what needs no stage.
    pub(super) metrics: Arc<Metrics>,
    /// What the kernel counts.
    pub(super) counts: Counts,
    /// What runs on the node.
    pub(super) inventory: Arc<Inventory>,
    /// Told at every turn.
    pub(super) health: Arc<Health>,
    /// Told now and then how the loop fares.
    pub(super) observation: SelfObservation,
    /// What probes may cost, whenever that changes.
    pub(super) governor: watch::Receiver<GovernorConfig>,
    /// How many traces have been made and handed on.
    pub(super) transit: Arc<Transit>,
    /// Until when the loop may go on; `None` while it is not to end.
    pub(super) stop: watch::Receiver<Option<Schedule>>,
}

impl Collector {
    /// Runs until it is stopped and all that the kernel has is handled. Starts by watching what already runs.
    pub(super) async fn run(mut self, pipeline: &mut Pipeline) -> anyhow::Result<Capture> {
        let mut cold = ColdModules::default();
        let (reports, events) = pipeline.watch_running()?;
        for report in &reports {
            tell_watched(report);
        }
        self.count(&events, &[], &mut cold);
        self.inventory.refresh(pipeline);
        // Whoever waits for readiness before the first scrape finds all families.
        self.observation.set_tables(pipeline.table_entries());
        self.health.turned(pipeline.watched_count());
        self.health.attached();
        let mut next_liveness = Instant::now() + LIVENESS_INTERVAL;
        let mut next_counts = Instant::now() + counts::INTERVAL;
        let mut next_observation = Instant::now();
        let mut lag = Duration::ZERO;
        loop {
            tokio::select! {
                () = pipeline.ready() => {}
                _ = self.stop.wait_for(Option::is_some) => break,
            }
            let begun = Instant::now();
            if self.governor.has_changed().unwrap_or(false) {
                let config = self.governor.borrow_and_update().clone();
                pipeline.reconfigure_governor(config);
            }
            self.take(pipeline.turn(), &mut cold);
            self.take(pipeline.govern(), &mut cold);
            if Instant::now() >= next_liveness {
                next_liveness = Instant::now() + LIVENESS_INTERVAL;
                pipeline.check_liveness();
            }
            if Instant::now() >= next_counts {
                next_counts = Instant::now() + counts::INTERVAL;
                self.counts.collect(pipeline, &self.metrics, false);
                self.inventory.refresh(pipeline);
            }
            if Instant::now() >= next_observation {
                next_observation = Instant::now() + OBSERVATION_INTERVAL;
                self.observation.set_tables(pipeline.table_entries());
                self.observation.set_lag(std::mem::take(&mut lag));
            }
            self.health.turned(pipeline.watched_count());
            lag = lag.max(begun.elapsed());
        }
        let (last, capture) = pipeline.finish();
        self.count(&last.events, &last.losses, &mut cold);
        for trace in &last.traces {
            cold.trace(trace, |count| self.counts.cold(count));
        }
        self.counts.collect(pipeline, &self.metrics, true);
        let until = self.stop.borrow().map_or_else(Instant::now, |schedule| schedule.traces);
        for trace in last.traces {
            self.transit.made.fetch_add(1, Ordering::Relaxed);
            if !self.traces.send(trace, until).await {
                self.lose("shutdown");
            }
        }
        Ok(capture)
    }

    fn take(&mut self, output: Output, cold: &mut ColdModules) {
        self.count(&output.events, &output.losses, cold);
        for trace in output.traces {
            self.transit.made.fetch_add(1, Ordering::Relaxed);
            cold.trace(&trace, |count| self.counts.cold(count));
            self.inventory.trace(&trace);
            if let Err((mut trace, reason)) = self.traces.offer(trace) {
                // Counters are not to lose it too.
                trace.process = self.counts.named(&trace.process);
                self.metrics.observe_trace(&trace);
                self.lose(reason);
            }
        }
    }

    fn count(&mut self, events: &[Event], losses: &[Loss], cold: &mut ColdModules) {
        for event in events {
            self.metrics.observe_events(event.kind.name(), 1);
            cold.event(event, |count| self.counts.cold(count));
            self.counts.event(event);
            self.inventory.event(event);
            match &event.kind {
                // Perhaps the successor of one that is gone, in the same process.
                EventKind::Process { process, .. } => self.metrics.process_runs(process),
                EventKind::ProcessGone => info!(pid = event.pid, "process gone"),
                _ => {}
            }
        }
        for loss in losses {
            self.metrics.observe_loss(loss);
        }
    }

    fn lose(&self, reason: &str) {
        self.transit.lost.fetch_add(1, Ordering::Relaxed);
        self.metrics.observe_loss(&Loss {
            layer: "agent".to_owned(),
            reason: reason.to_owned(),
            count: 1,
        });
    }
}

fn tell_watched(report: &WatchReport) {
    let process = &report.process;
    info!(
        pid = process.pid,
        command = %crate::sink::text::printable(&process.command),
        runtime = process.runtime_name,
        modules = report.module_count,
        sites = report.site_count,
        "process watched"
    );
    if !process.limits.is_empty() {
        warn!(pid = process.pid, limits = ?process.limits, "watched in part");
    }
}
