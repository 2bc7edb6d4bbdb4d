//! Guests whose every name is an attack on whatever prints it.

use tempfile::tempdir;
use wasmscope::span::SpanKind;
use wasmscope_tests::agent::{Agent, run, wasmscope};
use wasmscope_tests::captured::Captured;
use wasmscope_tests::environment::{self, Kernel};
use wasmscope_tests::samples;
use wasmscope_tests::workload::Workload;

/// Nothing in it moves a cursor, changes a colour, or hides or turns text. (U+200E is what a label ends with that holds text written from
/// right to left, so that what follows it stays in its place.)
fn assert_harmless(text: &str, what: &str) {
    let is_harmful = |character: &char| {
        (character.is_control() && *character != '\n')
            || matches!(character, '\u{200b}' | '\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}' | '\u{feff}')
    };
    assert_eq!(text.chars().find(is_harmful), None, "in {what}: {text}");
}

#[test]
fn hostile_names_break_no_output() {
    let Some(_kernel) = Kernel::acquire() else { return };
    let directory = tempdir().unwrap();
    let recording = directory.path().join("hostile.rec");
    let metrics = directory.path().join("metrics.txt");
    let workload = Workload::ready(&["--scenario", "hostile", "--calls", "2"]);
    let agent = Agent::watching([
        "--pid".as_ref(),
        workload.pid().as_ref(),
        "--format".as_ref(),
        "json".as_ref(),
        "--record".as_ref(),
        recording.as_os_str(),
        "--metrics-file".as_ref(),
        metrics.as_os_str(),
    ]);
    let counted = workload.run();
    let finished = agent.finish();
    let seen = Captured::parse(&finished.stdout);
    seen.assert_nothing_lost();
    seen.assert_well_formed();
    assert_eq!(seen.counts().syscalls(), counted.syscalls());
    assert_eq!(seen.traces.len() as u64, counted.invocations.values().sum::<u64>());
    let all_named = |span: &wasmscope::span::Span| match &span.kind {
        SpanKind::Invoke { function } => function.is_some(),
        SpanKind::HostCall { import } => import.is_some(),
        _ => true,
    };
    assert!(seen.traces.iter().all(|trace| trace.root.walk().all(all_named)));
    assert_harmless(&finished.stderr.join("\n"), "what the agent says");

    // Every trace drawn, each in a diagram of its own, from the recording of this very run.
    let mut diagrams = Vec::new();
    for pick in ["slowest", "failed", "first", "last"] {
        let mermaid = directory.path().join(format!("{pick}.mmd"));
        let mut command = wasmscope();
        command
            .arg("replay")
            .arg(&recording)
            .args(["--pick", pick, "-o"])
            .arg(&mermaid);
        let finished = run(command);
        if pick != "failed" {
            finished.succeeded();
            assert_harmless(&std::fs::read_to_string(&mermaid).unwrap(), pick);
            diagrams.push(mermaid);
        }
        let mut command = wasmscope();
        command
            .arg("replay")
            .arg(&recording)
            .args(["--pick", pick, "--format", "text"]);
        assert_harmless(&run(command).stdout.join("\n"), pick);
    }
    for (index, trace) in seen.traces.iter().enumerate() {
        let trace = wasmscope::span::Trace {
            id: wasmscope::span::TraceId([1; 16]),
            process: trace.process.clone().into(),
            root: trace.root.clone(),
            losses: trace.losses.clone(),
            event_count: trace.event_count,
            starts: wasmscope::span::Starts::default(),
            parent: None,
            pauses: Vec::new(),
        };
        for format in [wasmscope::diagram::Format::Mermaid, wasmscope::diagram::Format::Text] {
            let options = wasmscope::diagram::Options {
                format,
                ..wasmscope::diagram::Options::default()
            };
            let text = wasmscope::diagram::draw(&trace, &seen.capture, &options);
            assert_harmless(&text, "a diagram");
            if format == wasmscope::diagram::Format::Mermaid {
                let path = directory.path().join(format!("{index}.mmd"));
                std::fs::write(&path, text).unwrap();
                diagrams.push(path);
            }
        }
    }
    environment::assert_mermaid_parses(&diagrams);

    let Some(python) = environment::python() else { return };
    let samples = samples::read(python, &metrics);
    let invocations = samples.iter().filter(|sample| sample.name == "wasm_invocations_total");
    let count: f64 = invocations.filter_map(|sample| sample.value).sum();
    assert_eq!(count as usize, seen.traces.len());
    assert!(
        samples
            .iter()
            .all(|sample| sample.name.starts_with("wasm") || sample.name.starts_with("process_")),
        "a series was forged"
    );
}

#[test]
fn thousands_of_files_called_as_libraries_are_not_all_opened_and_nothing_else_is_missed() {
    let Some(_kernel) = Kernel::acquire() else { return };
    let Some(python) = environment::python() else { return };
    let arguments = ["--decoys", "5000", "--tasks", "3", "--calls", "20", "--repeat", "5"];
    let workload = Workload::ready_python(python, "pywasm.py", &arguments);
    let agent = Agent::json_of(&workload.pid());
    let counted = workload.run();
    let seen = agent.captured();
    assert_eq!(seen.counts(), counted, "losses: {:?}", seen.capture.losses);
    let losses: Vec<_> = seen
        .capture
        .losses
        .iter()
        .map(|loss| (loss.layer.as_str(), loss.reason.as_str()))
        .collect();
    assert_eq!(losses, [("symbols", "libraries_limit")]);
}
