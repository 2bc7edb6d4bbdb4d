//! Each level of the governor, reached by load and left by configuration and by calm: what is still probed is counted exactly, what is
//! not is not there, and metrics and traces say so.

use std::path::{Path, PathBuf};
use std::time::Instant;

use wasmscope_tests::environment::{self, Kernel};
use wasmscope_tests::otlp_receiver::{Answer, Receiver};
use wasmscope_tests::running::DEADLINE;
use wasmscope_tests::samples::sums;
use wasmscope_tests::workload::{Numbers, Workload};

use crate::agent::Node;

/// Of each kind, in what is measured.
const MEASURED: u64 = 100;
/// In each step of what is too much; one trace of them has all its spans.
const TOO_MUCH: u64 = 3_000;
/// The levels, by what is paused at them.
const PROBES: [&str; 3] = ["host_call", "activation", "syscall"];

/// What the kernel counted.
#[derive(Clone, Debug, Default, PartialEq)]
struct Seen {
    invocations: Numbers,
    host_calls: Numbers,
    writes: u64,
}

/// The program, and what it was told to do.
struct Told {
    workload: Workload,
    lines: usize,
    sum: Seen,
}

impl Told {
    fn ready() -> Self {
        Self::ready_as(&environment::test_host("workload"))
    }

    fn ready_as(program: &Path) -> Self {
        Self {
            workload: Workload::ready_as(program, &["--scenario", "phases"]),
            lines: 0,
            sum: Seen::default(),
        }
    }

    fn tell(&mut self, what: &str, count: u64) {
        self.workload.0.send(&format!("{what} {count}"));
        self.lines += 1;
        // Before them, it was ready.
        self.workload.0.wait_for_lines(1 + self.lines);
        let (export, invocations, import) = match what {
            "enter" => ("enter", count, None),
            "leave" => ("leave", 1, Some("host.add")),
            _ => ("run", 1, Some("host.write")),
        };
        *self.sum.invocations.entry(export.to_owned()).or_default() += invocations;
        if let Some(import) = import {
            *self.sum.host_calls.entry(import.to_owned()).or_default() += count;
        }
        if what == "write" {
            self.sum.writes += count;
        }
    }

    fn measure(&mut self) {
        for what in ["enter", "leave", "write"] {
            self.tell(what, MEASURED);
        }
    }
}

struct Watcher<'a> {
    node: Node,
    python: &'a Path,
}

impl Watcher<'_> {
    fn seen(&self) -> Seen {
        let samples = self.node.scrape(self.python);
        let syscalls = sums(&samples, "wasm_syscalls_total", "syscall");
        Seen {
            invocations: sums(&samples, "wasm_invocations_total", "export"),
            host_calls: sums(&samples, "wasm_host_calls_total", "import"),
            writes: syscalls.get("write").copied().unwrap_or(0),
        }
    }

    /// Waits until this holds of what the kernel counted.
    fn wait_for(&self, what: &str, holds: impl Fn(&Seen) -> bool) -> Seen {
        let begun = Instant::now();
        loop {
            let seen = self.seen();
            if holds(&seen) {
                return seen;
            }
            assert!(begun.elapsed() < *DEADLINE, "{what}: {seen:?}");
        }
    }

    /// Waits until all that is seen at every level of this test is counted, twice: what is read of the kernel's rows at a moment when a program
    /// works may have what it did last and not what it did before.
    fn settled(&self, told: &mut [Told]) -> Seen {
        for _ in 0..2 {
            told[0].tell("enter", 1);
            let mut sum = Seen::default();
            for one in told.iter() {
                sum.writes += one.sum.writes;
                for (export, count) in &one.sum.invocations {
                    *sum.invocations.entry(export.clone()).or_default() += count;
                }
            }
            self.wait_for("all", |seen| {
                seen.invocations == sum.invocations && seen.writes == sum.writes
            });
        }
        self.seen()
    }

    /// In how many of the levels the process is, and beyond.
    fn level(&self) -> usize {
        let samples = self.node.scrape(self.python);
        let paused = sums(&samples, "wasmscope_paused_processes", "probe");
        PROBES
            .iter()
            .take_while(|probe| paused.get(**probe).is_some_and(|count| *count > 0))
            .count()
    }

    fn wait_for_level(&self, level: usize) {
        let begun = Instant::now();
        while self.level() != level {
            assert!(begun.elapsed() < *DEADLINE, "level {level} is not reached");
        }
    }

    /// Lets the program do too much of something until that is not looked at any more.
    fn push(&self, told: &mut Told, what: &str, level: usize) {
        self.configure(true, 2, 3_600_000);
        let begun = Instant::now();
        while self.level() != level {
            assert!(begun.elapsed() < *DEADLINE, "{what} goes on: level {}", self.level());
            for _ in 0..5 {
                told.tell(what, TOO_MUCH);
            }
        }
        self.configure(true, 100, 3_600_000);
        assert_eq!(self.level(), level, "a larger budget does not end a pause");
    }

    fn configure(&self, is_enabled: bool, percent: u32, backoff_ms: u32) {
        let text = format!(
            "[log]\nfilter = \"info\"\n[governor]\nenabled = {is_enabled}\nprocess_budget_percent = {percent}.0\nprocess_floor_percent = 0.1\n\
             node_budget_percent = 100.0\ninterval_ms = 100\nmin_backoff_ms = {backoff_ms}\nmax_backoff_ms = {backoff_ms}\n"
        );
        self.node.reload(self.python, &text);
    }
}

/// The same program in a file of its own, whose probes are its own too.
fn copy(directory: &Path) -> PathBuf {
    let path = directory.join("workload");
    std::fs::copy(environment::test_host("workload"), &path).unwrap();
    path
}

/// What came between.
fn difference(after: &Seen, before: &Seen) -> Seen {
    let between = |after: &Numbers, before: &Numbers| {
        let all = after
            .iter()
            .map(|(name, count)| (name.clone(), count - before.get(name).unwrap_or(&0)));
        all.filter(|(_, count)| *count > 0).collect()
    };
    Seen {
        invocations: between(&after.invocations, &before.invocations),
        host_calls: between(&after.host_calls, &before.host_calls),
        writes: after.writes - before.writes,
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn at_each_level_what_is_probed_is_exact_and_what_is_not_is_said_to_be_paused() {
    let Some(_kernel) = Kernel::acquire() else { return };
    let Some(python) = environment::python() else { return };
    let receiver = Receiver::start(Answer::Accept).unwrap();
    let directory = tempfile::tempdir().unwrap();
    let (mut told, mut neighbour) = (Told::ready(), Told::ready_as(&copy(directory.path())));
    let watcher = Watcher {
        node: Node::start(&[
            ("OTEL_EXPORTER_OTLP_ENDPOINT", &receiver.endpoint()),
            ("WASMSCOPE_CAPTURE__RING_MIB", "64"),
            ("WASMSCOPE_TRACES__SAMPLING__TRACES_PER_SECOND", "1000000"),
            ("WASMSCOPE_TRACES__SAMPLING__BURST", "1000000"),
            ("WASMSCOPE_TRACES__QUEUE_TRACES", "1000000"),
            ("WASMSCOPE_TRACES__QUEUE_MIB", "512"),
        ]),
        python,
    };
    watcher.configure(true, 100, 3_600_000);
    told.workload.0.send_line();
    neighbour.workload.0.send_line();

    // Everything.
    told.measure();
    let all = told.sum.clone();
    watcher.wait_for("at the start", |seen| *seen == all);
    assert_eq!(watcher.level(), 0);

    // No host calls: none of the others is missed on the way, or at any time after.
    watcher.push(&mut told, "leave", 1);
    told.measure();
    let sum = told.sum.clone();
    let seen = watcher.wait_for("without host calls", |seen| {
        seen.invocations == sum.invocations && seen.writes == sum.writes
    });
    assert!(seen.host_calls["host.add"] < sum.host_calls["host.add"]);
    assert_eq!(seen.host_calls["host.write"], MEASURED);
    told.measure();
    let sum = told.sum.clone();
    let quiet = watcher.wait_for("without host calls", |seen| {
        seen.invocations == sum.invocations && seen.writes == sum.writes
    });
    assert_eq!(quiet.host_calls, seen.host_calls);

    // No activations either.
    watcher.push(&mut told, "enter", 2);
    told.measure();
    let sum = told.sum.clone();
    let seen = watcher.wait_for("without activations", |seen| seen.writes == sum.writes);
    assert!(seen.invocations["enter"] < sum.invocations["enter"] - MEASURED);
    assert_eq!(seen.invocations["run"] + 1, sum.invocations["run"]);
    assert_eq!(seen.host_calls, quiet.host_calls);

    // Nothing. The neighbour says when what was counted before has been read.
    watcher.push(&mut told, "write", 3);
    neighbour.tell("leave", 1);
    let before = watcher.wait_for("the neighbour", |now| {
        now.invocations["leave"] == seen.invocations["leave"] + 1
    });
    assert_eq!(before.invocations["enter"], seen.invocations["enter"]);
    assert_eq!(before.host_calls["host.add"], seen.host_calls["host.add"] + 1);
    assert!(before.writes < told.sum.writes);
    told.measure();
    neighbour.tell("leave", 1);
    let after = watcher.wait_for("the neighbour", |now| {
        now.invocations["leave"] == before.invocations["leave"] + 1
    });
    let one_call = Seen {
        invocations: Numbers::from([("leave".to_owned(), 1)]),
        host_calls: Numbers::from([("host.add".to_owned(), 1)]),
        writes: 0,
    };
    assert_eq!(difference(&after, &before), one_call);

    // Everything again, as that is what the configuration says.
    watcher.configure(false, 5, 3_600_000);
    watcher.wait_for_level(0);
    told.measure();
    watcher.wait_for("everything again", |seen| difference(seen, &after) == all);

    // A pause ends by itself when there is no reason for it any more.
    let (sum, again) = (told.sum.clone(), watcher.seen());
    watcher.configure(true, 2, 200);
    let begun = Instant::now();
    while watcher.level() == 0 {
        assert!(begun.elapsed() < *DEADLINE, "nothing is paused");
        for _ in 0..5 {
            told.tell("leave", TOO_MUCH);
        }
    }
    watcher.configure(true, 100, 200);
    watcher.wait_for_level(0);
    let only_leaves = difference(&told.sum, &sum);
    let calm = watcher.wait_for("after calm", |seen| {
        difference(seen, &again).invocations == only_leaves.invocations
    });
    assert!(difference(&calm, &again).host_calls["host.add"] < only_leaves.host_calls["host.add"]);
    told.measure();
    watcher.wait_for("after calm", |seen| difference(seen, &calm) == all);
    let samples = watcher.node.scrape(python);
    let paused = sums(&samples, "wasmscope_site_paused_seconds_total", "probe");
    assert_eq!(
        paused.keys().map(String::as_str).collect::<Vec<_>>(),
        ["activation", "host_call", "syscall"]
    );

    for told in [told, neighbour] {
        drop(told.workload.0.finish().succeeded());
    }
    let last = watcher.seen().invocations;
    watcher.node.agent.signal(rustix::process::Signal::TERM);
    watcher.node.agent.finish().succeeded();

    // Traces tell of as many invocations as the metrics, and of the pauses in them.
    let roots: Vec<_> = receiver
        .spans()
        .into_iter()
        .filter(|span| span.parent_span_id.is_empty())
        .collect();
    for export in ["enter", "leave"] {
        let name = format!("crossings {export}");
        let count = roots.iter().filter(|span| span.name == name).count() as u64;
        assert_eq!(count, last[export], "{name}");
    }
    let said = |name: &str, probe: &str| {
        let key = format!("wasmscope.paused.{probe}_ns");
        let named = roots.iter().filter(|span| span.name == name);
        let said = named.filter(|span| span.attributes.iter().any(|attribute| attribute.key == key));
        said.count() as u64
    };
    assert!(said("crossings enter", "host_call") >= 2 * MEASURED);
    assert_ne!(said("crossings leave", "host_call"), 0);
    assert_ne!(said("writes run", "activation"), 0);
}

#[test]
fn probes_that_a_tight_loop_must_do_without_are_detached_from_its_siblings_too_and_from_nobody_else() {
    let Some(_kernel) = Kernel::acquire() else { return };
    let Some(python) = environment::python() else { return };
    let directory = tempfile::tempdir().unwrap();
    let mut all = [Told::ready(), Told::ready(), Told::ready_as(&copy(directory.path()))];
    let [busy, sibling, stranger] = [0, 1, 2];
    let watcher = Watcher {
        node: Node::start(&[("WASMSCOPE_CAPTURE__RING_MIB", "64")]),
        python,
    };
    watcher.configure(true, 100, 3_600_000);
    for told in &mut all {
        told.workload.0.send_line();
        told.measure();
    }
    let of_one = all[sibling].sum.clone();
    let of_all = watcher.settled(&mut all);
    assert_eq!(of_all.host_calls["host.write"], 3 * MEASURED);

    let paused = || {
        let samples = watcher.node.scrape(python);
        let paused = sums(&samples, "wasmscope_paused_processes", "probe");
        PROBES.map(|probe| paused.get(probe).copied().unwrap_or(0))
    };
    let without_host_calls = [2, 0, 0];
    watcher.configure(true, 2, 3_600_000);
    let begun = Instant::now();
    while paused() != without_host_calls {
        assert!(begun.elapsed() < *DEADLINE, "{:?}", paused());
        for _ in 0..5 {
            all[busy].tell("leave", TOO_MUCH);
        }
    }
    watcher.configure(true, 100, 3_600_000);

    // Who runs another file is seen in full.
    let before = watcher.settled(&mut all);
    all[stranger].measure();
    let after = watcher.wait_for("the stranger", |seen| difference(seen, &before) == of_one);
    // Who runs the same is not: neither is the loop.
    all[sibling].measure();
    all[busy].tell("leave", TOO_MUCH);
    let without = watcher.settled(&mut all);
    let between = difference(&without, &after);
    assert_eq!((between.host_calls, between.writes), (Numbers::new(), MEASURED));
    assert_eq!(paused(), without_host_calls);

    watcher.configure(false, 2, 3_600_000);
    watcher.wait_for_level(0);
    all[sibling].measure();
    watcher.wait_for("everything again", |seen| difference(seen, &without) == of_one);
    for told in all {
        drop(told.workload.0.finish().succeeded());
    }
}
