//! The simulated store's truth: every version of every key, leases on the world's clock, the log of revisions.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::Duration;

use bytes::Bytes;
use hv_store::bounds::Interval;
use hv_store::{
    Change, Compare, KeyRange, KeyValue, LeaseId, Op, RangeRequest, RangeResult, Result, Revision,
    StoreError, Txn, TxnOutcome, WatchEvents,
};

struct Lease {
    ttl: Duration,
    deadline: Duration,
    keys: BTreeSet<Bytes>,
}

/// One revision's changes.
pub(crate) struct Logged {
    pub(crate) revision: u64,
    pub(crate) changes: Vec<Change>,
}

/// The whole store.
pub(crate) struct Core {
    revision: u64,
    /// The oldest revision that can be read.
    oldest: u64,
    /// Each key's versions, oldest first; `None` is a deletion.
    keys: BTreeMap<Bytes, Vec<(u64, Option<KeyValue>)>>,
    log: VecDeque<Logged>,
    leases: BTreeMap<i64, Lease>,
    last_lease: i64,
    now: Duration,
    /// How many revisions the world has looked at; see [`Core::unseen`].
    seen: u64,
    /// Leases end after three eighths of their time: a planted bug.
    pub(crate) is_hasty: bool,
}

impl Core {
    pub(crate) fn new() -> Self {
        Self {
            is_hasty: false,
            revision: 1,
            oldest: 1,
            keys: BTreeMap::new(),
            log: VecDeque::new(),
            leases: BTreeMap::new(),
            last_lease: 1000,
            now: Duration::ZERO,
            seen: 1,
        }
    }

    pub(crate) fn revision(&self) -> Revision {
        Revision(self.revision)
    }

    /// What all versions of all keys take.
    pub(crate) fn size_bytes(&self) -> u64 {
        let versions =
            self.keys.iter().flat_map(|(key, versions)| versions.iter().map(move |(_, kv)| (key, kv)));
        versions.map(|(key, kv)| (key.len() + kv.as_ref().map_or(0, |kv| kv.value.len())) as u64).sum()
    }

    /// Moves the clock on, which ends leases. Whether something changed.
    pub(crate) fn advance(&mut self, now: Duration) -> bool {
        let before = self.revision;
        self.now = self.now.max(now);
        let early = |lease: &Lease| if self.is_hasty { lease.ttl * 5 / 8 } else { Duration::ZERO };
        let due: Vec<_> = self
            .leases
            .iter()
            .filter(|(_, lease)| lease.deadline <= self.now + early(lease))
            .map(|(id, _)| *id)
            .collect();
        for id in due {
            self.end_lease(LeaseId(id));
        }
        self.revision != before
    }

    /// The revisions that were not looked at before.
    pub(crate) fn unseen(&mut self) -> impl Iterator<Item = &Logged> {
        let seen = std::mem::replace(&mut self.seen, self.revision);
        let from = self.log.partition_point(|logged| logged.revision <= seen);
        self.log.range(from..)
    }

    pub(crate) fn current(&self, key: &[u8]) -> Option<&KeyValue> {
        self.keys.get(key).and_then(|versions| versions.last()).and_then(|(_, kv)| kv.as_ref())
    }

    fn at(&self, versions: &[(u64, Option<KeyValue>)], revision: u64) -> Option<KeyValue> {
        let until = versions.partition_point(|(at, _)| *at <= revision);
        versions[..until].last().and_then(|(_, kv)| kv.clone())
    }

    pub(crate) fn range(&self, request: &RangeRequest) -> Result<RangeResult> {
        let at = request.at.map_or(self.revision, |at| at.0);
        if at > self.revision {
            return Err(StoreError::InvalidRequest(format!("revision {at} is in the future")));
        }
        if at < self.oldest {
            return Err(StoreError::Compacted { requested: Revision(at), oldest: Revision(self.oldest) });
        }
        let mut found = self
            .entries(&Interval::of(&request.keys))
            .filter_map(|(_, versions)| self.at(versions, at))
            .take(request.limit + 1)
            .collect::<Vec<_>>();
        let more = found.len() > request.limit;
        found.truncate(request.limit);
        if request.keys_only {
            found.iter_mut().for_each(|kv| kv.value = Bytes::new());
        }
        Ok(RangeResult { kvs: found, more, revision: Revision(self.revision) })
    }

    fn entries<'a>(
        &'a self,
        interval: &Interval,
    ) -> impl Iterator<Item = (&'a Bytes, &'a Vec<(u64, Option<KeyValue>)>)> + use<'a> {
        let interval = interval.clone();
        let from = interval.first().clone();
        self.keys.range(from..).take_while(move |(key, _)| interval.contains(key))
    }

    fn live_keys(&self, keys: &KeyRange) -> Vec<Bytes> {
        let interval = Interval::of(keys);
        if interval.is_empty() {
            return Vec::new();
        }
        self.entries(&interval)
            .filter(|(_, versions)| versions.last().is_some_and(|(_, kv)| kv.is_some()))
            .map(|(key, _)| key.clone())
            .collect()
    }

    fn holds(&self, compare: &Compare) -> bool {
        let revision = |kv: Option<&KeyValue>, of: fn(&KeyValue) -> u64| kv.map_or(0, of);
        match compare {
            Compare::Absent(key) => self.current(key).is_none(),
            Compare::Present(key) => self.current(key).is_some(),
            Compare::ModRevision(key, wanted) => {
                revision(self.current(key), |kv| kv.mod_revision.0) == wanted.0
            }
            Compare::CreateRevision(key, wanted) => {
                revision(self.current(key), |kv| kv.create_revision.0) == wanted.0
            }
            Compare::Version(key, wanted) => revision(self.current(key), |kv| kv.version) == *wanted,
            Compare::Value(key, wanted) => self.current(key).is_some_and(|kv| kv.value == *wanted),
            Compare::NoneIn(keys) => self.live_keys(keys).is_empty(),
        }
    }

    pub(crate) fn txn(&mut self, txn: Txn) -> Result<TxnOutcome> {
        if !txn.compares.iter().all(|compare| self.holds(compare)) {
            return Ok(TxnOutcome::Refused(
                txn.otherwise_get.iter().map(|key| self.current(key).cloned()).collect(),
            ));
        }
        for op in &txn.then {
            if let Op::Put { lease: Some(lease), .. } = op
                && !self.leases.contains_key(&lease.0)
            {
                return Err(StoreError::LeaseNotFound(*lease));
            }
        }
        let mut changes = Vec::with_capacity(txn.then.len());
        for op in txn.then {
            match op {
                Op::Put { key, value, lease } => changes.push(self.put(key, value, lease)),
                Op::Delete(keys) => {
                    let keys = self.live_keys(&keys);
                    self.delete(keys, &mut changes);
                }
            }
        }
        self.seal(changes);
        Ok(TxnOutcome::Committed(Revision(self.revision)))
    }

    fn put(&mut self, key: Bytes, value: Bytes, lease: Option<LeaseId>) -> Change {
        let revision = Revision(self.revision + 1);
        let old = self.detach(&key);
        let kv = KeyValue {
            key: key.clone(),
            value,
            create_revision: old.as_ref().map_or(revision, |old| old.create_revision),
            mod_revision: revision,
            version: old.map_or(1, |old| old.version + 1),
            lease,
        };
        if let Some(lease) = lease.and_then(|lease| self.leases.get_mut(&lease.0)) {
            lease.keys.insert(key.clone());
        }
        self.keys.entry(key).or_default().push((revision.0, Some(kv.clone())));
        Change::Put(kv)
    }

    fn delete(&mut self, keys: Vec<Bytes>, changes: &mut Vec<Change>) {
        let revision = self.revision + 1;
        for key in keys {
            self.detach(&key);
            self.keys.entry(key.clone()).or_default().push((revision, None));
            changes.push(Change::Deleted { key, revision: Revision(revision) });
        }
    }

    /// Takes a key from its lease; what it was.
    fn detach(&mut self, key: &Bytes) -> Option<KeyValue> {
        let old = self.current(key).cloned();
        if let Some(lease) = old.as_ref().and_then(|old| old.lease).and_then(|id| self.leases.get_mut(&id.0))
        {
            lease.keys.remove(key);
        }
        old
    }

    fn seal(&mut self, changes: Vec<Change>) {
        if !changes.is_empty() {
            self.revision += 1;
            self.log.push_back(Logged { revision: self.revision, changes });
        }
    }

    pub(crate) fn grant(&mut self, ttl: Duration) -> LeaseId {
        self.last_lease += 1;
        let lease = Lease { ttl, deadline: self.now + ttl, keys: BTreeSet::new() };
        self.leases.insert(self.last_lease, lease);
        LeaseId(self.last_lease)
    }

    pub(crate) fn renew(&mut self, id: LeaseId) -> Result<()> {
        let now = self.now;
        match self.leases.get_mut(&id.0).filter(|lease| lease.deadline > now) {
            Some(lease) => {
                lease.deadline = now + lease.ttl;
                Ok(())
            }
            None => Err(StoreError::LeaseNotFound(id)),
        }
    }

    pub(crate) fn end_lease(&mut self, id: LeaseId) {
        if let Some(lease) = self.leases.remove(&id.0) {
            let mut changes = Vec::new();
            self.delete(lease.keys.into_iter().collect(), &mut changes);
            self.seal(changes);
        }
    }

    pub(crate) fn compact(&mut self, revision: Revision) -> Result<()> {
        if revision.0 > self.revision {
            return Err(StoreError::InvalidRequest(format!("revision {revision} is in the future")));
        }
        if revision.0 <= self.oldest {
            return Ok(());
        }
        self.oldest = revision.0;
        self.keys.retain(|_, versions| {
            let superseded = versions.partition_point(|(at, _)| *at <= revision.0).saturating_sub(1);
            versions.drain(..superseded);
            !(versions.len() == 1 && versions[0].1.is_none() && versions[0].0 <= revision.0)
        });
        // What the world has not looked at stays in the log.
        let keep = revision.0.min(self.seen + 1);
        let until = self.log.partition_point(|logged| logged.revision < keep);
        self.log.drain(..until);
        Ok(())
    }

    /// The next thing that a watch is to be told that knows everything before `from`.
    pub(crate) fn after(&self, interval: &Interval, from: u64) -> Result<Option<WatchEvents>> {
        if from > self.revision {
            return Ok(None);
        }
        if from < self.oldest {
            return Err(StoreError::Compacted { requested: Revision(from), oldest: Revision(self.oldest) });
        }
        let begin = self.log.partition_point(|logged| logged.revision < from);
        for logged in self.log.range(begin..) {
            let is_in = |change: &&Change| match change {
                Change::Put(kv) => interval.contains(&kv.key),
                Change::Deleted { key, .. } => interval.contains(key),
            };
            let changes: Vec<_> = logged.changes.iter().filter(is_in).cloned().collect();
            if !changes.is_empty() {
                return Ok(Some(WatchEvents { revision: Revision(logged.revision), changes }));
            }
        }
        Ok(Some(WatchEvents { revision: Revision(self.revision), changes: Vec::new() }))
    }
}
