//! Where a process runs, as resource attributes.

use opentelemetry::{Array, KeyValue, StringValue, Value};

use super::text::bounded_line;
use crate::span::Place;

/// Labels of a pod that are sent.
const MAX_LABELS: usize = 32;
/// Longest name or label value: Kubernetes allows no longer names.
const MAX_VALUE_BYTES: usize = 253;

/// How sure all of it is, and who said so, is `wasmscope.place.certainty` and `wasmscope.place.sources`.
/// `k8s.*` and `container.id` by the conventions. They have no word for a systemd unit; its name is that of the service instance only where a unit is one
/// process, so it is `systemd.unit`, as the collector's receiver for units calls it.
///
/// `node_name` is that of the node that the agent runs on, and so does what is in a pod.
pub(super) fn attributes(place: &Place, node_name: Option<&str>) -> Vec<KeyValue> {
    let mut attributes = Vec::new();
    let mut add = |key: &'static str, value: &Option<String>| {
        if let Some(value) = value {
            attributes.push(KeyValue::new(key, line(value)));
        }
    };
    add("k8s.namespace.name", &place.namespace);
    add("k8s.pod.name", &place.pod_name);
    add("k8s.pod.uid", &place.pod_uid);
    add("k8s.container.name", &place.container_name);
    add("container.id", &place.container_id);
    add("systemd.unit", &place.unit);
    if let Some(owner) = &place.owner
        && let Some(key) = owner_key(&owner.kind)
    {
        attributes.push(KeyValue::new(key, line(&owner.name)));
    }
    if place.pod_uid.is_some()
        && let Some(node) = node_name
    {
        attributes.push(KeyValue::new("k8s.node.name", line(node)));
    }
    if let Some(certainty) = place.certainty() {
        attributes.push(KeyValue::new("wasmscope.place.certainty", certainty.as_str()));
        let sources = place.sources.iter().map(|source| StringValue::from(source.as_str()));
        let sources = Value::Array(Array::String(sources.collect()));
        attributes.push(KeyValue::new("wasmscope.place.sources", sources));
    }
    for (key, value) in place.labels.iter().take(MAX_LABELS) {
        attributes.push(KeyValue::new(format!("k8s.pod.label.{}", line(key)), line(value)));
    }
    attributes
}

/// The conventions have a word for these kinds and no others.
fn owner_key(kind: &str) -> Option<&'static str> {
    Some(match kind {
        "Deployment" => "k8s.deployment.name",
        "ReplicaSet" => "k8s.replicaset.name",
        "StatefulSet" => "k8s.statefulset.name",
        "DaemonSet" => "k8s.daemonset.name",
        "Job" => "k8s.job.name",
        "CronJob" => "k8s.cronjob.name",
        "ReplicationController" => "k8s.replicationcontroller.name",
        _ => return None,
    })
}

fn line(untrusted: &str) -> String {
    bounded_line(untrusted, MAX_VALUE_BYTES).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::span::{Owner, PlaceSource};

    #[test]
    fn a_pod_is_told_in_the_words_of_the_conventions() {
        let some = |text: &str| Some(text.to_owned());
        let place = Place {
            container_id: some("c1"),
            container_name: some("guest"),
            pod_uid: some("u1"),
            pod_name: some("edge-1"),
            namespace: some("shop"),
            labels: [("app".to_owned(), "edge\n".to_owned())].into(),
            owner: Some(Owner {
                kind: "Deployment".to_owned(),
                name: "edge".to_owned(),
            }),
            sources: vec![PlaceSource::CgroupPath, PlaceSource::Cri],
            ..Place::default()
        };
        let told: Vec<_> = attributes(&place, Some("node-7"))
            .into_iter()
            .map(|attribute| format!("{}={}", attribute.key, attribute.value))
            .collect();
        insta::assert_debug_snapshot!(told);
    }

    #[test]
    fn what_is_nowhere_has_no_attributes() {
        assert!(attributes(&Place::default(), Some("node-7")).is_empty());
    }
}
