//! Functions of the runtime that are called seldom, by the kind of the site.

use wasmscope_common::{Mark, MarkEnd, SiteKind};

use super::Pipeline;
use crate::{decode::Record, event::Event};

impl Pipeline {
    /// A marked function was entered. `record` is the same, with its frames.
    pub(super) fn mark(&mut self, mark: &Mark, record: &Record, events: &mut Vec<Event>) {
        match kind(mark.site_kind) {
            Some(
                kind @ (SiteKind::MemoryGrow
                | SiteKind::TableGrow
                | SiteKind::OutOfFuel
                | SiteKind::EpochDeadline
                | SiteKind::ReportedTrap
                | SiteKind::Raise),
            ) => self.runtime_call(kind, mark, record, events),
            Some(kind) if kind.is_of_cold_start() => self.cold_begin(kind, mark, events),
            Some(_) | None => self.lose("decode", "unknown_site"),
        }
    }

    /// A marked function is about to return.
    pub(super) fn mark_end(&mut self, end: &MarkEnd, events: &mut Vec<Event>) {
        match kind(end.site_kind) {
            Some(
                kind @ (SiteKind::MemoryGrow | SiteKind::TableGrow | SiteKind::OutOfFuel | SiteKind::EpochDeadline),
            ) => super::runtime_calls::runtime_call_end(kind, end, events),
            Some(kind) if kind.is_of_cold_start() => self.cold_end(kind, end, events),
            Some(_) | None => self.lose("decode", "unknown_site"),
        }
    }
}

fn kind(site_kind: u64) -> Option<SiteKind> {
    u8::try_from(site_kind).ok().and_then(SiteKind::from_u8)
}
