//! A trace as a flat tree, with every nanosecond of the outermost invocation accounted for exactly once.
//!
//! Children of a node are neighbours (breadth-first order), so parents come before children and no walk needs the stack. What the
//! correlator promises (children sorted, inside their parent, not overlapping) is not relied on: a child is clipped to what is left.

use std::collections::{HashMap, HashSet};
use std::ops::Range;

use crate::span::{Outcome, Role, Span, Suspend};

use super::model::Totals;

/// Index into [`Timeline::nodes`].
pub(super) type NodeId = u32;

/// The spans of a trace and the suspensions that belong to each.
#[derive(Debug)]
pub(super) struct Timeline<'t> {
    /// The root first.
    pub(super) nodes: Vec<Node<'t>>,
    /// Times and the count of calls; what is drawn and what is folded is not known here.
    pub(super) totals: Totals,
}

/// A span, or a suspension in it.
#[derive(Debug)]
pub(super) struct Node<'t> {
    /// What it is.
    pub(super) what: What<'t>,
    /// Time in it that is neither a child's nor suspended, nanoseconds.
    pub(super) own_ns: u64,
    /// Calls in the subtree, this one included.
    pub(super) call_count: u64,
    /// A trap, a host error or an end that was not seen, here or below.
    pub(super) is_failed: bool,
    first_child: NodeId,
    child_count: u32,
}

#[derive(Clone, Copy, Debug)]
pub(super) enum What<'t> {
    Span(&'t Span),
    /// With its end, known or assumed, nanoseconds.
    Suspend(Suspend, u64),
}

impl Node<'_> {
    pub(super) fn children(&self) -> Range<NodeId> {
        self.first_child..self.first_child + self.child_count
    }

    /// How long it took, nanoseconds.
    pub(super) fn duration_ns(&self) -> u64 {
        match self.what {
            What::Span(span) => span.duration_ns(),
            What::Suspend(suspend, end_ns) => end_ns.saturating_sub(suspend.start_ns),
        }
    }
}

impl<'t> Timeline<'t> {
    pub(super) fn new(root: &'t Span) -> Self {
        let mut timeline = Self {
            nodes: vec![Node::new(What::Span(root))],
            totals: Totals::default(),
        };
        timeline.lay_out();
        timeline.account(root);
        timeline.gather();
        timeline
    }

    pub(super) fn node(&self, id: NodeId) -> &Node<'t> {
        &self.nodes[id as usize]
    }

    /// Appends all descendants breadth-first and gives each suspension to the innermost call it happened in.
    fn lay_out(&mut self) {
        let mut inherited: HashMap<usize, Vec<(Suspend, u64)>> = HashMap::new();
        let mut index = 0;
        while index < self.nodes.len() {
            let What::Span(span) = self.nodes[index].what else {
                index += 1;
                continue;
            };
            let mut children: Vec<&'t Span> = span.children.iter().collect();
            children.sort_by_key(|child| child.start_ns);

            let listed_below: HashSet<u64> = children
                .iter()
                .flat_map(|child| &child.suspends)
                .map(|suspend| suspend.start_ns)
                .collect();
            let mut suspends = inherited.remove(&index).unwrap_or_default();
            suspends.extend(
                span.suspends
                    .iter()
                    .map(|suspend| (*suspend, suspend.end_ns.unwrap_or(span.end_ns))),
            );
            suspends.sort_by_key(|(suspend, _)| suspend.start_ns);
            suspends.dedup_by_key(|(suspend, _)| suspend.start_ns);
            suspends.retain(|(suspend, _)| !listed_below.contains(&suspend.start_ns));

            let first_child = self.nodes.len();
            let mut own = Vec::new();
            let mut passed_down = Vec::new();
            for (suspend, end_ns) in suspends {
                // The last child that had begun; it holds the suspension if it was not over.
                let began = children.partition_point(|child| child.start_ns <= suspend.start_ns);
                // What helpers do meanwhile does not hold anything.
                let last = children[..began].iter().rposition(|child| !child.is_on_helper());
                let holder = last.filter(|&child| {
                    matches!(children[child].role(), Role::Invoke | Role::HostCall)
                        && suspend.start_ns < children[child].end_ns
                });
                match holder {
                    Some(child) => passed_down.push((child, (suspend, end_ns))),
                    None => own.push((began, What::Suspend(suspend, end_ns))),
                }
            }
            let mut own = own.into_iter().peekable();
            let mut passed_down = passed_down.into_iter().peekable();
            for (position, child) in children.iter().enumerate() {
                while let Some((_, what)) = own.next_if(|(began, _)| *began == position) {
                    self.nodes.push(Node::new(what));
                }
                while let Some((_, suspend)) = passed_down.next_if(|(child, _)| *child == position) {
                    inherited.entry(self.nodes.len()).or_default().push(suspend);
                }
                self.nodes.push(Node::new(What::Span(child)));
            }
            self.nodes.extend(own.map(|(_, what)| Node::new(what)));
            self.nodes[index].first_child = first_child as NodeId;
            self.nodes[index].child_count = (self.nodes.len() - first_child) as u32;
            index += 1;
        }
    }

    /// Gives each nanosecond of the root to the innermost call that was running, or to suspension.
    fn account(&mut self, root: &Span) {
        let whole = root.start_ns..root.end_ns.max(root.start_ns);
        let suspended = Suspended::new(&self.nodes, &whole);
        self.totals.duration_ns = whole.end - whole.start;
        self.totals.suspended_ns = suspended.within(&whole);

        let mut clipped = vec![0..0; self.nodes.len()];
        clipped[0] = whole;
        for index in 0..self.nodes.len() {
            let What::Span(span) = self.nodes[index].what else {
                continue;
            };
            let own = clipped[index].clone();
            let mut cursor = own.start;
            let mut own_ns = 0;
            for child in self.nodes[index].children() {
                let What::Span(child_span) = self.nodes[child as usize].what else {
                    continue;
                };
                if child_span.is_on_helper() {
                    self.totals.helper_count += 1;
                    self.totals.helper_ns = self.totals.helper_ns.saturating_add(child_span.duration_ns());
                    clipped[child as usize] = cursor..cursor;
                    continue;
                }
                let start = child_span.start_ns.clamp(cursor, own.end);
                let end = child_span.end_ns.clamp(start, own.end);
                own_ns += suspended.outside(&(cursor..start));
                clipped[child as usize] = start..end;
                cursor = end;
            }
            own_ns += suspended.outside(&(cursor..own.end));
            self.nodes[index].own_ns = own_ns;
            *match span.role() {
                Role::Invoke | Role::Trap => &mut self.totals.guest_ns,
                Role::HostCall | Role::MemoryGrow | Role::TableGrow | Role::Interruption => &mut self.totals.host_ns,
                Role::Syscall => &mut self.totals.kernel_ns,
            } += own_ns;
        }
    }

    /// Counts calls and marks failures from the leaves up.
    fn gather(&mut self) {
        for index in (0..self.nodes.len()).rev() {
            let (mut call_count, mut is_failed) = match self.nodes[index].what {
                What::Span(span) => (
                    u64::from(span.role() != Role::Trap),
                    span.role() == Role::Trap
                        || matches!(
                            span.outcome,
                            Outcome::Trap { .. } | Outcome::HostError | Outcome::Unfinished
                        ),
                ),
                What::Suspend(..) => (0, false),
            };
            for child in self.nodes[index].children() {
                let child = self.node(child);
                call_count += child.call_count;
                is_failed |= child.is_failed;
            }
            self.nodes[index].call_count = call_count;
            self.nodes[index].is_failed = is_failed;
        }
        self.totals.call_count = self.nodes[0].call_count;
    }
}

impl<'t> Node<'t> {
    fn new(what: What<'t>) -> Self {
        Self {
            what,
            own_ns: 0,
            call_count: 0,
            is_failed: false,
            first_child: 0,
            child_count: 0,
        }
    }
}

/// The moments at which the fiber was off every thread: disjoint, sorted, with the time suspended before each.
struct Suspended {
    intervals: Vec<(Range<u64>, u64)>,
}

impl Suspended {
    fn new(nodes: &[Node], whole: &Range<u64>) -> Self {
        let mut all: Vec<Range<u64>> = nodes
            .iter()
            .filter_map(|node| match node.what {
                What::Suspend(suspend, end_ns) => {
                    let start = suspend.start_ns.clamp(whole.start, whole.end);
                    Some(start..end_ns.clamp(start, whole.end))
                }
                What::Span(_) => None,
            })
            .filter(|interval| !interval.is_empty())
            .collect();
        all.sort_by_key(|interval| interval.start);
        let mut intervals: Vec<(Range<u64>, u64)> = Vec::new();
        let mut before = 0;
        for interval in all {
            match intervals.last_mut() {
                Some((last, _)) if interval.start <= last.end => {
                    let grown = last.end.max(interval.end);
                    before += grown - last.end;
                    last.end = grown;
                }
                _ => {
                    intervals.push((interval.clone(), before));
                    before += interval.end - interval.start;
                }
            }
        }
        Self { intervals }
    }

    /// Suspended time before a moment, nanoseconds.
    fn before(&self, moment: u64) -> u64 {
        let begun = self.intervals.partition_point(|(interval, _)| interval.start <= moment);
        begun.checked_sub(1).map_or(0, |index| {
            let (interval, before) = &self.intervals[index];
            before + moment.min(interval.end) - interval.start
        })
    }

    fn within(&self, window: &Range<u64>) -> u64 {
        self.before(window.end) - self.before(window.start)
    }

    fn outside(&self, window: &Range<u64>) -> u64 {
        window.end - window.start - self.within(window)
    }
}
