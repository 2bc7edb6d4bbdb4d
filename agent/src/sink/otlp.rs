//! Sends traces to an OpenTelemetry collector, over gRPC or HTTP/protobuf, without ever making anyone wait.
//!
//! A bounded queue stands between the traced world and one task that owns the connection. Everything offered is accounted for:
//! `offered = exported + lost`, by reason, once [`Exporter::shutdown`] has returned.
//!
//! # Configuration
//! The standard variables, each also as `OTEL_EXPORTER_OTLP_TRACES_…`: `OTEL_EXPORTER_OTLP_ENDPOINT`, `…_PROTOCOL` (`grpc`, `http/protobuf`; the default is
//! `http/protobuf`), `…_HEADERS`, `…_TIMEOUT` (milliseconds for a request with all its retries), `…_COMPRESSION` (`gzip`), `…_INSECURE`;
//! `OTEL_SERVICE_NAME` and `OTEL_RESOURCE_ATTRIBUTES`. [`ExporterConfig`] wins over them. `https` endpoints are refused: this build has no TLS.
//!
//! # When the collector is in trouble
//! Errors that the protocol calls retryable are retried with back-off until the request's timeout; then the request's traces are lost
//! (`export_failed`), and requests follow each other with growing pauses until one succeeds. Meanwhile the queue fills and newer traces are
//! lost (`queue_full`). There is one ERROR log when that begins and one INFO log when it ends.
//! A request that was under way when the time for shutting down ran out counts as lost (`shutdown`), although the collector may have taken it.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use opentelemetry_otlp::{
    Compression as OtlpCompression, RetryPolicy, SpanExporter, WithExportConfig, WithHttpConfig, WithTonicConfig,
};
use opentelemetry_sdk::trace::{SpanData, SpanExporter as _};
use serde::{Deserialize, Serialize};
use thiserror::Error;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;
use tokio::time::Instant;
use tracing::instrument::WithSubscriber as _;
use tracing::{Dispatch, error, info};

use super::rejections::Rejections;
use super::spans::Converter;
use crate::clock::ClockAnchor;
use crate::span::{Loss, Process, Trace};

/// Traces in one batch.
const MAX_BATCH_TRACES: usize = 256;
/// Estimated size of one request; collectors refuse more than 4 MiB unless told otherwise.
const MAX_REQUEST_BYTES: usize = 3 * 1024 * 1024;
/// First pause after a request failed.
const FIRST_PAUSE: Duration = Duration::from_millis(250);
/// The specification's default.
const DEFAULT_TIMEOUT: Duration = Duration::from_secs(10);
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

/// How bodies are packed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Compression {
    /// gzip.
    Gzip,
}

/// What the caller decides; `None` leaves it to the environment.
#[derive(Clone, Debug)]
pub struct ExporterConfig {
    /// Base URL of the collector (`http://127.0.0.1:4318`), as in `OTEL_EXPORTER_OTLP_ENDPOINT`: HTTP adds `/v1/traces`.
    pub endpoint: Option<String>,
    /// As in `OTEL_EXPORTER_OTLP_PROTOCOL`.
    pub protocol: Option<Protocol>,
    /// For a request with all its retries, as in `OTEL_EXPORTER_OTLP_TIMEOUT`.
    pub timeout: Option<Duration>,
    /// As in `OTEL_EXPORTER_OTLP_COMPRESSION`.
    pub compression: Option<Compression>,
    /// Traces that may wait; at least 1.
    pub queue_capacity: usize,
    /// How long the first trace of a batch waits for others.
    pub batch_delay: Duration,
    /// Longest pause between requests while the collector is in trouble.
    pub max_pause: Duration,
}

impl Default for ExporterConfig {
    fn default() -> Self {
        Self {
            endpoint: None,
            protocol: None,
            timeout: None,
            compression: None,
            queue_capacity: 1_024,
            batch_delay: Duration::from_millis(500),
            max_pause: Duration::from_secs(10),
        }
    }
}

/// Why an exporter cannot start.
#[derive(Debug, Error)]
pub enum StartError {
    /// The collector wants TLS.
    #[error(
        "cannot export to {endpoint}: this build has no TLS; use an http:// endpoint, such as a collector on this node"
    )]
    TlsNotBuilt {
        /// The endpoint.
        endpoint: String,
    },
    /// The configuration, or the environment, is wrong.
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
    /// In a request that failed for good.
    pub lost_export_failed: u64,
    /// Left when the time for shutting down was over, or offered later.
    pub lost_shutdown: u64,
    /// Spans of exported traces that the collector said it had rejected; it does not say which.
    pub rejected_spans: u64,
}

impl ExportCounts {
    /// Traces lost, for whatever reason.
    pub fn lost(&self) -> u64 {
        self.lost_queue_full + self.lost_export_failed + self.lost_shutdown
    }

    /// The losses in the vocabulary that all layers share; none with a count of zero.
    pub fn losses(&self) -> Vec<Loss> {
        [
            ("queue_full", self.lost_queue_full),
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

#[derive(Debug, Default)]
struct Counters {
    offered: AtomicU64,
    exported: AtomicU64,
    queue_full: AtomicU64,
    export_failed: AtomicU64,
    shutdown: AtomicU64,
    /// Whether the queue has overflowed since it was last empty.
    is_overflowing: AtomicBool,
}

/// A running exporter.
#[derive(Debug)]
pub struct Exporter {
    queue: mpsc::Sender<Arc<Trace>>,
    counters: Arc<Counters>,
    rejections: Arc<Rejections>,
    /// Until when the task may go on; `None` while nobody has asked it to stop.
    stop: watch::Sender<Option<Instant>>,
    task: Mutex<Option<JoinHandle<()>>>,
}

impl Exporter {
    /// Starts the task, on the current tokio runtime. The collector need not be there yet.
    pub fn start(config: &ExporterConfig, anchor: ClockAnchor) -> Result<Self, StartError> {
        let protocol = config.protocol.unwrap_or_else(protocol_from_env);
        let endpoint = config
            .endpoint
            .clone()
            .or_else(|| first_env(&["OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT"]));
        if let Some(endpoint) = endpoint.as_ref().filter(|endpoint| endpoint.starts_with("https:")) {
            return Err(StartError::TlsNotBuilt {
                endpoint: endpoint.clone(),
            });
        }
        let timeout = config.timeout.unwrap_or_else(timeout_from_env);
        let exporter = build(config, protocol, timeout)?;
        let (queue, receiver) = mpsc::channel(config.queue_capacity.max(1));
        let (stop, stopped) = watch::channel(None);
        let counters = Arc::new(Counters::default());
        let rejections = Arc::new(Rejections::default());
        let worker = Worker {
            queue: receiver,
            stopped,
            counters: Arc::clone(&counters),
            watcher: Dispatch::new(Arc::clone(&rejections)),
            converter: Converter::from_env(anchor),
            exporter,
            endpoint: endpoint.unwrap_or_else(|| "the default endpoint".to_owned()),
            timeout: timeout + TIMEOUT_SLACK,
            batch_delay: config.batch_delay,
            max_pause: config.max_pause,
            pause: None,
        };
        let task = Mutex::new(Some(tokio::spawn(worker.run())));
        Ok(Self {
            queue,
            counters,
            rejections,
            stop,
            task,
        })
    }

    /// Hands a trace over; never waits. A full queue loses it, and counts.
    pub fn offer(&self, trace: Arc<Trace>) {
        self.counters.offered.fetch_add(1, Ordering::Relaxed);
        match self.queue.try_send(trace) {
            Ok(()) => {}
            Err(mpsc::error::TrySendError::Full(_)) => {
                self.counters.queue_full.fetch_add(1, Ordering::Relaxed);
                if !self.counters.is_overflowing.swap(true, Ordering::Relaxed) {
                    error!(
                        capacity = self.queue.max_capacity(),
                        "export queue is full; traces are lost until it has drained"
                    );
                }
            }
            Err(mpsc::error::TrySendError::Closed(_)) => {
                self.counters.shutdown.fetch_add(1, Ordering::Relaxed);
            }
        }
    }

    /// What became of the traces so far; those not counted yet are waiting or under way.
    pub fn counts(&self) -> ExportCounts {
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        ExportCounts {
            exported: read(&self.counters.exported),
            lost_queue_full: read(&self.counters.queue_full),
            lost_export_failed: read(&self.counters.export_failed),
            lost_shutdown: read(&self.counters.shutdown),
            rejected_spans: self.rejections.count(),
            // Last, so that no trace is counted as done before it is counted as offered.
            offered: read(&self.counters.offered),
        }
    }

    /// Sends what is waiting for at most `deadline`, then stops. From then on, every trace offered is lost. Calling it again changes nothing.
    pub async fn shutdown(&self, deadline: Duration) -> ExportCounts {
        self.stop.send_if_modified(|until| {
            until
                .is_none()
                .then(|| *until = Some(Instant::now() + deadline))
                .is_some()
        });
        let task = self.task.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(task) = task
            && let Err(error) = task.await
        {
            error!(%error, "the export task ended early");
        }
        self.counts()
    }
}

fn build(config: &ExporterConfig, protocol: Protocol, timeout: Duration) -> Result<SpanExporter, StartError> {
    // Bounded by the timeout alone, as the specification asks.
    let retries = RetryPolicy::recommended().with_max_retries(usize::MAX);
    let compression = config.compression.map(|Compression::Gzip| OtlpCompression::Gzip);
    let exporter = match protocol {
        Protocol::Grpc => {
            let mut builder = SpanExporter::builder()
                .with_tonic()
                .with_timeout(timeout)
                .with_retry_policy(retries);
            if let Some(endpoint) = &config.endpoint {
                builder = builder.with_endpoint(endpoint);
            }
            if let Some(compression) = compression {
                builder = builder.with_compression(compression);
            }
            builder.build()
        }
        Protocol::HttpProtobuf => {
            let mut builder = SpanExporter::builder()
                .with_http()
                .with_protocol(opentelemetry_otlp::Protocol::HttpBinary)
                .with_timeout(timeout)
                .with_retry_policy(retries);
            if let Some(endpoint) = &config.endpoint {
                builder = builder.with_endpoint(format!("{}/v1/traces", endpoint.trim_end_matches('/')));
            }
            if let Some(compression) = compression {
                builder = builder.with_compression(compression);
            }
            builder.build()
        }
    };
    Ok(exporter?)
}

fn first_env(names: &[&str]) -> Option<String> {
    names
        .iter()
        .find_map(|name| std::env::var(name).ok().filter(|value| !value.is_empty()))
}

fn protocol_from_env() -> Protocol {
    let protocol = first_env(&["OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL"]);
    match protocol.as_deref() {
        Some(protocol) if protocol.eq_ignore_ascii_case("grpc") => Protocol::Grpc,
        None => Protocol::HttpProtobuf,
        Some(protocol) => {
            if !protocol.eq_ignore_ascii_case("http/protobuf") {
                tracing::warn!(protocol, "unknown OTEL_EXPORTER_OTLP_PROTOCOL; using http/protobuf");
            }
            Protocol::HttpProtobuf
        }
    }
}

fn timeout_from_env() -> Duration {
    first_env(&["OTEL_EXPORTER_OTLP_TRACES_TIMEOUT", "OTEL_EXPORTER_OTLP_TIMEOUT"])
        .and_then(|timeout_ms| timeout_ms.parse().ok())
        .map_or(DEFAULT_TIMEOUT, Duration::from_millis)
}

/// The task: owns the connection and the back-off.
struct Worker {
    queue: mpsc::Receiver<Arc<Trace>>,
    stopped: watch::Receiver<Option<Instant>>,
    counters: Arc<Counters>,
    watcher: Dispatch,
    converter: Converter,
    exporter: SpanExporter,
    endpoint: String,
    timeout: Duration,
    batch_delay: Duration,
    max_pause: Duration,
    /// Pause before the next request; `None` while requests succeed.
    pause: Option<Duration>,
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
            for trace in batch {
                self.pack(&trace, &mut requests).await;
            }
            for request in requests {
                self.send(request).await;
            }
            if self.queue.is_empty() {
                self.counters.is_overflowing.store(false, Ordering::Relaxed);
            }
        }
    }

    /// `None` when the queue is closed and empty.
    async fn next_batch(&mut self) -> Option<Vec<Arc<Trace>>> {
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
        if let Some(pause) = self.pause {
            tokio::select! {
                () = tokio::time::sleep(pause) => {}
                () = stop_requested(&mut self.stopped) => {}
            }
        }
        self.exporter.set_resource(&self.converter.resource(&request.process));
        let export = self
            .exporter
            .export(request.spans)
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
            Ok(Err(error)) => self.failed(trace_count, &error.to_string()),
            Err(_) => self.failed(trace_count, "no answer in time"),
        }
    }

    fn succeeded(&mut self, trace_count: u64) {
        self.counters.exported.fetch_add(trace_count, Ordering::Relaxed);
        if self.pause.take().is_some() {
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
    let until = match stopped.wait_for(Option::is_some).await {
        Ok(until) => *until,
        Err(_) => None,
    };
    match until {
        Some(until) => tokio::time::sleep_until(until).await,
        None => std::future::pending().await,
    }
}
