//! The flight recorder as people use it: over HTTP and with `wasmscope diagram`, on traces of a real recording.

#![expect(clippy::unwrap_used, reason = "a helper of tests may fail as a test does")]

use std::fs::File;
use std::io::BufReader;
use std::path::PathBuf;
use std::process::Command;
use std::sync::Arc;

use serde_json::Value;
use tempfile::tempdir;
use tokio::net::TcpListener;
use tokio::runtime::Runtime;
use wasmscope::clock::ClockAnchor;
use wasmscope::correlate::{Correlator, SETTLE_NS};
use wasmscope::recorder::{Format, Page, Recorder, RecorderConfig, routes};
use wasmscope::span::{Outcome, Place, Process, Span, SpanKind, Trace, TraceId};
use wasmscope_tests::agent::{run, wasmscope};
use wasmscope_tests::environment::{assert_mermaid_parses, tests_directory};
use wasmscope_tests::http;
use wasmscope_tests::running::Finished;

fn fixture() -> PathBuf {
    tests_directory().join("fixtures/demo.wasmscope")
}

/// All traces of the recording, as the agent's own correlator makes them.
fn recorded() -> (Vec<Trace>, ClockAnchor) {
    let mut correlator = Correlator::new();
    let file = BufReader::new(File::open(fixture()).unwrap());
    let (header, capture) = wasmscope::recording::read(file, |event| {
        let at_ns = event.at_ns;
        correlator.push(event);
        correlator.settle(at_ns.saturating_sub(SETTLE_NS));
    })
    .unwrap();
    correlator.finish(capture.end_ns);
    (correlator.take_finished(), header.clock)
}

/// The API of a recorder on a real socket.
struct Served {
    url: String,
    recorder: Arc<Recorder>,
    _runtime: Runtime,
}

impl Served {
    fn offering(traces: &[Trace], clock: ClockAnchor) -> Self {
        let recorder = Arc::new(Recorder::new(
            RecorderConfig::default(),
            clock,
            "6.18.0-test".to_owned(),
        ));
        for trace in traces {
            recorder.offer(trace);
        }
        let runtime = Runtime::new().unwrap();
        let listener = runtime.block_on(TcpListener::bind("127.0.0.1:0")).unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let router = routes(recorder.clone());
        runtime.spawn(async move { axum::serve(listener, router).await });
        Self {
            url,
            recorder,
            _runtime: runtime,
        }
    }

    /// Status, head and body.
    fn get(&self, path: &str) -> (u16, String, String) {
        let response = http::get(&format!("{}{path}", self.url));
        let (head, body) = response.split_once("\r\n\r\n").unwrap();
        let status = head.split(' ').nth(1).unwrap().parse().unwrap();
        (status, head.to_lowercase(), body.to_owned())
    }

    fn page(&self, parameters: &str) -> Page {
        let (status, head, body) = self.get(&format!("/api/v1/traces?{parameters}"));
        assert_eq!(status, 200, "{body}");
        assert!(head.contains("content-type: application/json"), "{head}");
        serde_json::from_str(&body).unwrap()
    }

    fn error(&self, path: &str) -> (u16, String) {
        let (status, _, body) = self.get(path);
        let error: Value = serde_json::from_str(&body).unwrap_or_else(|_| panic!("{path}: {body}"));
        (status, error["error"].as_str().unwrap().to_owned())
    }

    fn diagram(&self, arguments: &[&str]) -> Finished {
        let mut command = diagram();
        command.env("WASMSCOPE_AGENT", &self.url).args(arguments);
        run(command)
    }
}

fn diagram() -> Command {
    let mut command = wasmscope();
    command.env_remove("WASMSCOPE_AGENT").arg("diagram");
    command
}

fn on_recording(arguments: &[&str]) -> Finished {
    let mut command = diagram();
    command.arg("--recording").arg(fixture()).args(arguments);
    run(command)
}

fn text(finished: &Finished) -> String {
    finished.stdout.iter().flat_map(|line| [line, "\n"]).collect()
}

fn slowest(traces: &[Trace]) -> &Trace {
    traces.iter().max_by_key(|trace| trace.root.duration_ns()).unwrap()
}

fn parses_as_mermaid(text: &str) {
    let directory = tempdir().unwrap();
    let file = directory.path().join("drawn.mmd");
    std::fs::write(&file, text).unwrap();
    assert_mermaid_parses(&[file]);
}

fn export(trace: &Trace) -> &str {
    match &trace.root.kind {
        SpanKind::Invoke {
            function: Some(function),
        } => &function.name,
        _ => "?",
    }
}

#[test]
fn the_slowest_of_a_real_recording_is_served_in_every_format() {
    let (traces, clock) = recorded();
    let served = Served::offering(&traces, clock);
    let slowest = slowest(&traces);
    let page = served.page("limit=1000");
    assert_eq!(page.kept_count as u64, served.recorder.stats().traces);
    assert_eq!(page.traces.len(), page.kept_count);
    assert!(page.kept_count < traces.len(), "not all of {} are kept", traces.len());
    let first = &page.traces[0];
    assert_eq!(
        (first.trace_id, first.duration_ns),
        (slowest.id, slowest.root.duration_ns())
    );
    assert_eq!(first.span_count, slowest.root.walk().count() as u64);

    for format in Format::all() {
        let (status, head, body) = served.get(&format!("/api/v1/traces/{}.{}", slowest.id, format.name()));
        assert_eq!(status, 200, "{body}");
        assert!(
            head.contains(&format!("content-type: {}", format.content_type())),
            "{head}"
        );
        let file = format!("inline; filename=\"{}.{}\"", slowest.id, format.extension());
        assert!(head.contains(&file), "{head}");
        let same = served.get(&format!(
            "/api/v1/traces/{}?format={}",
            &slowest.id.to_string()[..12],
            format.name()
        ));
        // OTLP's attributes are in no order.
        assert!(
            same.2 == body || (format == Format::Otlp && same.2.len() == body.len()),
            "by the first digits of its id"
        );
        match format.name() {
            "mermaid" => parses_as_mermaid(&body),
            "text" => assert!(body.contains("kept by the recorder because: slowest"), "{body}"),
            "json" => {
                let line: Value = serde_json::from_str(&body).unwrap();
                let root: Span = serde_json::from_value(line["root"].clone()).unwrap();
                let process: Process = serde_json::from_value(line["process"].clone()).unwrap();
                assert_eq!(line["trace_id"], slowest.id.to_string());
                assert_eq!((&root, &process), (&slowest.root, &*slowest.process), "in full detail");
            }
            "otlp" => {
                let request: Value = serde_json::from_str(&body).unwrap();
                let spans = &request["resourceSpans"][0]["scopeSpans"][0]["spans"];
                assert_eq!(spans[0]["traceId"], slowest.id.to_string());
            }
            other => panic!("{other} is not tested"),
        }
    }
}

#[test]
fn every_kept_trace_is_drawn_as_mermaid_takes_it() {
    let (traces, clock) = recorded();
    let served = Served::offering(&traces, clock);
    let directory = tempdir().unwrap();
    let files: Vec<PathBuf> = served
        .page("limit=1000")
        .traces
        .iter()
        .map(|summary| {
            let (status, _, body) = served.get(&format!("/api/v1/traces/{}.mermaid", summary.trace_id));
            assert_eq!(status, 200);
            let file = directory.path().join(format!("{}.mmd", summary.trace_id));
            std::fs::write(&file, body).unwrap();
            file
        })
        .collect();
    assert_mermaid_parses(&files);
}

#[test]
fn shortcuts_answer_with_the_first_that_matches() {
    let (traces, clock) = recorded();
    let served = Served::offering(&traces, clock);
    let (_, _, body) = served.get("/api/v1/traces/slowest");
    let line: Value = serde_json::from_str(&body).unwrap();
    assert_eq!(line["trace_id"], slowest(&traces).id.to_string());
    for name in traces.iter().map(export).collect::<std::collections::BTreeSet<_>>() {
        let of_export: Vec<Trace> = traces.iter().filter(|trace| export(trace) == name).cloned().collect();
        let (_, _, body) = served.get(&format!("/api/v1/traces/slowest?export={name}&format=json"));
        let line: Value = serde_json::from_str(&body).unwrap();
        assert_eq!(line["trace_id"], slowest(&of_export).id.to_string(), "{name}");
    }
    let failed = traces.iter().filter(|trace| trace.root.outcome.is_failure()).count();
    let (status, ..) = served.get("/api/v1/traces/failed?format=text");
    assert_eq!(status == 200, failed > 0);
    assert_eq!(served.get("/api/v1/traces/random?format=mermaid").0, 200);
    assert_eq!(served.error("/api/v1/traces/slowest?export=none").0, 404);
}

#[test]
fn what_is_asked_wrongly_is_told_and_nothing_can_be_changed() {
    let (traces, clock) = recorded();
    let served = Served::offering(&traces[..3], clock);
    let id = traces[0].id;
    for (path, status, words) in [
        ("/api/v1/traces?limit=0".to_owned(), 400, "between 1 and 1000"),
        ("/api/v1/traces?limit=1001".to_owned(), 400, "between 1 and 1000"),
        ("/api/v1/traces?limit=x".to_owned(), 400, "invalid digit"),
        ("/api/v1/traces?colour=red".to_owned(), 400, "unknown field `colour`"),
        (
            "/api/v1/traces?since=yesterday".to_owned(),
            400,
            "since: \"yesterday\" is no time",
        ),
        ("/api/v1/traces?cursor=1".to_owned(), 400, "next_cursor"),
        ("/api/v1/traces/abc".to_owned(), 400, "32 hex digits"),
        ("/api/v1/traces/..%2F..%2Fetc%2Fpasswd".to_owned(), 400, "no format"),
        (format!("/api/v1/traces/{id}.svg"), 400, "mermaid, text, json, otlp"),
        (
            format!("/api/v1/traces/{id}?format=text&colour=red"),
            400,
            "unknown field",
        ),
        (
            format!("/api/v1/traces/{}", "0123456789abcdef".repeat(2)),
            404,
            "no trace with that id",
        ),
        (format!("/api/v1/traces?pod={}", "x".repeat(5_000)), 400, "longer than"),
    ] {
        let (found, error) = served.error(&path);
        assert_eq!(found, status, "{path}: {error}");
        assert!(error.contains(words), "{path}: {error}");
    }
    let before = served.recorder.stats();
    for method in ["POST", "PUT", "DELETE"] {
        use std::io::{Read as _, Write as _};
        let address = served.url.trim_start_matches("http://");
        let mut connection = std::net::TcpStream::connect(address).unwrap();
        write!(
            connection,
            "{method} /api/v1/traces/{id} HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
        )
        .unwrap();
        let mut response = String::new();
        connection.read_to_string(&mut response).unwrap();
        assert!(response.starts_with("HTTP/1.1 405"), "{response}");
    }
    assert_eq!(served.recorder.stats(), before);
}

/// A trace of a pod whose names are attacks on whatever shows them.
fn hostile(trace: &Trace) -> Trace {
    let mut trace = trace.clone();
    let bad = "<script>alert(1)</script>\"'&\n\u{1b}[31m\u{202e}";
    let mut process = (*trace.process).clone();
    bad.clone_into(&mut process.command);
    process.place = Place {
        pod_name: Some(bad.to_owned()),
        namespace: Some(bad.to_owned()),
        ..Place::default()
    };
    trace.process = Arc::new(process);
    trace.id = TraceId([0xee; 16]);
    trace.root.outcome = Outcome::Trap { code: bad.to_owned() };
    trace
}

#[test]
fn names_that_a_guest_chose_are_text_wherever_they_are_shown() {
    let (traces, clock) = recorded();
    let served = Served::offering(&[hostile(&traces[0]), traces[1].clone()], clock);
    let (status, head, body) = served.get("/ui?pod=&export=%22%3E%3Cscript%3E");
    assert_eq!(status, 200, "{body}");
    assert!(!body.contains("<script"), "{body}");
    let (_, _, body) = served.get("/ui");
    assert!(head.contains("content-security-policy: default-src 'none'"), "{head}");
    assert!(
        body.contains("&lt;script&gt;alert(1)&lt;/script&gt;&quot;&#39;&amp;"),
        "{body}"
    );
    assert!(!body.contains("<script"), "{body}");
    assert!(!body.contains(['\u{1b}', '\u{202e}']), "{body}");
    assert!(
        body.contains(&format!("href=\"/api/v1/traces/{}.text\"", traces[1].id)),
        "{body}"
    );
    let (_, _, drawn) = served.get(&format!("/api/v1/traces/{}.mermaid", TraceId([0xee; 16])));
    parses_as_mermaid(&drawn);

    for arguments in [
        &["--list"][..],
        &["--failed", "--format", "text"],
        &["--export", "none"],
    ] {
        let finished = served.diagram(arguments);
        let shown = text(&finished) + &finished.stderr.join("\n");
        assert!(!shown.contains(['\u{1b}', '\u{202e}']), "{arguments:?}: {shown}");
    }
}

#[test]
fn diagram_draws_what_an_agent_keeps() {
    let (traces, clock) = recorded();
    let served = Served::offering(&traces, clock);
    let slowest = slowest(&traces);
    let id = slowest.id.to_string();

    let drawn = text(&served.diagram(&[]).succeeded());
    assert_eq!(drawn, served.get(&format!("/api/v1/traces/{id}.mermaid")).2);
    parses_as_mermaid(&drawn);
    assert_eq!(text(&served.diagram(&["--trace-id", &id[..10]]).succeeded()), drawn);
    assert_eq!(
        text(
            &served
                .diagram(&["--slowest", "--export", export(slowest), "--min-duration", "1us"])
                .succeeded()
        ),
        drawn
    );
    let narrow = text(&served.diagram(&["--format", "text", "--width", "80"]).succeeded());
    assert_eq!(narrow, served.get(&format!("/api/v1/traces/{id}.text?width=80")).2);
    parses_as_mermaid(&text(&served.diagram(&["--random"]).succeeded()));

    let directory = tempdir().unwrap();
    let file = directory.path().join("trace.json");
    served
        .diagram(&["--format", "json", "-o", file.to_str().unwrap()])
        .succeeded();
    let line: Value = serde_json::from_str(&std::fs::read_to_string(&file).unwrap()).unwrap();
    assert_eq!(line["trace_id"], id);

    let listed = served.diagram(&["--list", "--limit", "3"]).succeeded().stdout;
    assert!(listed[0].starts_with("TRACE ID"), "{listed:?}");
    assert!(listed[1].starts_with(&id), "{listed:?}");
    assert!(listed[4].ends_with("more match; --limit shows more"), "{listed:?}");
    let page: Page = serde_json::from_str(&text(&served.diagram(&["--list", "--format", "json"]).succeeded())).unwrap();
    assert_eq!(page.traces, served.page("limit=20").traces);
}

#[test]
fn diagram_finds_a_pod_by_its_name_and_namespace() {
    let (traces, clock) = recorded();
    let in_pod = |trace: &Trace, namespace: &str| {
        let mut trace = trace.clone();
        let mut process = (*trace.process).clone();
        process.place.pod_uid = Some(format!("uid-{namespace}"));
        process.place.pod_name = Some("cart-7d4b9".to_owned());
        process.place.namespace = Some(namespace.to_owned());
        trace.process = Arc::new(process);
        trace
    };
    let served = Served::offering(
        &[
            in_pod(&traces[0], "shop"),
            in_pod(&traces[1], "test"),
            traces[2].clone(),
        ],
        clock,
    );
    for (pod, expected) in [("shop/cart-7d4b9", &traces[0]), ("test/cart-7d4b9", &traces[1])] {
        let drawn = text(&served.diagram(&["--pod", pod, "--format", "json"]).succeeded());
        assert_eq!(
            serde_json::from_str::<Value>(&drawn).unwrap()["trace_id"],
            expected.id.to_string()
        );
    }
    let page = served
        .diagram(&["--pod", "cart-7d4b9", "--list", "--format", "json"])
        .succeeded();
    assert_eq!(serde_json::from_str::<Page>(&text(&page)).unwrap().traces.len(), 2);
    let error = served.diagram(&["--pod", "other"]).stderr.join("\n");
    assert!(
        error.contains("none of the 3 traces") && error.contains("shop/cart-7d4b9"),
        "{error}"
    );
}

#[test]
fn diagram_says_what_to_do_where_there_is_nothing_to_draw() {
    let (traces, clock) = recorded();
    let empty = Served::offering(&[], clock);
    let error = empty.diagram(&[]).stderr.join("\n");
    assert!(error.contains("the agent keeps no trace"), "{error}");

    let mut alike = traces[0].clone();
    alike.id.0[15] ^= 1;
    let served = Served::offering(&[traces[0].clone(), alike], clock);
    let digits = &traces[0].id.to_string()[..20];
    let error = served.diagram(&["--trace-id", digits]).stderr.join("\n");
    assert!(error.contains("2 traces have that id or begin so"), "{error}");
    let error = served.diagram(&["--trace-id", "abc"]).stderr.join("\n");
    assert!(error.contains("32 hex digits"), "{error}");

    // A port that was free a moment ago, and on which nobody listens.
    let free = std::net::TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap();
    let mut command = diagram();
    command.args(["--agent", &format!("http://{free}")]);
    let finished = run(command);
    let error = finished.stderr.join("\n");
    assert!(
        error.contains("no agent can be reached") && error.contains("--recording FILE"),
        "{error}"
    );
}

#[test]
fn diagram_draws_from_a_recording_without_an_agent() {
    let (traces, _) = recorded();
    let slowest = slowest(&traces);
    let drawn = text(&on_recording(&[]).succeeded());
    parses_as_mermaid(&drawn);
    assert!(drawn.contains(&slowest.id.to_string()), "{drawn}");
    parses_as_mermaid(&text(&on_recording(&["--random"]).succeeded()));
    let line = text(&on_recording(&["--trace-id", &slowest.id.to_string()[..16], "--format", "json"]).succeeded());
    let line: Value = serde_json::from_str(&line).unwrap();
    assert_eq!(
        serde_json::from_value::<Span>(line["root"].clone()).unwrap(),
        slowest.root
    );

    let listed = on_recording(&["--list", "--limit", "1000", "--format", "json"]).succeeded();
    let page: Page = serde_json::from_str(&text(&listed)).unwrap();
    assert_eq!(page.kept_count, traces.len());
    assert_eq!(page.traces.len(), traces.len().min(1000));
    let earliest = page.traces.iter().min_by_key(|summary| summary.start_unix_ns).unwrap();
    let early = on_recording(&["--list", "--format", "json", "--until", &earliest.start]).succeeded();
    let early: Page = serde_json::from_str(&text(&early)).unwrap();
    assert!(early.matching_count < page.matching_count, "{}", early.matching_count);
    let end = on_recording(&["--list", "--format", "json", "--since", "15m"]).succeeded();
    let end: Page = serde_json::from_str(&text(&end)).unwrap();
    assert_eq!(
        end.matching_count, page.matching_count,
        "15 minutes before the end of the recording"
    );
    let error = on_recording(&["--export", "none"]).stderr.join("\n");
    assert!(
        error.contains(&format!("none of the {} traces", traces.len())),
        "{error}"
    );
}
