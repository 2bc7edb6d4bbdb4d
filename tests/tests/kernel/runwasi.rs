//! A guest that is a pod itself: run by a shim made of runwasi's library, under a real containerd.

use std::fs::OpenOptions;
use std::io::Write as _;
use std::path::PathBuf;
use std::process::Command;

use k8s_cri::v1::{ImageSpec, KeyValue, Mount};
use tempfile::tempdir;
use wasmscope::span::{Parent, ParentSource, PlaceSource, SpanKind};
use wasmscope_tests::agent::Agent;
use wasmscope_tests::captured::{is_counted, stack_names};
use wasmscope_tests::containerd::{Containerd, Pod, Shim};
use wasmscope_tests::environment::Kernel;
use wasmscope_tests::workload::Numbers;

const HELLO: Pod<'_> = Pod {
    uid: "9f7e5a6b-3c24-4ebf-8aa1-5c6d7e8f9a01",
    namespace: "shop",
    name: "hello-6c5f4d7b8-q9w8e",
    labels: &[("app", "hello")],
    container: "guest",
};
const IMAGE: &str = "localhost/hello:1";
const CLASS: &str = "wasmtime";
const TRACEPARENT: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
const LINE: &str = "one line";

#[test]
#[ignore = "slow: cargo xtask test --slow"]
fn a_guest_that_a_runwasi_shim_runs_as_a_pod_is_named_and_traced_as_it_counts_itself() {
    let Some(_kernel) = Kernel::acquire() else { return };
    let shim = std::env::var_os("WASMSCOPE_TEST_SHIM").map(PathBuf::from);
    let shim = shim.expect("WASMSCOPE_TEST_SHIM names the shim's binary: run `cargo xtask test --slow`");
    let directory = tempdir().unwrap();
    // As runwasi's shim sets it for the process that runs guests.
    let context = format!(r#"{{"traceparent":"{TRACEPARENT}","tracestate":""}}"#);
    let shim = Shim {
        binary: &shim,
        name: CLASS,
        variables: &[("TRACECONTEXT", &context)],
    };
    let Some(mut containerd) = Containerd::start_with_shim(directory.path(), shim) else {
        return;
    };
    let guest = include_bytes!("../../guests/hello.wat");
    let settings = serde_json::json!({"Entrypoint": ["/hello.wat"]});
    containerd.import(IMAGE, &settings, &[("hello.wat", guest, 0o644)]);
    let go_path = directory.path().join("go");
    assert!(Command::new("mkfifo").arg(&go_path).status().unwrap().success());
    let mut go = OpenOptions::new().read(true).write(true).open(&go_path).unwrap();
    let (sandbox, mut container) = containerd.described(HELLO, "", &[]);
    container.image = Some(ImageSpec {
        image: IMAGE.to_owned(),
        ..ImageSpec::default()
    });
    container.command.clear();
    container.mounts.push(Mount {
        container_path: "/go".to_owned(),
        host_path: go_path.display().to_string(),
        ..Mount::default()
    });
    container.envs.push(KeyValue {
        key: "SHIM_WAITS_FOR".to_owned(),
        value: "/go".to_owned(),
    });
    let hello = containerd.run_in_class(sandbox, container, CLASS);

    let agent = Agent::watching([
        "--pid",
        &hello.pid.to_string(),
        "--cri-socket",
        &containerd.socket(),
        "--format",
        "json",
    ]);
    go.write_all(b"!").unwrap();
    containerd.line(&hello, |line| line.starts_with("fd_write "));
    let seen = agent.captured();
    eprintln!("{seen:#?}");

    let [trace] = seen.traces.as_slice() else {
        panic!("{} traces", seen.traces.len());
    };
}
