//! Functions of the runtime that are called seldom, by the kind of the site.

use wasmscope_common::{Mark, MarkEnd, SiteKind};

use super::Pipeline;
use crate::{decode::Record, event::Event};

impl Pipeline {
    /// A marked function was entered. `record` is the same, with its frames.
    pub(super) fn mark(&mut self, mark: &Mark, _record: &Record, events: &mut Vec<Event>) {
        match u8::try_from(mark.site_kind).ok().and_then(SiteKind::from_u8) {
            Some(kind) if kind.is_of_cold_start() => self.cold_begin(kind, mark, events),
            Some(_) | None => self.lose("decode", "unknown_site"),
        }
    }

    /// A marked function is about to return.
    pub(super) fn mark_end(&mut self, end: &MarkEnd, events: &mut Vec<Event>) {
        match u8::try_from(end.site_kind).ok().and_then(SiteKind::from_u8) {
            Some(kind) if kind.is_of_cold_start() => self.cold_end(kind, end, events),
            Some(_) | None => self.lose("decode", "unknown_site"),
        }
    }
}
