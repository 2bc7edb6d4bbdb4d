//! A short soak: waves of programs come, work and go while the collector is away for one of them, and nothing is counted wrongly.

use std::collections::BTreeSet;

use rustix::process::Signal;
use tempfile::tempdir;
use wasmscope_tests::agent::wasmscope;
use wasmscope_tests::captured::is_counted;
use wasmscope_tests::environment::{self, Kernel};
use wasmscope_tests::http;
use wasmscope_tests::otlp_receiver::{Answer, Receiver, spans};
use wasmscope_tests::running::{DEADLINE, Running};
use wasmscope_tests::samples::{self, sums};
use wasmscope_tests::workload::{Counts, Numbers, Workload};

const WAVES: usize = 3;
/// The wave during which the collector refuses everything.
const WAVE_WITHOUT_COLLECTOR: usize = 1;
const AT_ONCE: usize = 8;
/// Some on one thread, some on fibers that move between threads.
const KINDS: [&[&str]; 2] = [
    &["--calls", "10", "--repeat", "20"],
    &[
        "--mode",
        "async",
        "--tasks",
        "4",
        "--threads",
        "2",
        "--calls",
        "10",
        "--repeat",
        "5",
    ],
];
/// Every trace leaves: what is sampled out is not a loss, and could not be told from one here. And no probe is paused: programs that do
/// nothing but cross the boundary are over any budget.
const CONFIG: &str =
    "[traces.sampling]\ntraces_per_second = 1000000.0\nburst = 1000000.0\n[governor]\nenabled = false\n";

fn add(total: &mut Numbers, counts: Numbers) {
    for (name, count) in counts {
        *total.entry(name).or_default() += count;
    }
}

fn ready() -> Vec<Workload> {
    let kinds = KINDS.iter().cycle().take(AT_ONCE);
    kinds.map(|kind| Workload::ready(kind)).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn waves_of_programs_are_counted_exactly_and_only_what_the_collector_refused_is_lost() {
    let Some(_kernel) = Kernel::acquire() else { return };
    let Some(python) = environment::python() else { return };
    let receiver = Receiver::start(Answer::Accept).unwrap();
    let directory = tempdir().unwrap();
    let config = directory.path().join("agent.toml");
    std::fs::write(&config, CONFIG).unwrap();
    let mut command = wasmscope();
    command
        .args(["agent", "--listen", "127.0.0.1:0", "--config"])
        .arg(&config)
        .arg("--set")
        .arg(format!(
            "instance.lock_file={}",
            directory.path().join("lock").display()
        ))
        .env("OTEL_EXPORTER_OTLP_ENDPOINT", receiver.endpoint());
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
    let mut counted = Counts::default();
    let mut syscalls = Numbers::new();
    let mut started = 0;
    for wave in 0..WAVES {
        let is_away = wave == WAVE_WITHOUT_COLLECTOR;
        receiver.answer(if is_away { Answer::Refuse } else { Answer::Accept });
        let mut wave = ready();
        // Whoever works before the agent has looked is seen in part, and the agent says so; that is another test's subject.
        started += AT_ONCE as u64;
        let begun = std::time::Instant::now();
        while sums(&scrape(), "wasmscope_events_total", "kind").get("process") != Some(&started) {
            assert!(begun.elapsed() < *DEADLINE, "not all of {started} are watched");
        }
        // All at once.
        for workload in &mut wave {
            workload.0.send_line();
        }
        for workload in wave {
            let counts = Counts::of(&workload.0.finish().succeeded());
            add(&mut syscalls, counts.syscalls());
            add(&mut counted.invocations, counts.invocations);
            add(&mut counted.host_calls, counts.host_calls);
        }
        let invoked: u64 = counted.invocations.values().sum();
        let begun = std::time::Instant::now();
        loop {
            let samples = scrape();
            let mut seen = sums(&samples, "wasm_syscalls_total", "syscall");
            seen.retain(|name, _| is_counted(name));
            let invocations: u64 = sums(&samples, "wasm_invocations_total", "export").values().sum();
            let host_calls = sums(&samples, "wasm_host_calls_total", "import");
            if invocations == invoked && host_calls == counted.host_calls && seen == syscalls {
                break;
            }
            assert!(
                begun.elapsed() < *DEADLINE,
                "{invocations} of {invoked}, {host_calls:?} of {:?}, {seen:?} of {syscalls:?}",
                counted.host_calls
            );
        }
        // The answer changes only when every trace of this wave has been answered.
        receiver
            .wait_for(|received| {
                let requests = received.iter().flat_map(|received| spans(&received.request));
                requests.filter(|span| span.parent_span_id.is_empty()).count() as u64 >= invoked
            })
            .await;
    }

    let mut accepted = BTreeSet::new();
    let mut refused = BTreeSet::new();
    for received in receiver.received() {
        let traces = if received.answer == Answer::Accept {
            &mut accepted
        } else {
            &mut refused
        };
        traces.extend(spans(&received.request).into_iter().map(|span| span.trace_id));
    }
    assert!(accepted.is_disjoint(&refused));
    let invoked: u64 = counted.invocations.values().sum();
    assert_eq!((accepted.len() + refused.len()) as u64, invoked);
    assert_eq!(refused.len() as u64, invoked / WAVES as u64);
    let begun = std::time::Instant::now();
    let wanted = Numbers::from([("export".to_owned(), refused.len() as u64)]);
    loop {
        let mut lost = sums(&scrape(), "wasmscope_events_lost_total", "layer");
        // Metrics are refused as well, and told anew with the next push.
        lost.retain(|layer, count| layer != "export_metrics" && *count > 0);
        if lost == wanted {
            break;
        }
        let text = || std::fs::read_to_string(&file).unwrap_or_default();
        let lines = || {
            text()
                .lines()
                .filter(|line| line.contains("_lost_total{"))
                .collect::<Vec<_>>()
                .join("\n")
        };
        assert!(begun.elapsed() < *DEADLINE, "{lost:?} is not {wanted:?}: {}", lines());
    }
    agent.signal(Signal::TERM);
    let text = agent.finish().succeeded().stderr_text();
    assert!(text.contains(&format!("exported={}", accepted.len())), "{text}");
}
