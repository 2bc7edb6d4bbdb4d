//! Traces on their way to the collector: which of them, and to which collector while the configuration changes.

use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use arc_swap::ArcSwapOption;
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use tokio::task::JoinSet;
use tracing::{error, info};

use crate::clock::ClockAnchor;
use crate::sampling::{Decision, Sampler};
use crate::sink::otlp::{ExportCounts, Exporter, ExporterConfig, StartError};
use crate::sink::otlp_config::TracesConfig;
use crate::span::Trace;

/// What an exporter that has been replaced has to send what it has.
const RETIRING: Duration = Duration::from_secs(10);

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(super) struct DecisionLabel {
    decision: &'static str,
}

/// Decisions on traces, counted.
pub(super) type Sampled = Family<DecisionLabel, Counter>;

/// The sampler and the exporters behind it.
pub(super) struct Exports {
    clock: ClockAnchor,
    node_name: String,
    current: ArcSwapOption<Exporter>,
    sampler: Mutex<Sampler>,
    sampled: Sampled,
    exported: Counter,
    config: Mutex<TracesConfig>,
    retired: Mutex<Retired>,
}

/// A configuration whose exporter could be made.
pub(super) struct Prepared {
    config: TracesConfig,
    /// It takes another exporter, or none.
    is_elsewhere: bool,
    exporter: Option<Arc<Exporter>>,
}

#[derive(Default)]
struct Retired {
    /// Of those that have ended.
    counts: Vec<ExportCounts>,
    exporters: Vec<Arc<Exporter>>,
    tasks: JoinSet<()>,
    /// Somebody waits for the tasks; none of the exporters counts as ended.
    is_finishing: bool,
}

impl Retired {
    /// Lets one send what it has.
    fn add(&mut self, old: Arc<Exporter>) {
        self.exporters.push(Arc::clone(&old));
        self.tasks.spawn(async move {
            old.shutdown(RETIRING).await;
        });
    }
}

/// Of each decision none, which is told too.
pub(super) fn no_decisions() -> Sampled {
    let sampled = Sampled::default();
    for decision in Decision::ALL {
        drop(sampled.get_or_create(&DecisionLabel {
            decision: decision.as_str(),
        }));
    }
    sampled
}

impl Exports {
    /// Starts the exporter, if an endpoint is configured.
    pub(super) fn start(config: &TracesConfig, node_name: &str, clock: ClockAnchor) -> Result<Self, StartError> {
        Ok(Self {
            clock,
            node_name: node_name.to_owned(),
            current: ArcSwapOption::new(start(config, node_name, clock)?),
            sampler: Mutex::new(Sampler::new(config.sampling.clone())),
            sampled: no_decisions(),
            exported: Counter::default(),
            config: Mutex::new(config.clone()),
            retired: Mutex::default(),
        })
    }

    /// `wasmscope_traces_sampled_total`, to be registered.
    pub(super) fn sampled(&self) -> Sampled {
        self.sampled.clone()
    }

    /// `wasmscope_traces_exported_total`, to be registered.
    pub(super) fn exported(&self) -> Counter {
        self.exported.clone()
    }

    /// Brings the counter up to date. What all exporters have counted by then.
    pub(super) fn count_exported(&self) -> ExportCounts {
        let counts = self.counts();
        self.exported.inner().fetch_max(counts.exported, Ordering::Relaxed);
        counts
    }

    /// How many traces were kept and have not been heard of since.
    pub(super) fn waiting_count(&self) -> u64 {
        self.counts().waiting()
    }

    /// Estimated memory of those, bytes.
    pub(super) fn waiting_bytes(&self) -> u64 {
        let retired = lock(&self.retired);
        let current = self.current.load_full();
        let exporters = retired.exporters.iter().chain(&current);
        exporters.map(|exporter| exporter.queued_bytes()).sum()
    }

    /// Whether the exporter in force has ended, though nobody has asked it to.
    pub(super) fn has_panicked(&self) -> bool {
        let exporter = self.current.load();
        exporter.as_ref().is_some_and(|exporter| exporter.has_panicked())
    }

    /// Whether traces are exported.
    pub(super) fn is_exporting(&self) -> bool {
        self.current.load().is_some()
    }

    /// Decides on a trace, and hands it over; never waits. Whether an exporter has taken it.
    pub(super) fn offer(&self, trace: Arc<Trace>) -> bool {
        let Some(exporter) = self.current.load_full() else {
            return false;
        };
        let decision = lock(&self.sampler).decide(&trace);
        self.sampled
            .get_or_create(&DecisionLabel {
                decision: decision.as_str(),
            })
            .inc();
        decision.is_kept() && self.hand_over(exporter, trace)
    }

    /// To `exporter`, or to the one that has replaced it meanwhile.
    fn hand_over(&self, mut exporter: Arc<Exporter>, mut trace: Arc<Trace>) -> bool {
        loop {
            trace = match exporter.try_offer(trace) {
                Ok(is_taken) => return is_taken,
                Err(trace) => trace,
            };
            match self.current.load_full() {
                Some(next) if !Arc::ptr_eq(&next, &exporter) => exporter = next,
                // Nobody is left who would take it: it counts as lost.
                _ => return exporter.offer(trace),
            }
        }
    }

    /// Makes what a new configuration needs: where traces go or wait is changed by a new exporter. Nothing has changed yet.
    pub(super) fn prepare(&self, new: &TracesConfig) -> Result<Prepared, StartError> {
        let config = lock(&self.config);
        let without_sampling = |config: &TracesConfig| TracesConfig {
            sampling: crate::sampling::SamplingConfig::default(),
            ..config.clone()
        };
        let is_elsewhere = without_sampling(&config) != without_sampling(new);
        let exporter = if is_elsewhere {
            start(new, &self.node_name, self.clock)?
        } else {
            None
        };
        Ok(Prepared {
            config: new.clone(),
            is_elsewhere,
            exporter,
        })
    }

    /// Puts a configuration in force; an exporter that is replaced sends what it has.
    pub(super) fn commit(&self, prepared: Prepared) {
        let new = prepared.config;
        let mut config = lock(&self.config);
        if prepared.is_elsewhere {
            // At once, for whoever adds up what both have counted.
            let mut retired = lock(&self.retired);
            if let Some(old) = self.current.swap(prepared.exporter) {
                retired.add(old);
            }
            drop(retired);
            info!(exporting = self.is_exporting(), "where traces go has changed");
        }
        if config.sampling != new.sampling {
            lock(&self.sampler).reconfigure(new.sampling.clone());
        }
        *config = new;
    }

    /// Of all exporters that there have been.
    pub(super) fn counts(&self) -> ExportCounts {
        let mut retired = lock(&self.retired);
        let current = self.current.load().as_ref().map(|exporter| exporter.counts());
        while retired.tasks.try_join_next().is_some() {}
        if retired.tasks.is_empty() && !retired.is_finishing {
            let Retired { counts, exporters, .. } = &mut *retired;
            for exporter in std::mem::take(exporters) {
                match Arc::try_unwrap(exporter) {
                    Ok(ended) => counts.push(ended.counts()),
                    // Somebody is still about to offer it a trace.
                    Err(exporter) => exporters.push(exporter),
                }
            }
            *counts = vec![counts.drain(..).sum()];
        }
        let running = retired.exporters.iter().map(|exporter| exporter.counts());
        retired.counts.iter().copied().chain(running).chain(current).sum()
    }

    /// Lets all exporters send what they have, within `deadline`.
    pub(super) async fn finish(&self, deadline: Duration) -> ExportCounts {
        let (mut tasks, retired) = {
            let mut retired = lock(&self.retired);
            retired.is_finishing = true;
            (std::mem::take(&mut retired.tasks), retired.exporters.clone())
        };
        let current = self.current.load_full();
        let all = async {
            let exporters = retired.iter().chain(&current);
            futures_util::future::join_all(exporters.map(|exporter| exporter.shutdown(deadline))).await;
            while let Some(result) = tasks.join_next().await {
                if let Err(error) = result {
                    error!(%error, "an export task ended early");
                }
            }
        };
        // All of them end by themselves; this is for one that is kept from it.
        let _ = tokio::time::timeout(deadline + Duration::from_millis(100), all).await;
        self.counts()
    }
}

fn start(config: &TracesConfig, node_name: &str, clock: ClockAnchor) -> Result<Option<Arc<Exporter>>, StartError> {
    config
        .target
        .is_set()
        .then(|| {
            let config = ExporterConfig {
                node_name: node_name.to_owned(),
                ..ExporterConfig::from(config)
            };
            Exporter::start(&config, clock).map(Arc::new)
        })
        .transpose()
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicU64;

    use axum::Router;
    use axum::routing::post;
    use opentelemetry_proto::tonic::collector::trace::v1::ExportTraceServiceRequest;
    use prost::Message as _;

    use super::*;
    use crate::sampling::SamplingConfig;
    use crate::sink::testing::{invoke, trace};

    /// A collector that takes everything.
    struct Receiver {
        endpoint: String,
        span_count: Arc<AtomicU64>,
    }

    impl Receiver {
        async fn start() -> Self {
            let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
            let endpoint = format!("http://{}", listener.local_addr().unwrap());
            let span_count = Arc::new(AtomicU64::new(0));
            let counted = Arc::clone(&span_count);
            let take = move |body: axum::body::Bytes| {
                let request = ExportTraceServiceRequest::decode(body).unwrap();
                let scopes = request.resource_spans.iter().flat_map(|resource| &resource.scope_spans);
                let count: usize = scopes.map(|scope| scope.spans.len()).sum();
                counted.fetch_add(count as u64, Ordering::SeqCst);
                std::future::ready(())
            };
            let router = Router::new().route("/v1/traces", post(take));
            tokio::spawn(async move { axum::serve(listener, router).await });
            Self { endpoint, span_count }
        }

        fn span_count(&self) -> u64 {
            self.span_count.load(Ordering::SeqCst)
        }

        /// Everything goes to it.
        fn config(&self) -> TracesConfig {
            let mut config = TracesConfig {
                queue_traces: 1_000_000,
                queue_mib: 4_096,
                ..TracesConfig::default()
            };
            config.target.endpoint = Some(self.endpoint.clone());
            config.sampling.traces_per_second = 1e9;
            config.sampling.burst = 1e9;
            config
        }
    }

    fn config(endpoint: Option<&str>) -> TracesConfig {
        let mut config = TracesConfig::default();
        config.target.endpoint = endpoint.map(str::to_owned);
        // The port of nobody: what is sent is lost at once.
        config.target.timeout_ms = 1;
        config
    }

    fn anchor() -> ClockAnchor {
        ClockAnchor {
            monotonic_ns: 0,
            unix_ns: 0,
        }
    }

    fn reconfigure(exports: &Exports, config: &TracesConfig) -> Result<(), StartError> {
        exports.commit(exports.prepare(config)?);
        Ok(())
    }

    fn offer(exports: &Exports, count: u64) {
        for i in 0..count {
            exports.offer(Arc::new(trace(invoke("run", i, i + 1))));
        }
    }

    #[tokio::test]
    async fn every_trace_is_accounted_for_while_exporters_come_and_go() {
        let exports = Exports::start(&config(Some("http://127.0.0.1:1")), "", anchor()).unwrap();
        offer(&exports, 5);
        reconfigure(&exports, &config(Some("http://127.0.0.1:2"))).unwrap();
        offer(&exports, 7);
        reconfigure(&exports, &config(None)).unwrap();
        assert!(!exports.is_exporting());
        offer(&exports, 100);
        let counts = exports.finish(Duration::from_secs(30)).await;
        assert_eq!(
            (counts.offered, counts.exported + counts.lost()),
            (12, 12),
            "{counts:?}"
        );
    }

    #[tokio::test]
    async fn a_trace_on_its_way_to_an_exporter_that_is_replaced_goes_to_the_next() {
        let one = || Arc::new(trace(invoke("run", 1, 2)));
        let (first, second) = (Receiver::start().await, Receiver::start().await);
        let exports = Exports::start(&first.config(), "", anchor()).unwrap();
        let old = exports.current.load_full().unwrap();
        reconfigure(&exports, &second.config()).unwrap();
        let mut taken = 0;
        while old.try_offer(one()).is_ok() {
            taken += 1;
            tokio::task::yield_now().await;
        }
        assert!(exports.hand_over(Arc::clone(&old), one()));
        let last = exports.current.load_full().unwrap();
        reconfigure(&exports, &config(None)).unwrap();
        let mut taken_by_last = 1;
        while last.try_offer(one()).is_ok() {
            taken_by_last += 1;
            tokio::task::yield_now().await;
        }
        // None is left: neither takes it, and it is counted though both have been replaced.
        let all = taken + taken_by_last;
        while exports.counts().exported < all {
            tokio::task::yield_now().await;
        }
        assert!(!exports.hand_over(old, one()) && !exports.hand_over(last, one()));
        let counts = exports.finish(Duration::from_secs(30)).await;
        let expected = ExportCounts {
            offered: all + 2,
            exported: all,
            lost_shutdown: 2,
            ..ExportCounts::default()
        };
        assert_eq!(counts, expected);
        assert_eq!((first.span_count(), second.span_count()), (taken, taken_by_last));
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn no_trace_is_lost_between_two_collectors_however_often_the_agent_is_told_to_use_the_other() {
        const RELOADS: u64 = 20;
        const OFFERS: u64 = 1_000;
        let receivers = [Receiver::start().await, Receiver::start().await];
        let exports = Arc::new(Exports::start(&receivers[0].config(), "", anchor()).unwrap());
        let offered = Arc::new(AtomicU64::new(0));
        let offering = {
            let (exports, offered) = (Arc::clone(&exports), Arc::clone(&offered));
            tokio::task::spawn_blocking(move || {
                for i in 0..RELOADS * OFFERS {
                    assert!(exports.offer(Arc::new(trace(invoke("run", i, i + 1)))));
                    offered.fetch_add(1, Ordering::SeqCst);
                }
            })
        };
        for reload in 0..RELOADS {
            while offered.load(Ordering::SeqCst) < reload * OFFERS {
                tokio::task::yield_now().await;
            }
            let next = &receivers[(reload as usize + 1) % 2];
            reconfigure(&exports, &next.config()).unwrap();
        }
        offering.await.unwrap();
        let counts = exports.finish(Duration::from_secs(30)).await;
        let expected = ExportCounts {
            offered: RELOADS * OFFERS,
            exported: RELOADS * OFFERS,
            ..ExportCounts::default()
        };
        assert_eq!(counts, expected);
        let spans = receivers.each_ref().map(Receiver::span_count);
        assert_eq!(spans[0] + spans[1], RELOADS * OFFERS);
        assert!(spans[0] > 0 && spans[1] > 0, "{spans:?}");
    }

    #[tokio::test]
    async fn a_target_that_cannot_be_leaves_the_old_one_in_force() {
        let exports = Exports::start(&config(Some("http://127.0.0.1:1")), "", anchor()).unwrap();
        let mut wrong = config(Some("https://127.0.0.1:1"));
        wrong.target.tls.ca_file = Some("/does/not/exist".into());
        let error = reconfigure(&exports, &wrong).unwrap_err().to_string();
        assert!(
            error.contains("/does/not/exist") && error.contains("tls.ca_file"),
            "{error}"
        );
        offer(&exports, 1);
        assert_eq!(exports.counts().offered, 1);
    }

    #[tokio::test]
    async fn sampling_is_reconfigured_without_a_new_exporter() {
        let exports = Exports::start(&config(Some("http://127.0.0.1:1")), "", anchor()).unwrap();
        let mut none = config(Some("http://127.0.0.1:1"));
        none.sampling = SamplingConfig {
            ratio: 0.0,
            ..SamplingConfig::default()
        };
        offer(&exports, 1);
        reconfigure(&exports, &none).unwrap();
        offer(&exports, 10);
        assert_eq!(exports.counts().offered, 1);
        let label = |decision: Decision| DecisionLabel {
            decision: decision.as_str(),
        };
        let dropped = exports.sampled.get_or_create(&label(Decision::RatioDropped)).get();
        assert_eq!(dropped, 10);
    }
}
