//! Makes a trace of any size small enough to send: runs of calls that are alike become one node, and what is still too much is left out and counted.
//! Knows the model only; what a node becomes on the wire is `spans`' business.

use std::collections::VecDeque;

use crate::span::{Bound, Outcome, Span, SpanKind, Suspend};

/// What may leave for one trace.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Limits {
    /// Nodes.
    pub(crate) max_nodes: usize,
    /// Sum of [`Limits::cost_bytes`] over the nodes.
    pub(crate) max_bytes: usize,
    /// Nesting below the root that is followed.
    pub(crate) max_depth: usize,
    /// Length from which a run of calls that are alike is folded. Shorter runs keep their own times, unless the trace is over its limits.
    pub(crate) min_run: u64,
    /// Estimate of a span's size on the wire, bytes.
    pub(crate) cost_bytes: fn(&Span) -> usize,
}

/// One span of the output: one of the model, or a run of them.
#[derive(Debug)]
pub(crate) struct Node<'a> {
    /// The span; of a run, the first.
    pub(crate) span: &'a Span,
    /// Index of the parent in the output, always smaller than its own; `None` for the root.
    pub(crate) parent: Option<usize>,
    /// Position among the children of its parent in the model.
    pub(crate) position: usize,
    /// Durations, in nanoseconds, and how many calls they are from.
    pub(crate) run: Run,
    /// Traps raised in it.
    pub(crate) traps: Vec<&'a Span>,
    /// Suspensions that none of its children has as well.
    pub(crate) suspends: Vec<&'a Suspend>,
    /// Spans somewhere below that were left out.
    pub(crate) cut_count: u64,
    /// Estimate of its size on the wire.
    pub(crate) cost_bytes: usize,
}

/// Calls that are alike and follow each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Run {
    /// How many; 1 for a call that was not folded.
    pub(crate) count: u64,
    /// Shortest.
    pub(crate) min_ns: u64,
    /// Longest.
    pub(crate) max_ns: u64,
    /// All of them together.
    pub(crate) sum_ns: u64,
    /// End of the last.
    pub(crate) end_ns: u64,
}

/// The trace as at most `max_nodes` nodes, parents first, siblings by start time. Every span of the model is in a node's `run.count`, in
/// somebody's `cut_count`, or a trap in `traps`.
pub(crate) fn fold<'a>(root: &'a Span, limits: &Limits) -> Vec<Node<'a>> {
    let nodes = flatten(build(root, 0, 0, limits.min_run, limits), limits);
    if fits(&nodes, limits) {
        return nodes.into_iter().map(|(node, _)| node).collect();
    }
    select(flatten(build(root, 0, 0, 2, limits), limits), limits)
}

fn fits(nodes: &[(Node<'_>, u64)], limits: &Limits) -> bool {
    nodes.len() <= limits.max_nodes && nodes.iter().map(|(node, _)| node.cost_bytes).sum::<usize>() <= limits.max_bytes
}

/// A node that still owns its children.
struct Tree<'a> {
    span: &'a Span,
    position: usize,
    run: Run,
    traps: Vec<&'a Span>,
    suspends: Vec<&'a Suspend>,
    children: Vec<Tree<'a>>,
    cut_count: u64,
}

impl Tree<'_> {
    /// Whether two calls differ in times, counts and syscall arguments only.
    fn is_like(&self, other: &Self) -> bool {
        let (one, two) = (self.span, other.span);
        is_plain(self)
            && is_plain(other)
            && one.tid == two.tid
            && one.start_bound == two.start_bound
            && one.end_bound == two.end_bound
            && one.outcome == two.outcome
            && one.stack_truncated == two.stack_truncated
            && one.is_on_helper() == two.is_on_helper()
            && kinds_are_alike(&one.kind, &two.kind)
            && one.stack == two.stack
            && self.children.len() == other.children.len()
            && self.children.iter().zip(&other.children).all(|(a, b)| a.is_like(b))
    }

    fn absorb(&mut self, next: Self) {
        self.run.count += next.run.count;
        self.run.min_ns = self.run.min_ns.min(next.run.min_ns);
        self.run.max_ns = self.run.max_ns.max(next.run.max_ns);
        self.run.sum_ns = self.run.sum_ns.saturating_add(next.run.sum_ns);
        self.run.end_ns = self.run.end_ns.max(next.run.end_ns);
        self.cut_count += next.cut_count;
        for (child, more) in self.children.iter_mut().zip(next.children) {
            child.absorb(more);
        }
    }
}

/// Calls with a trap, a suspension or an open end say something of their own.
fn is_plain(tree: &Tree<'_>) -> bool {
    tree.traps.is_empty()
        && tree.span.suspends.is_empty()
        && tree.span.start_bound != Bound::Open
        && tree.span.end_bound != Bound::Open
        && !matches!(tree.span.outcome, Outcome::Trap { .. } | Outcome::HostError)
}

fn kinds_are_alike(one: &SpanKind, two: &SpanKind) -> bool {
    match (one, two) {
        (SpanKind::Syscall { number: a, name: x, .. }, SpanKind::Syscall { number: b, name: y, .. }) => {
            a == b && x == y
        }
        _ => one == two,
    }
}

/// `depth` is bounded by `max_depth`, so the recursion is.
fn build<'a>(span: &'a Span, position: usize, depth: usize, min_run: u64, limits: &Limits) -> Tree<'a> {
    let duration_ns = span.duration_ns();
    let mut tree = Tree {
        span,
        position,
        run: Run {
            count: 1,
            min_ns: duration_ns,
            max_ns: duration_ns,
            sum_ns: duration_ns,
            end_ns: span.end_ns.max(span.start_ns),
        },
        traps: Vec::new(),
        suspends: own_suspends(span),
        children: Vec::new(),
        cut_count: 0,
    };
    let mut children = Vec::new();
    for (position, child) in span.children.iter().enumerate() {
        if matches!(child.kind, SpanKind::Trap { .. }) {
            tree.traps.push(child);
            tree.cut_count += span_count(child) - 1;
        } else if depth < limits.max_depth {
            children.push(build(child, position, depth + 1, min_run, limits));
        } else {
            tree.cut_count += span_count(child);
        }
    }
    tree.children = fold_runs(children, min_run);
    tree
}

fn fold_runs(children: Vec<Tree<'_>>, min_run: u64) -> Vec<Tree<'_>> {
    let mut folded: Vec<Tree<'_>> = Vec::new();
    let mut rest = VecDeque::from(children);
    while let Some(mut first) = rest.pop_front() {
        let run_count = 1 + rest.iter().take_while(|next| next.is_like(&first)).count();
        if run_count as u64 >= min_run {
            rest.drain(..run_count - 1).for_each(|next| first.absorb(next));
            folded.push(first);
        } else {
            folded.push(first);
            folded.extend(rest.drain(..run_count - 1));
        }
    }
    folded
}

fn own_suspends(span: &Span) -> Vec<&Suspend> {
    // A suspension is listed in every span that it interrupts; it is told once, where it is innermost.
    let of_children: std::collections::HashSet<u64> = span
        .children
        .iter()
        .flat_map(|child| &child.suspends)
        .map(|suspend| suspend.start_ns)
        .collect();
    span.suspends
        .iter()
        .filter(|suspend| !of_children.contains(&suspend.start_ns))
        .collect()
}

fn span_count(span: &Span) -> u64 {
    span.walk().count() as u64
}

/// Parents first, each with the number of spans that it and everything below it stand for (traps aside).
fn flatten<'a>(root: Tree<'a>, limits: &Limits) -> Vec<(Node<'a>, u64)> {
    let mut nodes: Vec<(Node<'a>, u64)> = Vec::new();
    let mut pending = vec![(root, None)];
    while let Some((tree, parent)) = pending.pop() {
        let index = nodes.len();
        pending.extend(tree.children.into_iter().rev().map(|child| (child, Some(index))));
        let weight = tree.run.count + tree.cut_count + tree.traps.len() as u64;
        let node = Node {
            span: tree.span,
            parent,
            position: tree.position,
            run: tree.run,
            cost_bytes: (limits.cost_bytes)(tree.span),
            traps: tree.traps,
            suspends: tree.suspends,
            cut_count: tree.cut_count,
        };
        nodes.push((node, weight));
    }
    for index in (1..nodes.len()).rev() {
        let weight = nodes[index].1;
        if let Some(parent) = nodes[index].0.parent {
            nodes[parent].1 += weight;
        }
    }
    nodes
}

/// Keeps what fits: the root, failures with the calls around them (up to half of the room), then level by level from the outside, by time.
fn select<'a>(nodes: Vec<(Node<'a>, u64)>, limits: &Limits) -> Vec<Node<'a>> {
    let mut kept = Kept {
        flags: vec![false; nodes.len()],
        node_count: 0,
        byte_count: 0,
    };
    kept.add(&[0], &nodes);
    let half = Limits {
        max_nodes: limits.max_nodes / 2,
        max_bytes: limits.max_bytes / 2,
        ..*limits
    };
    for (index, (node, _)) in nodes.iter().enumerate() {
        if node.span.outcome.is_failure() || !node.traps.is_empty() {
            let path: Vec<usize> = std::iter::successors(Some(index), |&at| nodes[at].0.parent)
                .take_while(|&at| !kept.flags[at])
                .collect();
            if kept.has_room_for(&path, &nodes, &half) {
                kept.add(&path, &nodes);
            }
        }
    }
    let mut depths = vec![0_usize; nodes.len()];
    for index in 1..nodes.len() {
        depths[index] = nodes[index].0.parent.map_or(0, |parent| depths[parent] + 1);
    }
    let mut order: Vec<usize> = (0..nodes.len()).collect();
    order.sort_by_key(|&index| depths[index]);
    for index in order {
        let parent_kept = nodes[index].0.parent.is_none_or(|parent| kept.flags[parent]);
        if parent_kept && !kept.flags[index] && kept.has_room_for(&[index], &nodes, limits) {
            kept.add(&[index], &nodes);
        }
    }
    kept.apply(nodes)
}

struct Kept {
    flags: Vec<bool>,
    node_count: usize,
    byte_count: usize,
}

impl Kept {
    fn has_room_for(&self, indexes: &[usize], nodes: &[(Node<'_>, u64)], limits: &Limits) -> bool {
        let bytes: usize = indexes.iter().map(|&index| nodes[index].0.cost_bytes).sum();
        self.node_count + indexes.len() <= limits.max_nodes && self.byte_count + bytes <= limits.max_bytes
    }

    fn add(&mut self, indexes: &[usize], nodes: &[(Node<'_>, u64)]) {
        for &index in indexes {
            self.flags[index] = true;
            self.node_count += 1;
            self.byte_count += nodes[index].0.cost_bytes;
        }
    }

    fn apply<'a>(&self, nodes: Vec<(Node<'a>, u64)>) -> Vec<Node<'a>> {
        let mut new_indexes = vec![None; nodes.len()];
        let mut output: Vec<Node<'a>> = Vec::with_capacity(self.node_count);
        for (index, (mut node, weight)) in nodes.into_iter().enumerate() {
            let parent = node.parent.and_then(|parent| new_indexes[parent]);
            if self.flags[index] {
                new_indexes[index] = Some(output.len());
                node.parent = parent;
                output.push(node);
            } else if let Some(parent) = parent {
                // Children of a node that was left out find no parent here, and are in its weight.
                output[parent].cut_count += weight;
            }
        }
        output
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::sink::testing::{host_call, invoke, syscall, trap};

    const LIMITS: Limits = Limits {
        max_nodes: 50,
        max_bytes: usize::MAX,
        max_depth: 8,
        min_run: 16,
        cost_bytes: |_| 1,
    };

    fn accounted(nodes: &[Node<'_>]) -> u64 {
        nodes
            .iter()
            .map(|node| node.run.count + node.cut_count + node.traps.len() as u64)
            .sum()
    }

    fn with_children(mut span: Span, children: Vec<Span>) -> Span {
        span.children = children;
        span
    }

    #[test]
    fn a_long_run_of_equal_calls_is_one_node_with_its_durations() {
        let calls = (0..20)
            .map(|i| host_call("clock", i * 10, i * 10 + 1 + i % 3))
            .collect();
        let root = with_children(invoke("run", 0, 500), calls);
        let nodes = fold(&root, &LIMITS);
        assert_eq!(nodes.len(), 2);
        assert_eq!(
            nodes[1].run,
            Run {
                count: 20,
                min_ns: 1,
                max_ns: 3,
                sum_ns: 39,
                end_ns: 192
            }
        );
    }

    #[test]
    fn a_short_run_keeps_its_calls() {
        let calls = (0..15).map(|i| host_call("clock", i * 10, i * 10 + 1)).collect();
        let root = with_children(invoke("run", 0, 500), calls);
        assert_eq!(fold(&root, &LIMITS).len(), 16);
    }

    #[test]
    fn calls_with_equal_children_fold_together_with_them() {
        let calls = (0..20)
            .map(|i| {
                with_children(
                    host_call("fd_write", i * 10, i * 10 + 5),
                    vec![syscall("write", i * 10 + 1, i * 10 + 3)],
                )
            })
            .collect();
        let root = with_children(invoke("run", 0, 500), calls);
        let nodes = fold(&root, &LIMITS);
        assert_eq!(nodes.len(), 3);
        assert_eq!(
            (nodes[2].run.count, nodes[2].run.sum_ns, nodes[2].parent),
            (20, 40, Some(1))
        );
    }

    #[test]
    fn calls_that_failed_differently_are_not_folded() {
        let calls = (0..40)
            .map(|i| {
                let mut call = syscall("read", i * 10, i * 10 + 1);
                if i % 2 == 0 {
                    call.outcome = Outcome::Errno { errno: 2 };
                }
                call
            })
            .collect();
        let root = with_children(invoke("run", 0, 500), calls);
        assert_eq!(fold(&root, &LIMITS).len(), 41);
    }

    #[test]
    fn failures_are_kept_when_a_trace_is_cut() {
        let mut calls: Vec<Span> = (0..300)
            .map(|i| host_call(&format!("import_{i}"), i * 10, i * 10 + 1))
            .collect();
        calls[290].outcome = Outcome::HostError;
        let root = with_children(invoke("run", 0, 5000), calls);
        let nodes = fold(&root, &LIMITS);
        assert_eq!(nodes.len(), 50);
        assert!(nodes.iter().any(|node| node.span.outcome == Outcome::HostError));
        assert_eq!(nodes[0].cut_count, 251);
    }

    #[test]
    fn nesting_beyond_the_bound_is_counted_where_it_begins() {
        let mut span = invoke("leaf", 0, 10);
        for _ in 0..30 {
            span = with_children(invoke("run", 0, 10), vec![span]);
        }
        let nodes = fold(&span, &LIMITS);
        assert_eq!(nodes.len(), 9);
        assert_eq!(nodes[8].cut_count, 22);
    }

    #[test]
    fn a_trap_is_part_of_the_call_it_ended() {
        let root = with_children(invoke("run", 0, 10), vec![trap("unreachable", 9)]);
        let nodes = fold(&root, &LIMITS);
        assert_eq!(nodes.len(), 1);
        assert_eq!(nodes[0].traps.len(), 1);
    }

    fn any_span() -> impl Strategy<Value = Span> {
        let leaf = (0..3_u8, 0..3_u64, any::<bool>()).prop_map(|(kind, duration_ns, fails)| {
            let mut span = match kind {
                0 => host_call("a", 0, duration_ns),
                1 => syscall("read", 0, duration_ns),
                _ => trap("unreachable", 0),
            };
            if fails && kind < 2 {
                span.outcome = Outcome::Errno { errno: 5 };
            }
            span
        });
        leaf.prop_recursive(12, 400, 20, |inner| {
            (prop::collection::vec(inner, 0..20), any::<bool>()).prop_map(|(children, guest)| {
                with_children(if guest { invoke("f", 0, 9) } else { host_call("b", 0, 9) }, children)
            })
        })
    }

    proptest! {
        #[test]
        fn every_span_is_accounted_for_within_the_limits(span in any_span(), max_nodes in 2..60_usize) {
            let root = with_children(invoke("run", 0, 100), vec![span]);
            let nodes = fold(&root, &Limits { max_nodes, ..LIMITS });
            prop_assert!(nodes.len() <= max_nodes);
            prop_assert_eq!(accounted(&nodes), root.walk().count() as u64);
            prop_assert!(nodes.iter().enumerate().skip(1).all(|(index, node)| node.parent.is_some_and(|parent| parent < index)));
        }
    }
}
