//! What is kept, against models that keep everything.

use std::collections::HashMap;
use std::sync::Arc;

use proptest::prelude::*;

use super::key::INTERVALS;
use super::*;
use crate::sink::testing::{function, invoke, syscall};
use crate::span::{Function, Outcome, Process, Span, SpanKind, Starts};

const SECOND: u64 = 1_000_000_000;
/// Later than any time at which a test runs, so that asking moves nothing out of the window.
const BASE_NS: u64 = 1 << 60;

const CLOCK: ClockAnchor = ClockAnchor {
    monotonic_ns: BASE_NS,
    unix_ns: 1_700_000_000 * SECOND,
};

fn recorder(config: RecorderConfig) -> Recorder {
    Recorder::with_random(config, CLOCK, "6.18".to_owned(), Random::new(7))
}

fn process(pid: u32) -> Arc<Process> {
    Arc::new(Process {
        pid,
        ..(*crate::sink::testing::process()).clone()
    })
}

fn in_pod(pod: &str, pid: u32) -> Arc<Process> {
    let mut process = (*process(pid)).clone();
    process.place.pod_uid = Some(format!("uid-{pod}"));
    process.place.pod_name = Some(pod.to_owned());
    process.place.namespace = Some("shop".to_owned());
    Arc::new(process)
}

/// Calls that do not deflate away.
fn calls(count: u64, seed: u64) -> Vec<Span> {
    let mut random = Random::new(seed);
    (0..count)
        .map(|index| {
            let mut span = syscall("read", BASE_NS + index, BASE_NS + index + random.below(1 << 20));
            if let SpanKind::Syscall { args, .. } = &mut span.kind {
                *args = [random.below(1 << 40), random.below(u64::MAX), random.below(u64::MAX)];
            }
            span
        })
        .collect()
}

fn trace(number: u64, process: &Arc<Process>, export: &str, duration_ns: u64) -> Trace {
    let mut id = [0; 16];
    id[..8].copy_from_slice(&number.wrapping_mul(0x9e37_79b9_7f4a_7c15).to_be_bytes());
    id[8..].copy_from_slice(&(number + 1).to_be_bytes());
    let root = invoke(export, BASE_NS, BASE_NS + duration_ns);
    Trace {
        id: TraceId(id),
        process: process.clone(),
        root,
        losses: Vec::new(),
        event_count: 3,
        starts: Starts::default(),
        parent: None,
        pauses: Vec::new(),
    }
}

fn failed(mut trace: Trace, code: &str) -> Trace {
    trace.root.outcome = Outcome::Trap { code: code.to_owned() };
    trace
}

fn asked(recorder: &Recorder, question: Question) -> Vec<Summary> {
    let query = question.check(CLOCK.unix_ns).unwrap();
    recorder.list(&query).traces
}

fn everything(recorder: &Recorder) -> Vec<Summary> {
    asked(
        recorder,
        Question {
            limit: Some(MAX_LIMIT),
            ..Question::default()
        },
    )
}

fn kept_because(recorder: &Recorder, kept: Kept) -> Vec<Summary> {
    let mut all = everything(recorder);
    all.retain(|summary| summary.kept_because.contains(&kept));
    all
}

#[test]
fn a_kept_trace_comes_back_as_it_was() {
    let recorder = recorder(RecorderConfig::default());
    let mut trace = trace(1, &in_pod("cart", 7), "run", 5_000);
    trace.root.children = calls(20, 1);
    recorder.offer_at(&trace, BASE_NS);
    let found = recorder.find(&trace.id.to_string()[..8]).unwrap();
    assert_eq!(found.trace().unwrap(), trace);
    assert_eq!(found.summary.pod.as_deref(), Some("cart"));
    assert_eq!(found.summary.span_count, 21);
    assert_eq!(found.summary.start, "2023-11-14T22:13:20.000000Z");
    assert_eq!(found.context.capture.kernel_release, "6.18");
    assert_eq!(found.context.kept_because, [Kept::Slowest, Kept::Random]);
}

#[test]
fn an_id_is_found_by_its_first_digits_unless_several_begin_so() {
    let recorder = recorder(RecorderConfig::default());
    let mut one = trace(1, &process(7), "run", 5);
    one.id.0 = [0xab; 16];
    let mut two = one.clone();
    two.id.0[15] = 0;
    recorder.offer_at(&one, BASE_NS);
    recorder.offer_at(&two, BASE_NS);
    assert!(matches!(
        recorder.find("abababab"),
        Err(FindError::Ambiguous { count: 2, .. })
    ));
    assert_eq!(recorder.find(&two.id.to_string()).unwrap().summary.trace_id, two.id);
    assert!(matches!(recorder.find("abababa"), Err(FindError::NotAnId(_))));
    assert_eq!(recorder.find("00000000").err(), Some(FindError::Unknown));
}

#[test]
fn a_trace_is_found_by_the_id_of_the_application_s_trace() {
    let recorder = recorder(RecorderConfig::default());
    let header = b"00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
    let parent = crate::span::Parent::parse(header, crate::span::ParentSource::Request);
    let mut part = trace(1, &process(7), "run", 5);
    part.parent.clone_from(&parent);
    recorder.offer_at(&part, BASE_NS);
    recorder.offer_at(&trace(2, &process(7), "run", 9), BASE_NS);
    let digits = "4bf92f3577b34da6a3ce929d0e0e4736";
    let found = recorder.find(digits).unwrap();
    assert_eq!(found.trace().unwrap(), part, "with its parent");
    let listed = asked(
        &recorder,
        Question {
            trace_id: Some(digits[..8].to_owned()),
            ..Question::default()
        },
    );
    assert_eq!(listed.len(), 1);
    assert_eq!(
        (listed[0].trace_id, listed[0].application_trace_id),
        (part.id, parent.map(|parent| parent.trace_id))
    );
    let mut other = trace(3, &process(7), "run", 7);
    other.parent = part.parent;
    recorder.offer_at(&other, BASE_NS);
    assert!(matches!(
        recorder.find(digits),
        Err(FindError::Ambiguous { count: 2, .. })
    ));
    assert_eq!(recorder.find(&other.id.to_string()).unwrap().summary.trace_id, other.id);
}

#[test]
fn a_rare_failure_survives_a_storm_of_another() {
    let recorder = recorder(RecorderConfig::default());
    let process = process(7);
    for number in 0..20_000 {
        let code = if number == 15_000 { "out_of_fuel" } else { "unreachable" };
        recorder.offer_at(
            &failed(trace(number, &process, "run", 1_000), code),
            BASE_NS + number * 1_000,
        );
    }
    let failed = kept_because(&recorder, Kept::Failed);
    assert_eq!(failed.len(), RecorderConfig::default().failed_per_key as usize);
    assert_eq!(
        failed
            .iter()
            .filter(|summary| summary.trap.as_deref() == Some("out_of_fuel"))
            .count(),
        1
    );
    let serialised = recorder.stats().offered - recorder.stats().not_wanted;
    assert!(serialised < 200, "a storm of failures serialised {serialised} traces");
}

#[test]
fn what_is_older_than_the_window_goes_and_is_no_loss() {
    let recorder = recorder(RecorderConfig {
        window_seconds: 80,
        ..RecorderConfig::default()
    });
    recorder.offer_at(&trace(1, &process(7), "run", 5), BASE_NS);
    recorder.offer_at(&trace(2, &process(7), "other", 5), BASE_NS + 80 * SECOND);
    assert_eq!(recorder.stats().traces, 2, "still within the window");
    recorder.offer_at(&trace(3, &process(7), "other", 5), BASE_NS + 91 * SECOND);
    let stats = recorder.stats();
    assert_eq!((stats.traces, stats.keys, stats.window_passed), (2, 1, 1));
    assert_eq!(stats.losses().count(), 0);
}

#[test]
fn a_noisy_pod_displaces_itself_and_not_a_quiet_one() {
    const BUDGET: u64 = 200_000;
    let recorder = recorder(RecorderConfig::default());
    recorder.lock().keep.set_memory_bytes(BUDGET as usize);
    let (quiet, noisy) = (in_pod("quiet", 1), in_pod("noisy", 2));
    for number in 0..6 {
        let mut trace = trace(number, &quiet, "run", 10 + number);
        trace.root.children = calls(20, number);
        recorder.offer_at(&trace, BASE_NS);
    }
    let before = recorder.stats();
    for number in 100..300 {
        let mut trace = trace(number, &noisy, &format!("export-{}", number % 40), number);
        trace.root.children = calls(50, number);
        recorder.offer_at(&trace, BASE_NS + number);
        assert!(recorder.stats().bytes <= BUDGET);
    }
    let of = |pod: &str| {
        everything(&recorder)
            .iter()
            .filter(|summary| summary.pod.as_deref() == Some(pod))
            .count()
    };
    assert_eq!(of("quiet") as u64, before.traces);
    assert!(of("noisy") > 10, "the rest is the noisy one's: {}", of("noisy"));
    let stats = recorder.stats();
    assert!(stats.over_budget > 0);
    assert!(stats.bytes * 10 > BUDGET * 8, "the budget is used: {stats:?}");
}

#[test]
fn names_without_end_neither_take_memory_without_end_nor_displace_others() {
    let recorder = recorder(RecorderConfig {
        max_keys: 100,
        ..RecorderConfig::default()
    });
    recorder.offer_at(&trace(1, &in_pod("quiet", 1), "run", 10), BASE_NS);
    let hostile = in_pod("hostile", 2);
    for number in 10..1_000 {
        recorder.offer_at(&trace(number, &hostile, &format!("export-{number}"), 5), BASE_NS);
    }
    let stats = recorder.stats();
    assert_eq!(stats.keys, 100);
    assert_eq!(stats.too_many_keys, 990 - 99);
    for pid in 3..23 {
        recorder.offer_at(
            &trace(u64::from(pid) + 5_000, &in_pod(&format!("pod-{pid}"), pid), "run", 5),
            BASE_NS,
        );
    }
    let all = everything(&recorder);
    assert_eq!(all.len(), 100);
    let others = all
        .iter()
        .filter(|summary| summary.pod.as_deref() != Some("hostile"))
        .count();
    assert_eq!(others, 21, "every other pod has its place");
}

#[test]
fn a_trace_that_is_too_large_is_counted() {
    let recorder = recorder(RecorderConfig {
        max_trace_kib: 16,
        ..RecorderConfig::default()
    });
    let mut large = trace(1, &process(7), "run", 10);
    large.root.children = calls(3_000, 1);
    recorder.offer_at(&large, BASE_NS);
    let stats = recorder.stats();
    assert_eq!((stats.traces, stats.trace_too_large), (0, 1));
    assert_eq!(
        stats.losses().collect::<Vec<_>>(),
        [Loss {
            layer: "recorder".to_owned(),
            reason: "trace_too_large".to_owned(),
            count: 1
        }]
    );
}

#[test]
fn random_ones_are_drawn_evenly() {
    const OFFERED: u64 = 40;
    const RUNS: u64 = 2_000;
    let config = RecorderConfig {
        slowest_per_key: 0,
        failed_per_key: 0,
        random_per_key: 4,
        window_seconds: 80,
        ..RecorderConfig::default()
    };
    let process = process(7);
    let mut drawn: HashMap<TraceId, u64> = HashMap::new();
    // A stretch of 20 s has 10 of them; times are moved to where stretches begin.
    let first_ns = BASE_NS.next_multiple_of(80 * SECOND);
    for seed in 0..RUNS {
        // Without making anything compact, which is not what this is about.
        let mut keep = Keep::new(&config, Random::new(seed));
        for number in 0..OFFERED {
            let trace = trace(number, &process, "run", 5);
            let now_ns = first_ns + number * 2 * SECOND;
            if let Some(place) = keep.offer(&trace, now_ns) {
                let entry = Entry::new(&trace, place.wanted, now_ns, place.offered_count, Arc::from([]));
                keep.insert(place, entry);
            }
        }
        assert_eq!(keep.trace_count(), 4);
        for (_, entry) in keep.entries() {
            *drawn.entry(entry.id).or_default() += 1;
        }
    }
    assert_eq!(drawn.len() as u64, OFFERED);
    // Expected 200 each with a deviation of 13; chi-square over 36 degrees of freedom is below 90 but once in 10^6.
    let expected = (RUNS * 4 / OFFERED) as f64;
    let chi_square: f64 = drawn
        .values()
        .map(|count| (*count as f64 - expected).powi(2) / expected)
        .sum();
    assert!(chi_square < 90.0, "{chi_square}: {drawn:?}");
}

#[test]
fn a_smaller_budget_takes_effect_at_once() {
    let recorder = recorder(RecorderConfig::default());
    for number in 0..400 {
        let mut trace = trace(number, &process(number as u32), "run", 10);
        trace.root.children = calls(200, number);
        recorder.offer_at(&trace, BASE_NS);
    }
    assert!(recorder.stats().bytes > 1 << 20);
    let smaller = RecorderConfig {
        memory_mib: 1,
        slowest_per_key: 1,
        ..RecorderConfig::default()
    };
    recorder.lock().keep.reconfigure(&smaller, BASE_NS);
    assert!(recorder.stats().bytes <= 1 << 20);
    assert!(recorder.stats().traces > 0);
}

#[test]
fn pages_follow_each_other_without_gap_or_repeat() {
    let recorder = recorder(RecorderConfig::default());
    for number in 0..70 {
        recorder.offer_at(&trace(number, &process(number as u32), "run", number / 3), BASE_NS);
    }
    for order in [Order::Slowest, Order::Latest] {
        let mut seen = Vec::new();
        let mut cursor = None;
        loop {
            let question = Question {
                order: Some(order),
                limit: Some(9),
                cursor,
                ..Question::default()
            };
            let page = recorder.list(&question.check(0).unwrap());
            assert_eq!(page.matching_count, 70);
            seen.extend(page.traces);
            cursor = page.next_cursor;
            if cursor.is_none() {
                break;
            }
        }
        assert_eq!(seen.len(), 70);
        assert!(seen.windows(2).all(|pair| pair[0].duration_ns >= pair[1].duration_ns) || order == Order::Latest);
        let ids: std::collections::HashSet<_> = seen.iter().map(|summary| summary.trace_id).collect();
        assert_eq!(ids.len(), 70);
    }
}

#[test]
fn every_field_of_a_question_narrows_it_down() {
    let recorder = recorder(RecorderConfig::default());
    let mut cart = (*in_pod("cart", 7)).clone();
    cart.place.container_name = Some("app".to_owned());
    cart.place.container_id = Some("0123456789abcdef".repeat(4));
    let cart = Arc::new(cart);
    recorder.offer_at(&trace(1, &cart, "run", SECOND), BASE_NS);
    recorder.offer_at(&failed(trace(2, &cart, "run", 10), "unreachable"), BASE_NS);
    let mut later = trace(3, &process(99), "other", 20);
    later.root.start_ns += 60 * SECOND;
    later.root.end_ns += 60 * SECOND;
    recorder.offer_at(&later, BASE_NS);
    let cases = [
        ("pod=cart", vec![1, 2]),
        ("pod=uid-cart", vec![1, 2]),
        ("namespace=shop&outcome=failed", vec![2]),
        ("outcome=unreachable", vec![2]),
        ("outcome=ok", vec![1, 3]),
        ("container=app", vec![1, 2]),
        ("container=0123456789ab", vec![1, 2]),
        ("container=0123", vec![]),
        ("process=99", vec![3]),
        ("process=edge-host", vec![1, 2, 3]),
        ("module=policy.wasm", vec![1, 2, 3]),
        ("module=3f9ac2000000&export=other", vec![3]),
        ("min_duration=1ms", vec![1]),
        ("kept_because=failed", vec![2]),
        ("since=1700000030", vec![3]),
        ("until=1700000030", vec![1, 2]),
        ("until=2023-11-14T22:13:50Z", vec![1, 2]),
        ("since=1700000001&until=1700000002", vec![1]),
    ];
    for (words, expected) in cases {
        let uri: axum::http::Uri = format!("/?{words}").parse().unwrap();
        let axum::extract::Query(question) = axum::extract::Query::<Question>::try_from_uri(&uri).unwrap();
        let mut numbers: Vec<u8> = asked(&recorder, question)
            .iter()
            .map(|summary| summary.trace_id.0[15] - 1)
            .collect();
        numbers.sort_unstable();
        assert_eq!(numbers, expected, "{words}");
    }
}

#[derive(Clone, Debug)]
struct Offer {
    after_ns: u64,
    pod: u8,
    export: u8,
    duration_ns: u64,
    fails: bool,
    calls: u64,
}

fn offers() -> impl Strategy<Value = Vec<Offer>> {
    let offer = (
        prop_oneof![4 => 0..SECOND, 1 => 0..30 * SECOND],
        0..4_u8,
        0..3_u8,
        0..1_000_u64,
        any::<bool>(),
        prop_oneof![6 => 0..4_u64, 1 => 0..80_u64],
    );
    let offer = offer.prop_map(|(after_ns, pod, export, duration_ns, fails, calls)| Offer {
        after_ns,
        pod,
        export,
        duration_ns,
        fails,
        calls,
    });
    proptest::collection::vec(offer, 1..250)
}

/// Offers them one after the other, with what was offered when.
fn run(recorder: &Recorder, offers: &[Offer], mut check: impl FnMut(&[(u64, Trace)])) {
    let pods: Vec<_> = (0..4).map(|pod| in_pod(&format!("pod-{pod}"), pod + 1)).collect();
    let mut offered = Vec::new();
    let mut now_ns = BASE_NS;
    for (number, offer) in (0..).zip(offers) {
        now_ns += offer.after_ns;
        let export = format!("export-{}", offer.export);
        let mut trace = trace(number, &pods[usize::from(offer.pod)], &export, offer.duration_ns);
        trace.root.children = calls(offer.calls, number);
        if offer.fails {
            trace = failed(trace, "unreachable");
        }
        recorder.offer_at(&trace, now_ns);
        offered.push((now_ns, trace));
        check(&offered);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

    #[test]
    fn the_budget_is_never_exceeded_and_every_trace_accounted_for(offers in offers(), keys in 16..20_u32) {
        let recorder = recorder(RecorderConfig { window_seconds: 80, max_keys: keys, ..RecorderConfig::default() });
        // Less than can be configured, so that few traces fill it.
        recorder.lock().keep.set_memory_bytes(40_000);
        run(&recorder, &offers, |offered| {
            let stats = recorder.stats();
            assert!(stats.bytes <= 40_000, "{stats:?}");
            assert_eq!(stats.bytes as usize, recorder.lock().keep.counted_bytes());
            assert_eq!(stats.offered, offered.len() as u64);
            assert_eq!(
                stats.offered,
                stats.traces + stats.not_wanted + stats.displaced + stats.window_passed + stats.losses().map(|loss| loss.count).sum::<u64>()
            );
        });
    }

    #[test]
    fn the_slowest_are_the_slowest_of_all_that_were_offered_in_the_window(offers in offers(), quota in 1..4_u32) {
        let config = RecorderConfig { window_seconds: 80, slowest_per_key: quota, failed_per_key: 0, random_per_key: 0, ..RecorderConfig::default() };
        let recorder = recorder(config);
        run(&recorder, &offers, |offered| {
            if offered.len() % 7 != 0 {
                return;
            }
            let interval = |at_ns: u64| at_ns / (80 * SECOND / INTERVALS);
            let now = interval(offered.last().unwrap().0);
            let kept = everything(&recorder);
            let mut expected: HashMap<(String, String), Vec<u64>> = HashMap::new();
            for (at_ns, trace) in offered {
                if interval(*at_ns) + INTERVALS >= now {
                    let key = (trace.process.place.pod_name.clone().unwrap(), keep::function(trace).unwrap().name.clone());
                    expected.entry(key).or_default().push(trace.root.duration_ns());
                }
            }
            for ((pod, export), mut durations) in expected {
                durations.sort_unstable_by(|a, b| b.cmp(a));
                durations.truncate(quota as usize);
                let of_key = kept.iter().filter(|summary| summary.pod.as_ref() == Some(&pod) && summary.export.as_ref() == Some(&export));
                let mut held: Vec<u64> = of_key.map(|summary| summary.duration_ns).collect();
                held.sort_unstable_by(|a, b| b.cmp(a));
                held.truncate(quota as usize);
                assert_eq!(held, durations, "{pod} {export}");
            }
        });
    }
}

#[test]
fn exports_of_one_name_in_two_modules_are_told_apart() {
    let recorder = recorder(RecorderConfig {
        slowest_per_key: 1,
        random_per_key: 0,
        ..RecorderConfig::default()
    });
    let process = process(7);
    let one = trace(1, &process, "run", 10);
    let mut two = trace(2, &process, "run", 5);
    let mut module = (*function("run").module).clone();
    module.hash = "000000000000".to_owned();
    two.root.kind = SpanKind::Invoke {
        function: Some(Arc::new(Function {
            module: Arc::new(module),
            ..(*function("run")).clone()
        })),
    };
    recorder.offer_at(&one, BASE_NS);
    recorder.offer_at(&two, BASE_NS);
    assert_eq!(everything(&recorder).len(), 2);
}
