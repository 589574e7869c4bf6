//! Status and defragmentation.

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use super::probe::{DEADLINE, below, commit, key, request};
use crate::{Op, SharedStore, StoreExt, Txn};

const CHAPTER: &str = "upkeep";
/// Keys that are written and deleted again, and how large they are.
const KEYS: usize = 400;
const POLL: Duration = Duration::from_millis(20);
const VALUE_BYTES: usize = 16 << 10;

pub(super) async fn run(store: &SharedStore) {
    the_status_tells_what_is_there(store).await;
    what_was_deleted_is_given_back_and_nothing_else(store).await;
}

async fn the_status_tells_what_is_there(store: &SharedStore) {
    let at = store.put(key(CHAPTER, "status"), "").await.unwrap();
    store.compact(at).await.unwrap();
    let status = store.status().await.unwrap();
    assert_eq!(status.backend, store.health().await.unwrap().backend);
    assert!(status.revision >= at && status.oldest == Some(at), "{status:?}");
    assert!(status.size_bytes > 0 && status.used_bytes <= status.size_bytes, "{status:?}");
    assert!(!status.is_full);
    assert_eq!(status.members.iter().filter(|member| member.is_leader).count(), 1, "{status:?}");
    for member in &status.members {
        assert!(
            member.error.is_none() && !member.endpoint.is_empty() && !member.version.is_empty(),
            "{member:?}"
        );
        assert!(member.alarms.is_empty(), "{member:?}");
    }
}

async fn what_was_deleted_is_given_back_and_nothing_else(store: &SharedStore) {
    store.put(key(CHAPTER, "kept"), "value").await.unwrap();
    for first in (0..KEYS).step_by(50) {
        let puts = (first..first + 50)
            .map(|index| Op::put(key(CHAPTER, &format!("bulk/{index:03}")), vec![b'x'; VALUE_BYTES]));
        commit(store, Txn { then: puts.collect(), ..Txn::default() }).await;
    }
    let mut large = store.status().await.unwrap();
    // etcd notes its size with a delay.
    let started = tokio::time::Instant::now();
    while large.used_bytes < (KEYS * VALUE_BYTES) as u64 {
        assert!(started.elapsed() < DEADLINE, "{large:?}");
        tokio::time::sleep(POLL).await;
        large = store.status().await.unwrap();
    }
    commit(store, Txn { then: vec![Op::Delete(below(CHAPTER, "bulk/"))], ..Txn::default() }).await;
    // What the last revision superseded may be kept along with it.
    let after = store.put(key(CHAPTER, "after"), "").await.unwrap();
    let before = store.range(request(below(CHAPTER, ""))).await.unwrap();
    store.compact(after).await.unwrap();

    // Whoever reads and writes meanwhile waits at most.
    let stop = AtomicBool::new(false);
    let busy = async {
        let mut count = 0;
        while !stop.load(Ordering::Relaxed) {
            assert!(store.get(key(CHAPTER, "kept")).await.unwrap().is_some());
            store.put(format!("conformance/{CHAPTER}-beside"), count.to_string()).await.unwrap();
            count += 1;
        }
        count
    };
    let steps = Mutex::new(Vec::new());
    let defragment = async {
        super::probe::until("giving room back", || async {
            // Dropping what was compacted may take the store a moment.
            store.defragment(&|step| steps.lock().unwrap().push(step)).await.unwrap();
            store.status().await.unwrap().size_bytes < large.size_bytes / 2
        })
        .await;
        stop.store(true, Ordering::Relaxed);
    };
    let (count, ()) = futures::future::join(busy, defragment).await;
    assert!(count > 0);
    let steps = steps.into_inner().unwrap();
    let last = steps.last().expect("steps are told");
    assert!(last.done == last.total && last.total > 0, "{steps:?}");
    let after = store.range(request(below(CHAPTER, ""))).await.unwrap();
    assert_eq!(before.kvs, after.kvs);
}
