//! What the agent keeps follows what runs, not what has ever run.

use std::time::{Duration, Instant};

use rustix::process::Signal;
use tempfile::tempdir;
use wasmscope_tests::agent::wasmscope;
use wasmscope_tests::environment::{self, Kernel};
use wasmscope_tests::http;
use wasmscope_tests::running::{DEADLINE, Running};
use wasmscope_tests::samples::{self, sums};
use wasmscope_tests::workload::{Counts, Workload, stripped};

/// Builds of a host, as a node sees them when images are updated; every other one without symbols.
const BUILDS: usize = 6;
/// Processes of each.
const PROCESSES: u64 = 3;
/// What is there only while processes with guests are.
const FOLLOWING: [&str; 8] = [
    "processes",
    "files",
    "links",
    "correlated_processes",
    "bpf_processes",
    "bpf_threads",
    "bpf_undecided",
    "bpf_hits",
];

#[test]
fn nothing_is_kept_of_processes_and_builds_that_are_gone() {
    let Some(_kernel) = Kernel::acquire() else { return };
    let Some(python) = environment::python() else { return };
    let directory = tempdir().unwrap();
    let mut command = wasmscope();
    command
        .args([
            "agent",
            "--listen",
            "127.0.0.1:0",
            "--set",
            "capture.file_grace_seconds=0",
        ])
        .arg("--set")
        .arg(format!(
            "instance.lock_file={}",
            directory.path().join("lock").display()
        ));
    let agent = Running::start(command);
    let line = agent.stderr_line(|line| line.contains("serving HTTP"));
    let url = format!("http://{}/metrics", line.rsplit_once("address=").unwrap().1.trim());
    agent.stderr_line(|line| line.ends_with("ready"));
    let file = directory.path().join("scrape.txt");
    let scrape = || {
        let response = http::get(&url);
        std::fs::write(&file, response.split_once("\r\n\r\n").unwrap().1).unwrap();
        samples::read(python, &file)
    };
    let until = |what: &str, is_so: &dyn Fn() -> Result<(), String>| {
        let begun = Instant::now();
        while let Err(why) = is_so() {
            assert!(begun.elapsed() < *DEADLINE, "{what}: {why}");
            std::thread::sleep(Duration::from_millis(50));
        }
    };
    let is_empty = || {
        let mut entries = sums(&scrape(), "wasmscope_table_entries", "table");
        assert!(
            FOLLOWING.iter().all(|table| entries.contains_key(*table)),
            "{entries:?}"
        );
        entries.retain(|table, count| FOLLOWING.contains(&table.as_str()) && *count > 0);
        entries.is_empty().then_some(()).ok_or(format!("{entries:?}"))
    };
    until("before", &is_empty);

    let mut invoked = 0;
    let mut files = Vec::new();
    for build in 0..BUILDS {
        let path = directory.path().join(format!("host-{build}"));
        if build % 2 == 0 {
            std::fs::copy(environment::test_host("workload"), &path).unwrap();
        } else {
            stripped(&environment::test_host("workload"), &path);
        }
        let mut hosts: Vec<_> = (0..PROCESSES)
            .map(|_| Workload::ready_as(&path, &["--calls", "5", "--repeat", "2"]))
            .collect();
        until("processes are looked at", &|| {
            let samples = scrape();
            let entries = sums(&samples, "wasmscope_table_entries", "table");
            (entries.get("processes") == Some(&PROCESSES) && entries.get("files") == Some(&1))
                .then_some(())
                .ok_or(format!("{entries:?}"))
        });
        for host in &mut hosts {
            host.0.send_line();
        }
        for host in hosts {
            let counts = Counts::of(&host.0.finish().succeeded());
            invoked += counts.invocations.values().sum::<u64>();
        }
        std::fs::remove_file(&path).unwrap();
        until("afterwards", &is_empty);
        let open = scrape()
            .iter()
            .find(|sample| sample.name == "process_open_fds")
            .and_then(|sample| sample.value);
        files.push(open.unwrap());
    }
    // The last process of a build may become another program instead of ending.
    let path = directory.path().join("replaced");
    std::fs::copy(environment::test_host("workload"), &path).unwrap();
    let mut host = Workload::ready_as(&path, &["--scenario", "exec-mid-call", "--threads", "3"]);
    until("it is looked at", &|| {
        let entries = sums(&scrape(), "wasmscope_table_entries", "table");
        (entries.get("files") == Some(&1))
            .then_some(())
            .ok_or(format!("{entries:?}"))
    });
    host.0.send_line();
    let counts = Counts::of(&host.0.finish().succeeded());
    invoked += counts.invocations.values().sum::<u64>();
    until("after it has become another", &is_empty);

    // What has been counted stays.
    until("counted", &|| {
        let seen: u64 = sums(&scrape(), "wasm_invocations_total", "export").values().sum();
        (seen == invoked).then_some(()).ok_or(format!("{seen} of {invoked}"))
    });
    // The first may leave what is shared from then on.
    assert!(
        files[1..].iter().all(|count| *count <= files[1]),
        "open files: {files:?}"
    );
    agent.signal(Signal::TERM);
    agent.finish().succeeded();
}
