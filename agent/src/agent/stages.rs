//! What happens to a trace after the event loop, in order. A stage is a few lines in [`Stages::take`], and what it holds a field.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::mpsc;

use crate::metrics::Metrics;
use crate::sink::otlp::{ExportCounts, Exporter};
use crate::span::Trace;

/// How often what sinks have lost is brought into the metrics.
const LOSSES_INTERVAL: Duration = Duration::from_secs(1);

/// The stages.
pub(super) struct Stages {
    /// Where traces are counted.
    pub(super) metrics: Arc<Metrics>,
    /// The collector, if there is one.
    pub(super) exporter: Option<Exporter>,
}

impl Stages {
    /// Takes traces until there are no more senders; what the exporter still has is then its own to send.
    pub(super) async fn run(&self, mut traces: mpsc::Receiver<Arc<Trace>>) {
        let mut tick = tokio::time::interval(LOSSES_INTERVAL);
        loop {
            tokio::select! {
                trace = traces.recv() => match trace {
                    Some(trace) => self.take(trace),
                    None => break,
                },
                _ = tick.tick() => self.count_losses(),
            }
        }
    }

    /// All stages, for one trace. None of them may wait.
    fn take(&self, trace: Arc<Trace>) {
        self.metrics.observe_trace(&trace);
        if let Some(exporter) = &self.exporter {
            exporter.offer(trace);
        }
    }

    /// Lets the exporter send what it has.
    pub(super) async fn finish(&self, deadline: Duration) -> ExportCounts {
        let counts = match &self.exporter {
            Some(exporter) => exporter.shutdown(deadline).await,
            None => ExportCounts::default(),
        };
        self.count_losses();
        counts
    }

    fn count_losses(&self) {
        for loss in self.exporter.iter().flat_map(|exporter| exporter.counts().losses()) {
            self.metrics.set_loss_total(&loss);
        }
    }
}
