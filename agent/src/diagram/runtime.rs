//! Words for what guests call the runtime for: growth and interruptions.

use crate::span::{Growth, InterruptionCause, SpanKind};

use super::draw::Drawing;
use super::label::{bytes, counted, grouped};
use super::select::ItemId;

/// What a guest runs into.
pub(super) fn interruption(cause: InterruptionCause) -> &'static str {
    match cause {
        InterruptionCause::Fuel => "interrupted: fuel used up",
        InterruptionCause::Epoch => "interrupted: epoch deadline",
    }
}

impl<'t> Drawing<'_, 't> {
    /// The instruction, and by how much if that is the same for all.
    pub(super) fn growth_wanted(&self, item: ItemId) -> String {
        let (mut delta, mut is_one) = (None, true);
        for growth in self.growths(item) {
            is_one &= *delta.get_or_insert(growth.delta) == growth.delta;
        }
        match self.growths(item).next() {
            Some(growth) if is_one => format!("{} by {}", word(growth), amount(growth, growth.delta)),
            Some(growth) => word(growth).to_owned(),
            None => String::new(),
        }
    }

    /// From which size to which, and how near to the most that is allowed.
    pub(super) fn growth_result(&self, item: ItemId) -> Option<String> {
        let first = self.growths(item).find(|growth| growth.old.is_some())?;
        let last = self.growths(item).filter(|growth| growth.new.is_some()).last()?;
        let (old, new) = (first.old?, last.new?);
        let mut words = format!("{} → {}", grouped(old), amount(last, new));
        if let Some(size) = last.new_bytes() {
            words = format!("{words}, {}", bytes(size));
        }
        if let Some(maximum) = last.maximum {
            words = format!("{words} of at most {}", grouped(maximum));
        }
        Some(words)
    }

    fn growths(&self, item: ItemId) -> impl Iterator<Item = &'t Growth> {
        self.spans(item).filter_map(|span| match &span.kind {
            SpanKind::MemoryGrow(growth) | SpanKind::TableGrow(growth) => Some(growth),
            _ => None,
        })
    }
}

fn word(growth: &Growth) -> &'static str {
    if growth.page_bytes.is_some() {
        "memory.grow"
    } else {
        "table.grow"
    }
}

fn amount(growth: &Growth, count: u64) -> String {
    counted(count, if growth.page_bytes.is_some() { "page" } else { "element" })
}
