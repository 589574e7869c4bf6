//! What an instance prints, at whichever node: its console's log is held open from when it appears, as a node that gives an
//! instance away removes it.

use std::fs::File;
use std::io::{Read as _, Seek as _, SeekFrom};
use std::os::unix::fs::MetadataExt as _;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Result;
use parking_lot::Mutex;
use tokio::task::JoinHandle;

/// How often it is looked for new logs, and what has come into the known ones.
const LOOK_EVERY: Duration = Duration::from_millis(5);

#[derive(Default)]
struct Seen {
    /// In the order in which they appeared.
    logs: Vec<File>,
    bytes: u64,
    /// When something was last printed.
    grew: Option<Instant>,
    longest: Duration,
}

/// The console's logs of one instance.
pub(super) struct Consoles {
    seen: Arc<Mutex<Seen>>,
    task: JoinHandle<()>,
}

impl Consoles {
    /// Watches these paths from now on.
    pub(super) fn watch(paths: Vec<PathBuf>) -> Self {
        let seen: Arc<Mutex<Seen>> = Arc::default();
        let looked = Arc::clone(&seen);
        let task = tokio::spawn(async move {
            loop {
                looked.lock().look(&paths);
                tokio::time::sleep(LOOK_EVERY).await;
            }
        });
        Self { seen, task }
    }

    /// All that was printed so far.
    pub(super) fn text(&self) -> Result<String> {
        let mut text = Vec::new();
        for log in &mut self.seen.lock().logs {
            log.seek(SeekFrom::Start(0))?;
            log.read_to_end(&mut text)?;
        }
        Ok(String::from_utf8_lossy(&text).into_owned())
    }

    /// The longest time in which nothing was printed, since this was last asked.
    pub(super) fn longest_silence(&self) -> Duration {
        std::mem::take(&mut self.seen.lock().longest)
    }
}

impl Drop for Consoles {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Seen {
    fn look(&mut self, paths: &[PathBuf]) {
        for path in paths {
            // It is there, or it is not: the next look sees it.
            let Some((file, inode)) = File::open(path).ok().and_then(|file| {
                let inode = file.metadata().ok()?.ino();
                Some((file, inode))
            }) else {
                continue;
            };
            let is_known = |log: &File| log.metadata().is_ok_and(|known| known.ino() == inode);
            if !self.logs.iter().any(is_known) {
                self.logs.push(file);
            }
        }
        let bytes = self.logs.iter().filter_map(|log| Some(log.metadata().ok()?.len())).sum();
        if bytes > self.bytes {
            let now = Instant::now();
            let silence = self.grew.replace(now).map_or(Duration::ZERO, |before| now - before);
            self.longest = self.longest.max(silence);
            self.bytes = bytes;
        }
    }
}
