//! Where processes run: which container, pod or unit. Filled into `span::Process`.
//!
//! The path of the cgroup gives ids at once. Who bears them is asked, in the order of cost, of the container runtime ([`cri`]), the kubelet
//! ([`kubelet`]) and a watch of this node's pods at the API server ([`api`]); each of them says in its module what it needs. Nothing is guessed: an
//! answer counts only for the container or pod that bears the very id, and one that contradicts what is known is counted and left.

pub mod api;
pub mod cgroup;
mod config;
pub mod cri;
pub mod facts;
pub mod kubelet;
mod stage;

use std::{
    collections::{BTreeMap, HashMap},
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard, PoisonError, Weak},
    time::{Duration, Instant},
};

use tokio::sync::{Semaphore, mpsc};

use self::{
    api::Watch,
    cri::Cri,
    facts::{Merge, PodFacts},
    kubelet::{Kubelet, KubeletOptions},
};
pub use self::{config::KubernetesConfig, stage::PlaceStage};
use crate::span::{Certainty, Place, PlaceSource};

/// Containers and pods remembered.
const MAX_ENTRIES: usize = 4_096;
/// Questions waiting to be asked; more are asked for again at the next look.
const MAX_WANTED: usize = 1_024;
/// Containers asked about at once.
const MAX_CONCURRENT: usize = 4;
/// How long an answer is good; labels change. Old answers are given while a new one is sought.
const REFRESH: Duration = Duration::from_mins(5);
/// How long what nobody asks about is remembered; spans of gone pods come late.
const GRACE: Duration = Duration::from_mins(10);
/// First and longest time until a question without an answer is put again.
const FIRST_RETRY: Duration = Duration::from_millis(200);
const LAST_RETRY: Duration = Duration::from_mins(1);

/// Knows where processes run, and asks for what it does not know.
pub struct Places {
    hold: Duration,
    cache: Mutex<HashMap<String, Entry>>,
    cri: Option<CriSource>,
    kubelet: Option<Kubelet>,
    kubelet_pause: Mutex<Backoff>,
    watch: Option<Watch>,
    wanted: mpsc::Sender<Place>,
    counts: Mutex<BTreeMap<(&'static str, &'static str), u64>>,
}

/// The answer to a question that must not wait.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Lookup {
    /// As much as will be known for now.
    Known(Place),
    /// Being asked; what is known so far.
    Pending(Place),
}

#[derive(Debug)]
struct Entry {
    /// With the names, once somebody gave them.
    place: Option<Place>,
    /// Somebody who was not reached could say more; since when what is known is.
    partial_since: Option<Instant>,
    first_asked: Instant,
    used: Instant,
    retry_at: Instant,
    retry: Duration,
    is_being_asked: bool,
}

struct CriSource {
    /// `None`: the first of the usual ones that is there.
    socket: Option<PathBuf>,
    host_root: PathBuf,
    state: Mutex<CriState>,
}

struct CriState {
    client: Option<Cri>,
    pause: Backoff,
}

/// When a source may be asked again that did not answer: later and later, until it does.
#[derive(Debug)]
struct Backoff {
    not_before: Instant,
    next: Duration,
}

impl Backoff {
    fn new(now: Instant) -> Self {
        Self {
            not_before: now,
            next: FIRST_RETRY,
        }
    }

    fn is_over(&self, now: Instant) -> bool {
        now >= self.not_before
    }

    fn note(&mut self, has_answered: bool, now: Instant) {
        if has_answered {
            self.next = FIRST_RETRY;
        } else {
            self.not_before = now + self.next;
            self.next = (self.next * 2).min(LAST_RETRY);
        }
    }
}

/// Why nothing can be asked as configured.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The configuration contradicts itself.
    #[error("{0}")]
    Config(String),
    /// The API server cannot be asked.
    #[error(transparent)]
    Api(#[from] api::ApiError),
    /// The kubelet cannot be asked.
    #[error(transparent)]
    Kubelet(#[from] kubelet::KubeletError),
}

impl Places {
    /// Prepares the sources; must be called within a tokio runtime. Nothing is asked yet, but for the watch.
    pub fn start(config: &KubernetesConfig) -> Result<Arc<Self>, StartError> {
        config.validate().map_err(StartError::Config)?;
        let watch = match config.api_server.as_str() {
            "off" => None,
            // Outside of a cluster there is nothing to watch, and nothing wrong.
            "auto" if std::env::var_os("KUBERNETES_SERVICE_HOST").is_none() => None,
            _ => match Watch::in_cluster(&config.node_name) {
                Ok(watch) => Some(watch),
                Err(error) if config.api_server == "auto" => {
                    tracing::warn!(error = &error as &dyn std::error::Error, "the API server is not asked");
                    None
                }
                Err(error) => return Err(error.into()),
            },
        };
        let kubelet = config.kubelet_url().map_err(StartError::Config)?.map(|url| {
            Kubelet::new(&KubeletOptions {
                token_file: url.starts_with("https").then(|| config.token_file.clone()),
                url,
                ca_file: Some(config.kubelet_ca_file.clone()).filter(|path| !path.as_os_str().is_empty()),
                insecure_skip_verify: config.kubelet_insecure_skip_verify,
            })
        });
        Ok(Self::with_sources(config, kubelet.transpose()?, watch))
    }

    /// With a kubelet and a watch of one's own; the container runtime is taken from `config`.
    pub fn with_sources(config: &KubernetesConfig, kubelet: Option<Kubelet>, watch: Option<Watch>) -> Arc<Self> {
        let (wanted, questions) = mpsc::channel(MAX_WANTED);
        let socket = match config.cri_socket.as_str() {
            "off" => None,
            "auto" => Some(None),
            path => Some(Some(PathBuf::from(path))),
        };
        let now = Instant::now();
        let places = Arc::new(Self {
            hold: Duration::from_millis(config.hold_ms),
            cache: Mutex::new(HashMap::new()),
            cri: socket.map(|socket| CriSource {
                socket,
                host_root: config.host_root.clone(),
                state: Mutex::new(CriState {
                    client: None,
                    pause: Backoff::new(now),
                }),
            }),
            kubelet,
            kubelet_pause: Mutex::new(Backoff::new(now)),
            watch,
            wanted,
            counts: Mutex::new(BTreeMap::new()),
        });
        tokio::spawn(answer(Arc::downgrade(&places), questions));
        places
    }

    /// What is known by now; what is not is asked for meanwhile.
    pub fn lookup(&self, place: &Place) -> Lookup {
        let Some(key) = key(place).filter(|_| self.has_sources()) else {
            return Lookup::Known(place.clone());
        };
        let now = Instant::now();
        let mut cache = lock(&self.cache);
        if cache.len() >= MAX_ENTRIES && !cache.contains_key(key) {
            make_room(&mut cache, now);
        }
        let entry = cache.entry(key.to_owned()).or_insert_with(|| Entry::new(now));
        entry.used = now;
        if now >= entry.retry_at && !entry.is_being_asked {
            entry.is_being_asked = self.wanted.try_send(place.clone()).is_ok();
        }
        let is_waiting = now.duration_since(entry.first_asked) < self.hold;
        match &entry.place {
            Some(known) if is_complete(known) || !is_waiting => Lookup::Known(of_process(known, place)),
            Some(known) => Lookup::Pending(of_process(known, place)),
            // What is in no pod and was not found at once is in none.
            None if !is_waiting || (place.pod_uid.is_none() && entry.retry > FIRST_RETRY) => {
                Lookup::Known(place.clone())
            }
            None => Lookup::Pending(place.clone()),
        }
    }

    /// The place with the names that are known by now; what is not is asked for meanwhile.
    pub fn named(&self, place: &Place) -> Place {
        let (Lookup::Known(named) | Lookup::Pending(named)) = self.lookup(place);
        named
    }

    /// Asks every source that is needed, now, but for those that have just failed. What others have said goes on from there.
    pub async fn resolve(&self, place: &Place) -> Place {
        let Some(key) = key(place) else {
            return place.clone();
        };
        let partial = self.partial(key, place);
        let since = partial.as_ref().map_or_else(Instant::now, |(since, _)| *since);
        let mut found = partial.map_or_else(|| place.clone(), |(_, known)| known);
        if let Some(cri) = &self.cri
            && !is_complete(&found)
            && let Some(client) = cri.client()
        {
            let answer = client.pod_of(&found).await;
            cri.note(answer.is_ok());
            let answer = answer.inspect_err(|error| {
                tracing::debug!(
                    error = error as &dyn std::error::Error,
                    "the container runtime does not say"
                );
            });
            self.merge(&mut found, PlaceSource::Cri, answer.map_err(drop));
        }
        if let Some(kubelet) = &self.kubelet
            && !is_all_known(&found)
            && lock(&self.kubelet_pause).is_over(Instant::now())
        {
            let answer = kubelet.pod_of(&found).await.inspect_err(|error| {
                tracing::debug!(error = error as &dyn std::error::Error, "the kubelet does not say");
            });
            // One that was asked a moment ago is not asked, and has not failed.
            if !matches!(answer, Err(kubelet::KubeletError::TooSoon)) {
                lock(&self.kubelet_pause).note(answer.is_ok(), Instant::now());
            }
            self.merge(&mut found, PlaceSource::Kubelet, answer.map_err(drop));
        }
        if let Some(watch) = &self.watch
            && !is_all_known(&found)
        {
            let answer = if watch.pods().is_synced() {
                Ok(watch.pods().pod_of(&found))
            } else {
                Err(())
            };
            self.merge(&mut found, PlaceSource::ApiServer, answer);
        }
        self.remember(key, &found, since);
        found
    }

    /// How often each source was asked, and with what result: `known`, `unknown`, `conflict`, `error`; of the stage that waits (`source` is `hold`):
    /// `timeout`, `overflow`, `shutdown`. For `wasmscope_pod_resolutions_total{source,result}`.
    pub fn counts(&self) -> Vec<(&'static str, &'static str, u64)> {
        let counts = lock(&self.counts);
        counts
            .iter()
            .map(|((source, result), count)| (*source, *result, *count))
            .collect()
    }

    /// Whether anybody can be asked.
    pub fn has_sources(&self) -> bool {
        self.cri.as_ref().is_some_and(CriSource::is_there) || self.kubelet.is_some() || self.watch.is_some()
    }

    /// The longest that a trace waits for the names of its pod.
    pub fn hold(&self) -> Duration {
        self.hold
    }

    /// Containers and pods that are remembered.
    pub fn remembered_count(&self) -> usize {
        lock(&self.cache).len()
    }

    fn merge(&self, place: &mut Place, source: PlaceSource, answer: Result<Option<PodFacts>, ()>) {
        let result = match answer {
            Err(()) => "error",
            Ok(None) => "unknown",
            Ok(Some(facts)) => match facts.merge_into(place, source) {
                Merge::Merged => "known",
                Merge::Conflict => "conflict",
            },
        };
        self.count(source.as_str(), result);
    }

    /// What is known of a container that somebody could say more of, and since when, unless it is old.
    fn partial(&self, key: &str, place: &Place) -> Option<(Instant, Place)> {
        let cache = lock(&self.cache);
        let entry = cache.get(key)?;
        let since = entry.partial_since.filter(|since| since.elapsed() < REFRESH)?;
        let known = entry.place.as_ref()?;
        (place.pod_uid.is_none() || place.pod_uid == known.pod_uid).then(|| (since, known.clone()))
    }

    /// Whether nobody is left who could say more.
    fn is_final(&self, found: &Place) -> bool {
        is_all_known(found) || (is_complete(found) && self.kubelet.is_none() && self.watch.is_none())
    }

    fn remember(&self, key: &str, found: &Place, since: Instant) {
        let now = Instant::now();
        let mut cache = lock(&self.cache);
        if cache.len() >= MAX_ENTRIES && !cache.contains_key(key) {
            make_room(&mut cache, now);
        }
        cache.retain(|_, entry| now.duration_since(entry.used) < GRACE);
        let entry = cache.entry(key.to_owned()).or_insert_with(|| Entry::new(now));
        entry.is_being_asked = false;
        if found.pod_name.is_some() {
            let mut found = found.clone();
            if let Some(before) = &entry.place {
                keep_what_never_changes(&mut found, before);
            }
            entry.place = Some(found);
        }
        entry.partial_since = (is_complete(found) && !self.is_final(found)).then_some(since);
        if self.is_final(found) {
            entry.retry_at = now + REFRESH;
            entry.retry = FIRST_RETRY;
        } else {
            entry.retry_at = now + entry.retry;
            entry.retry = (entry.retry * 2).min(LAST_RETRY);
        }
    }

    pub(self) fn count(&self, source: &'static str, result: &'static str) {
        *lock(&self.counts).entry((source, result)).or_default() += 1;
    }
}

impl std::fmt::Debug for Places {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Places")
            .field("hold", &self.hold)
            .finish_non_exhaustive()
    }
}

impl Entry {
    fn new(now: Instant) -> Self {
        Self {
            place: None,
            partial_since: None,
            first_asked: now,
            used: now,
            retry_at: now,
            retry: FIRST_RETRY,
            is_being_asked: false,
        }
    }
}

impl CriSource {
    fn is_there(&self) -> bool {
        self.socket.is_some() || lock(&self.state).client.is_some() || cri::find_socket(&self.host_root).is_some()
    }

    fn client(&self) -> Option<Cri> {
        let mut state = lock(&self.state);
        if !state.pause.is_over(Instant::now()) {
            return None;
        }
        if state.client.is_none() {
            let socket = self.socket.clone().or_else(|| cri::find_socket(&self.host_root))?;
            state.client = Cri::new(socket)
                .inspect_err(|error| tracing::warn!(error = error as &dyn std::error::Error, "no container runtime"))
                .ok();
        }
        state.client.clone()
    }

    fn note(&self, succeeded: bool) {
        let mut state = lock(&self.state);
        state.pause.note(succeeded, Instant::now());
        if !succeeded && self.socket.is_none() {
            // Another one may have taken its place.
            state.client = None;
        }
    }
}

/// Puts the questions, a few at a time, as long as somebody wants answers.
async fn answer(places: Weak<Places>, mut questions: mpsc::Receiver<Place>) {
    let permits = Arc::new(Semaphore::new(MAX_CONCURRENT));
    while let Some(place) = questions.recv().await {
        let Ok(permit) = permits.clone().acquire_owned().await else {
            return;
        };
        let Some(places) = places.upgrade() else {
            return;
        };
        tokio::spawn(async move {
            places.resolve(&place).await;
            drop(permit);
        });
    }
}

/// A container is in one pod, but not every process in the pod is in that container. A container's id that users can write is no question.
fn key(place: &Place) -> Option<&str> {
    if place.certainty() == Some(Certainty::Claimed) {
        return None;
    }
    place.container_id.as_deref().or(place.pod_uid.as_deref())
}

fn is_complete(place: &Place) -> bool {
    place.pod_name.is_some() && (place.container_id.is_none() || place.container_name.is_some())
}

/// Whether Kubernetes itself has spoken: who owns a pod and its class are known to nobody else, and a pod may have neither.
fn is_all_known(place: &Place) -> bool {
    is_complete(place) && place.certainty() == Some(Certainty::Confirmed)
}

/// Takes over from an earlier answer for the same pod what was not asked for, or not answered, this time.
fn keep_what_never_changes(found: &mut Place, before: &Place) {
    if found.pod_uid == before.pod_uid && found.certainty() < before.certainty() {
        found.owner = found.owner.take().or_else(|| before.owner.clone());
        found.runtime_class = found.runtime_class.take().or_else(|| before.runtime_class.clone());
    }
}

/// What is known of the container, for a process whose cgroup says the same.
fn of_process(known: &Place, place: &Place) -> Place {
    if place.pod_uid.is_some() && place.pod_uid != known.pod_uid {
        return place.clone();
    }
    known.clone()
}

/// Forgets what nobody has asked about for long, else what was asked about longest ago.
fn make_room(cache: &mut HashMap<String, Entry>, now: Instant) {
    cache.retain(|_, entry| now.duration_since(entry.used) < GRACE);
    if cache.len() >= MAX_ENTRIES {
        let mut times: Vec<_> = cache.values().map(|entry| entry.used).collect();
        let (_, middle, _) = times.select_nth_unstable(MAX_ENTRIES / 8);
        let oldest = *middle;
        cache.retain(|_, entry| entry.used > oldest);
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests;
