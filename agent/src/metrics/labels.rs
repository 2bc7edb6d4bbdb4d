//! The label sets of the families. Values come from traced processes: each is bounded, printable and never empty before it becomes a label.

use prometheus_client::encoding::{
    EncodeLabelKey, EncodeLabelSet, EncodeLabelValue, LabelSetEncoder, LabelValueEncoder,
};

use super::bounded::Labels;
use super::config::{MetricsConfig, label_name};
use crate::sink::text::bounded_line;
use crate::span::Process;

/// Longest label value.
const MAX_VALUE_BYTES: usize = 128;

/// A label value as text.
pub(super) fn bounded_value(untrusted: &str) -> String {
    Value::new(untrusted).0.into()
}

/// A bounded label value.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Value(Box<str>);

impl Value {
    /// Whatever the text, a value that a scraper takes: an empty one would mean that the label is absent.
    pub(super) fn new(untrusted: &str) -> Self {
        if untrusted.is_empty() {
            Self::unknown()
        } else {
            Self(bounded_line(untrusted, MAX_VALUE_BYTES).into())
        }
    }

    pub(super) fn unknown() -> Self {
        Self("unknown".into())
    }

    fn other() -> Self {
        Self("other".into())
    }
}

impl EncodeLabelValue for Value {
    fn encode(&self, encoder: &mut LabelValueEncoder<'_>) -> Result<(), std::fmt::Error> {
        EncodeLabelValue::encode(&&*self.0, encoder)
    }
}

/// Whose activity it is. Every `wasm_…` family flattens this into its labels, so where a process runs (`namespace`, `pod`, `container`, what else is
/// wanted of the pod's labels) is added here and nowhere else. What is not in a pod has none of these labels.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Workload {
    process: Option<Value>,
    namespace: Option<Value>,
    pod: Option<Value>,
    container: Option<Value>,
    pod_labels: Vec<(String, Value)>,
}

impl Workload {
    pub(super) fn new(process: &Process, config: &MetricsConfig) -> Self {
        let value = |name: &Option<String>| name.as_deref().map(Value::new);
        let pod_label = |name: &String| {
            let value = process.place.labels.get(name)?;
            Some((label_name(name), Value::new(value)))
        };
        Self {
            process: config.process_label.then(|| Value::new(&process.command)),
            namespace: value(&process.place.namespace),
            pod: value(&process.place.pod_name),
            container: value(&process.place.container_name),
            pod_labels: config.pod_labels.iter().filter_map(pod_label).collect(),
        }
    }

    fn other(&self) -> Self {
        Self {
            process: self.process.as_ref().map(|_| Value::other()),
            namespace: None,
            pod: None,
            container: None,
            pod_labels: Vec::new(),
        }
    }
}

impl EncodeLabelSet for Workload {
    fn encode(&self, encoder: &mut LabelSetEncoder<'_>) -> Result<(), std::fmt::Error> {
        let places = [
            ("process", self.process.as_ref()),
            ("namespace", self.namespace.as_ref()),
            ("pod", self.pod.as_ref()),
            ("container", self.container.as_ref()),
        ];
        let places = places.into_iter().filter_map(|(name, value)| Some((name, value?)));
        let labels = self.pod_labels.iter().map(|(name, value)| (name.as_str(), value));
        for (name, value) in places.chain(labels) {
            let mut label = encoder.encode_label();
            let mut key = label.encode_label_key()?;
            EncodeLabelKey::encode(&name, &mut key)?;
            let mut encoded = key.encode_label_value()?;
            EncodeLabelValue::encode(value, &mut encoded)?;
            encoded.finish()?;
        }
        Ok(())
    }
}

/// The way into a guest that something happened under.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(super) struct ExportLabels {
    #[prometheus(flatten)]
    pub(super) workload: Workload,
    pub(super) module: Value,
    pub(super) export: Value,
}

impl Labels for ExportLabels {
    fn other(&self) -> Self {
        Self {
            workload: self.workload.other(),
            module: Value::other(),
            export: Value::other(),
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(super) struct InvocationLabels {
    #[prometheus(flatten)]
    pub(super) export: ExportLabels,
    pub(super) outcome: &'static str,
}

impl Labels for InvocationLabels {
    fn other(&self) -> Self {
        Self {
            export: self.export.other(),
            ..*self
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(super) struct ImportLabels {
    #[prometheus(flatten)]
    pub(super) workload: Workload,
    pub(super) module: Value,
    pub(super) import: Value,
}

impl Labels for ImportLabels {
    fn other(&self) -> Self {
        Self {
            workload: self.workload.other(),
            module: Value::other(),
            import: Value::other(),
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(super) struct HostCallLabels {
    #[prometheus(flatten)]
    pub(super) import: ImportLabels,
    pub(super) outcome: &'static str,
}

impl Labels for HostCallLabels {
    fn other(&self) -> Self {
        Self {
            import: self.import.other(),
            ..*self
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(super) struct SyscallTimeLabels {
    #[prometheus(flatten)]
    pub(super) export: ExportLabels,
    pub(super) syscall: Value,
}

impl Labels for SyscallTimeLabels {
    fn other(&self) -> Self {
        Self {
            export: self.export.other(),
            syscall: Value::other(),
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(super) struct SyscallLabels {
    #[prometheus(flatten)]
    pub(super) call: SyscallTimeLabels,
    /// `ok`, `unfinished`, `unknown` or the name of an errno.
    pub(super) outcome: Value,
}

impl Labels for SyscallLabels {
    fn other(&self) -> Self {
        Self {
            call: self.call.other(),
            outcome: Value::other(),
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(super) struct IoLabels {
    #[prometheus(flatten)]
    pub(super) export: ExportLabels,
    /// `read` or `write`.
    pub(super) direction: &'static str,
}

impl Labels for IoLabels {
    fn other(&self) -> Self {
        Self {
            export: self.export.other(),
            ..*self
        }
    }
}

/// A module, for what belongs to it or to its instances.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(super) struct ModuleLabels {
    #[prometheus(flatten)]
    pub(super) workload: Workload,
    pub(super) module: Value,
}

impl Labels for ModuleLabels {
    fn other(&self) -> Self {
        Self {
            workload: self.workload.other(),
            module: Value::other(),
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(super) struct PhaseLabels {
    #[prometheus(flatten)]
    pub(super) module: ModuleLabels,
    pub(super) phase: &'static str,
}

impl Labels for PhaseLabels {
    fn other(&self) -> Self {
        Self {
            module: self.module.other(),
            phase: self.phase,
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(super) struct TrapLabels {
    #[prometheus(flatten)]
    pub(super) export: ExportLabels,
    pub(super) code: Value,
}

impl Labels for TrapLabels {
    fn other(&self) -> Self {
        Self {
            export: self.export.other(),
            code: Value::other(),
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(super) struct GrowLabels {
    #[prometheus(flatten)]
    pub(super) module: ModuleLabels,
    /// `ok`, `refused`, `host_error`, `unfinished` or `unknown`.
    pub(super) outcome: &'static str,
}

impl Labels for GrowLabels {
    fn other(&self) -> Self {
        Self {
            module: self.module.other(),
            ..*self
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(super) struct InterruptionLabels {
    #[prometheus(flatten)]
    pub(super) export: ExportLabels,
    /// `fuel` or `epoch`.
    pub(super) kind: &'static str,
    /// `ok` where the guest went on, `trap` where it did not.
    pub(super) outcome: &'static str,
}

impl Labels for InterruptionLabels {
    fn other(&self) -> Self {
        Self {
            export: self.export.other(),
            ..*self
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(super) struct LossLabels {
    pub(super) layer: Value,
    pub(super) reason: Value,
}

impl Labels for LossLabels {
    fn other(&self) -> Self {
        Self {
            layer: Value::other(),
            reason: Value::other(),
        }
    }
}

/// Whom it was asked which pod a process is in, and with what result.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(super) struct ResolutionLabels {
    pub(super) source: &'static str,
    pub(super) result: &'static str,
}

impl Labels for ResolutionLabels {
    fn other(&self) -> Self {
        self.clone()
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(super) struct KindLabels {
    pub(super) kind: Value,
}

impl Labels for KindLabels {
    fn other(&self) -> Self {
        Self { kind: Value::other() }
    }
}

/// Not bounded: the families are ours.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(super) struct FamilyLabels {
    pub(super) family: &'static str,
}
