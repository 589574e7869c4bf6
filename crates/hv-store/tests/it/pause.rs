//! A process with an embedded store that is stopped for longer than its leases last.

use std::io::{BufRead, BufReader, Write};
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use futures::StreamExt;
use hv_store::embedded::{EmbeddedOptions, EmbeddedStore};
use hv_store::{KeyRange, Op, SharedStore, StoreExt, Txn};
use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;

/// Tells the child where its store is.
const DIR_VARIABLE: &str = "HV_STORE_PAUSE_DIR";
const TTL: Duration = Duration::from_secs(2);
const STOPPED: Duration = Duration::from_secs(5);

/// The child: two leases, of which one is renewed again and again. Says when the other one has ended.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "is run by the pause test, as a process of its own"]
async fn child_keeps_a_lease_alive() {
    let Some(dir) = std::env::var_os(DIR_VARIABLE) else { return };
    let store: SharedStore = EmbeddedStore::open(&PathBuf::from(dir), EmbeddedOptions::default()).unwrap();
    let (kept, lost) = (store.lease_grant(TTL).await.unwrap(), store.lease_grant(TTL).await.unwrap());
    let then = vec![Op::put_leased("kept", "", kept), Op::put_leased("lost", "", lost)];
    store.txn(Txn { then, ..Txn::default() }).await.unwrap();
    let mut lost_watch = store.watch(KeyRange::Key("lost".into()), None).await.unwrap();
    let renewed = store.clone();
    tokio::spawn(async move {
        loop {
            renewed.lease_keep_alive(kept).await.expect("a lease that is renewed all the time lives");
            tokio::time::sleep(TTL / 8).await;
        }
    });
    say("ready");
    while lost_watch.next().await.unwrap().unwrap().changes.is_empty() {}
    say("ended");
    assert!(store.get("kept").await.unwrap().is_some());
    say("kept");
}

fn say(word: &str) {
    let mut out = std::io::stdout().lock();
    writeln!(out, "pause {word}").unwrap();
    out.flush().unwrap();
}

#[test]
fn no_lease_ends_because_the_process_was_stopped() {
    let dir = TempDir::new().unwrap();
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "pause::child_keeps_a_lease_alive", "--ignored", "--nocapture"])
        .env(DIR_VARIABLE, dir.path())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let mut wait_for = |word: &str| {
        let wanted = format!("pause {word}");
        let found = lines.find(|line| line.as_ref().is_ok_and(|line| line.ends_with(&wanted)));
        assert!(found.is_some(), "the child ended without {wanted:?}");
    };
    wait_for("ready");
    let pid = Pid::from_child(&child);
    kill_process(pid, Signal::STOP).unwrap();
    // This is the stop itself, longer than the leases last; there is nothing to wait for.
    let until = Instant::now() + STOPPED;
    while let Some(left) = until.checked_duration_since(Instant::now()).filter(|left| !left.is_zero()) {
        std::thread::park_timeout(left);
    }
    let awake = Instant::now();
    kill_process(pid, Signal::CONT).unwrap();
    wait_for("ended");
    let lived = awake.elapsed();
    wait_for("kept");
    assert!(child.wait().unwrap().success());
    assert!(lived >= TTL, "a lease ended {lived:?} after the process went on; it lasts {TTL:?}");
}
