//! What is written on arrows and notes: callees, arguments, results, failures, times.

use crate::span::{Bound, Function, Outcome, Role, Span, SpanKind, Suspend, Trace};

use super::draw::{Drawing, Scope, departs};
use super::label::{Spread, bytes, duration, grouped, visible};
use super::lifeline::Lifeline;
use super::runtime;
use super::select::ItemId;
use super::syscall;
use super::timeline::What;

/// Helper threads that are named on one arrow.
const MAX_NAMED_HELPERS: usize = 3;

impl<'t> Drawing<'_, 't> {
    pub(super) fn name(&self, name: &str) -> String {
        visible(name, self.max_name_chars)
    }

    pub(super) fn title(&self) -> String {
        let root = &self.trace.root;
        let what = match &root.kind {
            SpanKind::Invoke {
                function: Some(function),
            } => {
                format!("{} in {}", self.name(&function.name), self.name(&function.module.name))
            }
            _ => "unknown function".into(),
        };
        let how = match &root.outcome {
            _ if departs(root) => " · never returned".into(),
            _ if root.end_bound == Bound::Open => " · still running".into(),
            Outcome::Ok | Outcome::Refused | Outcome::Unknown => String::new(),
            Outcome::Trap { .. } => format!(" · {}", self.trap_words(0)),
            Outcome::HostError => " · host error".into(),
            Outcome::Exit => " · exited".into(),
            Outcome::Errno { errno } => format!(" · {}", syscall::error(*errno)),
            Outcome::Unfinished => " · cut off".into(),
        };
        format!("{what} · {}{how}", duration(root.duration_ns()))
    }

    /// What is written on a call: the callee, what is known of its arguments, the guest function it was made from when that changed.
    pub(super) fn call_label(
        &mut self,
        item: ItemId,
        span: &'t Span,
        scope: Scope<'t>,
        callee: Lifeline<'t>,
    ) -> String {
        let mut label = match &span.kind {
            SpanKind::Invoke {
                function: Some(function),
            } => {
                let name = self.name(&function.name);
                if callee == Lifeline::OtherGuests {
                    format!("{}.{name}", self.name(&function.module.name))
                } else {
                    name
                }
            }
            SpanKind::Invoke { function: None } => "function not known".into(),
            SpanKind::HostCall { import: Some(import) } => {
                let name = self.name(&import.name);
                if callee == Lifeline::OtherInterfaces {
                    format!("{}.{name}", self.name(&import.module))
                } else {
                    name
                }
            }
            SpanKind::HostCall { import: None } => "host call".into(),
            SpanKind::Syscall { name, .. } => {
                let arguments = syscall::arguments(name, self.common_arguments(item));
                let name = self.name(name);
                let call = if arguments.is_empty() {
                    name
                } else {
                    format!("{name} {arguments}")
                };
                match self.helpers(item) {
                    Some(helpers) => format!("{call} · {helpers}"),
                    None => call,
                }
            }
            SpanKind::Trap { .. } => String::new(),
            SpanKind::MemoryGrow(_) | SpanKind::TableGrow(_) => self.growth_wanted(item),
            SpanKind::Interruption(interruption) => runtime::interruption(interruption.cause).into(),
        };
        if scope.role == Some(Role::Invoke)
            && let Some(caller) = self.changed_caller(item, scope)
        {
            label = format!("{label} (from {caller})");
        }
        if span.start_bound == Bound::Open {
            label.push_str(" (already running when the window began)");
        }
        label
    }

    /// The guest functions that made these calls, unless they are those that were named last.
    pub(super) fn changed_caller(&mut self, item: ItemId, scope: Scope<'t>) -> Option<String> {
        let mut callers: Vec<&'t Function> = Vec::new();
        let mut caller_count = 0_u64;
        for caller in self.spans(item).filter_map(|span| span.stack.first()) {
            if !callers
                .iter()
                .any(|known| std::ptr::eq(*known, &raw const **caller) || *known == &**caller)
            {
                caller_count += 1;
                if callers.len() == 3 {
                    break;
                }
                callers.push(caller);
            }
        }
        let words = |function: &Function| {
            let name = self.name(&function.name);
            match scope.entered {
                Some(entered) if entered.module != function.module => {
                    format!("{}.{name}", self.name(&function.module.name))
                }
                _ => name,
            }
        };
        let text = match callers.as_slice() {
            [] => return None,
            _ if caller_count > 3 => "several functions".into(),
            _ => callers
                .iter()
                .map(|function| words(function))
                .collect::<Vec<_>>()
                .join(", "),
        };
        let entered = scope.entered.map(words);
        let last = self.last_caller.insert(scope.invocation, text.clone()).or(entered);
        (last.as_ref() != Some(&text)).then_some(text)
    }

    /// The helper threads that made these calls, if any did.
    fn helpers(&self, item: ItemId) -> Option<String> {
        let mut tids: Vec<u32> = Vec::new();
        for span in self.spans(item).filter(|span| span.is_on_helper()) {
            if !tids.contains(&span.tid) {
                tids.push(span.tid);
            }
            if tids.len() > MAX_NAMED_HELPERS {
                return Some("on several helper threads".into());
            }
        }
        let words = if tids.len() > 1 { "threads" } else { "thread" };
        let tids: Vec<String> = tids.iter().map(u32::to_string).collect();
        (!tids.is_empty()).then(|| format!("on helper {words} {}", tids.join(", ")))
    }

    /// The arguments that all members share.
    pub(super) fn common_arguments(&self, item: ItemId) -> syscall::Args {
        let mut common: Option<syscall::Args> = None;
        for span in self.spans(item) {
            if let SpanKind::Syscall { args, .. } = &span.kind {
                let known = common.get_or_insert(args.map(Some));
                for (known, argument) in known.iter_mut().zip(args) {
                    *known = known.filter(|known| known == argument);
                }
            }
        }
        common.unwrap_or_default()
    }

    /// What syscalls returned: the same for all, or the sum of what they moved; what growth came to.
    pub(super) fn result(&self, item: ItemId) -> Option<String> {
        let role = self.spans(item).next()?.role();
        match role {
            Role::MemoryGrow | Role::TableGrow => return self.growth_result(item),
            Role::Interruption => return Some("goes on".into()),
            _ => {}
        }
        let mut results = self.spans(item).filter_map(|span| match &span.kind {
            SpanKind::Syscall { name, result, .. } => Some((name.as_str(), *result)),
            _ => None,
        });
        let (name, first) = results.next()?;
        let mut is_same = true;
        let mut sum = u64::try_from(first).unwrap_or(0);
        for (_, result) in results {
            is_same &= result == first;
            sum = sum.saturating_add(u64::try_from(result).unwrap_or(0));
        }
        match (is_same, syscall::moves_bytes(name)) {
            (true, true) if self.selection.members(item).len() > 1 => {
                Some(format!("{} each", bytes(u64::try_from(first).unwrap_or(0))))
            }
            (true, _) => syscall::result(name, first),
            (false, true) => Some(format!("{} in all", bytes(sum))),
            (false, false) => None,
        }
    }

    pub(super) fn trap_words(&self, item: ItemId) -> String {
        // The trap itself, or the one that the invocation ended with.
        let traps = self.selection.members(item).iter().filter_map(|node| {
            let node = self.timeline.node(*node);
            // Building the error comes after it, and may make syscalls.
            let is_trap = |what: &What| matches!(what, What::Span(span) if span.role() == Role::Trap);
            let last = node
                .children()
                .rev()
                .map(|child| self.timeline.node(child).what)
                .find(is_trap);
            [Some(node.what), last]
                .into_iter()
                .flatten()
                .find_map(|what| match what {
                    What::Span(Span {
                        kind:
                            SpanKind::Trap {
                                code,
                                function,
                                native_offset,
                                wasm_offset,
                            },
                        ..
                    }) => Some((code, function.as_deref(), *native_offset, *wasm_offset)),
                    _ => None,
                })
        });
        let mut place = None;
        let mut is_one_place = true;
        for trap in traps {
            is_one_place &= *place.get_or_insert(trap) == trap;
        }
        let code = match (&place, self.first(item).what) {
            (Some((code, ..)), _) => code.as_str(),
            (
                None,
                What::Span(Span {
                    outcome: Outcome::Trap { code },
                    ..
                }),
            ) => code,
            _ => "unknown",
        };
        let mut words = format!("trap: {}", self.name(&code.replace('_', " ")));
        if let Some((_, Some(function), native_offset, wasm_offset)) = place {
            words = format!("{words} in {}", self.name(&function.name));
            if is_one_place {
                words = format!("{words} +{native_offset:#x}");
                if let Some(wasm_offset) = wasm_offset {
                    words = format!("{words} (wasm {wasm_offset:#x})");
                }
            }
        }
        words
    }

    /// How long an item took, and how much of it was its own.
    pub(super) fn time(&mut self, item: ItemId) -> String {
        let mark = self.mark_bounds(item);
        let members = self.selection.members(item);
        if let [node] = members {
            let node = self.timeline.node(*node);
            let all = node.duration_ns();
            let own = if node.children().is_empty() || node.own_ns == all {
                String::new()
            } else {
                format!(" (self {})", duration(node.own_ns))
            };
            return format!("{mark}{}{own}", duration(all));
        }
        format!("{mark}{}", self.spread(item).text())
    }

    /// The sign for how well the ends of these calls are known; remembered for the legend.
    pub(super) fn mark_bounds(&mut self, item: ItemId) -> &'static str {
        let (mut is_least, mut is_most) = (false, false);
        for span in self.spans(item) {
            is_least |= span.start_bound != Bound::Exact || span.end_bound == Bound::Open;
            is_most |= span.end_bound == Bound::Inferred;
        }
        self.marks.set(is_least, is_most)
    }
}

/// Where a fiber went.
pub(super) fn fiber_words(suspend: &Suspend) -> String {
    let from_tid = suspend.from_tid;
    match suspend.to_tid {
        _ if suspend.end_ns.is_none() => format!("fiber left thread {from_tid}, not resumed when the window ended"),
        Some(to_tid) if to_tid == from_tid => format!("fiber left thread {from_tid} and was resumed on it"),
        Some(to_tid) => format!("fiber left thread {from_tid}, resumed on {to_tid}"),
        None => format!("fiber left thread {from_tid}, not seen where it resumed"),
    }
}

/// How often and how long.
pub(super) fn loop_label(times: u32, mark: &str, spread: &Spread) -> String {
    format!(
        "{}× · {mark}{} · {} in all",
        grouped(u64::from(times)),
        spread.text(),
        duration(spread.total)
    )
}

/// `cold start 3.42 ms = deserialize 2.91 + instantiate 0.51`, if the call was the first since its module was loaded.
pub(super) fn cold_start(trace: &Trace, span: &Span) -> Option<String> {
    let cold = trace.starts.cold.iter().find(|cold| cold.is_of(span))?;
    // In order of first appearance; what a component does for each of its modules is one part.
    let mut parts: Vec<(&str, u64)> = Vec::new();
    for phase in cold.parts() {
        let (name, time) = (phase.kind.as_str(), phase.duration_ns());
        match parts.iter_mut().find(|(known, _)| *known == name) {
            Some((_, sum)) => *sum += time,
            None => parts.push((name, time)),
        }
    }
    if parts.is_empty() {
        let waited = duration(span.start_ns.saturating_sub(cold.published_ns));
        return Some(format!("cold start: first call, {waited} after its code was published"));
    }
    let all = cold.duration_ns();
    let scale = match all {
        0..1_000 => 1,
        1_000..1_000_000 => 10,
        1_000_000..1_000_000_000 => 10_000,
        _ => 10_000_000,
    };
    let unit = match all {
        0..1_000 => "ns",
        1_000..1_000_000 => "µs",
        1_000_000..1_000_000_000 => "ms",
        _ => "s",
    };
    // Hundredths of the unit, rounded so that the printed parts add up to the printed whole.
    let mut rounded: Vec<u64> = Vec::new();
    let (mut exact_sum, mut rounded_sum) = (0, 0);
    for (_, time) in &parts {
        exact_sum += time;
        let part = (exact_sum + scale / 2) / scale - rounded_sum;
        rounded_sum += part;
        rounded.push(part);
    }
    let number = |value: u64| match scale {
        1 => value.to_string(),
        _ => format!("{}.{:02}", grouped(value / 100), value % 100),
    };
    let shown: Vec<_> = parts
        .iter()
        .zip(rounded)
        .map(|((name, _), part)| format!("{name} {}", number(part)))
        .collect();
    Some(format!(
        "cold start {} {unit} = {}",
        number(rounded_sum),
        shown.join(" + ")
    ))
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::super::samples;
    use super::*;
    use crate::span::{ColdStart, Module, Phase, PhaseKind};

    fn cold(phases: &[(PhaseKind, u64, u64)]) -> Option<String> {
        let mut trace = samples::slow_request();
        trace.starts.cold = vec![ColdStart {
            invoked_ns: trace.root.start_ns,
            tid: trace.root.tid,
            module: Arc::new(Module {
                name: "policy.wasm".into(),
                hash: "3f9ac2000000".into(),
            }),
            published_ns: trace.root.start_ns,
            phases: phases
                .iter()
                .map(|(kind, start_ns, end_ns)| Phase {
                    kind: *kind,
                    start_ns: *start_ns,
                    end_ns: *end_ns,
                    tid: 1,
                })
                .collect(),
        }];
        let root = trace.root.clone();
        cold_start(&trace, &root)
    }

    #[test]
    fn the_parts_of_a_cold_start_add_up_as_printed_without_what_lies_inside_others() {
        let phases = [
            (PhaseKind::Deserialize, 1_000, 2_911_400),
            (PhaseKind::Publish, 2_000, 100_000),
            (PhaseKind::Instantiate, 3_000_000, 3_509_000),
        ];
        assert_eq!(
            cold(&phases).as_deref(),
            Some("cold start 3.42 ms = deserialize 2.91 + instantiate 0.51")
        );
        assert_eq!(
            cold(&[(PhaseKind::Publish, 0, 35_000)]).as_deref(),
            Some("cold start 35.00 µs = publish 35.00")
        );
        assert_eq!(
            cold(&[]).as_deref(),
            Some("cold start: first call, 0 ns after its code was published")
        );
    }
}
