//! Snapshots: what an instance's guest kept at a moment.

use std::sync::Arc;
use std::time::{Duration, UNIX_EPOCH};

use hv_driver::{
    Capability, DriverError, Exit, Handle, InstanceConfig, Result, SnapshotInfo, SnapshotRequest,
};
use hv_types::InstanceId;

use crate::carried::{Guest, Snapshot};
use crate::record::{LedgerEvent, Phase, Record, now_ms};
use crate::script::Operation;
use crate::shared::Shared;
use crate::{half_created, late, stays_here};

/// The longest name of a snapshot.
const MAX_NAME: usize = 63;

fn check_name(id: &InstanceId, name: &str) -> Result<()> {
    let is_allowed = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
    if name.is_empty() || name.len() > MAX_NAME || !name.chars().all(is_allowed) {
        let reason = "the name of a snapshot must be 1 to 63 lower-case letters, digits and `-`";
        return Err(DriverError::invalid(id, reason));
    }
    Ok(())
}

fn find<'a>(record: &'a Record, name: &str, operation: &'static str) -> Result<&'a Snapshot> {
    let found = record.snapshots.iter().find(|snapshot| snapshot.info.name == name);
    found.ok_or_else(|| {
        let reason = format!("it has no snapshot `{name}`; list its snapshots");
        DriverError::wrong_state(&record.config.id, operation, reason)
    })
}

impl Shared {
    fn whole(&self, id: &InstanceId, operation: &'static str) -> Result<Record> {
        let record = self.settled(&mut self.live.lock(), id, operation)?;
        if record.phase == Phase::Creating {
            return Err(half_created(id, operation));
        }
        Ok(record)
    }

    pub(crate) async fn snapshot(
        self: &Arc<Self>,
        id: &InstanceId,
        request: &SnapshotRequest,
    ) -> Result<SnapshotInfo> {
        self.require(Capability::Snapshot, "snapshot")?;
        if request.memory {
            self.require(Capability::SnapshotMemory, "snapshot memory")?;
        }
        check_name(id, &request.name)?;
        let record = self.whole(id, "snapshot")?;
        stays_here(&record, "snapshot")?;
        if let Ok(there) = find(&record, &request.name, "snapshot") {
            return Ok(there.info.clone());
        }
        let is_late = self.gate(id, Operation::Snapshot).await?;
        let mut live = self.live.lock();
        let mut record = self.settled(&mut live, id, "snapshot")?;
        stays_here(&record, "snapshot")?;
        if let Ok(there) = find(&record, &request.name, "snapshot") {
            return Ok(there.info.clone());
        }
        let memory = request.memory && record.phase.runs();
        let info = SnapshotInfo {
            name: request.name.clone(),
            created_at: UNIX_EPOCH + Duration::from_millis(now_ms()),
            memory,
            size_bytes: if memory { record.config.spec.memory_bytes } else { 1 << 20 },
        };
        let paused = matches!(record.phase, Phase::Paused { .. });
        record.snapshots.push(Snapshot { info: info.clone(), guest: record.guest, paused });
        self.save(&record, "snapshot")?;
        late(id, Operation::Snapshot, is_late)?;
        Ok(info)
    }

    pub(crate) async fn revert(self: &Arc<Self>, id: &InstanceId, name: &str) -> Result<()> {
        self.require(Capability::Snapshot, "revert")?;
        let record = self.whole(id, "revert")?;
        stays_here(&record, "revert")?;
        find(&record, name, "revert")?;
        let is_late = self.gate(id, Operation::Revert).await?;
        let record = {
            let mut live = self.live.lock();
            let mut record = self.settled(&mut live, id, "revert")?;
            stays_here(&record, "revert")?;
            let snapshot = find(&record, name, "revert")?.clone();
            if snapshot.info.memory {
                record.guest = snapshot.guest;
                if record.phase.runs() {
                    self.save(&record, "revert")?;
                } else {
                    record.goes_on = true;
                    let script = self.script_of(&record.config)?;
                    self.started(&mut live, &mut record, &script)?;
                }
                if let (Phase::Running { since_ms, .. }, true) = (&record.phase, snapshot.paused) {
                    record.phase = Phase::Paused { since_ms: *since_ms };
                    self.save(&record, "revert")?;
                } else if let (Phase::Paused { since_ms }, false) = (&record.phase, snapshot.paused) {
                    record.phase = Phase::Running { since_ms: *since_ms, exit_at_ms: None, exit_code: 0 };
                    self.save(&record, "revert")?;
                }
            } else {
                if record.phase.runs() {
                    self.ended(&mut live, &mut record, Exit::Stopped)?;
                }
                record.guest = Guest { memory: 0, disk: snapshot.guest.disk };
                record.goes_on = false;
                self.save(&record, "revert")?;
            }
            record
        };
        self.watch(&record);
        late(id, Operation::Revert, is_late)
    }

    pub(crate) fn delete_snapshot(&self, id: &InstanceId, name: &str) -> Result<()> {
        self.require(Capability::Snapshot, "delete a snapshot")?;
        let mut record = self.whole(id, "delete a snapshot")?;
        let _live = self.live.lock();
        record.snapshots.retain(|snapshot| snapshot.info.name != name);
        self.save(&record, "delete a snapshot")
    }

    pub(crate) fn snapshots(&self, id: &InstanceId) -> Result<Vec<SnapshotInfo>> {
        self.require(Capability::Snapshot, "list snapshots")?;
        Ok(self.whole(id, "list snapshots")?.snapshots.into_iter().map(|snapshot| snapshot.info).collect())
    }

    pub(crate) async fn clone_snapshot(
        self: &Arc<Self>,
        source: &InstanceId,
        name: &str,
        config: &InstanceConfig,
    ) -> Result<Handle> {
        self.require(Capability::Clone, "clone")?;
        let id = &config.id;
        let is_made = |record: &Record| record.phase != Phase::Creating;
        // Its source may be gone since.
        if let Some(record) = self.load(id, "clone")?.filter(is_made) {
            return Ok(Self::handle(&record));
        }
        let snapshot = find(&self.whole(source, "clone")?, name, "clone")?.clone();
        {
            let _live = self.live.lock();
            match self.load(id, "clone")? {
                Some(record) if is_made(&record) => return Ok(Self::handle(&record)),
                Some(_) => {}
                None => {
                    self.check(config)?;
                    self.save(&Record::creating(config), "clone")?;
                }
            }
        }
        let is_late = self.gate(id, Operation::Clone).await?;
        let _live = self.live.lock();
        let mut record = self.load(id, "clone")?.ok_or_else(|| DriverError::NotFound(id.clone()))?;
        record.phase = Phase::Stopped(Exit::NeverStarted);
        record.guest = snapshot.guest;
        record.goes_on = snapshot.info.memory;
        self.note(id, LedgerEvent::Created, 0, "clone")?;
        self.save(&record, "clone")?;
        late(id, Operation::Clone, is_late)?;
        Ok(Self::handle(&record))
    }
}
