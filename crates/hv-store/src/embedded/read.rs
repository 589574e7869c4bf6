//! Reading keys, now or at an old revision, and reading history.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use redb::{ReadOnlyTable, ReadTransaction};

use super::recent::Revised;
use super::tables::{CURRENT, Damaged, LOG, LogEntry, PAST, TablesResult, Version, decode_past, read_meta};
use super::writer::Shared;
use crate::bounds::{Interval, successor};
use crate::{Change, KeyValue, RangeRequest, RangeResult, Result, Revision, StoreError};

/// Most bytes of changes that one read of history gathers before it stops.
const HISTORY_CHUNK_BYTES: usize = 4 << 20;

/// How often, and after which pause, a read is made again that was cut off by the recovery from a failed write.
const ATTEMPTS: usize = 50;
const PAUSE: Duration = Duration::from_millis(20);

/// Where to read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Place {
    /// Here: it takes microseconds.
    Inline,
    /// On a thread that may block.
    Thread,
}

/// Reads from a snapshot of everything committed so far.
pub(super) async fn read<T: Send + 'static>(
    shared: &Arc<Shared>,
    place: Place,
    operation: &'static str,
    read: impl Fn(&ReadTransaction) -> TablesResult<Result<T>> + Send + Sync + 'static,
) -> Result<T> {
    let read = Arc::new(read);
    let mut attempt = 1;
    loop {
        let outcome = match place {
            Place::Inline => shared.disk.read().and_then(|txn| read(&txn)),
            Place::Thread => {
                let (shared, read) = (Arc::clone(shared), Arc::clone(&read));
                let thread =
                    tokio::task::spawn_blocking(move || shared.disk.read().and_then(|txn| read(&txn)));
                thread.await.map_err(|_| StoreError::Closed)?
            }
        };
        match outcome {
            Ok(result) => return result,
            Err(error) if shared.disk.is_interrupted(&error) => {
                // Making the file smaller takes as long as it takes; who cannot wait has a deadline of its own.
                if !shared.disk.is_compacting() {
                    attempt += 1;
                }
                if attempt > ATTEMPTS {
                    return Err(shared.disk.error(operation, error));
                }
                tokio::time::sleep(PAUSE).await;
            }
            Err(error) => return Err(shared.disk.error(operation, error)),
        }
    }
}

type Rows = ReadOnlyTable<&'static [u8], &'static [u8]>;
type PastRows = ReadOnlyTable<(&'static [u8], u64), &'static [u8]>;

/// Answers a range. The request is within the bounds.
pub(super) fn range(txn: &ReadTransaction, request: &RangeRequest) -> TablesResult<Result<RangeResult>> {
    let meta = read_meta(txn)?;
    let interval = Interval::of(&request.keys);
    let revision = Revision(meta.revision);
    let limit = request.limit;
    let mut kvs = match request.at {
        None => range_now(txn, &interval, limit + 1, request.keys_only)?,
        Some(at) if at.0 > meta.revision => {
            let why = format!("revision {at} is in the future; the store is at {revision}");
            return Ok(Err(StoreError::InvalidRequest(why)));
        }
        Some(at) if at.0 < meta.oldest => {
            return Ok(Err(StoreError::Compacted { requested: at, oldest: Revision(meta.oldest) }));
        }
        Some(at) if at == revision => range_now(txn, &interval, limit + 1, request.keys_only)?,
        Some(at) => range_at(txn, &interval, limit + 1, at.0, request.keys_only)?,
    };
    let more = kvs.len() > limit;
    kvs.truncate(limit);
    Ok(Ok(RangeResult { kvs, more, revision }))
}

fn range_now(
    txn: &ReadTransaction,
    interval: &Interval,
    limit: usize,
    keys_only: bool,
) -> TablesResult<Vec<KeyValue>> {
    let current = txn.open_table(CURRENT)?;
    let mut kvs = Vec::new();
    for row in current.range(&interval.start[..]..)? {
        let (key, row) = row?;
        if kvs.len() == limit || !interval.contains(key.value()) {
            break;
        }
        let key = Bytes::copy_from_slice(key.value());
        kvs.push(Version::decode(row.value(), "current")?.to_kv(key, keys_only));
    }
    Ok(kvs)
}

/// Merges the keys that are there now with those that only the past has. Of each key's past, one row is read.
fn range_at(
    txn: &ReadTransaction,
    interval: &Interval,
    limit: usize,
    at: u64,
    keys_only: bool,
) -> TablesResult<Vec<KeyValue>> {
    let (current, past) = (txn.open_table(CURRENT)?, txn.open_table(PAST)?);
    let mut kvs = Vec::new();
    let mut now = current.range(&interval.start[..]..)?;
    let mut next_now = now.next().transpose()?;
    let mut next_past = first_past_key(&past, &interval.start)?;
    while kvs.len() < limit {
        let now_key = next_now.as_ref().map(|(key, _)| key.value());
        let key = match (now_key, &next_past) {
            (None, None) => break,
            (Some(key), None) => Bytes::copy_from_slice(key),
            (None, Some(key)) => key.clone(),
            (Some(now), Some(past)) => {
                if now <= &past[..] {
                    Bytes::copy_from_slice(now)
                } else {
                    past.clone()
                }
            }
        };
        if !interval.contains(&key) {
            break;
        }
        let mut found = None;
        if let Some((_, row)) = next_now.take_if(|(now, _)| now.value() == &key[..]) {
            let version = Version::decode(row.value(), "current")?;
            if version.mod_revision <= at {
                found = Some(version.to_kv(key.clone(), keys_only));
            }
            next_now = now.next().transpose()?;
        }
        if next_past.as_ref() == Some(&key) {
            if found.is_none() {
                found = past_version(&past, &key, at, keys_only)?;
            }
            next_past = first_past_key(&past, &successor(&key))?;
        }
        kvs.extend(found);
    }
    Ok(kvs)
}

fn first_past_key(past: &PastRows, from: &[u8]) -> TablesResult<Option<Bytes>> {
    match past.range((from, 0)..)?.next() {
        Some(row) => Ok(Some(Bytes::copy_from_slice(row?.0.value().0))),
        None => Ok(None),
    }
}

/// The version of `key` that was the latest at revision `at`, if it is superseded now.
fn past_version(past: &PastRows, key: &Bytes, at: u64, keys_only: bool) -> TablesResult<Option<KeyValue>> {
    let Some(row) = past.range((&key[..], 0)..=(&key[..], at))?.next_back() else { return Ok(None) };
    let (_, row) = row?;
    let (superseded_at, version) = decode_past(row.value())?;
    Ok((superseded_at > at).then(|| version.to_kv(key.clone(), keys_only)))
}

/// Whether history can be read from `first` on.
pub(super) fn is_kept(txn: &ReadTransaction, first: u64) -> TablesResult<Result<()>> {
    let meta = read_meta(txn)?;
    let (requested, oldest) = (Revision(first), Revision(meta.oldest));
    Ok(if requested < oldest { Err(StoreError::Compacted { requested, oldest }) } else { Ok(()) })
}

/// Reads revisions in order and without a gap from `first` on, up to `last` (included, committed), at most `count`.
pub(super) fn history(
    txn: &ReadTransaction,
    first: u64,
    last: u64,
    count: usize,
) -> TablesResult<Result<Vec<Arc<Revised>>>> {
    if let Err(compacted) = is_kept(txn, first)? {
        return Ok(Err(compacted));
    }
    let (log, current, past) = (txn.open_table(LOG)?, txn.open_table(CURRENT)?, txn.open_table(PAST)?);
    let mut revised: Vec<Arc<Revised>> = Vec::new();
    let mut gathered_bytes = 0;
    for row in log.range(first..=last)? {
        if revised.len() == count || gathered_bytes >= HISTORY_CHUNK_BYTES {
            break;
        }
        let (revision, row) = row?;
        let revision = revision.value();
        if revision != first + revised.len() as u64 {
            return Err(Damaged { table: "log" }.into());
        }
        let mut changes = Vec::new();
        for entry in LogEntry::decode_all(row.value())? {
            let key = Bytes::copy_from_slice(entry.key);
            changes.push(if entry.deleted {
                Change::Deleted { key, revision: Revision(revision) }
            } else {
                let kv = version_put_at(&current, &past, key, revision)?;
                gathered_bytes += kv.value.len();
                Change::Put(kv)
            });
        }
        revised.push(Arc::new(Revised { revision, changes }));
    }
    if revised.is_empty() {
        return Err(Damaged { table: "log" }.into());
    }
    Ok(Ok(revised))
}

fn version_put_at(current: &Rows, past: &PastRows, key: Bytes, revision: u64) -> TablesResult<KeyValue> {
    if let Some(row) = current.get(&key[..])? {
        let version = Version::decode(row.value(), "current")?;
        if version.mod_revision == revision {
            return Ok(version.to_kv(key, false));
        }
    }
    match past.get((&key[..], revision))? {
        Some(row) => {
            let (_, version) = decode_past(row.value())?;
            Ok(version.to_kv(key, false))
        }
        None => Err(Damaged { table: "past" }.into()),
    }
}
