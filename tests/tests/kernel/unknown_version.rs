//! Code that claims to be of a version that is not known, or of one that it is not of.

use wasmscope_tests::agent::Agent;
use wasmscope_tests::captured::Captured;
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

/// Invocations without the name of their module, which is not read where the version is not known: the hash stands for it.
fn by_export(counts: &Counts) -> Vec<(&str, u64)> {
    let invocations = counts.invocations.iter();
    invocations
        .map(|(name, count)| (name.rsplit('/').next().unwrap_or_default(), *count))
        .collect()
}

#[test]
fn an_unknown_version_is_followed_as_its_own_code_says() {
    let Some(_kernel) = Kernel::acquire() else { return };
    for mode in ["sync", "async"] {
        let (seen, counted) = traced("99", mode);
        seen.assert_well_formed();
        let found = seen.counts();
        assert_eq!(by_export(&found), by_export(&counted), "{mode}");
        assert_eq!(found.syscalls(), counted.syscalls(), "{mode}");
        assert_eq!(
            (found.suspends, found.resumes, found.moves),
            (counted.suspends, counted.resumes, counted.moves)
        );
        // Where such a version keeps the imports of an instance is not known: each host call is there, and none has a name.
        let calls: u64 = counted.host_calls.values().sum();
        assert_eq!(found.host_calls, Numbers::from([("?".to_owned(), calls)]), "{mode}");
        assert_eq!(seen.lost("symbols", "import_unresolved"), calls);
        assert_eq!(seen.capture.losses.len(), 1, "{:?}", seen.capture.losses);
        assert_eq!(seen.traces[0].process.runtime_version.as_deref(), Some("99"));
    }
}

/// No more of anything than there was, and no more in all, with what has no name.
fn assert_not_invented(what: &str, found: &Numbers, made: &Numbers) {
    for (name, count) in found.iter().filter(|(name, _)| *name != "?") {
        let made = made.get(name).copied().unwrap_or_default();
        assert!(*count <= made, "{what} {name}: {count}, but there were {made}");
    }
    assert!(found.values().sum::<u64>() <= made.values().sum(), "{what} {found:?}");
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
    assert_not_invented("syscalls", &found.syscalls(), &counted.syscalls());
}
