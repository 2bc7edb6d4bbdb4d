//! Probes that are paused for what they cost. Calls and activations whose end will not be seen are ended as unfinished, what
//! is known of requests is forgotten while syscalls are not seen, and traces say when it was.

use super::{Activation, Correlator, ProcessState};
use crate::span::{Bound, Outcome, Pause, ProbeKind, Span, SpanKind};

/// Pauses kept of one trace; the last of them covers all that follow.
const MAX_PAUSES: usize = 256;

impl Correlator {
    pub(super) fn pause(&mut self, at_ns: u64, pid: u32, probes: &[ProbeKind]) {
        let Some(state) = self.processes.get_mut(&pid) else {
            return;
        };
        state.pauses.retain(Pause::is_open);
        for probe in probes {
            if state.pauses.iter().any(|known| known.probe == *probe) {
                continue;
            }
            let pause = Pause {
                probe: *probe,
                start_ns: at_ns,
                end_ns: u64::MAX,
            };
            state.pauses.push(pause);
            let ended = state.threads.values_mut().filter_map(|thread| thread.ended.as_mut());
            let ended = ended.map(|(activation, _)| activation);
            for activation in state.activations.values_mut().chain(ended) {
                activation.add_pause(pause);
            }
        }
    }

    pub(super) fn silence(&mut self, at_ns: u64, pid: u32, probes: &[ProbeKind]) {
        let Some(state) = self.processes.get_mut(&pid) else {
            return;
        };
        if probes.contains(&ProbeKind::Syscall) {
            // They may be answered, and others read, unseen.
            state.requests.forget();
        }
        if probes.contains(&ProbeKind::Activation) {
            // They may end, and others begin in their place, unseen.
            self.close_process(pid, at_ns);
        } else if probes.contains(&ProbeKind::HostCall) {
            state.has_host_calls = false;
            let parents: Vec<_> = state.activations.values().filter_map(|a| a.parent).collect();
            for activation in state.activations.values_mut() {
                activation.is_muted = activation.open_call.is_some();
                // One that waits for a nested invocation runs until that is over.
                if !parents.contains(&activation.address) {
                    activation.close_muted(at_ns);
                }
            }
        }
    }

    pub(super) fn resume(&mut self, at_ns: u64, pid: u32, probes: &[ProbeKind]) {
        let Some(state) = self.processes.get_mut(&pid) else {
            return;
        };
        let ended = state.threads.values_mut().filter_map(|thread| thread.ended.as_mut());
        let ended = ended.map(|(activation, _)| activation);
        let activations = state.activations.values_mut().chain(ended);
        let known = activations.flat_map(|activation| &mut activation.pauses);
        for pause in state.pauses.iter_mut().chain(known) {
            if pause.is_open() && probes.contains(&pause.probe) {
                pause.end_ns = at_ns;
            }
        }
        if probes.contains(&ProbeKind::Syscall) {
            // Read before the pause, and told of only after it began to be silent.
            state.requests.forget();
        }
        if probes.contains(&ProbeKind::HostCall) {
            state.has_host_calls = false;
            for activation in state.activations.values_mut() {
                // The nested invocation that it waits for is not over, so its end will be seen after all.
                activation.is_muted = false;
            }
        }
        if probes.contains(&ProbeKind::Activation) {
            // What was inferred meanwhile may be over.
            self.close_process(pid, at_ns);
        }
    }
}

impl ProcessState {
    /// Those that something which begins now overlaps.
    pub(super) fn pauses_at(&self, at_ns: u64) -> Vec<Pause> {
        let pauses = self.pauses.iter().copied();
        pauses.filter(|pause| pause.end_ns > at_ns).collect()
    }
}

impl Pause {
    fn is_open(&self) -> bool {
        self.end_ns == u64::MAX
    }
}

impl Activation {
    fn add_pause(&mut self, pause: Pause) {
        match self.pauses.len() {
            ..MAX_PAUSES => self.pauses.push(pause),
            _ => self.lose("correlate", "pause_limit", 1),
        }
    }

    /// The last moment at which a call is known to have run, if probes that would have seen its end were paused after it began.
    pub(super) fn silenced_ns(&self, call: &Span) -> Option<u64> {
        let mut pauses = self.pauses.iter();
        let pause = pauses.find(|pause| pause.probe == ProbeKind::HostCall && pause.end_ns > call.start_ns)?;
        let children = call.children.iter().map(|child| child.end_ns);
        Some(children.fold(pause.start_ns.max(call.start_ns), u64::max))
    }

    /// Whether host calls were paused after the last one that was seen began.
    pub(super) fn may_miss_calls(&self) -> bool {
        let is_call = |child: &&Span| matches!(child.kind, SpanKind::HostCall { .. });
        let last = self.span.children.iter().rev().find(is_call);
        let since_ns = last.map_or(self.span.start_ns, |call| call.start_ns);
        let mut pauses = self.pauses.iter();
        pauses.any(|pause| pause.probe == ProbeKind::HostCall && pause.end_ns > since_ns)
    }

    /// Ends the open call if its end will not be seen; nothing is in it any more.
    pub(super) fn close_muted(&mut self, at_ns: u64) {
        if !std::mem::take(&mut self.is_muted) {
            return;
        }
        if let Some(mut call) = self.open_call.take() {
            call.end_ns = at_ns.max(call.start_ns);
            call.end_bound = Bound::Open;
            call.outcome = Outcome::Unfinished;
            let runtime_call = self.open_runtime_call.take();
            self.add(call);
            self.open_runtime_call = runtime_call;
        }
    }
}

/// The parts of pauses that lie within a span, by when they began.
pub(super) fn within(span: &Span, pauses: &[Pause]) -> Vec<Pause> {
    let mut parts: Vec<_> = pauses
        .iter()
        // It may be known of before what it does not overlap any more.
        .filter(|pause| pause.start_ns <= span.end_ns && pause.end_ns >= span.start_ns)
        .map(|pause| Pause {
            probe: pause.probe,
            start_ns: pause.start_ns.clamp(span.start_ns, span.end_ns),
            end_ns: pause.end_ns.clamp(span.start_ns, span.end_ns),
        })
        .collect();
    parts.sort_unstable_by_key(|pause| (pause.start_ns, pause.probe));
    parts
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        event::{Coverage, Event, EventKind},
        span::{Place, Process, Trace},
    };

    /// A process whose activation at 4096 runs from 10 on, and calls the host at 20.
    fn running() -> Correlator {
        running_with(false)
    }

    fn running_with(unwinds: bool) -> Correlator {
        let mut correlator = Correlator::new();
        let process = Process {
            pid: 1,
            start_ns: 1,
            command: "host".to_owned(),
            runtime_name: "wasmtime".to_owned(),
            runtime_version: None,
            limits: Vec::new(),
            place: Place::default(),
        };
        let coverage = Coverage {
            activations: true,
            host_calls: true,
            host_call_ends: true,
            unwinds,
        };
        let process = process.into();
        push(&mut correlator, 0, EventKind::Process { process, coverage });
        push(&mut correlator, 10, swap(0, 4096));
        push(&mut correlator, 20, host_call());
        correlator
    }

    fn push(correlator: &mut Correlator, at_ns: u64, kind: EventKind) {
        correlator.push(Event {
            at_ns,
            pid: 1,
            tid: 1,
            kind,
        });
    }

    fn swap(old: u64, new: u64) -> EventKind {
        EventKind::ActivationSwap {
            old: Some(old),
            new,
            stack_pointer: 4000,
            entry: None,
        }
    }

    fn host_call() -> EventKind {
        EventKind::HostCall {
            activation: 4096,
            entry: None,
            import: None,
            frame: 3000,
            stack: Vec::new(),
            truncated: false,
        }
    }

    fn only(correlator: &mut Correlator) -> Trace {
        let mut traces = correlator.take_finished();
        assert_eq!(traces.len(), 1);
        traces.remove(0)
    }

    fn host_calls() -> Vec<ProbeKind> {
        vec![ProbeKind::HostCall]
    }

    #[test]
    fn a_host_call_that_is_open_when_probes_are_paused_is_unfinished_and_the_invocation_is_not() {
        let mut correlator = running();
        push(&mut correlator, 30, EventKind::ProbesPaused { probes: host_calls() });
        push(&mut correlator, 32, EventKind::ProbesSilent { probes: host_calls() });
        push(&mut correlator, 60, EventKind::ProbesResumed { probes: host_calls() });
        push(&mut correlator, 90, swap(4096, 0));
        let trace = only(&mut correlator);
        assert_eq!((trace.root.end_ns, trace.root.end_bound), (90, Bound::Exact));
        let call = &trace.root.children[0];
        assert_eq!(
            (call.end_ns, call.end_bound, &call.outcome),
            (32, Bound::Open, &Outcome::Unfinished)
        );
        let pause = Pause {
            probe: ProbeKind::HostCall,
            start_ns: 30,
            end_ns: 60,
        };
        assert_eq!(trace.pauses, [pause]);
    }

    #[test]
    fn a_call_whose_invocation_ends_before_silence_is_no_longer_than_it_was_seen() {
        let mut correlator = running();
        push(&mut correlator, 30, EventKind::ProbesPaused { probes: host_calls() });
        push(&mut correlator, 50, swap(4096, 0));
        let trace = only(&mut correlator);
        let call = &trace.root.children[0];
        assert_eq!((call.end_ns, call.end_bound), (30, Bound::Open));
        assert_eq!(trace.pauses.len(), 1);
    }

    #[test]
    fn a_failure_is_unknown_unless_a_host_call_was_seen_after_they_were_paused() {
        // An end without a call, one in a call of before, one in a call of after.
        for (call_at_ns, outcome) in [
            (None, Outcome::Unknown),
            (Some(25), Outcome::Unknown),
            (Some(70), Outcome::HostError),
        ] {
            let mut correlator = running_with(true);
            let end = |at_ns, correlator: &mut Correlator| {
                let kind = EventKind::HostCallEnd {
                    frame: 3000,
                    succeeded: true,
                };
                push(correlator, at_ns, kind);
            };
            end(22, &mut correlator);
            for at_ns in call_at_ns.into_iter().filter(|at_ns| *at_ns < 30) {
                push(&mut correlator, at_ns, host_call());
            }
            push(&mut correlator, 30, EventKind::ProbesPaused { probes: host_calls() });
            if call_at_ns.is_none() {
                push(&mut correlator, 32, EventKind::ProbesSilent { probes: host_calls() });
            }
            if outcome == Outcome::HostError {
                push(&mut correlator, 60, EventKind::ProbesResumed { probes: host_calls() });
                push(&mut correlator, 70, host_call());
            }
            push(&mut correlator, 90, swap(4096, 0));
            push(&mut correlator, 91, EventKind::Unwind);
            assert_eq!(only(&mut correlator).root.outcome, outcome, "{call_at_ns:?}");
        }
    }

    #[test]
    fn what_began_during_a_pause_says_so_even_if_it_is_handled_later() {
        let mut correlator = running();
        push(&mut correlator, 30, EventKind::ProbesPaused { probes: host_calls() });
        push(&mut correlator, 40, swap(4096, 0));
        push(&mut correlator, 60, EventKind::ProbesResumed { probes: host_calls() });
        push(&mut correlator, 50, swap(0, 4096));
        push(&mut correlator, 55, swap(4096, 0));
        push(&mut correlator, 70, swap(0, 4096));
        push(&mut correlator, 75, swap(4096, 0));
        let traces = correlator.take_finished();
        let counts: Vec<_> = traces.iter().map(|trace| trace.pauses.len()).collect();
        assert_eq!(counts, [1, 1, 0]);
    }

    #[test]
    fn a_request_read_before_a_pause_is_nobodys_after_it() {
        for is_silent in [true, false] {
            let mut correlator = running();
            push(&mut correlator, 25, swap(4096, 0));
            correlator.take_finished();
            let parent = format!("00-{:032x}-{:016x}-01", 1, 2);
            let request = EventKind::HttpRequest {
                descriptor: 5,
                task: 7,
                is_exclusive: false,
                parent: crate::span::Parent::parse(parent.as_bytes(), crate::span::ParentSource::Request),
                problem: None,
            };
            let probes = || vec![ProbeKind::Syscall];
            push(&mut correlator, 30, request);
            push(&mut correlator, 40, EventKind::ProbesPaused { probes: probes() });
            if is_silent {
                push(&mut correlator, 42, EventKind::ProbesSilent { probes: probes() });
            } else {
                push(&mut correlator, 60, EventKind::ProbesResumed { probes: probes() });
            }
            push(&mut correlator, 70, EventKind::Task { task: 7 });
            push(&mut correlator, 70, swap(0, 4096));
            push(&mut correlator, 80, swap(4096, 0));
            assert_eq!(only(&mut correlator).parent, None);
        }
    }

    #[test]
    fn activations_that_are_open_when_their_probes_are_paused_are_unfinished() {
        let mut correlator = running();
        let probes = || vec![ProbeKind::Activation];
        push(&mut correlator, 30, EventKind::ProbesPaused { probes: probes() });
        push(&mut correlator, 32, EventKind::ProbesSilent { probes: probes() });
        let trace = only(&mut correlator);
        assert_eq!(
            (trace.root.end_bound, &trace.root.outcome),
            (Bound::Open, &Outcome::Unfinished)
        );
        assert_eq!(trace.pauses[0].probe, ProbeKind::Activation);
        // The next one may lie at the same address.
        push(&mut correlator, 60, EventKind::ProbesResumed { probes: probes() });
        push(&mut correlator, 70, swap(0, 4096));
        push(&mut correlator, 80, swap(4096, 0));
        let trace = only(&mut correlator);
        assert_eq!(
            (trace.root.start_ns, trace.root.end_ns, &trace.pauses[..]),
            (70, 80, &[][..])
        );
        assert_eq!(correlator.take_losses(), []);
    }
}
