//! Finds repeats among calls: each node gets a shape, and equal neighbouring shapes become one drawn call with a count.
//!
//! Nodes of one shape have the same structure below them, position by position, so that all that stand for one drawn call can be
//! taken together: a loop in a loop costs no search.

use std::collections::HashMap;
use std::hash::Hash;

use crate::span::{Bound, Function, Import, InterruptionCause, Outcome, Role, SpanKind};

use super::timeline::{NodeId, Timeline, What};

/// Index into [`Fold::structures`], or [`MIXED`].
pub(super) type Shape = u32;

/// Stands for nodes that are folded although they differ inside; what is inside is only counted.
pub(super) const MIXED: Shape = Shape::MAX;

/// Longest repeated group (`A B A B …`) that is looked for, in runs.
const MAX_PERIOD: usize = 6;
/// Fewer repeats than this are drawn one by one: two calls say more than a loop of two, in as much room.
const MIN_REPS: usize = 3;

/// The repeats of a whole trace.
#[derive(Debug)]
pub(super) struct Fold {
    shape_of_node: Vec<Shape>,
    structures: Vec<Structure>,
}

/// The children of a node, in order.
pub(super) type Structure = Box<[Section]>;

/// Consecutive children: a group of runs, gone through `reps` times.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Section {
    pub(super) reps: u32,
    pub(super) runs: Box<[Run]>,
}

/// `count` equal calls in a row.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Run {
    pub(super) count: u32,
    pub(super) shape: Shape,
}

/// What makes two calls the same to a reader, whatever is inside them.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
struct Key<'t> {
    callee: Callee<'t>,
    outcome: Option<&'t Outcome>,
    is_open: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash)]
enum Callee<'t> {
    Invoke(Option<&'t Function>),
    HostCall(Option<&'t Import>),
    Syscall { name: &'t str, on_helper: bool },
    Trap(&'t str, Option<&'t Function>),
    Grow(Role, u64, u32),
    Interruption(InterruptionCause),
    Suspend,
}

impl Fold {
    /// Folds what is the same down to the last call inside.
    pub(super) fn exact(timeline: &Timeline) -> Self {
        Self::new(timeline, false)
    }

    /// Also folds calls that differ inside, unless something failed in them.
    pub(super) fn loose(timeline: &Timeline) -> Self {
        Self::new(timeline, true)
    }

    pub(super) fn shape(&self, node: NodeId) -> Shape {
        self.shape_of_node[node as usize]
    }

    /// What is inside a node of that shape, as far as it is the same for all; nothing for [`MIXED`].
    pub(super) fn structure(&self, shape: Shape) -> &[Section] {
        self.structures.get(shape as usize).map_or(&[], |structure| structure)
    }

    fn new(timeline: &Timeline, is_loose: bool) -> Self {
        let count = timeline.nodes.len();
        let mut keys: Interner<Key> = Interner::default();
        let mut shapes: Interner<(u32, Structure)> = Interner::default();
        let mut shape_of_node = vec![0; count];
        // What neighbours are compared by.
        let mut token_of_node = vec![(0, false); count];
        for index in (0..count).rev() {
            let node = &timeline.nodes[index];
            let key = keys.intern(Key::of(node.what));
            let children = node.children().start as usize..node.children().end as usize;
            let structure = compress(&token_of_node[children.clone()], &shape_of_node[children]);
            let shape = shapes.intern((key, structure));
            shape_of_node[index] = shape;
            let by_key = is_loose && !node.is_failed;
            token_of_node[index] = if by_key { (key, true) } else { (shape, false) };
        }
        Self {
            shape_of_node,
            structures: shapes
                .into_values()
                .into_iter()
                .map(|(_, structure)| structure)
                .collect(),
        }
    }
}

/// Finds repeats in a row of siblings: first equal neighbours, then repeated groups of those. Linear for a given [`MAX_PERIOD`].
fn compress<T: Copy + Eq>(tokens: &[T], shapes: &[Shape]) -> Structure {
    // Runs of equal neighbours; shorter ones stay apart.
    let mut runs: Vec<(T, usize)> = Vec::new();
    let mut index = 0;
    while index < tokens.len() {
        let length = tokens[index..]
            .iter()
            .take_while(|token| **token == tokens[index])
            .count();
        if length >= MIN_REPS {
            runs.push((tokens[index], length));
        } else {
            runs.extend(std::iter::repeat_n((tokens[index], 1), length));
        }
        index += length;
    }

    let mut sections = Vec::new();
    let mut first_run = 0;
    let mut first_child = 0;
    while first_run < runs.len() {
        let rest = &runs[first_run..];
        let (period, reps) = (2..=MAX_PERIOD.min(rest.len() / MIN_REPS))
            .map(|period| {
                (
                    period,
                    1 + rest
                        .chunks_exact(period)
                        .skip(1)
                        .take_while(|next| *next == &rest[..period])
                        .count(),
                )
            })
            .filter(|(_, reps)| *reps >= MIN_REPS)
            .max_by_key(|(period, reps)| (period * reps, usize::MAX - period))
            .unwrap_or((1, 1));
        let pattern = &rest[..period];
        let pattern_children: usize = pattern.iter().map(|(_, count)| count).sum();
        let mut offset = first_child;
        let runs_of_section = pattern
            .iter()
            .map(|&(_, count)| {
                let of_first = shapes[offset];
                let is_uniform = (0..reps).all(|rep| {
                    let start = offset + rep * pattern_children;
                    shapes[start..start + count].iter().all(|shape| *shape == of_first)
                });
                offset += count;
                Run {
                    count: count as u32,
                    shape: if is_uniform { of_first } else { MIXED },
                }
            })
            .collect();
        sections.push(Section {
            reps: reps as u32,
            runs: runs_of_section,
        });
        first_child += pattern_children * reps;
        first_run += period * reps;
    }
    sections.into_boxed_slice()
}

impl<'t> Key<'t> {
    fn of(what: What<'t>) -> Self {
        match what {
            What::Span(span) => Self {
                callee: match &span.kind {
                    SpanKind::Invoke { function } => Callee::Invoke(function.as_deref()),
                    SpanKind::HostCall { import } => Callee::HostCall(import.as_deref()),
                    SpanKind::Syscall { name, on_helper, .. } => Callee::Syscall {
                        name,
                        on_helper: *on_helper,
                    },
                    SpanKind::Trap { code, function, .. } => Callee::Trap(code, function.as_deref()),
                    SpanKind::MemoryGrow(growth) | SpanKind::TableGrow(growth) => {
                        Callee::Grow(span.role(), growth.instance, growth.index)
                    }
                    SpanKind::Interruption(interruption) => Callee::Interruption(interruption.cause),
                },
                outcome: Some(&span.outcome),
                is_open: span.start_bound == Bound::Open || span.end_bound == Bound::Open,
            },
            What::Suspend(suspend, _) => Self {
                callee: Callee::Suspend,
                outcome: None,
                is_open: suspend.end_ns.is_none(),
            },
        }
    }
}

/// Gives equal values equal small numbers.
struct Interner<T> {
    ids: HashMap<T, u32>,
}

impl<T> Default for Interner<T> {
    fn default() -> Self {
        Self { ids: HashMap::new() }
    }
}

impl<T: Hash + Eq> Interner<T> {
    fn intern(&mut self, value: T) -> u32 {
        let next = self.ids.len() as u32;
        *self.ids.entry(value).or_insert(next)
    }

    fn into_values(self) -> Vec<T> {
        let mut values: Vec<_> = self.ids.into_iter().collect();
        values.sort_unstable_by_key(|(_, id)| *id);
        values.into_iter().map(|(value, _)| value).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The row with `a4` for four times `a` and `(ab)3` for three times `a b`.
    fn folded(row: &str) -> String {
        let shapes: Vec<Shape> = row.bytes().map(Shape::from).collect();
        let times = |count: u32| if count == 1 { String::new() } else { count.to_string() };
        let mut text = String::new();
        for section in compress(&shapes, &shapes) {
            let mut runs = String::new();
            for run in &section.runs {
                runs.push(run.shape as u8 as char);
                runs += &times(run.count);
            }
            if section.reps > 1 {
                runs = format!("({runs}){}", section.reps);
            }
            text += &runs;
        }
        text
    }

    #[test]
    fn equal_neighbours_become_a_run() {
        assert_eq!(folded("aaaabcc"), "a4bcc");
    }

    #[test]
    fn repeated_groups_become_a_section() {
        assert_eq!(folded("xabababy"), "x(ab)3y");
        assert_eq!(folded("abcabcabcab"), "(abc)3ab");
    }

    #[test]
    fn runs_repeat_inside_groups() {
        assert_eq!(folded("aaabaaabaaab"), "(a3b)3");
    }

    #[test]
    fn short_repeats_stay_apart() {
        assert_eq!(folded("aabb"), "aabb");
        assert_eq!(folded("abab"), "abab");
        assert_eq!(folded(""), "");
    }
}
