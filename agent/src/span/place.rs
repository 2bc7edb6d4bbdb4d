//! Where a process runs: container, pod, or systemd unit, with how that is known.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// Where a process runs. Everything in it is untrusted text, bounded where it is read.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(default)]
pub struct Place {
    /// Id of the container as its runtime knows it, 64 hex digits as a rule.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub container_id: Option<String>,
    /// Name of the container in its pod.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub container_name: Option<String>,
    /// UID of the pod, with dashes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pod_uid: Option<String>,
    /// Name of the pod.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pod_name: Option<String>,
    /// Namespace of the pod.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub namespace: Option<String>,
    /// Labels of the pod.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub labels: BTreeMap<String, String>,
    /// The workload that owns the pod.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub owner: Option<Owner>,
    /// `RuntimeClass` of the pod.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub runtime_class: Option<String>,
    /// What the container runtime runs it by, as its configuration calls it: `runc`, `wasmtime`; empty in its answer for its default.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub runtime_handler: Option<String>,
    /// systemd unit, of a process that is in no container.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub unit: Option<String>,
    /// Where the facts come from, in the order of asking.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub sources: Vec<PlaceSource>,
}

/// The workload that owns a pod.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Owner {
    /// `Deployment`, `StatefulSet`, `Job`, …
    pub kind: String,
    /// Its name.
    pub name: String,
}

/// Who said where a process runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PlaceSource {
    /// The path of its cgroup: which container and pod, by id.
    CgroupPath,
    /// The socket of the container runtime.
    Cri,
    /// The kubelet's list of pods.
    Kubelet,
    /// A watch of this node's pods at the API server.
    ApiServer,
}

impl Place {
    /// Whether nothing is known.
    pub fn is_unknown(&self) -> bool {
        *self == Self::default()
    }
}

impl PlaceSource {
    /// The word used in labels.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::CgroupPath => "cgroup_path",
            Self::Cri => "cri",
            Self::Kubelet => "kubelet",
            Self::ApiServer => "api_server",
        }
    }
}
