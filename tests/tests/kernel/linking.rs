//! Hosts that are linked in other ways than as position-independent programs with shared libraries.

use wasmscope_tests::agent::Agent;
use wasmscope_tests::environment::{self, Kernel, Linking};
use wasmscope_tests::workload::Workload;

/// A host linked otherwise is seen as any other.
fn is_seen_exactly(linking: Linking) {
    let Some(_kernel) = Kernel::acquire() else { return };
    let Some(program) = environment::linked_host(linking) else {
        return;
    };
    for arguments in [
        &["--tasks", "4", "--threads", "2", "--calls", "25", "--repeat", "2"][..],
        &["--mode", "async", "--tasks", "16", "--threads", "4", "--calls", "25"],
        &["--scenario", "cwasm", "--tasks", "2", "--threads", "2", "--calls", "25"],
    ] {
        let workload = Workload::ready_as(&program, arguments);
        let agent = Agent::json_of(&workload.pid());
        let counted = workload.run();
        let seen = agent.captured();
        seen.assert_nothing_lost();
        seen.assert_well_formed();
        assert_eq!(seen.counts(), counted);
        seen.assert_called_from("start", &["emit", "loop_emit", "start"]);
    }
}

#[test]
fn a_statically_linked_host_is_seen_exactly() {
    is_seen_exactly(Linking::Static);
}

#[test]
fn a_host_at_a_fixed_address_is_seen_exactly() {
    is_seen_exactly(Linking::Fixed);
}

#[test]
#[ignore = "slow: cargo xtask test --slow"]
fn a_static_musl_host_is_seen_exactly() {
    is_seen_exactly(Linking::Musl);
}
