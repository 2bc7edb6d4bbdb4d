//! A timer for fibers that costs them no syscall.
//!
//! tokio's own timer may write to an eventfd on the thread that starts it, which would be a `write` inside a host
//! function that nobody counted. Here the fiber only leaves its waker in a slot. A thread of its own comes by and wakes
//! all slots; being no worker of the runtime, it puts the tasks on the shared queue, from which any worker may take
//! them: fibers move between threads.

use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError, TryLockError, Weak};
use std::task::{Context, Poll, Waker};
use std::thread::JoinHandle;
use std::time::Duration;

type Slot = Mutex<Option<Waker>>;

/// Where one task naps; at most one nap at a time.
#[derive(Clone, Debug, Default)]
pub struct Bed(Arc<Slot>);

impl Bed {
    /// Suspends the task once, until the [`Alarm`] comes by.
    pub fn nap(&self) -> Nap {
        Nap {
            slot: self.0.clone(),
            waiting: false,
        }
    }
}

/// See [`Bed::nap`].
#[derive(Debug)]
pub struct Nap {
    slot: Arc<Slot>,
    waiting: bool,
}

impl Future for Nap {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<()> {
        if self.waiting {
            return Poll::Ready(());
        }
        self.waiting = true;
        // Never waits for the lock, which could be a futex call.
        match self.slot.try_lock() {
            Ok(mut slot) => *slot = Some(context.waker().clone()),
            Err(TryLockError::Poisoned(error)) => *error.into_inner() = Some(context.waker().clone()),
            Err(TryLockError::WouldBlock) => context.waker().wake_by_ref(),
        }
        Poll::Pending
    }
}

/// The thread that wakes nappers; it ends when this is dropped.
#[derive(Debug)]
pub struct Alarm {
    beds: Arc<Mutex<Vec<Weak<Slot>>>>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Alarm {
    /// Starts the thread, which wakes all nappers every `interval`.
    pub fn start(interval: Duration) -> std::io::Result<Self> {
        let beds: Arc<Mutex<Vec<Weak<Slot>>>> = Arc::default();
        let stop = Arc::new(AtomicBool::new(false));
        let thread = std::thread::Builder::new().name("alarm".to_owned()).spawn({
            let (beds, stop) = (beds.clone(), stop.clone());
            move || {
                while !stop.load(Ordering::Relaxed) {
                    std::thread::sleep(interval);
                    wake_all(&beds);
                }
                wake_all(&beds);
            }
        })?;
        Ok(Self {
            beds,
            stop,
            thread: Some(thread),
        })
    }

    /// A place to nap that this alarm visits.
    pub fn bed(&self) -> Bed {
        let bed = Bed::default();
        self.beds
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(Arc::downgrade(&bed.0));
        bed
    }
}

impl Drop for Alarm {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            // It cannot panic; nothing could be done about it here if it did.
            let _ended = thread.join();
        }
    }
}

fn wake_all(beds: &Mutex<Vec<Weak<Slot>>>) {
    let mut beds = beds.lock().unwrap_or_else(PoisonError::into_inner);
    beds.retain(|bed| {
        let Some(slot) = bed.upgrade() else { return false };
        // A slot in use is visited again in the next round. The lock is free before the waker runs.
        let waker = slot.try_lock().ok().and_then(|mut slot| slot.take());
        if let Some(waker) = waker {
            waker.wake();
        }
        true
    });
}
