//! The kubelet's list of the node's pods: `GET /pods`.
//!
//! Needs, on the authenticated port (10250): a service account whose role has the verb `get` on the resource `nodes/pods` where the kubelet has
//! fine-grained authorisation (Kubernetes 1.33 and later), else on `nodes/proxy`, which is far more; its token; and the CA that signed the kubelet's
//! serving certificate. On the read-only port (10255, off by default): nothing. No capability and no mount; the node's address must be reachable, as it
//! is with `hostNetwork` or through `status.hostIP`.

use std::{path::PathBuf, sync::Arc, time::Duration};

use http_body_util::{BodyExt as _, Limited};
use k8s_openapi::api::core::v1::Pod;
use serde::Deserialize;
use tokio::{sync::Mutex, time::Instant};

use super::facts::PodFacts;
use crate::span::Place;

/// Largest answer, bytes: 500 pods of 60 kB.
const MAX_BODY_BYTES: usize = 32 << 20;
/// One question.
const CALL_TIMEOUT: Duration = Duration::from_secs(5);
/// One answer holds every pod, and costs the kubelet accordingly: it serves all questions for so long.
const MIN_INTERVAL: Duration = Duration::from_secs(2);
/// How long an answer names pods. Labels change, and a container that restarts has another id; but the list is dear, and most questions are about
/// pods that it has already named.
const MAX_AGE: Duration = Duration::from_mins(1);
/// Pods looked at; Kubernetes' own limit for a node is 110 unless told otherwise.
const MAX_PODS: usize = 2_000;

/// Where the kubelet is, and how it is believed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KubeletOptions {
    /// `https://NODE:10250` or `http://NODE:10255`.
    pub url: String,
    /// File with the service account's token.
    pub token_file: Option<PathBuf>,
    /// File with the CA of the kubelet's serving certificate.
    pub ca_file: Option<PathBuf>,
    /// Takes any certificate. The token is then shown to whoever answers.
    pub insecure_skip_verify: bool,
}

/// Why the kubelet did not answer.
#[derive(Debug, thiserror::Error)]
pub enum KubeletError {
    /// The address, CA or token cannot be used.
    #[error("the kubelet's address cannot be used: {0}")]
    Options(String),
    /// No answer, or not a good one.
    #[error("the kubelet did not answer")]
    Call(#[source] Box<kube::Error>),
    /// It refused.
    #[error("the kubelet answered with status {0}")]
    Status(u16),
    /// The answer was too long, or broke off.
    #[error("the kubelet's answer broke off or is longer than {MAX_BODY_BYTES} bytes")]
    Body,
    /// The answer is no list of pods.
    #[error("the kubelet's answer is no list of pods")]
    Json(#[source] serde_json::Error),
    /// It took too long.
    #[error("the kubelet did not answer within {CALL_TIMEOUT:?}")]
    Timeout,
    /// It failed a moment ago.
    #[error("the kubelet is not asked again so soon")]
    TooSoon,
}

/// The pods, or `None` if the kubelet did not say.
type Answer = Option<Arc<Vec<PodFacts>>>;

/// A client for one kubelet.
pub struct Kubelet {
    client: kube::Client,
    last: Mutex<Option<(Instant, Answer)>>,
    min_interval: Duration,
    max_age: Duration,
}

#[derive(Deserialize)]
struct Pods {
    #[serde(default)]
    items: Vec<Pod>,
}

impl Kubelet {
    /// Prepares a client; must be called within a tokio runtime.
    pub fn new(options: &KubeletOptions) -> Result<Self, KubeletError> {
        let url = options
            .url
            .parse()
            .map_err(|error| KubeletError::Options(format!("{:?}: {error}", options.url)))?;
        let mut config = kube::Config::new(url);
        config.connect_timeout = Some(CALL_TIMEOUT);
        config.read_timeout = Some(CALL_TIMEOUT);
        config.accept_invalid_certs = options.insecure_skip_verify;
        config.root_cert_file.clone_from(&options.ca_file);
        config.auth_info.token_file = options
            .token_file
            .as_ref()
            .map(|path| path.to_string_lossy().into_owned());
        config.default_retry = false;
        let client = kube::Client::try_from(config).map_err(|error| KubeletError::Options(error.to_string()))?;
        Ok(Self {
            client,
            last: Mutex::new(None),
            min_interval: MIN_INTERVAL,
            max_age: MAX_AGE,
        })
    }

    /// With other times than the usual ones.
    #[cfg(test)]
    pub(super) fn aging(self, min_interval: Duration, max_age: Duration) -> Self {
        Self {
            min_interval,
            max_age,
            ..self
        }
    }

    /// The pod that a place is in; `None` if the kubelet knows of none.
    pub async fn pod_of(&self, place: &Place) -> Result<Option<PodFacts>, KubeletError> {
        let mut last = self.last.lock().await;
        let pods = match &*last {
            Some((at, Some(pods))) if at.elapsed() < self.max_age && names(pods, place) => pods.clone(),
            Some((at, pods)) if at.elapsed() < self.min_interval => match pods {
                Some(pods) => pods.clone(),
                None => return Err(KubeletError::TooSoon),
            },
            _ => {
                let answer = tokio::time::timeout(CALL_TIMEOUT, self.pods())
                    .await
                    .unwrap_or(Err(KubeletError::Timeout));
                let pods = answer.as_ref().ok().cloned();
                *last = Some((Instant::now(), pods));
                answer?
            }
        };
        Ok(find(&pods, place).cloned())
    }

    async fn pods(&self) -> Result<Arc<Vec<PodFacts>>, KubeletError> {
        let request = hyper::Request::get("/pods")
            .body(kube::client::Body::empty())
            .map_err(|error| KubeletError::Options(error.to_string()))?;
        let response = self
            .client
            .send(request)
            .await
            .map_err(|error| KubeletError::Call(Box::new(error)))?;
        if !response.status().is_success() {
            return Err(KubeletError::Status(response.status().as_u16()));
        }
        let body = Limited::new(response.into_body(), MAX_BODY_BYTES)
            .collect()
            .await
            .map_err(|_| KubeletError::Body)?
            .to_bytes();
        let pods: Pods = serde_json::from_slice(&body).map_err(KubeletError::Json)?;
        let facts = pods.items.iter().take(MAX_PODS).filter_map(PodFacts::of_pod);
        Ok(Arc::new(facts.collect()))
    }
}

/// Whether an answer says all that it could of a place. A container that it does not have may have been started since, in a pod that it has.
fn names(pods: &[PodFacts], place: &Place) -> bool {
    find(pods, place).is_some_and(|pod| match &place.container_id {
        Some(id) => pod.containers.iter().any(|(known, _)| known == id),
        None => true,
    })
}

/// The pod of a place: by container, which must be one of the pod's; by UID where the container is not known to the source.
pub(super) fn find<'a>(pods: &'a [PodFacts], place: &Place) -> Option<&'a PodFacts> {
    let by_container = place.container_id.as_ref().and_then(|id| {
        pods.iter()
            .find(|pod| pod.containers.iter().any(|(known, _)| known == id))
    });
    by_container.or_else(|| {
        let uid = place.pod_uid.as_ref()?;
        pods.iter().find(|pod| pod.uid == *uid)
    })
}
