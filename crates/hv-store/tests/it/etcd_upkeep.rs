//! The upkeep of etcd: quotas that run out, and defragmentation of several members.

use std::time::{Duration, Instant};

use hv_store::conformance::etcd_server::{EtcdServer, EtcdSpec, EtcdVersion};
use hv_store::etcd::{EtcdOptions, EtcdStore};
use hv_store::{KeyRange, Op, SharedStore, Store, StoreError, StoreExt, Txn, TxnOutcome};

fn spec(version: EtcdVersion, members: usize) -> EtcdSpec {
    EtcdSpec { version, members, tls: false, quota_bytes: None }
}

fn impatient(server: &EtcdServer) -> EtcdOptions {
    EtcdOptions {
        request_timeout: Duration::from_secs(3),
        dial_timeout: Duration::from_secs(1),
        ..server.options()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_used_up_quota_is_reported_and_reading_goes_on() {
    for version in [EtcdVersion::V3_4, EtcdVersion::V3_5] {
        let spec = EtcdSpec { version, members: 1, tls: false, quota_bytes: Some(8 << 20) };
        let Some(server) = EtcdServer::start_with(spec).await else { continue };
        let store: SharedStore = EtcdStore::connect(impatient(&server)).await.unwrap();
        store.put("first", "1").await.unwrap();
        let full = async {
            for index in 0..1000 {
                store.put(index.to_string(), vec![b'v'; 100_000]).await?;
            }
            Ok(())
        };
        let error: StoreError = full.await.expect_err("8 MiB do not hold 100 MB");
        assert!(matches!(error, StoreError::Full(_)) && error.retryable(), "{error:?}");
        assert!(store.get("first").await.unwrap().is_some());
        let warnings = store.health().await.unwrap().warnings;
        assert!(warnings.iter().any(|warning| warning.contains("quota")), "{warnings:?}");
    }
}

/// Room runs out, is refused in time, and comes back: by deleting, compaction and defragmentation, in that order.
async fn a_store_that_is_nearly_full_refuses_and_recovers(version: EtcdVersion, told: Option<u64>) {
    let quota_bytes = 48 << 20;
    let spec = EtcdSpec { version, members: 1, tls: false, quota_bytes: Some(quota_bytes) };
    let Some(server) = EtcdServer::start_with(spec).await else { return };
    let options = EtcdOptions { quota_bytes: told, ..impatient(&server) };
    let store: SharedStore = EtcdStore::connect(options).await.unwrap();
    let lease = store.lease_grant(Duration::from_secs(600)).await.unwrap();
    let mut count = 0;
    let refused = loop {
        assert!(count < 2000, "48 MiB do not hold 200 MB");
        match store.put(format!("bulk/{count:04}"), vec![b'v'; 100_000]).await {
            Ok(_) => count += 1,
            Err(error) => break error,
        }
    };
    assert!(matches!(refused, StoreError::Full(_)) && refused.retryable(), "{refused:?}");
    let full = store.status().await.unwrap();
    assert!(full.is_full && !full.warnings.is_empty(), "{full:?}");
    let alarmed = full.members.iter().any(|member| member.alarms == ["NOSPACE"]);
    // Told of the quota, the store refuses before etcd does.
    assert_eq!(alarmed, told.is_none(), "{full:?}");

    // What frees room, and what keeps others alive, still works.
    store.lease_keep_alive(lease).await.unwrap();
    assert!(store.get("bulk/0000").await.unwrap().is_some());
    let then = vec![Op::Delete(KeyRange::Prefix("bulk/".into()))];
    let Ok(TxnOutcome::Committed(at)) = store.txn(Txn { then, ..Txn::default() }).await else {
        panic!("deleting works on a full store")
    };
    assert!(matches!(store.put("more", "").await, Err(StoreError::Full(_))), "deleting alone makes no room");
    store.compact(at).await.unwrap();
    let deadline = Instant::now() + Duration::from_secs(30);
    loop {
        // etcd drops what was compacted in the background.
        store.defragment(&|_| ()).await.unwrap();
        match store.put("more", "").await {
            Ok(_) => break,
            Err(error) => assert!(Instant::now() < deadline, "it stays full: {error:?}"),
        }
    }
    let well = store.status().await.unwrap();
    assert!(!well.is_full && well.members.iter().all(|member| member.alarms.is_empty()), "{well:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_quota_that_is_known_is_never_hit_v3_4() {
    a_store_that_is_nearly_full_refuses_and_recovers(EtcdVersion::V3_4, Some(48 << 20)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_quota_that_is_known_is_never_hit_v3_5() {
    a_store_that_is_nearly_full_refuses_and_recovers(EtcdVersion::V3_5, Some(48 << 20)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_quota_that_was_hit_is_recovered_from_v3_5() {
    a_store_that_is_nearly_full_refuses_and_recovers(EtcdVersion::V3_5, None).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn members_are_defragmented_one_after_the_other_and_the_leader_last() {
    let Some(server) = EtcdServer::start_with(spec(EtcdVersion::V3_5, 3)).await else { return };
    let store = EtcdStore::connect(impatient(&server)).await.unwrap();
    let status = store.status().await.unwrap();
    assert_eq!(status.members.len(), 3);
    let leader = status.members.iter().find(|member| member.is_leader).expect("one leads").endpoint.clone();
    let steps = std::sync::Mutex::new(Vec::new());
    store.defragment(&|step| steps.lock().unwrap().push(step.message)).await.unwrap();
    let begun: Vec<_> =
        steps.into_inner().unwrap().into_iter().filter(|step| step.starts_with("defragmenting")).collect();
    assert_eq!(begun.len(), 3, "{begun:?}");
    assert!(begun[2].contains(&leader) && begun[2].ends_with("the leader"), "{begun:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_member_that_is_away_is_named_before_anything_is_defragmented() {
    let Some(mut server) = EtcdServer::start_with(spec(EtcdVersion::V3_5, 3)).await else { return };
    let store = EtcdStore::connect(impatient(&server)).await.unwrap();
    server.stop_member(1);
    let status = store.status().await.unwrap();
    assert!(status.members[1].error.is_some(), "{status:?}");
    let refused = store.defragment(&|step| panic!("{step:?}")).await;
    assert!(
        matches!(&refused, Err(StoreError::Unavailable { endpoint, .. }) if *endpoint == server.endpoints()[1]),
        "{refused:?}"
    );
}
