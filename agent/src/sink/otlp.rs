//! Sends traces to an OpenTelemetry collector, over gRPC or HTTP/protobuf, without ever making anyone wait.
//!
//! A bounded queue stands between the traced world and one task that owns the connection. Everything offered is accounted for:
//! `offered = exported + lost`, by reason, once [`Exporter::shutdown`] has returned.
//!
//! # Configuration
//! [`TargetConfig`] says where to; [`ExporterConfig::from_environment`] takes it from the standard variables
//! (`OTEL_EXPORTER_OTLP_ENDPOINT`, `…_PROTOCOL`, `…_HEADERS`, `…_TIMEOUT`, `…_COMPRESSION`, `…_CERTIFICATE`, `…_CLIENT_CERTIFICATE`,
//! `…_CLIENT_KEY`, `…_INSECURE`, each also as `OTEL_EXPORTER_OTLP_TRACES_…`). `OTEL_SERVICE_NAME` and `OTEL_RESOURCE_ATTRIBUTES` are
//! followed in any case.
//!
//! # When the collector is in trouble
//! Errors that the protocol calls retryable are retried with back-off until the request's timeout; then the request's traces are lost
//! (`export_failed`), and requests follow each other with growing pauses until one succeeds. Meanwhile the queue fills and newer traces are
//! lost (`queue_full`, `queue_bytes`). There is one ERROR log when that begins and one INFO log when it ends.
//! A collector that says when to come back (`Retry-After`, `RetryInfo`) is sent nothing before, for at most ten minutes; the request that it refused so is
//! sent again then, as often as it says so.
//! Files for TLS that have changed are read again before the next request; what is wrong with them leaves the connection as it was.
//! A request that was under way when the time for shutting down ran out counts as lost (`shutdown`), although the collector may have taken it.

use std::hash::{BuildHasher as _, RandomState};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use opentelemetry_otlp::{Compression, RetryPolicy, SpanExporter, WithExportConfig, WithHttpConfig, WithTonicConfig};
use opentelemetry_sdk::trace::{SpanData, SpanExporter as _};
use serde::{Deserialize, Serialize};
use thiserror::Error;
use tokio::sync::mpsc::error::TrySendError;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;
use tokio::time::Instant;
use tracing::instrument::WithSubscriber as _;
use tracing::{Dispatch, error, info, warn};

use super::otlp_config::{CompressionConfig, TargetConfig, TracesConfig};
use super::otlp_throttle::{LIBRARY_WAIT, Throttle};
use super::otlp_transport::{self as transport, TransportError};
use super::rejections::Rejections;
use super::spans::Converter;
use super::tls_files::TlsFiles;
use crate::clock::ClockAnchor;
use crate::span::{Loss, Process, Trace};

/// Traces in one batch.
const MAX_BATCH_TRACES: usize = 256;
/// Estimated size of one request; collectors refuse more than 4 MiB unless told otherwise.
const MAX_REQUEST_BYTES: usize = 3 * 1024 * 1024;
/// First pause after a request failed.
const FIRST_PAUSE: Duration = Duration::from_millis(250);
/// What a timer may be late by before a connection that hangs is given up.
const TIMEOUT_SLACK: Duration = Duration::from_millis(250);

/// How traces travel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Protocol {
    /// OTLP/gRPC, by custom on port 4317.
    #[serde(rename = "grpc")]
    Grpc,
    /// OTLP/HTTP with protobuf bodies, by custom on port 4318.
    #[serde(rename = "http/protobuf")]
    HttpProtobuf,
}

/// How to export.
#[derive(Clone, Debug)]
pub struct ExporterConfig {
    /// Where to. Without an endpoint it is the protocol's customary port on this host.
    pub target: TargetConfig,
    /// Traces that may wait; at least 1.
    pub queue_capacity: usize,
    /// Estimated memory of the traces that wait or are under way, bytes. One trace is always taken.
    pub queue_bytes: usize,
    /// How long the first trace of a batch waits for others.
    pub batch_delay: Duration,
    /// Longest pause between requests while the collector is in trouble.
    pub max_pause: Duration,
    /// Name of this node, which traces from pods are sent with. Empty without one.
    pub node_name: String,
}

impl Default for ExporterConfig {
    fn default() -> Self {
        Self {
            target: TargetConfig::default(),
            queue_capacity: 1_024,
            queue_bytes: 64 << 20,
            batch_delay: Duration::from_millis(500),
            max_pause: Duration::from_secs(10),
            node_name: String::new(),
        }
    }
}

impl From<&TracesConfig> for ExporterConfig {
    fn from(config: &TracesConfig) -> Self {
        Self {
            target: config.target.clone(),
            queue_capacity: config.queue_traces,
            queue_bytes: config.queue_mib << 20,
            ..Self::default()
        }
    }
}

impl ExporterConfig {
    /// What the standard variables of this process say, `NODE_NAME` included.
    pub fn from_environment() -> Result<Self, StartError> {
        let mut config = TracesConfig::default();
        config
            .from_environment(|name| std::env::var(name).ok())
            .and_then(|()| config.validate())
            .map_err(StartError::Environment)?;
        Ok(Self {
            node_name: std::env::var("NODE_NAME").unwrap_or_default(),
            ..Self::from(&config)
        })
    }
}

/// Why an exporter cannot start.
#[derive(Debug, Error)]
pub enum StartError {
    /// There is no such connection.
    #[error("cannot export traces: {0}")]
    Transport(#[from] TransportError),
    /// A standard variable is wrong.
    #[error("cannot export traces: {0}")]
    Environment(String),
    /// The environment is wrong, in a way that only the library knows.
    #[error("cannot export traces: {0}")]
    Build(#[from] opentelemetry_otlp::ExporterBuildError),
}

/// Traces by what became of them, and what the collector said of spans.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ExportCounts {
    /// Given to [`Exporter::offer`].
    pub offered: u64,
    /// In a request that the collector answered with success.
    pub exported: u64,
    /// Not taken because the queue was full.
    pub lost_queue_full: u64,
    /// Not taken because what was waiting was too large.
    pub lost_queue_bytes: u64,
    /// In a request that failed for good.
    pub lost_export_failed: u64,
    /// Left when the time for shutting down was over, or offered later.
    pub lost_shutdown: u64,
    /// Spans of exported traces that the collector said it had rejected; it does not say which.
    pub rejected_spans: u64,
}

impl ExportCounts {
    /// Traces that wait or are under way.
    pub fn waiting(&self) -> u64 {
        self.offered.saturating_sub(self.exported + self.lost())
    }

    /// Traces lost, for whatever reason.
    pub fn lost(&self) -> u64 {
        self.lost_queue_full + self.lost_queue_bytes + self.lost_export_failed + self.lost_shutdown
    }

    /// The losses in the vocabulary that all layers share; none with a count of zero.
    pub fn losses(&self) -> Vec<Loss> {
        [
            ("queue_full", self.lost_queue_full),
            ("queue_bytes", self.lost_queue_bytes),
            ("export_failed", self.lost_export_failed),
            ("shutdown", self.lost_shutdown),
            ("spans_rejected", self.rejected_spans),
        ]
        .into_iter()
        .filter(|(_, count)| *count > 0)
        .map(|(reason, count)| Loss {
            layer: "export".to_owned(),
            reason: reason.to_owned(),
            count,
        })
        .collect()
    }
}

impl std::iter::Sum for ExportCounts {
    fn sum<I: Iterator<Item = Self>>(counts: I) -> Self {
        counts.fold(Self::default(), |sum, counts| Self {
            offered: sum.offered + counts.offered,
            exported: sum.exported + counts.exported,
            lost_queue_full: sum.lost_queue_full + counts.lost_queue_full,
            lost_queue_bytes: sum.lost_queue_bytes + counts.lost_queue_bytes,
            lost_export_failed: sum.lost_export_failed + counts.lost_export_failed,
            lost_shutdown: sum.lost_shutdown + counts.lost_shutdown,
            rejected_spans: sum.rejected_spans + counts.rejected_spans,
        })
    }
}

#[derive(Debug, Default)]
struct Counters {
    offered: AtomicU64,
    exported: AtomicU64,
    queue_full: AtomicU64,
    queue_bytes: AtomicU64,
    export_failed: AtomicU64,
    shutdown: AtomicU64,
    /// Whether the queue has overflowed since it was last empty.
    is_overflowing: AtomicBool,
    /// Estimated bytes of what waits or is under way.
    waiting_bytes: AtomicUsize,
}

/// A trace in the queue, with its estimated bytes.
type Waiting = (Arc<Trace>, usize);

/// A running exporter.
#[derive(Debug)]
pub struct Exporter {
    queue: mpsc::Sender<Waiting>,
    max_bytes: usize,
    counters: Arc<Counters>,
    rejections: Arc<Rejections>,
    /// Until when the task may go on; `None` while nobody has asked it to stop.
    stop: watch::Sender<Option<Instant>>,
    task: Mutex<Option<JoinHandle<()>>>,
}

impl Exporter {
    /// Starts the task, on the current tokio runtime. The collector need not be there yet.
    pub fn start(config: &ExporterConfig, anchor: ClockAnchor) -> Result<Self, StartError> {
        let throttle = Arc::new(Throttle::default());
        let tls_files = TlsFiles::of(&config.target);
        let exporter = build(&config.target, &throttle)?;
        let (queue, receiver) = mpsc::channel(config.queue_capacity.max(1));
        let (stop, stopped) = watch::channel(None);
        let counters = Arc::new(Counters::default());
        let rejections = Arc::new(Rejections::new(Arc::clone(&throttle)));
        let worker = Worker {
            queue: receiver,
            stopped,
            counters: Arc::clone(&counters),
            watcher: Dispatch::new(Arc::clone(&rejections)),
            converter: Converter::from_env(anchor).on_node(&config.node_name),
            exporter,
            tls_files,
            throttle,
            endpoint: transport::shown_endpoint(&config.target),
            target: config.target.clone(),
            timeout: transport::timeout(&config.target) + TIMEOUT_SLACK,
            batch_delay: config.batch_delay,
            max_pause: config.max_pause,
            pause: None,
            is_throttled: false,
        };
        let task = Mutex::new(Some(tokio::spawn(worker.run())));
        Ok(Self {
            queue,
            max_bytes: config.queue_bytes,
            counters,
            rejections,
            stop,
            task,
        })
    }

    /// Hands a trace over; never waits. A full queue loses it, and counts, and so does one that is shut down. Whether it was taken.
    pub fn offer(&self, trace: Arc<Trace>) -> bool {
        self.try_offer(trace).unwrap_or_else(|_| {
            self.counters.offered.fetch_add(1, Ordering::Relaxed);
            self.counters.shutdown.fetch_add(1, Ordering::Relaxed);
            false
        })
    }

    /// As [`Self::offer`], but gives the trace back if the exporter is shut down, and then counts nothing.
    pub fn try_offer(&self, trace: Arc<Trace>) -> Result<bool, Arc<Trace>> {
        // With room, the trace is sent even if the exporter is shut down meanwhile.
        let room = match self.queue.try_reserve() {
            Ok(room) => Some(room),
            Err(TrySendError::Full(())) => None,
            Err(TrySendError::Closed(())) => return Err(trace),
        };
        self.counters.offered.fetch_add(1, Ordering::Relaxed);
        let byte_count = trace.estimated_bytes();
        let before = self.counters.waiting_bytes.fetch_add(byte_count, Ordering::Relaxed);
        let lost = match room {
            _ if before > 0 && before + byte_count > self.max_bytes => &self.counters.queue_bytes,
            None => &self.counters.queue_full,
            Some(room) => {
                room.send((trace, byte_count));
                return Ok(true);
            }
        };
        self.counters.waiting_bytes.fetch_sub(byte_count, Ordering::Relaxed);
        lost.fetch_add(1, Ordering::Relaxed);
        self.overflows();
        Ok(false)
    }

    fn overflows(&self) {
        if !self.counters.is_overflowing.swap(true, Ordering::Relaxed) {
            error!(
                capacity = self.queue.max_capacity(),
                max_bytes = self.max_bytes,
                "export queue is full; traces are lost until it has drained"
            );
        }
    }

    /// Estimated memory of the traces that wait or are under way, bytes.
    pub fn queued_bytes(&self) -> u64 {
        self.counters.waiting_bytes.load(Ordering::Relaxed) as u64
    }

    /// Whether the task has ended before [`Self::shutdown`] was called. All that it had and is offered from then on is lost.
    pub fn has_panicked(&self) -> bool {
        let task = self.task.lock().unwrap_or_else(PoisonError::into_inner);
        task.as_ref().is_some_and(JoinHandle::is_finished)
    }

    /// What became of the traces so far; those not counted yet are waiting or under way.
    pub fn counts(&self) -> ExportCounts {
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        ExportCounts {
            exported: read(&self.counters.exported),
            lost_queue_full: read(&self.counters.queue_full),
            lost_queue_bytes: read(&self.counters.queue_bytes),
            lost_export_failed: read(&self.counters.export_failed),
            lost_shutdown: read(&self.counters.shutdown),
            rejected_spans: self.rejections.count(),
            // Last, so that no trace is counted as done before it is counted as offered.
            offered: read(&self.counters.offered),
        }
    }

    /// Sends what is waiting for at most `deadline`, then stops. From then on, every trace offered is lost. Calling it again can only make the deadline
    /// an earlier one, and only the first call waits.
    pub async fn shutdown(&self, deadline: Duration) -> ExportCounts {
        let new = Instant::now() + deadline;
        self.stop.send_if_modified(|until| {
            let is_earlier = until.is_none_or(|until| new < until);
            if is_earlier {
                *until = Some(new);
            }
            is_earlier
        });
        let task = self.task.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(task) = task
            && let Err(error) = task.await
        {
            error!(%error, "the export task ended early");
            self.lose_the_rest();
        }
        self.counts()
    }

    /// Nobody is left who could count what was in the queue or under way.
    fn lose_the_rest(&self) {
        let rest = self.counts().waiting();
        self.counters.shutdown.fetch_add(rest, Ordering::Relaxed);
        self.counters.waiting_bytes.store(0, Ordering::Relaxed);
    }
}

fn build(target: &TargetConfig, throttle: &Arc<Throttle>) -> Result<SpanExporter, StartError> {
    // Bounded by the timeout alone, as the specification asks.
    let retries = RetryPolicy::recommended().with_max_retries(usize::MAX);
    // Where it would come back too early, it gives up instead.
    let budget = transport::timeout(target).min(LIBRARY_WAIT);
    let compression = match target.compression {
        CompressionConfig::None => None,
        CompressionConfig::Gzip => Some(Compression::Gzip),
    };
    // All that the library could find in the environment is set, so that it does not.
    let exporter = match target.protocol {
        Protocol::Grpc => {
            let mut builder = SpanExporter::builder()
                .with_tonic()
                .with_channel(transport::channel(target)?)
                .with_interceptor(transport::AddHeaders(transport::headers(target)?))
                .with_timeout(budget)
                .with_retry_policy(retries);
            if let Some(compression) = compression {
                builder = builder.with_compression(compression);
            }
            builder.build()
        }
        Protocol::HttpProtobuf => {
            let mut builder = SpanExporter::builder()
                .with_http()
                .with_http_client(transport::Http::new(target, Arc::clone(throttle))?)
                .with_endpoint(transport::url(target, "traces")?.to_string())
                .with_protocol(opentelemetry_otlp::Protocol::HttpBinary)
                .with_timeout(budget)
                .with_retry_policy(retries);
            if let Some(compression) = compression {
                builder = builder.with_compression(compression);
            }
            builder.build()
        }
    };
    Ok(exporter?)
}

/// Between half of `pause` and all of it, so that the agents of many nodes do not return to a collector at the same instant.
fn jittered(pause: Duration) -> Duration {
    let random = RandomState::new().hash_one(0_u8) as f64 / u64::MAX as f64;
    pause.mul_f64(0.5 + random / 2.0)
}

/// The task: owns the connection and the back-off.
struct Worker {
    queue: mpsc::Receiver<Waiting>,
    stopped: watch::Receiver<Option<Instant>>,
    counters: Arc<Counters>,
    watcher: Dispatch,
    converter: Converter,
    exporter: SpanExporter,
    tls_files: TlsFiles,
    throttle: Arc<Throttle>,
    target: TargetConfig,
    /// For the log.
    endpoint: String,
    timeout: Duration,
    batch_delay: Duration,
    max_pause: Duration,
    /// Pause before the next request; `None` while requests succeed.
    pause: Option<Duration>,
    /// Whether the collector has asked for a wait since a request succeeded.
    is_throttled: bool,
}

/// The spans of one request: traces of one process, for a request has one resource.
struct Request {
    process: Arc<Process>,
    spans: Vec<SpanData>,
    byte_count: usize,
    trace_count: u64,
}

impl Worker {
    async fn run(mut self) {
        while let Some(batch) = self.next_batch().await {
            let mut requests = Vec::new();
            let byte_count: usize = batch.iter().map(|(_, byte_count)| byte_count).sum();
            for (trace, _) in batch {
                self.pack(&trace, &mut requests).await;
            }
            for request in requests {
                self.send(request).await;
            }
            self.counters.waiting_bytes.fetch_sub(byte_count, Ordering::Relaxed);
            if self.queue.is_empty() {
                self.counters.is_overflowing.store(false, Ordering::Relaxed);
            }
        }
    }

    /// `None` when the queue is closed and empty.
    async fn next_batch(&mut self) -> Option<Vec<Waiting>> {
        let mut batch = Vec::new();
        let first = tokio::select! {
            first = self.queue.recv() => first?,
            () = stop_requested(&mut self.stopped) => {
                self.queue.close();
                self.queue.recv().await?
            }
        };
        batch.push(first);
        let full = async {
            while batch.len() < MAX_BATCH_TRACES {
                match self.queue.recv().await {
                    Some(trace) => batch.push(trace),
                    None => break,
                }
            }
        };
        tokio::select! {
            biased;
            () = full => {}
            () = tokio::time::sleep(self.batch_delay) => {}
            () = stop_requested(&mut self.stopped) => self.queue.close(),
        }
        Some(batch)
    }

    /// Adds a trace to the open request of its process, and sends that first when it would grow too large.
    async fn pack(&mut self, trace: &Trace, requests: &mut Vec<Request>) {
        let converted = self.converter.spans(trace);
        let open = requests.iter().position(|request| *request.process == *trace.process);
        if let Some(index) = open {
            if requests[index].byte_count + converted.byte_count <= MAX_REQUEST_BYTES {
                let request = &mut requests[index];
                request.spans.extend(converted.spans);
                request.byte_count += converted.byte_count;
                request.trace_count += 1;
                return;
            }
            let request = requests.swap_remove(index);
            self.send(request).await;
        }
        requests.push(Request {
            process: Arc::clone(&trace.process),
            spans: converted.spans,
            byte_count: converted.byte_count,
            trace_count: 1,
        });
    }

    async fn send(&mut self, request: Request) {
        let trace_count = request.trace_count;
        self.renew();
        self.exporter.set_resource(&self.converter.resource(&request.process));
        loop {
            if !self.wait().await {
                self.counters.shutdown.fetch_add(trace_count, Ordering::Relaxed);
                return;
            }
            let export = self
                .exporter
                .export(request.spans.clone())
                .with_subscriber(self.watcher.clone());
            let result = tokio::select! {
                biased;
                result = tokio::time::timeout(self.timeout, export) => result,
                () = time_is_over(&mut self.stopped) => {
                    self.counters.shutdown.fetch_add(trace_count, Ordering::Relaxed);
                    return;
                }
            };
            match result {
                Ok(Ok(())) => self.succeeded(trace_count),
                Ok(Err(_)) if self.throttle.until().is_some() => {
                    self.throttled();
                    continue;
                }
                Ok(Err(error)) => self.failed(trace_count, &error.to_string()),
                Err(_) => self.failed(trace_count, "no answer in time"),
            }
            return;
        }
    }

    /// Connects anew if files for TLS have changed.
    fn renew(&mut self) {
        if !self.tls_files.have_changed() {
            return;
        }
        match build(&self.target, &self.throttle) {
            Ok(exporter) => {
                self.exporter = exporter;
                info!(endpoint = self.endpoint, "files for TLS have changed and are in use");
            }
            Err(error) => warn!(
                endpoint = self.endpoint,
                error = &error as &dyn std::error::Error,
                "files for TLS have changed and cannot be used; what was in them stays in use"
            ),
        }
    }

    /// Waits until the next request can be sent; `false` if there is no time left for it.
    async fn wait(&mut self) -> bool {
        if let Some(pause) = self.pause {
            tokio::select! {
                () = tokio::time::sleep(jittered(pause)) => {}
                () = stop_requested(&mut self.stopped) => {}
            }
        }
        let Some(until) = self.throttle.until() else {
            return true;
        };
        // Also when it is time to stop: who says when to come back is not asked before.
        tokio::select! {
            () = tokio::time::sleep_until(until) => true,
            () = time_is_over(&mut self.stopped) => false,
        }
    }

    fn throttled(&mut self) {
        if !std::mem::replace(&mut self.is_throttled, true) {
            let seconds = self
                .throttle
                .until()
                .map_or(0, |until| until.saturating_duration_since(Instant::now()).as_secs());
            warn!(
                endpoint = self.endpoint,
                seconds, "the collector asks for a wait; traces wait as long as there is room"
            );
        }
    }

    fn succeeded(&mut self, trace_count: u64) {
        self.counters.exported.fetch_add(trace_count, Ordering::Relaxed);
        if self.pause.take().is_some() | std::mem::take(&mut self.is_throttled) {
            info!(endpoint = self.endpoint, "traces are exported again");
        }
    }

    fn failed(&mut self, trace_count: u64, reason: &str) {
        self.counters.export_failed.fetch_add(trace_count, Ordering::Relaxed);
        if self.pause.is_none() {
            error!(
                endpoint = self.endpoint,
                reason, "traces cannot be exported; they are lost until the collector takes them"
            );
        }
        self.pause = Some(self.pause.map_or(FIRST_PAUSE, |pause| pause * 2).min(self.max_pause));
    }
}

async fn stop_requested(stopped: &mut watch::Receiver<Option<Instant>>) {
    if stopped.wait_for(Option::is_some).await.is_err() {
        // The exporter was dropped without a shutdown; the closed queue ends the task once it has been emptied.
        std::future::pending::<()>().await;
    }
}

async fn time_is_over(stopped: &mut watch::Receiver<Option<Instant>>) {
    loop {
        let until = *stopped.borrow_and_update();
        // It may become earlier; it does not change once nobody is left who could change it.
        let changed = async {
            if stopped.changed().await.is_err() {
                std::future::pending::<()>().await;
            }
        };
        match until {
            Some(until) => tokio::select! {
                () = tokio::time::sleep_until(until) => return,
                () = changed => {}
            },
            None => changed.await,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sink::testing::{invoke, trace};

    #[tokio::test]
    async fn a_panic_of_the_task_is_seen_and_what_it_had_is_lost_and_counted() {
        let anchor = ClockAnchor {
            monotonic_ns: 0,
            unix_ns: 0,
        };
        let config = ExporterConfig {
            // Longer than the test: what is offered stays where it is.
            batch_delay: Duration::from_hours(1),
            ..ExporterConfig::default()
        };
        let exporter = Exporter::start(&config, anchor).unwrap();
        for at in 0..3 {
            assert!(exporter.offer(Arc::new(trace(invoke("run", at, at + 1)))));
        }
        assert!(!exporter.has_panicked());
        // In its place, with all that it has.
        let panicking = tokio::spawn(async { panic!("on purpose") });
        let running = exporter.task.lock().unwrap().replace(panicking).unwrap();
        running.abort();
        assert!(running.await.unwrap_err().is_cancelled());
        while !exporter.has_panicked() {
            tokio::task::yield_now().await;
        }
        assert!(!exporter.offer(Arc::new(trace(invoke("run", 4, 5)))));
        let counts = exporter.shutdown(Duration::from_hours(1)).await;
        let lost = ExportCounts {
            offered: 4,
            lost_shutdown: 4,
            ..ExportCounts::default()
        };
        assert_eq!((counts, exporter.queued_bytes()), (lost, 0));
    }
}
