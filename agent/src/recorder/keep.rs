//! All that is kept, within one budget: of whoever takes most goes the least worthy first, so that a noisy workload displaces
//! itself and not a quiet one.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::hash::{BuildHasher as _, Hash as _, Hasher as _, RandomState};

use crate::span::{Function, Process, SpanKind, Trace, TraceId};

use super::config::RecorderConfig;
use super::key::{Entry, Facts, Key, Quota, Wanted};
use super::random::Random;

/// Bytes of a tenant and of a key's place in the maps.
const INDEX_BYTES: usize = 256;

/// What became of the traces.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Counts {
    pub(super) offered: u64,
    pub(super) not_wanted: u64,
    pub(super) displaced: u64,
    pub(super) window_passed: u64,
    pub(super) over_budget: u64,
    pub(super) trace_too_large: u64,
    pub(super) too_many_keys: u64,
}

/// What shares of the budget are given to: a pod, a container or a process.
#[derive(Debug, Default)]
struct Tenant {
    bytes: usize,
    keys: BTreeSet<(usize, u128)>,
}

/// What is kept.
#[derive(Debug)]
pub(super) struct Keep {
    quota: Quota,
    memory_bytes: usize,
    max_keys: usize,
    /// Two, since a name that collides with another's must not be found by trying.
    hashers: (RandomState, RandomState),
    random: Random,
    keys: HashMap<u128, Key>,
    tenants: HashMap<u128, Tenant>,
    by_bytes: BTreeSet<(usize, u128)>,
    by_key_count: BTreeSet<(usize, u128)>,
    ids: BTreeMap<TraceId, u128>,
    bytes: usize,
    interval: u64,
    pub(super) counts: Counts,
}

/// A trace that is wanted, and where it goes.
#[derive(Clone, Copy, Debug)]
pub(super) struct Place {
    key: u128,
    tenant: u128,
    pub(super) wanted: Wanted,
    pub(super) offered_count: u64,
}

impl Keep {
    pub(super) fn new(config: &RecorderConfig, random: Random) -> Self {
        Self {
            quota: quota(config),
            memory_bytes: config.memory_bytes(),
            max_keys: config.max_keys as usize,
            hashers: (RandomState::new(), RandomState::new()),
            random,
            keys: HashMap::new(),
            tenants: HashMap::new(),
            by_bytes: BTreeSet::new(),
            by_key_count: BTreeSet::new(),
            ids: BTreeMap::new(),
            bytes: 0,
            interval: 0,
            counts: Counts::default(),
        }
    }

    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }

    pub(super) fn key_count(&self) -> usize {
        self.keys.len()
    }

    pub(super) fn trace_count(&self) -> usize {
        self.ids.len()
    }

    /// Whether a trace is wanted. Takes the time of two hashes, whatever the size of the trace.
    pub(super) fn offer(&mut self, trace: &Trace, now_ns: u64) -> Option<Place> {
        self.counts.offered += 1;
        self.expire(now_ns);
        let tenant = self.hash(|hasher| hash_tenant(&trace.process, hasher));
        let function = function(trace);
        let key = self.hash(|hasher| {
            hash_tenant(&trace.process, hasher);
            function
                .map(|function| (&function.module, function.index, &function.name))
                .hash(hasher);
        });
        let facts = Facts {
            at_ns: now_ns,
            duration_ns: trace.root.duration_ns(),
            outcome: &trace.root.outcome,
        };
        if !self.keys.contains_key(&key) {
            if !self.make_room_for_key(tenant) {
                self.counts.too_many_keys += 1;
                return None;
            }
            let made = Key::new(tenant, function.cloned());
            self.keys.insert(key, made);
            let shares = self.tenants.entry(tenant).or_default();
            self.by_key_count.remove(&(shares.keys.len(), tenant));
            self.by_bytes.remove(&(shares.bytes, tenant));
            shares.keys.insert((0, key));
            self.by_key_count.insert((shares.keys.len(), tenant));
            self.by_bytes.insert((shares.bytes, tenant));
            self.settle(key, 0);
            self.fit();
        }
        let Some(known) = self.keys.get_mut(&key) else {
            // Names alone are more than the budget.
            self.counts.over_budget += 1;
            return None;
        };
        let wanted = known.offer(facts, &self.quota, &mut self.random);
        if !wanted.is_any() || self.ids.contains_key(&trace.id) {
            self.counts.not_wanted += 1;
            return None;
        }
        Some(Place {
            key,
            tenant,
            wanted,
            offered_count: self.counts.offered,
        })
    }

    /// Keeps a trace that was wanted, and gives up what that displaces.
    pub(super) fn insert(&mut self, place: Place, entry: Entry) {
        let id = entry.id;
        if self.ids.contains_key(&id) {
            self.counts.not_wanted += 1;
            return;
        }
        let Some(key) = self.keys.get_mut(&place.key).filter(|key| key.tenant == place.tenant) else {
            // Its key was given up in between.
            self.counts.too_many_keys += 1;
            return;
        };
        let before = key.bytes();
        let displaced = key.insert(entry, &self.quota);
        self.ids.insert(id, place.key);
        self.counts.displaced += displaced.len() as u64;
        for entry in &displaced {
            self.ids.remove(&entry.id);
        }
        self.settle(place.key, before);
        self.fit();
    }

    /// Gives up what has passed out of the window; cheap as long as no part of the window has ended.
    pub(super) fn expire(&mut self, now_ns: u64) {
        let interval = self.quota.interval(now_ns);
        if interval <= self.interval {
            return;
        }
        self.interval = interval;
        for id in self.keys.keys().copied().collect::<Vec<_>>() {
            let quota = self.quota;
            let passed = self.change(id, |key| key.expire(now_ns, &quota));
            self.counts.window_passed += passed;
        }
        self.drop_empty_keys();
    }

    pub(super) fn reconfigure(&mut self, config: &RecorderConfig, now_ns: u64) {
        self.quota = quota(config);
        self.memory_bytes = config.memory_bytes();
        self.max_keys = config.max_keys as usize;
        self.interval = 0;
        for id in self.keys.keys().copied().collect::<Vec<_>>() {
            let quota = self.quota;
            let displaced = self.change(id, |key| key.reconfigure(now_ns, &quota));
            self.counts.displaced += displaced;
        }
        self.expire(now_ns);
        while self.keys.len() > self.max_keys {
            let (_, tenant) = *self.by_key_count.last().expect("there are keys");
            self.drop_key_of(tenant);
        }
        self.fit();
    }

    /// Every trace kept, with the export that it is of.
    pub(super) fn entries(&self) -> impl Iterator<Item = (&Key, &Entry)> {
        self.keys
            .values()
            .flat_map(|key| key.entries.iter().map(move |entry| (key, entry)))
    }

    /// The traces whose ids lie in a range, by id.
    pub(super) fn in_range(&self, first: TraceId, last: TraceId) -> impl Iterator<Item = (&Key, &Entry)> {
        self.ids.range(first..=last).filter_map(|(id, key)| {
            let key = self.keys.get(key)?;
            let entry = key.entries.iter().find(|entry| entry.id == *id)?;
            Some((key, entry))
        })
    }

    fn hash(&self, write: impl Fn(&mut std::hash::DefaultHasher)) -> u128 {
        let half = |state: &RandomState| {
            let mut hasher = state.build_hasher();
            write(&mut hasher);
            u128::from(hasher.finish())
        };
        half(&self.hashers.0) << 64 | half(&self.hashers.1)
    }

    fn change(&mut self, id: u128, change: impl FnOnce(&mut Key) -> Vec<Entry>) -> u64 {
        let Some(key) = self.keys.get_mut(&id) else { return 0 };
        let before = key.bytes();
        let gone = change(key);
        for entry in &gone {
            self.ids.remove(&entry.id);
        }
        self.settle(id, before);
        gone.len() as u64
    }

    /// Notes that a key's size is no longer what it was.
    fn settle(&mut self, id: u128, before: usize) {
        let Some(key) = self.keys.get(&id) else { return };
        let tenant_id = key.tenant;
        let after = key.bytes() + INDEX_BYTES;
        let before = if before == 0 { 0 } else { before + INDEX_BYTES };
        let Some(tenant) = self.tenants.get_mut(&tenant_id) else {
            return;
        };
        self.by_bytes.remove(&(tenant.bytes, tenant_id));
        tenant.keys.remove(&(before, id));
        tenant.keys.insert((after, id));
        tenant.bytes = tenant.bytes - before + after;
        self.by_bytes.insert((tenant.bytes, tenant_id));
        self.bytes = self.bytes - before + after;
    }

    /// Gives up traces until all fits: of the tenant that takes most, of its key that takes most, what is worth least.
    fn fit(&mut self) {
        while self.bytes > self.memory_bytes {
            let Some((_, tenant)) = self.by_bytes.last() else {
                return;
            };
            let Some((_, id)) = self.tenants[tenant].keys.last().copied() else {
                return;
            };
            let evicted = self.change(id, |key| key.evict().into_iter().collect());
            self.counts.over_budget += evicted;
            if evicted == 0 {
                self.drop_key(id);
            }
        }
    }

    /// Whether a tenant may have one key more, if need be for one of a tenant that has more of them.
    fn make_room_for_key(&mut self, tenant: u128) -> bool {
        if self.keys.len() < self.max_keys {
            return true;
        }
        let own = self.tenants.get(&tenant).map_or(0, |tenant| tenant.keys.len());
        match self.by_key_count.last().copied() {
            Some((most, other)) if most > own + 1 => {
                self.drop_key_of(other);
                true
            }
            _ => false,
        }
    }

    /// The key that takes least.
    fn drop_key_of(&mut self, tenant: u128) {
        if let Some((_, id)) = self
            .tenants
            .get(&tenant)
            .and_then(|tenant| tenant.keys.first().copied())
        {
            let lost = self.drop_key(id);
            self.counts.too_many_keys += lost;
        }
    }

    fn drop_empty_keys(&mut self) {
        let empty: Vec<u128> = self
            .keys
            .iter()
            .filter(|(_, key)| key.entries.is_empty())
            .map(|(id, _)| *id)
            .collect();
        for id in empty {
            self.drop_key(id);
        }
    }

    fn drop_key(&mut self, id: u128) -> u64 {
        let Some(key) = self.keys.remove(&id) else { return 0 };
        for entry in &key.entries {
            self.ids.remove(&entry.id);
        }
        let bytes = key.bytes() + INDEX_BYTES;
        if let Some(tenant) = self.tenants.get_mut(&key.tenant) {
            self.by_bytes.remove(&(tenant.bytes, key.tenant));
            self.by_key_count.remove(&(tenant.keys.len(), key.tenant));
            tenant.keys.remove(&(bytes, id));
            tenant.bytes -= bytes;
            if tenant.keys.is_empty() {
                self.tenants.remove(&key.tenant);
            } else {
                self.by_bytes.insert((tenant.bytes, key.tenant));
                self.by_key_count.insert((tenant.keys.len(), key.tenant));
            }
        }
        self.bytes -= bytes;
        key.entries.len() as u64
    }
}

fn quota(config: &RecorderConfig) -> Quota {
    Quota {
        slowest: config.slowest_per_key as usize,
        failed: config.failed_per_key as usize,
        random: config.random_per_key as usize,
        window_ns: config.window_ns(),
    }
}

/// The function that the outermost invocation entered.
pub(super) fn function(trace: &Trace) -> Option<&std::sync::Arc<Function>> {
    match &trace.root.kind {
        SpanKind::Invoke { function } => function.as_ref(),
        _ => None,
    }
}

fn hash_tenant(process: &Process, hasher: &mut std::hash::DefaultHasher) {
    let place = &process.place;
    match (&place.pod_uid, &place.container_id) {
        (Some(pod), _) => (0, pod).hash(hasher),
        (None, Some(container)) => (1, container).hash(hasher),
        (None, None) => (2, process.pid, process.start_ns).hash(hasher),
    }
}

#[cfg(test)]
impl Keep {
    pub(super) fn set_memory_bytes(&mut self, bytes: usize) {
        self.memory_bytes = bytes;
    }

    /// What everything takes, counted anew.
    pub(super) fn counted_bytes(&self) -> usize {
        let of_tenants: usize = self.tenants.values().map(|tenant| tenant.bytes).sum();
        let of_keys: usize = self.keys.values().map(|key| key.bytes() + INDEX_BYTES).sum();
        assert_eq!(of_tenants, of_keys);
        let entries: usize = self.keys.values().map(|key| key.entries.len()).sum();
        assert_eq!(entries, self.ids.len());
        of_keys
    }
}
