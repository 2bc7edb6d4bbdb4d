//! Host functions that call back into guests, across instances and modules.

use wasmscope::span::{Role, Span, SpanKind};
use wasmscope_tests::agent::Agent;
use wasmscope_tests::captured::name_of;
use wasmscope_tests::environment::Kernel;
use wasmscope_tests::workload::Workload;

/// The names of the crossings on the way to `level3`, and how many ways there are.
fn ways_to_level3(span: &Span, way: &mut Vec<String>, ways: &mut Vec<Vec<String>>) {
    let name = match &span.kind {
        SpanKind::Invoke { function } => name_of(function.as_deref()),
        SpanKind::HostCall { import } => import.as_ref().map_or("?", |import| import.name.as_str()).to_owned(),
        _ => return,
    };
    way.push(name);
    if way.last().is_some_and(|name| name.ends_with("level3")) {
        ways.push(way.clone());
    }
    for child in &span.children {
        ways_to_level3(child, way, ways);
    }
    way.pop();
}

#[test]
fn three_levels_of_activations_nest_as_they_were_called() {
    let Some(_kernel) = Kernel::acquire() else { return };
    for mode in ["sync", "async"] {
        let arguments = [
            "--scenario",
            "nested",
            "--mode",
            mode,
            "--tasks",
            "6",
            "--threads",
            "3",
            "--calls",
            "20",
            "--repeat",
            "2",
        ];
        let workload = Workload::ready(&arguments);
        let agent = Agent::json_of(&workload.pid());
        let counted = workload.run();
        let seen = agent.captured();
        seen.assert_nothing_lost();
        seen.assert_well_formed();
        assert_eq!(seen.counts(), counted, "{mode}");
        assert_eq!(seen.traces.len(), 12, "one for each outermost invocation");
        for trace in &seen.traces {
            let mut ways = Vec::new();
            ways_to_level3(&trace.root, &mut Vec::new(), &mut ways);
            let way = ["nested/level1", "descend", "nested/level2", "cross", "inner/level3"].map(str::to_owned);
            assert_eq!(ways, vec![way.to_vec(); 20], "{mode}");
        }
    }
}

#[test]
fn a_nested_invocation_knows_the_guest_functions_that_led_to_it() {
    let Some(_kernel) = Kernel::acquire() else { return };
    let workload = Workload::ready(&["--scenario", "nested", "--calls", "3"]);
    let agent = Agent::json_of(&workload.pid());
    workload.run();
    let seen = agent.captured();
    let invokes = seen.traces[0].root.walk().filter(|span| span.role() == Role::Invoke);
    let stacks: Vec<Vec<&str>> = invokes.map(wasmscope_tests::captured::stack_names).collect();
    let round = [vec!["level1"], vec!["level2"]];
    assert_eq!(stacks, [&[vec![]][..], &round, &round, &round].concat());
}
