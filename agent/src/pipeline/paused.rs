//! For how long probes were paused, by workload: what was counted before the name of a pod was known moves to the pod.

use std::collections::{BTreeMap, HashMap};

use super::governing::WorkloadKey;
use crate::span::ProbeKind;

/// Workloads told apart; the others are one.
pub(super) const MAX_WORKLOADS: usize = 500;
/// How long it is told of a workload for how long it was paused, after its last process.
const MEMORY_NS: u64 = 300_000_000_000;

/// Whose time it is: a process by id and start.
pub(super) type ProcessKey = (u32, u64);

/// Times by workload, and what each living process has added to them.
#[derive(Debug, Default)]
pub(super) struct PausedTimes {
    times_ns: BTreeMap<(WorkloadKey, ProbeKind), u64>,
    own: HashMap<ProcessKey, Own>,
    /// When a process of a workload was last watched.
    seen_ns: BTreeMap<WorkloadKey, u64>,
}

#[derive(Debug, Default)]
struct Own {
    /// As it was called last.
    workload: WorkloadKey,
    times_ns: BTreeMap<ProbeKind, u64>,
}

impl PausedTimes {
    /// Adds time in which probes of a process were paused.
    pub(super) fn add(&mut self, process: ProcessKey, workload: &WorkloadKey, probes: &[ProbeKind], passed_ns: u64) {
        self.rename(process, workload);
        for probe in probes {
            let is_told_apart = add(&mut self.times_ns, workload, *probe, passed_ns);
            // What went to the others stays there.
            if is_told_apart {
                let own = self.own.entry(process).or_default();
                own.workload.clone_from(workload);
                *own.times_ns.entry(*probe).or_default() += passed_ns;
            }
        }
    }

    /// Takes stock of the processes that are watched now, with what they are called now; others are gone.
    pub(super) fn watched(&mut self, now_ns: u64, running: impl Iterator<Item = (ProcessKey, WorkloadKey)>) {
        if self.times_ns.is_empty() {
            return;
        }
        let mut gone = std::mem::take(&mut self.own);
        for (process, workload) in running {
            if let Some(own) = gone.remove(&process) {
                self.own.insert(process, own);
                self.rename(process, &workload);
            }
            self.seen_ns.insert(workload, now_ns);
        }
        self.seen_ns
            .retain(|_, seen_ns| now_ns.saturating_sub(*seen_ns) < MEMORY_NS);
        let (seen_ns, other) = (&self.seen_ns, WorkloadKey::other());
        self.times_ns
            .retain(|(workload, _), _| *workload == other || seen_ns.contains_key(workload));
    }

    /// Whether there is nothing to tell.
    pub(super) fn is_empty(&self) -> bool {
        self.times_ns.is_empty()
    }

    /// By workload and probe, nanoseconds.
    pub(super) fn times_ns(&self) -> &BTreeMap<(WorkloadKey, ProbeKind), u64> {
        &self.times_ns
    }

    /// Moves what a process has added to what it is called now.
    fn rename(&mut self, process: ProcessKey, workload: &WorkloadKey) {
        // A name that is known once is not forgotten because nobody answers any more.
        let is_named = !workload.pod.is_empty();
        let Some(own) = self
            .own
            .get_mut(&process)
            .filter(|own| own.workload != *workload && (is_named || own.workload.pod.is_empty()))
        else {
            return;
        };
        let before = std::mem::replace(&mut own.workload, workload.clone());
        let times_ns = std::mem::take(&mut own.times_ns);
        for (probe, time_ns) in times_ns {
            if let Some(told_ns) = self.times_ns.get_mut(&(before.clone(), probe)) {
                *told_ns = told_ns.saturating_sub(time_ns);
                if *told_ns == 0 {
                    self.times_ns.remove(&(before.clone(), probe));
                }
            }
            if add(&mut self.times_ns, workload, probe, time_ns)
                && let Some(own) = self.own.get_mut(&process)
            {
                own.times_ns.insert(probe, time_ns);
            }
        }
    }
}

/// `false` if there is no room to tell the workload apart from the others.
fn add(
    times_ns: &mut BTreeMap<(WorkloadKey, ProbeKind), u64>,
    workload: &WorkloadKey,
    probe: ProbeKind,
    time_ns: u64,
) -> bool {
    let key = (workload.clone(), probe);
    let is_told_apart = times_ns.len() < MAX_WORKLOADS || times_ns.contains_key(&key);
    let key = if is_told_apart {
        key
    } else {
        (WorkloadKey::other(), probe)
    };
    *times_ns.entry(key).or_default() += time_ns;
    is_told_apart
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND_NS: u64 = 1_000_000_000;

    fn workload(pod: &str) -> WorkloadKey {
        WorkloadKey {
            pod: pod.to_owned(),
            process: "edge".to_owned(),
            ..WorkloadKey::default()
        }
    }

    fn told(times: &PausedTimes) -> Vec<(&str, u64)> {
        let pods = times.times_ns().iter();
        pods.map(|((workload, _), time_ns)| (workload.pod.as_str(), time_ns / SECOND_NS))
            .collect()
    }

    #[test]
    fn time_moves_to_the_pod_once_it_is_named_and_two_pods_with_one_command_are_two() {
        let mut times = PausedTimes::default();
        let (unnamed, probes) = (workload(""), [ProbeKind::HostCall]);
        for pid in [1, 2, 3] {
            times.add((pid, 0), &unnamed, &probes, SECOND_NS);
        }
        assert_eq!(told(&times), [("", 3)]);
        times.add((1, 0), &workload("first"), &probes, SECOND_NS);
        // Named while nothing of it is paused.
        let running = [(1, "first"), (2, "second"), (3, "")];
        let running = || running.iter().map(|(pid, pod)| ((*pid, 0), workload(pod)));
        times.watched(SECOND_NS, running());
        assert_eq!(told(&times), [("", 1), ("first", 2), ("second", 1)]);
        // Once is enough.
        times.watched(SECOND_NS, running());
        assert_eq!(told(&times), [("", 1), ("first", 2), ("second", 1)]);
    }

    #[test]
    fn what_is_gone_is_told_for_a_while_and_does_not_begin_again_while_its_workload_runs() {
        let mut times = PausedTimes::default();
        times.add((1, 0), &workload("pod"), &[ProbeKind::Syscall], SECOND_NS);
        times.add((2, 0), &workload("gone"), &[ProbeKind::Syscall], SECOND_NS);
        times.watched(0, [((1, 0), workload("pod")), ((2, 0), workload("gone"))].into_iter());
        // Its successor has its name.
        times.watched(MEMORY_NS - 1, [((3, 0), workload("pod"))].into_iter());
        assert_eq!(told(&times), [("gone", 1), ("pod", 1)]);
        times.watched(MEMORY_NS, [((3, 0), workload("pod"))].into_iter());
        assert_eq!(told(&times), [("pod", 1)]);
        assert!(times.own.is_empty());
    }

    #[test]
    fn no_more_workloads_are_told_apart_than_there_is_room_for_and_no_time_is_lost() {
        let mut times = PausedTimes::default();
        for pid in 0..1_000 {
            let workload = workload(&format!("pod-{pid}"));
            times.add((pid, 0), &workload, &[ProbeKind::Syscall], SECOND_NS);
        }
        assert_eq!(times.times_ns().len(), MAX_WORKLOADS + 1);
        assert_eq!(times.times_ns().values().sum::<u64>(), 1_000 * SECOND_NS);
    }
}
