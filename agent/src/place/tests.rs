//! Sources that are real servers, and traces that wait for them.

use axum::{Json, Router, http::StatusCode, routing::get};
use serde_json::json;

use super::*;
use crate::sink::testing;

const ID: &str = "c1";

fn quiet() -> KubernetesConfig {
    KubernetesConfig {
        cri_socket: "off".to_owned(),
        api_server: "off".to_owned(),
        hold_ms: 60_000,
        ..KubernetesConfig::default()
    }
}

fn place(id: &str) -> Place {
    Place {
        container_id: Some(id.to_owned()),
        pod_uid: Some("u1".to_owned()),
        sources: vec![PlaceSource::CgroupPath],
        ..Place::default()
    }
}

async fn serve(router: Router) -> String {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move { axum::serve(listener, router).await });
    format!("http://{address}")
}

fn kubelet(url: String) -> Kubelet {
    Kubelet::new(&KubeletOptions {
        url,
        token_file: None,
        ca_file: None,
        insecure_skip_verify: false,
    })
    .unwrap()
}

fn pods() -> serde_json::Value {
    json!({"kind": "PodList", "apiVersion": "v1", "metadata": {}, "items": [{
        "metadata": {"name": "edge", "namespace": "shop", "uid": "u1", "labels": {"app": "edge"}},
        "spec": {"containers": []},
        "status": {"containerStatuses": [{
            "name": "guest", "containerID": "cri-o://c1", "image": "i", "imageID": "i", "ready": true, "restartCount": 0,
        }]},
    }]})
}

#[tokio::test]
async fn the_kubelet_names_a_pod_and_traces_wait_for_it() {
    let url = serve(Router::new().route("/pods", get(|| async { Json(pods()) }))).await;
    let places = Places::with_sources(&quiet(), Some(kubelet(url)), None);
    let mut stage = PlaceStage::new(places.clone(), 10);
    let trace = |at: Place| {
        let mut trace = testing::trace(testing::invoke("run", 1, 2));
        let process = crate::span::Process {
            place: at,
            ..crate::span::Process::clone(&trace.process)
        };
        trace.process = Arc::new(process);
        trace
    };
    let mut ready = stage.pass(vec![trace(place(ID)), trace(place(ID)), trace(Place::default())]);
    assert_eq!(ready.len(), 1, "what is in no container does not wait");
    assert_eq!(stage.held_count(), 2);
    ready = stage.finish(Instant::now() + Duration::from_mins(1)).await;
    assert_eq!(ready.len(), 2);
    let named = &ready[0].process.place;
    assert_eq!(named.pod_name.as_deref(), Some("edge"));
    assert_eq!(named.namespace.as_deref(), Some("shop"));
    assert_eq!(named.container_name.as_deref(), Some("guest"));
    assert_eq!(named.sources, [PlaceSource::CgroupPath, PlaceSource::Kubelet]);
    assert!(
        Arc::ptr_eq(&ready[0].process, &ready[1].process),
        "one description per process"
    );
    assert_eq!(places.counts(), [("kubelet", "known", 1)]);
    // From now on nothing waits.
    assert_eq!(stage.pass(vec![trace(place(ID))]).len(), 1);
}

/// Answers with the container of `c1` first, and with what took its place from then on.
fn restarting() -> Router {
    let asked = std::sync::atomic::AtomicU64::new(0);
    let asked = Arc::new(asked);
    Router::new().route(
        "/pods",
        get(move || {
            let count = asked.fetch_add(1, std::sync::atomic::Ordering::SeqCst);
            let mut pods = pods();
            pods["items"][0]["metadata"]["labels"]["asked"] = json!(count.to_string());
            if count > 0 {
                pods["items"][0]["status"]["containerStatuses"][0]["containerID"] = json!("cri-o://c2");
            }
            async move { Json(pods) }
        }),
    )
}

#[tokio::test]
async fn what_the_kubelet_said_ages_and_a_restarted_container_is_asked_for_at_once() {
    let long = Duration::from_mins(10);
    let asked = |pod: Option<PodFacts>| {
        let pod = pod.unwrap();
        let label = pod.labels.iter().find(|(key, _)| *key == "asked").unwrap();
        (label.1.clone(), pod.containers.len())
    };
    // One answer serves, however often it is asked for what it names.
    let lasting = kubelet(serve(restarting()).await).aging(long, long);
    for _ in 0..3 {
        assert_eq!(asked(lasting.pod_of(&place(ID)).await.unwrap()).0, "0");
    }
    // Too old: what is named is asked for again.
    let aging = kubelet(serve(restarting()).await).aging(Duration::ZERO, Duration::ZERO);
    for count in ["0", "1", "2"] {
        assert_eq!(asked(aging.pod_of(&place(ID)).await.unwrap()).0, count);
    }
    // The pod is known, its new container is not, and the kubelet may be asked.
    let young = kubelet(serve(restarting()).await).aging(Duration::ZERO, long);
    assert_eq!(asked(young.pod_of(&place(ID)).await.unwrap()).0, "0");
    let found = young.pod_of(&place("c2")).await.unwrap().unwrap();
    assert_eq!(found.containers[0].0, "c2");
}

#[tokio::test]
async fn a_kubelet_at_an_ipv6_address_is_asked() {
    let Ok(listener) = tokio::net::TcpListener::bind("[::1]:0").await else {
        // A machine without IPv6 has no such kubelet.
        return;
    };
    let url = format!("http://{}", listener.local_addr().unwrap());
    tokio::spawn(async move { axum::serve(listener, restarting()).await });
    assert_eq!(kubelet(url).pod_of(&place(ID)).await.unwrap().unwrap().name, "edge");
}

#[tokio::test]
async fn a_stage_that_is_full_lets_the_oldest_go_and_counts() {
    let url = serve(Router::new().route("/pods", get(|| async { Json(pods()) }))).await;
    let places = Places::with_sources(&quiet(), Some(kubelet(url)), None);
    // The pod is known, and its new container, which has just been started, is not.
    let started = place("c2");
    places.resolve(&started).await;
    let mut stage = PlaceStage::new(places.clone(), 3);
    let traces = (0..5).map(|_| {
        let mut trace = testing::trace(testing::invoke("run", 1, 2));
        let process = crate::span::Process {
            place: started.clone(),
            ..crate::span::Process::clone(&trace.process)
        };
        trace.process = Arc::new(process);
        trace
    });
    let through = stage.pass(traces.collect());
    assert_eq!((through.len(), stage.held_count()), (2, 3));
    assert!(places.counts().contains(&("hold", "overflow", 2)));
    // They go with what is known by now.
    for trace in through {
        let place = &trace.process.place;
        assert_eq!(
            (place.pod_name.as_deref(), place.container_name.as_deref()),
            (Some("edge"), None)
        );
    }
    // At the end nobody waits longer than there is time, though the traces might.
    assert_eq!(stage.finish(Instant::now()).await.len(), 3);
    assert!(places.counts().contains(&("hold", "shutdown", 3)));
}

#[tokio::test]
async fn a_stage_whose_traces_take_too_much_memory_lets_the_oldest_go_and_counts() {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let places = Places::with_sources(&quiet(), Some(kubelet(url)), None);
    let trace = |call_count: u64| {
        let mut root = testing::invoke("run", 0, 1_000);
        root.children = (0..call_count).map(|at| testing::syscall("read", at, at + 1)).collect();
        let mut trace = testing::trace(root);
        let process = crate::span::Process {
            place: place(ID),
            ..crate::span::Process::clone(&trace.process)
        };
        trace.process = Arc::new(process);
        trace
    };
    let max_bytes = 2 * trace(100).estimated_bytes();
    let mut stage = PlaceStage::new(places.clone(), 1_000).with_max_bytes(max_bytes);
    assert_eq!(stage.pass(vec![trace(100), trace(100)]).len(), 0);
    let through = stage.pass(vec![trace(1)]);
    assert_eq!((through.len(), stage.held_count()), (1, 2));
    assert_eq!(through[0].root.children.len(), 100);
    assert!(places.counts().contains(&("hold", "overflow", 1)));
}

#[tokio::test]
async fn a_kubelet_that_refuses_or_talks_nonsense_is_an_error_and_nothing_is_named() {
    let refuses = get(|| async { StatusCode::FORBIDDEN });
    let nonsense = get(|| async { "[" });
    for handler in [refuses, nonsense] {
        let url = serve(Router::new().route("/pods", handler)).await;
        let places = Places::with_sources(&quiet(), Some(kubelet(url)), None);
        assert_eq!(places.resolve(&place(ID)).await, place(ID));
        assert_eq!(places.counts(), [("kubelet", "error", 1)]);
    }
}

#[tokio::test]
async fn who_owns_a_pod_that_the_runtime_has_named_is_asked_of_the_next_source_until_it_answers() {
    let asked = Arc::new(std::sync::atomic::AtomicUsize::new(0));
    let count = asked.clone();
    let recovering = move || {
        let count = count.fetch_add(1, std::sync::atomic::Ordering::SeqCst);
        let mut pods = pods();
        pods["items"][0]["metadata"]["ownerReferences"] =
            json!([{"apiVersion": "apps/v1", "kind": "StatefulSet", "name": "carts", "uid": "o1", "controller": true}]);
        pods["items"][0]["spec"]["runtimeClassName"] = json!("wasmtime");
        async move {
            if count < 2 {
                Err(StatusCode::SERVICE_UNAVAILABLE)
            } else {
                Ok(Json(pods))
            }
        }
    };
    let url = serve(Router::new().route("/pods", get(recovering))).await;
    let kubelet = kubelet(url).aging(Duration::ZERO, Duration::ZERO);
    let places = Places::with_sources(&quiet(), Some(kubelet), None);
    // As the container runtime would have said.
    let reported = Place {
        pod_name: Some("edge".to_owned()),
        namespace: Some("shop".to_owned()),
        container_name: Some("guest".to_owned()),
        sources: vec![PlaceSource::CgroupPath, PlaceSource::Cri],
        ..place(ID)
    };
    places.remember(ID, &reported, Instant::now());
    // Nothing waits for it.
    assert_eq!(places.lookup(&place(ID)), Lookup::Known(reported.clone()));
    let confirmed = loop {
        let Lookup::Known(known) = places.lookup(&place(ID)) else {
            panic!("it has its names")
        };
        if known.owner.is_some() {
            break known;
        }
        assert_eq!(known, reported);
        tokio::time::sleep(Duration::from_millis(10)).await;
    };
    assert_eq!(confirmed.owner.unwrap().name, "carts");
    assert_eq!(confirmed.runtime_class.as_deref(), Some("wasmtime"));
    let sources = [PlaceSource::CgroupPath, PlaceSource::Cri, PlaceSource::Kubelet];
    assert_eq!(confirmed.sources, sources);
    assert_eq!(places.counts(), [("kubelet", "error", 2), ("kubelet", "known", 1)]);
}

#[tokio::test]
async fn a_kubelet_that_fails_is_not_asked_again_at_once() {
    let fails = get(|| async { StatusCode::SERVICE_UNAVAILABLE });
    let url = serve(Router::new().route("/pods", fails)).await;
    let kubelet = kubelet(url).aging(Duration::ZERO, Duration::ZERO);
    let places = Places::with_sources(&quiet(), Some(kubelet), None);
    for id in ["c1", "c2", "c3"] {
        assert_eq!(places.resolve(&place(id)).await, place(id));
    }
    assert_eq!(places.counts(), [("kubelet", "error", 1)]);
}

#[tokio::test]
async fn nobody_is_asked_for_a_container_that_a_user_has_called_so() {
    let url = serve(Router::new().route("/pods", get(|| async { Json(pods()) }))).await;
    let places = Places::with_sources(&quiet(), Some(kubelet(url)), None);
    let container = "0123456789abcdef".repeat(4);
    let path = format!("/user.slice/user-1000.slice/user@1000.service/libpod-{container}.scope");
    let pretended = cgroup::parse_path(&path).into_place();
    assert_eq!(pretended.container_id, Some(container));
    assert_eq!(places.lookup(&pretended), Lookup::Known(pretended.clone()));
    assert_eq!(places.resolve(&pretended).await, pretended);
    assert_eq!((places.counts(), places.remembered_count()), (vec![], 0));
}

#[tokio::test]
async fn an_answer_for_another_pod_is_a_conflict() {
    let url = serve(Router::new().route("/pods", get(|| async { Json(pods()) }))).await;
    let places = Places::with_sources(&quiet(), Some(kubelet(url)), None);
    let other = Place {
        pod_uid: Some("u2".to_owned()),
        ..place(ID)
    };
    assert_eq!(places.resolve(&other).await, other);
    assert_eq!(places.counts(), [("kubelet", "conflict", 1)]);
}

#[tokio::test]
async fn what_is_remembered_is_bounded() {
    let url = serve(Router::new().route("/pods", get(|| async { Json(pods()) }))).await;
    let places = Places::with_sources(&quiet(), Some(kubelet(url)), None);
    for index in 0..MAX_ENTRIES + 100 {
        let _ = places.lookup(&place(&index.to_string()));
    }
    assert!(places.remembered_count() <= MAX_ENTRIES);
}

#[tokio::test]
async fn what_is_in_no_pod_waits_for_one_answer_and_no_longer() {
    let empty = || async { Json(json!({"kind": "PodList", "apiVersion": "v1", "items": []})) };
    let url = serve(Router::new().route("/pods", get(empty))).await;
    let places = Places::with_sources(&quiet(), Some(kubelet(url)), None);
    let outside = Place {
        pod_uid: None,
        ..place(ID)
    };
    assert_eq!(places.lookup(&outside), Lookup::Pending(outside.clone()));
    while places.lookup(&outside) == Lookup::Pending(outside.clone()) {
        tokio::task::yield_now().await;
    }
    assert_eq!(places.lookup(&outside), Lookup::Known(outside));
    assert_eq!(places.counts(), [("kubelet", "unknown", 1)]);
}

#[tokio::test]
async fn a_pod_that_the_source_learns_of_later_is_asked_for_again() {
    let answers = Arc::new(std::sync::atomic::AtomicUsize::new(0));
    let asked = answers.clone();
    let late = move || {
        let count = asked.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        async move {
            if count == 0 {
                Json(json!({"kind": "PodList", "apiVersion": "v1", "items": []}))
            } else {
                Json(pods())
            }
        }
    };
    let url = serve(Router::new().route("/pods", get(late))).await;
    let places = Places::with_sources(&quiet(), Some(kubelet(url)), None);
    while let Lookup::Pending(_) = places.lookup(&place(ID)) {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    let Lookup::Known(known) = places.lookup(&place(ID)) else {
        panic!("it was known a moment ago");
    };
    assert_eq!(known.pod_name.as_deref(), Some("edge"));
    assert_eq!(answers.load(std::sync::atomic::Ordering::Relaxed), 2);
}

#[tokio::test]
async fn without_anybody_to_ask_nothing_waits() {
    let places = Places::with_sources(&quiet(), None, None);
    assert_eq!(places.lookup(&place(ID)), Lookup::Known(place(ID)));
    assert_eq!(places.resolve(&place(ID)).await, place(ID));
}

#[tokio::test]
async fn a_runtime_that_is_not_there_is_an_error_and_not_asked_again_at_once() {
    let config = KubernetesConfig {
        cri_socket: "/nonexistent/containerd.sock".to_owned(),
        ..quiet()
    };
    let places = Places::with_sources(&config, None, None);
    assert_eq!(places.resolve(&place(ID)).await, place(ID));
    assert_eq!(places.resolve(&place(ID)).await, place(ID));
    assert_eq!(places.counts(), [("cri", "error", 1)]);
}
