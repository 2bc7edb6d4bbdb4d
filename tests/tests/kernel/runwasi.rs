//! A guest that is a pod itself: run by a shim made of runwasi's library, under a real containerd.

use std::fs::{self, OpenOptions};
use std::io::Write as _;
use std::path::PathBuf;
use std::process::Command;

use k8s_cri::v1::{ImageSpec, KeyValue, Mount};
use tempfile::tempdir;
use wasmscope::span::{Parent, ParentSource, PlaceSource, Span, SpanKind};
use wasmscope_tests::agent::Agent;
use wasmscope_tests::captured::stack_names;
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
    // In a folder: youki, of which the shim is made, mounts no pipes.
    let gate = directory.path().join("gate");
    fs::create_dir(&gate).unwrap();
    let go_path = gate.join("go");
    assert!(Command::new("mkfifo").arg(&go_path).status().unwrap().success());
    let mut go = OpenOptions::new().read(true).write(true).open(&go_path).unwrap();
    let (sandbox, mut container) = containerd.described(HELLO, "", &[]);
    container.image = Some(ImageSpec {
        image: IMAGE.to_owned(),
        ..ImageSpec::default()
    });
    container.command.clear();
    container.mounts.push(Mount {
        container_path: "/gate".to_owned(),
        host_path: gate.display().to_string(),
        ..Mount::default()
    });
    container.envs.push(KeyValue {
        key: "SHIM_WAITS_FOR".to_owned(),
        value: "/gate/go".to_owned(),
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
    let seen = agent.captured();
    containerd.line(&hello, |line| line.starts_with("fd_write "));
    let said = Said::by(&hello.lines());

    seen.assert_nothing_lost();
    seen.assert_well_formed();
    let counted = seen.counts();
    assert_eq!(counted.invocations, Numbers::from([("hello/_start".to_owned(), 1)]));
    assert_eq!(counted.host_calls, said.host_calls);
    // What does not go to the log goes to the file.
    let file_writes = said.host_calls[&imported("fd_write")] - said.line_count;
    for (import, syscall, count) in [
        ("fd_write", "write", said.line_count),
        ("fd_write", "pwrite64", file_writes),
        ("path_open", "openat2", said.host_calls[&imported("path_open")]),
        ("fd_close", "close", said.host_calls[&imported("fd_close")]),
    ] {
        let of_import = &counted.syscalls_by_host_call[&imported(import)];
        assert_eq!(of_import.get(syscall), Some(&count), "{import}: {of_import:?}");
    }
    let [trace] = seen.traces.as_slice() else {
        panic!("{} traces", seen.traces.len())
    };
    let rounds = said.host_calls[&imported("clock_time_get")];
    assert_eq!(
        writes_by_stack(&trace.root),
        Numbers::from([
            ("write: write_line round _start".to_owned(), rounds),
            ("pwrite64: write_line round _start".to_owned(), file_writes),
            ("write: write_line report _start".to_owned(), said.line_count - rounds),
        ])
    );
    let parent = Parent::parse(TRACEPARENT.as_bytes(), ParentSource::Environment);
    assert_eq!(trace.parent, parent);

    assert_eq!(trace.process.pid, hello.pid);
    assert_eq!(trace.process.limits, [""; 0]);
    let place = &trace.process.place;
    assert_eq!(place.runtime_handler.as_deref(), Some(CLASS));
    assert_eq!(place.container_id.as_deref(), Some(hello.id.as_str()));
    assert_eq!(place.container_name.as_deref(), Some(HELLO.container));
    assert_eq!(place.pod_uid.as_deref(), Some(HELLO.uid));
    assert_eq!(place.pod_name.as_deref(), Some(HELLO.name));
    assert_eq!(place.namespace.as_deref(), Some(HELLO.namespace));
    assert_eq!(place.labels.get("app").map(String::as_str), Some("hello"));
    assert_eq!(place.sources, [PlaceSource::CgroupPath, PlaceSource::Cri]);
}

/// What a guest's log says.
struct Said {
    host_calls: Numbers,
    line_count: u64,
}

impl Said {
    fn by(lines: &[String]) -> Self {
        let counts = lines.iter().filter(|line| *line != LINE).map(|line| {
            let (name, count) = line.split_once(' ').unwrap();
            (imported(name), count.parse().unwrap())
        });
        Self {
            host_calls: counts.collect(),
            line_count: lines.len() as u64,
        }
    }
}

fn imported(name: &str) -> String {
    format!("wasi_snapshot_preview1.{name}")
}

/// Syscalls that write, by the guest functions that they were made from, innermost first.
fn writes_by_stack(root: &Span) -> Numbers {
    let mut writes = Numbers::new();
    for span in root.walk() {
        if let SpanKind::Syscall { name, .. } = &span.kind
            && name.contains("write")
        {
            let key = format!("{name}: {}", stack_names(span).join(" "));
            *writes.entry(key).or_default() += 1;
        }
    }
    writes
}
