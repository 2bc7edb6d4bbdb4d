//! A watch of this node's pods at the API server.
//!
//! Needs: a service account whose role has `list` and `watch` on `pods` (a `ClusterRole`: the node's pods are in every namespace), and the node's name
//! (`NODE_NAME`, from `spec.nodeName` by the downward API). No capability and no mount beside the account's token.
//! Every request carries `fieldSelector=spec.nodeName=NAME`: without a name, nothing is watched. Nodes by the thousand that each watched the whole cluster
//! would bring its API server down.

use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use futures_util::StreamExt as _;
use k8s_openapi::api::core::v1::Pod;
use kube::{
    Api, Client,
    runtime::{
        WatchStreamExt as _,
        watcher::{self, Event},
    },
};

use super::facts::PodFacts;
use crate::span::Place;

/// Pods kept; more than run on any node.
const MAX_PODS: usize = 2_000;
/// How long a pod that is gone is still known: what it did may be told late.
const GRACE: Duration = Duration::from_mins(1);
/// Pods in one answer while listing.
const PAGE_SIZE: u32 = 100;

/// Why nothing is watched.
#[derive(Debug, thiserror::Error)]
pub enum ApiError {
    /// The node's name is not known or cannot be one.
    #[error(
        "the API server is only asked for the pods of one node, and {0:?} is no name of a node: set NODE_NAME (downward API, spec.nodeName)"
    )]
    NoNodeName(String),
    /// No service account.
    #[error("not in a pod with a service account")]
    Account(#[source] kube::config::InClusterError),
    /// The client cannot be made.
    #[error("cannot prepare a client for the API server")]
    Client(#[source] Box<kube::Error>),
}

/// The pods of this node, as the API server last told.
#[derive(Debug, Default)]
pub struct NodePods {
    pods: Mutex<HashMap<String, Known>>,
    is_synced: AtomicBool,
}

#[derive(Debug)]
struct Known {
    facts: PodFacts,
    /// The list that it was last in, or heard of after.
    generation: u64,
    gone: Option<Instant>,
}

/// A watch at work; it ends when this is dropped.
#[derive(Debug)]
pub struct Watch {
    pods: Arc<NodePods>,
    task: tokio::task::JoinHandle<()>,
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Watch {
    /// As the pod's service account.
    pub fn in_cluster(node_name: &str) -> Result<Self, ApiError> {
        check_node_name(node_name)?;
        let config = kube::Config::incluster().map_err(ApiError::Account)?;
        let client = Client::try_from(config).map_err(|error| ApiError::Client(Box::new(error)))?;
        Self::start(client, node_name)
    }

    /// With a client of one's own.
    pub fn start(client: Client, node_name: &str) -> Result<Self, ApiError> {
        check_node_name(node_name)?;
        let pods = Arc::new(NodePods::default());
        let config = watcher::Config::default()
            .fields(&format!("spec.nodeName={node_name}"))
            .page_size(PAGE_SIZE);
        let task = tokio::spawn(follow(Api::all(client), config, pods.clone()));
        Ok(Self { pods, task })
    }

    /// What it has seen.
    pub fn pods(&self) -> &Arc<NodePods> {
        &self.pods
    }
}

/// A name that could change the selector's meaning is none.
pub(super) fn check_node_name(name: &str) -> Result<(), ApiError> {
    let is_name = !name.is_empty()
        && name.len() <= 253
        && name
            .bytes()
            .all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || matches!(byte, b'-' | b'.'));
    if is_name {
        Ok(())
    } else {
        Err(ApiError::NoNodeName(name.chars().take(64).collect()))
    }
}

async fn follow(api: Api<Pod>, config: watcher::Config, pods: Arc<NodePods>) {
    // Lists, then watches from where the list ended; lists anew when told that this is too long ago (410); waits longer and longer between failures.
    let stream = kube::runtime::watcher(api, config).default_backoff();
    let mut stream = std::pin::pin!(stream);
    let mut generation = 0;
    while let Some(event) = stream.next().await {
        match event {
            Ok(event) => pods.take(&event, &mut generation),
            Err(error) => {
                tracing::warn!(error = &error as &dyn std::error::Error, "the watch of pods failed");
            }
        }
    }
}

impl NodePods {
    /// The pod that a place is in.
    pub fn pod_of(&self, place: &Place) -> Option<PodFacts> {
        let pods = self.pods.lock().unwrap_or_else(PoisonError::into_inner);
        let has = |known: &&Known| {
            place
                .container_id
                .as_ref()
                .is_some_and(|id| known.facts.containers.iter().any(|(known, _)| known == id))
        };
        let by_uid = place.pod_uid.as_ref().map(|uid| pods.get(uid));
        by_uid
            .unwrap_or_else(|| pods.values().find(has))
            .map(|known| known.facts.clone())
    }

    /// Whether the node's pods have been listed.
    pub fn is_synced(&self) -> bool {
        self.is_synced.load(Ordering::Acquire)
    }

    /// Pods known, those lately gone included.
    pub fn len(&self) -> usize {
        self.pods.lock().unwrap_or_else(PoisonError::into_inner).len()
    }

    /// Whether no pod is known.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    fn take(&self, event: &Event<Pod>, generation: &mut u64) {
        let mut pods = self.pods.lock().unwrap_or_else(PoisonError::into_inner);
        let now = Instant::now();
        pods.retain(|_, known| known.gone.is_none_or(|gone| now.duration_since(gone) < GRACE));
        match event {
            Event::Init => *generation += 1,
            Event::Apply(pod) | Event::InitApply(pod) => {
                let Some(facts) = PodFacts::of_pod(pod) else {
                    return;
                };
                if pods.len() >= MAX_PODS && !pods.contains_key(&facts.uid) {
                    tracing::warn!("more than {MAX_PODS} pods on this node");
                    return;
                }
                let known = Known {
                    facts,
                    generation: *generation,
                    gone: None,
                };
                pods.insert(known.facts.uid.clone(), known);
            }
            Event::Delete(pod) => {
                let uid = PodFacts::of_pod(pod).map(|facts| facts.uid);
                if let Some(known) = uid.and_then(|uid| pods.get_mut(&uid)) {
                    known.gone = Some(now);
                }
            }
            Event::InitDone => {
                // What went while nobody watched.
                for known in pods.values_mut().filter(|known| known.generation != *generation) {
                    known.gone.get_or_insert(now);
                }
                self.is_synced.store(true, Ordering::Release);
            }
        }
    }

    /// Whether a pod is known to be gone.
    pub fn is_gone(&self, uid: &str) -> bool {
        let pods = self.pods.lock().unwrap_or_else(PoisonError::into_inner);
        pods.get(uid).is_none_or(|known| known.gone.is_some())
    }
}

#[cfg(test)]
mod tests;
