//! Under which span of the application a trace belongs: that of the request which its activation serves, or none.
//!
//! Each request has a target of its own length, which the host writes to its log from inside of the guest: the result of that `write` says
//! which request an activation really served. The client knows which span it had named in that request.

use std::collections::BTreeMap;
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::process::Command;

use tempfile::{TempDir, tempdir};
use wasmscope::span::{Loss, Parent, ParentSource, SpanKind};
use wasmscope_tests::agent::Agent;
use wasmscope_tests::captured::{Captured, Trace};
use wasmscope_tests::environment::{self, Kernel};
use wasmscope_tests::running::{DEADLINE, Running};

/// Connections at once.
const CONNECTIONS: usize = 12;
/// Requests on each.
const REQUESTS: usize = 15;
/// What the host writes beside the part of the target that differs: the rest of it, and `: request passed`.
const LINE_BYTES: usize = "/policy/: request passed\n".len();

/// What a request says of its parent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Says {
    Parent,
    Nothing,
    Malformed,
    Two,
}

/// What the request with this number says.
fn says(number: usize) -> Says {
    match number % 10 {
        3 => Says::Nothing,
        5 => Says::Malformed,
        7 => Says::Two,
        _ => Says::Parent,
    }
}

fn traceparent(number: usize) -> String {
    format!("00-{:032x}-{number:016x}-0{}", 0xabc0_0000 + number, number % 2)
}

/// What the trace of an activation that serves this request has to say.
fn expected(number: usize) -> Option<Parent> {
    let parent = Parent::parse(traceparent(number).as_bytes(), ParentSource::Request).unwrap();
    (says(number) == Says::Parent).then(|| Parent {
        method: Some("GET".to_owned()),
        ..parent.with_tracestate(format!("client={number}").as_bytes())
    })
}

fn request(number: usize) -> String {
    let field = format!(
        "TraceParent: {}\r\ntracestate: client={number}\r\n",
        traceparent(number)
    );
    let fields = match says(number) {
        Says::Parent => field,
        Says::Nothing => String::new(),
        Says::Malformed => field.replace("00-0000", "00-000g"),
        Says::Two => field.repeat(2),
    };
    format!(
        "GET /policy/{} HTTP/1.1\r\nHost: edge\r\n{fields}\r\n",
        "x".repeat(number)
    )
}

/// A running `edge-host`.
struct Edge {
    host: Running,
    address: SocketAddr,
    log: TempDir,
}

impl Edge {
    fn start(arguments: &[&str]) -> Self {
        let log = tempdir().unwrap();
        let mut command = Command::new(environment::test_host("edge-host"));
        command.args(arguments).arg("--log").arg(log.path().join("log"));
        let host = Running::start(command);
        let line = host.stdout_line(|line| line.starts_with("listening on "));
        let address = line.trim_start_matches("listening on ").parse().unwrap();
        Self { host, address, log }
    }

    fn pid(&self) -> String {
        self.host.pid().to_string()
    }

    /// Which requests the host says to have served, and how often it called a guest for each.
    fn served(&self) -> BTreeMap<usize, usize> {
        let mut served = BTreeMap::new();
        for line in std::fs::read_to_string(self.log.path().join("log")).unwrap().lines() {
            *served.entry(line.len() + 1 - LINE_BYTES).or_default() += 1;
        }
        served
    }
}

/// One that is kept open.
struct Connection {
    to: TcpStream,
    from: BufReader<TcpStream>,
}

impl Connection {
    fn open(address: SocketAddr) -> Self {
        let to = TcpStream::connect(address).unwrap();
        to.set_nodelay(true).unwrap();
        to.set_read_timeout(Some(*DEADLINE)).unwrap();
        Self {
            from: BufReader::new(to.try_clone().unwrap()),
            to,
        }
    }

    fn send(&mut self, text: &str) {
        self.to.write_all(text.as_bytes()).unwrap();
    }

    fn answer(&mut self) {
        let mut line = String::new();
        let mut body_bytes = 0;
        while line != "\r\n" {
            line.clear();
            assert!(self.from.read_line(&mut line).unwrap() > 0, "the connection was closed");
            if let Some(length) = line.to_ascii_lowercase().strip_prefix("content-length:") {
                body_bytes = length.trim().parse().unwrap();
            }
        }
        std::io::copy(&mut (&mut self.from).take(body_bytes), &mut std::io::sink()).unwrap();
    }

    /// Waits until the host has taken all that was sent out of its socket.
    fn wait_until_read(&self) {
        let port = |address: SocketAddr| format!(":{:04X}", address.port());
        let ends = [port(self.to.peer_addr().unwrap()), port(self.to.local_addr().unwrap())];
        let begun = std::time::Instant::now();
        loop {
            let sockets = std::fs::read_to_string("/proc/net/tcp").unwrap();
            let is_read = sockets.lines().any(|line| {
                let words: Vec<_> = line.split_whitespace().collect();
                words.len() > 4
                    && words[1].ends_with(&ends[0])
                    && words[2].ends_with(&ends[1])
                    && words[4].ends_with(":00000000")
            });
            if is_read {
                return;
            }
            assert!(begun.elapsed() < *DEADLINE, "it does not read");
            std::thread::yield_now();
        }
    }
}

/// All requests, on all connections at once.
fn all_requests(address: SocketAddr) {
    std::thread::scope(|scope| {
        for connection in 0..CONNECTIONS {
            scope.spawn(move || {
                let mut client = Connection::open(address);
                for request_number in 0..REQUESTS {
                    client.send(&request(1 + connection + request_number * CONNECTIONS));
                    client.answer();
                }
            });
        }
    });
}

/// The request that an activation has really served.
fn really_served(trace: &Trace) -> usize {
    let mut lines = trace.root.walk().filter_map(|span| match &span.kind {
        SpanKind::Syscall { name, result, .. } if name == "write" => {
            usize::try_from(*result).ok()?.checked_sub(LINE_BYTES)
        }
        _ => None,
    });
    let number = lines.next().unwrap();
    assert_eq!(lines.next(), None);
    number
}

/// Traces by the request that they really served.
fn by_request(seen: &Captured) -> BTreeMap<usize, Vec<Option<Parent>>> {
    let mut traces: BTreeMap<_, Vec<_>> = BTreeMap::new();
    for trace in &seen.traces {
        traces
            .entry(really_served(trace))
            .or_default()
            .push(trace.parent.clone());
    }
    traces
}

fn counts<T>(traces: &BTreeMap<usize, Vec<T>>) -> BTreeMap<usize, usize> {
    traces.iter().map(|(number, traces)| (*number, traces.len())).collect()
}

fn loss(layer: &str, reason: &str, count: usize) -> Loss {
    Loss {
        layer: layer.to_owned(),
        reason: reason.to_owned(),
        count: count as u64,
    }
}

fn invalid_count() -> usize {
    let all = 1..=CONNECTIONS * REQUESTS;
    all.filter(|number| matches!(says(*number), Says::Malformed | Says::Two))
        .count()
}

#[test]
fn each_activation_belongs_under_the_span_that_the_request_named_which_it_serves() {
    let Some(_kernel) = Kernel::acquire() else { return };
    let asynchronous = ["--eager", "--threads", "3", "--upstream-ms", "2"];
    for (arguments, calls) in [
        (&[&asynchronous[..], &["--before-ms", "3"]].concat()[..], 1),
        (&["--blocking"], 2),
    ] {
        let edge = Edge::start(arguments);
        let agent = Agent::json_of(&edge.pid());
        all_requests(edge.address);
        agent.interrupt();
        let seen = agent.captured();
        let served = edge.served();
        assert_eq!(served.len(), CONNECTIONS * REQUESTS);
        assert!(served.values().all(|count| *count == calls));
        let traces = by_request(&seen);
        assert_eq!(counts(&traces), served, "{arguments:?} {:?}", seen.capture.losses);
        for (number, parents) in &traces {
            for parent in parents {
                assert_eq!(*parent, expected(*number), "{arguments:?}: request {number}");
            }
        }
        assert_eq!(
            seen.capture.losses,
            [loss("request", "traceparent_invalid", invalid_count())],
            "{arguments:?}"
        );
    }
}

#[test]
fn activations_that_nothing_links_to_a_request_have_no_parent_and_are_counted() {
    let Some(_kernel) = Kernel::acquire() else { return };
    let edge = Edge::start(&["--eager", "--threads", "3", "--hand-over", "--upstream-ms", "2"]);
    let agent = Agent::json_of(&edge.pid());
    // So that it is known from here on that there are parents to be had.
    let mut client = Connection::open(edge.address);
    client.send(&request(1));
    client.answer();
    all_requests(edge.address);
    agent.interrupt();
    let seen = agent.captured();
    let traces = by_request(&seen);
    assert_eq!(counts(&traces), edge.served());
    assert!(traces.values().flatten().all(Option::is_none));
    assert_eq!(
        seen.capture.losses,
        [
            loss("correlate", "parent_unknown", CONNECTIONS * REQUESTS + 1),
            loss("request", "traceparent_invalid", invalid_count())
        ]
    );
}

#[test]
fn of_requests_that_are_cut_or_follow_each_other_unasked_nothing_is_guessed() {
    let Some(_kernel) = Kernel::acquire() else { return };
    let edge = Edge::start(&["--eager", "--threads", "2", "--upstream-ms", "2"]);
    let agent = Agent::json_of(&edge.pid());
    let mut client = Connection::open(edge.address);
    client.send(&request(1));
    client.answer();
    // In two pieces, of which the second is sent when the first has been read; then another, whole.
    let pieces = request(2);
    let (start, rest) = pieces.split_at(60);
    client.send(start);
    client.wait_until_read();
    client.send(rest);
    client.answer();
    client.send(&request(4));
    client.answer();
    // Two at once: of the second no read tells.
    let mut hasty = Connection::open(edge.address);
    hasty.send(&(request(6) + &request(8)));
    hasty.answer();
    hasty.answer();
    hasty.send(&request(9));
    hasty.answer();
    // No HTTP, whatever it begins like.
    for noise in [
        &b"GET \xff\xfe\r\n\r\ntraceparent: 00-"[..],
        &[b'G'; 5000],
        b"POST \0\0\0\0\0\0\0\0\0\0\0\0\0\r\n\r\n",
    ] {
        let mut other = Connection::open(edge.address);
        other.to.write_all(noise).unwrap();
        other.to.shutdown(std::net::Shutdown::Write).unwrap();
        // It answers with an error or just closes the connection.
        let _ = other.from.read_to_end(&mut Vec::new());
    }
    client.send(&request(10));
    client.answer();
    agent.interrupt();
    let seen = agent.captured();
    let traces = by_request(&seen);
    assert_eq!(counts(&traces), edge.served());
    let none = [2, 6, 8, 9];
    for (number, parents) in traces {
        let right = expected(number).filter(|_| !none.contains(&number));
        assert_eq!(parents, [right], "request {number}");
    }
    assert_eq!(
        seen.capture.losses,
        [
            loss("correlate", "parent_unknown", 3),
            loss("request", "request_head_cut", 1),
            loss("request", "request_malformed", 2),
            loss("request", "request_pipelined", 1),
        ]
    );
}

#[test]
fn a_command_belongs_under_the_span_that_its_environment_names() {
    let Some(_kernel) = Kernel::acquire() else { return };
    let directory = tempdir().unwrap();
    let log = directory.path().join("log");
    let json = format!(r#"{{"traceparent":"{}","tracestate":"a=1"}}"#, traceparent(4));
    for (variables, number) in [
        (&[("TRACECONTEXT", json.as_str())][..], 4),
        (&[("TRACEPARENT", &traceparent(6)), ("TRACESTATE", "a=1")], 6),
    ] {
        let mut command = Command::new(environment::test_host("edge-host"));
        command.arg("--command").arg("--log").arg(&log);
        command.envs(variables.iter().copied());
        let mut host = Running::start(command);
        host.stdout_line(|line| line == "ready");
        let agent = Agent::json_of(&host.pid().to_string());
        host.send_line();
        host.finish().succeeded();
        let seen = agent.captured();
        let parents: Vec<_> = seen.traces.iter().map(|trace| trace.parent.clone()).collect();
        let parent = Parent::parse(traceparent(number).as_bytes(), ParentSource::Environment).unwrap();
        assert_eq!(parents, [Some(parent.with_tracestate(b"a=1"))]);
        seen.assert_nothing_lost();
    }
}
