//! The operations of the driver contract on the snapshots of one instance.

use std::sync::Arc;

use hv_driver::{DriverError, SnapshotInfo, SnapshotRequest, StopMode};

use super::{Restore, is_name, list, path_of, pending, read, remove};
use crate::files::{RESTORE, RUN, StoredRun};
use crate::machine::{Done, Machine};
use crate::platform::Platform;

impl Machine {
    pub(crate) async fn snapshot(self: &Arc<Self>, request: &SnapshotRequest) -> Done<SnapshotInfo> {
        const OPERATION: &str = "snapshot";
        let name = &request.name;
        if !is_name(name) {
            let reason =
                format!("`{name}` is no name of a snapshot: 1 to 63 lower-case letters, digits and `-`");
            return Err(DriverError::invalid(&self.id, reason));
        }
        let failed = self.failed(OPERATION);
        let _change = self.change.lock().await;
        if let Some(meta) = read(&self.dir, name).map_err(&failed)? {
            return Ok(meta.info(&path_of(&self.dir, name)));
        }
        let live = self.live_held(OPERATION).await?;
        let meta = self.take(name, live.as_ref(), request.memory).await.map_err(&failed)?;
        Ok(meta.info(&path_of(&self.dir, name)))
    }

    pub(crate) async fn revert(self: &Arc<Self>, name: &str, platform: &Platform) -> Done<()> {
        const OPERATION: &str = "revert";
        let failed = self.failed(OPERATION);
        let _change = self.change.lock().await;
        let Some(meta) = read(&self.dir, name).map_err(&failed)? else {
            return Err(DriverError::wrong_state(
                &self.id,
                OPERATION,
                format!("it has no snapshot `{name}`"),
            ));
        };
        let stored = self.stored();
        if let Some(reason) = self.differs(&meta) {
            return Err(DriverError::wrong_state(&self.id, OPERATION, reason));
        }
        self.stop_held(StopMode::Force, OPERATION).await?;
        let note = Restore { name: Some(name.to_owned()), was_paused: meta.was_paused };
        self.dir.write(RESTORE, &note).map_err(&failed)?;
        if meta.memory {
            return self.start_held(platform, OPERATION, None).await;
        }
        pending(&self.dir, &stored).map_err(&failed).map(drop)
    }

    /// Why a snapshot does not fit what the instance is now.
    fn differs(&self, meta: &super::Meta) -> Option<String> {
        let stored = self.stored();
        let spec = &stored.config.spec;
        if stored.disks != meta.disks {
            return Some(format!("its disks are not those of snapshot `{}`", meta.name));
        }
        let is_same = spec.cpu_cores == meta.cpu_cores
            && spec.memory_bytes == meta.memory_bytes
            && stored.has_interface() == meta.has_interface;
        (meta.memory && !is_same).then(|| {
            format!(
                "snapshot `{}` has the memory of another machine: {} cores, {} bytes, {}",
                meta.name,
                meta.cpu_cores,
                meta.memory_bytes,
                if meta.has_interface { "a network card" } else { "no network card" }
            )
        })
    }

    pub(crate) async fn delete_snapshot(self: &Arc<Self>, name: &str) -> Done<()> {
        let failed = self.failed("delete a snapshot");
        let _change = self.change.lock().await;
        if !is_name(name) {
            return Ok(());
        }
        // What changed since one that is gone is of no use.
        let since = self.dir.read::<StoredRun>(RUN).map_err(&failed)?.and_then(|run| run.tracked_since);
        if since.as_deref() == Some(name) {
            self.track_since(None).map_err(&failed)?;
        }
        remove(&self.dir, name).map_err(&failed)
    }

    pub(crate) fn snapshots(&self) -> Done<Vec<SnapshotInfo>> {
        list(&self.dir).map_err(self.failed("list snapshots"))
    }
}
