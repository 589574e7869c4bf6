//! Handing a machine over to another node.
//!
//! # Theory of operation
//! libvirt's third protocol (`virDomainMigrate3` without its client): *begin* at the source, *prepare* at the target,
//! *perform* at the source, *finish* at the target, *confirm* at the source. We are the client, and never confirm: after
//! finish the machine stands still on both sides, here with everything it had, and whoever decides for both either
//! deletes it here or gives up the target and aborts, which lets it go on. libvirt's own peer-to-peer mode would confirm
//! by itself, and nothing could bring it back.
//!
//! # Failure and recovery
//! What was asked for is on disk before anything happens. A new agent looks how far libvirtd has come and goes on
//! there: everything sent, then finish; nothing under way, then from the beginning.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use hv_driver::{DriverError, MigrateRequest, MigrationPhase, MigrationStatus, Storage};
use serde::{Deserialize, Serialize};
use tokio::io::BufReader;
use tokio::net::TcpStream;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::daemon::Daemon;
use crate::files::{MIGRATION, StoredMigration, StoredPhase};
use crate::incoming::{Answer, Request, Target, flags, read_line, write_line};
use crate::machine::{Done, Machine, Seen};
use crate::problem::{Outcome, Problem};
use crate::protocol::{flag, state};
use crate::xdr::Value;
use crate::xml::Element;

/// How long the target's relay may take to accept a connection.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// How long the target may take to prepare or to finish.
const ANSWER_TIMEOUT: Duration = Duration::from_mins(2);
/// How long memory and disks may take.
const PERFORM_TIMEOUT: Duration = Duration::from_hours(24);
/// How often a transfer that an earlier agent began is looked at.
const LOOK_INTERVAL: Duration = Duration::from_millis(100);
/// How long an aborted transfer may take to be over.
const ABORT_TIMEOUT: Duration = Duration::from_mins(1);
/// How often it is aborted meanwhile: there is a moment in which libvirtd has nothing to abort yet.
const ABORT_INTERVAL: Duration = Duration::from_millis(200);
/// Longest downtime that libvirt takes, in milliseconds.
const MAX_DOWNTIME_MS: u64 = 2_000_000;

/// What a transfer needs to be taken up again.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Wanted {
    request: MigrateRequest,
}

/// A transfer that is under way.
#[derive(Clone)]
pub(crate) struct Sending {
    cancelled: CancellationToken,
    over: watch::Receiver<bool>,
}

impl Sending {
    pub(crate) fn is_over(&self) -> bool {
        *self.over.borrow()
    }

    pub(crate) fn cancel(&self) {
        self.cancelled.cancel();
    }

    pub(crate) async fn over_within(&self, timeout: Duration) -> bool {
        let mut over = self.over.clone();
        matches!(tokio::time::timeout(timeout, over.wait_for(|over| *over)).await, Ok(Ok(_)))
    }
}

/// The target's relay, connected.
struct Peer {
    stream: BufReader<TcpStream>,
}

impl Peer {
    async fn connect(target: &Target) -> Outcome<Self> {
        let unreachable = |reason: String| Problem::Migration(format!("the target {} {reason}", target.address));
        let connected = tokio::time::timeout(CONNECT_TIMEOUT, TcpStream::connect(target.address)).await;
        let stream = connected
            .map_err(|_| unreachable("does not answer".to_owned()))?
            .map_err(|e| unreachable(format!("cannot be reached: {e}")))?;
        Ok(Self { stream: BufReader::new(stream) })
    }

    async fn ask(&mut self, request: &Request) -> Outcome<Answer> {
        let asking = async {
            write_line(self.stream.get_mut(), request).await?;
            read_line(&mut self.stream).await
        };
        let answered = tokio::time::timeout(ANSWER_TIMEOUT, asking).await;
        let broken = |e: std::io::Error| Problem::Migration(format!("the target has gone: {e}"));
        match answered.map_err(|_| broken(std::io::ErrorKind::TimedOut.into()))?.map_err(broken)? {
            Answer::Refused(reason) => Err(Problem::Migration(format!("the target refuses: {reason}"))),
            other => Ok(other),
        }
    }
}

impl Machine {
    pub(crate) async fn migrate(self: &Arc<Self>, request: &MigrateRequest) -> Done<()> {
        let _change = self.change.lock().await;
        let failed = self.failed("migrate");
        if let Some(note) = self.note().map_err(&failed)?
            && note.migration == request.migration
        {
            return Ok(());
        }
        match self.look().await.map_err(&failed)? {
            Seen::Running => {}
            Seen::HandedOver => return Err(self.handed_over("migrate")),
            Seen::Paused | Seen::Down(_) => {
                return Err(DriverError::wrong_state(&self.id, "migrate", "only what runs is handed over; start it"));
            }
        }
        let target: Target = serde_json::from_value(request.target.clone()).map_err(|e| {
            DriverError::invalid(&self.id, format!("target: this is no answer of a libvirt driver: {e}"))
        })?;
        if target.version != Target::VERSION {
            let reason = format!("target: its agent speaks version {} of this; use agents of one version", target.version);
            return Err(DriverError::invalid(&self.id, reason));
        }
        let wanted = serde_json::to_value(Wanted { request: request.clone() }).unwrap_or_default();
        let note = StoredMigration::new(&request.migration, StoredPhase::Sending, request.storage, wanted);
        self.dir.write(MIGRATION, &note).map_err(&failed)?;
        self.send(note);
        Ok(())
    }

    /// Sends in a task of its own, from wherever libvirtd is.
    pub(crate) fn send(self: &Arc<Self>, note: StoredMigration) {
        let cancelled = CancellationToken::new();
        let (end, over) = watch::channel(false);
        *self.sending.lock() = Some(Sending { cancelled: cancelled.clone(), over });
        let machine = self.clone();
        tokio::spawn(async move {
            let driver_ended = machine.shared.link.cancelled.clone();
            tokio::select! {
                () = driver_ended.cancelled() => return,
                () = machine.work(note, &cancelled) => {}
            }
            let _ = end.send(true);
        });
    }

    async fn work(&self, note: StoredMigration, cancelled: &CancellationToken) {
        let outcome = match serde_json::from_value::<Wanted>(note.target.clone()) {
            Ok(wanted) => self.transfer(&wanted.request, cancelled).await,
            Err(error) => Err(Problem::Damaged(self.dir.file(MIGRATION), error)),
        };
        let note = match outcome {
            Ok((total_bytes, downtime_ms)) => {
                StoredMigration { phase: StoredPhase::HandedOver, total_bytes, downtime_ms, ..note }
            }
            Err(problem) => {
                tracing::warn!(instance = %self.id, %problem, "a migration failed; it goes on here");
                StoredMigration { phase: StoredPhase::Failed(problem.to_string()), ..note }
            }
        };
        if let Err(error) = self.dir.write(MIGRATION, &note) {
            tracing::error!(instance = %self.id, %error, "how a migration ended cannot be noted");
        }
    }

    /// Hands over, or sees to it that it goes on here. Returns bytes and milliseconds of standing still.
    async fn transfer(&self, request: &MigrateRequest, cancelled: &CancellationToken) -> Outcome<(u64, Option<u64>)> {
        let target: Target = serde_json::from_value(request.target.clone())
            .map_err(|e| Problem::Damaged(self.dir.file(MIGRATION), e))?;
        // A connection of its own: a transfer occupies it, and what it began ends with it.
        let daemon = self.shared.link.another().await?;
        let domain = self.stored().domain();
        let outcome = async {
            let mut peer;
            let cookie = if self.settled(&daemon).await? {
                // An earlier agent began, and everything was sent.
                peer = Peer::connect(&target).await?;
                Vec::new()
            } else {
                peer = Peer::connect(&target).await?;
                self.send_all(&daemon, &mut peer, &target, request, cancelled).await?
            };
            let numbers = self.numbers(&daemon).await;
            if cancelled.is_cancelled() {
                return Err(Problem::Migration("it was aborted".to_owned()));
            }
            let flags = flags(request.storage, request.auto_converge);
            peer.ask(&Request::Finish { token: target.token.clone(), cookie: BASE64.encode(cookie), flags }).await?;
            Ok(numbers)
        }
        .await;
        if outcome.is_err() {
            let flags = flags(request.storage, request.auto_converge);
            // Refused where nothing had begun.
            let cancelled = daemon.migrate_cancel(&domain, flags).await;
            tracing::debug!(instance = %self.id, ?cancelled, "gave a migration up");
            let state = daemon.state(&domain).await.ok().flatten();
            if state == Some((state::PAUSED, state::PAUSED_MIGRATION)) {
                daemon.resume(&domain).await?;
            }
        }
        outcome
    }

    /// Waits for a transfer that an earlier agent began. `true`: everything was sent.
    async fn settled(&self, daemon: &Daemon) -> Outcome<bool> {
        let domain = self.stored().domain();
        loop {
            let state = daemon.state(&domain).await?;
            if state == Some((state::PAUSED, state::PAUSED_MIGRATION)) {
                let (job, params) = daemon.job(&domain).await?;
                // A job that has nothing left waits for its client, which is gone.
                if job == 0 || params.count("data_remaining") == Some(0) {
                    return Ok(true);
                }
            } else if matches!(daemon.job(&domain).await, Ok((0, _)) | Err(Problem::Refused { .. })) {
                return Ok(false);
            }
            tokio::time::sleep(LOOK_INTERVAL).await;
        }
    }

    /// Begin, prepare and perform. The cookie is for finish.
    async fn send_all(
        &self,
        daemon: &Daemon,
        peer: &mut Peer,
        target: &Target,
        request: &MigrateRequest,
        cancelled: &CancellationToken,
    ) -> Outcome<Vec<u8>> {
        let domain = self.stored().domain();
        let flags = flags(request.storage, request.auto_converge);
        let mut description = daemon.domain_xml(&domain, flag::XML_MIGRATABLE).await?;
        self.relocate(&mut description, target, request.storage);
        let description = [("destination_xml", Value::Text(description.to_xml()))];
        let (cookie, xml) = daemon.migrate_begin(&domain, &description, flags).await?;
        let prepare = Request::Prepare { token: target.token.clone(), cookie: BASE64.encode(cookie), xml, flags };
        let Answer::Prepared { cookie, uri } = peer.ask(&prepare).await? else {
            return Err(Problem::Migration("the target answers something else".to_owned()));
        };
        let cookie = BASE64.decode(cookie).map_err(|e| Problem::Garbled("the target's cookie", e.into()))?;
        let downtime_ms = u64::try_from(request.downtime_limit.as_millis()).unwrap_or(u64::MAX);
        // A libvirt that takes it only while it sends keeps its own limit.
        if let Err(problem) = daemon.set_max_downtime(&domain, downtime_ms.clamp(1, MAX_DOWNTIME_MS)).await {
            tracing::debug!(instance = %self.id, %problem, "the downtime limit stays libvirt's own");
        }
        if cancelled.is_cancelled() {
            return Err(Problem::Migration("it was aborted".to_owned()));
        }
        let mut params = vec![("migrate_uri", Value::Text(uri))];
        if request.bandwidth_limit > 0 {
            params.push(("bandwidth", Value::Ulong(request.bandwidth_limit.div_ceil(1 << 20))));
        }
        daemon.migrate_perform(&domain, &params, &cookie, flags, PERFORM_TIMEOUT).await
    }

    /// Makes a description one of the target: what lies in our directories lies in its there.
    fn relocate(&self, description: &mut Element, target: &Target, storage: Storage) {
        let stored = self.stored();
        if storage == Storage::Copied
            && let Some(devices) = description.children.iter_mut().find(|child| child.name == "devices")
        {
            for disk in devices.children.iter_mut().filter(|child| child.name == "disk") {
                // They arrive whole.
                disk.children.retain(|child| child.name != "backingStore");
            }
        }
        let mut moves = Vec::new();
        if let Some(disks) = &stored.disk_dir {
            moves.push((disks.clone(), target.disk_dir.clone()));
        }
        moves.push((self.dir.path.clone(), target.dir.clone()));
        description.rewrite(&mut |value| {
            for (from, to) in &moves {
                if let Ok(rest) = Path::new(value.as_str()).strip_prefix(from) {
                    *value = to.join(rest).display().to_string();
                    return;
                }
            }
        });
        let files = [
            ("devices/emulator", Some(&target.emulator)),
            ("os/kernel", target.kernel.as_ref()),
            ("os/initrd", target.initrd.as_ref()),
        ];
        for (path, file) in files {
            if let (Some(element), Some(file)) = (description.at_mut(path), file) {
                element.text = file.display().to_string();
            }
        }
    }

    async fn numbers(&self, daemon: &Daemon) -> (u64, Option<u64>) {
        match daemon.job(&self.stored().domain()).await {
            Ok((_, params)) => (params.count("data_processed").unwrap_or(0), params.count("downtime")),
            Err(_) => (0, None),
        }
    }

    /// How far the last migration is.
    pub(crate) async fn migration_status(&self) -> Done<Option<MigrationStatus>> {
        let failed = self.failed("migrate");
        let Some(note) = self.note().map_err(&failed)? else { return Ok(None) };
        let status = |phase, done_bytes, total_bytes| MigrationStatus {
            migration: note.migration.clone(),
            phase,
            done_bytes,
            total_bytes,
            downtime: note.downtime_ms.map(Duration::from_millis),
        };
        Ok(match &note.phase {
            StoredPhase::Awaited | StoredPhase::Arrived | StoredPhase::GivenUp => None,
            StoredPhase::HandedOver => Some(status(MigrationPhase::HandedOver, note.total_bytes, note.total_bytes)),
            StoredPhase::Failed(reason) => {
                Some(status(MigrationPhase::Failed { reason: reason.clone() }, 0, note.total_bytes))
            }
            StoredPhase::Sending => {
                let job = match self.daemon().await {
                    Ok(daemon) => daemon.job(&self.stored().domain()).await.ok(),
                    Err(_) => None,
                };
                let params = job.map(|(_, params)| params).unwrap_or_default();
                let count = |name| params.count(name).unwrap_or(0);
                let is_memory = count("memory_processed") > 0;
                let phase = match note.storage {
                    Storage::Copied if !is_memory => MigrationPhase::Disks,
                    _ => MigrationPhase::Memory,
                };
                let done = count("data_processed");
                Some(status(phase, done, count("data_total").max(done)))
            }
        })
    }

    pub(crate) async fn abort_migration(&self) -> Done<()> {
        let _change = self.change.lock().await;
        let failed = self.failed("abort a migration of");
        let sending = self.sending.lock().clone();
        if let Some(sending) = sending.filter(|sending| !sending.is_over()) {
            sending.cancel();
            let begun = tokio::time::Instant::now();
            loop {
                let daemon = self.daemon().await.map_err(&failed)?;
                // There may be nothing to abort yet, or no more.
                let aborted = daemon.abort_job(&self.stored().domain()).await;
                tracing::debug!(instance = %self.id, ?aborted, "abort");
                if sending.over_within(ABORT_INTERVAL).await {
                    break;
                }
                if begun.elapsed() > ABORT_TIMEOUT {
                    let timeout_ms = u64::try_from(ABORT_TIMEOUT.as_millis()).unwrap_or(u64::MAX);
                    let (id, operation) = (self.id.clone(), "abort a migration of");
                    return Err(DriverError::Timeout { id, operation, timeout_ms });
                }
            }
        }
        match self.note().map_err(&failed)? {
            Some(note) if note.phase == StoredPhase::HandedOver => self.bring_back(note).await.map_err(failed),
            _ => Ok(()),
        }
    }

    /// Lets it go on here after all.
    async fn bring_back(&self, note: StoredMigration) -> Outcome<()> {
        let reason = "it was aborted after the hand-over".to_owned();
        let storage = note.storage;
        // First, because what stands still and was not handed over may be let go, and nothing else may.
        self.dir.write(MIGRATION, &StoredMigration { phase: StoredPhase::Failed(reason), ..note })?;
        let daemon = self.daemon().await?;
        let domain = self.stored().domain();
        // libvirtd may still wait for the last step of its protocol.
        let confirmed = daemon.migrate_cancel(&domain, flags(storage, false)).await;
        tracing::debug!(instance = %self.id, ?confirmed, "brought back");
        match daemon.state(&domain).await? {
            Some((state::PAUSED, _)) => daemon.resume(&domain).await,
            _ => Ok(()),
        }
    }
}
