//! What `edge-host` answers, what it counts, and how it ends.

#![expect(clippy::unwrap_used, reason = "the helpers are part of the tests")]

use std::collections::BTreeMap;
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::process::{Child, Command, Stdio};

use serde::Deserialize;

type Numbers = BTreeMap<String, u64>;

#[derive(Debug, Deserialize)]
struct Counts {
    invocations: Numbers,
    host_calls: Numbers,
    syscalls: Numbers,
    traps: Numbers,
    suspends: u64,
    resumes: u64,
}

fn numbers<const N: usize>(entries: [(&str, u64); N]) -> Numbers {
    entries.map(|(name, count)| (name.to_owned(), count)).into()
}

/// A running service; killed when dropped.
struct Service {
    child: Child,
    address: SocketAddr,
}

struct Answer {
    status: u16,
    body: Vec<u8>,
}

impl Answer {
    fn text(&self) -> &str {
        std::str::from_utf8(&self.body).unwrap()
    }
}

impl Service {
    fn start(arguments: &[&str]) -> Self {
        let mut command = Command::new(env!("CARGO_BIN_EXE_edge-host"));
        let mut child = command.args(arguments).stdout(Stdio::piped()).spawn().unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap())
            .read_line(&mut line)
            .unwrap();
        let address = line.trim_end().strip_prefix("listening on ").unwrap().parse().unwrap();
        Self { child, address }
    }

    fn get(&self, target: &str) -> Answer {
        self.get_with(target, "")
    }

    /// `headers` are whole lines.
    fn get_with(&self, target: &str, headers: &str) -> Answer {
        let mut connection = TcpStream::connect(self.address).unwrap();
        write!(
            connection,
            "GET {target} HTTP/1.1\r\nHost: edge\r\nConnection: close\r\n{headers}\r\n"
        )
        .unwrap();
        let mut answer = Vec::new();
        connection.read_to_end(&mut answer).unwrap();
        let body_start = answer.windows(4).position(|window| window == b"\r\n\r\n").unwrap() + 4;
        let status = std::str::from_utf8(&answer[9..12]).unwrap().parse().unwrap();
        Answer {
            status,
            body: answer.split_off(body_start),
        }
    }

    fn counts(&self) -> Counts {
        serde_json::from_slice(&self.get("/counts").body).unwrap()
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        let _already_gone = self.child.kill();
        let _status = self.child.wait();
    }
}

/// The HTTP library may look at a request's future, and so resume its fiber, before the upstream has answered.
fn assert_each_fetch_suspended(counts: &Counts, fetches: u64) {
    assert!(counts.suspends >= fetches, "{counts:?}");
    assert_eq!(counts.suspends, counts.resumes);
}

#[test]
fn policy_passes_requests_that_no_rule_denies_after_asking_the_upstream() {
    let service = Service::start(&[]);
    let answer = service.get_with("/policy/cart?id=3", "User-Agent: browser/2\r\n");
    assert_eq!((answer.status, answer.text()), (200, "request passed"));
    let counts = service.counts();
    assert_eq!(counts.invocations, numbers([("policy/handle_request", 1)]));
    let host_calls = [
        ("host.get_header", 5),
        ("host.fetch", 1),
        ("host.log", 1),
        ("host.respond", 1),
        ("wasi_snapshot_preview1.path_open", 1),
        ("wasi_snapshot_preview1.fd_read", 2),
        ("wasi_snapshot_preview1.fd_close", 1),
    ];
    assert_eq!(counts.host_calls, numbers(host_calls));
    assert_each_fetch_suspended(&counts, 1);
}

#[test]
fn policy_denies_what_a_rule_in_its_file_names() {
    let service = Service::start(&["--eager"]);
    for (headers, lookups) in [("User-Agent: badbot/1\r\n", 1), ("Cookie: a=b; session=revoked\r\n", 4)] {
        let before = service.counts().host_calls.get("host.get_header").copied().unwrap_or(0);
        let answer = service.get_with("/policy", headers);
        assert_eq!((answer.status, answer.text()), (403, "request denied"), "{headers}");
        assert_eq!(
            service.counts().host_calls["host.get_header"] - before,
            lookups,
            "{headers}"
        );
    }
    assert!(!service.counts().host_calls.contains_key("host.fetch"));
}

#[test]
fn transform_returns_the_transformed_file() {
    let service = Service::start(&[]);
    let text = include_str!("../../guests/data/article.txt").repeat(4);
    assert_eq!(service.get("/transform?op=upper").text(), text.to_uppercase());
    let rot13 = |letter: char| match letter {
        'a'..='m' | 'A'..='M' => char::from(letter as u8 + 13),
        'n'..='z' | 'N'..='Z' => char::from(letter as u8 - 13),
        other => other,
    };
    assert_eq!(
        service.get("/transform?op=rot13").text(),
        text.chars().map(rot13).collect::<String>()
    );
    let words = text
        .split(|letter: char| !letter.is_ascii_alphabetic())
        .filter(|word| !word.is_empty())
        .count();
    assert_eq!(service.get("/transform?op=words").text(), words.to_string());
    assert_eq!(service.get("/transform?op=gray").body.len(), 96 * 64);
}

#[test]
fn transform_reads_its_file_in_pieces_of_512_bytes() {
    let service = Service::start(&[]);
    service.get("/transform?op=upper");
    let length = include_str!("../../guests/data/article.txt").len() * 4;
    let pieces = length.div_ceil(512) as u64 + 1;
    let host_calls = service.counts().host_calls;
    assert_eq!(host_calls["wasi_snapshot_preview1.fd_read"], pieces);
    assert_eq!(host_calls["wasi_snapshot_preview1.clock_time_get"], pieces);
}

#[test]
fn a_fault_is_an_answer_that_names_it_and_the_next_request_is_served() {
    let service = Service::start(&["--pooling"]);
    let kinds = [
        "memory_out_of_bounds",
        "unreachable",
        "integer_division_by_zero",
        "stack_overflow",
        "host_error",
    ];
    for kind in kinds {
        let answer = service.get(&format!("/faulty?kind={kind}"));
        assert_eq!(answer.status, 500, "{kind}");
        assert!(answer.text().starts_with(kind), "{}", answer.text());
    }
    assert_eq!(service.get("/faulty?kind=none").status, 200);
    let counts = service.counts();
    assert_eq!(counts.traps, kinds.iter().map(|kind| ((*kind).to_owned(), 1)).collect());
    assert_eq!(counts.invocations, numbers([("faulty/handle_request", 6)]));
}

#[test]
fn a_memory_fault_is_found_in_parse_rule() {
    let service = Service::start(&[]);
    let answer = service.get("/faulty?kind=memory_out_of_bounds");
    assert!(answer.text().contains("faulty!parse_rule"), "{}", answer.text());
    assert!(answer.text().contains("faulty!handle_request"), "{}", answer.text());
}

#[test]
fn requests_at_the_same_time_are_all_counted() {
    let directory = tempfile::tempdir().unwrap();
    let log = directory.path().join("guests.log");
    let service = Service::start(&["--threads", "4", "--log", log.to_str().unwrap()]);
    std::thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| {
                for _ in 0..5 {
                    assert_eq!(service.get("/policy").status, 200);
                }
            });
        }
    });
    let counts = service.counts();
    assert_eq!(counts.invocations["policy/handle_request"], 40);
    assert_eq!(counts.host_calls["host.log"], 40);
    assert_eq!(counts.syscalls, numbers([("write", 40)]));
    assert_each_fetch_suspended(&counts, 40);
    assert_eq!(
        std::fs::read_to_string(log).unwrap(),
        "/policy: request passed\n".repeat(40)
    );
}

#[test]
fn bad_requests_run_no_guest() {
    let service = Service::start(&[]);
    for target in ["/transform", "/transform?op=explode", "/faulty?kind=nonsense"] {
        assert_eq!(service.get(target).status, 400, "{target}");
    }
    assert_eq!(service.get("/nowhere").status, 404);
    assert_eq!(service.counts().invocations, Numbers::new());
}

#[test]
fn sigterm_ends_it_with_success() {
    let mut service = Service::start(&[]);
    let pid = rustix::process::Pid::from_child(&service.child);
    rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
    assert!(service.child.wait().unwrap().success());
}

#[test]
fn an_address_in_use_is_named_in_the_error() {
    let service = Service::start(&[]);
    let address = service.address.to_string();
    let output = Command::new(env!("CARGO_BIN_EXE_edge-host"))
        .args(["--listen", &address])
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&output.stderr).contains(&address), "{output:?}");
}
