//! Turns selected calls into the steps of a sequence: arrows, bars, loops and notes between lifelines.

use std::collections::HashMap;
use std::ops::Range;

use crate::span::{Bound, Capture, Function, Outcome, Process, Role, Span, SpanKind, Trace};

use super::Options;
use super::label::{Spread, counted, duration, filled, grouped, visible};
use super::lifeline::{Lifeline, callee_name, lifeline_of};
use super::model::{Arrow, Bar, Group, Participant, ParticipantId, ParticipantKind, Sequence, Step, Totals};
use super::select::{ItemId, ItemSection, Selection};
use super::summary::{self, Marks};
use super::syscall;
use super::timeline::{Node, NodeId, Timeline, What};
use super::words::{self, fiber_words, loop_label};

/// Callees named in a note on folded calls.
const MAX_NAMED_CALLEES: usize = 4;
/// Lines of such a note are not much wider than two lifelines are apart.
const MAX_NOTE_CHARS: usize = 42;

/// Draws what was selected; names longer than `max_name_chars` are cut.
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

pub(super) struct Drawing<'a, 't> {
    pub(super) trace: &'t Trace,
    pub(super) capture: &'a Capture,
    pub(super) timeline: &'a Timeline<'t>,
    pub(super) selection: &'a Selection,
    pub(super) max_name_chars: usize,
    /// In order of first appearance; sorted at the end.
    pub(super) lifelines: Vec<Lifeline<'t>>,
    pub(super) steps: Vec<Step>,
    pub(super) totals: Totals,
    pub(super) marks: Marks,
    /// The guest function that was last named as caller inside an invocation.
    pub(super) last_caller: HashMap<ItemId, String>,
}

/// Where a call is made from.
#[derive(Clone, Copy)]
pub(super) struct Scope<'t> {
    pub(super) participant: ParticipantId,
    /// The role of the call that is open there; `None` outside the outermost.
    pub(super) role: Option<Role>,
    /// The innermost invocation and the function it entered.
    pub(super) invocation: ItemId,
    pub(super) entered: Option<&'t Function>,
}

/// The box around everything but the kernel: the pod, where it is known.
fn process_title(process: &Process) -> String {
    let own = format!("process {}", process.pid);
    match (&process.place.namespace, &process.place.pod_name) {
        (Some(namespace), Some(pod)) => format!("pod {}/{} · {own}", visible(namespace, 40), visible(pod, 60)),
        _ => own,
    }
}

/// Whether a syscall by which its thread or process ended itself is the last thing in it.
pub(super) fn departs(span: &Span) -> bool {
    let mut last = span;
    while let Some(child) = last.children.last() {
        last = child;
    }
    last.end_bound == Bound::Open
        && matches!(&last.kind, SpanKind::Syscall { name, .. } if matches!(name.as_str(), "exit" | "exit_group" | "execve" | "execveat"))
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

    pub(super) fn first(&self, item: ItemId) -> &Node<'t> {
        self.timeline.node(self.selection.members(item)[0])
    }

    pub(super) fn spans(&self, item: ItemId) -> impl Iterator<Item = &'t Span> {
        self.selection
            .members(item)
            .iter()
            .filter_map(|node| match self.timeline.node(*node).what {
                What::Span(span) => Some(span),
                What::Suspend(..) => None,
            })
    }

    pub(super) fn spread(&self, item: ItemId) -> Spread {
        let durations = self
            .selection
            .members(item)
            .iter()
            .map(|node| self.timeline.node(*node).duration_ns());
        Spread::of(durations.collect())
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
            lines: vec![label],
        });

        if let Some(line) = words::cold_start(self.trace, span) {
            self.note(to, to, vec![line]);
        }
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
            let words = if departs(span) && span.role() == Role::Syscall {
                "does not return".to_owned()
            } else if departs(span) {
                format!("ended with its thread or process · {time}")
            } else if span.end_bound == Bound::Open {
                format!("still running when the window ended · {time}")
            } else {
                format!("cut off: its thread or process ended first · {time}")
            };
            self.note(from, from, vec![words]);
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
            Outcome::Refused => (Arrow::Return, Some("refused: -1".into())),
            Outcome::Errno { errno } => (Arrow::Return, Some(syscall::error(*errno))),
            Outcome::Unknown => (Arrow::Return, Some("ended, not seen how".into())),
        };
        let lines = match words {
            // Reasons for a failure are long; they get a line of their own.
            Some(words) if arrow == Arrow::Failed => vec![words, time],
            Some(words) => vec![format!("{words} · {time}")],
            None => vec![time],
        };
        self.steps.push(Step::Message {
            from,
            to,
            arrow,
            bar: Bar::End,
            lines,
        });
    }

    fn suspended(&mut self, item: ItemId, scope: Scope<'t>) {
        let members = self.selection.members(item);
        let What::Suspend(suspend, _) = self.first(item).what else {
            return;
        };
        let spread = self.spread(item);
        let lines = if members.len() > 1 {
            let times = match self.selection.item(item).run_count {
                1 => String::new(),
                count => format!(" {}×", grouped(u64::from(count))),
            };
            vec![
                format!("suspended{times} · {} in all", duration(spread.total)),
                format!("({})", spread.text()),
            ]
        } else {
            vec![
                format!("suspended {}", duration(spread.total)),
                format!("({})", fiber_words(&suspend)),
            ]
        };
        // The guest waits, and so does the host call that it waits in.
        let first = self.guest_of(scope);
        self.steps.push(Step::Suspended {
            first,
            last: scope.participant,
            lines,
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
            names.push(format!("{} others", grouped(rest as u64)));
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
        let mut lines = vec![format!("{what}{place} · {}{each}", duration(total))];
        lines.extend(filled(&names.join(", "), MAX_NOTE_CHARS));
        self.note(scope.participant, target, lines);
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
        if let Some(parent) = &self.trace.parent {
            let id = parent.trace_id.to_string();
            // The host comes first.
            let note = Step::Note {
                first: 0,
                last: 0,
                lines: vec![format!("traceparent {}…{}", &id[..8], &id[28..])],
            };
            self.steps.insert(0, note);
        }
        let participants: Vec<Participant> = order.into_iter().map(|(participant, _)| participant).collect();
        let in_process = participants
            .iter()
            .filter(|participant| participant.kind != ParticipantKind::Kernel)
            .count();
        let groups = vec![Group {
            title: process_title(&self.trace.process),
            first: 0,
            last: in_process - 1,
        }];
        Sequence {
            title: self.title(),
            participants,
            groups,
            closing: summary::lines(
                self.trace,
                self.capture,
                options,
                self.timeline,
                &self.totals,
                self.marks,
            ),
            steps: self.steps,
            totals: self.totals,
        }
    }
}
