//! The node agent: runs until it is told to end, takes a new configuration on SIGHUP, and delivers what it has on SIGTERM.

mod collect;
mod counts;
mod drain;
mod exports;
mod failure;
mod health;
mod lock;
mod logs;
mod notify;
mod own_metrics;
mod queue;
mod reload;
mod stages;

use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::watch;
use tracing::{info, warn};

use self::collect::Collector;
use self::counts::Counts;
use self::drain::{Drain, Schedule, Tally, Transit};
use self::exports::Exports;
use self::own_metrics::OwnMetrics;
pub(crate) use self::own_metrics::register_examples;
use self::reload::Reloader;
use self::stages::Stages;
pub use self::{
    health::{Answer, Health},
    lock::{InstanceLock, LockError},
    logs::{Logs, SetFilter},
};
use crate::bpf::RunTime;
use crate::clock::ClockAnchor;
use crate::config::{Config, Loaded, Sources};
use crate::http;
use crate::inventory::{self, FeaturesFile, Inventory, InventoryCollector};
use crate::metrics::Metrics;
use crate::pipeline::{Detail, Options, Pipeline};
use crate::place::Places;
use crate::recorder::{self, Recorder, RecorderCollector};
use crate::self_observation::SelfObservation;
use crate::sink::otlp_metrics::MetricsExporter;

const INDEX: &str = "\
wasmscope agent

/metrics   metrics, as OpenMetrics or Prometheus text
/healthz   whether the event loop turns
/readyz    whether everything is attached
/ui        invocations that were kept, as a page
/api/v1/traces            the same, as JSON
/api/v1/traces/slowest    one of them; ?format=mermaid draws it
/api/v1/inventory         runtimes and modules of this node, as JSON
";

/// How often the main loop looks after the agent, unless systemd wants to hear from it more often.
const TICK: Duration = Duration::from_secs(1);

/// Runs until SIGTERM or SIGINT. Success if everything was delivered in time, 3 if not.
pub async fn run(loaded: Loaded, sources: Sources, logs: &Logs, set_filter: SetFilter) -> anyhow::Result<ExitCode> {
    let start = Arc::new(loaded.config);
    let clock = ClockAnchor::now();
    let _lock = InstanceLock::take(&start.instance.lock_file)?;
    let mut interrupts = signal(SignalKind::interrupt()).context("cannot handle SIGINT")?;
    let mut terminations = signal(SignalKind::terminate()).context("cannot handle SIGTERM")?;
    let mut hangups = signal(SignalKind::hangup()).context("cannot handle SIGHUP")?;

    let places = Places::start(&start.kubernetes).context("cannot look pods up")?;
    let recorder = Arc::new(Recorder::new(
        start.recorder.clone(),
        clock,
        crate::pipeline::kernel_release(),
    ));
    let exports = Exports::start(&start.traces, &start.kubernetes.node_name, clock)?;
    let mut metrics = if start.capture.tier > 0 {
        Metrics::with_aggregates(start.metrics.clone())
    } else {
        Metrics::with_config(start.metrics.clone())
    };
    metrics
        .registry_mut()
        .register_collector(Box::new(RecorderCollector(recorder.clone())));
    let inventory = Arc::new(Inventory::new(
        start.inventory.clone(),
        start.kubernetes.node_name.clone(),
        start.capture.tier > 0,
    ));
    metrics
        .registry_mut()
        .register_collector(Box::new(InventoryCollector(inventory.clone())));
    // The file goes with this.
    let _features = FeaturesFile::start(&start.inventory, inventory.clone()).context("cannot write features")?;
    let own = OwnMetrics::register(metrics.registry_mut(), exports.sampled(), exports.exported());
    let metrics = Arc::new(metrics);
    // What is wrong with it is told before anything is probed.
    let metrics_exporter = start_metrics_exporter(&start, clock, &metrics)?;
    let health = Arc::new(Health::new(start.http.liveness_seconds));
    let parts = routes(&metrics, &health, recorder.clone(), inventory.clone());
    let server = http::Server::start(start.http.listen, parts)
        .await
        .with_context(|| format!("cannot listen on {} (http.listen)", start.http.listen))?;
    let options = Options {
        ring_bytes: start.capture.ring_mib << 20,
        watch_all: true,
        detail: if start.capture.tier == 0 {
            Detail::Node
        } else {
            Detail::BoundaryAndMetrics
        },
        file_grace_ns: start.capture.file_grace_seconds * 1_000_000_000,
        names_bytes: (start.capture.names_mib as usize) << 20,
        open_traces_bytes: (start.capture.open_traces_mib as usize) << 20,
    };
    // Loading takes seconds, in which health is to be answered.
    let governor = start.governor.clone();
    let names = Arc::clone(&places);
    let starting = tokio::task::spawn_blocking(move || {
        Pipeline::start(options).map(|mut pipeline| {
            pipeline.start_governor(governor, move |place| names.named(place));
            pipeline
        })
    });
    let mut pipeline = tokio::select! {
        started = starting => started?.context("cannot start")?,
        // Nothing is there yet that could be delivered.
        () = told_to_end(&mut interrupts, &mut terminations) => {
            info!("told to end while starting");
            return Ok(ExitCode::SUCCESS);
        }
    };
    let _run_time = start.capture.program_run_time.then(|| match RunTime::measure() {
        Ok(run_time) => Some(run_time),
        Err(error) => {
            warn!(
                %error,
                "cannot measure how long programs run (capture.program_run_time); CAP_SYS_ADMIN or sysctl kernel.bpf_stats_enabled=1 would"
            );
            None
        }
    });
    let observation = SelfObservation::new(&mut pipeline);
    metrics.add_collector(Box::new(observation.clone()));

    let max_bytes = start.capture.queue_mib << 20;
    let (sender, receiver, waiting) = queue::queue(start.capture.queue_traces, max_bytes);
    observation.add_queue("traces", sender.depth());
    let bytes = waiting.clone();
    observation.add_queue_bytes("traces", move || bytes.byte_count());
    let (stop, stopped) = watch::channel(None);
    let (budget, budgets) = watch::channel(start.governor.clone());
    let transit = Arc::new(Transit::default());
    let collector = Collector {
        traces: sender,
        transit: Arc::clone(&transit),
        metrics: Arc::clone(&metrics),
        counts: Counts::new(places.clone(), inventory.clone()),
        inventory,
        health: Arc::clone(&health),
        observation: observation.clone(),
        governor: budgets,
        stop: stopped.clone(),
    };
    let (ended, mut collected) = tokio::sync::oneshot::channel();
    let runtime = tokio::runtime::Handle::current();
    std::thread::Builder::new()
        .name("events".to_owned())
        .spawn(move || {
            let result = runtime.block_on(collector.run(&mut pipeline));
            // Nobody waits for it only once the deadline is over; and nobody has to wait for what is detached.
            let _ = ended.send(result);
            drop(pipeline);
        })
        .context("cannot start the event loop")?;
    let stages = Arc::new(Stages {
        places,
        metrics,
        recorder,
        exports,
        held: AtomicU64::new(0),
        transit: Arc::clone(&transit),
        waiting,
    });
    let running_stages = Arc::clone(&stages);
    let (held, exporting, sending) = (Arc::clone(&stages), Arc::clone(&stages), Arc::clone(&stages));
    observation.add_queue("place", move || held.held_count());
    observation.add_queue("export", move || exporting.exports.waiting_count());
    observation.add_queue_bytes("export", move || sending.exports.waiting_bytes());
    let max_held = start.kubernetes.max_held;
    // Half, so that names that do not come take no room from traces that need none.
    let mut stage_task =
        tokio::spawn(async move { running_stages.run(receiver, max_held, max_bytes / 2, stopped).await });
    info!(
        version = env!("CARGO_PKG_VERSION"),
        kernel = crate::pipeline::kernel_release(),
        address = %server.address(),
        tier = start.capture.tier,
        ring_mib = start.capture.ring_mib,
        exporting = stages.exports.is_exporting(),
        "started"
    );

    let mut reloader = Reloader::new(Arc::clone(&start), sources, set_filter);
    let mut tick = tokio::time::interval(notify::watchdog_interval().map_or(TICK, |interval| interval.min(TICK)));
    let mut is_announced = false;
    loop {
        tokio::select! {
            () = told_to_end(&mut interrupts, &mut terminations) => break,
            _ = hangups.recv() => {
                // A service that is still starting cannot reload.
                if is_announced {
                    notify::notify("RELOADING=1");
                }
                own.reloaded(reloader.reload(&stages));
                budget.send_replace(reloader.current().governor.clone());
                if is_announced {
                    notify::notify("READY=1");
                }
            }
            _ = tick.tick() => {
                count_losses(metrics_exporter.as_ref(), &stages.metrics);
                own.log_lines_dropped(logs.dropped_lines());
                if !is_announced && health.ready().reasons.is_empty() {
                    is_announced = true;
                    info!("ready");
                    notify::notify("READY=1");
                }
                if health.live().reasons.is_empty() {
                    notify::notify("WATCHDOG=1");
                }
                anyhow::ensure!(!stages.exports.has_panicked(), "the task that exports traces panicked");
                let has_panicked = metrics_exporter.as_ref().is_some_and(MetricsExporter::has_panicked);
                anyhow::ensure!(!has_panicked, "the task that exports metrics panicked");
            }
            result = &mut collected => return Err(failure::of_event_loop(result)),
            result = &mut stage_task => return Err(failure::of_stages(result, &mut collected).await),
        }
    }

    health.draining();
    let deadline = Duration::from_secs(reloader.current().shutdown.deadline_seconds);
    let schedule = Schedule::new(Instant::now(), deadline, metrics_exporter.is_some());
    notify::stopping(deadline);
    info!(seconds = deadline.as_secs(), "draining");
    let tally = Tally::begin(&transit, stages.exports.counts());
    stop.send_replace(Some(schedule));
    let drain = Drain {
        schedule,
        collected: &mut collected,
        stage_task: &mut stage_task,
        stages: &stages,
        metrics: metrics_exporter.as_ref(),
    };
    let drained = tokio::select! {
        drained = drain.run() => Some(drained),
        () = told_to_end(&mut interrupts, &mut terminations) => {
            warn!("second signal, ended at once");
            None
        }
    };
    let code = drain::tell(&tally.end(&transit, stages.exports.counts()), drained);
    // It is answered until the end; whoever still reads an answer is not waited for.
    drop(server);
    Ok(code)
}

async fn told_to_end(interrupts: &mut Signal, terminations: &mut Signal) {
    tokio::select! {
        _ = interrupts.recv() => {}
        _ = terminations.recv() => {}
    }
}

/// Starts to send metrics, if an endpoint is configured.
fn start_metrics_exporter(
    config: &Config,
    clock: ClockAnchor,
    metrics: &Arc<Metrics>,
) -> anyhow::Result<Option<MetricsExporter>> {
    if !config.otlp_metrics.target.is_set() {
        return Ok(None);
    }
    let metrics = Arc::clone(metrics);
    MetricsExporter::start(
        &config.otlp_metrics,
        &config.kubernetes.node_name,
        clock.unix_ns,
        Box::new(move || metrics.snapshot()),
    )
    .map(Some)
    .context("cannot export metrics")
}

fn count_losses(exporter: Option<&MetricsExporter>, metrics: &Metrics) {
    for loss in exporter.iter().flat_map(|exporter| exporter.losses()) {
        metrics.set_loss_total(&loss);
    }
}

fn routes(
    metrics: &Arc<Metrics>,
    health: &Arc<Health>,
    recorder: Arc<Recorder>,
    inventory: Arc<Inventory>,
) -> axum::Router {
    // Other parts' routes are merged here.
    let parts = http::metrics_routes(metrics.clone())
        .merge(health::routes(health))
        .merge(recorder::routes(recorder))
        .merge(inventory::routes(inventory));
    http::router(parts, INDEX)
}
