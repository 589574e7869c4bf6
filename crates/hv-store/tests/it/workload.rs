//! Writers whose every acknowledged transaction can be looked for afterwards.
//!
//! Writer `w` counts: its transaction `n` sets all of `w/part/*` to `n` and creates `w/log/n`. So after a crash each
//! acknowledged `n` must have its log key, and all parts must hold the same number from the same revision.

use std::collections::BTreeSet;

use futures::StreamExt;
use hv_store::{
    Change, Compare, KeyRange, KeyValue, MAX_RANGE_LIMIT, Op, RangeRequest, Result, Revision, SharedStore,
    StoreError, StoreExt, Txn, TxnOutcome,
};

/// How many keys each transaction sets to the same value.
const PARTS: usize = 6;

fn log_key(writer: usize, number: u64) -> String {
    format!("{writer}/log/{number:09}")
}

fn part_key(writer: usize, part: usize) -> String {
    format!("{writer}/part/{part}")
}

/// Commits the transaction after `last`, or fails as the store does. Whoever is told of a failure does not know whether
/// it was applied: [`last_number`] tells.
pub(crate) async fn commit_next(store: &SharedStore, writer: usize, last: u64) -> Result<Revision> {
    let number = last + 1;
    let mut then: Vec<_> =
        (0..PARTS).map(|part| Op::put(part_key(writer, part), number.to_string())).collect();
    then.push(Op::put(log_key(writer, number), ""));
    let compares = vec![Compare::Absent(log_key(writer, number).into())];
    match store.txn(Txn { compares, then, ..Txn::default() }).await? {
        TxnOutcome::Committed(revision) => Ok(revision),
        TxnOutcome::Refused(_) => panic!("transaction {number} of writer {writer} was applied twice"),
    }
}

/// Where a writer stands, according to the store.
pub(crate) async fn last_number(store: &SharedStore, writer: usize) -> Result<u64> {
    Ok(store.get(part_key(writer, 0)).await?.map_or(0, |kv| number_of(&kv)))
}

fn number_of(kv: &KeyValue) -> u64 {
    std::str::from_utf8(&kv.value).unwrap().parse().unwrap()
}

/// All keys with a prefix, by pages of one revision.
pub(crate) async fn read_all(store: &SharedStore, prefix: String) -> Vec<KeyValue> {
    let mut found: Vec<KeyValue> = Vec::new();
    let mut at = None;
    let end = format!("{prefix}\u{7f}");
    let mut start = prefix.into_bytes();
    loop {
        let keys = KeyRange::Between(start.into(), end.clone().into());
        let page =
            store.range(RangeRequest { keys, limit: MAX_RANGE_LIMIT, at, keys_only: false }).await.unwrap();
        at = at.or(Some(page.revision));
        found.extend(page.kvs);
        if !page.more {
            return found;
        }
        start = found.last().unwrap().key.to_vec();
        start.push(0);
    }
}

/// Checks that everything acknowledged is there, that no transaction was applied by half, and that no number is missing.
pub(crate) async fn check(store: &SharedStore, writer: usize, acknowledged: &BTreeSet<u64>) {
    let parts = read_all(store, format!("{writer}/part/")).await;
    let logged = read_all(store, format!("{writer}/log/")).await;
    let Some(first) = parts.first() else {
        assert!(acknowledged.is_empty() && logged.is_empty(), "writer {writer} lost everything");
        return;
    };
    assert_eq!(parts.len(), PARTS);
    for part in &parts {
        let (value, at) = (number_of(part), part.mod_revision);
        assert_eq!((value, at), (number_of(first), first.mod_revision), "half a transaction: {parts:?}");
    }
    let last = number_of(first);
    let logged: BTreeSet<String> =
        logged.iter().map(|kv| String::from_utf8(kv.key.to_vec()).unwrap()).collect();
    let wanted: BTreeSet<String> = (1..=last).map(|number| log_key(writer, number)).collect();
    let wrong: Vec<_> = logged.symmetric_difference(&wanted).collect();
    assert!(wrong.is_empty(), "writer {writer} is at {last}, but these are missing or too many: {wrong:?}");
    let lost: Vec<_> = acknowledged.iter().filter(|number| **number > last).collect();
    assert!(
        lost.is_empty(),
        "writer {writer} was told that {lost:?} are durable; the last one there is {last}"
    );
}

/// Follows all writers from `from` to `to`: every revision comes once, in order, and whole. How many came.
pub(crate) async fn check_history(store: &SharedStore, from: Revision, to: Revision) -> usize {
    let mut stream = store.watch(KeyRange::Prefix("".into()), Some(from)).await.unwrap();
    let (mut last, mut count) = (Revision(from.0 - 1), 0);
    while last < to {
        let events = stream.next().await.unwrap().unwrap();
        assert_eq!(events.revision.0, last.0 + 1, "every revision is somebody's transaction");
        assert_eq!(events.changes.len(), PARTS + 1, "revision {}", events.revision);
        assert!(
            events
                .changes
                .iter()
                .all(|change| matches!(change, Change::Put(kv) if kv.mod_revision == events.revision))
        );
        last = events.revision;
        count += 1;
    }
    count
}

/// The oldest revision that a store still keeps.
pub(crate) async fn oldest(store: &SharedStore) -> Revision {
    let first =
        RangeRequest { keys: KeyRange::Key("0".into()), limit: 1, at: Some(Revision(1)), keys_only: true };
    match store.range(first).await {
        Ok(_) => Revision(1),
        Err(StoreError::Compacted { oldest, .. }) => oldest,
        Err(error) => panic!("{error}"),
    }
}
