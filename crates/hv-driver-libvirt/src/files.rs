//! What lies on disk of each instance, and how it is written so that a crash at any instant is survived.
//!
//! # Theory of operation
//! An instance is the directory `<state_dir>/<id>/`. `config.json` is written last, so it says that the rest is
//! complete; a directory without it is half created. `run.json` counts the starts, `exit.json` tells how the run of
//! that number ended, `migration.json` what was last handed over or is awaited. Deletion first renames the directory to
//! `.<id>.deleting`, so that what is left of it can never be taken for an instance.

use std::fs::{self, File};
use std::io::{self, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use hv_driver::{DiskFormat, Exit, InstanceConfig, Storage};
use hv_types::InstanceId;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::problem::{Outcome, Problem};
use crate::xdr::Domain;

pub(crate) const CONFIG: &str = "config.json";
pub(crate) const RUN: &str = "run.json";
pub(crate) const EXIT: &str = "exit.json";
pub(crate) const MIGRATION: &str = "migration.json";
/// Held by QEMU as its standard input for as long as it lives.
pub(crate) const LOCK: &str = "lock";
/// Without it no QEMU of this instance comes to run.
pub(crate) const PERMIT: &str = "permit";
pub(crate) const CONSOLE: &str = "console.log";
/// What `console.log` had before it was last cut, by us or by virtlogd.
pub(crate) const CONSOLE_OLD: [&str; 2] = ["console.log.0", "console.log.1"];
pub(crate) const CONSOLE_SOCKET: &str = "console.sock";
pub(crate) const VNC_SOCKET: &str = "vnc.sock";
pub(crate) const SPICE_SOCKET: &str = "spice.sock";
pub(crate) const NVRAM: &str = "nvram.fd";
pub(crate) const SEED: &str = "seed.img";
/// What domains of ours are called: this and the instance's id.
const DOMAIN_PREFIX: &str = "hv-";

/// The longest state directory, so that the sockets in it have addresses (`sun_path` with its final NUL, unix(7)).
pub(crate) const MAX_STATE_DIR_BYTES: usize = 107 - 37 - "/console.sock".len();

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

/// All instances.
#[derive(Clone, Debug)]
pub(crate) struct StateDir(pub(crate) PathBuf);

impl StateDir {
    pub(crate) fn of(&self, id: &InstanceId) -> PathBuf {
        self.0.join(id.as_str())
    }

    pub(crate) fn trash(&self, id: &InstanceId) -> PathBuf {
        self.0.join(format!(".{id}.deleting"))
    }

    /// Every instance of which something is there.
    pub(crate) fn list(&self) -> io::Result<Vec<InstanceId>> {
        let entries = match fs::read_dir(&self.0) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            other => other?,
        };
        let mut ids = std::collections::BTreeSet::new();
        for entry in entries {
            let entry = entry?;
            let name = entry.file_name();
            let Some(name) = name.to_str() else { continue };
            let name = name.strip_prefix('.').and_then(|rest| rest.strip_suffix(".deleting")).unwrap_or(name);
            if let (Ok(id), true) = (name.parse(), entry.file_type()?.is_dir()) {
                ids.insert(id);
            }
        }
        Ok(ids.into_iter().collect())
    }

    /// The directory of an instance, which QEMU's user can pass through but not list.
    pub(crate) fn make(&self, id: &InstanceId) -> Outcome<PathBuf> {
        let dir = self.of(id);
        fs::create_dir_all(&self.0).map_err(Problem::file("make", &self.0))?;
        match fs::DirBuilder::new().mode(0o711).create(&dir) {
            Err(e) if e.kind() != io::ErrorKind::AlreadyExists => Err(Problem::file("make", &dir)(e)),
            _ => {
                sync_dir(&self.0)?;
                Ok(dir)
            }
        }
    }

    /// Removes an instance that does not run.
    pub(crate) fn remove(&self, id: &InstanceId) -> Outcome<()> {
        let (dir, trash) = (self.of(id), self.trash(id));
        // An earlier deletion that was cut short.
        remove_tree(&trash)?;
        match fs::rename(&dir, &trash) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
            other => other.map_err(Problem::file("rename", &dir))?,
        }
        sync_dir(&self.0)?;
        remove_tree(&trash)
    }
}

pub(crate) fn remove_tree(path: &Path) -> Outcome<()> {
    match fs::remove_dir_all(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(Problem::file("remove", path)(e)),
        _ => Ok(()),
    }
}

/// One instance's directory, which need not be complete.
#[derive(Debug)]
pub(crate) struct InstanceDir {
    pub(crate) path: PathBuf,
}

impl InstanceDir {
    pub(crate) fn file(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }

    pub(crate) fn read<T: DeserializeOwned>(&self, name: &str) -> Outcome<Option<T>> {
        let path = self.file(name);
        match fs::read(&path) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(e) => Err(Problem::file("read", &path)(e)),
            Ok(bytes) => serde_json::from_slice(&bytes).map(Some).map_err(|e| Problem::Damaged(path, e)),
        }
    }

    pub(crate) fn write<T: Serialize>(&self, name: &str, value: &T) -> Outcome<()> {
        let bytes = serde_json::to_vec_pretty(value).map_err(|e| Problem::Damaged(self.file(name), e))?;
        write_atomically(&self.file(name), &bytes)
    }

    pub(crate) fn remove(&self, name: &str) -> Outcome<()> {
        let path = self.file(name);
        match fs::remove_file(&path) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => Err(Problem::file("remove", &path)(e)),
            _ => Ok(()),
        }
    }

    /// Makes an empty file if there is none. Existing content stays.
    pub(crate) fn touch(&self, name: &str, mode: u32) -> Outcome<()> {
        let path = self.file(name);
        let file = fs::OpenOptions::new().create(true).append(true).read(true).mode(mode).open(&path);
        file.map(drop).map_err(Problem::file("open", &path))
    }
}

/// Either the old content or the new one is there after a crash, never a part.
pub(crate) fn write_atomically(path: &Path, bytes: &[u8]) -> Outcome<()> {
    let mut partial = path.as_os_str().to_owned();
    partial.push(".partial");
    let partial = PathBuf::from(partial);
    let write = || {
        let mut options = fs::OpenOptions::new();
        let mut file = options.create(true).write(true).truncate(true).mode(0o600).open(&partial)?;
        file.write_all(bytes)?;
        file.sync_all()
    };
    write().map_err(Problem::file("write", &partial))?;
    settle(&partial, path)
}

/// Gives a file that is completely on disk its final name.
pub(crate) fn settle(partial: &Path, path: &Path) -> Outcome<()> {
    fs::rename(partial, path).map_err(Problem::file("rename", partial))?;
    path.parent().map_or(Ok(()), sync_dir)
}

pub(crate) fn sync_dir(path: &Path) -> Outcome<()> {
    File::open(path).and_then(|dir| dir.sync_all()).map_err(Problem::file("flush", path))
}

pub(crate) fn now_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}
