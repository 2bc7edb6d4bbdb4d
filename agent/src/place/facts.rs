//! What a source says about a pod, in the words that all of them share, bounded.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::Pod;

use crate::span::{Owner, Place, PlaceSource};

/// Labels kept of one pod, and bytes of a key (a DNS name of 253, a slash and 63) and of a value (Kubernetes' own limit is 63).
const MAX_LABELS: usize = 64;
const MAX_LABEL_KEY_BYTES: usize = 317;
const MAX_LABEL_VALUE_BYTES: usize = 128;
/// Longest name kept; Kubernetes' own limit is 253.
const MAX_NAME_BYTES: usize = 253;
/// Containers of one pod that are kept, those for initialisation included.
const MAX_CONTAINERS: usize = 64;
/// Where the kubelet writes the UID that a static pod has on its node into the pod that stands for it at the API server.
const MIRROR_ANNOTATION: &str = "kubernetes.io/config.mirror";
const STATIC_ANNOTATION: &str = "kubernetes.io/config.hash";
/// Set on the pods of a Deployment, and the end of the name of their `ReplicaSet`.
const TEMPLATE_HASH: &str = "pod-template-hash";

/// What is known of one pod.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PodFacts {
    /// UID as cgroup paths have it.
    pub uid: String,
    /// Name of the pod.
    pub name: String,
    /// Its namespace.
    pub namespace: String,
    /// Its labels.
    pub labels: BTreeMap<String, String>,
    /// Who owns it.
    pub owner: Option<Owner>,
    /// `RuntimeClass`.
    pub runtime_class: Option<String>,
    /// What the container runtime runs it by.
    pub runtime_handler: Option<String>,
    /// Container ids with the containers' names, those that the source knows.
    pub containers: Vec<(String, String)>,
}

/// What came of comparing an answer with what the cgroup says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Merge {
    /// They agree, and the place knows more.
    Merged,
    /// They contradict each other: nothing was taken over.
    Conflict,
}

impl PodFacts {
    /// Of a pod as the kubelet or the API server describes it; `None` without a name or UID.
    pub fn of_pod(pod: &Pod) -> Option<Self> {
        let metadata = &pod.metadata;
        let annotation = |key: &str| metadata.annotations.as_ref().and_then(|all| all.get(key));
        // A static pod's cgroups are named by the hash of its manifest; the API server's UID is that of its mirror.
        let uid = annotation(MIRROR_ANNOTATION)
            .or_else(|| annotation(STATIC_ANNOTATION))
            .or(metadata.uid.as_ref())?;
        let labels = bounded_labels(metadata.labels.iter().flatten());
        let status = pod.status.as_ref();
        let statuses = status.into_iter().flat_map(|status| {
            [
                &status.container_statuses,
                &status.init_container_statuses,
                &status.ephemeral_container_statuses,
            ]
            .into_iter()
            .flatten()
            .flatten()
        });
        let containers = statuses
            .filter_map(|status| {
                // `containerd://ID`
                let (_, id) = status.container_id.as_deref()?.split_once("://")?;
                Some((bounded_name(id), bounded_name(&status.name)))
            })
            .take(MAX_CONTAINERS)
            .collect();
        let controller = metadata
            .owner_references
            .iter()
            .flatten()
            .find(|owner| owner.controller == Some(true));
        Some(Self {
            uid: bounded_name(uid),
            name: bounded_name(metadata.name.as_deref()?),
            namespace: bounded_name(metadata.namespace.as_deref().unwrap_or("default")),
            owner: controller.and_then(|owner| workload(&owner.kind, &owner.name, &labels)),
            labels,
            runtime_class: pod
                .spec
                .as_ref()
                .and_then(|spec| spec.runtime_class_name.as_deref())
                .map(bounded_name),
            runtime_handler: None,
            containers,
        })
    }

    /// Completes a place. Ids must match: a source that says otherwise speaks of something else.
    pub fn merge_into(&self, place: &mut Place, source: PlaceSource) -> Merge {
        if place.pod_uid.as_ref().is_some_and(|uid| *uid != self.uid) {
            return Merge::Conflict;
        }
        let name_of = |id: &String| self.containers.iter().find(|(known, _)| known == id);
        let container = place.container_id.as_ref().and_then(name_of);
        // Without a pod in the path, the container's id is all that ties the two together.
        if place.pod_uid.is_none() && container.is_none() {
            return Merge::Conflict;
        }
        let differs = |known: &Option<String>, said: &str| known.as_ref().is_some_and(|known| known != said);
        if differs(&place.pod_name, &self.name)
            || differs(&place.namespace, &self.namespace)
            || container.is_some_and(|(_, name)| differs(&place.container_name, name))
        {
            return Merge::Conflict;
        }
        place.pod_uid = Some(self.uid.clone());
        place.pod_name = Some(self.name.clone());
        place.namespace = Some(self.namespace.clone());
        if let Some((_, name)) = container {
            place.container_name = Some(name.clone());
        }
        if place.labels.is_empty() {
            place.labels.clone_from(&self.labels);
        }
        place.owner = place.owner.take().or_else(|| self.owner.clone());
        place.runtime_class = place.runtime_class.take().or_else(|| self.runtime_class.clone());
        place.runtime_handler = place.runtime_handler.take().or_else(|| self.runtime_handler.clone());
        if !place.sources.contains(&source) {
            place.sources.push(source);
        }
        Merge::Merged
    }
}

/// The workload behind a controller. A `ReplicaSet` made by a Deployment has the hash of the pod's template as the end of its name, and the pod as a
/// label; a `CronJob` leaves no such trace in the pods of its Jobs, so a Job stays one.
fn workload(kind: &str, name: &str, labels: &BTreeMap<String, String>) -> Option<Owner> {
    if kind == "Node" {
        // A static pod's mirror: no workload.
        return None;
    }
    if kind == "ReplicaSet"
        && let Some(hash) = labels.get(TEMPLATE_HASH).filter(|hash| !hash.is_empty())
        && let Some(deployment) = name.strip_suffix(hash.as_str()).and_then(|name| name.strip_suffix('-'))
        && !deployment.is_empty()
    {
        return Some(Owner {
            kind: "Deployment".to_owned(),
            name: bounded_name(deployment),
        });
    }
    Some(Owner {
        kind: bounded_name(kind),
        name: bounded_name(name),
    })
}

/// Labels within their bounds; what is beyond them is left out, never cut.
pub(super) fn bounded_labels<'a>(
    labels: impl IntoIterator<Item = (&'a String, &'a String)>,
) -> BTreeMap<String, String> {
    labels
        .into_iter()
        .filter(|(key, value)| key.len() <= MAX_LABEL_KEY_BYTES && value.len() <= MAX_LABEL_VALUE_BYTES)
        .take(MAX_LABELS)
        .map(|(key, value)| (key.clone(), value.clone()))
        .collect()
}

/// A name within its bound.
pub(super) fn bounded_name(name: &str) -> String {
    let mut end = name.len().min(MAX_NAME_BYTES);
    while !name.is_char_boundary(end) {
        end -= 1;
    }
    name[..end].to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pod(json: serde_json::Value) -> Pod {
        serde_json::from_value(json).unwrap()
    }

    fn example() -> Pod {
        pod(serde_json::json!({
            "metadata": {
                "name": "edge-7d9f8c6b5-x2x4z", "namespace": "shop", "uid": "u-1",
                "labels": {"app": "edge", "pod-template-hash": "7d9f8c6b5"},
                "ownerReferences": [{"apiVersion": "apps/v1", "kind": "ReplicaSet", "name": "edge-7d9f8c6b5", "uid": "r", "controller": true}],
            },
            "spec": {"containers": [], "runtimeClassName": "wasmtime"},
            "status": {"containerStatuses": [{
                "name": "guest", "containerID": "containerd://c-1", "image": "i", "imageID": "i", "ready": true, "restartCount": 0,
            }]},
        }))
    }

    #[test]
    fn a_pod_is_described_with_the_deployment_behind_its_replica_set() {
        let facts = PodFacts::of_pod(&example()).unwrap();
        let owner = facts.owner.clone().unwrap();
        assert_eq!((owner.kind.as_str(), owner.name.as_str()), ("Deployment", "edge"));
        assert_eq!(facts.containers, [("c-1".to_owned(), "guest".to_owned())]);
        assert_eq!(facts.runtime_class.as_deref(), Some("wasmtime"));
    }

    #[test]
    fn a_job_stays_a_job_and_a_replica_set_without_hash_stays_one() {
        let none = BTreeMap::new();
        for (kind, name) in [("Job", "backup-29381760"), ("ReplicaSet", "edge-7d9f8c6b5")] {
            let owner = workload(kind, name, &none).unwrap();
            assert_eq!((owner.kind.as_str(), owner.name.as_str()), (kind, name));
        }
        assert_eq!(workload("Node", "n", &none), None);
    }

    #[test]
    fn a_static_pod_is_known_by_the_hash_that_its_cgroup_has() {
        let facts = PodFacts::of_pod(&pod(serde_json::json!({
            "metadata": {"name": "etcd-n", "namespace": "kube-system", "uid": "mirror", "annotations": {"kubernetes.io/config.mirror": "hash"}},
        })));
        assert_eq!(facts.unwrap().uid, "hash");
    }

    #[test]
    fn what_contradicts_the_cgroup_is_not_taken() {
        let facts = PodFacts::of_pod(&example()).unwrap();
        let of = |uid: Option<&str>, id: Option<&str>| Place {
            pod_uid: uid.map(str::to_owned),
            container_id: id.map(str::to_owned),
            ..Place::default()
        };
        for (uid, id) in [(Some("u-2"), Some("c-1")), (None, Some("c-2")), (None, None)] {
            let mut place = of(uid, id);
            assert_eq!(facts.merge_into(&mut place, PlaceSource::Kubelet), Merge::Conflict);
            assert_eq!(place, of(uid, id));
        }
        let mut place = of(Some("u-1"), Some("c-1"));
        assert_eq!(facts.merge_into(&mut place, PlaceSource::Kubelet), Merge::Merged);
        assert_eq!(place.container_name.as_deref(), Some("guest"));
        assert_eq!(place.sources, [PlaceSource::Kubelet]);
        // A container that the source does not know (yet) stays without a name.
        let mut place = of(Some("u-1"), Some("c-2"));
        assert_eq!(facts.merge_into(&mut place, PlaceSource::Kubelet), Merge::Merged);
        assert_eq!(place.container_name, None);
    }
}
