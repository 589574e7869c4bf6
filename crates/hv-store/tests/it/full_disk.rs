//! The embedded store on a file system that fills up.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use hv_store::conformance::skip;
use hv_store::embedded::{EmbeddedOptions, EmbeddedStore};
use hv_store::{Op, Revision, SharedStore, StoreError, StoreExt, Txn};
use tempfile::TempDir;

const SIZE_MIB: usize = 24;
/// What another program holds of the disk, and gives back later.
const BALLAST_BYTES: usize = 8 << 20;
/// More writes than could ever fit.
const MAX_WRITES: usize = 200_000;

/// A small file system of its own; gone when dropped.
struct SmallDisk {
    dir: TempDir,
}

impl SmallDisk {
    fn mount() -> Result<Self, String> {
        let dir = TempDir::new().unwrap();
        let size = format!("size={SIZE_MIB}m");
        let mounted =
            Command::new("mount").args(["-t", "tmpfs", "-o", &size, "none"]).arg(dir.path()).output();
        match mounted {
            Ok(output) if output.status.success() => Ok(Self { dir }),
            Ok(output) => Err(String::from_utf8_lossy(&output.stderr).trim().to_owned()),
            Err(error) => Err(format!("mount cannot be run: {error}")),
        }
    }

    /// `None`, reported, where mounting needs rights that this user does not have.
    fn or_skip() -> Option<Self> {
        Self::mount().map_err(|why| skip("full disk", &format!("a small file system is needed: {why}"))).ok()
    }

    fn ballast(&self) -> PathBuf {
        self.dir.path().join("ballast")
    }

    fn store_dir(&self) -> PathBuf {
        self.dir.path().join("store")
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let done = Command::new("umount").arg(self.dir.path()).status();
        if !done.is_ok_and(|status| status.success()) {
            eprintln!("{} stays mounted", self.dir.path().display());
        }
    }
}

fn open(dir: &Path, min_free_bytes: u64) -> SharedStore {
    // Without automatic compaction nothing frees room behind the test's back.
    let options =
        EmbeddedOptions { min_free_bytes, auto_compact_revisions: u64::MAX, ..EmbeddedOptions::default() };
    EmbeddedStore::open(dir, options).unwrap()
}

/// Writes until the store says that it is full. How many writes were acknowledged.
async fn fill(store: &SharedStore, value: &[u8]) -> usize {
    for index in 0..MAX_WRITES {
        match store.put(format!("{:08x}", scattered(index)), value.to_vec()).await {
            Ok(_) => {}
            Err(StoreError::Full(_)) => return index,
            Err(error) => panic!("write {index} failed with {error:?}"),
        }
    }
    panic!("{MAX_WRITES} writes fit into {SIZE_MIB} MiB");
}

/// Keys all over the tree make each commit touch many pages.
fn scattered(index: usize) -> u32 {
    (index as u32).wrapping_mul(2_654_435_761)
}

async fn check_all(store: &SharedStore, count: usize, value: &[u8]) {
    for index in 0..count {
        let kv = store.get(format!("{:08x}", scattered(index))).await.unwrap();
        assert!(kv.is_some_and(|kv| kv.value == value), "acknowledged write {index} of {count} is gone");
    }
}

async fn a_full_disk_is_survived(min_free_bytes: u64, value: &[u8]) {
    let Some(disk) = SmallDisk::or_skip() else { return };
    fs::write(disk.ballast(), vec![0; BALLAST_BYTES]).unwrap();
    let store = open(&disk.store_dir(), min_free_bytes);
    let count = fill(&store, value).await;
    assert!(count > 10, "only {count} writes fit");
    // Which of the two ways it was: the reserve is given up only by a write that failed.
    assert_eq!(disk.store_dir().join("reserve").exists(), min_free_bytes > 0);
    let revision = store.revision().await.unwrap();
    assert_eq!(revision, Revision(1 + count as u64), "a refused write took a revision");

    // Reading goes on, and refused writes leave nothing.
    check_all(&store, count, value).await;
    assert!(store.get(format!("{:08x}", scattered(count))).await.unwrap().is_none());
    assert!(matches!(store.put("more", value.to_vec()).await, Err(StoreError::Full(_))));

    // Writing goes on as soon as there is room.
    fs::remove_file(disk.ballast()).unwrap();
    store.put("more", value.to_vec()).await.unwrap();
    assert!(store.health().await.unwrap().warnings.is_empty());
    drop(store);
    let store = open(&disk.store_dir(), min_free_bytes);
    check_all(&store, count, value).await;
    assert!(store.get("more").await.unwrap().is_some());
    drop(store);
}

#[tokio::test(flavor = "multi_thread")]
async fn writes_are_refused_before_the_disk_is_full() {
    a_full_disk_is_survived(4 << 20, &[b'v'; 32 << 10]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_write_that_hits_the_end_of_the_disk_is_refused() {
    a_full_disk_is_survived(0, &[b'v'; 1000]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn deleting_works_on_a_full_disk() {
    let Some(disk) = SmallDisk::or_skip() else { return };
    let store = open(&disk.store_dir(), 4 << 20);
    let value = [b'v'; 32 << 10];
    let count = fill(&store, &value).await;
    assert!(!store.health().await.unwrap().warnings.is_empty());
    for index in 0..count / 2 {
        let then = vec![Op::delete(format!("{:08x}", scattered(index)))];
        store.txn(Txn { then, ..Txn::default() }).await.unwrap();
    }
    let now = store.revision().await.unwrap();
    store.compact(now).await.unwrap();
    assert!(store.get(format!("{:08x}", scattered(0))).await.unwrap().is_none());
    assert!(store.get(format!("{:08x}", scattered(count - 1))).await.unwrap().is_some());
    drop(store);
}
