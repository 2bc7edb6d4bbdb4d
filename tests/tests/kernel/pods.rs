//! Guests in pods of a real containerd.

use std::fs::{File, OpenOptions};
use std::io::Write as _;
use std::path::Path;
use std::process::Command;

use tempfile::tempdir;
use wasmscope::span::PlaceSource;
use wasmscope_tests::agent::Agent;
use wasmscope_tests::containerd::{Containerd, Pod};
use wasmscope_tests::environment::{self, Kernel, Linking};
use wasmscope_tests::workload::Counts;

const EDGE: Pod<'_> = Pod {
    uid: "5b3a1d2c-9e8f-4a7b-8c6d-1e2f3a4b5c6d",
    namespace: "shop",
    name: "edge-7d9f8c6b5-x2x4z",
    labels: &[("app", "edge"), ("pod-template-hash", "7d9f8c6b5")],
    container: "guest",
};
const OTHER: Pod<'_> = Pod {
    uid: "6c4b2e3d-0f90-4b8c-9d7e-2f3a4b5c6d7e",
    namespace: "shop",
    name: "other",
    labels: &[],
    container: "guest",
};
const SCRIPT: &str = "exec /workload --tasks 4 --threads 2 --calls 25 --wait < /go";

/// A pipe that both ends can be opened of without waiting.
fn pipe(path: &Path) -> File {
    let status = Command::new("mkfifo").arg(path).status().unwrap();
    assert!(status.success());
    OpenOptions::new().read(true).write(true).open(path).unwrap()
}

#[test]
fn a_guest_in_a_pod_is_named_by_containerd_and_told_from_its_neighbour() {
    let Some(_kernel) = Kernel::acquire() else { return };
    let Some(program) = environment::linked_host(Linking::Static) else {
        return;
    };
    let directory = tempdir().unwrap();
    let Some(mut containerd) = Containerd::start(directory.path()) else {
        return;
    };
    let [edge_path, other_path] = ["edge", "other"].map(|name| directory.path().join(name));
    let (mut edge_go, mut other_go) = (pipe(&edge_path), pipe(&other_path));
    let edge = containerd.run(EDGE, SCRIPT, &[(&program, "/workload"), (&edge_path, "/go")]);
    let other = containerd.run(OTHER, SCRIPT, &[(&program, "/workload"), (&other_path, "/go")]);
    for container in [&edge, &other] {
        containerd.line(container, |line| line == "ready");
    }
    let pids = [edge.pid, other.pid].map(|pid| pid.to_string());
    let metrics = directory.path().join("metrics.txt");
    let agent = Agent::watching([
        "--pid",
        &pids[0],
        "--pid",
        &pids[1],
        "--pod",
        "shop/edge-7d9f8c6b5-x2x4z",
        "--cri-socket",
        &containerd.socket(),
        "--metrics-file",
        metrics.to_str().unwrap(),
        "--format",
        "json",
    ]);
    // The first may be watched and the second not yet.
    agent.0.stderr_line({
        let mut count = 0;
        move |line| {
            count += u32::from(line.starts_with("watching"));
            count == 2
        }
    });
    for go in [&mut edge_go, &mut other_go] {
        go.write_all(b"go\n").unwrap();
    }
    let counted = containerd.line(&edge, |line| line.starts_with("{\"scenario\""));
    containerd.line(&other, |line| line.starts_with("{\"scenario\""));
    let seen = agent.captured();

    assert_eq!(
        seen.counts(),
        Counts::among([counted.as_str()]),
        "only those of the one pod"
    );
    for trace in &seen.traces {
        assert_eq!(trace.process.pid, edge.pid);
        let place = &trace.process.place;
        assert_eq!(place.container_id.as_deref(), Some(edge.id.as_str()));
        assert_eq!(place.container_name.as_deref(), Some(EDGE.container));
        assert_eq!(place.pod_uid.as_deref(), Some(EDGE.uid));
        assert_eq!(place.pod_name.as_deref(), Some(EDGE.name));
        assert_eq!(place.namespace.as_deref(), Some(EDGE.namespace));
        let labels: Vec<_> = place
            .labels
            .iter()
            .map(|(key, value)| (key.as_str(), value.as_str()))
            .collect();
        assert_eq!(labels, EDGE.labels);
        assert_eq!(place.sources, [PlaceSource::CgroupPath, PlaceSource::Cri]);
    }
    let metrics = std::fs::read_to_string(metrics).unwrap();
    let labels =
        r#"wasm_invocations_total{process="workload",namespace="shop",pod="edge-7d9f8c6b5-x2x4z",container="guest","#;
    assert!(metrics.contains(labels), "{metrics}");
    // Each container was asked for once, however many traces it made.
    let asked = r#"wasmscope_pod_resolutions_total{source="cri",result="known"} 2"#;
    assert!(metrics.contains(asked), "{metrics}");
}
