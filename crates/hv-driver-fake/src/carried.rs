//! What an instance carries beside its configuration: what its guest keeps, its snapshots, and where it is moving.

use std::path::PathBuf;

use hv_driver::{MigrationPhase, MigrationStatus, SnapshotInfo, Storage};
use serde::{Deserialize, Serialize};

/// What a guest keeps. It counts how often it was asked, twice: in its memory, and on its boot disk.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Guest {
    /// The number in memory, 0 after every boot.
    pub memory: u64,
    /// The number on the boot disk.
    pub disk: u64,
}

/// A snapshot, as stored.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Snapshot {
    /// What is told of it.
    pub info: SnapshotInfo,
    /// What the guest kept.
    pub guest: Guest,
    /// Whether it stood still then.
    pub paused: bool,
}

/// A hand-over that is awaited, or was.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Incoming {
    /// Which migration.
    pub migration: String,
    /// Whether it still waits: nothing of it runs here.
    pub waits: bool,
}

/// What a source hands over.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Arrived {
    pub(crate) migration: String,
    pub(crate) guest: Guest,
}

/// A migration away from here. Like the end of a guest it is a matter of time: whoever looks later finds it done.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Outgoing {
    /// Which one.
    pub migration: String,
    /// What becomes of the disks.
    pub storage: Storage,
    /// The state directory of the fake that waits for it.
    pub target_dir: PathBuf,
    /// When it began, in milliseconds since 1970.
    pub begun_ms: u64,
    /// How long it takes, in milliseconds.
    pub takes_ms: u64,
    /// What becomes of it.
    pub fate: Fate,
    /// How much is to be sent, in bytes.
    pub total_bytes: u64,
    /// How far it is.
    pub progress: Progress,
}

/// What is to become of a migration.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Fate {
    /// It comes to its end.
    Succeeds,
    /// It breaks down half-way.
    Breaks,
    /// It stays half-way.
    Hangs,
}

/// How far a migration is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Progress {
    /// Under way.
    Going,
    /// Everything is at the target.
    HandedOver,
    /// It came to nothing.
    Failed(String),
}

impl Outgoing {
    /// How long the fake's guests stand still.
    const DOWNTIME: std::time::Duration = std::time::Duration::from_millis(1);

    pub(crate) fn is_handed_over(&self) -> bool {
        self.progress == Progress::HandedOver
    }

    /// When something becomes of it, in milliseconds since 1970; `None` if nothing will.
    pub(crate) fn due_ms(&self) -> Option<u64> {
        let takes_ms = match (&self.progress, self.fate) {
            (Progress::Going, Fate::Succeeds) => self.takes_ms,
            (Progress::Going, Fate::Breaks) => self.takes_ms / 2,
            (Progress::Going, Fate::Hangs) | (Progress::HandedOver | Progress::Failed(_), _) => return None,
        };
        Some(self.begun_ms.saturating_add(takes_ms))
    }

    pub(crate) fn status(&self, now_ms: u64) -> MigrationStatus {
        let elapsed_ms = now_ms.saturating_sub(self.begun_ms);
        let bound_ms = match self.fate {
            Fate::Succeeds => self.takes_ms,
            Fate::Breaks | Fate::Hangs => self.takes_ms / 2,
        };
        let sent = u128::from(self.total_bytes) * u128::from(elapsed_ms.min(bound_ms))
            / u128::from(self.takes_ms.max(1));
        let sent = u64::try_from(sent).unwrap_or(self.total_bytes);
        let (phase, done_bytes, downtime) = match &self.progress {
            // The disks take the first half.
            Progress::Going if self.storage == Storage::Copied && elapsed_ms < self.takes_ms / 2 => {
                (MigrationPhase::Disks, sent, None)
            }
            Progress::Going => (MigrationPhase::Memory, sent, None),
            Progress::HandedOver => (MigrationPhase::HandedOver, self.total_bytes, Some(Self::DOWNTIME)),
            Progress::Failed(reason) => (MigrationPhase::Failed { reason: reason.clone() }, sent, None),
        };
        let (migration, total_bytes) = (self.migration.clone(), self.total_bytes);
        MigrationStatus { migration, phase, done_bytes, total_bytes, downtime }
    }
}
