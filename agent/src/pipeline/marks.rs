//! Functions of the runtime that are called seldom, by the kind of the site.

use wasmscope_common::{Mark, MarkEnd, SiteKind};

use super::Pipeline;
use crate::{decode::Record, event::Event};

impl Pipeline {
    /// A marked function was entered. `record` is the same, with its frames.
    pub(super) fn mark(&mut self, mark: &Mark, _record: &Record, _events: &mut Vec<Event>) {
        match u8::try_from(mark.site_kind).ok().and_then(SiteKind::from_u8) {
            Some(SiteKind::Plain | SiteKind::HelperSpawn | SiteKind::HelperRun | SiteKind::HelperRest) | None => {
                self.lose("decode", "unknown_site");
            }
        }
    }

    /// A marked function is about to return.
    pub(super) fn mark_end(&mut self, end: &MarkEnd, _events: &mut Vec<Event>) {
        match u8::try_from(end.site_kind).ok().and_then(SiteKind::from_u8) {
            Some(SiteKind::Plain | SiteKind::HelperSpawn | SiteKind::HelperRun | SiteKind::HelperRest) | None => {
                self.lose("decode", "unknown_site");
            }
        }
    }
}
