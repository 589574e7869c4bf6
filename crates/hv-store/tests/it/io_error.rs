//! The embedded store where writing fails for another reason than a full disk: here, a limit on the size of files.

use std::path::PathBuf;
use std::process::Command;

use hv_store::embedded::{EmbeddedOptions, EmbeddedStore};
use hv_store::{SharedStore, StoreError, StoreExt};
use tempfile::TempDir;

/// Tells the child where to write.
const DIR_VARIABLE: &str = "HV_STORE_IO_ERROR_DIR";
/// The limit, in blocks of 512 bytes: 12 MiB.
const LIMIT_BLOCKS: &str = "24576";
/// More than fits below the limit.
const MAX_WRITES: usize = 2000;
const VALUE: [u8; 16 << 10] = [b'v'; 16 << 10];

async fn check_all(store: &SharedStore, count: usize) {
    for index in 0..count {
        let kv = store.get(index.to_string()).await.unwrap();
        assert!(kv.is_some_and(|kv| kv.value == VALUE[..]), "acknowledged write {index} of {count} is gone");
    }
}

/// The child, whose files cannot grow beyond the limit.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "is run by the I/O error test, as a process of its own with a limit"]
async fn child_writes_until_an_error() {
    let Some(dir) = std::env::var_os(DIR_VARIABLE) else { return };
    let store: SharedStore = EmbeddedStore::open(&PathBuf::from(dir), EmbeddedOptions::default()).unwrap();
    let mut count = 0;
    let error = loop {
        assert!(count < MAX_WRITES, "the limit has no effect");
        match store.put(count.to_string(), VALUE.to_vec()).await {
            Ok(_) => count += 1,
            Err(error) => break error,
        }
    };
    assert!(matches!(error, StoreError::Io { .. }) && !error.retryable(), "{error:?}");
    assert!(count > 10, "only {count} writes fit");
    check_all(&store, count).await;
    // What the disk holds after a failed write is not known for certain: nothing is written on top of it.
    let refused = store.put("more", "").await;
    assert!(matches!(refused, Err(StoreError::Io { .. })), "{refused:?}");
    let warnings = store.health().await.unwrap().warnings;
    assert!(warnings.iter().any(|warning| warning.contains("write failed")), "{warnings:?}");
    println!("acknowledged {count}");
}

#[tokio::test]
async fn a_failed_write_stops_writing_and_not_reading() {
    let dir = TempDir::new().unwrap();
    let limited = format!("trap '' XFSZ; ulimit -f {LIMIT_BLOCKS}; exec \"$0\" \"$@\"");
    let child = Command::new("sh")
        .arg("-c")
        .arg(limited)
        .arg(std::env::current_exe().unwrap())
        .args(["--exact", "io_error::child_writes_until_an_error", "--ignored", "--nocapture"])
        .env(DIR_VARIABLE, dir.path())
        .output()
        .unwrap();
    let (out, err) = (String::from_utf8_lossy(&child.stdout), String::from_utf8_lossy(&child.stderr));
    assert!(child.status.success(), "{out}\n{err}");
    let count =
        out.lines().find_map(|line| line.split_once("acknowledged ")).expect("the child got that far").1;

    // A new process, without the limit, goes on where the other one stopped.
    let store: SharedStore = EmbeddedStore::open(dir.path(), EmbeddedOptions::default()).unwrap();
    check_all(&store, count.parse().unwrap()).await;
    store.put("more", "").await.unwrap();
}
