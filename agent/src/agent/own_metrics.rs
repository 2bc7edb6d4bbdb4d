//! What the agent says of itself as a daemon, beside what it measures.

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;

use super::exports::{Sampled, no_decisions};

/// All of them with their series, for the reference of metrics.
pub(crate) fn register_examples(registry: &mut Registry) {
    OwnMetrics::register(registry, no_decisions(), Counter::default());
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Build {
    version: &'static str,
    kernel: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Reload {
    result: &'static str,
}

/// The families.
#[derive(Debug)]
pub(super) struct OwnMetrics {
    reloads: Family<Reload, Counter>,
    log_lines_dropped: Counter,
}

impl OwnMetrics {
    /// With what is known from the start.
    pub(super) fn register(registry: &mut Registry, sampled: Sampled, exported: Counter) -> Self {
        let build = Family::<Build, Gauge>::default();
        build
            .get_or_create(&Build {
                version: env!("CARGO_PKG_VERSION"),
                kernel: crate::pipeline::kernel_release(),
            })
            .set(1);
        registry.register("wasmscope_build_info", "This agent and its kernel; always 1", build);
        let reloads = Family::<Reload, Counter>::default();
        for result in ["success", "failure"] {
            drop(reloads.get_or_create(&Reload { result }));
        }
        registry.register(
            "wasmscope_config_reloads",
            "Times that the configuration was read again",
            reloads.clone(),
        );
        registry.register(
            "wasmscope_traces_sampled",
            "Traces by whether they are exported; none are counted while there is no collector",
            sampled,
        );
        registry.register(
            "wasmscope_traces_exported",
            "Traces that a collector has taken",
            exported,
        );
        let log_lines_dropped = Counter::default();
        registry.register(
            "wasmscope_log_lines_dropped",
            "Lines of the log that were not written, as nobody read stderr",
            log_lines_dropped.clone(),
        );
        Self {
            reloads,
            log_lines_dropped,
        }
    }

    /// Counts a reload.
    pub(super) fn reloaded(&self, is_success: bool) {
        let result = if is_success { "success" } else { "failure" };
        self.reloads.get_or_create(&Reload { result }).inc();
    }

    /// Takes over how many lines of the log were dropped so far.
    pub(super) fn log_lines_dropped(&self, total: u64) {
        // Nobody else counts it up.
        self.log_lines_dropped
            .inc_by(total.saturating_sub(self.log_lines_dropped.get()));
    }
}
