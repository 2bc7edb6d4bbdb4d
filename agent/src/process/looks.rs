//! What looking at one process may cost: how many of its files are opened, and how much of what the kernel lists of it is read
//! in a second. A process decides what it maps and how often it publishes code, so it would decide what the agent does.

use std::collections::HashSet;

/// Libraries opened in one look.
const LIBRARIES_PER_LOOK: usize = 64;
/// Libraries opened of one process in all.
const LIBRARIES: usize = 1024;
/// Bytes of its list of mappings that may be read each second: some hundred looks at an ordinary process.
const MAPS_BYTES_PER_SECOND: u64 = 8 << 20;
/// As many at once: hosts compile hundreds of modules when they start.
const MAPS_BYTES_AT_ONCE: u64 = 64 << 20;
/// Links of descriptors that may be followed each second, and at once.
const LINKS_PER_SECOND: u64 = 5_000;

/// Which file a mapping is of: device as in the list of mappings, and inode.
type MappedFile = (String, u64);

/// What has been looked at of one process.
#[derive(Debug)]
pub struct Looks {
    libraries: HashSet<MappedFile>,
    /// One of its files did not answer: none is opened any more.
    is_stalled: bool,
    /// Bytes of the list of mappings.
    pub maps: Budget,
    /// Links of descriptors.
    pub links: Budget,
}

impl Default for Looks {
    fn default() -> Self {
        Self {
            libraries: HashSet::new(),
            is_stalled: false,
            maps: Budget::new(MAPS_BYTES_PER_SECOND, MAPS_BYTES_AT_ONCE),
            links: Budget::new(LINKS_PER_SECOND, LINKS_PER_SECOND),
        }
    }
}

/// The libraries to open in one look.
#[derive(Debug)]
pub struct LibraryLook<'a> {
    looks: &'a mut Looks,
    left: usize,
    /// Whether there were more than may be opened now, or ever.
    pub is_cut: bool,
    /// Whether one has not answered just now.
    pub has_stalled: bool,
}

impl Looks {
    /// Begins one.
    pub fn at_libraries(&mut self) -> LibraryLook<'_> {
        LibraryLook {
            left: LIBRARIES_PER_LOOK,
            looks: self,
            is_cut: false,
            has_stalled: false,
        }
    }
}

impl LibraryLook<'_> {
    /// Whether nothing is to be opened since something has not answered.
    pub fn is_stalled(&self) -> bool {
        self.looks.is_stalled
    }

    /// Something has not answered.
    pub fn stall(&mut self) {
        self.looks.is_stalled = true;
        self.has_stalled = true;
    }

    /// Whether this file is to be opened: not if it has been.
    pub fn takes(&mut self, file: &MappedFile) -> bool {
        if self.looks.libraries.contains(file) {
            return false;
        }
        if self.left == 0 || self.looks.libraries.len() >= LIBRARIES {
            self.is_cut = true;
            return false;
        }
        self.left -= 1;
        true
    }

    /// It could be opened, and need not be again while it is mapped.
    pub fn was_looked_at(&mut self, file: &MappedFile) {
        self.looks.libraries.insert(file.clone());
    }
}

/// So much per second, and so much at once.
#[derive(Debug)]
pub struct Budget {
    per_second: u64,
    at_once: u64,
    /// May be overdrawn once, as what something costs is known only afterwards.
    left: i64,
    filled_ns: u64,
}

impl Budget {
    fn new(per_second: u64, at_once: u64) -> Self {
        Self {
            per_second,
            at_once,
            left: signed(at_once),
            filled_ns: 0,
        }
    }

    /// Whether anything is left at this time, nanoseconds.
    pub fn has_any(&mut self, now_ns: u64) -> bool {
        let passed_ns = now_ns.saturating_sub(self.filled_ns);
        let more = u128::from(passed_ns) * u128::from(self.per_second) / 1_000_000_000;
        // Until it makes something, time goes on being counted.
        if more > 0 {
            let more = i64::try_from(more).unwrap_or(i64::MAX);
            self.left = self.left.saturating_add(more).min(signed(self.at_once));
            self.filled_ns = now_ns;
        }
        self.left > 0
    }

    /// Takes some of it.
    pub fn spend(&mut self, cost: u64) {
        self.left = self.left.saturating_sub(signed(cost));
    }
}

fn signed(count: u64) -> i64 {
    i64::try_from(count).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(inode: usize) -> MappedFile {
        ("fe:00".to_owned(), inode as u64)
    }

    #[test]
    fn each_look_opens_some_that_are_new_until_there_were_too_many() {
        let mut looks = Looks::default();
        let mut opened = Vec::new();
        for _ in 0..100 {
            let mut look = looks.at_libraries();
            let before = opened.len();
            for inode in 0..3_000 {
                if look.takes(&file(inode)) {
                    look.was_looked_at(&file(inode));
                    opened.push(inode);
                }
            }
            assert!(look.is_cut);
            assert!(opened.len() - before <= LIBRARIES_PER_LOOK);
        }
        assert_eq!(opened, (0..LIBRARIES).collect::<Vec<_>>());
    }

    #[test]
    fn few_libraries_are_opened_once_and_those_that_cannot_be_are_tried_again() {
        let mut looks = Looks::default();
        let mut look = looks.at_libraries();
        assert!(look.takes(&file(1)));
        assert!(look.takes(&file(2)));
        look.was_looked_at(&file(1));
        let mut look = looks.at_libraries();
        assert!(!look.takes(&file(1)));
        assert!(look.takes(&file(2)));
        assert!(!look.is_cut);
    }

    #[test]
    fn a_budget_is_overdrawn_at_most_once_and_fills_with_time_up_to_its_limit() {
        let mut budget = Budget::new(10, 20);
        let second = 1_000_000_000;
        assert!(budget.has_any(second));
        budget.spend(19);
        assert!(budget.has_any(second));
        budget.spend(11);
        assert!(!budget.has_any(second));
        assert!(!budget.has_any(2 * second));
        // Looking often does not keep it from filling.
        assert!((1..=200).any(|step| budget.has_any(2 * second + step * second / 1_000)));
        assert!(budget.has_any(100 * second));
        budget.spend(20);
        assert!(!budget.has_any(100 * second));
    }
}
