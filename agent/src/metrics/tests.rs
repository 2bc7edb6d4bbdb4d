use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use super::*;
use crate::pipeline::{Counted, Times};
use crate::sink::testing::{growth, host_call, interruption, invoke, process, syscall, trace, trap};
use crate::span::{InterruptionCause, Module, Suspend};

/// A strict reader of the parts of `OpenMetrics` that the agent writes: series by name and label set.
fn parse(text: &str) -> HashMap<String, f64> {
    let body = text.strip_suffix("# EOF\n").expect("the text ends in # EOF");
    let mut series = HashMap::new();
    for line in body.lines() {
        if let Some(comment) = line.strip_prefix("# ") {
            assert!(
                ["HELP ", "TYPE ", "UNIT "].iter().any(|kind| comment.starts_with(kind)),
                "{line}"
            );
            continue;
        }
        let name_end = line.find(['{', ' ']).expect("a series has a value");
        assert!(
            line[..name_end]
                .bytes()
                .all(|byte| byte == b'_' || byte.is_ascii_alphanumeric()),
            "{line}"
        );
        let value_start = if line.as_bytes()[name_end] == b'{' {
            name_end + labels_length(&line[name_end..])
        } else {
            name_end
        };
        let value = line[value_start..]
            .strip_prefix(' ')
            .expect("one space before the value");
        let value = value.parse().unwrap_or_else(|_| panic!("not a number: {line}"));
        assert!(
            series.insert(line[..value_start].to_owned(), value).is_none(),
            "written twice: {line}"
        );
    }
    series
}

/// Length of `{name="value",…}`, with every quote, backslash and newline of a value escaped.
fn labels_length(text: &str) -> usize {
    let mut rest = &text[1..];
    loop {
        let equals = rest.find("=\"").expect("a label has a quoted value");
        assert!(
            rest[..equals]
                .bytes()
                .all(|byte| byte == b'_' || byte.is_ascii_alphanumeric()),
            "{text}"
        );
        rest = &rest[equals + 2..];
        let mut characters = rest.char_indices();
        let end = loop {
            match characters.next().expect("a value is closed") {
                (_, '\\') => assert!(matches!(characters.next(), Some((_, '\\' | '"' | 'n'))), "{text}"),
                (at, '"') => break at,
                _ => {}
            }
        };
        rest = &rest[end + 1..];
        match rest.as_bytes()[0] {
            b',' => rest = &rest[1..],
            b'}' => return text.len() - rest.len() + 1,
            _ => panic!("unexpected text after a label: {text}"),
        }
    }
}

fn series(metrics: &Metrics) -> HashMap<String, f64> {
    parse(&metrics.encode())
}

const RUN: &str = "process=\"edge-host\",module=\"policy.wasm\",export=\"run\"";

#[test]
fn a_trace_counts_each_of_its_calls_once() {
    let mut read = syscall("read", 2_000, 3_000);
    read.outcome = Outcome::Errno { errno: 2 };
    let mut call = host_call("fd_read", 1_000, 4_000);
    call.children = vec![syscall("read", 1_100, 1_200), read];
    let mut root = invoke("run", 0, 3_000_000);
    root.children = vec![call, host_call("fd_read", 5_000, 6_000)];
    let metrics = Metrics::new();
    metrics.observe_trace(&trace(root.clone()));
    metrics.observe_trace(&trace(root));
    let series = series(&metrics);
    let import = "process=\"edge-host\",module=\"policy.wasm\",import=\"wasi_snapshot_preview1.fd_read\"";
    for (name, expected) in [
        (format!("wasm_invocations_total{{{RUN},outcome=\"ok\"}}"), 2.0),
        (format!("wasm_invocation_duration_seconds_count{{{RUN}}}"), 2.0),
        (format!("wasm_invocation_duration_seconds_sum{{{RUN}}}"), 0.006),
        (format!("wasm_host_calls_total{{{import},outcome=\"ok\"}}"), 4.0),
        (format!("wasm_host_call_duration_seconds_count{{{import}}}"), 4.0),
        (
            format!("wasm_syscalls_total{{{RUN},syscall=\"read\",outcome=\"ok\"}}"),
            2.0,
        ),
        (
            format!("wasm_syscalls_total{{{RUN},syscall=\"read\",outcome=\"ENOENT\"}}"),
            2.0,
        ),
        (
            format!("wasm_syscall_duration_seconds_count{{{RUN},syscall=\"read\"}}"),
            4.0,
        ),
        ("wasmscope_symbol_coverage_ratio".to_owned(), 1.0),
    ] {
        let found = series.get(&name).unwrap_or_else(|| panic!("no {name} in {series:#?}"));
        assert!((found - expected).abs() < 1e-9, "{name} is {found}");
    }
}

#[test]
fn bytes_are_counted_by_direction_and_only_where_the_result_is_a_number_of_bytes() {
    let mut root = invoke("run", 0, 100);
    root.children = vec![
        syscall("read", 1, 2),
        syscall("writev", 3, 4),
        syscall("recvmmsg", 5, 6),
        syscall("writev", 7, 8),
    ];
    let metrics = Metrics::new();
    metrics.observe_trace(&trace(root));
    let series = series(&metrics);
    assert_eq!(
        series.get(&format!("wasm_io_bytes_total{{{RUN},direction=\"read\"}}")),
        Some(&64.0)
    );
    assert_eq!(
        series.get(&format!("wasm_io_bytes_total{{{RUN},direction=\"write\"}}")),
        Some(&128.0)
    );
}

#[test]
fn a_call_that_was_still_open_is_counted_but_not_timed() {
    let mut root = invoke("run", 0, 100);
    root.outcome = Outcome::Unfinished;
    root.end_bound = Bound::Open;
    let metrics = Metrics::new();
    metrics.observe_trace(&trace(root));
    let series = series(&metrics);
    assert_eq!(
        series.get(&format!("wasm_invocations_total{{{RUN},outcome=\"unfinished\"}}")),
        Some(&1.0)
    );
    assert!(!series.contains_key(&format!("wasm_invocation_duration_seconds_count{{{RUN}}}")));
}

#[test]
fn growth_and_interruptions_are_counted_by_how_they_ended() {
    let mut refused = growth(None, 40);
    refused.outcome = Outcome::Refused;
    let mut root = invoke("run", 0, 100);
    root.outcome = Outcome::Trap {
        code: "out_of_fuel".to_owned(),
    };
    root.children = vec![
        growth(Some(1), 10),
        growth(Some(3), 20),
        refused,
        interruption(InterruptionCause::Fuel, 50),
        interruption(InterruptionCause::Epoch, 60),
        trap("out_of_fuel", 99),
    ];
    let mut before = invoke("run", 0, 100);
    before.children = vec![growth(Some(9), 10)];
    let metrics = Metrics::new();
    metrics.observe_trace(&trace(before));
    metrics.observe_trace(&trace(root));
    let series = series(&metrics);
    let module = "process=\"edge-host\",module=\"policy.wasm\"";
    for (name, expected) in [
        (format!("wasm_memory_grows_total{{{module},outcome=\"ok\"}}"), 3.0),
        (format!("wasm_memory_grows_total{{{module},outcome=\"refused\"}}"), 1.0),
        // 9 + 2 pages, not the 3 + 2 that came later.
        (format!("wasm_memory_bytes{{{module}}}"), 11.0 * 65_536.0),
        (format!("wasm_memory_max_bytes{{{module}}}"), 20.0 * 65_536.0),
        (
            format!("wasm_interruptions_total{{{RUN},kind=\"fuel\",outcome=\"ok\"}}"),
            1.0,
        ),
        (
            format!("wasm_interruptions_total{{{RUN},kind=\"fuel\",outcome=\"trap\"}}"),
            1.0,
        ),
        (
            format!("wasm_interruptions_total{{{RUN},kind=\"epoch\",outcome=\"ok\"}}"),
            1.0,
        ),
        (format!("wasm_traps_total{{{RUN},code=\"out_of_fuel\"}}"), 1.0),
    ] {
        assert_eq!(series.get(&name), Some(&expected), "{name}");
    }
}

#[test]
fn a_trap_through_nested_invocations_counts_once() {
    let outcome = Outcome::Trap {
        code: "unreachable".to_owned(),
    };
    let mut inner = invoke("inner", 20, 30);
    inner.outcome = outcome.clone();
    inner.children = vec![trap("unreachable", 29)];
    let mut call = host_call("callback", 10, 40);
    call.children = vec![inner];
    let mut root = invoke("run", 0, 100);
    root.outcome = outcome.clone();
    root.children = vec![call];
    let mut unseen = invoke("run", 0, 100);
    unseen.outcome = outcome;
    let metrics = Metrics::new();
    metrics.observe_trace(&trace(root));
    metrics.observe_trace(&trace(unseen));
    let series = series(&metrics);
    let of = |export: &str| {
        format!(
            "wasm_traps_total{{process=\"edge-host\",module=\"policy.wasm\",export=\"{export}\",code=\"unreachable\"}}"
        )
    };
    assert_eq!(series.get(&of("inner")), Some(&1.0));
    assert_eq!(series.get(&of("run")), Some(&1.0), "the one that no trap was seen in");
}

#[test]
fn suspended_time_adds_up_without_rounding() {
    let mut root = invoke("run", 0, 10_000);
    root.suspends = vec![Suspend {
        start_ns: 10,
        end_ns: Some(11),
        from_tid: 1,
        to_tid: Some(2),
    }];
    let metrics = Metrics::new();
    for _ in 0..1_000 {
        metrics.observe_trace(&trace(root.clone()));
    }
    assert_eq!(
        series(&metrics).get(&format!("wasm_suspended_seconds_total{{{RUN}}}")),
        Some(&1e-6)
    );
}

#[test]
fn losses_add_up_and_totals_never_go_back() {
    let metrics = Metrics::new();
    let loss = |reason: &str, count| Loss {
        layer: "ring".to_owned(),
        reason: reason.to_owned(),
        count,
    };
    metrics.observe_loss(&loss("decode", 2));
    metrics.observe_loss(&loss("decode", 3));
    metrics.set_loss_total(&loss("full", 9));
    metrics.set_loss_total(&loss("full", 7));
    let series = series(&metrics);
    assert_eq!(
        series.get("wasmscope_events_lost_total{layer=\"ring\",reason=\"decode\"}"),
        Some(&5.0)
    );
    assert_eq!(
        series.get("wasmscope_events_lost_total{layer=\"ring\",reason=\"full\"}"),
        Some(&9.0)
    );
}

#[test]
fn cold_starts_are_told_by_phase() {
    let metrics = Metrics::new();
    let deserialize = PhaseKind::Deserialize.into();
    metrics.observe_cold_start(
        &process(),
        Some("policy.wasm"),
        deserialize,
        Duration::from_micros(2_910),
    );
    metrics.count_cold_start(&process(), Some("policy.wasm"));
    metrics.observe_instantiation(&process(), None);
    let series = series(&metrics);
    assert_eq!(
        series.get("wasm_cold_starts_total{process=\"edge-host\",module=\"policy.wasm\"}"),
        Some(&1.0)
    );
    assert_eq!(
        series.get("wasm_instantiations_total{process=\"edge-host\",module=\"unknown\"}"),
        Some(&1.0)
    );
    let labels = "process=\"edge-host\",module=\"policy.wasm\",phase=\"deserialize\"";
    assert_eq!(
        series.get(&format!("wasm_cold_start_duration_seconds_sum{{{labels}}}")),
        Some(&0.00291)
    );
    assert_eq!(
        series.get(&format!(
            "wasm_cold_start_duration_seconds_bucket{{le=\"0.0025\",{labels}}}"
        )),
        Some(&0.0)
    );
}

#[test]
fn past_the_cap_calls_are_still_counted_and_the_overflow_is_stated() {
    let metrics = Metrics::new();
    let extra = 50;
    for i in 0..MAX_COUNTER_SERIES + extra {
        metrics.observe_trace(&trace(invoke(&format!("export_{i}"), 0, 10)));
    }
    let series = series(&metrics);
    let other = "process=\"other\",module=\"other\",export=\"other\"";
    assert_eq!(
        series.get(&format!("wasm_invocations_total{{{other},outcome=\"ok\"}}")),
        Some(&(extra as f64))
    );
    assert_eq!(
        series.get("wasmscope_series_overflow_total{family=\"wasm_invocations\"}"),
        Some(&(extra as f64))
    );
    let sum = |prefix: &str| {
        series
            .iter()
            .filter(|(name, _)| name.starts_with(prefix))
            .map(|(_, value)| value)
            .sum::<f64>()
    };
    assert_eq!(sum("wasm_invocations_total{") as usize, MAX_COUNTER_SERIES + extra);
    assert_eq!(
        sum("wasm_invocation_duration_seconds_count{") as usize,
        MAX_COUNTER_SERIES + extra
    );
    let histograms = series
        .keys()
        .filter(|name| name.starts_with("wasm_invocation_duration_seconds_count{"))
        .count();
    assert_eq!(histograms, MAX_HISTOGRAM_SERIES + 1);
}

/// Names that try to break out of a label, and one that is only long.
fn hostile_names() -> Vec<String> {
    let mut names: Vec<String> = [
        "\"} 1\nwasm_invocations_total{process=\"x\"} 999",
        "back\\slash\\",
        "\\\"",
        "# EOF\n",
        "nul\0\r\u{1b}[31m\u{2028}",
        "",
        "\u{fffd}\u{10ffff}é",
    ]
    .map(str::to_owned)
    .into();
    names.push("é".repeat(5_000));
    names
}

#[test]
fn hostile_names_can_neither_forge_nor_break_series() {
    let metrics = Metrics::new();
    let names = hostile_names();
    for name in &names {
        let module = Arc::new(Module {
            name: name.clone(),
            hash: String::new(),
        });
        let mut root = invoke("x", 0, 10);
        root.kind = SpanKind::Invoke {
            function: Some(Arc::new(Function {
                module,
                index: 0,
                name: name.clone(),
            })),
        };
        let mut call = host_call(name, 1, 2);
        call.children = vec![syscall(name, 1, 2)];
        root.children = vec![call, trap(name, 9)];
        let mut trace = trace(root);
        trace.process = Arc::new(Process {
            command: name.clone(),
            ..(*process()).clone()
        });
        metrics.observe_trace(&trace);
        metrics.observe_events(name, 1);
        metrics.observe_loss(&Loss {
            layer: name.clone(),
            reason: name.clone(),
            count: 1,
        });
    }
    let text = metrics.encode();
    let series = parse(&text);
    let invocations: Vec<_> = series
        .iter()
        .filter(|(name, _)| name.starts_with("wasm_invocations_total{"))
        .collect();
    assert_eq!(invocations.len(), names.len());
    assert!(
        invocations.iter().all(|(_, value)| **value as u64 == 1),
        "{invocations:#?}"
    );
    assert!(series.keys().all(|name| name.len() < 1_000));
    assert!(
        text.chars()
            .all(|character| character == '\n' || !character.is_control())
    );
}

#[test]
fn the_encoder_escapes_what_labels_may_not_hold() {
    let family = Family::<Vec<(String, String)>, Counter>::default();
    family
        .get_or_create(&vec![("name".to_owned(), "a\"b\\c\nd".to_owned())])
        .inc();
    let mut registry = Registry::default();
    registry.register("calls", "Calls", family);
    let mut text = String::new();
    prometheus_client::encoding::text::encode(&mut text, &registry).unwrap();
    assert!(text.contains(r#"calls_total{name="a\"b\\c\nd"} 1"#), "{text}");
}

#[test]
fn unknown_functions_lower_the_symbol_coverage() {
    let metrics = Metrics::new();
    assert!(metrics.encode().contains("wasmscope_symbol_coverage_ratio NaN\n"));
    let mut root = invoke("run", 0, 10);
    let mut unnamed = host_call("x", 1, 2);
    unnamed.kind = SpanKind::HostCall { import: None };
    root.children = vec![unnamed.clone(), host_call("y", 3, 4), unnamed];
    metrics.observe_trace(&trace(root));
    assert_eq!(series(&metrics).get("wasmscope_symbol_coverage_ratio"), Some(&0.5));
}

fn aggregate_row(export: &str, count: u64) -> AggregateRow {
    let SpanKind::Invoke { function } = invoke(export, 0, 1).kind else {
        unreachable!("made as one")
    };
    let mut times = Times::default();
    times.buckets[40] = count;
    times.total_ns = count * 1_000;
    AggregateRow {
        process: Some(process()),
        counted: Counted::Invocations { export: function },
        outcomes: vec![("ok".to_owned(), count)],
        times,
        bytes: 0,
    }
}

#[test]
fn what_the_kernel_counts_is_not_counted_from_traces_too() {
    let config = MetricsConfig {
        max_counter_series: 2,
        max_histogram_series: 2,
        ..MetricsConfig::default()
    };
    let metrics = Metrics::with_aggregates(config);
    for i in 0..5 {
        let mut root = invoke(&format!("export_{i}"), 0, 10);
        root.children = vec![host_call(&format!("call_{i}"), 1, 2), syscall("read", 3, 4)];
        metrics.observe_trace(&trace(root));
    }
    let text = metrics.encode();
    assert!(!text.contains("wasm_invocations_total{"), "{text}");
    let overflows = |metrics: &Metrics| -> Vec<(String, f64)> {
        let all = series(metrics).into_iter();
        all.filter(|(name, value)| name.starts_with("wasmscope_series_overflow_total{") && *value > 0.0)
            .collect()
    };
    assert_eq!(overflows(&metrics), [], "nothing is full");

    for i in 0..5 {
        metrics.observe_aggregate(&aggregate_row(&format!("export_{i}"), 1));
    }
    let mut full = overflows(&metrics);
    full.sort_by(|(one, _), (other, _)| one.cmp(other));
    let family = |name: &str| format!("wasmscope_series_overflow_total{{family=\"{name}\"}}");
    let expected = [
        (family("wasm_invocation_duration_seconds"), 3.0),
        (family("wasm_invocations"), 3.0),
    ];
    assert_eq!(full, expected);
}

#[test]
fn series_of_a_process_that_is_gone_expire_in_every_family_and_those_of_others_stay() {
    let other = || {
        Arc::new(Process {
            pid: 7,
            command: "other-host".to_owned(),
            ..(*process()).clone()
        })
    };
    for has_aggregates in [false, true] {
        let metrics = Metrics::made(MetricsConfig::default(), has_aggregates);
        let observe = |process: Arc<Process>| {
            let mut root = invoke("run", 0, 1_000);
            root.children = vec![host_call("call", 1, 5), syscall("read", 6, 7), trap("unreachable", 9)];
            let mut trace = trace(root);
            trace.process = Arc::clone(&process);
            metrics.observe_trace(&trace);
            metrics.observe_aggregate(&AggregateRow {
                process: Some(Arc::clone(&process)),
                ..aggregate_row("run", 1)
            });
            metrics.count_cold_start(&process, Some("policy.wasm"));
            metrics.observe_instantiation(&process, Some("policy.wasm"));
            let phase = PhaseKind::Compile.into();
            metrics.observe_cold_start(&process, None, phase, Duration::from_millis(1));
        };
        let of = |command: &str| {
            let label = format!("process=\"{command}\"");
            let all = series(&metrics).into_iter();
            all.filter(|(name, _)| name.contains(&label))
                .collect::<BTreeMap<_, _>>()
        };
        observe(process());
        observe(other());
        let before = of("other-host");
        assert_eq!(of("edge-host").len(), before.len());

        let now = Instant::now();
        metrics.process_gone(&process());
        metrics.expire_at(now + Duration::from_secs(1));
        assert_eq!(of("edge-host").len(), before.len(), "for a while they stay");
        // A trace that waited for the name of its pod.
        observe(process());
        metrics.expire_at(now + Duration::from_secs(400));
        assert_eq!(of("edge-host"), BTreeMap::new());
        assert_eq!(of("other-host"), before);
    }
}

#[test]
fn what_is_configured_holds_for_families_that_traces_feed() {
    let config = MetricsConfig {
        process_label: false,
        pod_labels: vec!["app.kubernetes.io/name".to_owned()],
        max_counter_series: 1,
        ..MetricsConfig::default()
    };
    let metrics = Metrics::with_config(config);
    let mut labelled = (*process()).clone();
    let label = ("app.kubernetes.io/name".to_owned(), "edge".to_owned());
    labelled.place.labels.extend([label]);
    for module in ["one.wasm", "two.wasm"] {
        metrics.count_cold_start(&labelled, Some(module));
    }
    let series = series(&metrics);
    let one = "wasm_cold_starts_total{label_app_kubernetes_io_name=\"edge\",module=\"one.wasm\"}";
    assert_eq!(series.get(one), Some(&1.0), "{series:#?}");
    assert_eq!(series.get("wasm_cold_starts_total{module=\"other\"}"), Some(&1.0));
}

/// By family and labels: the value of a counter or gauge, sum and count of a histogram.
type Values = BTreeMap<(String, Vec<(String, String)>), (String, String)>;

fn values_of_text(text: &str) -> Values {
    values_of(snapshot::Snapshot::parse(text))
}

fn values_of(snapshot: snapshot::Snapshot) -> Values {
    let mut values = Values::new();
    for family in snapshot.families {
        for (mut labels, value) in family.series {
            labels.sort();
            let value = match value {
                snapshot::Value::Number(snapshot::Number::Whole(value)) => {
                    (format!("{:?}", value as f64), String::new())
                }
                snapshot::Value::Number(snapshot::Number::Fraction(value)) => (format!("{value:?}"), String::new()),
                snapshot::Value::Histogram { sum, count, .. } | snapshot::Value::Native { sum, count, .. } => {
                    (format!("{sum:?}"), count.to_string())
                }
            };
            values.insert((family.name.clone(), labels), value);
        }
    }
    values
}

fn values_of_protobuf(mut bytes: &[u8]) -> Values {
    use prost::Message as _;
    let mut values = Values::new();
    while !bytes.is_empty() {
        let family = exposition::proto::MetricFamily::decode_length_delimited(&mut bytes).unwrap();
        for metric in family.metric {
            let mut labels: Vec<_> = metric.label.into_iter().map(|pair| (pair.name, pair.value)).collect();
            labels.sort();
            let number = metric.counter.map(|counter| counter.value);
            let number = number.or(metric.gauge.map(|gauge| gauge.value));
            let value = match (number, metric.histogram) {
                (Some(number), _) => (format!("{number:?}"), String::new()),
                (None, Some(histogram)) => (
                    format!("{:?}", histogram.sample_sum),
                    histogram.sample_count.to_string(),
                ),
                (None, None) => panic!("{} has no value", family.name),
            };
            let name = family.name.strip_suffix("_total").unwrap_or(&family.name);
            values.insert((name.to_owned(), labels), value);
        }
    }
    values
}

#[test]
fn all_formats_say_the_same() {
    let metrics = Metrics::with_aggregates(MetricsConfig {
        max_counter_series: 3,
        ..MetricsConfig::default()
    });
    for i in 0..5 {
        metrics.observe_aggregate(&aggregate_row(&format!("export\"\\{i}"), i + 1));
    }
    metrics.count_cold_start(&process(), Some("policy.wasm"));
    metrics.observe_cold_start(&process(), None, ColdStartPhase::FirstCall, Duration::from_millis(3));
    let mut root = invoke("run", 0, 1_000);
    root.children = vec![trap("unreachable", 9)];
    metrics.observe_trace(&trace(root));
    let open_metrics = values_of_text(&metrics.encode());
    assert_eq!(values_of_protobuf(&metrics.encode_as(Format::Protobuf)), open_metrics);
    assert!(open_metrics.len() > 10);
    assert_eq!(values_of(metrics.snapshot()), open_metrics);

    // The same samples, but for what the format does not have.
    let samples = |text: &str| -> Vec<String> {
        let samples = text.lines().filter(|line| !line.starts_with('#'));
        samples
            .map(|line| line.split(" # ").next().unwrap().to_owned())
            .collect()
    };
    let classic = String::from_utf8(metrics.encode_as(Format::Classic)).unwrap();
    assert_eq!(samples(&classic), samples(&metrics.encode()));
}
