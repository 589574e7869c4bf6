//! Leases.

use std::time::{Duration, Instant};

use super::probe::{below, changed, commit, key, next_changes, request, until, watch};
use crate::{LeaseId, Op, SharedStore, StoreError, StoreExt, Txn};

const CHAPTER: &str = "leases";
/// The shortest that every backend grants as it was asked for.
const TTL: Duration = Duration::from_secs(2);
/// How many leases are kept alive at once.
const MANY: usize = 500;

pub(super) async fn run(store: &SharedStore) {
    futures::join!(
        an_ended_lease_takes_its_keys_in_one_revision(store),
        a_lease_that_is_kept_alive_stays(store),
        a_revoked_lease_takes_its_keys(store),
        a_key_leaves_its_lease(store),
        an_ended_lease_is_not_found(store),
        many_leases_are_kept_alive(store),
        a_lease_without_time_is_refused(store),
    );
}

async fn put_leased(store: &SharedStore, names: &[&str], lease: LeaseId) {
    let then = names.iter().map(|name| Op::put_leased(key(CHAPTER, name), "", lease)).collect();
    commit(store, Txn { then, ..Txn::default() }).await;
}

async fn an_ended_lease_takes_its_keys_in_one_revision(store: &SharedStore) {
    let started = Instant::now();
    let lease = store.lease_grant(TTL).await.unwrap();
    put_leased(store, &["expire/a", "expire/b"], lease).await;
    put_leased(store, &["expire/c"], lease).await;
    assert_eq!(store.get(key(CHAPTER, "expire/a")).await.unwrap().unwrap().lease, Some(lease));
    let mut stream = watch(store, below(CHAPTER, "expire/"), None).await;
    let events = next_changes(&mut stream).await;
    assert!(started.elapsed() >= TTL, "it ended after {:?}", started.elapsed());
    let mut gone = changed(&events);
    gone.sort();
    assert_eq!(gone, ["a", "b", "c"].map(|name| format!("-{}", key(CHAPTER, &format!("expire/{name}")))));
    assert!(store.range(request(below(CHAPTER, "expire/"))).await.unwrap().kvs.is_empty());
}

async fn a_lease_that_is_kept_alive_stays(store: &SharedStore) {
    let lease = store.lease_grant(TTL).await.unwrap();
    put_leased(store, &["alive/a"], lease).await;
    let started = Instant::now();
    while started.elapsed() < TTL * 3 {
        store.lease_keep_alive(lease).await.unwrap();
        tokio::time::sleep(TTL / 8).await;
    }
    assert!(store.get(key(CHAPTER, "alive/a")).await.unwrap().is_some());
    until("the end of a lease that is no longer kept alive", || async {
        store.get(key(CHAPTER, "alive/a")).await.unwrap().is_none()
    })
    .await;
    let ended = store.lease_keep_alive(lease).await;
    assert!(matches!(ended, Err(StoreError::LeaseNotFound(id)) if id == lease), "{ended:?}");
}

async fn a_revoked_lease_takes_its_keys(store: &SharedStore) {
    let lease = store.lease_grant(Duration::from_secs(600)).await.unwrap();
    put_leased(store, &["revoke/a", "revoke/b"], lease).await;
    let mut stream = watch(store, below(CHAPTER, "revoke/"), None).await;
    store.lease_revoke(lease).await.unwrap();
    assert!(store.range(request(below(CHAPTER, "revoke/"))).await.unwrap().kvs.is_empty());
    assert_eq!(next_changes(&mut stream).await.changes.len(), 2);
    store.lease_revoke(lease).await.expect("revoking again is no error");
}

async fn a_key_leaves_its_lease(store: &SharedStore) {
    let first = store.lease_grant(Duration::from_secs(600)).await.unwrap();
    let second = store.lease_grant(Duration::from_secs(600)).await.unwrap();
    assert_ne!(first, second);
    put_leased(store, &["leave/free", "leave/moved", "leave/deleted", "leave/stays"], first).await;
    store.put(key(CHAPTER, "leave/free"), "").await.unwrap();
    put_leased(store, &["leave/moved"], second).await;
    commit(store, Txn { then: vec![Op::delete(key(CHAPTER, "leave/deleted"))], ..Txn::default() }).await;
    store.put(key(CHAPTER, "leave/deleted"), "").await.unwrap();
    store.lease_revoke(first).await.unwrap();
    let left = |name: &'static str| async move { store.get(key(CHAPTER, name)).await.unwrap() };
    assert_eq!(left("leave/free").await.expect("free").lease, None);
    assert_eq!(left("leave/moved").await.expect("moved").lease, Some(second));
    assert_eq!(left("leave/deleted").await.expect("created again").lease, None);
    assert_eq!(left("leave/stays").await, None);
    store.lease_revoke(second).await.unwrap();
    assert_eq!(left("leave/moved").await, None);
}

async fn an_ended_lease_is_not_found(store: &SharedStore) {
    let lease = store.lease_grant(Duration::from_secs(600)).await.unwrap();
    store.lease_revoke(lease).await.unwrap();
    let then = vec![Op::put_leased(key(CHAPTER, "ended/a"), "", lease)];
    let refused = store.txn(Txn { then, ..Txn::default() }).await;
    assert!(matches!(refused, Err(StoreError::LeaseNotFound(id)) if id == lease), "{refused:?}");
    let refused = store.lease_keep_alive(lease).await;
    assert!(matches!(refused, Err(StoreError::LeaseNotFound(id)) if id == lease), "{refused:?}");
    assert!(store.get(key(CHAPTER, "ended/a")).await.unwrap().is_none());
}

async fn many_leases_are_kept_alive(store: &SharedStore) {
    // Twice the usual time: on a busy machine all of them have to get through.
    let grants = (0..MANY).map(|_| store.lease_grant(TTL * 4));
    let leases: Vec<_> = futures::future::try_join_all(grants).await.unwrap();
    let ended = leases[MANY / 2];
    store.lease_revoke(ended).await.unwrap();
    for _ in 0..3 {
        let renewals =
            leases.iter().map(|lease| async move { (*lease, store.lease_keep_alive(*lease).await) });
        for (lease, renewed) in futures::future::join_all(renewals).await {
            match renewed {
                Ok(()) => assert_ne!(lease, ended),
                Err(StoreError::LeaseNotFound(id)) => assert_eq!((id, lease), (ended, ended)),
                Err(error) => panic!("lease {lease:?} was not renewed: {error}"),
            }
        }
    }
    let revocations = leases.iter().map(|lease| store.lease_revoke(*lease));
    futures::future::try_join_all(revocations).await.unwrap();
}

async fn a_lease_without_time_is_refused(store: &SharedStore) {
    let refused = store.lease_grant(Duration::ZERO).await;
    assert!(matches!(refused, Err(StoreError::InvalidRequest(_))), "{refused:?}");
}
