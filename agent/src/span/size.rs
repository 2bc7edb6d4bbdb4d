//! How much memory a trace takes.

use super::{Span, Trace};

impl Trace {
    /// What it takes up in memory, bytes, roughly: its spans and their stacks. Names are shared with other traces, and so is the process.
    pub fn estimated_bytes(&self) -> usize {
        let mut byte_count = size_of::<Self>();
        let mut rest: Vec<&Span> = vec![&self.root];
        while let Some(span) = rest.pop() {
            byte_count += size_of::<Span>() + size_of_val(&*span.stack) + size_of_val(&*span.suspends);
            rest.extend(&span.children);
        }
        byte_count
    }
}
