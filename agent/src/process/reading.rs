//! How much is read of one process's code objects: whoever can publish code can publish it again and again, and each time all
//! of it has to be read to know whether it is still the same.

use std::{collections::BTreeMap, ops::Range};

/// Bytes read of one process at once.
const BURST_BYTES: i64 = 512 << 20;
/// Bytes read of one process every second, in the long run: a tenth of a second's work.
const BYTES_PER_SECOND: u64 = 64 << 20;
/// Ranges that wait to be read, of one process.
const MAX_DEFERRED: usize = super::guests::MAX_OBJECTS;

/// The account of one process.
#[derive(Debug)]
pub struct Reading {
    /// What may be read yet; negative after one that was larger.
    left_bytes: i64,
    renewed_ns: u64,
    /// Ranges by their start, in the turn that is being handled: reading them again finds the same.
    read: BTreeMap<u64, u64>,
    turn: u64,
    /// By start.
    deferred: BTreeMap<u64, u64>,
}

/// What is to be done about a range that was published.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It is to be read.
    Read,
    /// It has been read since it was published.
    AlreadyRead,
    /// It is read later.
    Deferred,
    /// So it was before.
    Waits,
    /// It is not read, as too many wait.
    Refused,
}

impl Default for Reading {
    fn default() -> Self {
        Self {
            left_bytes: BURST_BYTES,
            renewed_ns: 0,
            read: BTreeMap::new(),
            turn: 0,
            deferred: BTreeMap::new(),
        }
    }
}

impl Reading {
    /// Decides about a range that was published before what is handled in this turn was taken out of the ring.
    pub fn ask(&mut self, range: &Range<u64>, turn: u64, now_ns: u64) -> Verdict {
        if self.turn != turn {
            self.turn = turn;
            self.read.clear();
        }
        self.renew(now_ns);
        if self.is_read(range, turn) {
            return Verdict::AlreadyRead;
        }
        // What overlaps has been there before or comes after it.
        self.read
            .retain(|start, end| *end <= range.start || range.end <= *start);
        if self.left_bytes > 0 {
            self.deferred.remove(&range.start);
            self.read.insert(range.start, range.end);
            return Verdict::Read;
        }
        if self.deferred.len() >= MAX_DEFERRED && !self.deferred.contains_key(&range.start) {
            return Verdict::Refused;
        }
        self.read.insert(range.start, range.end);
        match self.deferred.insert(range.start, range.end) {
            Some(end) if end == range.end => Verdict::Waits,
            _ => Verdict::Deferred,
        }
    }

    /// Whether a range has been decided about in this turn.
    pub fn is_read(&self, range: &Range<u64>, turn: u64) -> bool {
        self.turn == turn && self.read.get(&range.start).is_some_and(|end| *end == range.end)
    }

    /// Notes what reading has cost.
    pub fn spend(&mut self, bytes: u64) {
        self.left_bytes = self.left_bytes.saturating_sub_unsigned(bytes);
    }

    /// The next of those that were deferred, if it may be read now.
    pub fn next_deferred(&mut self, now_ns: u64) -> Option<Range<u64>> {
        if self.deferred.is_empty() {
            return None;
        }
        self.renew(now_ns);
        if self.left_bytes <= 0 {
            return None;
        }
        let (start, end) = self.deferred.first_key_value()?;
        Some(*start..*end)
    }

    fn renew(&mut self, now_ns: u64) {
        let passed_ns = now_ns.saturating_sub(self.renewed_ns);
        let bytes = u128::from(passed_ns) * u128::from(BYTES_PER_SECOND) / 1_000_000_000;
        // What is less than a byte is kept for the next time.
        if bytes > 0 {
            self.renewed_ns = now_ns;
            let bytes = i64::try_from(bytes).unwrap_or(BURST_BYTES);
            self.left_bytes = self.left_bytes.saturating_add(bytes).min(BURST_BYTES);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: u64 = 1_000_000_000;
    const MIB: u64 = 1 << 20;

    #[test]
    fn a_range_is_read_once_a_turn() {
        let mut reading = Reading::default();
        assert_eq!(reading.ask(&(1..9), 1, 0), Verdict::Read);
        assert_eq!(reading.ask(&(1..9), 1, 0), Verdict::AlreadyRead);
        assert_eq!(reading.ask(&(20..30), 1, 0), Verdict::Read);
        assert_eq!(reading.ask(&(1..9), 1, 0), Verdict::AlreadyRead);
        assert_eq!(
            reading.ask(&(8..10), 1, 0),
            Verdict::Read,
            "what overlaps takes its place"
        );
        assert_eq!(reading.ask(&(1..9), 1, 0), Verdict::Read);
        assert_eq!(reading.ask(&(1..9), 2, 0), Verdict::Read);
    }

    #[test]
    fn whoever_publishes_for_ever_is_read_at_a_bounded_rate_and_in_the_end() {
        let mut reading = Reading::default();
        let mut read_bytes = 0;
        for turn in 0..10_000 {
            let now_ns = turn * SECOND / 100;
            if reading.ask(&(4096..8192), turn, now_ns) == Verdict::Read {
                reading.spend(256 * MIB);
                read_bytes += 256 * MIB;
            }
        }
        assert!((6 << 30..8 << 30).contains(&read_bytes), "{read_bytes}");
        let waiting = reading.next_deferred(1000 * SECOND);
        assert_eq!(waiting, Some(4096..8192));
        assert_eq!(reading.ask(&(4096..8192), 10_001, 1000 * SECOND), Verdict::Read);
        assert_eq!(reading.next_deferred(1000 * SECOND), None);
    }

    #[test]
    fn no_more_ranges_wait_than_objects_are_kept() {
        let mut reading = Reading::default();
        reading.spend(1 << 40);
        let verdicts = (0..2000).map(|start| reading.ask(&(start..start + 1), 0, 0));
        assert_eq!(
            verdicts.filter(|verdict| *verdict == Verdict::Deferred).count(),
            MAX_DEFERRED
        );
        assert_eq!(reading.ask(&(0..1), 1, 0), Verdict::Waits);
    }
}
