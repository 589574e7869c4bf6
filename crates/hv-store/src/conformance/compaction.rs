//! Compaction.

use futures::StreamExt;

use super::probe::{DEADLINE, below, changes_until, commit, key, names, range_at, request, watch};
use crate::{Op, Revision, SharedStore, StoreError, StoreExt, Txn};

const CHAPTER: &str = "compaction";

pub(super) async fn run(store: &SharedStore) {
    what_is_compacted_cannot_be_read_or_watched(store).await;
    what_is_current_survives(store).await;
    compacting_again_is_no_error(store).await;
    the_future_cannot_be_compacted(store).await;
}

async fn what_is_compacted_cannot_be_read_or_watched(store: &SharedStore) {
    let name = |name: &str| key(CHAPTER, name);
    let first = store.put(name("a"), "1").await.unwrap();
    store.put(name("b"), "1").await.unwrap();
    commit(store, Txn { then: vec![Op::delete(name("b"))], ..Txn::default() }).await;
    let kept = store.put(name("a"), "2").await.unwrap();
    let last = store.put(name("c"), "3").await.unwrap();
    store.compact(kept).await.unwrap();

    for old in [first, Revision(kept.0 - 1)] {
        match range_at(store, below(CHAPTER, ""), old).await {
            Err(StoreError::Compacted { requested, oldest }) => assert_eq!((requested, oldest), (old, kept)),
            other => panic!("revision {old} is compacted: {other:?}"),
        }
        assert!(matches!(watch_error(store, old).await, StoreError::Compacted { .. }));
    }
    let then = range_at(store, below(CHAPTER, ""), kept).await.unwrap();
    assert_eq!(names(&then.kvs), [name("a")]);
    assert_eq!(&then.kvs[0].value[..], b"2");
    let mut stream = watch(store, below(CHAPTER, ""), Some(Revision(kept.0 + 1))).await;
    let seen = changes_until(&mut stream, last).await;
    assert_eq!(seen.iter().map(|events| events.revision).collect::<Vec<_>>(), [last]);
}

/// The error may come from starting the watch or as its last item.
async fn watch_error(store: &SharedStore, from: Revision) -> StoreError {
    let mut stream = match store.watch(below(CHAPTER, ""), Some(from)).await {
        Ok(stream) => stream,
        Err(error) => return error,
    };
    let item = tokio::time::timeout(DEADLINE, stream.next()).await.expect("an item in time");
    let error = item.expect("an item before the end").expect_err("the revision is compacted");
    let end = tokio::time::timeout(DEADLINE, stream.next()).await.expect("the end in time");
    assert!(end.is_none(), "the error is the last item");
    error
}

async fn what_is_current_survives(store: &SharedStore) {
    let before = store.range(request(below(CHAPTER, ""))).await.unwrap();
    store.compact(before.revision).await.unwrap();
    let after = store.range(request(below(CHAPTER, ""))).await.unwrap();
    assert_eq!(before.kvs, after.kvs);
    let now = range_at(store, below(CHAPTER, ""), before.revision).await.unwrap();
    assert_eq!(before.kvs, now.kvs);
}

async fn compacting_again_is_no_error(store: &SharedStore) {
    let now = store.put(key(CHAPTER, "again"), "").await.unwrap();
    store.compact(now).await.unwrap();
    store.compact(now).await.unwrap();
    store.compact(Revision(now.0 - 1)).await.unwrap();
    assert!(range_at(store, below(CHAPTER, ""), now).await.is_ok());
}

async fn the_future_cannot_be_compacted(store: &SharedStore) {
    let future = Revision(store.revision().await.unwrap().0 + 1_000_000);
    let refused = store.compact(future).await;
    assert!(matches!(refused, Err(StoreError::InvalidRequest(_))), "{refused:?}");
}
