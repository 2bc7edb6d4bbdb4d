//! The watch against a real HTTP server that answers as the API server does, and notes every request.

use std::{
    collections::{HashMap, VecDeque},
    sync::{Arc, Mutex},
};

use axum::{
    Json, Router,
    body::Body,
    extract::{Query, State},
    response::{IntoResponse as _, Response},
    routing::get,
};
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio::sync::mpsc;

use super::*;
use crate::place::{KubernetesConfig, PlaceStage, Places};
use crate::sink::testing;
use crate::span::{PlaceSource, Process};

/// One line of a watch; `None` ends the connection.
type Line = Option<Value>;

#[derive(Clone, Default)]
struct Server {
    requests: Arc<Mutex<Vec<HashMap<String, String>>>>,
    lists: Arc<Mutex<VecDeque<Value>>>,
    watches: Arc<Mutex<VecDeque<mpsc::Receiver<Line>>>>,
}

impl Server {
    fn start(&self, listener: TcpListener) {
        let router = Router::new().route("/api/v1/pods", get(pods)).with_state(self.clone());
        tokio::spawn(async move { axum::serve(listener, router).await });
    }

    fn list(&self, version: &str, pods: &[Value]) {
        let list =
            json!({"kind": "PodList", "apiVersion": "v1", "metadata": {"resourceVersion": version}, "items": pods});
        self.lists.lock().unwrap().push_back(list);
    }

    fn watch(&self) -> mpsc::Sender<Line> {
        let (lines, receiver) = mpsc::channel(16);
        self.watches.lock().unwrap().push_back(receiver);
        lines
    }

    fn requests(&self) -> Vec<HashMap<String, String>> {
        self.requests.lock().unwrap().clone()
    }
}

async fn pods(State(server): State<Server>, Query(query): Query<HashMap<String, String>>) -> Response {
    server.requests.lock().unwrap().push(query.clone());
    if query.get("watch").is_none_or(|watch| watch != "true") {
        let list = server.lists.lock().unwrap().pop_front();
        return Json(list.expect("a list more than expected")).into_response();
    }
    let lines = server.watches.lock().unwrap().pop_front();
    let stream = futures_util::stream::unfold(lines, |lines| async move {
        let Some(mut lines) = lines else {
            // A watch more than expected stays silent.
            return std::future::pending().await;
        };
        let line = lines.recv().await.flatten()?;
        Some((Ok::<_, std::io::Error>(format!("{line}\n")), Some(lines)))
    });
    Body::from_stream(stream).into_response()
}

fn pod(name: &str, version: &str) -> Value {
    json!({
        "kind": "Pod", "apiVersion": "v1",
        "metadata": {"name": name, "namespace": "shop", "uid": format!("uid-{name}"), "resourceVersion": version},
        "spec": {"containers": [], "nodeName": "n1"},
        "status": {"containerStatuses": [{
            "name": "guest", "containerID": format!("containerd://c-{name}"),
            "image": "i", "imageID": "i", "ready": true, "restartCount": 0,
        }]},
    })
}

fn event(kind: &str, object: &Value) -> Value {
    json!({"type": kind, "object": object})
}

fn known(pods: &NodePods, name: &str) -> bool {
    let place = Place {
        container_id: Some(format!("c-{name}")),
        ..Place::default()
    };
    pods.pod_of(&place).is_some_and(|facts| facts.name == name)
}

async fn until(what: &str, mut holds: impl FnMut() -> bool) {
    for _ in 0..2_000 {
        if holds() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("never: {what}");
}

/// A watch of what will be answered here.
async fn watch() -> (Watch, TcpListener) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let config = kube::Config::new(format!("http://{address}").parse().unwrap());
    let watch = Watch::start(Client::try_from(config).unwrap(), "n1").unwrap();
    (watch, listener)
}

#[tokio::test]
async fn a_trace_waits_until_the_api_server_has_told_and_has_its_names_then() {
    let (watch, listener) = watch().await;
    let config = KubernetesConfig {
        cri_socket: "off".to_owned(),
        hold_ms: 60_000,
        ..KubernetesConfig::default()
    };
    let places = Places::with_sources(&config, None, Some(watch));
    let mut stage = PlaceStage::new(places.clone(), 10);
    let mut trace = testing::trace(testing::invoke("run", 1, 2));
    let process = Process {
        place: Place {
            container_id: Some("c-a".to_owned()),
            pod_uid: Some("uid-a".to_owned()),
            sources: vec![PlaceSource::CgroupPath],
            ..Place::default()
        },
        ..Process::clone(&trace.process)
    };
    trace.process = Arc::new(process);
    assert_eq!((stage.pass(vec![trace]).len(), stage.held_count()), (0, 1));

    let server = Server::default();
    let mut told = pod("a", "5");
    told["metadata"]["ownerReferences"] =
        json!([{"apiVersion": "apps/v1", "kind": "StatefulSet", "name": "carts", "uid": "s", "controller": true}]);
    told["spec"]["runtimeClassName"] = json!("wasmtime");
    server.list("10", &[told]);
    let _silent = server.watch();
    server.start(listener);
    let mut ready = Vec::new();
    until("the names", || {
        ready.extend(stage.pass(Vec::new()));
        !ready.is_empty()
    })
    .await;
    let place = &ready[0].process.place;
    assert_eq!(place.pod_name.as_deref(), Some("a"));
    assert_eq!(place.namespace.as_deref(), Some("shop"));
    assert_eq!(place.container_name.as_deref(), Some("guest"));
    assert_eq!(place.owner.as_ref().map(|owner| owner.name.as_str()), Some("carts"));
    assert_eq!(place.runtime_class.as_deref(), Some("wasmtime"));
    assert_eq!(place.sources, [PlaceSource::CgroupPath, PlaceSource::ApiServer]);
    assert!(
        places.counts().contains(&("api_server", "known", 1)),
        "{:?}",
        places.counts()
    );
}

#[tokio::test]
async fn the_watch_follows_what_the_server_tells_and_asks_for_one_node_only() {
    let server = Server::default();
    server.list("10", &[pod("a", "5")]);
    let first = server.watch();
    let second = server.watch();
    let (watch, listener) = watch().await;
    server.start(listener);
    let pods = watch.pods().clone();
    until("the first list", || pods.is_synced() && known(&pods, "a")).await;

    first.send(Some(event("ADDED", &pod("b", "11")))).await.unwrap();
    until("an added pod", || known(&pods, "b")).await;
    let mut changed = pod("b", "12");
    changed["metadata"]["labels"] = json!({"stage": "two"});
    first.send(Some(event("MODIFIED", &changed))).await.unwrap();
    let place = Place {
        pod_uid: Some("uid-b".to_owned()),
        ..Place::default()
    };
    until("its change", || {
        pods.pod_of(&place)
            .is_some_and(|facts| facts.labels.contains_key("stage"))
    })
    .await;
    first.send(Some(event("DELETED", &pod("a", "13")))).await.unwrap();
    until("its end", || pods.is_gone("uid-a")).await;
    assert!(known(&pods, "a"), "what it did may be told late");

    // Only the bookmark says how far the server is; the connection is cut, and the next one goes on from there.
    let bookmark =
        json!({"kind": "Pod", "apiVersion": "v1", "metadata": {"resourceVersion": "20"}, "spec": {"containers": []}});
    first.send(Some(event("BOOKMARK", &bookmark))).await.unwrap();
    first.send(None).await.unwrap();
    until("a second watch", || server.requests().len() == 3).await;
    assert_eq!(server.requests()[2]["resourceVersion"], "20");
    second.send(Some(event("ADDED", &pod("c", "21")))).await.unwrap();
    until("what came afterwards", || known(&pods, "c")).await;

    // Too long ago: everything is listed anew, and what is not in the list is gone.
    server.list("40", &[pod("c", "21"), pod("d", "39")]);
    let third = server.watch();
    let gone = json!({"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure", "reason": "Expired", "message": "too old", "code": 410});
    second.send(Some(event("ERROR", &gone))).await.unwrap();
    until("a new list", || known(&pods, "d") && pods.is_gone("uid-b")).await;
    assert!(!pods.is_gone("uid-c"));
    third.send(Some(event("ADDED", &pod("e", "41")))).await.unwrap();
    until("what came after the new list", || known(&pods, "e")).await;

    for request in server.requests() {
        assert_eq!(request["fieldSelector"], "spec.nodeName=n1", "{request:?}");
    }
    let bookmarks = server.requests();
    assert!(bookmarks.iter().any(|request| {
        request
            .get("allowWatchBookmarks")
            .is_some_and(|allowed| allowed == "true")
    }));
}

#[tokio::test]
async fn without_the_name_of_a_node_nothing_is_asked() {
    let config = kube::Config::new("http://127.0.0.1:1".parse().unwrap());
    let client = Client::try_from(config).unwrap();
    for name in ["", "a,spec.nodeName!=b", "a=b", "A b"] {
        assert!(matches!(
            Watch::start(client.clone(), name),
            Err(ApiError::NoNodeName(_))
        ));
    }
}
