//! Reading what may never answer: a file can be on a server that is gone, or be served by the very tenant who is looked at. Such a read is made on
//! a thread of its own and given up after a while, so that it holds up nobody else.

use std::fs;
use std::sync::Arc;
use std::sync::atomic::{AtomicI32, AtomicUsize, Ordering};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::thread;
use std::time::{Duration, Instant};

/// How long is waited for somebody who does nothing; the largest host on a cold disk takes a second or two.
const PATIENCE: Duration = Duration::from_secs(10);
/// Of the time waited, the share that somebody who is slow and not stuck spends on a processor at least, as where the agent may use little of one.
const BUSY_SHARE: u32 = 50;
/// So often is somebody slow waited for again.
const MAX_WAITS: u32 = 12;
/// How long is waited while somebody has just been waited for in vain. Whoever lets the agent wait again and again must not gain by it.
const LITTLE_PATIENCE: Duration = Duration::from_millis(100);
/// How long that goes on.
const VEXED: Duration = Duration::from_mins(1);
/// Threads that wait for an answer nobody waits for any longer. With as many, nothing more is asked: they cannot be ended.
const MAX_GIVEN_UP: usize = 4;

type Work = Box<dyn FnOnce() + Send>;

/// Waits for reads, but not for ever.
#[derive(Debug, Default)]
pub struct Patience {
    worker: Option<Worker>,
    given_up: Arc<AtomicUsize>,
    vexed_at: Option<Instant>,
}

impl Patience {
    /// What `work` returns, unless that takes too long. `None` also where too many have been given up, or no thread can be had.
    pub fn wait_for<T: Send + 'static>(&mut self, work: impl FnOnce() -> T + Send + 'static) -> Option<T> {
        self.wait(self.patience(), work)
    }

    fn patience(&self) -> Duration {
        if self.vexed_at.is_some_and(|at| at.elapsed() < VEXED) {
            LITTLE_PATIENCE
        } else {
            PATIENCE
        }
    }

    fn wait<T: Send + 'static>(&mut self, patience: Duration, work: impl FnOnce() -> T + Send + 'static) -> Option<T> {
        if self.given_up.load(Ordering::Acquire) >= MAX_GIVEN_UP {
            return None;
        }
        // Without room, so that whoever answers knows whether anybody still waits: else the thread is free again.
        let (answer, answered) = mpsc::sync_channel(0);
        let given_up = Arc::clone(&self.given_up);
        let work: Work = Box::new(move || {
            if answer.send(work()).is_err() {
                given_up.fetch_sub(1, Ordering::AcqRel);
            }
        });
        let worker = match &self.worker {
            Some(worker) => worker,
            None => self.worker.insert(start()?),
        };
        worker.works.send(work).ok()?;
        let mut found = answered.recv_timeout(patience);
        let mut spent = Duration::ZERO;
        for _ in 1..MAX_WAITS {
            let now = worker.processor_time();
            if !matches!(found, Err(RecvTimeoutError::Timeout)) || now < spent + patience / BUSY_SHARE {
                break;
            }
            spent = now;
            found = answered.recv_timeout(patience);
        }
        if found.is_err() {
            // It ends with its work.
            self.worker = None;
        }
        if matches!(found, Err(RecvTimeoutError::Timeout)) {
            // Before the receiver goes, so that the count is never below zero.
            self.given_up.fetch_add(1, Ordering::AcqRel);
            self.vexed_at = Some(Instant::now());
        }
        drop(answered);
        found.ok()
    }
}

/// A thread that reads for others.
#[derive(Debug)]
struct Worker {
    works: Sender<Work>,
    /// 0 until it runs.
    tid: Arc<AtomicI32>,
}

impl Worker {
    /// What it has spent on processors: `/proc/PID/task/TID/schedstat`, whose first number is in nanoseconds.
    fn processor_time(&self) -> Duration {
        let tid = self.tid.load(Ordering::Acquire);
        let stat = fs::read_to_string(format!("/proc/self/task/{tid}/schedstat")).unwrap_or_default();
        let ns = stat.split(' ').next().and_then(|ns| ns.parse().ok());
        Duration::from_nanos(ns.unwrap_or(0))
    }
}

fn start() -> Option<Worker> {
    let (sender, works): (_, Receiver<Work>) = mpsc::channel();
    let tid = Arc::new(AtomicI32::new(0));
    let own = Arc::clone(&tid);
    let run = move || {
        own.store(rustix::thread::gettid().as_raw_nonzero().get(), Ordering::Release);
        for work in works {
            work();
        }
    };
    thread::Builder::new().name("reader".to_owned()).spawn(run).ok()?;
    Some(Worker { works: sender, tid })
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHORT: Duration = Duration::from_millis(1);
    /// So long that even a machine at work gives a thread its share of it.
    const LONGER: Duration = Duration::from_millis(60);

    /// Waits in vain; what lets the thread go on.
    fn stall(patience: &mut Patience) -> Sender<()> {
        let (release, released) = mpsc::channel::<()>();
        assert_eq!(patience.wait(SHORT, move || released.recv().is_ok()), None);
        release
    }

    #[test]
    fn what_does_not_answer_is_given_up_and_holds_up_nobody_else() {
        let mut patience = Patience::default();
        assert_eq!(patience.wait_for(|| 7), Some(7));
        let _stalled = stall(&mut patience);
        assert_eq!(patience.patience(), LITTLE_PATIENCE);
        assert_eq!(patience.wait(PATIENCE, || 8), Some(8));
    }

    #[test]
    fn who_is_slow_and_not_stuck_is_waited_for() {
        let mut patience = Patience::default();
        let work = || {
            let begun = Instant::now();
            while begun.elapsed() < 5 * LONGER {
                std::hint::spin_loop();
            }
            9
        };
        assert_eq!(patience.wait(2 * LONGER, work), Some(9));
    }

    #[test]
    fn threads_that_are_given_up_are_bounded_and_come_back() {
        let mut patience = Patience::default();
        let stalled: Vec<_> = (0..MAX_GIVEN_UP).map(|_| stall(&mut patience)).collect();
        assert_eq!(patience.wait(PATIENCE, || 9), None, "no thread is left to ask");
        drop(stalled);
        while patience.given_up.load(Ordering::Acquire) > 0 {
            thread::yield_now();
        }
        assert_eq!(patience.wait(PATIENCE, || 9), Some(9));
    }

    #[test]
    fn a_panic_of_a_reader_is_no_thread_that_hangs() {
        let mut patience = Patience::default();
        assert_eq!(patience.wait(PATIENCE, || -> u8 { panic!("as a parser may") }), None);
        assert_eq!(patience.given_up.load(Ordering::Acquire), 0);
        assert_eq!(patience.wait(PATIENCE, || 9), Some(9));
    }
}
