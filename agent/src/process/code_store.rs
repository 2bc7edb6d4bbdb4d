//! The code objects of all processes: those that run the same module share what was read of it, and all together keep no more
//! than the node's budget.

use std::{
    collections::HashMap,
    hash::Hash,
    ops::Deref,
    sync::{
        Arc, Mutex, PoisonError, Weak,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
};

use crate::image::CodeObject;

/// Bytes that code objects may take on a node, unless the options say otherwise.
pub const MAX_NODE_BYTES: usize = 128 << 20;
/// Of the node's budget, the share that one process may have: one in so many.
const PROCESS_SHARE: usize = 2;
/// Names of functions and imports remembered by address, of all processes.
const MAX_NODE_NAMES: usize = 1 << 18;
/// Names of one kind that a process may have however many others have.
const OWN_NAMES: usize = 256;
/// Entries at which it is first looked which code objects are gone.
const FIRST_SWEEP: usize = 256;

/// Hands out code objects; clones hand out the same.
#[derive(Clone, Debug)]
pub struct CodeStore(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    max_bytes: usize,
    held_bytes: AtomicUsize,
    names: AtomicUsize,
    known: Mutex<Known>,
}

#[derive(Debug, Default)]
struct Known {
    by_hash: HashMap<String, Weak<StoredCode>>,
    sweep_at: usize,
}

/// A code object that is in the node's account for as long as it is held.
#[derive(Debug)]
pub struct StoredCode {
    object: CodeObject,
    bytes: usize,
    store: CodeStore,
}

/// How a code object is kept.
#[derive(Debug)]
pub enum Kept {
    /// All of it.
    Whole(Arc<StoredCode>),
    /// Without the tables of addresses and traps, for which there was no room.
    WithoutTables(Arc<StoredCode>),
}

impl Default for CodeStore {
    fn default() -> Self {
        Self::new(MAX_NODE_BYTES)
    }
}

impl CodeStore {
    /// An empty one that keeps at most so many bytes.
    pub fn new(max_bytes: usize) -> Self {
        Self(Arc::new(Inner {
            max_bytes,
            held_bytes: AtomicUsize::new(0),
            names: AtomicUsize::new(0),
            known: Mutex::default(),
        }))
    }

    /// Bytes that all code objects take together.
    pub fn held_bytes(&self) -> usize {
        self.0.held_bytes.load(Relaxed)
    }

    /// Keeps what was read of a code object for a process that has others of so many bytes; `None` if there is no room even
    /// for its names. What another process holds already takes no more of the node.
    pub fn keep(&self, hash: &str, mut object: CodeObject, process_bytes: usize) -> Option<Kept> {
        let max_process_bytes = self.0.max_bytes / PROCESS_SHARE;
        let is_entitled = |bytes: usize| process_bytes.saturating_add(bytes) <= max_process_bytes;
        let mut known = self.0.known.lock().unwrap_or_else(PoisonError::into_inner);
        let mut is_whole = true;
        loop {
            let bytes = object.held_bytes();
            // The hash is short, and does not cover the symbols: only what is the same in everything is shared.
            let same = known.by_hash.get(hash).and_then(Weak::upgrade);
            let same = same.filter(|same| same.object == object);
            let has_room = self.held_bytes().saturating_add(bytes) <= self.0.max_bytes;
            if is_entitled(bytes) && (same.is_some() || has_room) {
                let code = same.unwrap_or_else(|| self.insert(&mut known, hash, object, bytes));
                return Some(if is_whole {
                    Kept::Whole(code)
                } else {
                    Kept::WithoutTables(code)
                });
            }
            if !is_whole {
                return None;
            }
            object.drop_tables();
            is_whole = false;
        }
    }

    fn insert(&self, known: &mut Known, hash: &str, object: CodeObject, bytes: usize) -> Arc<StoredCode> {
        self.0.held_bytes.fetch_add(bytes, Relaxed);
        let code = Arc::new(StoredCode {
            object,
            bytes,
            store: self.clone(),
        });
        if known.by_hash.len() >= known.sweep_at {
            known.by_hash.retain(|_, code| code.strong_count() > 0);
            known.sweep_at = FIRST_SWEEP.max(known.by_hash.len() * 2);
        }
        known.by_hash.insert(hash.to_owned(), Arc::downgrade(&code));
        code
    }
}

impl Deref for StoredCode {
    type Target = CodeObject;

    fn deref(&self) -> &CodeObject {
        &self.object
    }
}

impl StoredCode {
    /// Bytes that it takes.
    pub fn bytes(&self) -> usize {
        self.bytes
    }
}

impl Drop for StoredCode {
    fn drop(&mut self) {
        self.store.0.held_bytes.fetch_sub(self.bytes, Relaxed);
    }
}

/// What one process remembers of one kind, which counts among what all remember.
#[derive(Debug)]
pub struct Names<K, V> {
    entries: HashMap<K, V>,
    store: CodeStore,
}

impl<K: Eq + Hash, V> Names<K, V> {
    /// None.
    pub fn new(store: &CodeStore) -> Self {
        Self {
            entries: HashMap::new(),
            store: store.clone(),
        }
    }

    /// One of them.
    pub fn get(&self, key: &K) -> Option<&V> {
        self.entries.get(key)
    }

    /// How many there are.
    pub fn count(&self) -> usize {
        self.entries.len()
    }

    /// Remembers one more; `false` if the node has no room.
    pub fn insert(&mut self, key: K, value: V) -> bool {
        if let Some(known) = self.entries.get_mut(&key) {
            *known = value;
            return true;
        }
        if self.entries.len() >= OWN_NAMES && self.store.0.names.load(Relaxed) >= MAX_NODE_NAMES {
            return false;
        }
        self.store.0.names.fetch_add(1, Relaxed);
        self.entries.insert(key, value);
        true
    }

    /// Forgets all of them.
    pub fn clear(&mut self) {
        self.store.0.names.fetch_sub(self.entries.len(), Relaxed);
        self.entries.clear();
    }
}

impl<K, V> Drop for Names<K, V> {
    fn drop(&mut self) {
        self.store.0.names.fetch_sub(self.entries.len(), Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::code_object::testing::object_with;

    const MIB: usize = 1 << 20;

    fn bytes_of(kept: &Kept) -> usize {
        match kept {
            Kept::Whole(code) | Kept::WithoutTables(code) => code.bytes(),
        }
    }

    #[test]
    fn processes_that_run_the_same_module_share_it_and_its_memory_is_free_when_all_are_gone() {
        let store = CodeStore::default();
        let kept: Vec<_> = (0..1000)
            .map(|_| store.keep("a", object_with(1, MIB), 0).expect("there is room"))
            .collect();
        assert_eq!(store.held_bytes(), bytes_of(&kept[0]));
        assert!(kept.iter().all(|kept| matches!(kept, Kept::Whole(_))));
        drop(kept);
        assert_eq!(store.held_bytes(), 0);
    }

    #[test]
    fn one_that_claims_the_hash_of_another_is_not_taken_for_it() {
        let store = CodeStore::default();
        let Some(Kept::Whole(first)) = store.keep("a", object_with(1, MIB), 0) else {
            panic!("there is room");
        };
        let Some(Kept::Whole(second)) = store.keep("a", object_with(2, MIB), 0) else {
            panic!("there is room");
        };
        assert!(!Arc::ptr_eq(&first, &second));
        assert_eq!(store.held_bytes(), first.bytes() + second.bytes());
    }

    #[test]
    fn however_many_processes_come_the_node_keeps_no_more_than_its_budget_and_names_before_tables() {
        let store = CodeStore::new(16 * MIB);
        let mut kept = Vec::new();
        let mut refused = 0;
        for process in 0..100_000 {
            match store.keep(&process.to_string(), object_with(process, MIB), 0) {
                Some(more) => kept.push(more),
                None => refused += 1,
            }
            assert!(store.held_bytes() <= 16 * MIB);
            if refused > 10 {
                break;
            }
        }
        assert!(refused > 10, "{} kept", kept.len());
        let whole = kept.iter().filter(|kept| matches!(kept, Kept::Whole(_))).count();
        assert_eq!(whole, 15, "of a little more than a MiB each");
        assert!(kept.len() > whole);
        kept.clear();
        assert!(matches!(
            store.keep("new", object_with(0, MIB), 0),
            Some(Kept::Whole(_))
        ));
    }

    #[test]
    fn one_process_does_not_get_what_is_there_for_all() {
        let store = CodeStore::new(16 * MIB);
        assert!(matches!(
            store.keep("a", object_with(1, MIB), 8 * MIB - 100 * 1024),
            Some(Kept::WithoutTables(_))
        ));
        assert!(store.keep("b", object_with(2, MIB), 8 * MIB).is_none());
    }

    #[test]
    fn names_of_all_processes_are_bounded_and_each_has_some_of_its_own() {
        let store = CodeStore::default();
        let mut greedy = Names::new(&store);
        let count = (0..2 * MAX_NODE_NAMES).filter(|name| greedy.insert(*name, ())).count();
        assert_eq!(count, MAX_NODE_NAMES);
        let mut modest = Names::new(&store);
        let count = (0..2 * OWN_NAMES).filter(|name| modest.insert(*name, ())).count();
        assert_eq!(count, OWN_NAMES);
        drop(greedy);
        assert!(modest.insert(OWN_NAMES, ()));
    }
}
