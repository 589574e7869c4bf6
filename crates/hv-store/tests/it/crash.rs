//! Kill -9 of a process that writes to an embedded store, again and again.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::time::Duration;

use hv_store::embedded::{EmbeddedOptions, EmbeddedStore};
use hv_store::{Revision, SharedStore};
use tempfile::TempDir;

use crate::workload;

const ROUNDS: usize = 20;
const WRITERS: usize = 8;
/// Tells the child where to write.
const DIR_VARIABLE: &str = "HV_STORE_CRASH_DIR";
/// How long a child may take to acknowledge its first transaction.
const FIRST_ACKNOWLEDGEMENT: Duration = Duration::from_secs(60);

fn open(dir: &Path) -> SharedStore {
    // Little history, so that compaction too is interrupted.
    let options = EmbeddedOptions { auto_compact_revisions: 500, ..EmbeddedOptions::default() };
    EmbeddedStore::open(dir, options).unwrap()
}

/// The child: writes, and prints each acknowledged transaction, until it is killed.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "is run by the crash test, as a process of its own"]
async fn child_writes_until_it_is_killed() {
    let Some(dir) = std::env::var_os(DIR_VARIABLE) else { return };
    let store = open(&PathBuf::from(dir));
    let writers = (0..WRITERS).map(|writer| {
        let store = store.clone();
        tokio::spawn(async move {
            let mut number = workload::last_number(&store, writer).await.unwrap();
            loop {
                workload::commit_next(&store, writer, number).await.unwrap();
                number += 1;
                let mut out = std::io::stdout().lock();
                writeln!(out, "acknowledged {writer} {number}").unwrap();
                out.flush().unwrap();
            }
        })
    });
    futures::future::join_all(writers).await;
}

/// A running child; killed when dropped.
struct Writing {
    process: Child,
    lines: mpsc::Receiver<String>,
}

impl Writing {
    fn start(dir: &Path) -> Self {
        let mut process = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "crash::child_writes_until_it_is_killed", "--ignored", "--nocapture"])
            .env(DIR_VARIABLE, dir)
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let out = BufReader::new(process.stdout.take().unwrap());
        let (sender, lines) = mpsc::channel();
        std::thread::spawn(move || {
            // A line that was cut by the kill is no acknowledgement; `lines` would hand it out like any other.
            for line in out.split(b'\n').map_while(Result::ok) {
                let sent = sender.send(String::from_utf8_lossy(&line).into_owned());
                if sent.is_err() {
                    return;
                }
            }
        });
        Self { process, lines }
    }

    fn kill(&mut self) {
        drop(self.process.kill());
        drop(self.process.wait());
    }
}

impl Drop for Writing {
    fn drop(&mut self) {
        self.kill();
    }
}

/// A transaction that a line acknowledges. The number of the last line may be cut short: then it names an earlier one,
/// which is there as well.
fn acknowledged(line: &str) -> Option<(usize, u64)> {
    let (writer, number) = line.split_once("acknowledged ")?.1.split_once(' ')?;
    Some((writer.parse().ok()?, number.parse().ok()?))
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_acknowledged_survives_kill_9() {
    let dir = TempDir::new().unwrap();
    let mut seen: BTreeMap<usize, BTreeSet<u64>> = BTreeMap::new();
    let mut last_revision = Revision(0);
    for round in 0..ROUNDS {
        let mut writing = Writing::start(dir.path());
        let mut count = 0;
        let mut record = |line: String| {
            if let Some((writer, number)) = acknowledged(&line) {
                seen.entry(writer).or_default().insert(number);
                count += 1;
            }
        };
        // The first lines are the test harness's own; writing has begun when one is an acknowledgement.
        loop {
            let line = writing.lines.recv_timeout(FIRST_ACKNOWLEDGEMENT).expect("the child writes");
            let begun = acknowledged(&line).is_some();
            record(line);
            if begun {
                break;
            }
        }
        tokio::time::sleep(Duration::from_micros(rand::random_range(0..150_000))).await;
        writing.kill();
        while let Ok(line) = writing.lines.recv() {
            record(line);
        }
        assert!(count > 0);

        let store = open(dir.path());
        for writer in 0..WRITERS {
            workload::check(&store, writer, seen.get(&writer).unwrap_or(&BTreeSet::new())).await;
        }
        let revision = store.revision().await.unwrap();
        assert!(revision > last_revision, "round {round} committed something");
        last_revision = revision;
        let oldest = workload::oldest(&store).await;
        // Revision 1 is the empty store.
        workload::check_history(&store, oldest.max(Revision(2)), revision).await;
    }
    let total: usize = seen.values().map(BTreeSet::len).sum();
    eprintln!("{total} acknowledged transactions, {ROUNDS} kills, now at revision {last_revision}");
}
