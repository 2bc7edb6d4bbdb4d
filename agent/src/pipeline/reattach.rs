//! When sites that could not be attached again are tried again.

use std::{collections::HashMap, hash::Hash};

/// After the first failure, nanoseconds; it doubles with each that follows.
const FIRST_NS: u64 = 500_000_000;
/// The longest that is waited, nanoseconds.
const LONGEST_NS: u64 = 300_000_000_000;

/// Files of which sites are missing.
#[derive(Debug)]
pub(super) struct Retries<F>(HashMap<F, Retry>);

impl<F> Default for Retries<F> {
    fn default() -> Self {
        Self(HashMap::new())
    }
}

#[derive(Debug)]
struct Retry {
    at_ns: u64,
    wait_ns: u64,
}

impl<F: Copy + Eq + Hash> Retries<F> {
    /// Whether sites of a file may be attached now.
    pub(super) fn is_due(&self, file: F, now_ns: u64) -> bool {
        self.0.get(&file).is_none_or(|retry| now_ns >= retry.at_ns)
    }

    /// Notes how that went.
    pub(super) fn tried(&mut self, file: F, is_attached: bool, now_ns: u64) {
        if is_attached {
            self.0.remove(&file);
            return;
        }
        let wait_ns = self
            .0
            .get(&file)
            .map_or(FIRST_NS, |retry| (retry.wait_ns * 2).min(LONGEST_NS));
        let at_ns = now_ns.saturating_add(wait_ns);
        self.0.insert(file, Retry { at_ns, wait_ns });
    }

    /// Forgets files that are not probed any more.
    pub(super) fn keep(&mut self, is_probed: impl Fn(&F) -> bool) {
        self.0.retain(|file, _| is_probed(file));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_cannot_be_attached_is_tried_ever_more_seldom_until_it_can() {
        let mut retries = Retries::default();
        let file = 1;
        let mut tries = 0;
        for second in 0..3600 {
            let now_ns = second * 1_000_000_000;
            if retries.is_due(file, now_ns) {
                tries += 1;
                retries.tried(file, false, now_ns);
            }
        }
        assert!((10..30).contains(&tries), "{tries}");
        retries.tried(file, true, 0);
        assert!(retries.is_due(file, 0) && retries.0.is_empty());
    }
}
