//! Compares, refusals, atomicity, bounds.

use bytes::Bytes;

use super::probe::{below, commit, key, names, request};
use crate::{
    Compare, KeyRange, LeaseId, MAX_TXN_OPS, MAX_VALUE_BYTES, Op, Revision, SharedStore, StoreError,
    StoreExt, Txn, TxnOutcome,
};

const CHAPTER: &str = "transactions";

pub(super) async fn run(store: &SharedStore) {
    every_compare_holds_and_fails_where_it_should(store).await;
    a_range_is_empty_or_not(store).await;
    of_many_that_want_a_range_empty_one_wins(store).await;
    a_refusal_tells_what_is_there(store).await;
    a_transaction_is_one_revision(store).await;
    changing_nothing_takes_no_revision(store).await;
    deleting_a_range_spares_its_neighbours(store).await;
    a_key_changed_twice_is_refused(store).await;
    an_unknown_lease_changes_nothing(store).await;
    transactions_beyond_a_bound_are_refused(store).await;
    the_largest_value_and_the_most_operations_pass(store).await;
}

fn name(name: &str) -> Bytes {
    key(CHAPTER, name).into()
}

async fn every_compare_holds_and_fails_where_it_should(store: &SharedStore) {
    let (there, gone) = (name("compare/there"), name("compare/gone"));
    let created = store.put(there.clone(), "1").await.unwrap();
    let changed = store.put(there.clone(), "2").await.unwrap();
    let (one, zero, at) = (Revision(created.0 - 1), Revision(0), |k: &Bytes| k.clone());
    let cases = [
        (Compare::Absent(at(&gone)), true),
        (Compare::Absent(at(&there)), false),
        (Compare::Present(at(&there)), true),
        (Compare::Present(at(&gone)), false),
        (Compare::ModRevision(at(&there), changed), true),
        (Compare::ModRevision(at(&there), created), false),
        (Compare::ModRevision(at(&gone), changed), false),
        (Compare::ModRevision(at(&gone), zero), true),
        (Compare::CreateRevision(at(&there), created), true),
        (Compare::CreateRevision(at(&there), changed), false),
        (Compare::CreateRevision(at(&there), one), false),
        (Compare::CreateRevision(at(&gone), zero), true),
        (Compare::Version(at(&there), 2), true),
        (Compare::Version(at(&there), 1), false),
        (Compare::Version(at(&gone), 0), true),
        (Compare::Value(at(&there), "2".into()), true),
        (Compare::Value(at(&there), "1".into()), false),
        (Compare::Value(at(&gone), Bytes::new()), false),
    ];
    for (compare, holds) in cases {
        let txn = Txn { compares: vec![compare.clone()], ..Txn::default() };
        let outcome = store.txn(txn).await.unwrap();
        assert_eq!(matches!(outcome, TxnOutcome::Committed(_)), holds, "{compare:?}: {outcome:?}");
    }
    let both = vec![Compare::Present(there.clone()), Compare::Present(gone)];
    let txn = Txn { compares: both, then: vec![Op::put(there.clone(), "3")], ..Txn::default() };
    assert_eq!(store.txn(txn).await.unwrap(), TxnOutcome::Refused(Vec::new()), "all must hold");
    assert_eq!(store.get(there).await.unwrap().unwrap().mod_revision, changed);
}

async fn a_range_is_empty_or_not(store: &SharedStore) {
    let between = |a: &str, b: &str| KeyRange::Between(name(a), name(b));
    let prefix = |part: &str| KeyRange::Prefix(name(part));
    let holds = async |keys: &KeyRange| {
        let txn = Txn { compares: vec![Compare::NoneIn(keys.clone())], ..Txn::default() };
        matches!(store.txn(txn).await.unwrap(), TxnOutcome::Committed(_))
    };
    let ranges =
        [prefix("none/web-"), between("none/web-0", "none/web-:"), KeyRange::Key(name("none/web-1"))];
    for range in &ranges {
        assert!(holds(range).await, "{range:?} before anything is there");
    }
    // Neighbours on both sides are outside.
    for outside in ["none/web", "none/web-", "none/web-:", "none/web.", "none/web-1x"] {
        store.put(name(outside), "").await.unwrap();
    }
    assert!(!holds(&ranges[0]).await);
    assert!(!holds(&ranges[1]).await, "web-1x");
    assert!(holds(&ranges[2]).await);
    let one = Txn {
        then: vec![Op::delete(name("none/web-1x")), Op::put(name("none/web-1"), "")],
        ..Txn::default()
    };
    commit(store, one).await;
    for range in &ranges {
        assert!(!holds(range).await, "{range:?} while web-1 is there");
    }
    commit(store, Txn { then: vec![Op::delete(name("none/web-1"))], ..Txn::default() }).await;
    assert!(holds(&ranges[1]).await, "what was deleted does not count");
    assert!(holds(&ranges[2]).await);
    // A range that can hold nothing is empty, and nothing is above a key space that ends in it.
    assert!(holds(&between("none/web-:", "none/web-")).await);
    assert!(!holds(&KeyRange::Prefix(Bytes::new())).await);
    let unbounded = KeyRange::Prefix(Bytes::from_static(b"\xff\xff\xff"));
    assert!(holds(&unbounded).await, "nobody writes there");
}

/// The compare and the write are one: two that want the same range cannot both find it empty.
async fn of_many_that_want_a_range_empty_one_wins(store: &SharedStore) {
    let claims = (0..16).map(|index| {
        let compares = vec![Compare::NoneIn(KeyRange::Prefix(name("claim/")))];
        let then = vec![Op::put(name(&format!("claim/{index}")), "")];
        store.txn(Txn { compares, then, ..Txn::default() })
    });
    let outcomes = futures::future::try_join_all(claims).await.unwrap();
    let won = outcomes.iter().filter(|outcome| matches!(outcome, TxnOutcome::Committed(_))).count();
    assert_eq!(won, 1, "{outcomes:?}");
}

async fn a_refusal_tells_what_is_there(store: &SharedStore) {
    let (there, gone) = (name("refusal/there"), name("refusal/gone"));
    let at = store.put(there.clone(), "value").await.unwrap();
    let before = store.revision().await.unwrap();
    let txn = Txn {
        compares: vec![Compare::Absent(there.clone())],
        then: vec![Op::put(there.clone(), "overwritten"), Op::put(gone.clone(), "x")],
        otherwise_get: vec![gone.clone(), there.clone()],
    };
    let TxnOutcome::Refused(found) = store.txn(txn).await.unwrap() else { panic!("the key exists") };
    assert_eq!(found.len(), 2);
    assert_eq!(found[0], None);
    let kv = found[1].as_ref().expect("the key that is there");
    assert_eq!((&kv.value[..], kv.mod_revision, kv.version), (&b"value"[..], at, 1));
    assert_eq!(store.get(gone).await.unwrap(), None);
    assert_eq!(store.revision().await.unwrap(), before);
}

async fn a_transaction_is_one_revision(store: &SharedStore) {
    let old = name("one/old");
    store.put(old.clone(), "x").await.unwrap();
    let then = vec![
        Op::put(name("one/a"), "1"),
        Op::put(name("one/b"), "2"),
        Op::delete(old.clone()),
        Op::delete(name("one/never")),
    ];
    let at = commit(store, Txn { then, ..Txn::default() }).await;
    let found = store.range(request(below(CHAPTER, "one/"))).await.unwrap();
    assert_eq!(names(&found.kvs), [key(CHAPTER, "one/a"), key(CHAPTER, "one/b")]);
    assert!(found.kvs.iter().all(|kv| kv.mod_revision == at && kv.create_revision == at));
}

async fn changing_nothing_takes_no_revision(store: &SharedStore) {
    let before = store.revision().await.unwrap();
    for then in [vec![], vec![Op::delete(name("nothing/here"))]] {
        assert_eq!(commit(store, Txn { then, ..Txn::default() }).await, before);
    }
    assert_eq!(store.revision().await.unwrap(), before);
}

async fn deleting_a_range_spares_its_neighbours(store: &SharedStore) {
    for part in ["range/", "range/a", "range/b", "range/c", "range0"] {
        store.put(name(part), "").await.unwrap();
    }
    let between = KeyRange::Between(name("range/a"), name("range/c"));
    commit(store, Txn { then: vec![Op::Delete(between)], ..Txn::default() }).await;
    let found = store.range(request(below(CHAPTER, "range"))).await.unwrap();
    assert_eq!(names(&found.kvs), ["range/", "range/c", "range0"].map(|part| key(CHAPTER, part)));
    let prefix = KeyRange::Prefix(name("range/"));
    commit(store, Txn { then: vec![Op::Delete(prefix)], ..Txn::default() }).await;
    let found = store.range(request(below(CHAPTER, "range"))).await.unwrap();
    assert_eq!(names(&found.kvs), [key(CHAPTER, "range0")]);
}

async fn a_key_changed_twice_is_refused(store: &SharedStore) {
    let twice = [
        vec![Op::put(name("twice/a"), "1"), Op::put(name("twice/a"), "2")],
        vec![Op::put(name("twice/a"), "1"), Op::delete(name("twice/a"))],
        vec![Op::Delete(KeyRange::Prefix(name("twice/"))), Op::put(name("twice/a"), "1")],
    ];
    for then in twice {
        let outcome = store.txn(Txn { then: then.clone(), ..Txn::default() }).await;
        assert!(matches!(outcome, Err(StoreError::InvalidRequest(_))), "{then:?}: {outcome:?}");
    }
    assert!(store.range(request(below(CHAPTER, "twice/"))).await.unwrap().kvs.is_empty());
}

async fn an_unknown_lease_changes_nothing(store: &SharedStore) {
    let then =
        vec![Op::put(name("lease/a"), "1"), Op::put_leased(name("lease/b"), "2", LeaseId(987_654_321))];
    let outcome = store.txn(Txn { then, ..Txn::default() }).await;
    assert!(matches!(outcome, Err(StoreError::LeaseNotFound(LeaseId(987_654_321)))), "{outcome:?}");
    assert!(store.range(request(below(CHAPTER, "lease/"))).await.unwrap().kvs.is_empty());
}

async fn transactions_beyond_a_bound_are_refused(store: &SharedStore) {
    let put = |index: usize| Op::put(name(&format!("bound/{index}")), "");
    let large = |index: usize, bytes: usize| Op::put(name(&format!("bound/{index}")), vec![b'x'; bytes]);
    let absent = |index: usize| Compare::Absent(name(&format!("bound/{index}")));
    let refused = [
        Txn { then: vec![large(0, MAX_VALUE_BYTES + 1)], ..Txn::default() },
        Txn { then: (0..=MAX_TXN_OPS).map(put).collect(), ..Txn::default() },
        Txn { compares: (0..=MAX_TXN_OPS).map(absent).collect(), ..Txn::default() },
        Txn { then: (0..4).map(|index| large(index, 600_000)).collect(), ..Txn::default() },
        Txn { then: vec![Op::put(Bytes::new(), "")], ..Txn::default() },
        Txn { then: vec![Op::put(vec![b'k'; crate::bounds::MAX_KEY_BYTES + 1], "")], ..Txn::default() },
        Txn { compares: vec![Compare::Absent(Bytes::new())], ..Txn::default() },
    ];
    for txn in refused {
        let outcome = store.txn(txn).await;
        assert!(matches!(outcome, Err(StoreError::InvalidRequest(_))), "{outcome:?}");
    }
    assert!(store.range(request(below(CHAPTER, "bound/"))).await.unwrap().kvs.is_empty());
}

async fn the_largest_value_and_the_most_operations_pass(store: &SharedStore) {
    let value = vec![b'x'; MAX_VALUE_BYTES];
    store.put(name("largest/value"), value.clone()).await.unwrap();
    let found = store.get(name("largest/value")).await.unwrap().unwrap();
    assert!(found.value == value, "the largest value comes back whole");
    let put = |index: usize| Op::put(name(&format!("largest/{index:03}")), vec![b'y'; 8192]);
    commit(store, Txn { then: (0..MAX_TXN_OPS).map(put).collect(), ..Txn::default() }).await;
    let found = store.range(request(below(CHAPTER, "largest/"))).await.unwrap();
    assert_eq!(found.kvs.len(), MAX_TXN_OPS + 1);
    let prefix = KeyRange::Prefix(name("largest/"));
    commit(store, Txn { then: vec![Op::Delete(prefix)], ..Txn::default() }).await;
}
