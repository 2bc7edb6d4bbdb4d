//! The counters and histograms that a full trace amounts to, by a count of its own, to hold the kernel's against.

use std::collections::BTreeMap;

use wasmscope::errno;
use wasmscope::span::{Bound, Function, Outcome, Span, SpanKind};
use wasmscope_tests::captured::Trace;
use wasmscope_tests::samples::Sample;

/// Values by name and labels; sums of seconds, and the bounds of buckets, as nanoseconds.
pub(crate) type Series = BTreeMap<String, u64>;

/// The families that are compared, without the ends of their names.
const FAMILIES: [&str; 7] = [
    "wasm_invocations_",
    "wasm_invocation_duration_seconds_",
    "wasm_host_calls_",
    "wasm_host_call_duration_seconds_",
    "wasm_syscalls_",
    "wasm_syscall_duration_seconds_",
    "wasm_io_bytes_",
];
/// Labels that both sides have.
const LABELS: [&str; 7] = ["module", "export", "import", "syscall", "outcome", "direction", "le"];
/// Logarithms of the bounds of classic buckets, seconds.
const BOUNDS_LOG2: std::ops::RangeInclusive<i32> = -20..=6;

/// What was served.
pub(crate) fn served(samples: &[Sample]) -> Series {
    let mut series = Series::new();
    for sample in samples {
        if !FAMILIES.iter().any(|family| sample.name.starts_with(family)) {
            continue;
        }
        let value = sample.value.expect("counts and sums are numbers");
        let labels = LABELS.iter().filter_map(|label| {
            let value = sample.labels.get(*label)?;
            Some((*label, if *label == "le" { bound(value) } else { value.clone() }))
        });
        let labels: Vec<_> = labels.collect();
        let value = if sample.name.ends_with("_sum") {
            (value * 1e9).round()
        } else {
            value
        };
        add(&mut series, &sample.name, &labels, value as u64);
    }
    series
}

/// The bound of a bucket, in whole nanoseconds: durations are, so nothing lies between.
fn bound(seconds: &str) -> String {
    let seconds: f64 = seconds.trim_start_matches('+').parse().expect("bounds are numbers");
    if seconds.is_finite() {
        ((seconds * 1e9) as u64).to_string()
    } else {
        "inf".to_owned()
    }
}

/// What the traces say.
pub(crate) fn traced(traces: &[Trace]) -> Series {
    let mut series = Series::new();
    for trace in traces {
        count(&trace.root, None, &mut series);
    }
    series
}

fn count(span: &Span, enclosing: Option<&Function>, series: &mut Series) {
    let mut enclosing = enclosing;
    match &span.kind {
        SpanKind::Invoke { function } => {
            enclosing = function.as_deref();
            let labels = [("module", module(enclosing)), ("export", export(enclosing))];
            count_call(span, ["wasm_invocations", "wasm_invocation"], &labels, series);
        }
        SpanKind::HostCall { import } => {
            let import = import
                .as_ref()
                .map(|import| format!("{}.{}", import.module, import.name));
            let labels = [
                ("module", module(span.stack.first().map(AsRef::as_ref))),
                ("import", import.unwrap_or_else(unknown)),
            ];
            count_call(span, ["wasm_host_calls", "wasm_host_call"], &labels, series);
        }
        SpanKind::Syscall { name, result, .. } => {
            let mut labels = vec![("module", module(enclosing)), ("export", export(enclosing))];
            let direction = match name.as_str() {
                "read" | "pread64" | "readv" | "recvfrom" | "recvmsg" => Some("read"),
                "write" | "pwrite64" | "writev" | "sendto" | "sendmsg" => Some("write"),
                _ => None,
            };
            if let (Some(direction), Ok(bytes @ 1..)) = (direction, u64::try_from(*result)) {
                let labels = [&labels[..], &[("direction", direction.to_owned())]].concat();
                add(series, "wasm_io_bytes_total", &labels, bytes);
            }
            labels.push(("syscall", name.clone()));
            count_call(span, ["wasm_syscalls", "wasm_syscall"], &labels, series);
        }
        _ => {}
    }
    for child in &span.children {
        count(child, enclosing, series);
    }
}

/// Counts a span, and what it took if it has a begin and an end.
fn count_call(span: &Span, [counter, timed]: [&str; 2], labels: &[(&str, String)], series: &mut Series) {
    let outcome = match &span.outcome {
        Outcome::Errno { errno } => errno::name(*errno).into_owned(),
        outcome => outcome.as_str().to_owned(),
    };
    let with = |label, value: String| [labels, &[(label, value)]].concat();
    add(series, &format!("{counter}_total"), &with("outcome", outcome), 1);
    if span.start_bound == Bound::Open || span.end_bound == Bound::Open {
        return;
    }
    let name = |end: &str| format!("{timed}_duration_seconds_{end}");
    let duration_ns = span.end_ns - span.start_ns;
    add(series, &name("count"), labels, 1);
    add(series, &name("sum"), labels, duration_ns);
    for exponent in BOUNDS_LOG2 {
        let bound_ns = (f64::from(exponent).exp2() * 1e9) as u64;
        let is_below = u64::from(duration_ns <= bound_ns);
        add(series, &name("bucket"), &with("le", bound_ns.to_string()), is_below);
    }
    add(series, &name("bucket"), &with("le", "inf".to_owned()), 1);
}

fn add(series: &mut Series, name: &str, labels: &[(&str, String)], value: u64) {
    // In the order of LABELS, whoever counts.
    let labels = LABELS
        .iter()
        .filter_map(|name| labels.iter().find(|label| label.0 == *name));
    let labels: Vec<_> = labels.map(|(name, value)| format!("{name}={value}")).collect();
    *series.entry(format!("{name} {}", labels.join(" "))).or_default() += value;
}

fn module(function: Option<&Function>) -> String {
    function.map_or_else(unknown, |function| function.module.name.clone())
}

fn export(function: Option<&Function>) -> String {
    function.map_or_else(unknown, |function| function.name.clone())
}

fn unknown() -> String {
    "unknown".to_owned()
}

/// Fails with what differs, if anything does.
#[track_caller]
pub(crate) fn assert_equal(served: &Series, traced: &Series, what: &str) {
    let names: std::collections::BTreeSet<_> = served.keys().chain(traced.keys()).collect();
    let different: Vec<_> = names
        .into_iter()
        .filter(|name| served.get(*name) != traced.get(*name))
        .map(|name| format!("{name}: {:?} served, {:?} traced", served.get(name), traced.get(name)))
        .collect();
    assert!(
        different.is_empty(),
        "{what}: {} of {} series differ\n{}",
        different.len(),
        traced.len(),
        different.join("\n")
    );
}
