//! The container runtime's own socket (CRI v1): the pod of a container in two small questions, without the kubelet or the API server.
//!
//! Needs: the socket mounted into the agent's pod (`/run/containerd`, `/run/k3s/containerd` or `/run/crio`, from the host), and write permission on it,
//! which is root's (uid 0 without any capability is enough). No RBAC. Whoever may write to that socket controls the node: those who do not want that
//! set `cri_socket = "off"` and let the kubelet or the API server answer.
//! Only `ListContainers` and `ListPodSandbox` are called.

use std::{
    collections::HashMap,
    os::unix::fs::FileTypeExt as _,
    path::{Path, PathBuf},
    time::Duration,
};

use hyper_util::rt::TokioIo;
use k8s_cri::v1::{
    Container, ContainerFilter, ListContainersRequest, ListPodSandboxRequest, PodSandbox, PodSandboxFilter,
    runtime_service_client::RuntimeServiceClient,
};
use tokio::net::UnixStream;
use tonic::transport::{Channel, Endpoint, Uri};

use super::facts::{PodFacts, bounded_labels, bounded_name};
use crate::span::Place;

/// Where runtimes have their sockets, below the root of the host.
pub const CANDIDATES: [&str; 5] = [
    "run/containerd/containerd.sock",
    "run/k3s/containerd/containerd.sock",
    "run/crio/crio.sock",
    "run/cri-dockerd.sock",
    "var/snap/microk8s/common/run/containerd.sock",
];
/// One question.
const CALL_TIMEOUT: Duration = Duration::from_secs(2);
/// Largest answer, bytes. Filtered answers have one entry.
const MAX_MESSAGE_BYTES: usize = 4 << 20;
/// Sandboxes of one pod looked at: those of earlier attempts may still be there.
const MAX_ITEMS: usize = 64;
/// The kubelet's label with the UID of a sandbox's pod.
const UID_LABEL: &str = "io.kubernetes.pod.uid";

/// Why the runtime did not answer.
#[derive(Debug, thiserror::Error)]
pub enum CriError {
    /// No socket at any of the places.
    #[error("no CRI socket found")]
    NoSocket,
    /// The path cannot be an endpoint.
    #[error("cannot connect to the CRI socket")]
    Connect(#[source] tonic::transport::Error),
    /// The question failed.
    #[error("the container runtime did not answer")]
    Call(#[source] Box<tonic::Status>),
    /// It took too long.
    #[error("the container runtime did not answer within {CALL_TIMEOUT:?}")]
    Timeout,
}

/// A client for one socket. Connects when first asked, and again after the runtime was restarted.
#[derive(Clone, Debug)]
pub struct Cri {
    client: RuntimeServiceClient<Channel>,
}

/// The first of the usual sockets that is there, below `root`.
pub fn find_socket(root: &Path) -> Option<PathBuf> {
    CANDIDATES
        .iter()
        .map(|candidate| root.join(candidate))
        .find(|path| std::fs::metadata(path).is_ok_and(|metadata| metadata.file_type().is_socket()))
}

impl Cri {
    /// Prepares a client; must be called within a tokio runtime.
    pub fn new(socket: PathBuf) -> Result<Self, CriError> {
        let endpoint = Endpoint::try_from("http://cri.invalid").map_err(CriError::Connect)?;
        let connector = tower::service_fn(move |_: Uri| {
            let socket = socket.clone();
            async move { Ok::<_, std::io::Error>(TokioIo::new(UnixStream::connect(socket).await?)) }
        });
        let channel = endpoint
            .connect_timeout(CALL_TIMEOUT)
            .connect_with_connector_lazy(connector);
        Ok(Self {
            client: RuntimeServiceClient::new(channel).max_decoding_message_size(MAX_MESSAGE_BYTES),
        })
    }

    /// The pod that a place is in, by container id, else by pod UID; `None` if the runtime knows of none.
    pub async fn pod_of(&self, place: &Place) -> Result<Option<PodFacts>, CriError> {
        let asked = async {
            let Some(id) = &place.container_id else {
                let Some(uid) = &place.pod_uid else {
                    return Ok(None);
                };
                return self.sandbox_by_uid(uid).await;
            };
            if let Some(container) = self.container(id).await? {
                let sandbox = self.sandbox(&container.pod_sandbox_id).await?;
                return Ok(sandbox.and_then(|sandbox| facts(sandbox, Some(&container))));
            }
            // The pod's own process, or a guest that runs as it.
            let sandbox = self.sandbox(id).await?;
            if let Some(mut found) = sandbox.and_then(|sandbox| facts(sandbox, None)) {
                found.containers.clear();
                return Ok(Some(found));
            }
            Ok(None)
        };
        tokio::time::timeout(CALL_TIMEOUT, asked)
            .await
            .map_err(|_| CriError::Timeout)?
    }

    async fn container(&self, id: &str) -> Result<Option<Container>, CriError> {
        let filter = ContainerFilter {
            id: id.to_owned(),
            ..ContainerFilter::default()
        };
        let request = ListContainersRequest { filter: Some(filter) };
        let answer = self.client.clone().list_containers(request).await.map_err(call)?;
        // The filter takes the beginning of an id for the whole.
        let mut containers = answer.into_inner().containers.into_iter().take(MAX_ITEMS);
        Ok(containers.find(|container| container.id == id))
    }

    async fn sandbox(&self, id: &str) -> Result<Option<PodSandbox>, CriError> {
        let filter = PodSandboxFilter {
            id: id.to_owned(),
            ..PodSandboxFilter::default()
        };
        let mut sandboxes = self.sandboxes(filter).await?;
        Ok(sandboxes.find(|sandbox| sandbox.id == id))
    }

    async fn sandbox_by_uid(&self, uid: &str) -> Result<Option<PodFacts>, CriError> {
        let filter = PodSandboxFilter {
            label_selector: HashMap::from([(UID_LABEL.to_owned(), uid.to_owned())]),
            ..PodSandboxFilter::default()
        };
        let mut sandboxes = self.sandboxes(filter).await?;
        Ok(sandboxes
            .find(|sandbox| sandbox.metadata.as_ref().is_some_and(|metadata| metadata.uid == uid))
            .and_then(|sandbox| facts(sandbox, None)))
    }

    async fn sandboxes(&self, filter: PodSandboxFilter) -> Result<impl Iterator<Item = PodSandbox>, CriError> {
        let request = ListPodSandboxRequest { filter: Some(filter) };
        let answer = self.client.clone().list_pod_sandbox(request).await.map_err(call)?;
        Ok(answer.into_inner().items.into_iter().take(MAX_ITEMS))
    }
}

fn call(status: tonic::Status) -> CriError {
    CriError::Call(Box::new(status))
}

fn facts(sandbox: PodSandbox, container: Option<&Container>) -> Option<PodFacts> {
    let metadata = sandbox.metadata?;
    let containers = container
        .and_then(|container| {
            Some((
                bounded_name(&container.id),
                bounded_name(&container.metadata.as_ref()?.name),
            ))
        })
        .into_iter()
        .collect();
    // The kubelet's own labels repeat what is in the metadata.
    let labels = sandbox
        .labels
        .iter()
        .filter(|(key, _)| !key.starts_with("io.kubernetes.pod."))
        .collect::<std::collections::BTreeMap<_, _>>();
    Some(PodFacts {
        uid: bounded_name(&metadata.uid),
        name: bounded_name(&metadata.name),
        namespace: bounded_name(&metadata.namespace),
        labels: bounded_labels(labels),
        owner: None,
        // CRI knows the handler; the class that names it may have another name.
        runtime_class: None,
        runtime_handler: Some(bounded_name(&sandbox.runtime_handler)).filter(|handler| !handler.is_empty()),
        containers,
    })
}
