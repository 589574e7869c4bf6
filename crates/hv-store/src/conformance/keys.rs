//! Reading and writing keys.

use bytes::Bytes;

use super::probe::{below, commit, key, names, range_at, request};
use crate::{KeyRange, MAX_RANGE_LIMIT, Op, RangeRequest, Revision, SharedStore, StoreError, StoreExt, Txn};

const CHAPTER: &str = "keys";

pub(super) async fn run(store: &SharedStore) {
    a_key_counts_its_versions(store).await;
    ranges_are_in_key_order(store).await;
    keys_are_any_bytes(store).await;
    a_limit_leaves_the_rest_for_the_next_page(store).await;
    pages_at_a_revision_do_not_see_later_changes(store).await;
    ranges_beyond_a_bound_are_refused(store).await;
    revisions_only_grow(store).await;
}

async fn a_key_counts_its_versions(store: &SharedStore) {
    let name = key(CHAPTER, "versions");
    let first = store.put(name.clone(), "a").await.unwrap();
    let second = store.put(name.clone(), "b").await.unwrap();
    assert!(second > first);
    let kv = store.get(name.clone()).await.unwrap().expect("the key exists");
    assert_eq!((&kv.key[..], &kv.value[..]), (name.as_bytes(), &b"b"[..]));
    assert_eq!((kv.create_revision, kv.mod_revision, kv.version), (first, second, 2));
    assert_eq!(kv.lease, None);

    let deleted = commit(store, Txn { then: vec![Op::delete(name.clone())], ..Txn::default() }).await;
    assert!(deleted > second);
    assert_eq!(store.get(name.clone()).await.unwrap(), None);

    let again = store.put(name.clone(), Bytes::new()).await.unwrap();
    let kv = store.get(name).await.unwrap().expect("the key exists again");
    assert_eq!((kv.create_revision, kv.mod_revision, kv.version), (again, again, 1));
    assert!(kv.value.is_empty());
}

async fn ranges_are_in_key_order(store: &SharedStore) {
    for name in ["order/c", "order/a", "order/b/1", "order/b", "order0"] {
        store.put(key(CHAPTER, name), name).await.unwrap();
    }
    let all = store.range(request(below(CHAPTER, "order/"))).await.unwrap();
    let wanted: Vec<_> = ["order/a", "order/b", "order/b/1", "order/c"].map(|name| key(CHAPTER, name)).into();
    assert_eq!(names(&all.kvs), wanted);
    assert!(!all.more);
    let between = KeyRange::Between(key(CHAPTER, "order/b").into(), key(CHAPTER, "order/c").into());
    let found = store.range(request(between)).await.unwrap();
    assert_eq!(names(&found.kvs), wanted[1..3]);
    let backwards = KeyRange::Between(key(CHAPTER, "order/c").into(), key(CHAPTER, "order/a").into());
    assert!(store.range(request(backwards)).await.unwrap().kvs.is_empty());
    let bare = RangeRequest { keys_only: true, ..request(below(CHAPTER, "order/")) };
    let found = store.range(bare).await.unwrap();
    assert_eq!(names(&found.kvs), wanted);
    assert!(found.kvs.iter().all(|kv| kv.value.is_empty() && kv.version == 1));
}

async fn keys_are_any_bytes(store: &SharedStore) {
    let prefix = key(CHAPTER, "bytes/");
    let tails: [&[u8]; 6] = [b"", b"\0", b"\0\0", b"a\xff", b"\xff", b"\xff\xff\0"];
    let keys: Vec<Bytes> = tails.iter().map(|tail| [prefix.as_bytes(), tail].concat().into()).collect();
    for key in keys.iter().rev() {
        store.put(key.clone(), key.clone()).await.unwrap();
    }
    let found = store.range(request(KeyRange::Prefix(prefix.clone().into()))).await.unwrap();
    assert_eq!(found.kvs.iter().map(|kv| kv.key.clone()).collect::<Vec<_>>(), keys);
    assert!(found.kvs.iter().all(|kv| kv.key == kv.value));
    let high = KeyRange::Prefix([prefix.as_bytes(), b"\xff"].concat().into());
    assert_eq!(store.range(request(high)).await.unwrap().kvs.len(), 2);
    for key in &keys {
        assert_eq!(store.get(key.clone()).await.unwrap().map(|kv| kv.key), Some(key.clone()));
    }
}

async fn a_limit_leaves_the_rest_for_the_next_page(store: &SharedStore) {
    for index in 0..5 {
        store.put(key(CHAPTER, &format!("limit/{index}")), "").await.unwrap();
    }
    for (limit, more) in [(4, true), (5, false), (6, false)] {
        let found = store.range(RangeRequest { limit, ..request(below(CHAPTER, "limit/")) }).await.unwrap();
        assert_eq!((found.kvs.len(), found.more), (limit.min(5), more), "limit {limit}");
    }
}

async fn pages_at_a_revision_do_not_see_later_changes(store: &SharedStore) {
    let name = |index: usize| key(CHAPTER, &format!("pages/{index:03}"));
    for index in (0..50).step_by(2) {
        store.put(name(index), "old").await.unwrap();
    }
    let prefix = below(CHAPTER, "pages/");
    let first = store.range(RangeRequest { limit: 10, ..request(prefix.clone()) }).await.unwrap();
    let at = first.revision;
    let mut seen = first.kvs;
    let mut more = first.more;
    let mut page = 0;
    while more {
        // Between two pages others add, change and delete.
        store.put(name(page * 2 + 31), "new").await.unwrap();
        store.put(name(48), "changed").await.unwrap();
        commit(store, Txn { then: vec![Op::delete(name(24 + page * 2))], ..Txn::default() }).await;
        page += 1;
        let mut start = seen.last().unwrap().key.to_vec();
        start.push(0);
        let keys = KeyRange::Between(start.into(), key(CHAPTER, "pages0").into());
        let next = store.range(RangeRequest { limit: 10, at: Some(at), ..request(keys) }).await.unwrap();
        assert!(next.revision > at);
        more = next.more;
        seen.extend(next.kvs);
    }
    assert_eq!(page, 2);
    let wanted: Vec<_> = (0..50).step_by(2).map(name).collect();
    assert_eq!(names(&seen), wanted);
    assert!(seen.iter().all(|kv| &kv.value[..] == b"old" && kv.mod_revision <= at));
    let now = store.range(request(prefix)).await.unwrap();
    assert_ne!(names(&now.kvs), wanted);
}

async fn ranges_beyond_a_bound_are_refused(store: &SharedStore) {
    let all = || below(CHAPTER, "");
    for limit in [0, MAX_RANGE_LIMIT + 1] {
        let refused = store.range(RangeRequest { limit, ..request(all()) }).await;
        assert!(matches!(refused, Err(StoreError::InvalidRequest(_))), "limit {limit}: {refused:?}");
    }
    let refused = store.range(request(KeyRange::Key(Bytes::new()))).await;
    assert!(matches!(refused, Err(StoreError::InvalidRequest(_))), "{refused:?}");
    let future = Revision(store.revision().await.unwrap().0 + 1_000_000);
    let refused = range_at(store, all(), future).await;
    assert!(matches!(refused, Err(StoreError::InvalidRequest(_))), "{refused:?}");
}

async fn revisions_only_grow(store: &SharedStore) {
    let before = store.revision().await.unwrap();
    let put = store.put(key(CHAPTER, "grow"), "").await.unwrap();
    assert!(put > before);
    assert!(store.revision().await.unwrap() >= put);
    let health = store.health().await.unwrap();
    assert!(health.revision >= put && health.size_bytes > 0 && !health.version.is_empty(), "{health:?}");
}
