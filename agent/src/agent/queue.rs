//! Traces between the event loop and the stages, bounded by their number and by the memory that they take.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use tokio::sync::mpsc;
use tokio::sync::mpsc::error::TrySendError;

use crate::span::Trace;

/// The event loop's end.
#[derive(Debug)]
pub(super) struct TraceSender {
    sender: mpsc::Sender<Trace>,
    waiting: Waiting,
    max_bytes: usize,
}

/// Estimated memory of the traces that have been put into the queue and are not through all stages.
#[derive(Clone, Debug, Default)]
pub(super) struct Waiting(Arc<AtomicUsize>);

impl Waiting {
    /// Bytes.
    pub(super) fn byte_count(&self) -> u64 {
        self.0.load(Ordering::Relaxed) as u64
    }

    /// A trace is through all stages.
    pub(super) fn leaves(&self, trace: &Trace) {
        self.0.fetch_sub(trace.estimated_bytes(), Ordering::Relaxed);
    }
}

/// A queue of so many traces and bytes; one trace is always taken.
pub(super) fn queue(max_traces: usize, max_bytes: usize) -> (TraceSender, mpsc::Receiver<Trace>, Waiting) {
    let (sender, receiver) = mpsc::channel(max_traces);
    let waiting = Waiting::default();
    let sender = TraceSender {
        sender,
        waiting: waiting.clone(),
        max_bytes,
    };
    (sender, receiver, waiting)
}

impl TraceSender {
    /// Tells how many traces are in the queue, as long as it is open.
    pub(super) fn depth(&self) -> impl Fn() -> u64 + Send + Sync + 'static {
        // Weak, as the stages end when nobody can send any more.
        let queue = self.sender.downgrade();
        move || {
            let queue = queue.upgrade();
            queue.map_or(0, |queue| (queue.max_capacity() - queue.capacity()) as u64)
        }
    }

    /// Never waits. Gives a trace back that there is no room for, with the reason.
    pub(super) fn offer(&self, trace: Trace) -> Result<(), (Box<Trace>, &'static str)> {
        let byte_count = trace.estimated_bytes();
        let before = self.waiting.0.fetch_add(byte_count, Ordering::Relaxed);
        let refused = if before > 0 && before.saturating_add(byte_count) > self.max_bytes {
            (Box::new(trace), "queue_bytes")
        } else {
            match self.sender.try_send(trace) {
                Ok(()) => return Ok(()),
                Err(TrySendError::Full(trace)) => (Box::new(trace), "queue_full"),
                // The stages have panicked, and the agent is about to end.
                Err(TrySendError::Closed(trace)) => (Box::new(trace), "queue_closed"),
            }
        };
        self.waiting.0.fetch_sub(byte_count, Ordering::Relaxed);
        Err(refused)
    }

    /// At the end, when there is nothing else to do than to wait for room, until `until`; `false` if there was none. Of bytes there is no bound any more:
    /// what is left is in memory anyway.
    pub(super) async fn send(&self, trace: Trace, until: Instant) -> bool {
        let byte_count = trace.estimated_bytes();
        self.waiting.0.fetch_add(byte_count, Ordering::Relaxed);
        let sent = tokio::time::timeout_at(until.into(), self.sender.send(trace)).await;
        let is_sent = matches!(sent, Ok(Ok(())));
        if !is_sent {
            self.waiting.0.fetch_sub(byte_count, Ordering::Relaxed);
        }
        is_sent
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sink::testing::{invoke, syscall, trace};

    fn large(call_count: u64) -> Trace {
        let mut root = invoke("run", 0, 1_000_000);
        root.children = (0..call_count).map(|call| syscall("read", call, call + 1)).collect();
        trace(root)
    }

    #[test]
    fn what_waits_is_bounded_by_its_number_and_by_its_bytes() {
        let byte_count = large(1_000).estimated_bytes();
        let (sender, mut receiver, waiting) = queue(3, 2 * byte_count);
        let depth = sender.depth();
        // However large, the first is taken.
        assert!(sender.offer(large(10_000)).is_ok());
        let (_, reason) = sender.offer(large(1)).unwrap_err();
        assert_eq!((reason, depth()), ("queue_bytes", 1));
        let first = receiver.try_recv().unwrap();
        // It is held until it is through.
        assert_eq!(sender.offer(large(1)).unwrap_err().1, "queue_bytes");
        waiting.leaves(&first);
        assert_eq!(waiting.byte_count(), 0);
        for _ in 0..2 {
            assert!(sender.offer(large(1_000)).is_ok());
        }
        assert_eq!(sender.offer(large(1)).unwrap_err().1, "queue_bytes");
        assert_eq!(waiting.byte_count(), 2 * byte_count as u64);
        while let Ok(trace) = receiver.try_recv() {
            waiting.leaves(&trace);
        }
        for _ in 0..3 {
            assert!(sender.offer(large(1)).is_ok());
        }
        let (given_back, reason) = sender.offer(large(1)).unwrap_err();
        assert_eq!((given_back.root.children.len(), reason), (1, "queue_full"));
        assert_eq!(waiting.byte_count(), 3 * large(1).estimated_bytes() as u64);
    }

    #[test]
    fn stages_that_are_gone_are_not_a_full_queue() {
        let (sender, receiver, waiting) = queue(3, usize::MAX);
        drop(receiver);
        let (given_back, reason) = sender.offer(large(1)).unwrap_err();
        assert_eq!((given_back.root.children.len(), reason), (1, "queue_closed"));
        assert_eq!((waiting.byte_count(), sender.depth()()), (0, 0));
    }
}
