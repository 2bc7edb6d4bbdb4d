//! Sends the agent's metrics to an OpenTelemetry collector at an interval, as cumulative values: since the agent started, or since the reading before the
//! first one that has the series. Series of processes that are gone end, and those of the same name that come later begin anew.
//!
//! A reading that does not arrive is not repeated: the next one says all that it said, and more. Its data points count as lost meanwhile.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use opentelemetry_http::HttpClient as _;
use opentelemetry_proto::tonic::collector::metrics::v1::metrics_service_client::MetricsServiceClient;
use opentelemetry_proto::tonic::collector::metrics::v1::{ExportMetricsServiceRequest, ExportMetricsServiceResponse};
use opentelemetry_proto::tonic::common::v1::InstrumentationScope;
use opentelemetry_proto::tonic::metrics::v1::{Metric, ResourceMetrics, ScopeMetrics};
use opentelemetry_proto::tonic::resource::v1::Resource;
use prost::Message as _;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::Instant;
use tonic::codec::CompressionEncoding;
use tonic::service::interceptor::InterceptedService;
use tonic::transport::Channel;
use tracing::{error, info, warn};

use super::otlp::Protocol;
use super::otlp_config::{CompressionConfig, OtlpMetricsConfig, TargetConfig};
use super::otlp_points::{attribute, metric};
use super::otlp_starts::Starts;
use super::otlp_throttle::Throttle;
use super::otlp_transport::{self as transport, AddHeaders, Http, TransportError};
use super::tls_files::TlsFiles;
use crate::clock::ClockAnchor;
use crate::metrics::snapshot::Snapshot;
use crate::span::Loss;

/// Data points of one request: with some hundred bytes each, well below the 4 MiB that collectors take.
const MAX_REQUEST_POINTS: usize = 4_000;

/// Makes the reading that is sent.
pub type Read = Box<dyn Fn() -> Snapshot + Send + Sync>;

#[derive(Debug, Default)]
struct Counters {
    sent: AtomicU64,
    failed: AtomicU64,
    rejected: AtomicU64,
    unreadable: AtomicU64,
    shutdown: AtomicU64,
}

/// Data points of the reading that was sent last.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LastReading {
    /// Taken by the collector.
    pub taken: u64,
    /// Refused, or not arrived in time.
    pub lost: u64,
}

/// A running exporter of metrics.
#[derive(Debug)]
pub struct MetricsExporter {
    counters: Arc<Counters>,
    /// Until when the last reading may take; `None` while nobody has asked to stop.
    stop: watch::Sender<Option<Instant>>,
    task: Mutex<Option<JoinHandle<LastReading>>>,
}

impl MetricsExporter {
    /// Starts the task, on the current tokio runtime. `start_unix_ns` is since when the values count. The collector need not be there yet.
    pub fn start(
        config: &OtlpMetricsConfig,
        node_name: &str,
        start_unix_ns: u64,
        read: Read,
    ) -> Result<Self, TransportError> {
        let counters = Arc::new(Counters::default());
        let (stop, stopped) = watch::channel(None);
        let throttle = Arc::new(Throttle::default());
        let worker = Worker {
            tls_files: TlsFiles::of(&config.target),
            client: Client::new(&config.target, &throttle)?,
            throttle,
            endpoint: transport::shown_endpoint(&config.target),
            target: config.target.clone(),
            timeout: transport::timeout(&config.target),
            interval: Duration::from_secs(config.interval_seconds),
            resource: resource(node_name),
            starts: Starts::new(start_unix_ns),
            read: Arc::from(read),
            counters: Arc::clone(&counters),
            stopped,
            is_failing: false,
        };
        Ok(Self {
            counters,
            stop,
            task: Mutex::new(Some(tokio::spawn(worker.run()))),
        })
    }

    /// Data points that the collector has taken.
    pub fn sent_count(&self) -> u64 {
        self.counters.sent.load(Ordering::Relaxed)
    }

    /// Whether the task has ended before [`Self::shutdown`] was called: nothing is sent any more.
    pub fn has_panicked(&self) -> bool {
        let task = self.task.lock().unwrap_or_else(PoisonError::into_inner);
        task.as_ref().is_some_and(JoinHandle::is_finished)
    }

    /// Data points that did not arrive, in the vocabulary that all layers share; none with a count of zero.
    pub fn losses(&self) -> Vec<Loss> {
        [
            ("export_failed", &self.counters.failed),
            ("points_rejected", &self.counters.rejected),
            ("unreadable", &self.counters.unreadable),
            ("shutdown", &self.counters.shutdown),
        ]
        .into_iter()
        .map(|(reason, count)| Loss {
            layer: "export_metrics".to_owned(),
            reason: reason.to_owned(),
            count: count.load(Ordering::Relaxed),
        })
        .filter(|loss| loss.count > 0)
        .collect()
    }

    /// Gives up what is being sent, sends the last values within `deadline`, and stops. Calling it again changes nothing, and answers with nothing.
    pub async fn shutdown(&self, deadline: Duration) -> LastReading {
        self.stop.send_replace(Some(Instant::now() + deadline));
        let task = self.task.lock().unwrap_or_else(PoisonError::into_inner).take();
        let Some(task) = task else {
            return LastReading::default();
        };
        task.await.unwrap_or_else(|error| {
            error!(%error, "the task that exports metrics ended early");
            LastReading::default()
        })
    }
}

struct Worker {
    tls_files: TlsFiles,
    client: Client,
    throttle: Arc<Throttle>,
    target: TargetConfig,
    /// For the log.
    endpoint: String,
    timeout: Duration,
    interval: Duration,
    resource: Resource,
    starts: Starts,
    read: Arc<dyn Fn() -> Snapshot + Send + Sync>,
    counters: Arc<Counters>,
    stopped: watch::Receiver<Option<Instant>>,
    is_failing: bool,
}

impl Worker {
    async fn run(mut self) -> LastReading {
        let mut stopped = self.stopped.clone();
        // An error is the exporter dropped.
        while tokio::time::timeout(self.interval, stopped.wait_for(Option::is_some))
            .await
            .is_err()
        {
            self.send_all(None).await;
        }
        let until = *self.stopped.borrow();
        self.send_all(Some(until.unwrap_or_else(|| Instant::now() + self.timeout)))
            .await
    }

    /// Sends one reading: the last one until `until`; any other is given up when the last one is asked for, which tells all that it would have told.
    async fn send_all(&mut self, until: Option<Instant>) -> LastReading {
        let read = Arc::clone(&self.read);
        let now_ns = ClockAnchor::now().unix_ns;
        // Thousands of series take a while.
        let Ok(snapshot) = tokio::task::spawn_blocking(move || read()).await else {
            error!("metrics cannot be read");
            return LastReading::default();
        };
        let unreadable = snapshot.unreadable_count;
        self.counters.unreadable.fetch_add(unreadable, Ordering::Relaxed);
        self.starts.read(&snapshot, now_ns);
        self.renew();
        let mut reading = LastReading::default();
        for (metrics, point_count) in requests(snapshot, &self.starts, now_ns) {
            let request = self.request(metrics);
            let mut stopped = self.stopped.clone();
            let is_over = async {
                match until {
                    Some(until) => tokio::time::sleep_until(until).await,
                    None => drop(stopped.wait_for(Option::is_some).await),
                }
            };
            let sent = tokio::select! {
                biased;
                () = is_over => None,
                sent = self.send(request, until) => Some(sent),
            };
            let taken = if let Some(sent) = sent {
                self.sent(point_count, sent)
            } else {
                self.counters.shutdown.fetch_add(point_count, Ordering::Relaxed);
                0
            };
            reading.taken += taken;
            reading.lost += point_count - taken;
        }
        reading
    }

    /// Connects anew if files for TLS have changed.
    fn renew(&mut self) {
        if !self.tls_files.have_changed() {
            return;
        }
        match Client::new(&self.target, &self.throttle) {
            Ok(client) => {
                self.client = client;
                info!(endpoint = self.endpoint, "files for TLS have changed and are in use");
            }
            Err(error) => warn!(
                endpoint = self.endpoint,
                error = &error as &dyn std::error::Error,
                "files for TLS have changed and cannot be used; what was in them stays in use"
            ),
        }
    }

    /// Sends a request, unless the collector has asked for a wait: then the next reading tells all that this one would have told.
    async fn send(&mut self, request: ExportMetricsServiceRequest, until: Option<Instant>) -> Result<u64, String> {
        match (self.throttle.until(), until) {
            (Some(wanted), Some(until)) if wanted < until => tokio::time::sleep_until(wanted).await,
            (Some(_), _) => return Err("the collector has asked for a wait".to_owned()),
            (None, _) => {}
        }
        let sent = tokio::time::timeout(self.timeout, self.client.send(request, &self.throttle)).await;
        sent.unwrap_or_else(|_| Err("no answer in time".to_owned()))
    }

    fn request(&self, metrics: Vec<Metric>) -> ExportMetricsServiceRequest {
        ExportMetricsServiceRequest {
            resource_metrics: vec![ResourceMetrics {
                resource: Some(self.resource.clone()),
                scope_metrics: vec![ScopeMetrics {
                    scope: Some(InstrumentationScope {
                        name: "wasmscope".to_owned(),
                        version: env!("CARGO_PKG_VERSION").to_owned(),
                        ..InstrumentationScope::default()
                    }),
                    metrics,
                    ..ScopeMetrics::default()
                }],
                ..ResourceMetrics::default()
            }],
        }
    }

    /// Counts what became of data points, and says how many were taken.
    fn sent(&mut self, point_count: u64, result: Result<u64, String>) -> u64 {
        match result {
            Ok(rejected_count) => {
                let taken = point_count.saturating_sub(rejected_count);
                self.counters.sent.fetch_add(taken, Ordering::Relaxed);
                self.counters.rejected.fetch_add(rejected_count, Ordering::Relaxed);
                if std::mem::take(&mut self.is_failing) {
                    info!(endpoint = self.endpoint, "metrics are exported again");
                }
                taken
            }
            Err(reason) => {
                self.counters.failed.fetch_add(point_count, Ordering::Relaxed);
                if !std::mem::replace(&mut self.is_failing, true) {
                    error!(
                        endpoint = self.endpoint,
                        reason, "metrics cannot be exported; the newest are tried again at each interval"
                    );
                }
                0
            }
        }
    }
}

enum Client {
    Grpc(MetricsServiceClient<InterceptedService<Channel, AddHeaders>>),
    Http {
        http: Box<Http>,
        url: http::Uri,
        is_gzip: bool,
    },
}

impl Client {
    fn new(target: &TargetConfig, throttle: &Arc<Throttle>) -> Result<Self, TransportError> {
        let is_gzip = target.compression == CompressionConfig::Gzip;
        match target.protocol {
            Protocol::Grpc => {
                let headers = AddHeaders(transport::headers(target)?);
                let mut client = MetricsServiceClient::with_interceptor(transport::channel(target)?, headers);
                if is_gzip {
                    client = client.send_compressed(CompressionEncoding::Gzip);
                }
                Ok(Self::Grpc(client))
            }
            Protocol::HttpProtobuf => Ok(Self::Http {
                http: Box::new(Http::new(target, Arc::clone(throttle))?),
                url: transport::url(target, "metrics")?,
                is_gzip,
            }),
        }
    }

    /// How many data points the collector rejected, or why none arrived.
    async fn send(&mut self, request: ExportMetricsServiceRequest, throttle: &Throttle) -> Result<u64, String> {
        let response = match self {
            Self::Grpc(client) => client
                .export(request)
                .await
                .map_err(|status| {
                    throttle.note_status(&format!("{:?}", status.code()), status.details());
                    format!("{}: {}", status.code(), status.message())
                })?
                .into_inner(),
            Self::Http { http, url, is_gzip } => {
                let mut builder =
                    http::Request::post(url.clone()).header(http::header::CONTENT_TYPE, "application/x-protobuf");
                let mut body = request.encode_to_vec();
                if *is_gzip {
                    body = gzip(&body).map_err(|error| error.to_string())?;
                    builder = builder.header(http::header::CONTENT_ENCODING, "gzip");
                }
                let request = builder.body(Bytes::from(body)).map_err(|error| error.to_string())?;
                let response = http.send_bytes(request).await.map_err(|error| error.to_string())?;
                if !response.status().is_success() {
                    return Err(format!("HTTP status {}", response.status()));
                }
                // An answer that is not one still says that the request was taken.
                ExportMetricsServiceResponse::decode(response.into_body()).unwrap_or_default()
            }
        };
        let rejected = response
            .partial_success
            .map_or(0, |partial| partial.rejected_data_points);
        Ok(u64::try_from(rejected).unwrap_or_default())
    }
}

fn gzip(body: &[u8]) -> std::io::Result<Vec<u8>> {
    use std::io::Write as _;
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(body)?;
    encoder.finish()
}

fn resource(node_name: &str) -> Resource {
    let mut attributes = vec![
        attribute("service.name", "wasmscope".to_owned()),
        attribute("service.version", env!("CARGO_PKG_VERSION").to_owned()),
    ];
    if let Ok(name) = rustix::system::uname().nodename().to_str() {
        attributes.push(attribute("host.name", name.to_owned()));
    }
    if !node_name.is_empty() {
        attributes.push(attribute("k8s.node.name", node_name.to_owned()));
    }
    Resource {
        attributes,
        ..Resource::default()
    }
}

/// The metrics of each request, with their data points.
fn requests(snapshot: Snapshot, starts: &Starts, now_ns: u64) -> Vec<(Vec<Metric>, u64)> {
    let mut requests: Vec<(Vec<Metric>, u64)> = Vec::new();
    for family in snapshot.families {
        let mut rest = &family.series[..];
        while !rest.is_empty() {
            let used = requests.last().map_or(MAX_REQUEST_POINTS, |(_, count)| *count as usize);
            if used >= MAX_REQUEST_POINTS {
                requests.push((Vec::new(), 0));
                continue;
            }
            let (now, later) = rest.split_at(rest.len().min(MAX_REQUEST_POINTS - used));
            rest = later;
            if let Some((metrics, count)) = requests.last_mut() {
                metrics.push(metric(&family, now, starts, now_ns));
                *count += now.len() as u64;
            }
        }
    }
    requests
}

#[cfg(test)]
mod tests {
    use opentelemetry_proto::tonic::metrics::v1::metric;

    use super::*;

    #[test]
    fn a_reading_of_any_size_is_split_and_nothing_is_dropped() {
        use std::fmt::Write as _;
        let mut text = String::new();
        for family in 0..3 {
            let _ = writeln!(text, "# TYPE f{family} counter");
            for series in 0..3_001 {
                let _ = writeln!(text, "f{family}_total{{a=\"{series}\"}} 1");
            }
        }
        let snapshot = Snapshot::parse(&text);
        let mut starts = Starts::new(1);
        starts.read(&snapshot, 2);
        let requests = requests(snapshot, &starts, 2);
        let counts: Vec<u64> = requests.iter().map(|(_, count)| *count).collect();
        assert_eq!(counts, [4_000, 4_000, 1_003]);
        let sum: usize = requests
            .iter()
            .flat_map(|(metrics, _)| metrics)
            .map(|metric| match &metric.data {
                Some(metric::Data::Sum(sum)) => sum.data_points.len(),
                _ => 0,
            })
            .sum();
        assert_eq!(sum, 9_003);
    }
}
