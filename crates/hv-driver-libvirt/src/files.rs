//! What lies on disk of each instance, and how it is written so that a crash at any instant is survived.
//!
//! # Theory of operation
//! An instance is the directory `<state_dir>/<id>/`. `config.json` is written last, so it says that the rest is
//! complete; a directory without it is half created. `run.json` counts the starts, `exit.json` tells how the run of
//! that number ended, `migration.json` what was last handed over or is awaited. Deletion first renames the directory to
//! `.<id>.deleting`, so that what is left of it can never be taken for an instance.

use std::path::PathBuf;
use std::time::{SystemTime, UNIX_EPOCH};

use hv_driver::{DiskFormat, Exit, InstanceConfig, Storage};
pub(crate) use hv_machine::files::{StateDir, now_ms, remove_tree, settle, write_atomically};
pub(crate) use hv_machine::log::LOG as CONSOLE;
use hv_types::InstanceId;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::problem::Problem;
use crate::rescue::StoredRescue;
use crate::xdr::Domain;

pub(crate) const CONFIG: &str = "config.json";
pub(crate) const RUN: &str = "run.json";
pub(crate) const EXIT: &str = "exit.json";
pub(crate) const MIGRATION: &str = "migration.json";
/// Held by QEMU as its standard input for as long as it lives.
pub(crate) const LOCK: &str = "lock";
/// Without it no QEMU of this instance comes to run.
pub(crate) const PERMIT: &str = "permit";
pub(crate) const CONSOLE_SOCKET: &str = "console.sock";
pub(crate) const VNC_SOCKET: &str = "vnc.sock";
pub(crate) const SPICE_SOCKET: &str = "spice.sock";
pub(crate) const NVRAM: &str = "nvram.fd";
pub(crate) const SEED: &str = "seed.img";
/// What domains of ours are called: this and the instance's id.
const DOMAIN_PREFIX: &str = "hv-";

/// The longest state directory, so that the sockets in it have addresses (`sun_path` with its final NUL, unix(7)).
pub(crate) const MAX_STATE_DIR_BYTES: usize = 107 - 37 - "/console.sock".len();

/// What QEMU's user may do with an instance's directory: pass through, but not list.
pub(crate) const DIR_MODE: u32 = 0o711;

/// One instance's directory, which need not be complete.
pub(crate) type InstanceDir = hv_machine::files::InstanceDir<Problem>;

/// An instance as it was created or last changed.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Stored {
    pub(crate) version: u32,
    pub(crate) config: InstanceConfig,
    pub(crate) uuid: Uuid,
    pub(crate) mac: String,
    /// The libvirt network; `None` is user-mode networking.
    pub(crate) network: Option<String>,
    pub(crate) kernel: Option<PathBuf>,
    pub(crate) initrd: Option<PathBuf>,
    pub(crate) cmdline: String,
    pub(crate) disks: Vec<StoredDisk>,
    /// Where its disks are if not in its own directory.
    pub(crate) disk_dir: Option<PathBuf>,
    /// What it boots from while it is in rescue.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) rescue: Option<StoredRescue>,
}

impl Stored {
    pub(crate) const VERSION: u32 = 1;

    pub(crate) fn domain(&self) -> Domain {
        Domain { name: domain_name(&self.config.id), uuid: self.uuid, id: -1 }
    }
}

pub(crate) fn domain_name(id: &InstanceId) -> String {
    format!("{DOMAIN_PREFIX}{id}")
}

/// Whose domain this would be.
pub(crate) fn instance_of(domain: &str) -> Option<InstanceId> {
    domain.strip_prefix(DOMAIN_PREFIX)?.parse().ok()
}

/// A disk of an instance.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct StoredDisk {
    /// What the specification calls it; what the image brings is `boot` if the specification does not name it.
    pub(crate) name: String,
    pub(crate) path: PathBuf,
    pub(crate) format: DiskFormat,
    /// What it is laid over.
    pub(crate) base: Option<(PathBuf, DiskFormat)>,
    /// What the guest reads as its serial number.
    pub(crate) serial: String,
    pub(crate) read_only: bool,
    /// `vda`, `sda`, …
    pub(crate) target: String,
    pub(crate) size_bytes: u64,
}

impl StoredDisk {
    /// Disks that come and go are on SCSI, where nobody has to ask the guest; the others are on virtio.
    pub(crate) fn bus(&self) -> &'static str {
        if self.target.starts_with("sd") { "scsi" } else { "virtio" }
    }
}

/// What was last done about moving it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct StoredMigration {
    pub(crate) migration: String,
    pub(crate) phase: StoredPhase,
    pub(crate) storage: Storage,
    /// At the source what was asked for, at the target what was answered.
    pub(crate) target: serde_json::Value,
    /// How many bytes there were, as far as known.
    pub(crate) total_bytes: u64,
    pub(crate) downtime_ms: Option<u64>,
}

impl StoredMigration {
    pub(crate) fn new(migration: &str, phase: StoredPhase, storage: Storage, target: serde_json::Value) -> Self {
        Self { migration: migration.to_owned(), phase, storage, target, total_bytes: 0, downtime_ms: None }
    }

    /// Whether its disks are another node's to keep, or to remove.
    pub(crate) fn disks_are_elsewhere(&self) -> bool {
        let is_away = match self.phase {
            StoredPhase::Awaited | StoredPhase::Arrived | StoredPhase::GivenUp | StoredPhase::HandedOver => true,
            StoredPhase::Sending | StoredPhase::Failed(_) => false,
        };
        is_away && self.storage == Storage::Shared
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum StoredPhase {
    /// At the target: it waits.
    Awaited,
    /// At the target: everything is there, and it stands still.
    Arrived,
    /// At the target: it was stopped before it was let go, and never runs from here.
    GivenUp,
    /// At the source: it is being sent.
    Sending,
    /// At the source: everything was sent, and it stands still for good.
    HandedOver,
    /// At the source: it failed, and why.
    Failed(String),
}

#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
pub(crate) struct StoredRun {
    pub(crate) number: u64,
    pub(crate) started_ms: u64,
}

impl StoredRun {
    pub(crate) fn since(self) -> SystemTime {
        UNIX_EPOCH + std::time::Duration::from_millis(self.started_ms)
    }
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct StoredExit {
    pub(crate) run: u64,
    pub(crate) exit: Exit,
}
