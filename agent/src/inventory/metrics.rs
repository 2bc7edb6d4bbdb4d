//! `wasm_runtime_info` and `wasm_module_info`, made from the inventory at each scrape.

use std::fmt;
use std::sync::Arc;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric as _, MetricEncoder};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::gauge::ConstGauge;

use super::{Compilation, Inventory, InventoryConfig, ModuleRow, RuntimeKey, RuntimeRow, Snapshot};

const OTHER: &str = "other";

/// Puts the families of an inventory into a registry.
#[derive(Clone, Debug)]
pub struct InventoryCollector(pub Arc<Inventory>);

impl InventoryCollector {
    /// With one series in each family, for the reference.
    pub(crate) fn example() -> Self {
        let inventory = Inventory::new(InventoryConfig::default(), String::new(), true);
        let unknown = || "unknown".to_owned();
        inventory.snapshot.store(Arc::new(Snapshot {
            runtimes: vec![RuntimeRow {
                key: RuntimeKey {
                    runtime: unknown(),
                    version: unknown(),
                    embedding: "unknown",
                    stripped: "unknown",
                },
                processes: 1,
            }],
            modules: vec![ModuleRow {
                module: unknown(),
                module_hash: unknown(),
                kind: "core",
                compilation: Compilation::Unknown,
                processes: 1,
                warm_processes: 0,
                invocations_seen: 0,
                cold_starts_seen: 0,
                cold_ratio: None,
                instances_seen: 0,
                idle_seconds: None,
            }],
            ..Snapshot::default()
        }));
        Self(Arc::new(inventory))
    }
}

impl Collector for InventoryCollector {
    fn encode(&self, encoder: DescriptorEncoder) -> Result<(), fmt::Error> {
        encode(&self.0.snapshot(), encoder)
    }
}

fn encode(snapshot: &Snapshot, mut encoder: DescriptorEncoder) -> Result<(), fmt::Error> {
    let mut family = encoder.encode_descriptor(
        "wasm_runtime_info",
        "Processes that have a runtime now, by its version and embedding",
        None,
        MetricType::Gauge,
    )?;
    for row in &snapshot.runtimes {
        let key = &row.key;
        let labels = [key.runtime.as_str(), &key.version, key.embedding, key.stripped];
        runtime(&mut family, labels, row.processes)?;
    }
    if snapshot.other_runtime_processes > 0 {
        runtime(&mut family, [OTHER; 4], snapshot.other_runtime_processes)?;
    }
    let mut family = encoder.encode_descriptor(
        "wasm_module_info",
        "Processes that hold the code of a module now, by name and hash",
        None,
        MetricType::Gauge,
    )?;
    for row in &snapshot.modules {
        let labels = [&*row.module, &row.module_hash, row.kind, row.compilation.as_str()];
        module(&mut family, labels, row.processes)?;
    }
    if snapshot.other_module_processes > 0 {
        module(&mut family, [OTHER; 4], snapshot.other_module_processes)?;
    }
    Ok(())
}

fn runtime(family: &mut MetricEncoder<'_>, labels: [&str; 4], count: u64) -> fmt::Result {
    let [runtime, version, embedding, stripped] = labels;
    let labels = [
        ("runtime", runtime),
        ("version", version),
        ("embedding", embedding),
        ("stripped", stripped),
    ];
    ConstGauge::new(count.cast_signed()).encode(family.encode_family(&labels)?)
}

fn module(family: &mut MetricEncoder<'_>, labels: [&str; 4], count: u64) -> fmt::Result {
    let [module, hash, kind, compilation] = labels;
    let labels = [
        ("module", module),
        ("module_hash", hash),
        ("kind", kind),
        ("compilation", compilation),
    ];
    ConstGauge::new(count.cast_signed()).encode(family.encode_family(&labels)?)
}
