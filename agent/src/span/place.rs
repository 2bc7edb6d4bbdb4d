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
    /// The path of a cgroup that users can make and call what they like: which container, by id, of their own or pretended.
    UserCgroup,
    /// The path of its cgroup: which container and pod, by id.
    CgroupPath,
    /// The socket of the container runtime.
    Cri,
    /// The kubelet's list of pods.
    Kubelet,
    /// A watch of this node's pods at the API server.
    ApiServer,
}

/// How sure it is where a process runs, the least sure first: what follows from [`Place::sources`], and nothing more.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Certainty {
    /// Whoever started the process could have said so: nobody is asked for what it says.
    Claimed,
    /// The path of its cgroup says so, which only who runs containers can make: ids and no names.
    Inferred,
    /// So does the container runtime, which has given the names.
    Reported,
    /// So does Kubernetes, whose kubelet or API server knows the very pod.
    Confirmed,
}

impl Place {
    /// How sure it is; `None` where nothing is known.
    pub fn certainty(&self) -> Option<Certainty> {
        self.sources.iter().map(|source| source.certainty()).max()
    }

    /// Whether nothing is known.
    pub fn is_unknown(&self) -> bool {
        *self == Self::default()
    }
}

impl PlaceSource {
    fn certainty(self) -> Certainty {
        match self {
            Self::UserCgroup => Certainty::Claimed,
            Self::CgroupPath => Certainty::Inferred,
            Self::Cri => Certainty::Reported,
            Self::Kubelet | Self::ApiServer => Certainty::Confirmed,
        }
    }

    /// The word used in labels.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::UserCgroup => "user_cgroup",
            Self::CgroupPath => "cgroup_path",
            Self::Cri => "cri",
            Self::Kubelet => "kubelet",
            Self::ApiServer => "api_server",
        }
    }
}

impl Certainty {
    /// The word used in attributes and notes.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Claimed => "claimed",
            Self::Inferred => "inferred",
            Self::Reported => "reported",
            Self::Confirmed => "confirmed",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_surest_source_says_how_sure_it_is() {
        let of = |sources: &[PlaceSource]| {
            let place = Place {
                sources: sources.to_vec(),
                ..Place::default()
            };
            place.certainty().map(Certainty::as_str)
        };
        assert_eq!(of(&[]), None);
        assert_eq!(of(&[PlaceSource::UserCgroup]), Some("claimed"));
        assert_eq!(of(&[PlaceSource::CgroupPath]), Some("inferred"));
        assert_eq!(of(&[PlaceSource::CgroupPath, PlaceSource::Cri]), Some("reported"));
        for source in [PlaceSource::Kubelet, PlaceSource::ApiServer] {
            assert_eq!(
                of(&[PlaceSource::CgroupPath, PlaceSource::Cri, source]),
                Some("confirmed")
            );
        }
    }
}
