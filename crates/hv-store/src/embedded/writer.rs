//! The one thread that writes: it gathers what is queued into batches, commits each batch once, and only then
//! answers and tells the watches.

use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};
use tokio::sync::{mpsc, oneshot, watch};

use super::apply::{Applier, Kept, trim};
use redb::ReadableTable;

use super::disk::{Disk, is_full};
use super::lease::{Leases, TICK};
use super::recent::{Recent, Revised};
use super::room::Admission;
use super::tables::{LEASES, Meta, Tables, TablesError, TablesResult};
use crate::{LeaseId, Op, Result, Revision, StoreError, Txn, TxnOutcome};

/// Most commands in one batch.
const MAX_BATCH: usize = 512;
/// Most bytes of values in one batch; one command more than that is a batch of its own.
const MAX_BATCH_BYTES: usize = 8 << 20;
/// Most leases that end in one batch.
const MAX_LEASES_ENDING: usize = 64;
/// How many rows of history are dropped in one step when nothing else is to do, and at least along with a batch.
const TRIM_STEP: usize = 512;
/// Along with a batch, so many times as many are dropped as it adds: what is left behind gets less, and slowly enough
/// that a batch never waits much longer for it than for itself.
const TRIM_FACTOR: usize = 2;
/// The same when the disk is nearly full.
const SHORT_TRIM_STEP: usize = 32;
/// Most commands in one batch when the disk is nearly full: each takes new pages before it gives old ones back.
const MAX_FREEING_BATCH: usize = 16;
/// How long making the file smaller waits for reads that go on, and how often it looks.
const READS_END: Duration = Duration::from_secs(5);
const READS_POLL: Duration = Duration::from_millis(5);
/// How long the writer waits before it tries again to open a file that failed.
const REOPEN_RETRY: Duration = Duration::from_secs(1);
/// How long it waits before it goes on dropping old revisions when the disk is nearly full.
const SHORT_OF_ROOM_PAUSE: Duration = Duration::from_secs(1);
/// How long it sleeps when nothing is due. Any command wakes it.
const IDLE: Duration = Duration::from_secs(3600);
/// How long a batch may take before health warns.
pub(super) const SLOW_BATCH: Duration = Duration::from_secs(2);

/// What callers ask of the writer.
pub(super) enum Command {
    Txn(Txn, oneshot::Sender<Result<TxnOutcome>>),
    Grant(u64, oneshot::Sender<Result<LeaseId>>),
    Revoke(LeaseId, oneshot::Sender<Result<()>>),
    Compact(Revision, oneshot::Sender<Result<()>>),
    Defragment(oneshot::Sender<Result<()>>),
}

impl Command {
    fn size_bytes(&self) -> usize {
        let Self::Txn(txn, _) = self else { return 0 };
        txn.then
            .iter()
            .map(|op| match op {
                Op::Put { key, value, .. } => key.len() + value.len(),
                Op::Delete(_) => 0,
            })
            .sum()
    }

    /// Whether it is among what must work even when the disk is nearly full.
    fn frees_room(&self) -> bool {
        match self {
            Self::Txn(txn, _) => txn.then.iter().all(|op| matches!(op, Op::Delete(_))),
            Self::Revoke(..) | Self::Compact(..) | Self::Defragment(..) => true,
            Self::Grant(..) => false,
        }
    }

    fn refuse(self, error: StoreError) {
        // A caller that went away does not miss its answer.
        match self {
            Self::Txn(_, reply) => drop(reply.send(Err(error))),
            Self::Grant(_, reply) => drop(reply.send(Err(error))),
            Self::Revoke(_, reply) | Self::Compact(_, reply) | Self::Defragment(reply) => {
                drop(reply.send(Err(error)));
            }
        }
    }
}

/// An answer that waits for the commit.
enum Answer {
    Txn(oneshot::Sender<Result<TxnOutcome>>, Result<TxnOutcome>),
    Grant(oneshot::Sender<Result<LeaseId>>, LeaseId),
    Done(oneshot::Sender<Result<()>>, Result<()>),
}

impl Answer {
    fn send(self) {
        match self {
            Self::Txn(reply, outcome) => drop(reply.send(outcome)),
            Self::Grant(reply, lease) => drop(reply.send(Ok(lease))),
            Self::Done(reply, outcome) => drop(reply.send(outcome)),
        }
    }

    fn fail(self, error: StoreError) {
        match self {
            Self::Txn(reply, _) => drop(reply.send(Err(error))),
            Self::Grant(reply, _) => drop(reply.send(Err(error))),
            Self::Done(reply, _) => drop(reply.send(Err(error))),
        }
    }
}

/// What the writer, the reads and the watches share.
pub(super) struct Shared {
    pub(super) disk: Disk,
    pub(super) leases: Mutex<Leases>,
    pub(super) recent: Mutex<Recent>,
    /// What an operator should know about writing, and since when the batch that runs now does.
    pub(super) trouble: Mutex<Option<String>>,
    pub(super) batch_since: Mutex<Option<Instant>>,
    /// Whether the writer has ended, for the thread that looks at the clock.
    pub(super) ended: Mutex<bool>,
    pub(super) ending: Condvar,
}

impl Shared {
    /// Looks at the clock until the writer has ended: see [`super::lease`].
    pub(super) fn watch_the_clock(&self) {
        let mut ended = self.ended.lock();
        while !*ended {
            self.leases.lock().tick(Instant::now());
            self.ending.wait_for(&mut ended, TICK);
        }
    }

    /// Ends the thread that looks at the clock.
    pub(super) fn end(&self) {
        *self.ended.lock() = true;
        self.ending.notify_all();
    }
}

/// How the writer is tuned; see [`super::EmbeddedOptions`].
#[derive(Clone, Copy)]
pub(super) struct Tuning {
    pub(super) kept: Kept,
}

pub(super) struct Writer {
    shared: Arc<Shared>,
    tuning: Tuning,
    meta: Meta,
    /// Whether old revisions may still be on disk.
    trimming: bool,
    /// The file must be opened again before anything else.
    failed: bool,
    /// Writing is over for this process: a flush failed, so what the disk holds is not known.
    poisoned: bool,
    committed: watch::Sender<u64>,
}

/// What a batch did, before anyone is told.
struct Applied {
    meta: Meta,
    revised: Vec<Arc<Revised>>,
    answers: Vec<Answer>,
    granted: Vec<(LeaseId, Duration)>,
    ended: Vec<LeaseId>,
    trimming: bool,
}

impl Writer {
    pub(super) fn new(
        shared: Arc<Shared>,
        tuning: Tuning,
        meta: Meta,
        committed: watch::Sender<u64>,
    ) -> Self {
        Self { shared, tuning, meta, trimming: true, failed: false, poisoned: false, committed }
    }

    /// Starts the clock of every lease on disk that has none. Each gets its full time, as nobody could renew it
    /// while the store was closed.
    pub(super) fn load_leases(&self) -> Result<()> {
        let shared = &self.shared;
        let load = || -> TablesResult<()> {
            let txn = shared.disk.read()?;
            let table = txn.open_table(LEASES)?;
            let (now, mut leases) = (Instant::now(), shared.leases.lock());
            for row in table.iter()? {
                let (id, ttl_seconds) = row?;
                let (id, ttl) = (LeaseId(id.value()), Duration::from_secs(ttl_seconds.value()));
                if !leases.contains(id) {
                    leases.insert(id, ttl, now);
                }
            }
            Ok(())
        };
        load().map_err(|error| shared.disk.error("reading leases", error))
    }

    /// Writes until every sender of `commands` is gone, then closes the file.
    pub(super) async fn run(mut self, mut commands: mpsc::Receiver<Command>) {
        let mut queued: Vec<Command> = Vec::with_capacity(MAX_BATCH);
        loop {
            if queued.is_empty() {
                // Once the leftovers of a batch that was cut by its size are done, wait for more.
                let wake = self.next_wake();
                let received =
                    tokio::time::timeout_at(wake.into(), commands.recv_many(&mut queued, MAX_BATCH));
                if received.await == Ok(0) {
                    break;
                }
            }
            let defragment: Vec<_> =
                queued.extract_if(.., |command| matches!(command, Command::Defragment(_))).collect();
            if !defragment.is_empty() {
                self.defragment_for(defragment).await;
            }
            let most = if self.shared.disk.room.is_short() { MAX_FREEING_BATCH } else { MAX_BATCH };
            let rest = queued.split_off(batch_len(&queued, most));
            let batch = std::mem::replace(&mut queued, rest);
            self.step(batch);
        }
        self.shared.disk.close();
    }

    /// Makes the file smaller, once for everybody who asked.
    async fn defragment_for(&mut self, asked: Vec<Command>) {
        let mut failed = None;
        if self.failed || self.poisoned {
            failed = Some(self.refusal());
        } else if let Err(error) = self.defragment().await {
            let place = self.shared.disk.place();
            tracing::error!(dir = %place, %error, "making the file smaller failed");
            failed = Some(self.shared.disk.io_error("making the file smaller", error.to_string().into()));
            // As after any failed write, what is on disk is found out by opening the file again.
            self.failed = true;
            self.recover();
        }
        for command in asked {
            let Command::Defragment(reply) = command else { continue };
            let outcome = match &failed {
                None => Ok(()),
                Some(error) => {
                    Err(self.shared.disk.io_error("making the file smaller", error.to_string().into()))
                }
            };
            drop(reply.send(outcome));
        }
    }

    /// Takes the file away from reads, waits for those that go on, and lets the database move its pages together.
    async fn defragment(&mut self) -> std::result::Result<(), redb::CompactionError> {
        let Some(mut database) = self.shared.disk.begin_compaction() else { return Ok(()) };
        let deadline = Instant::now() + READS_END;
        let outcome = loop {
            match database.compact() {
                Ok(_) => break Ok(()),
                Err(redb::CompactionError::TransactionInProgress) if Instant::now() < deadline => {
                    tokio::time::sleep(READS_POLL).await;
                }
                Err(redb::CompactionError::TransactionInProgress) => {
                    tracing::warn!("the file was not made smaller: a read lasted longer than {READS_END:?}");
                    break Ok(());
                }
                Err(error) => break Err(error),
            }
        };
        let kept = outcome.is_ok().then_some(database);
        self.shared.disk.end_compaction(kept);
        outcome
    }

    /// When there is something to do even if nobody asks.
    fn next_wake(&self) -> Instant {
        let now = Instant::now();
        if self.failed {
            return now + REOPEN_RETRY;
        }
        if self.poisoned {
            return now + IDLE;
        }
        if self.trimming {
            return if self.shared.disk.room.is_short() { now + SHORT_OF_ROOM_PAUSE } else { now };
        }
        self.shared.leases.lock().next_deadline().unwrap_or(now + IDLE)
    }

    fn step(&mut self, mut batch: Vec<Command>) {
        if self.failed && !self.recover() || self.poisoned {
            for command in batch {
                command.refuse(self.refusal());
            }
            return;
        }
        let due = self.shared.leases.lock().take_due(Instant::now(), MAX_LEASES_ENDING);
        let admission = self.refuse_without_room(&mut batch);
        if admission == Admission::Nothing {
            return;
        }
        if batch.is_empty() && due.is_empty() && !self.trimming {
            return;
        }
        *self.shared.batch_since.lock() = Some(Instant::now());
        self.write(batch, due);
        *self.shared.batch_since.lock() = None;
    }

    fn refusal(&self) -> StoreError {
        if !self.poisoned && self.shared.disk.room.is_short() {
            return StoreError::Full(self.shared.disk.room.describe());
        }
        let why = self.shared.trouble.lock().clone().unwrap_or_default();
        self.shared.disk.io_error("writing", why.into())
    }

    /// Refuses early what would fill the disk: a write that fails halfway costs a reopening.
    fn refuse_without_room(&self, batch: &mut Vec<Command>) -> Admission {
        let needed_bytes: usize = batch.iter().map(Command::size_bytes).sum();
        let admission = self.shared.disk.room.admits(needed_bytes as u64);
        let refused = |command: &mut Command| match admission {
            Admission::All => false,
            Admission::Freeing => !command.frees_room(),
            Admission::Nothing => true,
        };
        for command in batch.extract_if(.., refused) {
            command.refuse(StoreError::Full(self.shared.disk.room.describe()));
        }
        admission
    }

    fn write(&mut self, batch: Vec<Command>, due: Vec<LeaseId>) {
        let mut answers = Vec::with_capacity(batch.len());
        match self.apply(batch, due, &mut answers) {
            Ok(applied) => self.publish(Applied { answers, ..applied }),
            Err(error) => self.fail(error, answers),
        }
    }

    /// Applies all in one write transaction and commits it. Answers go to `answers`, which is also where the callers
    /// are found if this fails.
    fn apply(
        &mut self,
        batch: Vec<Command>,
        due: Vec<LeaseId>,
        answers: &mut Vec<Answer>,
    ) -> TablesResult<Applied> {
        let (mut granted, mut ended) = (Vec::new(), Vec::new());
        let txn = match self.shared.disk.write() {
            Ok(txn) => txn,
            Err(error) => {
                answers.extend(batch.into_iter().map(Answer::unanswered));
                return Err(error);
            }
        };
        let short = self.shared.disk.room.is_short();
        let mut commands = batch.into_iter();
        let applied = (|| {
            let mut tables = Tables::open(&txn)?;
            let mut applier = Applier::new(&mut tables, self.meta);
            for lease in due {
                applier.end_lease(lease)?;
                ended.push(lease);
            }
            for command in commands.by_ref() {
                apply_command(&mut applier, command, answers, &mut granted, &mut ended)?;
            }
            let (mut meta, revised, changed) = (applier.meta, applier.revised, applier.changed);
            let step = if short { SHORT_TRIM_STEP } else { TRIM_STEP.max(TRIM_FACTOR * changed) };
            let trimmed = trim(&mut tables, &mut meta, self.tuning.kept, step)?;
            if meta != self.meta {
                tables.set_meta(meta)?;
            }
            Ok((meta, revised, trimmed))
        })();
        let (meta, revised, trimmed) = match applied {
            Ok(applied) => applied,
            Err(error) => {
                answers.extend(commands.map(Answer::unanswered));
                return Err(error);
            }
        };
        if meta != self.meta || trimmed.rows > 0 || !ended.is_empty() {
            txn.commit()?;
        } else {
            // Nothing but refusals: there is nothing to flush.
            txn.abort()?;
        }
        Ok(Applied { meta, revised, answers: Vec::new(), granted, ended, trimming: trimmed.more })
    }

    fn publish(&mut self, applied: Applied) {
        self.trimming = applied.trimming;
        let moved = applied.meta.revision != self.meta.revision;
        self.meta = applied.meta;
        {
            let (now, mut leases) = (Instant::now(), self.shared.leases.lock());
            for (lease, ttl) in applied.granted {
                leases.insert(lease, ttl, now);
            }
            for lease in applied.ended {
                leases.remove(lease);
            }
        }
        if moved {
            let mut recent = self.shared.recent.lock();
            for revised in applied.revised {
                recent.push(revised);
            }
            drop(recent);
            self.committed.send_replace(self.meta.revision);
        }
        for answer in applied.answers {
            answer.send();
        }
    }

    fn fail(&mut self, error: TablesError, answers: Vec<Answer>) {
        let full = is_full(&error);
        let shared = Arc::clone(&self.shared);
        let remedy = if full { "make room" } else { "check the disk, then restart" };
        let why = format!("the last write failed ({error}); {remedy}");
        tracing::error!(dir = %shared.disk.place(), %error, "writing failed");
        *shared.trouble.lock() = Some(why.clone());
        self.failed = true;
        // After a failed flush the kernel may have dropped what it could not write while its cache still shows it:
        // only a lack of room is known to leave the file as it was.
        self.poisoned = !full;
        if full {
            shared.disk.room.release();
        }
        self.recover();
        let mut cause = Some(error);
        for answer in answers {
            answer.fail(match cause.take() {
                Some(first) => shared.disk.error("writing", first),
                None if full => StoreError::Full(why.clone()),
                None => shared.disk.io_error("writing", why.clone().into()),
            });
        }
    }

    /// Opens the file again after a failed write. Reads need that too: the database refuses all once a write failed.
    fn recover(&mut self) -> bool {
        let meta = match self.shared.disk.reopen() {
            Ok(meta) => meta,
            Err(error) => {
                *self.shared.trouble.lock() = Some(format!("opening the file again failed: {error}"));
                return false;
            }
        };
        self.failed = false;
        self.trimming = true;
        if let Err(error) = self.load_leases() {
            tracing::warn!(%error, "leases of a batch that failed may stay until the store is opened again");
        }
        if !self.poisoned {
            *self.shared.trouble.lock() = None;
        }
        // A commit that reported an error may still have reached the disk.
        let moved = meta.revision != self.meta.revision;
        self.meta = meta;
        if moved {
            self.committed.send_replace(meta.revision);
        }
        true
    }
}

impl Answer {
    /// The answer to a command that was not reached.
    fn unanswered(command: Command) -> Self {
        match command {
            Command::Txn(_, reply) => Self::Txn(reply, Err(StoreError::Closed)),
            Command::Grant(_, reply) => Self::Grant(reply, LeaseId(0)),
            Command::Revoke(_, reply) | Command::Compact(_, reply) | Command::Defragment(reply) => {
                Self::Done(reply, Err(StoreError::Closed))
            }
        }
    }
}

fn apply_command(
    applier: &mut Applier<'_, '_>,
    command: Command,
    answers: &mut Vec<Answer>,
    granted: &mut Vec<(LeaseId, Duration)>,
    ended: &mut Vec<LeaseId>,
) -> TablesResult<()> {
    // The reply is queued first, so that it is found if applying fails.
    match command {
        Command::Txn(txn, reply) => {
            answers.push(Answer::Txn(reply, Err(StoreError::Closed)));
            let outcome = applier.txn(txn)?;
            if let Some(Answer::Txn(_, slot)) = answers.last_mut() {
                *slot = outcome;
            }
        }
        Command::Grant(ttl_seconds, reply) => {
            answers.push(Answer::Grant(reply, LeaseId(0)));
            let lease = applier.grant(ttl_seconds)?;
            granted.push((lease, Duration::from_secs(ttl_seconds)));
            if let Some(Answer::Grant(_, slot)) = answers.last_mut() {
                *slot = lease;
            }
        }
        Command::Revoke(lease, reply) => {
            answers.push(Answer::Done(reply, Ok(())));
            if applier.end_lease(lease)? {
                ended.push(lease);
            }
        }
        Command::Compact(revision, reply) => {
            let outcome = if revision.0 > applier.meta.revision {
                let now = applier.meta.revision;
                let why = format!("revision {revision} is in the future; the store is at {now}");
                Err(StoreError::InvalidRequest(why))
            } else {
                applier.meta.oldest = applier.meta.oldest.max(revision.0);
                Ok(())
            };
            answers.push(Answer::Done(reply, outcome));
        }
        // Taken out of every batch before it is applied.
        Command::Defragment(reply) => answers.push(Answer::Done(reply, Ok(()))),
    }
    Ok(())
}

/// How many of the queued commands one batch takes, `most` at most.
fn batch_len(queued: &[Command], most: usize) -> usize {
    let mut total_bytes = 0;
    let fits = queued.iter().take_while(|command| {
        total_bytes += command.size_bytes();
        total_bytes <= MAX_BATCH_BYTES
    });
    fits.count().max(1).min(most).min(queued.len())
}
