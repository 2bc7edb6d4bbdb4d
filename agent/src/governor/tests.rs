//! Decisions on simulated processes and time.

use std::collections::BTreeMap;

use super::*;
use crate::process::hosts::FileId;

const SECOND: u64 = 1_000_000_000;

/// Processes that do so many host calls a second, as far as those are probed.
struct World {
    governor: Governor,
    now_ns: u64,
    /// Host calls, activations and syscalls a second, by process.
    rates: BTreeMap<u32, [u64; 3]>,
    counted: BTreeMap<u32, Sample>,
    changes: Vec<(u64, Change)>,
    /// Those that run the same file, whose probes they have or do without together.
    siblings: Vec<u32>,
}

impl World {
    fn new(config: GovernorConfig, rates: &[(u32, [u64; 3])]) -> Self {
        config.validate().unwrap();
        Self {
            governor: Governor::new(config, ProbeCosts::default(), 2),
            now_ns: SECOND,
            rates: rates.iter().copied().collect(),
            counted: BTreeMap::new(),
            changes: Vec::new(),
            siblings: Vec::new(),
        }
    }

    /// Lets time pass; every process uses a whole CPU.
    fn run(&mut self, seconds: u64) {
        for _ in 0..seconds * 10 {
            self.now_ns += SECOND / 10;
            let mut siblings = self.siblings.iter();
            let has_shared = siblings.any(|pid| self.governor.level(*pid) < Level::NoHostCalls);
            for (pid, [host_calls, activations, syscalls]) in &self.rates {
                let level = self.governor.level(*pid);
                let sample = self.counted.entry(*pid).or_insert(Sample {
                    pid: *pid,
                    cpu_ns: 0,
                    hits: [0; HIT_KINDS],
                    stepped_share: 0.0,
                    file: None,
                });
                let is_sibling = self.siblings.contains(pid);
                sample.file = is_sibling.then(FileId::default);
                sample.cpu_ns += SECOND / 10;
                if level < Level::NoHostCalls || (is_sibling && has_shared) {
                    sample.hits[HIT_HOST_CALL] += host_calls / 10;
                    sample.hits[HIT_HOST_CALL_END] += host_calls / 10;
                }
                sample.hits[HIT_ACTIVATION] += activations / 10;
                if level < Level::Nothing {
                    sample.hits[HIT_SYSCALL] += syscalls / 10;
                }
            }
            let due: Vec<_> = self
                .counted
                .values()
                .filter(|sample| self.governor.is_due(sample.pid, self.now_ns))
                .copied()
                .collect();
            for change in self.governor.tick(self.now_ns, &due) {
                self.changes.push((self.now_ns, change));
            }
        }
    }

    fn pauses(&self) -> Vec<u64> {
        let changes = self.changes.iter();
        changes
            .filter(|(_, change)| change.to > change.from)
            .map(|(at, _)| *at)
            .collect()
    }
}

fn config() -> GovernorConfig {
    GovernorConfig {
        node_budget_percent: 100.0,
        ..GovernorConfig::default()
    }
}

#[test]
fn a_process_within_its_budget_keeps_every_probe() {
    let mut world = World::new(config(), &[(1, [1_000, 1_000, 1_000])]);
    world.run(60);
    assert_eq!(world.changes, []);
    let (_, overhead) = world.governor.overheads().next().unwrap();
    assert!(overhead.ratio > 0.009 && overhead.ratio < 0.02, "{overhead:?}");
}

#[test]
fn a_process_that_mostly_waits_keeps_its_probes_within_the_floor_and_not_beyond() {
    let sample = |cpu_ns, count| {
        let mut hits = [0; HIT_KINDS];
        hits[HIT_SYSCALL] = count;
        Sample {
            pid: 1,
            cpu_ns,
            hits,
            stepped_share: 0.0,
            file: None,
        }
    };
    for (syscalls, is_paused) in [(6_000, false), (7_000, true)] {
        let mut governor = Governor::new(config(), ProbeCosts::default(), 2);
        assert_eq!(governor.tick(SECOND, &[sample(0, 0)]), []);
        // A hundredth of a CPU, of which no share would pay for them: 1,500 ns each, 10 ms a second are free.
        let changes = governor.tick(2 * SECOND, &[sample(SECOND / 100, syscalls)]);
        assert_eq!(!changes.is_empty(), is_paused, "{changes:?}");
    }
}

#[test]
fn host_calls_are_paused_first_and_nothing_else_if_that_is_enough() {
    let mut world = World::new(config(), &[(1, [400_000, 100, 1_000])]);
    world.run(1);
    let [(at_ns, change)] = world.changes[..] else {
        panic!("{:?}", world.changes)
    };
    assert_eq!((change.from, change.to), (Level::Full, Level::NoHostCalls));
    assert!(at_ns <= SECOND * 3 / 2, "{at_ns}");
}

#[test]
fn syscalls_are_paused_when_nothing_less_is_enough() {
    let mut world = World::new(config(), &[(1, [400_000, 100_000, 400_000])]);
    world.run(1);
    assert_eq!(world.changes[0].1.to, Level::Nothing);
    assert_eq!(
        Level::Nothing.paused(),
        [ProbeKind::HostCall, ProbeKind::Activation, ProbeKind::Syscall]
    );
}

#[test]
fn pauses_double_up_to_the_most_that_they_may_last() {
    let config = GovernorConfig {
        max_backoff_ms: 16_000,
        ..config()
    };
    let mut world = World::new(config, &[(1, [400_000, 0, 0])]);
    world.run(120);
    let pauses = world.pauses();
    let gaps: Vec<_> = pauses.windows(2).map(|pair| (pair[1] - pair[0]) / SECOND).collect();
    assert!(gaps.len() >= 6, "{gaps:?}");
    assert!(gaps.windows(2).take(3).all(|pair| pair[1] > pair[0]), "{gaps:?}");
    assert!(gaps.iter().all(|gap| *gap <= 22), "{gaps:?}");
    // What trying again costs is little beside what it saves.
    let probed = world.counted[&1].hits[HIT_HOST_CALL];
    assert!(probed < 400_000 * 120 / 20, "{probed}");
}

#[test]
fn probes_return_when_the_loop_is_over_and_stay() {
    let mut world = World::new(config(), &[(1, [400_000, 100_000, 0])]);
    world.run(5);
    assert_ne!(world.governor.level(1), Level::Full);
    world.rates.insert(1, [100, 100, 100]);
    world.run(30);
    assert_eq!(world.governor.level(1), Level::Full);
    let count = world.changes.len();
    world.run(300);
    assert_eq!(world.changes.len(), count);
}

#[test]
fn the_budget_of_the_node_takes_from_those_that_cost_most() {
    let config = GovernorConfig {
        process_budget_percent: 100.0,
        node_budget_percent: 1.0,
        ..GovernorConfig::default()
    };
    let mut world = World::new(config, &[(1, [1_000, 0, 0]), (2, [5_000, 0, 0]), (3, [1_000, 0, 0])]);
    world.run(2);
    assert_eq!(world.governor.level(2), Level::NoHostCalls);
    assert_eq!(
        (world.governor.level(1), world.governor.level(3)),
        (Level::Full, Level::Full)
    );
    assert!(world.governor.node_ratio() <= 0.01);
}

#[test]
fn those_paused_at_once_are_not_resumed_at_once() {
    let rates: Vec<_> = (1..=20).map(|pid| (pid, [400_000, 0, 0])).collect();
    let mut world = World::new(config(), &rates);
    world.run(4);
    let resumed = world.changes.iter().filter(|(_, change)| change.to < change.from);
    let times: std::collections::BTreeSet<_> = resumed.map(|(at, _)| *at).collect();
    assert!(times.len() > 1, "{times:?}");
}

#[test]
fn what_muted_probes_cost_is_counted_but_pauses_nothing_else_of_the_process() {
    // Nobody is known to share the file, and yet the probes stay where they are.
    let mut world = World::new(config(), &[(1, [0, 0, 0])]);
    world.run(1);
    let mut sample = world.counted[&1];
    let mut now_ns = world.now_ns;
    for _ in 0..20 {
        now_ns += SECOND;
        sample.cpu_ns += SECOND;
        sample.hits[HIT_HOST_CALL] += 300_000;
        world.governor.tick(now_ns, &[sample]);
        assert!(world.governor.level(1) <= Level::NoHostCalls);
    }
    let (_, overhead) = world.governor.overheads().next().unwrap();
    assert!(overhead.ratio > 0.3, "{overhead:?}");
}

#[test]
fn a_process_whose_paused_probes_stay_for_another_pays_no_more_than_its_budget() {
    let mut world = World::new(config(), &[(1, [400_000, 0, 0]), (2, [10, 0, 10]), (3, [10, 0, 10])]);
    world.siblings = vec![1, 2];
    world.run(3);
    assert_eq!(world.governor.level(1), Level::NoHostCalls);
    assert_eq!(
        world.governor.level(2),
        Level::NoHostCalls,
        "only so is anything detached"
    );
    assert_eq!(world.governor.level(3), Level::Full);
    // Trying again, of either, costs little in the long run.
    world.run(600);
    let hits = world.counted[&1].hits[HIT_HOST_CALL];
    assert!(hits < 400_000 * 600 / 20, "{hits}");
    assert_eq!(world.governor.level(3), Level::Full);

    // It is over, and all is as it was.
    world.rates.insert(1, [10, 0, 10]);
    world.run(600);
    assert_eq!([1, 2].map(|pid| world.governor.level(pid)), [Level::Full; 2]);
}

#[test]
fn a_sibling_keeps_its_probes_for_as_long_as_they_cost_the_others_little() {
    // 5,000 hits of 1,600 ns are 0.8 % of a CPU.
    let config = GovernorConfig {
        process_budget_percent: 2.0,
        ..config()
    };
    let mut world = World::new(config, &[(1, [5_000, 0, 0]), (2, [10, 0, 10])]);
    world.siblings = vec![1, 2];
    world.run(30);
    assert!(world.changes.iter().any(|(_, change)| change.pid == 1));
    assert!(!world.changes.iter().any(|(_, change)| change.pid == 2));
}

#[test]
fn one_that_uses_up_the_budget_of_the_node_leaves_the_others_their_probes() {
    let config = GovernorConfig {
        node_budget_percent: 1.0,
        ..GovernorConfig::default()
    };
    let others = (3..=6).map(|pid| (pid, [100, 100, 100]));
    let rates: Vec<_> = [(1, [400_000, 0, 0]), (2, [10, 0, 10])]
        .into_iter()
        .chain(others)
        .collect();
    let mut world = World::new(config, &rates);
    world.siblings = vec![1, 2];
    world.run(60);
    for pid in 3..=6 {
        assert!(!world.changes.iter().any(|(_, change)| change.pid == pid), "{pid}");
    }
    let seconds_over = world.pauses().len();
    assert!(seconds_over < 20, "{seconds_over}");
}

#[test]
fn what_muted_probes_cost_keeps_no_other_probes_paused() {
    // All is too much; then only host calls are, of which the probes stay where they are for another process.
    let mut world = World::new(config(), &[(1, [400_000, 100_000, 400_000])]);
    world.run(2);
    assert_eq!(world.governor.level(1), Level::Nothing);
    let mut sample = world.counted[&1];
    let mut now_ns = world.now_ns;
    let mut run = |governor: &mut Governor, host_calls: u64| {
        for _ in 0..1_200 {
            now_ns += SECOND / 10;
            sample.cpu_ns += SECOND / 10;
            sample.hits[HIT_HOST_CALL] += host_calls / 10;
            sample.hits[HIT_HOST_CALL_END] += host_calls / 10;
            governor.tick(now_ns, &[sample]);
        }
    };
    run(&mut world.governor, 300_000);
    assert_eq!(world.governor.level(1), Level::NoHostCalls);
    run(&mut world.governor, 100);
    assert_eq!(world.governor.level(1), Level::Full);
}

#[test]
fn switched_off_it_gives_everything_back() {
    let mut world = World::new(config(), &[(1, [400_000, 100_000, 400_000])]);
    world.run(2);
    assert_eq!(world.governor.level(1), Level::Nothing);
    world.governor.reconfigure(GovernorConfig {
        enabled: false,
        ..config()
    });
    world.run(2);
    assert_eq!(world.governor.level(1), Level::Full);
}

#[test]
fn values_out_of_range_are_refused() {
    let refused = |config: GovernorConfig| assert!(config.validate().is_err(), "{config:?}");
    refused(GovernorConfig {
        process_budget_percent: 0.0,
        ..config()
    });
    refused(GovernorConfig {
        node_budget_percent: f64::NAN,
        ..config()
    });
    refused(GovernorConfig {
        interval_ms: 1,
        ..config()
    });
    refused(GovernorConfig {
        min_backoff_ms: 400_000,
        ..config()
    });
    assert!(toml::from_str::<GovernorConfig>("proces_budget_percent = 1").is_err());
}

#[test]
fn what_the_probes_of_helper_threads_cost_is_in_the_account_and_paused_with_the_syscalls_they_are_for() {
    let mut world = World::new(config(), &[(1, [0, 0, 0])]);
    world.run(1);
    let mut sample = world.counted[&1];
    let mut now_ns = world.now_ns;
    let mut levels = Vec::new();
    for _ in 0..3 {
        now_ns += SECOND;
        sample.cpu_ns += SECOND;
        sample.hits[HIT_HELPER] += 300_000;
        world.governor.tick(now_ns, &[sample]);
        levels.push(world.governor.level(1));
    }
    assert!(levels.contains(&Level::Nothing), "{levels:?}");
}
