//! Instances of guests by number: their addresses stay inside the agent, for they tell where a process has its memory.

use std::collections::HashMap;

/// Addresses remembered of one process; numbers go on beyond them.
const MAX_REMEMBERED: usize = 4_096;

/// The instances of a process, in the order in which they were met. An address that is used again keeps its number.
#[derive(Debug, Default)]
pub(super) struct Instances {
    numbers: HashMap<u64, u64>,
    last: u64,
}

impl Instances {
    /// From 1.
    pub(super) fn number(&mut self, address: u64) -> u64 {
        if self.numbers.len() >= MAX_REMEMBERED && !self.numbers.contains_key(&address) {
            self.numbers.clear();
        }
        *self.numbers.entry(address).or_insert_with(|| {
            self.last += 1;
            self.last
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_instance_keeps_its_number_and_no_two_that_are_remembered_share_one() {
        let mut instances = Instances::default();
        let numbers = [0x7f00, 0x5000, 0x7f00].map(|address| instances.number(address));
        assert_eq!(numbers, [1, 2, 1]);
        for address in 0..10_000 {
            instances.number(address);
        }
        assert!(instances.numbers.len() <= MAX_REMEMBERED);
        assert_eq!(instances.number(u64::MAX), 10_003);
    }
}
