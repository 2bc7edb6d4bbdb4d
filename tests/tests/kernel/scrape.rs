//! What a real Prometheus stores of an agent: native histograms from protobuf, counts equal to the workloads' own, and no series of processes that are gone.

use std::time::Instant;

use tempfile::tempdir;
use wasmscope_tests::agent::wasmscope;
use wasmscope_tests::environment::{self, Kernel};
use wasmscope_tests::http;
use wasmscope_tests::prometheus::{Histograms, Prometheus};
use wasmscope_tests::running::{DEADLINE, Running};
use wasmscope_tests::samples::{self, sums};
use wasmscope_tests::workload::{Counts, Numbers, Workload};

/// Values by one label, as an instant query of Prometheus has them.
fn query(prometheus: &Prometheus, expression: &str, label: &str) -> Numbers {
    let values = prometheus.query(expression).into_iter().map(|series| {
        let value: f64 = series["value"][1].as_str().unwrap().parse().unwrap();
        let name = series["metric"][label].as_str().unwrap_or_default().to_owned();
        (name, value as u64)
    });
    values.collect()
}

/// Looks until `seen` is `wanted`.
fn wait_for(wanted: &Numbers, what: &str, mut seen: impl FnMut() -> Numbers) {
    let begun = Instant::now();
    loop {
        let seen = seen();
        if seen == *wanted {
            return;
        }
        assert!(begun.elapsed() < *DEADLINE, "{what}: {seen:?} is not {wanted:?}");
    }
}

fn counted(workload: &mut Workload) -> Counts {
    workload.0.send_line();
    let line = workload.0.stdout_line(|line| line.starts_with("{\"scenario\""));
    Counts::among([line.as_str()])
}

#[test]
fn prometheus_stores_native_histograms_of_what_workloads_counted_and_forgets_those_that_are_gone() {
    let Some(_kernel) = Kernel::acquire() else { return };
    let Some(python) = environment::python() else { return };
    let directory = tempdir().unwrap();
    let mut leaving = Workload::ready(&["--calls", "20", "--repeat", "3", "--hold"]);
    let mut staying = Workload::ready(&["--scenario", "nested", "--calls", "5", "--repeat", "3", "--hold"]);
    let mut command = wasmscope();
    command
        .args(["agent", "--listen", "127.0.0.1:0", "--set"])
        .arg(format!(
            "instance.lock_file={}",
            directory.path().join("lock").display()
        ))
        .env("WASMSCOPE_GOVERNOR__ENABLED", "false")
        .env("WASMSCOPE_METRICS__EXPIRY_SECONDS", "1");
    let agent = Running::start(command);
    let line = agent.stderr_line(|line| line.contains("serving HTTP"));
    let address = line.rsplit_once("address=").unwrap().1.trim().to_owned();
    agent.stderr_line(|line| line.ends_with("ready"));

    let configuration = format!(
        "scrape_configs:\n- job_name: wasmscope\n  scrape_interval: 1s\n  static_configs:\n  - targets: ['{address}']\n"
    );
    let Some(prometheus) = Prometheus::start(directory.path(), &configuration, Histograms::Native) else {
        return;
    };

    let samples = || {
        let file = directory.path().join("scrape.txt");
        let response = http::get(&format!("http://{address}/metrics"));
        std::fs::write(&file, response.split_once("\r\n\r\n").unwrap().1).unwrap();
        samples::read(python, &file)
    };
    let looked_at = Numbers::from([(String::new(), 2)]);
    wait_for(&looked_at, "both are looked at", || {
        let looks = sums(&samples(), "wasmscope_events_total", "kind");
        Numbers::from([(String::new(), looks.get("process").copied().unwrap_or(0).min(2))])
    });
    let left = counted(&mut leaving);
    let stayed = counted(&mut staying);
    let mut all = left.host_calls.clone();
    for (import, count) in &stayed.host_calls {
        *all.entry(import.clone()).or_default() += count;
    }
    for expression in [
        "sum by (import) (wasm_host_calls_total)",
        // Only a native histogram has a count of this kind.
        "sum by (import) (histogram_count(wasm_host_call_duration_seconds))",
        "sum by (import) (histogram_fraction(0, 1e9, wasm_host_call_duration_seconds) * histogram_count(wasm_host_call_duration_seconds))",
    ] {
        wait_for(&all, expression, || query(&prometheus, expression, "import"));
    }
    assert_eq!(
        query(&prometheus, "min(min_over_time(up[10m]))", ""),
        Numbers::from([(String::new(), 1)])
    );

    leaving.0.finish().succeeded();
    wait_for(&stayed.host_calls, "series of the other go", || {
        sums(&samples(), "wasm_host_calls_total", "import")
    });
    wait_for(&stayed.host_calls, "Prometheus is told that they ended", || {
        query(&prometheus, "sum by (import) (wasm_host_calls_total)", "import")
    });
    staying.0.finish().succeeded();
    // All of them: also those that traces feed.
    wait_for(&Numbers::new(), "no series of a process is left", || {
        let left = samples().into_iter().filter(|sample| sample.name.starts_with("wasm_"));
        left.map(|sample| (format!("{} {:?}", sample.name, sample.labels), 1))
            .collect()
    });
}
