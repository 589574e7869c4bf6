//! Watches.

use super::probe::{below, changed, changes_until, commit, key, next, next_changes, watch};
use crate::{Change, KeyRange, Op, Revision, SharedStore, StoreError, StoreExt, Txn};

const CHAPTER: &str = "watches";
/// What a watch that nobody reads falls behind by.
const BACKLOG: usize = 3000;

pub(super) async fn run(store: &SharedStore) {
    a_watch_from_now_sees_what_follows(store).await;
    a_watch_from_an_old_revision_sees_it_again(store).await;
    a_watch_from_a_future_revision_waits_for_it(store).await;
    a_revision_comes_in_one_item(store).await;
    only_its_own_range_is_seen(store).await;
    a_watch_learns_of_revisions_made_elsewhere(store).await;
    a_slow_watch_loses_nothing(store).await;
    large_revisions_come_whole(store).await;
    a_watch_of_nothing_is_refused(store).await;
}

async fn a_watch_from_now_sees_what_follows(store: &SharedStore) {
    let name = key(CHAPTER, "now/a");
    store.put(name.clone(), "before").await.unwrap();
    let mut stream = watch(store, below(CHAPTER, "now/"), None).await;
    let put = store.put(name.clone(), "after").await.unwrap();
    let deleted = commit(store, Txn { then: vec![Op::delete(name.clone())], ..Txn::default() }).await;
    let events = next_changes(&mut stream).await;
    assert_eq!(events.revision, put);
    let [Change::Put(kv)] = &events.changes[..] else { panic!("one put: {events:?}") };
    assert_eq!((&kv.value[..], kv.mod_revision, kv.version), (&b"after"[..], put, 2));
    let events = next_changes(&mut stream).await;
    assert_eq!(events.revision, deleted);
    assert_eq!(events.changes, [Change::Deleted { key: name.into(), revision: deleted }]);
}

async fn a_watch_from_an_old_revision_sees_it_again(store: &SharedStore) {
    let mut revisions = Vec::new();
    for index in 0..20 {
        revisions
            .push(store.put(key(CHAPTER, &format!("old/{}", index % 3)), index.to_string()).await.unwrap());
    }
    let mut stream = watch(store, below(CHAPTER, "old/"), Some(revisions[5])).await;
    let live = store.put(key(CHAPTER, "old/live"), "20").await.unwrap();
    revisions.push(live);
    let seen = changes_until(&mut stream, live).await;
    assert_eq!(seen.iter().map(|events| events.revision).collect::<Vec<_>>(), revisions[5..]);
    for (index, events) in seen.iter().enumerate() {
        let [Change::Put(kv)] = &events.changes[..] else { panic!("one put: {events:?}") };
        assert_eq!(kv.value, (index + 5).to_string().as_bytes(), "values are as they were then");
    }
}

async fn a_watch_from_a_future_revision_waits_for_it(store: &SharedStore) {
    let from = Revision(store.revision().await.unwrap().0 + 3);
    let mut stream = watch(store, below(CHAPTER, "future/"), Some(from)).await;
    let mut put = Vec::new();
    for index in 0..5 {
        put.push(store.put(key(CHAPTER, "future/a"), index.to_string()).await.unwrap());
    }
    let wanted: Vec<_> = put.iter().copied().filter(|revision| *revision >= from).collect();
    assert_eq!(wanted.len(), 3);
    let seen = changes_until(&mut stream, put[4]).await;
    assert_eq!(seen.iter().map(|events| events.revision).collect::<Vec<_>>(), wanted);
}

async fn a_revision_comes_in_one_item(store: &SharedStore) {
    let old = key(CHAPTER, "one/old");
    store.put(old.clone(), "").await.unwrap();
    let mut stream = watch(store, below(CHAPTER, "one/"), None).await;
    let mut then: Vec<_> =
        (0..100).map(|index| Op::put(key(CHAPTER, &format!("one/{index:03}")), "")).collect();
    then.push(Op::delete(old));
    let at = commit(store, Txn { then, ..Txn::default() }).await;
    let events = next_changes(&mut stream).await;
    assert_eq!((events.revision, events.changes.len()), (at, 101));
    let prefix = KeyRange::Prefix(key(CHAPTER, "one/").into());
    let at = commit(store, Txn { then: vec![Op::Delete(prefix)], ..Txn::default() }).await;
    let events = next_changes(&mut stream).await;
    assert_eq!((events.revision, events.changes.len()), (at, 100));
    assert!(events.changes.iter().all(|change| matches!(change, Change::Deleted { .. })));
}

async fn only_its_own_range_is_seen(store: &SharedStore) {
    let name = |name: &str| key(CHAPTER, name);
    let ranges = [
        (KeyRange::Key(name("own/b").into()), vec!["own/b"]),
        (below(CHAPTER, "own/b"), vec!["own/b", "own/b/1"]),
        (KeyRange::Between(name("own/a").into(), name("own/b/1").into()), vec!["own/a", "own/b"]),
    ];
    let mut streams = Vec::new();
    for (keys, wanted) in ranges {
        streams.push((watch(store, keys, None).await, wanted));
    }
    let mut at = Revision(0);
    let then = ["own/", "own/a", "own/b", "own/b/1", "own/c"].map(|part| Op::put(name(part), ""));
    at = at.max(commit(store, Txn { then: then.into(), ..Txn::default() }).await);
    for (stream, wanted) in &mut streams {
        let events = next_changes(stream).await;
        assert_eq!(events.revision, at);
        assert_eq!(changed(&events), wanted.iter().map(|part| name(part)).collect::<Vec<_>>());
    }
}

async fn a_watch_learns_of_revisions_made_elsewhere(store: &SharedStore) {
    let mut stream = watch(store, below(CHAPTER, "elsewhere/mine/"), None).await;
    let at = store.put(key(CHAPTER, "elsewhere/other"), "").await.unwrap();
    loop {
        let events = next(&mut stream).await.expect("the watch does not fail");
        assert!(events.changes.is_empty(), "{events:?}");
        if events.revision >= at {
            break;
        }
    }
    let mine = store.put(key(CHAPTER, "elsewhere/mine/a"), "").await.unwrap();
    assert_eq!(next_changes(&mut stream).await.revision, mine);
}

async fn a_slow_watch_loses_nothing(store: &SharedStore) {
    let mut stream = watch(store, below(CHAPTER, "slow/"), None).await;
    let value = vec![b'v'; 4096];
    let mut last = Revision(0);
    for chunk in 0..BACKLOG / 100 {
        let puts = (0..100).map(|index| {
            let (store, value) = (store.clone(), value.clone());
            async move { store.put(key(CHAPTER, &format!("slow/{chunk}/{index}")), value).await.unwrap() }
        });
        last = last.max(futures::future::join_all(puts).await.into_iter().max().expect("some were put"));
    }
    let seen = changes_until(&mut stream, last).await;
    assert_eq!(seen.iter().map(|events| events.changes.len()).sum::<usize>(), BACKLOG);
}

async fn large_revisions_come_whole(store: &SharedStore) {
    let mut stream = watch(store, below(CHAPTER, "large/"), None).await;
    let puts = |round: usize| {
        let put = move |index: usize| {
            Op::put(key(CHAPTER, &format!("large/{index:03}")), vec![b'0' + round as u8; 10_000])
        };
        Txn { then: (0..128).map(put).collect(), ..Txn::default() }
    };
    let mut revisions = Vec::new();
    for round in 0..5 {
        revisions.push(commit(store, puts(round)).await);
    }
    let mut again = watch(store, below(CHAPTER, "large/"), Some(revisions[0])).await;
    for stream in [&mut stream, &mut again] {
        for at in &revisions {
            let events = next_changes(stream).await;
            assert_eq!((events.revision, events.changes.len()), (*at, 128));
        }
    }
}

async fn a_watch_of_nothing_is_refused(store: &SharedStore) {
    let backwards = KeyRange::Between(key(CHAPTER, "b").into(), key(CHAPTER, "a").into());
    for keys in [backwards, KeyRange::Key(bytes::Bytes::new())] {
        let refused = store.watch(keys, None).await.err();
        assert!(matches!(refused, Some(StoreError::InvalidRequest(_))), "{refused:?}");
    }
}
