//! How long the event loop may sleep. Every waking costs tens of microseconds, which is nothing beside work and everything on a node
//! where nothing happens.

use std::time::Duration;

/// While records come. They wake nobody, so this is how long one may wait, and how much the ring must hold.
const BUSY_INTERVAL: Duration = Duration::from_millis(20);
/// While none come: the first one wakes the loop. What is looked at by time alone is looked at this often.
const QUIET_INTERVAL: Duration = Duration::from_millis(200);
/// Turns without anything to do before it is quiet.
const QUIET_AFTER_TURNS: u32 = 25;

/// Whether there was anything to do lately.
#[derive(Debug, Default)]
pub(super) struct Rest {
    quiet_turns: u32,
}

impl Rest {
    /// After every turn.
    pub(super) fn turned(&mut self, is_busy: bool) {
        self.quiet_turns = if is_busy { 0 } else { self.quiet_turns.saturating_add(1) };
    }

    /// Whether the next record must wake the loop.
    pub(super) fn is_quiet(&self) -> bool {
        self.quiet_turns >= QUIET_AFTER_TURNS
    }

    /// Until the next turn, if nothing wakes the loop.
    pub(super) fn interval(&self) -> Duration {
        if self.is_quiet() { QUIET_INTERVAL } else { BUSY_INTERVAL }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_quiet_after_turns_without_work_and_busy_at_once() {
        let mut rest = Rest::default();
        assert_eq!(rest.interval(), BUSY_INTERVAL);
        for _ in 0..QUIET_AFTER_TURNS {
            assert!(!rest.is_quiet());
            rest.turned(false);
        }
        assert!(rest.is_quiet());
        assert_eq!(rest.interval(), QUIET_INTERVAL);
        rest.turned(true);
        assert!(!rest.is_quiet());
    }
}
