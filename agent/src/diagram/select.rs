//! Chooses which calls of a folded trace are drawn: the ones that took longest or failed, with all that leads to them.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::ops::Range;

use crate::errno::is_flow_control;
use crate::span::{Outcome, Role};

use super::fold::{Fold, MIXED, Section, Shape};
use super::label::Spread;
use super::timeline::{NodeId, Timeline, What};

/// Index into [`Selection::items`].
pub(super) type ItemId = u32;

/// What is drawn of a trace, and what stands folded between it.
#[derive(Debug)]
pub(super) struct Selection {
    items: Vec<Item>,
    members: Vec<NodeId>,
    sections: Vec<ItemSection>,
}

/// One call (or suspension, or trap) as drawn, for all the nodes that it stands for.
#[derive(Clone, Debug)]
pub(super) struct Item {
    /// Calls in a row inside its parent; more than one makes a loop.
    pub(super) run_count: u32,
    /// Whether it is drawn; else it is part of a folded stretch.
    pub(super) is_shown: bool,
    /// Whether its members differ inside, so that the inside is only counted.
    pub(super) is_mixed: bool,
    shape: Shape,
    members: Range<u32>,
    sections: Range<u32>,
}

/// Consecutive items inside a call, gone through `reps` times.
#[derive(Clone, Debug)]
pub(super) struct ItemSection {
    pub(super) reps: u32,
    pub(super) items: Range<ItemId>,
    /// How long each time took, when there are several.
    pub(super) spread: Spread,
}

/// Above all durations: what explains a failure is shown before what took long.
const FAILED_IMPORTANCE: u64 = 1 << 62;

impl Selection {
    /// Shows at most `max_count` items, the root always.
    pub(super) fn new(timeline: &Timeline, fold: &Fold, max_count: usize) -> Self {
        let mut selection = Self {
            items: vec![Item {
                run_count: 1,
                is_shown: false,
                is_mixed: false,
                shape: fold.shape(0),
                members: 0..1,
                sections: 0..0,
            }],
            members: vec![0],
            sections: Vec::new(),
        };
        // The most important first, of equals the earliest; a call gets in line when its caller is shown.
        let mut candidates = BinaryHeap::from([(u64::MAX, Reverse(0))]);
        for _ in 0..max_count.max(1) {
            let Some((_, Reverse(id))) = candidates.pop() else {
                break;
            };
            selection.items[id as usize].is_shown = true;
            for inner in selection.expand(timeline, fold, id) {
                candidates.push((selection.importance(timeline, inner), Reverse(inner)));
            }
        }
        selection
    }

    pub(super) fn item(&self, id: ItemId) -> &Item {
        &self.items[id as usize]
    }

    /// The nodes that an item stands for, by start time; never empty.
    pub(super) fn members(&self, id: ItemId) -> &[NodeId] {
        let range = &self.item(id).members;
        &self.members[range.start as usize..range.end as usize]
    }

    /// What is inside a shown item.
    pub(super) fn sections(&self, id: ItemId) -> &[ItemSection] {
        let range = &self.item(id).sections;
        &self.sections[range.start as usize..range.end as usize]
    }

    /// Whether everything is drawn: alone or as an iteration of a loop, but not folded away.
    pub(super) fn is_complete(&self) -> bool {
        self.items.iter().all(|item| item.is_shown && !item.is_mixed)
    }

    /// Makes the items inside `id`.
    fn expand(&mut self, timeline: &Timeline, fold: &Fold, id: ItemId) -> Range<ItemId> {
        let first_item = self.items.len() as ItemId;
        let first_section = self.sections.len() as u32;
        let parent = self.item(id).clone();
        let parents = parent.members.start as usize..parent.members.end as usize;
        let structure = fold.structure(parent.shape);
        let mut offset = 0;
        for (index, section) in structure.iter().enumerate() {
            let is_last = index + 1 == structure.len();
            if !(is_last && self.is_told_by_outcome(timeline, id, section, offset)) {
                self.expand_section(timeline, parents.clone(), section, offset);
            }
            offset += section.reps * section.runs.iter().map(|run| run.count).sum::<u32>();
        }
        self.items[id as usize].sections = first_section..self.sections.len() as u32;
        first_item..self.items.len() as ItemId
    }

    /// Whether a section is just the trap that its invocation ends with: the failed return tells it.
    fn is_told_by_outcome(&self, timeline: &Timeline, parent: ItemId, section: &Section, offset: u32) -> bool {
        let parent = timeline.node(self.members(parent)[0]);
        let child = timeline.node(parent.children().start + offset);
        let is_trap = matches!(child.what, What::Span(span) if span.role() == Role::Trap && span.children.is_empty());
        let ends_in_trap = matches!(parent.what, What::Span(span)
            if span.role() == Role::Invoke && matches!(span.outcome, Outcome::Trap { .. }));
        let is_alone = section.reps == 1 && section.runs.len() == 1 && section.runs[0].count == 1;
        is_alone && is_trap && ends_in_trap
    }

    fn expand_section(&mut self, timeline: &Timeline, parents: Range<usize>, section: &Section, offset: u32) {
        let first_item = self.items.len() as ItemId;
        let length: u32 = section.runs.iter().map(|run| run.count).sum();
        let mut run_offset = offset;
        for run in &section.runs {
            let first_member = self.members.len() as u32;
            for parent in parents.clone() {
                let first_child = timeline.node(self.members[parent]).children().start;
                for rep in 0..section.reps {
                    let first = first_child + run_offset + rep * length;
                    self.members.extend(first..first + run.count);
                }
            }
            run_offset += run.count;
            self.items.push(Item {
                run_count: run.count,
                is_shown: false,
                is_mixed: run.shape == MIXED,
                shape: run.shape,
                members: first_member..self.members.len() as u32,
                sections: 0..0,
            });
        }
        let spread = if section.reps > 1 {
            self.iterations(timeline, parents, section, offset)
        } else {
            Spread::default()
        };
        self.sections.push(ItemSection {
            reps: section.reps,
            items: first_item..self.items.len() as ItemId,
            spread,
        });
    }

    fn iterations(&self, timeline: &Timeline, parents: Range<usize>, section: &Section, offset: u32) -> Spread {
        let length: u32 = section.runs.iter().map(|run| run.count).sum();
        let durations = parents.flat_map(|parent| {
            let first = timeline.node(self.members[parent]).children().start + offset;
            (0..section.reps).map(move |rep| {
                let start = first + rep * length;
                (start..start + length).fold(0_u64, |sum, child| {
                    sum.saturating_add(timeline.node(child).duration_ns())
                })
            })
        });
        Spread::of(durations.collect())
    }

    fn importance(&self, timeline: &Timeline, id: ItemId) -> u64 {
        let members = self.members(id);
        let total = members.iter().fold(0_u64, |sum, node| {
            sum.saturating_add(timeline.node(*node).duration_ns())
        });
        let first = timeline.node(members[0]);
        // A failed syscall that is not part of how such calls work is worth as much as a call that takes 0.5 % of the time.
        let errno = matches!(first.what, What::Span(span)
            if matches!(span.outcome, Outcome::Errno { errno } if !is_flow_control(errno)));
        let least = if errno { timeline.totals.duration_ns / 200 } else { 0 };
        let failed = if first.is_failed { FAILED_IMPORTANCE } else { 0 };
        total.clamp(least, FAILED_IMPORTANCE - 1) + failed
    }
}
