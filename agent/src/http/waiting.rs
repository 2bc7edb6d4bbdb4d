//! Connections that may be dropped for newer ones: those whose request is not known, or not being answered yet.

use std::collections::VecDeque;
use std::future::Future;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::oneshot;

/// Room for so many.
#[derive(Clone, Debug)]
pub(super) struct WaitingRoom {
    state: Arc<Mutex<State>>,
    max_places: usize,
}

#[derive(Debug, Default)]
struct State {
    next_id: u64,
    /// Oldest first.
    places: VecDeque<(u64, oneshot::Sender<()>)>,
}

/// A place in the room, until it is dropped or left.
#[derive(Debug)]
pub(super) struct Place {
    room: WaitingRoom,
    id: u64,
}

impl WaitingRoom {
    pub(super) fn new(max_places: usize) -> Self {
        Self {
            state: Arc::default(),
            max_places,
        }
    }

    /// Takes a place, that of the oldest if there is none. The future is ready when somebody else needs it.
    pub(super) fn enter(&self) -> (Place, impl Future<Output = ()> + Send + 'static) {
        let (drop_it, dropped) = oneshot::channel();
        let mut state = self.state();
        while state.places.len() >= self.max_places {
            let Some((_, oldest)) = state.places.pop_front() else {
                break;
            };
            // It may just have ended.
            let _ = oldest.send(());
        }
        let id = state.next_id;
        state.next_id += 1;
        state.places.push_back((id, drop_it));
        let place = Place { room: self.clone(), id };
        let is_needed = async move {
            if dropped.await.is_err() {
                // It left, and may stay as long as it likes.
                std::future::pending::<()>().await;
            }
        };
        (place, is_needed)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Place {
    /// Makes room for another.
    pub(super) fn leave(&self) {
        let mut state = self.room.state();
        if let Ok(at) = state.places.binary_search_by_key(&self.id, |(id, _)| *id) {
            state.places.remove(at);
        }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.leave();
    }
}
