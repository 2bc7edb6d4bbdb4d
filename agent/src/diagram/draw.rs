//! Turns selected calls into the steps of a sequence: lifelines, arrows, bars, loops, notes and their words.

use std::collections::HashMap;
use std::ops::Range;

use crate::span::{Bound, Capture, Function, Module, Outcome, Role, Span, SpanKind, Trace};

use super::Options;
use super::label::{Spread, bytes, counted, duration, grouped, visible};
use super::model::{Arrow, Bar, Group, Participant, ParticipantId, ParticipantKind, Sequence, Step, Totals};
use super::select::{ItemId, ItemSection, Selection};
use super::summary::{self, Marks};
use super::syscall;
use super::timeline::{Node, NodeId, Timeline, What};

/// Lifelines for guest modules; the rest share one.
const MAX_GUESTS: usize = 4;
/// Lifelines for modules of imports; the rest share one.
const MAX_INTERFACES: usize = 6;
/// Callees named in a note on folded calls.
const MAX_NAMED_CALLEES: usize = 4;

pub(super) fn draw(
    trace: &Trace,
    capture: &Capture,
    options: &Options,
    timeline: &Timeline,
    selection: &Selection,
    max_name_chars: usize,
) -> Sequence {
    let mut drawing = Drawing {
        trace,
        capture,
        timeline,
        selection,
        max_name_chars,
        lifelines: vec![Lifeline::Host],
        steps: Vec::new(),
        totals: timeline.totals,
        marks: Marks::default(),
        last_caller: HashMap::new(),
    };
    drawing.run();
    drawing.finish(options)
}

struct Drawing<'a, 't> {
    trace: &'t Trace,
    capture: &'a Capture,
    timeline: &'a Timeline<'t>,
    selection: &'a Selection,
    max_name_chars: usize,
    /// In order of first appearance; sorted at the end.
    lifelines: Vec<Lifeline<'t>>,
    steps: Vec<Step>,
    totals: Totals,
    marks: Marks,
    /// The guest function that was last named as caller inside an invocation.
    last_caller: HashMap<ItemId, String>,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash)]
enum Lifeline<'t> {
    Host,
    Guest(Option<&'t Module>),
    OtherGuests,
    Interface(Option<&'t str>),
    OtherInterfaces,
    Kernel,
}

/// Where a call is made from.
#[derive(Clone, Copy)]
struct Scope<'t> {
    participant: ParticipantId,
    /// The role of the call that is open there; `None` outside the outermost.
    role: Option<Role>,
    /// The innermost invocation and the function it entered.
    invocation: ItemId,
    entered: Option<&'t Function>,
}

/// What is left to do, innermost first.
enum Work<'t> {
    Item(ItemId, Scope<'t>),
    Close {
        item: ItemId,
        from: ParticipantId,
        to: ParticipantId,
        is_quiet: bool,
    },
    Folded {
        stretches: Vec<Range<ItemId>>,
        scope: Scope<'t>,
    },
    Inside {
        item: ItemId,
        scope: Scope<'t>,
    },
    LoopBegin(String),
    LoopEnd,
}

impl<'t> Drawing<'_, 't> {
    fn run(&mut self) {
        let outside = Scope {
            participant: 0,
            role: None,
            invocation: 0,
            entered: None,
        };
        let mut work = vec![Work::Item(0, outside)];
        while let Some(next) = work.pop() {
            match next {
                Work::Item(item, scope) => {
                    let mut inner = self.open(item, scope);
                    inner.reverse();
                    work.append(&mut inner);
                }
                Work::Close {
                    item,
                    from,
                    to,
                    is_quiet,
                } => self.close(item, from, to, is_quiet),
                Work::Folded { stretches, scope } => {
                    let selection = self.selection;
                    let items = stretches.into_iter().flatten();
                    let nodes: Vec<NodeId> = items.flat_map(|item| selection.members(item)).copied().collect();
                    self.note_folded(&nodes, scope, false);
                }
                Work::Inside { item, scope } => {
                    let members = self.selection.members(item);
                    let nodes: Vec<NodeId> = members
                        .iter()
                        .flat_map(|node| self.timeline.node(*node).children())
                        .collect();
                    self.note_folded(&nodes, scope, true);
                }
                Work::LoopBegin(label) => self.steps.push(Step::LoopBegin { label }),
                Work::LoopEnd => self.steps.push(Step::LoopEnd),
            }
        }
    }

    fn first(&self, item: ItemId) -> &Node<'t> {
        self.timeline.node(self.selection.members(item)[0])
    }

    fn spans(&self, item: ItemId) -> impl Iterator<Item = &'t Span> {
        self.selection
            .members(item)
            .iter()
            .filter_map(|node| match self.timeline.node(*node).what {
                What::Span(span) => Some(span),
                What::Suspend(..) => None,
            })
    }

    fn spread(&self, item: ItemId) -> Spread {
        let durations = self
            .selection
            .members(item)
            .iter()
            .map(|node| self.timeline.node(*node).duration_ns());
        Spread::of(durations.collect())
    }

    fn name(&self, name: &str) -> String {
        visible(name, self.max_name_chars)
    }

    /// Draws the start of an item and returns what comes after it, in order.
    fn open(&mut self, item: ItemId, scope: Scope<'t>) -> Vec<Work<'t>> {
        let span = match self.first(item).what {
            What::Suspend(..) => {
                self.suspended(item, scope);
                return Vec::new();
            }
            What::Span(span) if span.role() == Role::Trap => {
                let label = self.trap_words(item);
                self.note(scope.participant, scope.participant, vec![label]);
                // A trap calls nothing; should a trace say so, it is not lost.
                return self.inside(item, scope);
            }
            What::Span(span) => span,
        };
        let member_count = self.selection.members(item).len() as u64;
        self.totals.drawn_count += 1;
        self.totals.repeated_count += member_count - 1;

        let run_count = self.selection.item(item).run_count;
        if run_count > 1 {
            let mark = self.mark_bounds(item);
            let spread = self.spread(item);
            self.steps.push(Step::LoopBegin {
                label: loop_label(run_count, mark, &spread),
            });
        }
        let to = self.callee(span);
        let is_leaf = self
            .selection
            .members(item)
            .iter()
            .all(|node| self.timeline.node(*node).children().is_empty());
        // The loop already says how long it takes; a bare return would say nothing.
        let is_quiet = is_leaf && run_count > 1 && span.outcome == Outcome::Ok && span.end_bound != Bound::Open;
        let mut label = self.call_label(item, span, scope, self.lifelines[to]);
        if is_quiet && let Some(result) = self.result(item) {
            label = format!("{label} · {result}");
        }
        let bar = if is_quiet { Bar::Keep } else { Bar::Begin };
        self.steps.push(Step::Message {
            from: scope.participant,
            to,
            arrow: Arrow::Call,
            bar,
            label,
        });

        let inside = match &span.kind {
            SpanKind::Invoke { function } => Scope {
                participant: to,
                role: Some(Role::Invoke),
                invocation: item,
                entered: function.as_deref(),
            },
            _ => Scope {
                participant: to,
                role: Some(span.role()),
                ..scope
            },
        };
        let mut after = self.inside(item, inside);
        after.push(Work::Close {
            item,
            from: to,
            to: scope.participant,
            is_quiet,
        });
        after
    }

    /// What is inside an item that all its members have in common: shown items, and notes for the stretches between them.
    fn inside(&self, item: ItemId, scope: Scope<'t>) -> Vec<Work<'t>> {
        if self.selection.item(item).is_mixed {
            return vec![Work::Inside { item, scope }];
        }
        let mut after = Vec::new();
        let mut folded = Vec::new();
        let flush = |folded: &mut Vec<Range<ItemId>>, after: &mut Vec<Work<'t>>| {
            if !folded.is_empty() {
                after.push(Work::Folded {
                    stretches: std::mem::take(folded),
                    scope,
                });
            }
        };
        for ItemSection { reps, items, spread } in self.selection.sections(item) {
            let is_shown = |item: ItemId| self.selection.item(item).is_shown;
            if !items.clone().any(is_shown) {
                folded.push(items.clone());
                continue;
            }
            if *reps > 1 {
                flush(&mut folded, &mut after);
                after.push(Work::LoopBegin(loop_label(*reps, "", spread)));
            }
            for inner in items.clone() {
                if is_shown(inner) {
                    flush(&mut folded, &mut after);
                    after.push(Work::Item(inner, scope));
                } else {
                    folded.push(inner..inner + 1);
                }
            }
            if *reps > 1 {
                flush(&mut folded, &mut after);
                after.push(Work::LoopEnd);
            }
        }
        flush(&mut folded, &mut after);
        after
    }

    /// Draws how an item ended.
    fn close(&mut self, item: ItemId, from: ParticipantId, to: ParticipantId, is_quiet: bool) {
        if !is_quiet {
            self.draw_return(item, from, to);
        }
        if self.selection.item(item).run_count > 1 {
            self.steps.push(Step::LoopEnd);
        }
    }

    fn draw_return(&mut self, item: ItemId, from: ParticipantId, to: ParticipantId) {
        let What::Span(span) = self.first(item).what else {
            return;
        };
        let time = self.time(item);
        let is_invoke = span.role() == Role::Invoke;
        let is_unseen = span.end_bound == Bound::Open || span.outcome == Outcome::Unfinished;
        if is_unseen {
            let words = if span.end_bound == Bound::Open {
                "still running when the window ended"
            } else {
                "cut off: its thread or process ended first"
            };
            self.note(from, from, vec![format!("{words} · {time}")]);
            self.steps.push(Step::EndBar { at: from });
            return;
        }
        let (arrow, words) = match &span.outcome {
            Outcome::Ok | Outcome::Unfinished => (Arrow::Return, self.result(item)),
            Outcome::Trap { .. } => (Arrow::Failed, Some(self.trap_words(item))),
            Outcome::HostError if is_invoke => (Arrow::Failed, Some("unwound by a host error".into())),
            Outcome::HostError => (Arrow::Failed, Some("host error".into())),
            Outcome::Exit if is_invoke => (Arrow::Return, Some("exited".into())),
            Outcome::Exit => (Arrow::Return, Some("exit: does not return to the guest".into())),
            Outcome::Errno { errno } => (Arrow::Return, Some(syscall::error(*errno))),
            Outcome::Unknown => (Arrow::Return, Some("ended, not seen how".into())),
        };
        let label = words.map_or(time.clone(), |words| format!("{words} · {time}"));
        self.steps.push(Step::Message {
            from,
            to,
            arrow,
            bar: Bar::End,
            label,
        });
    }

    /// What is written on a call: the callee, what is known of its arguments, the guest function it was made from when that changed.
    fn call_label(&mut self, item: ItemId, span: &'t Span, scope: Scope<'t>, callee: Lifeline<'t>) -> String {
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
                if arguments.is_empty() {
                    name
                } else {
                    format!("{name} {arguments}")
                }
            }
            SpanKind::Trap { .. } => String::new(),
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
    fn changed_caller(&mut self, item: ItemId, scope: Scope<'t>) -> Option<String> {
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

    /// The arguments that all members share.
    fn common_arguments(&self, item: ItemId) -> syscall::Args {
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

    /// What syscalls returned: the same for all, or the sum of what they moved.
    fn result(&self, item: ItemId) -> Option<String> {
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

    fn trap_words(&self, item: ItemId) -> String {
        // The trap itself, or the one that the invocation ended with.
        let traps = self.selection.members(item).iter().filter_map(|node| {
            let node = self.timeline.node(*node);
            let last = node.children().next_back().map(|child| self.timeline.node(child).what);
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
                            },
                        ..
                    }) => Some((code, function.as_deref(), *native_offset)),
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
        if let Some((_, Some(function), offset)) = place {
            words = format!("{words} in {}", self.name(&function.name));
            if is_one_place {
                words = format!("{words} +{offset:#x}");
            }
        }
        words
    }

    /// How long an item took, and how much of it was its own.
    fn time(&mut self, item: ItemId) -> String {
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
    fn mark_bounds(&mut self, item: ItemId) -> &'static str {
        let (mut is_least, mut is_most) = (false, false);
        for span in self.spans(item) {
            is_least |= span.start_bound != Bound::Exact || span.end_bound == Bound::Open;
            is_most |= span.end_bound == Bound::Inferred;
        }
        self.marks.set(is_least, is_most)
    }

    fn suspended(&mut self, item: ItemId, scope: Scope<'t>) {
        let members = self.selection.members(item);
        let What::Suspend(suspend, _) = self.first(item).what else {
            return;
        };
        let spread = self.spread(item);
        let label = if members.len() > 1 {
            let times = u64::from(self.selection.item(item).run_count);
            format!(
                "suspended {}× · {} · {} in all",
                grouped(times),
                spread.text(),
                duration(spread.total)
            )
        } else {
            let threads = match suspend.to_tid {
                _ if suspend.end_ns.is_none() => format!(
                    "fiber left thread {}, not resumed when the window ended",
                    suspend.from_tid
                ),
                Some(to_tid) if to_tid == suspend.from_tid => {
                    format!("fiber left thread {to_tid} and was resumed on it")
                }
                Some(to_tid) => format!("fiber left thread {}, resumed on {to_tid}", suspend.from_tid),
                None => format!("fiber left thread {}, not seen where it resumed", suspend.from_tid),
            };
            format!("suspended {} ({threads})", duration(spread.total))
        };
        // The guest waits, and so does the host call that it waits in.
        let guest = self.guest_of(scope);
        self.steps.push(Step::Suspended {
            first: guest,
            last: scope.participant,
            label,
        });
    }

    fn guest_of(&mut self, scope: Scope<'t>) -> ParticipantId {
        match self.first(scope.invocation).what {
            What::Span(span) => self.callee(span),
            What::Suspend(..) => scope.participant,
        }
    }

    fn note(&mut self, first: ParticipantId, last: ParticipantId, lines: Vec<String>) {
        self.steps.push(Step::Note { first, last, lines });
    }

    /// Says what stands in place of these nodes and all that is inside them.
    fn note_folded(&mut self, nodes: &[NodeId], scope: Scope<'t>, is_inside: bool) {
        let mut call_count = 0;
        let mut total = 0_u64;
        let mut longest = 0;
        let mut callees: HashMap<(Lifeline<'t>, &'t str, Option<u16>), (u64, u64)> = HashMap::new();
        let mut target = scope.participant;
        for node in nodes.iter().map(|node| self.timeline.node(*node)) {
            call_count += node.call_count;
            let time = node.duration_ns();
            total = total.saturating_add(time);
            longest = longest.max(time);
            let callee = match node.what {
                What::Suspend(..) => (Lifeline::Host, "suspended", None),
                What::Span(span) => {
                    let lifeline = lifeline_of(span);
                    if let Some(known) = self.lifelines.iter().position(|known| *known == lifeline) {
                        target = known;
                    }
                    let errno = if let Outcome::Errno { errno } = span.outcome {
                        Some(errno)
                    } else {
                        None
                    };
                    (lifeline, callee_name(span), errno)
                }
            };
            let entry = callees.entry(callee).or_default();
            entry.0 += 1;
            entry.1 = entry.1.saturating_add(time);
        }
        if nodes.is_empty() {
            return;
        }
        self.totals.folded_count += call_count;
        let mut callees: Vec<_> = callees.into_iter().collect();
        callees.sort_unstable_by_key(|((_, name, errno), (count, time))| {
            (u64::MAX - time, u64::MAX - count, *name, *errno)
        });
        let rest = callees.len().saturating_sub(MAX_NAMED_CALLEES);
        let mut names: Vec<String> = callees
            .iter()
            .take(MAX_NAMED_CALLEES)
            .map(|((_, name, errno), (count, _))| {
                let error = errno
                    .map(|errno| format!(" {}", syscall::error(errno)))
                    .unwrap_or_default();
                let count = if *count == 1 {
                    String::new()
                } else {
                    format!(" {}×", grouped(*count))
                };
                format!("{}{error}{count}", self.name(name))
            })
            .collect();
        if rest > 0 {
            names.push(format!("{} more", grouped(rest as u64)));
        }
        let what = if call_count == 0 {
            "not drawn".into()
        } else {
            format!("{} folded", counted(call_count, "call"))
        };
        let place = if is_inside { " inside" } else { "" };
        let each = if nodes.len() > 1 {
            format!(", each at most {}", duration(longest))
        } else {
            String::new()
        };
        let lines = vec![format!("{what}{place} · {}{each}", duration(total)), names.join(", ")];
        self.note(scope.participant, target, lines);
    }

    /// The lifeline that a call goes to.
    fn callee(&mut self, span: &'t Span) -> ParticipantId {
        let wanted = lifeline_of(span);
        if let Some(known) = self.lifelines.iter().position(|known| *known == wanted) {
            return known;
        }
        let count =
            |is_counted: fn(&Lifeline) -> bool| self.lifelines.iter().filter(|lifeline| is_counted(lifeline)).count();
        let lifeline = match wanted {
            Lifeline::Guest(_) if count(|known| matches!(known, Lifeline::Guest(_))) == MAX_GUESTS => {
                Lifeline::OtherGuests
            }
            Lifeline::Interface(_) if count(|known| matches!(known, Lifeline::Interface(_))) == MAX_INTERFACES => {
                Lifeline::OtherInterfaces
            }
            _ => wanted,
        };
        self.lifelines
            .iter()
            .position(|known| *known == lifeline)
            .unwrap_or_else(|| {
                self.lifelines.push(lifeline);
                self.lifelines.len() - 1
            })
    }

    fn participant(&self, lifeline: Lifeline) -> Participant {
        let process = &self.trace.process;
        let (kind, lines) = match lifeline {
            Lifeline::Host => {
                let version = process
                    .runtime_version
                    .as_deref()
                    .map(|version| format!(" {}", visible(version, 16)))
                    .unwrap_or_default();
                let runtime = format!("{}{version}", visible(&process.runtime_name, 24));
                (ParticipantKind::Host, vec![self.name(&process.command), runtime])
            }
            Lifeline::Guest(Some(module)) => (
                ParticipantKind::Guest,
                vec![self.name(&module.name), format!("sha256 {}", visible(&module.hash, 12))],
            ),
            Lifeline::Guest(None) => (ParticipantKind::Guest, vec!["guest".into(), "module not known".into()]),
            Lifeline::OtherGuests => (ParticipantKind::Guest, vec!["other guest modules".into()]),
            Lifeline::Interface(Some(module)) => (ParticipantKind::Interface, vec![self.name(module)]),
            Lifeline::Interface(None) => (ParticipantKind::Interface, vec!["host (unnamed import)".into()]),
            Lifeline::OtherInterfaces => (ParticipantKind::Interface, vec!["other interfaces".into()]),
            Lifeline::Kernel => {
                let mut lines = vec!["kernel".to_owned()];
                if !self.capture.kernel_release.is_empty() {
                    lines.push(format!("Linux {}", visible(&self.capture.kernel_release, 32)));
                }
                (ParticipantKind::Kernel, lines)
            }
        };
        Participant { kind, lines }
    }

    fn finish(mut self, options: &Options) -> Sequence {
        let mut order: Vec<(Participant, ParticipantId)> = (self.lifelines.iter().enumerate())
            .map(|(id, lifeline)| (self.participant(*lifeline), id))
            .collect();
        order.sort_by_key(|(participant, id)| (participant.kind, *id));
        let mut position = vec![0; order.len()];
        for (index, (_, id)) in order.iter().enumerate() {
            position[*id] = index;
        }
        for step in &mut self.steps {
            match step {
                Step::Message { from, to, .. } => (*from, *to) = (position[*from], position[*to]),
                Step::Note { first, last, .. } | Step::Suspended { first, last, .. } => {
                    let ends = (position[*first], position[*last]);
                    (*first, *last) = (ends.0.min(ends.1), ends.0.max(ends.1));
                }
                Step::EndBar { at } => *at = position[*at],
                Step::LoopBegin { .. } | Step::LoopEnd => {}
            }
        }
        let participants: Vec<Participant> = order.into_iter().map(|(participant, _)| participant).collect();
        let in_process = participants
            .iter()
            .filter(|participant| participant.kind != ParticipantKind::Kernel)
            .count();
        let groups = vec![Group {
            title: format!("process {}", self.trace.process.pid),
            first: 0,
            last: in_process - 1,
        }];
        Sequence {
            title: self.title(),
            participants,
            groups,
            closing: summary::lines(self.trace, self.capture, options, &self.totals, self.marks),
            steps: self.steps,
            totals: self.totals,
        }
    }

    fn title(&self) -> String {
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
            _ if root.end_bound == Bound::Open => " · still running".into(),
            Outcome::Ok | Outcome::Unknown => String::new(),
            Outcome::Trap { .. } => format!(" · {}", self.trap_words(0)),
            Outcome::HostError => " · host error".into(),
            Outcome::Exit => " · exited".into(),
            Outcome::Errno { errno } => format!(" · {}", syscall::error(*errno)),
            Outcome::Unfinished => " · cut off".into(),
        };
        format!("{what} · {}{how}", duration(root.duration_ns()))
    }
}

fn lifeline_of(span: &Span) -> Lifeline<'_> {
    match &span.kind {
        SpanKind::Invoke { function } => Lifeline::Guest(function.as_ref().map(|function| &*function.module)),
        SpanKind::HostCall { import } => Lifeline::Interface(import.as_ref().map(|import| import.module.as_str())),
        SpanKind::Syscall { .. } => Lifeline::Kernel,
        SpanKind::Trap { .. } => Lifeline::Host,
    }
}

fn callee_name(span: &Span) -> &str {
    match &span.kind {
        SpanKind::Invoke {
            function: Some(function),
        } => &function.name,
        SpanKind::Invoke { function: None } => "unknown function",
        SpanKind::HostCall { import: Some(import) } => &import.name,
        SpanKind::HostCall { import: None } => "unnamed host call",
        SpanKind::Syscall { name, .. } => name,
        SpanKind::Trap { .. } => "trap",
    }
}

fn loop_label(times: u32, mark: &str, spread: &Spread) -> String {
    format!(
        "{}× · {mark}{} · {} in all",
        grouped(u64::from(times)),
        spread.text(),
        duration(spread.total)
    )
}
