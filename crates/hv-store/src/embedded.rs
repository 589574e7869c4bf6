//! The embedded backend: one process, one directory, no server; shaped like etcd.
//!
//! # Theory of operation
//! Everything is in one copy-on-write B-tree file (redb). `current` holds every key as it is now; `past` holds what was
//! superseded; `log` says, by revision, which keys changed. A put moves the old version from `current` to `past`, so a
//! value is stored once. Reading at an old revision merges `current` and `past`; reading history walks `log` and finds
//! each value in one of the two.
//!
//! One thread writes. It takes all that is queued, up to a bound, applies it in order inside one write transaction, each
//! command with a revision of its own, commits with one flush, and only then answers: the flush is shared by everybody
//! who waited for it (group commit). Conditions are evaluated in that order, so each transaction sees the ones before it.
//!
//! Reads take a snapshot of what is committed, without waiting for the writer. As an answer is sent only after the
//! commit, they are linearizable.
//!
//! Watches are told the newest revision, nothing else; each fetches the changes at its own pace from the latest ones in
//! memory ([`EmbeddedOptions::recent_bytes`]) or from `log`. A slow watch costs the writer nothing.
//!
//! Leases live by the monotonic clock. Only their granted time is on disk; renewing one writes nothing. A lease never
//! ends because this process was stopped or restarted: `embedded/lease.rs` says how.
//!
//! Compaction moves the oldest readable revision forward at once, and drops the rows in small steps along with other
//! batches or when idle. Without being asked, the store keeps [`EmbeddedOptions::auto_compact_revisions`] revisions, and
//! fewer where they would take more than [`EmbeddedOptions::max_history_bytes`].
//!
//! # Failure and recovery
//! - *Crash, power cut*: the file holds exactly the batches whose flush was done, whole. Opening checks the file. Every
//!   lease starts with its full time.
//! - *Disk full*: writes are refused with [`StoreError::Full`] while [`EmbeddedOptions::min_free_bytes`] are still free,
//!   so that deletes, expiry and compaction go on. Should a write hit the end all the same, its batch is refused as a
//!   whole and the file is opened again, for which a reserve is held. Reads go on, and writes as soon as there is room.
//! - *Input/output error*: the batch is refused; reads go on where the disk lets them; writes are refused until the
//!   process is restarted, since what the disk holds is not known after a failed flush. Health says so.
//! - *Damaged file*: opening fails with [`StoreError::Io`]; nothing is repaired by guessing.
//! - *A second process*: opening fails and names the directory.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use parking_lot::{Condvar, Mutex};
use tokio::sync::{mpsc, oneshot, watch};

use crate::bounds::{Interval, check_range, check_txn, check_watch};
use crate::{
    DefragmentStep, Health, KeyRange, LeaseId, OnDefragment, RangeRequest, RangeResult, Result, Revision,
    Store, StoreError, StoreStatus, Txn, TxnOutcome, WatchStream,
};

mod apply;
mod disk;
mod follow;
mod lease;
mod read;
mod recent;
mod room;
mod tables;
mod writer;

use apply::Kept;
use disk::Disk;
use lease::Leases;
use read::Place;
use recent::Recent;
use writer::{Command, SLOW_BATCH, Shared, Tuning, Writer};

/// Most commands that wait for the writer.
const MAX_QUEUED: usize = 4096;
/// How long a command waits for a place in the queue.
const QUEUE_TIMEOUT: Duration = Duration::from_secs(10);
/// Ranges up to this limit are read where they are asked for; longer ones on a thread of their own.
const INLINE_RANGE_LIMIT: usize = 64;

/// How full the pages of a tree are on the average: what is used is estimated by it.
const FILL_PERCENT: u64 = 70;
/// What a file takes that holds nothing.
const EMPTY_BYTES: u64 = 1 << 20;

/// How the embedded store is tuned.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EmbeddedOptions {
    /// Memory for pages of the file.
    pub cache_bytes: usize,
    /// Memory for the latest changes, which watches that keep up are served from.
    pub recent_bytes: usize,
    /// How many revisions can be read and watched; older ones are dropped.
    pub auto_compact_revisions: u64,
    /// How many bytes of superseded versions are kept, with the latest 100 revisions in any case.
    pub max_history_bytes: u64,
    /// Writing is refused when the file system has less room than this.
    pub min_free_bytes: u64,
    /// Check the whole file when opening it, also after it was closed cleanly.
    pub verify_on_open: bool,
}

impl Default for EmbeddedOptions {
    fn default() -> Self {
        Self {
            cache_bytes: 16 << 20,
            recent_bytes: 2 << 20,
            auto_compact_revisions: 100_000,
            max_history_bytes: 512 << 20,
            min_free_bytes: 16 << 20,
            verify_on_open: true,
        }
    }
}

/// A store in a directory of this machine.
pub struct EmbeddedStore {
    shared: Arc<Shared>,
    place: String,
    commands: Mutex<Option<mpsc::Sender<Command>>>,
    committed: watch::Receiver<u64>,
    writer: Mutex<Option<std::thread::JoinHandle<()>>>,
}

impl EmbeddedStore {
    /// Opens the store in `dir`, which is created (mode 0700) if it does not exist. Blocks while the file is checked.
    ///
    /// # Errors
    /// [`StoreError::Io`] if the directory cannot be used, another process has the store open, or the file is damaged;
    /// [`StoreError::Full`] if there is no room for a new file.
    pub fn open(dir: &Path, options: EmbeddedOptions) -> Result<Arc<Self>> {
        let dir: PathBuf = std::path::absolute(dir).unwrap_or_else(|_| dir.to_owned());
        let (disk, meta) = Disk::open(&dir, &options)?;
        let place = disk.place();
        let shared = Arc::new(Shared {
            disk,
            leases: Mutex::new(Leases::new(Instant::now())),
            recent: Mutex::new(Recent::new(options.recent_bytes)),
            trouble: Mutex::new(None),
            batch_since: Mutex::new(None),
            ended: Mutex::new(false),
            ending: Condvar::new(),
        });
        let kept =
            Kept { revisions: options.auto_compact_revisions.max(1), bytes: options.max_history_bytes };
        let tuning = Tuning { kept };
        let (commands, queue) = mpsc::channel(MAX_QUEUED);
        let (publish, committed) = watch::channel(meta.revision);
        let writer = Writer::new(Arc::clone(&shared), tuning, meta, publish);
        writer.load_leases()?;
        let failed = |source: std::io::Error| shared.disk.io_error("starting the writer", source.into());
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().map_err(failed)?;
        let thread = std::thread::Builder::new()
            .name("store-writer".to_owned())
            .spawn(move || runtime.block_on(writer.run(queue)))
            .map_err(failed)?;
        let clock = Arc::clone(&shared);
        std::thread::Builder::new()
            .name("store-clock".to_owned())
            .spawn(move || clock.watch_the_clock())
            .map_err(failed)?;
        tracing::info!(dir = %place, revision = meta.revision, oldest = meta.oldest, "store opened");
        Ok(Arc::new(Self {
            shared,
            place,
            commands: Mutex::new(Some(commands)),
            committed,
            writer: Mutex::new(Some(thread)),
        }))
    }

    /// Finishes what is queued, closes the file and ends all watches. After that the directory can be opened again, and
    /// every call on this store fails with [`StoreError::Closed`].
    pub async fn close(&self) {
        drop(self.commands.lock().take());
        let writer = self.writer.lock().take();
        if let Some(writer) = writer {
            // It panics only on a defect, which has been reported by then.
            drop(tokio::task::spawn_blocking(move || writer.join()).await);
            self.shared.end();
        }
    }

    async fn ask<T>(&self, command: impl FnOnce(oneshot::Sender<Result<T>>) -> Command) -> Result<T> {
        let commands = self.commands.lock().clone().ok_or(StoreError::Closed)?;
        let (reply, answer) = oneshot::channel();
        commands.send_timeout(command(reply), QUEUE_TIMEOUT).await.map_err(|error| match error {
            mpsc::error::SendTimeoutError::Timeout(_) => StoreError::Timeout {
                endpoint: self.place.clone(),
                timeout_ms: u64::try_from(QUEUE_TIMEOUT.as_millis()).unwrap_or(u64::MAX),
            },
            mpsc::error::SendTimeoutError::Closed(_) => StoreError::Closed,
        })?;
        answer.await.map_err(|_| StoreError::Closed)?
    }

    fn closed(&self) -> bool {
        self.commands.lock().is_none()
    }
}

impl Drop for EmbeddedStore {
    fn drop(&mut self) {
        drop(self.commands.lock().take());
        // The file must be closed when the last handle is gone, so that it can be opened again. The writer is at
        // most one batch away from its end.
        if let Some(writer) = self.writer.lock().take() {
            drop(writer.join());
            self.shared.end();
        }
    }
}

#[async_trait]
impl Store for EmbeddedStore {
    async fn range(&self, request: RangeRequest) -> Result<RangeResult> {
        check_range(&request)?;
        let short = matches!(request.keys, KeyRange::Key(_)) || request.limit <= INLINE_RANGE_LIMIT;
        let place = if short { Place::Inline } else { Place::Thread };
        read::read(&self.shared, place, "reading keys", move |txn| read::range(txn, &request)).await
    }

    async fn txn(&self, txn: Txn) -> Result<TxnOutcome> {
        check_txn(&txn)?;
        self.ask(|reply| Command::Txn(txn, reply)).await
    }

    async fn watch(&self, keys: KeyRange, from: Option<Revision>) -> Result<WatchStream> {
        check_watch(&keys)?;
        if self.closed() {
            return Err(StoreError::Closed);
        }
        let committed = *self.committed.borrow();
        let first = match from {
            None => committed + 1,
            // Revision 0 names no state; like etcd, take it as "from now on".
            Some(Revision(0)) => committed + 1,
            Some(from) => from.0,
        };
        if first <= committed {
            read::read(&self.shared, Place::Inline, "reading", move |txn| read::is_kept(txn, first)).await?;
        }
        let interval = Interval::of(&keys);
        Ok(follow::follow(Arc::clone(&self.shared), interval, first, self.committed.clone()))
    }

    async fn revision(&self) -> Result<Revision> {
        if self.closed() {
            return Err(StoreError::Closed);
        }
        Ok(Revision(*self.committed.borrow()))
    }

    async fn lease_grant(&self, ttl: Duration) -> Result<LeaseId> {
        let ttl_seconds = crate::bounds::lease_seconds(ttl)?;
        self.ask(|reply| Command::Grant(ttl_seconds, reply)).await
    }

    async fn lease_keep_alive(&self, lease: LeaseId) -> Result<()> {
        if self.closed() {
            return Err(StoreError::Closed);
        }
        self.shared.leases.lock().renew(lease, Instant::now())
    }

    async fn lease_revoke(&self, lease: LeaseId) -> Result<()> {
        self.ask(|reply| Command::Revoke(lease, reply)).await
    }

    async fn compact(&self, revision: Revision) -> Result<()> {
        self.ask(|reply| Command::Compact(revision, reply)).await
    }

    async fn status(&self) -> Result<StoreStatus> {
        let health = self.health().await?;
        let meta =
            read::read(&self.shared, Place::Inline, "reading", |txn| Ok(Ok(tables::read_meta(txn)?))).await?;
        let filled = (meta.live_bytes + meta.history_bytes) / FILL_PERCENT * 100 + EMPTY_BYTES;
        let is_full = self.shared.disk.room.is_short();
        let mut status = StoreStatus {
            oldest: Some(Revision(meta.oldest)),
            used_bytes: filled.min(health.size_bytes),
            is_full,
            ..StoreStatus::from(health)
        };
        for member in &mut status.members {
            member.endpoint.clone_from(&self.place);
            member.used_bytes = status.used_bytes;
        }
        Ok(status)
    }

    async fn defragment(&self, on_step: OnDefragment<'_>) -> Result<()> {
        let size_mib = || Ok::<_, StoreError>(self.shared.disk.size_bytes()? >> 20);
        let before = size_mib()?;
        let message = format!("moving the pages of {} together; reads and writes wait", self.place);
        on_step(DefragmentStep { message, done: 0, total: 1 });
        self.ask(Command::Defragment).await?;
        let message = format!("{} went from {before} to {} MiB", self.place, size_mib()?);
        on_step(DefragmentStep { message, done: 1, total: 1 });
        Ok(())
    }

    async fn health(&self) -> Result<Health> {
        let revision = self.revision().await?;
        let mut warnings: Vec<String> = self.shared.trouble.lock().clone().into_iter().collect();
        if let Some(busy) = self.shared.batch_since.lock().map(|since| since.elapsed())
            && busy > SLOW_BATCH
        {
            warnings.push(format!("the disk has not finished a write for {} s", busy.as_secs()));
        }
        if self.shared.disk.room.is_short() {
            warnings.push(format!("writes are refused: {}", self.shared.disk.room.describe()));
        }
        Ok(Health {
            backend: "embedded",
            version: env!("CARGO_PKG_VERSION").to_owned(),
            size_bytes: self.shared.disk.size_bytes()?,
            revision,
            warnings,
        })
    }
}
