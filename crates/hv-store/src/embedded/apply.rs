//! What a command does to the tables, inside the write transaction of its batch.

use std::sync::Arc;

use bytes::Bytes;
use redb::ReadableTable;

use super::recent::Revised;
use super::tables::{LogEntry, Meta, Tables, TablesResult, Version, encode_version};
use crate::bounds::Interval;
use crate::{Change, Compare, KeyValue, LeaseId, Op, Result, Revision, StoreError, Txn, TxnOutcome};

/// So many revisions are kept however large they are: a watch that lags a little must not lose its place.
const MIN_KEPT_REVISIONS: u64 = 100;

/// Applies commands one after the other. An error of the tables leaves a mess: the write transaction must be aborted
/// then. A refusal (the inner result) leaves nothing behind.
pub(super) struct Applier<'t, 'txn> {
    tables: &'t mut Tables<'txn>,
    pub(super) meta: Meta,
    /// What was changed, in the order of revisions.
    pub(super) revised: Vec<Arc<Revised>>,
    /// How many keys were changed.
    pub(super) changed: usize,
    /// Reused for every row.
    row: Vec<u8>,
    log_row: Vec<u8>,
}

impl<'t, 'txn> Applier<'t, 'txn> {
    pub(super) fn new(tables: &'t mut Tables<'txn>, meta: Meta) -> Self {
        Self { tables, meta, revised: Vec::new(), changed: 0, row: Vec::new(), log_row: Vec::new() }
    }

    /// Compares, and changes if all holds. The transaction is within the bounds.
    pub(super) fn txn(&mut self, txn: Txn) -> TablesResult<Result<TxnOutcome>> {
        for compare in &txn.compares {
            if !self.holds(compare)? {
                let found = txn.otherwise_get.iter().map(|key| self.get(key));
                return Ok(Ok(TxnOutcome::Refused(found.collect::<TablesResult<_>>()?)));
            }
        }
        for op in &txn.then {
            if let Op::Put { lease: Some(lease), .. } = op
                && self.tables.leases.get(lease.0)?.is_none()
            {
                return Ok(Err(StoreError::LeaseNotFound(*lease)));
            }
        }
        let mut changes = Vec::with_capacity(txn.then.len());
        self.log_row.clear();
        for op in txn.then {
            match op {
                Op::Put { key, value, lease } => changes.push(self.put(key, value, lease)?),
                Op::Delete(keys) => self.delete_all(self.keys_in(&Interval::of(&keys))?, &mut changes)?,
            }
        }
        self.seal(changes)?;
        Ok(Ok(TxnOutcome::Committed(Revision(self.meta.revision))))
    }

    /// A new lease.
    pub(super) fn grant(&mut self, ttl_seconds: u64) -> TablesResult<LeaseId> {
        self.meta.last_lease += 1;
        self.tables.leases.insert(self.meta.last_lease, ttl_seconds)?;
        Ok(LeaseId(self.meta.last_lease))
    }

    /// Ends a lease and deletes its keys in one revision. Whether there was such a lease.
    pub(super) fn end_lease(&mut self, lease: LeaseId) -> TablesResult<bool> {
        if self.tables.leases.remove(lease.0)?.is_none() {
            return Ok(false);
        }
        let mut keys = Vec::new();
        for row in self.tables.lease_keys.range((lease.0, &b""[..])..)? {
            let (row, _) = row?;
            let (owner, key) = row.value();
            if owner != lease.0 {
                break;
            }
            keys.push(Bytes::copy_from_slice(key));
        }
        let mut changes = Vec::with_capacity(keys.len());
        self.log_row.clear();
        self.delete_all(keys, &mut changes)?;
        self.seal(changes)?;
        Ok(true)
    }

    /// Gives the changes made since the last call a revision of their own.
    fn seal(&mut self, changes: Vec<Change>) -> TablesResult<()> {
        if changes.is_empty() {
            return Ok(());
        }
        self.meta.revision += 1;
        self.meta.history_bytes += self.log_row.len() as u64;
        self.changed += changes.len();
        self.tables.log.insert(self.meta.revision, &self.log_row[..])?;
        self.revised.push(Arc::new(Revised { revision: self.meta.revision, changes }));
        Ok(())
    }

    fn put(&mut self, key: Bytes, value: Bytes, lease: Option<LeaseId>) -> TablesResult<Change> {
        let revision = Revision(self.meta.revision + 1);
        let superseded = self.supersede(&key)?;
        let kv = KeyValue {
            value,
            create_revision: superseded.map_or(revision, |old| Revision(old.create_revision)),
            mod_revision: revision,
            version: superseded.map_or(1, |old| old.version + 1),
            lease,
            key,
        };
        self.row.clear();
        encode_version(&kv, &mut self.row);
        self.meta.live_bytes += (kv.key.len() + self.row.len()) as u64;
        self.tables.current.insert(&kv.key[..], &self.row[..])?;
        if let Some(lease) = lease {
            self.tables.lease_keys.insert((lease.0, &kv.key[..]), ())?;
        }
        let superseded = superseded.map_or(0, |old| old.mod_revision);
        LogEntry { deleted: false, superseded, key: &kv.key }.encode(&mut self.log_row);
        Ok(Change::Put(kv))
    }

    fn delete_all(&mut self, keys: Vec<Bytes>, changes: &mut Vec<Change>) -> TablesResult<()> {
        for key in keys {
            let Some(old) = self.supersede(&key)? else { continue };
            self.tables.current.remove(&key[..])?;
            LogEntry { deleted: true, superseded: old.mod_revision, key: &key }.encode(&mut self.log_row);
            changes.push(Change::Deleted { key, revision: Revision(self.meta.revision + 1) });
        }
        Ok(())
    }

    /// Moves what is now current to the past, and detaches it from its lease.
    fn supersede(&mut self, key: &[u8]) -> TablesResult<Option<Superseded>> {
        let Some(row) = self.tables.current.get(key)? else { return Ok(None) };
        let old = Version::decode(row.value(), "current")?;
        self.row.clear();
        self.meta.live_bytes = self.meta.live_bytes.saturating_sub((key.len() + row.value().len()) as u64);
        self.row.extend_from_slice(&(self.meta.revision + 1).to_le_bytes());
        self.row.extend_from_slice(row.value());
        self.tables.past.insert((key, old.mod_revision), &self.row[..])?;
        self.meta.history_bytes += (key.len() + self.row.len()) as u64;
        if let Some(lease) = old.lease {
            self.tables.lease_keys.remove((lease.0, key))?;
        }
        Ok(Some(Superseded {
            create_revision: old.create_revision,
            mod_revision: old.mod_revision,
            version: old.version,
        }))
    }

    fn keys_in(&self, interval: &Interval) -> TablesResult<Vec<Bytes>> {
        if interval.is_empty() {
            return Ok(Vec::new());
        }
        let mut keys = Vec::new();
        for row in self.tables.current.range(&interval.start[..]..)? {
            let (key, _) = row?;
            if !interval.contains(key.value()) {
                break;
            }
            keys.push(Bytes::copy_from_slice(key.value()));
        }
        Ok(keys)
    }

    fn get(&self, key: &Bytes) -> TablesResult<Option<KeyValue>> {
        match self.tables.current.get(&key[..])? {
            Some(row) => Ok(Some(Version::decode(row.value(), "current")?.to_kv(key.clone(), false))),
            None => Ok(None),
        }
    }

    /// As etcd does, a key that does not exist counts as revision 0 and version 0, and has no value.
    fn holds(&self, compare: &Compare) -> TablesResult<bool> {
        let key = match compare {
            Compare::NoneIn(keys) => return self.is_vacant(&Interval::of(keys)),
            Compare::Absent(key)
            | Compare::Present(key)
            | Compare::ModRevision(key, _)
            | Compare::CreateRevision(key, _)
            | Compare::Version(key, _)
            | Compare::Value(key, _) => key,
        };
        let row = self.tables.current.get(&key[..])?;
        let found = row.as_ref().map(|row| Version::decode(row.value(), "current")).transpose()?;
        Ok(match compare {
            Compare::Absent(_) => found.is_none(),
            Compare::Present(_) => found.is_some(),
            Compare::ModRevision(_, wanted) => found.map_or(0, |found| found.mod_revision) == wanted.0,
            Compare::CreateRevision(_, wanted) => found.map_or(0, |found| found.create_revision) == wanted.0,
            Compare::Version(_, wanted) => found.map_or(0, |found| found.version) == *wanted,
            Compare::Value(_, wanted) => found.is_some_and(|found| found.value == wanted),
            Compare::NoneIn(_) => unreachable!("answered above"),
        })
    }

    fn is_vacant(&self, interval: &Interval) -> TablesResult<bool> {
        if interval.is_empty() {
            return Ok(true);
        }
        match self.tables.current.range(&interval.start[..]..)?.next() {
            Some(row) => Ok(!interval.contains(row?.0.value())),
            None => Ok(true),
        }
    }
}

/// What a new version needs of the one before it.
#[derive(Clone, Copy)]
struct Superseded {
    create_revision: u64,
    mod_revision: u64,
    version: u64,
}

/// How much history is kept; see [`super::EmbeddedOptions`].
#[derive(Clone, Copy, Debug)]
pub(super) struct Kept {
    pub(super) revisions: u64,
    pub(super) bytes: u64,
}

/// Drops what is older than the oldest readable revision, and moves that forward where more history is there than is
/// `kept`. Stops soon after `limit` rows, so that nobody waits long for it. Whether more is to be dropped.
pub(super) fn trim(
    tables: &mut Tables<'_>,
    meta: &mut Meta,
    kept: Kept,
    limit: usize,
) -> TablesResult<Trimmed> {
    meta.oldest = meta.oldest.max(meta.revision.saturating_sub(kept.revisions));
    let mut rows = 0;
    while rows < limit {
        let first = match tables.log.first()? {
            Some((revision, _)) => revision.value(),
            None => return Ok(Trimmed { rows, more: false }),
        };
        let too_much = meta.history_bytes > kept.bytes && first + MIN_KEPT_REVISIONS < meta.revision;
        if first >= meta.oldest && !too_much {
            return Ok(Trimmed { rows, more: false });
        }
        meta.oldest = meta.oldest.max(first + 1);
        let Some((_, row)) = tables.log.pop_first()? else { continue };
        let mut dropped_bytes = row.value().len();
        for entry in LogEntry::decode_all(row.value())? {
            rows += 1;
            if entry.superseded != 0
                && let Some(past) = tables.past.remove((entry.key, entry.superseded))?
            {
                dropped_bytes += entry.key.len() + past.value().len();
            }
        }
        meta.history_bytes = meta.history_bytes.saturating_sub(dropped_bytes as u64);
    }
    Ok(Trimmed { rows, more: true })
}

/// What [`trim`] did.
#[derive(Clone, Copy, Debug)]
pub(super) struct Trimmed {
    pub(super) rows: usize,
    pub(super) more: bool,
}

#[cfg(test)]
mod tests {
    use redb::backends::InMemoryBackend;

    use super::*;

    /// Otherwise whoever writes little waits for what others superseded.
    #[test]
    fn one_step_drops_a_bounded_number_of_rows_however_large_the_revisions_are() {
        let database = redb::Database::builder().create_with_backend(InMemoryBackend::new()).unwrap();
        let txn = database.begin_write().unwrap();
        let mut tables = Tables::open(&txn).unwrap();
        let mut applier = Applier::new(&mut tables, Meta::EMPTY);
        for _ in 0..10 {
            let then = (0..100).map(|index| Op::put(format!("{index:03}"), "value")).collect();
            applier.txn(Txn { then, ..Txn::default() }).unwrap().unwrap();
        }
        let (mut meta, changed) = (applier.meta, applier.changed);
        assert_eq!((meta.revision, changed), (11, 1000));
        let kept = Kept { revisions: 1, bytes: u64::MAX };
        let mut steps = 0;
        loop {
            let trimmed = trim(&mut tables, &mut meta, kept, 150).unwrap();
            steps += 1;
            assert!(trimmed.rows <= 250, "{trimmed:?}");
            if !trimmed.more {
                break;
            }
        }
        assert!(steps >= 4, "{steps} steps for 800 rows");
        assert_eq!(meta.oldest, 10);
        // What is left: the two revisions that are kept, and what the later one superseded.
        assert_eq!(tables.log.iter().unwrap().count(), 2);
        let left: usize = tables.past.iter().unwrap().count();
        assert_eq!(left, 200);
        let past: usize = tables
            .past
            .iter()
            .unwrap()
            .map(|row| row.unwrap())
            .map(|(key, row)| key.value().0.len() + row.value().len())
            .sum();
        let log: usize = tables.log.iter().unwrap().map(|row| row.unwrap().1.value().len()).sum();
        assert_eq!(meta.history_bytes, (past + log) as u64);
    }
}
