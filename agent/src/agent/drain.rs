//! The end of the agent: what is under way is delivered until the deadline, the rest is counted, and one line of the log says both.

use std::process::ExitCode;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use tokio::task::JoinHandle;
use tracing::{error, info};

use super::failure::Collected;
use super::stages::Stages;
use crate::sink::otlp::ExportCounts;
use crate::sink::otlp_metrics::{LastReading, MetricsExporter};

/// The agent ended as it was told to, and something was not delivered. Not 1, which is a failure that a restart may mend, nor 2, a configuration that
/// none mends: who stops an agent wants it stopped, and a supervisor that tells the codes apart need not call it a failure (`SuccessExitStatus=3`).
pub(super) const EXIT_UNDELIVERED: u8 = 3;
/// Most of the time that is kept for the last metrics.
const MAX_METRICS_SHARE: Duration = Duration::from_secs(2);

/// Until when each part of the drain may take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Schedule {
    /// Traces wait for the names of their pod.
    pub(super) names: Instant,
    /// Traces are sent.
    pub(super) traces: Instant,
    /// All of it.
    pub(super) end: Instant,
}

impl Schedule {
    /// Half for names, so that there is time to send what waited for them; a fifth for the last metrics if there are any to send.
    pub(super) fn new(now: Instant, deadline: Duration, with_metrics: bool) -> Self {
        let reserved = if with_metrics {
            (deadline / 5).min(MAX_METRICS_SHARE)
        } else {
            Duration::ZERO
        };
        Self {
            names: now + deadline / 2,
            traces: now + deadline.saturating_sub(reserved),
            end: now + deadline,
        }
    }
}

/// Traces between the event loop and the end of the stages, counted at both ends.
#[derive(Debug, Default)]
pub(super) struct Transit {
    /// Made by the event loop.
    pub(super) made: AtomicU64,
    /// Of these, not taken by the stages.
    pub(super) lost: AtomicU64,
    /// Through all stages.
    pub(super) through: AtomicU64,
}

/// What had been delivered and lost when the drain began.
#[derive(Clone, Copy, Debug)]
pub(super) struct Tally {
    transit_lost: u64,
    exports: ExportCounts,
}

/// What became of what was under way when the drain began, or came since.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Delivery {
    /// Traces that the collector has taken.
    pub(super) delivered: u64,
    /// The same since the agent started.
    pub(super) exported: u64,
    /// Traces that never arrive, by reason; none with a count of zero.
    pub(super) lost: Vec<(&'static str, u64)>,
    /// Spans, not traces, that the collector rejected of the traces it took.
    pub(super) rejected_spans: u64,
}

impl Delivery {
    pub(super) fn lost_count(&self) -> u64 {
        self.lost.iter().map(|(_, count)| count).sum()
    }

    /// Whether all that was under way has arrived, down to the last span.
    pub(super) fn is_complete(&self) -> bool {
        self.lost.is_empty() && self.rejected_spans == 0
    }
}

impl Tally {
    pub(super) fn begin(transit: &Transit, exports: ExportCounts) -> Self {
        Self {
            transit_lost: transit.lost.load(Ordering::Relaxed),
            exports,
        }
    }

    /// To be called when the agent ends: what is still under way counts as lost.
    pub(super) fn end(self, transit: &Transit, now: ExportCounts) -> Delivery {
        let before = self.exports;
        let through = transit.through.load(Ordering::Relaxed);
        let staged = transit.made.load(Ordering::Relaxed) - self.transit_lost;
        let lost = [
            ("not_staged", staged.saturating_sub(through)),
            ("queue_full", now.lost_queue_full - before.lost_queue_full),
            ("queue_bytes", now.lost_queue_bytes - before.lost_queue_bytes),
            ("export_failed", now.lost_export_failed - before.lost_export_failed),
            ("shutdown", now.lost_shutdown - before.lost_shutdown + now.waiting()),
        ];
        Delivery {
            delivered: now.exported - before.exported,
            exported: now.exported,
            lost: lost.into_iter().filter(|(_, count)| *count > 0).collect(),
            rejected_spans: now.rejected_spans.saturating_sub(before.rejected_spans),
        }
    }
}

/// The parts that end one after the other.
pub(super) struct Drain<'a> {
    pub(super) schedule: Schedule,
    pub(super) collected: &'a mut Collected,
    pub(super) stage_task: &'a mut JoinHandle<()>,
    pub(super) stages: &'a Stages,
    pub(super) metrics: Option<&'a MetricsExporter>,
}

/// Which parts came to their end in time.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Drained {
    is_collected: bool,
    last_reading: LastReading,
}

impl Drain<'_> {
    /// Ends at the deadline at the latest.
    pub(super) async fn run(self) -> Drained {
        let traces = self.schedule.traces;
        let capture = tokio::time::timeout_at(traces.into(), self.collected).await;
        if let Ok(Ok(Ok(capture))) = &capture {
            info!(
                records = capture.emitted_count,
                traces = capture.trace_count,
                losses = ?capture.losses,
                "all records handled"
            );
        }
        if let Ok(Err(error)) = tokio::time::timeout_at(traces.into(), self.stage_task).await {
            error!(%error, "the stages ended early");
        }
        self.stages.finish(left(traces)).await;
        let last_reading = match self.metrics {
            // Last, so that it tells of the losses of all others.
            Some(exporter) => exporter.shutdown(left(self.schedule.end)).await,
            None => LastReading::default(),
        };
        Drained {
            is_collected: matches!(capture, Ok(Ok(Ok(_)))),
            last_reading,
        }
    }
}

fn left(until: Instant) -> Duration {
    until.saturating_duration_since(Instant::now())
}

/// The one line at the end, and the exit code that says the same. `None` of `drained`: it was cut off.
pub(super) fn tell(delivery: &Delivery, drained: Option<Drained>) -> ExitCode {
    let Drained {
        is_collected,
        last_reading,
    } = drained.unwrap_or_default();
    let (delivered, lost) = (delivery.delivered, delivery.lost_count());
    let is_complete = is_collected && delivery.is_complete() && last_reading.lost == 0;
    if is_complete {
        info!(
            delivered,
            lost,
            exported = delivery.exported,
            spans_rejected = delivery.rejected_spans,
            points = last_reading.taken,
            "stopped"
        );
        ExitCode::SUCCESS
    } else {
        error!(
            delivered,
            lost,
            exported = delivery.exported,
            reasons = ?delivery.lost,
            spans_rejected = delivery.rejected_spans,
            records_handled = is_collected,
            points = last_reading.taken,
            points_lost = last_reading.lost,
            "stopped, and not everything was delivered"
        );
        ExitCode::from(EXIT_UNDELIVERED)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_leave_time_for_sending_and_traces_for_the_last_metrics() {
        let now = Instant::now();
        let second = Duration::from_secs(1);
        let schedule = Schedule::new(now, 10 * second, true);
        assert_eq!(
            [schedule.names, schedule.traces, schedule.end],
            [now + 5 * second, now + 8 * second, now + 10 * second]
        );
        assert_eq!(Schedule::new(now, 10 * second, false).traces, now + 10 * second);
        assert_eq!(Schedule::new(now, 600 * second, true).traces, now + 598 * second);
    }

    #[test]
    fn only_what_the_drain_delivered_and_lost_counts_and_what_is_under_way_at_the_end_is_lost() {
        let transit = Transit::default();
        transit.made.store(100, Ordering::Relaxed);
        transit.lost.store(7, Ordering::Relaxed);
        transit.through.store(80, Ordering::Relaxed);
        let before = ExportCounts {
            offered: 80,
            exported: 50,
            lost_export_failed: 10,
            ..ExportCounts::default()
        };
        let tally = Tally::begin(&transit, before);
        transit.made.store(110, Ordering::Relaxed);
        transit.lost.store(9, Ordering::Relaxed);
        transit.through.store(98, Ordering::Relaxed);
        let now = ExportCounts {
            offered: 98,
            exported: 60,
            lost_export_failed: 14,
            lost_shutdown: 20,
            ..ExportCounts::default()
        };
        let delivery = tally.end(&transit, now);
        assert_eq!(
            delivery,
            Delivery {
                delivered: 10,
                exported: 60,
                // 103 were made or under way, 98 came through; 4 of those offered have not been heard of.
                lost: vec![("not_staged", 5), ("export_failed", 4), ("shutdown", 24)],
                rejected_spans: 0,
            }
        );
        assert_eq!(delivery.lost_count(), 33);
    }

    #[test]
    fn spans_rejected_during_the_drain_make_it_incomplete_and_those_before_do_not() {
        let transit = Transit::default();
        transit.made.store(1, Ordering::Relaxed);
        transit.through.store(1, Ordering::Relaxed);
        let counts = |rejected_spans| ExportCounts {
            offered: 1,
            exported: 1,
            rejected_spans,
            ..ExportCounts::default()
        };
        let drained = Some(Drained {
            is_collected: true,
            ..Drained::default()
        });
        let code = |delivery: &Delivery| format!("{:?}", tell(delivery, drained));
        let rejected = Tally::begin(&transit, counts(2)).end(&transit, counts(5));
        assert_eq!((rejected.rejected_spans, rejected.lost_count()), (3, 0));
        assert_eq!(code(&rejected), format!("{:?}", ExitCode::from(EXIT_UNDELIVERED)));
        let all = Tally::begin(&transit, counts(2)).end(&transit, counts(2));
        assert_eq!(code(&all), format!("{:?}", ExitCode::SUCCESS));
    }
}
