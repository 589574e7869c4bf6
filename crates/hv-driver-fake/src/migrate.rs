//! Moving from one fake to another: the source puts what its guest keeps into the target's state directory.
//!
//! # Theory of operation
//! The source writes what it hands over first, and only then that it has handed over; until it has, it runs, and the
//! target must not be let go. The target takes it up when it is resumed. Both sides are words in files, so that either
//! process may die at any instant, and whoever looks later finds the migration done when its time has come.

use std::path::PathBuf;
use std::sync::Arc;

use hv_driver::{
    Capability, DriverError, Exit, Incoming, IncomingRequest, InstanceConfig, MigrateRequest,
    MigrationStatus, Result, Storage,
};
use hv_types::InstanceId;
use serde::{Deserialize, Serialize};

use crate::carried::{self, Arrived, Fate, Outgoing, Progress};
use crate::record::{Files, LedgerEvent, Phase, Record, now_ms};
use crate::script::Operation;
use crate::shared::{Live, Shared};
use crate::{NAME, late, not_running, stays_here};

/// How long a transfer takes, at least, that nobody scripted, in milliseconds.
const TRANSFER_MS: u64 = 50;

/// What [`Incoming::target`] holds.
#[derive(Serialize, Deserialize)]
struct Target {
    driver: String,
    state_dir: PathBuf,
}

impl Shared {
    fn require_migration(&self, storage: Storage) -> Result<()> {
        match storage {
            Storage::Shared => self.require(Capability::Migrate, "migrate"),
            Storage::Copied => self.require(Capability::MigrateStorage, "migrate with its disks"),
        }
    }

    fn target(&self) -> Incoming {
        let dir = &self.files.dir;
        let target = Target {
            driver: NAME.to_owned(),
            state_dir: std::path::absolute(dir).unwrap_or_else(|_| dir.clone()),
        };
        Incoming { target: serde_json::json!(target) }
    }

    pub(crate) async fn prepare_incoming(
        self: &Arc<Self>,
        config: &InstanceConfig,
        request: &IncomingRequest,
    ) -> Result<Incoming> {
        self.require_migration(request.storage)?;
        let id = &config.id;
        {
            let _live = self.live.lock();
            match self.load(id, "prepare")? {
                Some(record) => {
                    let known = record.incoming.as_ref().map(|incoming| &incoming.migration);
                    if known != Some(&request.migration) {
                        let reason = "it is here already, and not for this migration; delete it first";
                        return Err(DriverError::wrong_state(id, "prepare", reason));
                    }
                    if record.phase != Phase::Creating {
                        return Ok(self.target());
                    }
                }
                None => {
                    self.check(config)?;
                    let mut record = Record::creating(config);
                    let migration = request.migration.clone();
                    record.incoming = Some(carried::Incoming { migration, waits: true });
                    self.save(&record, "prepare")?;
                }
            }
        }
        let is_late = self.gate(id, Operation::Prepare).await?;
        let _live = self.live.lock();
        let mut record = self.load(id, "prepare")?.ok_or_else(|| DriverError::NotFound(id.clone()))?;
        if record.phase == Phase::Creating {
            record.phase = Phase::Stopped(Exit::NeverStarted);
            self.note(id, LedgerEvent::Created, 0, "prepare")?;
            self.save(&record, "prepare")?;
        }
        late(id, Operation::Prepare, is_late)?;
        Ok(self.target())
    }

    pub(crate) async fn migrate(self: &Arc<Self>, id: &InstanceId, request: &MigrateRequest) -> Result<()> {
        self.require_migration(request.storage)?;
        let target: Target = serde_json::from_value(request.target.clone())
            .ok()
            .filter(|target: &Target| target.driver == NAME)
            .ok_or_else(|| DriverError::invalid(id, "the target is not one of the fake driver"))?;
        if self.is_begun(&self.settled(&mut self.live.lock(), id, "migrate")?, request)? {
            return Ok(());
        }
        let is_late = self.gate(id, Operation::Migrate).await?;
        let record = {
            let mut live = self.live.lock();
            let mut record = self.settled(&mut live, id, "migrate")?;
            if !self.is_begun(&record, request)? {
                record.outgoing = Some(self.outgoing(&mut record, request, target.state_dir)?);
                self.save(&record, "migrate")?;
            }
            record
        };
        self.watch(&record);
        late(id, Operation::Migrate, is_late)
    }

    /// Whether this migration is known already; an error if it cannot begin.
    fn is_begun(&self, record: &Record, request: &MigrateRequest) -> Result<bool> {
        let id = &record.config.id;
        if let Some(outgoing) = &record.outgoing {
            if outgoing.migration == request.migration {
                return Ok(true);
            }
            if outgoing.progress == Progress::Going {
                let reason = format!("its migration {} is under way; abort it first", outgoing.migration);
                return Err(DriverError::wrong_state(id, "migrate", reason));
            }
        }
        stays_here(record, "migrate")?;
        match record.phase {
            Phase::Running { .. } => Ok(false),
            Phase::Paused { .. } => {
                Err(DriverError::wrong_state(id, "migrate", "it is paused; resume it first"))
            }
            Phase::Creating | Phase::Stopped(_) => Err(not_running(id, "migrate")),
        }
    }

    fn outgoing(
        &self,
        record: &mut Record,
        request: &MigrateRequest,
        target_dir: PathBuf,
    ) -> Result<Outgoing> {
        let script = self.script_of(&record.config)?;
        let begun = record.migrations;
        record.migrations = begun.saturating_add(1);
        let fate = match begun {
            n if n < script.migration_breaks => Fate::Breaks,
            n if n < script.migration_hangs => Fate::Hangs,
            _ => Fate::Succeeds,
        };
        let scripted_ms = u64::try_from(script.migrate.delay.as_millis()).unwrap_or(u64::MAX);
        let spec = &record.config.spec;
        let disks = match request.storage {
            Storage::Shared => 0,
            Storage::Copied => spec.resources().disk_bytes,
        };
        let total_bytes = spec.memory_bytes.saturating_add(disks);
        let limited_ms = total_bytes.saturating_mul(1000).checked_div(request.bandwidth_limit).unwrap_or(0);
        let takes_ms = if scripted_ms == 0 { TRANSFER_MS.max(limited_ms) } else { scripted_ms };
        Ok(Outgoing {
            migration: request.migration.clone(),
            storage: request.storage,
            target_dir,
            begun_ms: now_ms(),
            takes_ms,
            fate,
            total_bytes,
            progress: Progress::Going,
        })
    }

    /// The time of its migration has come.
    pub(crate) fn migrated(&self, live: &mut Live, record: &mut Record) -> Result<()> {
        let id = record.config.id.clone();
        let Some(outgoing) = record.outgoing.as_mut() else { return Ok(()) };
        let outcome = match outgoing.fate {
            Fate::Breaks => Err("scripted: it broke down half-way".to_owned()),
            Fate::Succeeds | Fate::Hangs => hand_over(outgoing, &id, record.guest),
        };
        match outcome {
            Ok(()) => {
                outgoing.progress = Progress::HandedOver;
                record.phase = Phase::Stopped(Exit::Stopped);
                // Standing still is not running.
                self.note(&id, LedgerEvent::Ended, record.starts, "migrate")?;
                self.save(record, "migrate")?;
                live.remove(&id);
                self.tell(&id, "it was handed over");
            }
            Err(reason) => {
                outgoing.progress = Progress::Failed(reason);
                self.save(record, "migrate")?;
                self.tell(&id, "its migration failed");
            }
        }
        Ok(())
    }

    pub(crate) fn migration(&self, id: &InstanceId) -> Result<Option<MigrationStatus>> {
        let can = |capability| self.options.capabilities.contains(&capability);
        if !can(Capability::MigrateStorage) {
            self.require(Capability::Migrate, "migrate")?;
        }
        let record = self.settled(&mut self.live.lock(), id, "migrate")?;
        Ok(record.outgoing.as_ref().map(|outgoing| outgoing.status(now_ms())))
    }

    pub(crate) async fn abort_migration(self: &Arc<Self>, id: &InstanceId) -> Result<()> {
        let can = |capability| self.options.capabilities.contains(&capability);
        if !can(Capability::MigrateStorage) {
            self.require(Capability::Migrate, "migrate")?;
        }
        self.settled(&mut self.live.lock(), id, "abort the migration")?;
        let is_late = self.gate(id, Operation::Abort).await?;
        let record = {
            let mut live = self.live.lock();
            let mut record = self.settled(&mut live, id, "abort the migration")?;
            let progress = record.outgoing.as_ref().map(|outgoing| outgoing.progress.clone());
            match (progress, &mut record.outgoing) {
                (Some(Progress::Going), Some(outgoing)) => {
                    outgoing.progress = Progress::Failed("it was aborted".to_owned());
                    self.save(&record, "abort the migration")?;
                }
                (Some(Progress::HandedOver), Some(outgoing)) => {
                    outgoing.progress = Progress::Failed("it was aborted after the hand-over".to_owned());
                    let target = Files { dir: outgoing.target_dir.clone() };
                    target
                        .remove_arrived(id)
                        .map_err(|e| DriverError::failed(id, "abort the migration", e))?;
                    record.goes_on = true;
                    let script = self.script_of(&record.config)?;
                    self.started(&mut live, &mut record, &script)?;
                }
                _ => {}
            }
            record
        };
        self.watch(&record);
        late(id, Operation::Abort, is_late)
    }

    /// Lets what was handed over go on here.
    pub(crate) async fn take_up(self: &Arc<Self>, id: &InstanceId) -> Result<()> {
        self.arrived(&self.settled(&mut self.live.lock(), id, "resume")?)?;
        let is_late = self.gate(id, Operation::Resume).await?;
        let record = {
            let mut live = self.live.lock();
            let mut record = self.settled(&mut live, id, "resume")?;
            if record.waits() {
                record.guest = self.arrived(&record)?.guest;
                record.goes_on = true;
                if let Some(incoming) = &mut record.incoming {
                    incoming.waits = false;
                }
                let script = self.script_of(&record.config)?;
                self.started(&mut live, &mut record, &script)?;
                self.files.remove_arrived(id).map_err(|e| DriverError::failed(id, "resume", e))?;
            }
            record
        };
        self.watch(&record);
        late(id, Operation::Resume, is_late)
    }

    fn arrived(&self, record: &Record) -> Result<Arrived> {
        let id = &record.config.id;
        let awaited = record.incoming.as_ref().map(|incoming| &incoming.migration);
        let arrived = self.files.arrived(id).map_err(|e| DriverError::failed(id, "resume", e))?;
        arrived.filter(|arrived| Some(&arrived.migration) == awaited).ok_or_else(|| {
            DriverError::wrong_state(id, "resume", "the other node has not handed it over yet")
        })
    }
}

/// Puts what the guest keeps where the target looks for it, if the target still waits for it.
fn hand_over(outgoing: &Outgoing, id: &InstanceId, guest: carried::Guest) -> std::result::Result<(), String> {
    let target = Files { dir: outgoing.target_dir.clone() };
    let unreachable = |e: std::io::Error| format!("the target cannot be reached: {e}");
    let waits = || {
        let record = target.load(id).map_err(unreachable)?;
        let incoming = record.filter(Record::waits).and_then(|record| record.incoming);
        match incoming {
            Some(incoming) if incoming.migration == outgoing.migration => Ok(()),
            _ => Err("the target does not wait for it any more".to_owned()),
        }
    };
    waits()?;
    let arrived = Arrived { migration: outgoing.migration.clone(), guest };
    target.put_arrived(id, &arrived).map_err(unreachable)?;
    // It may have been given up in between.
    waits().inspect_err(|_| drop(target.remove_arrived(id)))
}
