//! Backups: what was there comes back, and nothing else does.

use std::io::Cursor;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::{StreamExt, TryStreamExt};
use hv_proto::store::ClusterRecord;
use hv_store::backup::{BackupError, backup, restore, verify};
use hv_store::dump::dump;
use hv_store::embedded::{EmbeddedOptions, EmbeddedStore};
use hv_store::keys::Keys;
use hv_store::record::{decode_message, encode_message};
use hv_store::{KeyRange, Op, RangeRequest, SharedStore, Store, StoreExt, Txn};
use tempfile::TempDir;

/// More records than are read at once.
const RECORDS: usize = 1203;

fn empty() -> (TempDir, SharedStore, Keys) {
    let dir = tempfile::tempdir().unwrap();
    let store = EmbeddedStore::open(&dir.path().join("store"), EmbeddedOptions::default()).unwrap();
    (dir, store, Keys::new("/x"))
}

fn cluster() -> ClusterRecord {
    ClusterRecord { schema: 1, id: "the-cluster".into(), ..ClusterRecord::default() }
}

async fn filled() -> (TempDir, SharedStore, Keys) {
    let (dir, store, keys) = empty();
    store.put(keys.cluster(), encode_message(&cluster())).await.unwrap();
    for chunk in (0..RECORDS).collect::<Vec<_>>().chunks(100) {
        let then = chunk.iter().map(|n| {
            Op::put(format!("/x/instances/i{n:05}"), Bytes::from(vec![b'a' + (n % 26) as u8; 40 + n % 300]))
        });
        store.txn(Txn { then: then.collect(), ..Txn::default() }).await.unwrap();
    }
    let lease = store.lease_grant(Duration::from_secs(600)).await.unwrap();
    let then = vec![Op::put_leased("/x/leases/nodes/n1", "alive", lease), Op::put("/y/foreign", "not ours")];
    store.txn(Txn { then, ..Txn::default() }).await.unwrap();
    (dir, store, keys)
}

async fn backed_up(store: &SharedStore, keys: &Keys) -> Vec<u8> {
    let pieces: Vec<Bytes> = backup(store.clone(), keys.clone()).await.unwrap().try_collect().await.unwrap();
    pieces.concat()
}

async fn instances(store: &SharedStore) -> Vec<(Bytes, Bytes)> {
    let keys = KeyRange::Prefix("/x/instances/".into());
    let request = RangeRequest { keys, limit: 10_000, at: None, keys_only: false };
    store.range(request).await.unwrap().kvs.into_iter().map(|kv| (kv.key, kv.value)).collect()
}

#[tokio::test]
async fn what_was_there_comes_back_and_the_cluster_knows_when() {
    let (_one, store, keys) = filled().await;
    let file = backed_up(&store, &keys).await;
    let summary = verify(Cursor::new(&file)).await.unwrap();
    assert_eq!((summary.records, summary.cluster_id.as_str()), (RECORDS as u64 + 1, "the-cluster"));

    let (_two, other, _) = empty();
    // What a new server has written already.
    other
        .put(keys.cluster(), encode_message(&ClusterRecord { id: "new".into(), ..cluster() }))
        .await
        .unwrap();
    other.put(keys.event("e1"), "began").await.unwrap();
    assert_eq!(restore(&other, &keys, Cursor::new(&file)).await.unwrap(), summary);
    assert_eq!(instances(&other).await, instances(&store).await);
    let record: ClusterRecord = decode_message(&other.get(keys.cluster()).await.unwrap().unwrap()).unwrap();
    assert_eq!(record.id, "the-cluster");
    assert!(record.restored_at.is_some());
    for key in ["/x/leases/nodes/n1", "/y/foreign", "/x/restore"] {
        assert!(other.get(key).await.unwrap().is_none(), "{key}");
    }
}

#[tokio::test]
async fn a_backup_shows_one_moment_however_much_is_written_meanwhile() {
    let (_dir, store, keys) = filled().await;
    let before = instances(&store).await;
    let mut pieces = Box::pin(backup(store.clone(), keys.clone()).await.unwrap());
    let mut file = pieces.next().await.unwrap().unwrap().to_vec();
    store.put("/x/instances/i01202", "changed").await.unwrap();
    store.put("/x/instances/i99999", "new").await.unwrap();
    while let Some(piece) = pieces.next().await {
        file.extend_from_slice(&piece.unwrap());
    }
    let (_two, other, _) = empty();
    restore(&other, &keys, Cursor::new(&file)).await.unwrap();
    assert_eq!(instances(&other).await, before);
}

#[tokio::test]
async fn damage_anywhere_is_noticed_before_anything_is_written() {
    let (_one, store, keys) = filled().await;
    let file = backed_up(&store, &keys).await;
    let (_two, other, _) = empty();
    let untouched = other.revision().await.unwrap();
    for at in (0..file.len()).step_by(997).chain([file.len() - 1]) {
        let mut flipped = file.clone();
        flipped[at] ^= 0x10;
        let refused = restore(&other, &keys, Cursor::new(&flipped)).await;
        assert!(refused.is_err(), "a bit at {at} was not missed");
        let cut = restore(&other, &keys, Cursor::new(&file[..at])).await;
        assert!(cut.is_err(), "the end at {at} was not missed");
    }
    let longer = [&file[..], b"more"].concat();
    assert!(matches!(restore(&other, &keys, Cursor::new(longer)).await, Err(BackupError::Damaged { .. })));
    let garbage = vec![0xa5; 1 << 20];
    assert!(matches!(restore(&other, &keys, Cursor::new(garbage)).await, Err(BackupError::Foreign(_))));
    assert_eq!(other.revision().await.unwrap(), untouched);
}

#[tokio::test]
async fn a_store_with_records_is_refused_and_left_as_it_is() {
    let (_one, store, keys) = filled().await;
    let file = backed_up(&store, &keys).await;
    let (_two, other, _) = empty();
    other.put("/x/nodes/n1", "there").await.unwrap();
    let before = other.revision().await.unwrap();
    let refused = restore(&other, &keys, Cursor::new(&file)).await.unwrap_err();
    assert!(refused.to_string().contains("nodes/n1"), "{refused}");
    assert_eq!(other.revision().await.unwrap(), before);
}

#[tokio::test]
async fn an_interrupted_restore_goes_on_with_its_own_file_only() {
    let (_one, store, keys) = filled().await;
    let file = backed_up(&store, &keys).await;
    store.put("/x/instances/i99999", "later").await.unwrap();
    let newer = backed_up(&store, &keys).await;

    let (_two, inner, _) = empty();
    for writes in 0..4 {
        let flaky: SharedStore = Arc::new(Flaky { inner: inner.clone(), left: (writes + 1).into() });
        restore(&flaky, &keys, Cursor::new(&file)).await.unwrap_err();
        if writes > 0 {
            let other = restore(&inner, &keys, Cursor::new(&newer)).await;
            assert!(matches!(other, Err(BackupError::OtherUnderWay)), "{other:?}");
        }
    }
    restore(&inner, &keys, Cursor::new(&file)).await.unwrap();
    assert_eq!(instances(&inner).await.len(), RECORDS);
}

/// A store that stops to answer after some writes.
struct Flaky {
    inner: SharedStore,
    left: std::sync::atomic::AtomicUsize,
}

#[async_trait::async_trait]
impl Store for Flaky {
    async fn range(&self, request: RangeRequest) -> hv_store::Result<hv_store::RangeResult> {
        self.inner.range(request).await
    }

    async fn txn(&self, txn: Txn) -> hv_store::Result<hv_store::TxnOutcome> {
        use std::sync::atomic::Ordering;
        if self.left.fetch_sub(1, Ordering::Relaxed) <= 1 {
            self.left.store(1, Ordering::Relaxed);
            return Err(hv_store::StoreError::Closed);
        }
        self.inner.txn(txn).await
    }

    async fn watch(
        &self,
        keys: KeyRange,
        from: Option<hv_store::Revision>,
    ) -> hv_store::Result<hv_store::WatchStream> {
        self.inner.watch(keys, from).await
    }

    async fn revision(&self) -> hv_store::Result<hv_store::Revision> {
        self.inner.revision().await
    }

    async fn lease_grant(&self, ttl: Duration) -> hv_store::Result<hv_store::LeaseId> {
        self.inner.lease_grant(ttl).await
    }

    async fn lease_keep_alive(&self, lease: hv_store::LeaseId) -> hv_store::Result<()> {
        self.inner.lease_keep_alive(lease).await
    }

    async fn lease_revoke(&self, lease: hv_store::LeaseId) -> hv_store::Result<()> {
        self.inner.lease_revoke(lease).await
    }

    async fn compact(&self, revision: hv_store::Revision) -> hv_store::Result<()> {
        self.inner.compact(revision).await
    }

    async fn health(&self) -> hv_store::Result<hv_store::Health> {
        self.inner.health().await
    }
}

#[tokio::test]
async fn a_dump_has_a_line_of_json_for_each_record() {
    let (_dir, store, keys) = filled().await;
    let pieces: Vec<Bytes> =
        dump(store.clone(), keys.clone(), "").await.unwrap().try_collect().await.unwrap();
    let text = String::from_utf8(pieces.concat()).unwrap();
    let lines: Vec<serde_json::Value> =
        text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(lines.len(), RECORDS + 2);
    assert_eq!(lines[0]["key"], "/x/config/cluster");
    assert_eq!(lines[0]["value"]["id"], "the-cluster");
    let one: Vec<Bytes> = dump(store, keys, "config/").await.unwrap().try_collect().await.unwrap();
    assert_eq!(one.concat().iter().filter(|byte| **byte == b'\n').count(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_in_the_embedded_store_moves_to_etcd() {
    use hv_store::conformance::etcd_server::{EtcdServer, EtcdVersion};
    for version in [EtcdVersion::V3_4, EtcdVersion::V3_5] {
        let Some(server) = EtcdServer::start(version).await else { return };
        let (_one, store, keys) = filled().await;
        let file = backed_up(&store, &keys).await;
        let etcd: SharedStore = hv_store::etcd::EtcdStore::connect(server.options()).await.unwrap();
        restore(&etcd, &keys, Cursor::new(&file)).await.unwrap();
        assert_eq!(instances(&etcd).await, instances(&store).await);
        // And back: the same records, whatever the store.
        let again = backed_up(&etcd, &keys).await;
        let (_two, other, _) = empty();
        restore(&other, &keys, Cursor::new(&again)).await.unwrap();
        assert_eq!(instances(&other).await, instances(&store).await);
    }
}
