//! What the chapters ask a store, with a deadline on everything that is awaited.

use std::time::Duration;

use futures::StreamExt;

use super::PREFIX;
use crate::{
    Change, KeyRange, KeyValue, MAX_RANGE_LIMIT, RangeRequest, RangeResult, Result, Revision, SharedStore,
    Txn, TxnOutcome, WatchEvents, WatchStream,
};

/// How long anything may take, on a busy machine.
pub(super) const DEADLINE: Duration = Duration::from_secs(30);

/// A key of a chapter.
pub(super) fn key(chapter: &str, name: &str) -> String {
    format!("{PREFIX}{chapter}/{name}")
}

/// All keys of a chapter's part.
pub(super) fn below(chapter: &str, name: &str) -> KeyRange {
    KeyRange::Prefix(key(chapter, name).into())
}

pub(super) fn request(keys: KeyRange) -> RangeRequest {
    RangeRequest { keys, limit: MAX_RANGE_LIMIT, at: None, keys_only: false }
}

pub(super) async fn range_at(store: &SharedStore, keys: KeyRange, at: Revision) -> Result<RangeResult> {
    store.range(RangeRequest { at: Some(at), ..request(keys) }).await
}

pub(super) fn names(kvs: &[KeyValue]) -> Vec<String> {
    kvs.iter().map(|kv| kv.key.escape_ascii().to_string()).collect()
}

/// A transaction that must be committed.
pub(super) async fn commit(store: &SharedStore, txn: Txn) -> Revision {
    match store.txn(txn.clone()).await {
        Ok(TxnOutcome::Committed(revision)) => revision,
        other => panic!("{txn:?} was not committed: {other:?}"),
    }
}

pub(super) async fn watch(store: &SharedStore, keys: KeyRange, from: Option<Revision>) -> WatchStream {
    store.watch(keys, from).await.expect("the watch starts")
}

/// What comes next.
pub(super) async fn next(stream: &mut WatchStream) -> Result<WatchEvents> {
    tokio::time::timeout(DEADLINE, stream.next())
        .await
        .expect("the watch delivers something in time")
        .expect("the watch goes on")
}

/// What comes next that has changes. Revisions must not go back.
pub(super) async fn next_changes(stream: &mut WatchStream) -> WatchEvents {
    loop {
        let events = next(stream).await.expect("the watch does not fail");
        if !events.changes.is_empty() {
            return events;
        }
    }
}

/// Everything up to and including `revision`, by item; checks that revisions only grow.
pub(super) async fn changes_until(stream: &mut WatchStream, revision: Revision) -> Vec<WatchEvents> {
    let mut seen: Vec<WatchEvents> = Vec::new();
    let mut last = Revision(0);
    while last < revision {
        let events = next(stream).await.expect("the watch does not fail");
        assert!(events.revision > last, "revision {} came after {last}", events.revision);
        last = events.revision;
        if !events.changes.is_empty() {
            seen.push(events);
        }
    }
    seen
}

/// The keys that an item changed; deleted ones with a `-` before them.
pub(super) fn changed(events: &WatchEvents) -> Vec<String> {
    events
        .changes
        .iter()
        .map(|change| match change {
            Change::Put(kv) => kv.key.escape_ascii().to_string(),
            Change::Deleted { key, .. } => format!("-{}", key.escape_ascii()),
        })
        .collect()
}

/// Waits until `done` says so.
pub(super) async fn until<F: Future<Output = bool>>(what: &str, mut done: impl FnMut() -> F) {
    let started = tokio::time::Instant::now();
    while !done().await {
        assert!(started.elapsed() < DEADLINE, "{what} did not happen within {DEADLINE:?}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}
