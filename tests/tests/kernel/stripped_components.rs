//! Components in hosts without symbols: their host calls, once the functions have been learnt from one.

use wasmscope::span::{Bound, Outcome, Role, SpanKind};
use wasmscope_tests::agent::Agent;
use wasmscope_tests::captured::Captured;
use wasmscope_tests::environment::Kernel;
use wasmscope_tests::workload::{Counts, Workload};

use crate::bootstrap::{
    LEARNT, LOG, assert_lost_only_on_attaching, counted_and_held, of_process, perf_event_count, stripped_workload,
};
use crate::components::{ROUND, assert_same};

/// What was seen of a process that was learnt from and of one after it, of one stripped binary, with what they counted.
struct Pair {
    first: (Captured, Counts),
    second: (Captured, Counts),
}

fn learnt_and_remembered(arguments: &[&str], [lasting, brief]: [&[&str]; 2]) -> Pair {
    let (_directory, program) = stripped_workload();
    let arguments = [&["--scenario"], arguments, &["--hold"]].concat();
    // It runs until every way out has had its turn at the breakpoints.
    let lasting = [&arguments[..], lasting].concat();
    let mut first = Workload::ready_as(&program, &lasting);
    let mut second = Workload::ready_as(&program, &[&arguments[..], brief].concat());
    let pids = ["--pid", &first.pid(), "--pid", &second.pid()];
    let agent = Agent::watching_with(pids.iter().chain(&["--format", "json"]), &LOG);
    let learnt_from = counted_and_held(&mut first);
    agent.0.stderr_line(|line| line.contains(LEARNT));
    assert_eq!(perf_event_count(&agent), 0, "of breakpoints that have done their work");
    let counted = counted_and_held(&mut second);
    agent.interrupt();
    let all = agent.captured();
    assert_lost_only_on_attaching(&all);
    let pair = Pair {
        first: (of_process(&all, &first), learnt_from),
        second: (of_process(&all, &second), counted),
    };
    for workload in [first, second] {
        workload.0.finish().succeeded();
    }
    pair.first_has_no_more_than_it_made();
    pair
}

impl Pair {
    fn first_has_no_more_than_it_made(&self) {
        let (seen, made) = (&self.first.0.counts(), &self.first.1);
        assert_eq!(seen.invocations, made.invocations);
        assert_eq!(seen.syscalls(), made.syscalls());
        for (name, count) in &seen.host_calls {
            assert!(
                *count <= made.host_calls[name],
                "{name}: {count} of {:?}",
                made.host_calls
            );
        }
        for span in self.first.0.traces.iter().flat_map(|trace| trace.root.walk()) {
            let is_nameless = matches!(span.kind, SpanKind::HostCall { import: None });
            assert!(!is_nameless, "{span:?}");
        }
    }
}

/// Host calls, and how many of them have an end that was seen rather than inferred.
fn ends(seen: &Captured) -> (usize, usize) {
    let spans = seen.traces.iter().flat_map(|trace| trace.root.walk());
    let calls: Vec<_> = spans.filter(|span| span.role() == Role::HostCall).collect();
    let exact = calls.iter().filter(|call| call.end_bound == Bound::Exact).count();
    (calls.len(), exact)
}

#[test]
fn components_of_a_stripped_host_are_seen_exactly_once_another_process_of_it_has_been_learnt_from() {
    let Some(_kernel) = Kernel::acquire() else { return };
    for arguments in [
        &["components", "--tasks", "8", "--threads", "4", "--calls", "250"][..],
        &[
            "components",
            "--mode",
            "async",
            "--pooling",
            "--tasks",
            "8",
            "--threads",
            "4",
            "--calls",
            "100",
        ],
        &[
            "components-cwasm",
            "--mode",
            "async",
            "--tasks",
            "4",
            "--threads",
            "2",
            "--calls",
            "50",
            "--repeat",
            "3",
        ],
    ] {
        let Pair {
            second: (seen, counted),
            ..
        } = learnt_and_remembered(arguments, [&["--nap-us", "5000"], &[]]);
        assert!(counted.host_calls.values().sum::<u64>() >= ROUND * 600);
        assert_same(&seen, &counted, &Outcome::Unknown);
        let (calls, exact) = ends(&seen);
        assert_eq!(calls, exact, "ends of host calls that are inferred");
    }
}
