//! Code that claims to be of a version that is not known, or of one that it is not of.

use wasmscope_tests::agent::Agent;
use wasmscope_tests::captured::{Captured, NO_HOST_CALL};
use wasmscope_tests::environment::Kernel;
use wasmscope_tests::workload::{Counts, Numbers, Workload};

fn traced(version: &str, mode: &str) -> (Captured, Counts) {
    let arguments = [
        "--module-version",
        version,
        "--mode",
        mode,
        "--tasks",
        "4",
        "--threads",
        "2",
        "--calls",
        "25",
    ];
    let workload = Workload::ready(&arguments);
    let agent = Agent::json_of(&workload.pid());
    let counted = workload.run();
    (agent.captured(), counted)
}

#[test]
fn an_unknown_version_is_followed_as_its_own_code_says() {
    let Some(_kernel) = Kernel::acquire() else { return };
    for mode in ["sync", "async"] {
        let (seen, counted) = traced("99", mode);
        seen.assert_nothing_lost();
        seen.assert_well_formed();
        assert_eq!(seen.counts(), counted, "{mode}");
        assert_eq!(seen.traces[0].process.runtime_version.as_deref(), Some("99"));
    }
}

/// No more of anything than there was.
fn assert_not_invented(what: &str, found: &Numbers, made: &Numbers) {
    for (name, count) in found {
        let made = made.get(name).copied().unwrap_or_default();
        assert!(*count <= made, "{what} {name}: {count}, but there were {made}");
    }
}

#[test]
fn a_version_that_its_code_contradicts_is_counted_and_nothing_is_invented() {
    let Some(_kernel) = Kernel::acquire() else { return };
    let (seen, counted) = traced("36", "sync");
    assert!(seen.lost("symbols", "layout_unknown") >= 1, "{:?}", seen.capture.losses);
    let found = seen.counts();
    assert_not_invented("invocations of", &found.invocations, &counted.invocations);
    assert_not_invented("host calls of", &found.host_calls, &counted.host_calls);
    assert_not_invented("failures by", &found.traps, &counted.traps);
    for (host_call, syscalls) in &found.syscalls_by_host_call {
        let made = counted.syscalls_by_host_call.get(host_call);
        assert_ne!(host_call, NO_HOST_CALL, "{syscalls:?}");
        assert_not_invented(host_call, syscalls, made.unwrap_or(&Numbers::new()));
    }
}
