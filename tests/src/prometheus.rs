//! A Prometheus of the test's own, asked over its API.

use std::fmt::Write as _;
use std::net::TcpListener;
use std::path::Path;
use std::process::Command;

use serde_json::Value;

use crate::environment::left_out;
use crate::http;
use crate::running::Running;

/// How it stores histograms that come in both kinds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Histograms {
    /// As buckets with fixed bounds.
    Classic,
    /// As native ones, and as nothing else.
    Native,
}

/// A running server that stores exemplars; killed when dropped.
#[derive(Debug)]
pub struct Prometheus {
    address: String,
    _running: Running,
}

impl Prometheus {
    /// Starts it with this configuration, everything it writes in `directory`. `None`, after saying so, where it is not installed.
    pub fn start(directory: &Path, configuration: &str, histograms: Histograms) -> Option<Self> {
        if !is_installed("prometheus", "prometheus") {
            return None;
        }
        let address = free_address();
        let file = directory.join("prometheus.yaml");
        std::fs::write(&file, configuration).expect("the folder can be written");
        let mut command = Command::new("prometheus");
        command
            .arg(format!("--config.file={}", file.display()))
            .arg(format!("--storage.tsdb.path={}", directory.join("data").display()))
            .arg(format!("--web.listen-address={address}"))
            .arg("--enable-feature=exemplar-storage");
        if histograms == Histograms::Native {
            command.arg("--enable-feature=native-histograms");
        }
        let running = Running::start(command);
        running.stderr_line(|line| line.contains("Server is ready to receive web requests"));
        Some(Self {
            address,
            _running: running,
        })
    }

    /// What a query answers now: its series.
    pub fn query(&self, expression: &str) -> Vec<Value> {
        let answer = self.get(&format!("query?query={}", escaped(expression)));
        series(&answer["result"], expression)
    }

    /// What a query answers for the last seconds, by the second: its series.
    pub fn query_range(&self, expression: &str, seconds: u64) -> Vec<Value> {
        let end = self.now();
        let start = end - seconds as f64;
        let query = escaped(expression);
        let answer = self.get(&format!("query_range?query={query}&start={start}&end={end}&step=1"));
        series(&answer["result"], expression)
    }

    /// Exemplars of the last seconds of the series that a query asks for.
    pub fn exemplars(&self, expression: &str, seconds: u64) -> Vec<Value> {
        let end = self.now() + 1.0;
        let start = end - seconds as f64;
        let path = format!("query_exemplars?query={}&start={start}&end={end}", escaped(expression));
        let mut all = self.get(&path);
        let series = all.as_array_mut().expect("it answers with series");
        let exemplars = series
            .iter_mut()
            .filter_map(|series| series["exemplars"].as_array_mut());
        exemplars.flat_map(std::mem::take).collect()
    }

    /// Its clock, seconds since 1970.
    fn now(&self) -> f64 {
        let answer = self.get("query?query=time()");
        answer["result"][0].as_f64().expect("time is a number")
    }

    /// The data of any part of the API, below `/api/v1/`; it fails unless that answers with success.
    pub fn get(&self, path: &str) -> Value {
        let body = http::body(&format!("http://{}/api/v1/{path}", self.address));
        let mut answer: Value = serde_json::from_str(&body).unwrap_or_else(|error| panic!("{path}: {error}: {body}"));
        assert_eq!(answer["status"], "success", "{path}: {body}");
        answer["data"].take()
    }
}

fn series(result: &Value, expression: &str) -> Vec<Value> {
    let series = result.as_array();
    series
        .unwrap_or_else(|| panic!("{expression} answers no series"))
        .clone()
}

/// Whether a program can be run; says which package has it, as [`left_out`] does, if not.
pub fn is_installed(program: &str, package: &str) -> bool {
    match Command::new(program).arg("--version").output() {
        Ok(_) => true,
        Err(error) => {
            left_out(&format!("{program}: {error}: apt-get install {package}"));
            false
        }
    }
}

/// A loopback address that nobody listens on.
pub fn free_address() -> String {
    let listener = TcpListener::bind("127.0.0.1:0").expect("there is a free port");
    listener.local_addr().expect("it is bound").to_string()
}

/// As a part of a URL.
pub fn escaped(text: &str) -> String {
    text.bytes().fold(String::new(), |mut escaped, byte| {
        let _ = write!(escaped, "%{byte:02x}");
        escaped
    })
}
