//! Every way in which an invocation can fail.

use wasmscope::span::{Outcome, Role, Span, SpanKind};
use wasmscope_tests::agent::Agent;
use wasmscope_tests::captured::{Captured, stack_names};
use wasmscope_tests::environment::Kernel;
use wasmscope_tests::workload::{Counts, UNCAUGHT_EXCEPTION, UNREACHABLE, Workload};

fn traced(mode: &str) -> (Captured, Counts) {
    let workload = Workload::ready(&[
        "--scenario",
        "traps",
        "--mode",
        mode,
        "--tasks",
        "2",
        "--threads",
        "2",
        "--calls",
        "5",
    ]);
    let agent = Agent::json_of(&workload.pid());
    let counted = workload.run();
    (agent.captured(), counted)
}

#[test]
fn each_kind_of_trap_ends_the_invocation_that_raised_it() {
    let Some(_kernel) = Kernel::acquire() else { return };
    for mode in ["sync", "async"] {
        let (seen, counted) = traced(mode);
        seen.assert_nothing_lost();
        seen.assert_well_formed();
        assert_eq!(seen.counts(), counted, "{mode}");
        for trace in &seen.traces {
            // Each export is named after how it ends.
            let SpanKind::Invoke {
                function: Some(function),
            } = &trace.root.kind
            else {
                panic!("{:?}", trace.root)
            };
            let expected = match function.name.as_str() {
                "ok" | "survive" | "caught" => Outcome::Ok,
                "host_error" => Outcome::HostError,
                "unreachable" => Outcome::Trap {
                    code: UNREACHABLE.to_owned(),
                },
                "uncaught_exception" => Outcome::Trap {
                    code: UNCAUGHT_EXCEPTION.to_owned(),
                },
                code => Outcome::Trap { code: code.to_owned() },
            };
            assert_eq!(trace.root.outcome, expected, "{mode} {}", function.name);
        }
    }
}

#[test]
fn a_trap_is_found_in_the_function_that_trapped() {
    let Some(_kernel) = Kernel::acquire() else { return };
    let (seen, _) = traced("sync");
    let traps = |export: &str| -> Vec<Vec<String>> {
        let of_export = |span: &&Span| matches!(&span.kind, SpanKind::Invoke { function: Some(f) } if f.name == export);
        let roots = seen.traces.iter().map(|trace| &trace.root).filter(of_export);
        let traps = roots.flat_map(Span::walk).filter(|span| span.role() == Role::Trap);
        traps
            .map(|trap| stack_names(trap).into_iter().map(str::to_owned).collect())
            .collect()
    };
    let ten = |stack: &[&str]| vec![stack.iter().map(|&name| name.to_owned()).collect::<Vec<_>>(); 10];
    assert_eq!(
        traps("memory_out_of_bounds"),
        ten(&["parse_rule", "memory_out_of_bounds"])
    );
    assert_eq!(traps("unreachable"), ten(&["reject", "unreachable"]));
    assert_eq!(traps("uncaught_exception"), ten(&["refuse", "uncaught_exception"]));
    assert_eq!(traps("caught"), [] as [Vec<String>; 0]);
    assert_eq!(
        traps("integer_division_by_zero"),
        ten(&["average", "integer_division_by_zero"])
    );
}

#[test]
fn a_host_error_ends_the_host_call_and_the_invocation() {
    let Some(_kernel) = Kernel::acquire() else { return };
    let (seen, counted) = traced("sync");
    let failed: Vec<_> = seen
        .traces
        .iter()
        .flat_map(|trace| trace.root.walk())
        .filter(|span| span.role() == Role::HostCall && span.outcome == Outcome::HostError)
        .map(|span| match &span.kind {
            SpanKind::HostCall { import: Some(import) } => import.name.clone(),
            other => panic!("{other:?}"),
        })
        .collect();
    assert_eq!(failed, vec!["fail"; counted.traps["host_error"] as usize]);
}
