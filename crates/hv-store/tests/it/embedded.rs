//! The embedded store: the conformance suite, and what only it promises.

use std::fs;
use std::io::{Seek, SeekFrom, Write};
use std::os::unix::fs::PermissionsExt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures::StreamExt;
use hv_store::conformance;
use hv_store::embedded::{EmbeddedOptions, EmbeddedStore};
use hv_store::upkeep::{self, Upkeep};
use hv_store::{KeyRange, Op, RangeRequest, Revision, SharedStore, Store, StoreError, StoreExt, Txn};
use tempfile::TempDir;

/// Little memory for the latest changes, so that watches have to read the disk too.
fn options() -> EmbeddedOptions {
    EmbeddedOptions { recent_bytes: 64 << 10, ..EmbeddedOptions::default() }
}

fn fresh() -> (TempDir, Arc<EmbeddedStore>) {
    fresh_with(options())
}

fn fresh_with(options: EmbeddedOptions) -> (TempDir, Arc<EmbeddedStore>) {
    let dir = TempDir::new().unwrap();
    let store = EmbeddedStore::open(dir.path(), options).unwrap();
    (dir, store)
}

fn everything(at: Option<Revision>) -> RangeRequest {
    RangeRequest { keys: KeyRange::Prefix("".into()), limit: 1000, at, keys_only: false }
}

macro_rules! chapters {
    ($($chapter:ident),*) => {$(
        #[tokio::test(flavor = "multi_thread")]
        async fn $chapter() {
            let (_dir, store) = fresh();
            let shared: SharedStore = store.clone();
            conformance::$chapter(&shared).await;
            store.close().await;
        }
    )*};
}
chapters!(keys, transactions, watches, history, compaction, upkeep, leases, races);

#[tokio::test]
async fn everything_survives_closing() {
    let (dir, store) = fresh();
    let lease = store.lease_grant(Duration::from_secs(600)).await.unwrap();
    let first = store.put("a", "1").await.unwrap();
    store.put("a", "2").await.unwrap();
    let then = vec![Op::put_leased("leased", "x", lease), Op::put("b", "")];
    store.txn(Txn { then, ..Txn::default() }).await.unwrap();
    let before = store.range(everything(None)).await.unwrap();
    let before_then = store.range(everything(Some(first))).await.unwrap();
    store.close().await;

    let store = EmbeddedStore::open(dir.path(), options()).unwrap();
    let after = store.range(everything(None)).await.unwrap();
    assert_eq!((before.kvs, before.revision), (after.kvs, after.revision));
    assert_eq!(before_then.kvs, store.range(everything(Some(first))).await.unwrap().kvs);
    assert!(store.put("c", "").await.unwrap() > before.revision);
    store.lease_keep_alive(lease).await.unwrap();
    store.lease_revoke(lease).await.unwrap();
    assert!(store.get("leased").await.unwrap().is_none());
    let another = store.lease_grant(Duration::from_secs(600)).await.unwrap();
    assert_ne!(another, lease, "a lease's identity is never used again");
}

#[tokio::test]
async fn a_lease_has_its_full_time_after_opening() {
    let (dir, store) = fresh();
    let ttl = Duration::from_secs(2);
    let lease = store.lease_grant(ttl).await.unwrap();
    let then = vec![Op::put_leased("leased", "", lease)];
    store.txn(Txn { then, ..Txn::default() }).await.unwrap();
    tokio::time::sleep(ttl / 2).await;
    store.close().await;

    let opened = Instant::now();
    let store = EmbeddedStore::open(dir.path(), options()).unwrap();
    let mut stream = store.watch(KeyRange::Prefix("".into()), None).await.unwrap();
    let events = stream.next().await.unwrap().unwrap();
    assert_eq!(events.changes.len(), 1);
    assert!(opened.elapsed() >= ttl, "it ended {:?} after opening", opened.elapsed());
}

#[tokio::test]
async fn a_second_opening_is_refused_and_names_the_directory() {
    let (dir, store) = fresh();
    let refused = EmbeddedStore::open(dir.path(), options()).err().expect("it is open already");
    let StoreError::Io { path, source, .. } = &refused else { panic!("{refused:?}") };
    assert_eq!(path, &dir.path().display().to_string());
    assert!(source.to_string().contains("another process"), "{source}");
    store.put("a", "still works").await.unwrap();
    drop(store);
    EmbeddedStore::open(dir.path(), options()).expect("dropping the last handle releases the directory");
}

#[tokio::test]
async fn the_directory_is_private() {
    let dir = TempDir::new().unwrap();
    let nested = dir.path().join("new/store");
    EmbeddedStore::open(&nested, options()).unwrap();
    assert_eq!(fs::metadata(&nested).unwrap().permissions().mode() & 0o777, 0o700);
    assert_eq!(fs::metadata(nested.join("store.redb")).unwrap().permissions().mode() & 0o777, 0o600);
}

#[tokio::test]
async fn a_path_that_is_no_directory_is_an_error_that_names_it() {
    let dir = TempDir::new().unwrap();
    let file = dir.path().join("file");
    fs::write(&file, "").unwrap();
    let refused = EmbeddedStore::open(&file, options()).err().expect("it is a file");
    assert!(refused.to_string().contains(file.to_str().unwrap()), "{refused}");
}

#[tokio::test]
async fn calls_on_a_closed_store_fail_and_its_watches_end() {
    let (_dir, store) = fresh();
    let mut stream = store.watch(KeyRange::Prefix("".into()), None).await.unwrap();
    let put = store.put("a", "").await.unwrap();
    store.close().await;
    let last = stream.next().await.expect("what was committed is still delivered").unwrap();
    assert_eq!(last.revision, put);
    assert!(stream.next().await.is_none());
    assert!(matches!(store.put("a", "").await, Err(StoreError::Closed)));
    assert!(matches!(store.get("a").await, Err(StoreError::Closed)));
    assert!(matches!(store.revision().await, Err(StoreError::Closed)));
    assert!(matches!(store.watch(KeyRange::Prefix("".into()), None).await.err(), Some(StoreError::Closed)));
    store.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn history_is_bounded_without_being_asked() {
    let kept = 100;
    let (_dir, store) =
        fresh_with(EmbeddedOptions { auto_compact_revisions: kept, recent_bytes: 0, ..options() });
    let mut late = store.watch(KeyRange::Prefix("".into()), None).await.unwrap();
    let mut last = Revision(0);
    for index in 0..1000 {
        last = store.put(format!("{}", index % 7), index.to_string()).await.unwrap();
    }
    let oldest = Revision(last.0 - kept);
    assert!(store.range(everything(Some(oldest))).await.is_ok());
    let refused = store.range(everything(Some(Revision(oldest.0 - 1)))).await;
    assert!(
        matches!(refused, Err(StoreError::Compacted { oldest: told, .. }) if told == oldest),
        "{refused:?}"
    );
    // A watch that was too slow for that says so, and ends.
    let error = late.next().await.unwrap().unwrap_err();
    assert!(matches!(error, StoreError::Compacted { oldest: told, .. } if told == oldest), "{error:?}");
    assert!(late.next().await.is_none());
}

#[tokio::test(flavor = "multi_thread")]
async fn compaction_gives_room_back_for_new_writes() {
    let (_dir, store) = fresh();
    let value = vec![b'v'; 10_000];
    let rewrite = async || {
        for _ in 0..10 {
            let puts = (0..100).map(|index| store.put(index.to_string(), value.clone()));
            futures::future::try_join_all(puts).await.unwrap();
        }
        store.health().await.unwrap().size_bytes
    };
    let first = rewrite().await;
    let mut largest = first;
    for _ in 0..5 {
        store.compact(store.revision().await.unwrap()).await.unwrap();
        largest = largest.max(rewrite().await);
    }
    // Without compaction it would hold six times as much.
    assert!(largest < first * 3, "the file grew from {first} to {largest} bytes");
}

#[tokio::test]
async fn a_damaged_file_is_never_taken_for_good() {
    let (dir, store) = fresh();
    let value = vec![b'v'; 2000];
    for index in 0..500 {
        store.put(format!("{index:03}"), value.clone()).await.unwrap();
    }
    store.close().await;
    let file = dir.path().join("store.redb");
    let good = fs::read(&file).unwrap();
    let mut refused = 0;
    let used = good.iter().rposition(|byte| *byte != 0).unwrap() as u64;
    for step in 0..40 {
        fs::write(&file, &good).unwrap();
        let mut damaged = fs::OpenOptions::new().write(true).open(&file).unwrap();
        damaged.seek(SeekFrom::Start(used * step / 40)).unwrap();
        damaged.write_all(&[0xa5; 64]).unwrap();
        drop(damaged);
        match EmbeddedStore::open(dir.path(), options()) {
            Err(StoreError::Io { path, .. }) => {
                assert_eq!(path, dir.path().display().to_string());
                refused += 1;
            }
            Err(error) => panic!("{error:?}"),
            // The damage hit what is not in use.
            Ok(store) => {
                let found = store.range(everything(None)).await.unwrap();
                assert_eq!(found.kvs.len(), 500);
                assert!(found.kvs.iter().all(|kv| kv.value == value));
                store.close().await;
            }
        }
    }
    assert!(refused > 10, "only {refused} of 40 damages were noticed");
    fs::write(&file, &good).unwrap();
    EmbeddedStore::open(dir.path(), options()).expect("the undamaged file opens");
}

#[tokio::test]
async fn a_file_of_something_else_is_refused() {
    let dir = TempDir::new().unwrap();
    fs::write(dir.path().join("store.redb"), vec![b'?'; 10_000]).unwrap();
    let refused = EmbeddedStore::open(dir.path(), options()).err();
    assert!(matches!(refused, Some(StoreError::Io { .. })), "{refused:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn history_is_bounded_in_bytes_too_and_the_count_survives_opening() {
    let limit = 2 << 20;
    let bounded = EmbeddedOptions { max_history_bytes: limit, recent_bytes: 0, ..options() };
    let (dir, store) = fresh_with(bounded.clone());
    let value = vec![b'v'; 10_000];
    for round in 0..2 {
        let store = if round == 0 {
            store.clone()
        } else {
            store.close().await;
            EmbeddedStore::open(dir.path(), bounded.clone()).unwrap()
        };
        let mut last = Revision(0);
        for _ in 0..600 {
            last = store.put("a", value.clone()).await.unwrap();
        }
        let oldest = store.status().await.unwrap().oldest.unwrap();
        let kept = last.0 - oldest.0;
        assert!((150..=220).contains(&kept), "{kept} revisions of 10 kB in 2 MiB, round {round}");
        assert!(store.range(everything(Some(oldest))).await.is_ok());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_upkeep_compacts_as_time_passes_and_ends_when_told() {
    let (_dir, store) = fresh();
    let upkeep = Upkeep {
        keep_for: Duration::from_millis(300),
        every: Duration::from_millis(50),
        ..Upkeep::default()
    };
    let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
    let running = tokio::spawn(upkeep::run(store.clone(), upkeep, async move { drop(stopped.await) }));
    let first = store.put("a", "1").await.unwrap();
    let second = store.put("a", "2").await.unwrap();
    assert!(store.range(everything(Some(first))).await.is_ok(), "it is younger than it must be");
    let deadline = Instant::now() + Duration::from_secs(20);
    while store.status().await.unwrap().oldest < Some(second) {
        assert!(Instant::now() < deadline, "nothing is compacted");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert!(store.range(everything(Some(second))).await.is_ok());
    stop.send(()).unwrap();
    running.await.unwrap();
}
