//! What lies on disk of each instance, and how it is written so that a crash at any instant is survived.
//!
//! # Theory of operation
//! An instance is the directory `<state_dir>/<id>/`. `config.json` is written last, so it says that the rest is
//! complete; a directory without it is half created. `run.json` counts the starts, `exit.json` tells how the run of
//! that number ended. Deletion first renames the directory to `.<id>.deleting`, so that what is left of it can never
//! be taken for an instance.
//!
//! Unix socket addresses have at most 107 bytes. QEMU therefore runs inside the directory and names its sockets
//! relatively; we name them through `/proc/self/fd`.

use std::fs::{self, File};
use std::io::{self, Write as _};
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use hv_driver::{Exit, InstanceConfig};
use hv_types::InstanceId;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::images::Format;
use crate::problem::{Outcome, Problem};

pub(crate) const CONFIG: &str = "config.json";
pub(crate) const RUN: &str = "run.json";
pub(crate) const EXIT: &str = "exit.json";
/// Held by QEMU as its standard input for as long as it lives.
pub(crate) const LOCK: &str = "lock";
pub(crate) const PID: &str = "qemu.pid";
pub(crate) const STDERR: &str = "stderr.log";
/// Everything that QEMU reported on its second monitor during the present run.
pub(crate) const EVENTS: &str = "events.log";
pub(crate) const CONSOLE: &str = "console.log";
/// What `console.log` had before it was last cut.
pub(crate) const CONSOLE_OLD: &str = "console.log.1";
pub(crate) const MONITOR_SOCKET: &str = "qmp.sock";
pub(crate) const EVENTS_SOCKET: &str = "events.sock";
pub(crate) const CONSOLE_SOCKET: &str = "console.sock";
pub(crate) const AGENT_SOCKET: &str = "agent.sock";
pub(crate) const VNC_SOCKET: &str = "vnc.sock";
/// The disk that is made from the image.
pub(crate) const BOOT_DISK: &str = "boot.qcow2";
pub(crate) const SEED: &str = "seed.img";
/// The hand-over to this node for which the instance waits.
pub(crate) const INCOMING: &str = "incoming.json";
/// The last hand-over of the instance to another node.
pub(crate) const OUTGOING: &str = "outgoing.json";
/// Says that the disks, where they lie elsewhere, are this instance's to remove.
pub(crate) const OWNS_DISKS: &str = "owns-disks";
/// The snapshots that are complete.
pub(crate) const SNAPSHOTS: &str = "snapshots.json";
/// What the machine was when it was last started.
pub(crate) const STARTED: &str = "started.json";
/// A return to a snapshot that has begun and is not finished.
pub(crate) const REVERTING: &str = "reverting.json";
/// Where QEMU looks for the key of a migration: a directory with `keys.psk`.
pub(crate) const KEYS: &str = "keys";
/// The instance's own UEFI variables.
pub(crate) const UEFI_VARIABLES: &str = "uefi-vars.fd";

/// The longest path that a unix socket address holds (`sun_path` with its final NUL, unix(7)).
const MAX_SOCKET_PATH_BYTES: usize = 107;

/// An instance as it was created.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Stored {
    pub(crate) version: u32,
    pub(crate) config: InstanceConfig,
    pub(crate) kernel: Option<PathBuf>,
    pub(crate) initrd: Option<PathBuf>,
    pub(crate) cmdline: String,
    pub(crate) disks: Vec<StoredDisk>,
    /// Where its disks are if not in its own directory; absolute.
    #[serde(default)]
    pub(crate) disk_dir: Option<PathBuf>,
    /// The UEFI firmware that it boots with.
    #[serde(default)]
    pub(crate) uefi: Option<PathBuf>,
}

impl Stored {
    pub(crate) const VERSION: u32 = 1;

    /// A disk's file as QEMU is told: in the instance's directory, or absolute.
    pub(crate) fn disk_path(&self, disk: &StoredDisk) -> PathBuf {
        match &self.disk_dir {
            Some(dir) if !disk.read_only => dir.join(&disk.file),
            _ => PathBuf::from(&disk.file),
        }
    }

    /// The disks that the guest writes, each with its number.
    pub(crate) fn writable(&self) -> impl Iterator<Item = (usize, &StoredDisk)> {
        self.numbered().filter(|(_, disk)| !disk.read_only)
    }

    /// Every disk with its number: that of its node and device in QEMU.
    pub(crate) fn numbered(&self) -> impl Iterator<Item = (usize, &StoredDisk)> {
        self.disks.iter().enumerate().map(|(index, disk)| (disk.number.unwrap_or(index), disk))
    }
}

/// A disk of an instance, in its directory.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct StoredDisk {
    pub(crate) file: String,
    pub(crate) format: Format,
    /// What the guest reads as its serial number.
    pub(crate) serial: String,
    pub(crate) read_only: bool,
    /// Its number, which stays while others come and go; `None`: its place in the list, as it was before there were
    /// numbers.
    #[serde(default)]
    pub(crate) number: Option<usize>,
    /// The name that the specification gives it.
    #[serde(default)]
    pub(crate) name: String,
    /// What the guest sees, in bytes; 0 where an earlier release made it.
    #[serde(default)]
    pub(crate) size_bytes: u64,
}

impl StoredDisk {
    /// Whether the guest boots from it, or it is the seed: neither comes nor goes.
    pub(crate) fn is_fixed(&self) -> bool {
        self.read_only || self.file == BOOT_DISK
    }
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

    pub(crate) fn make(&self, id: &InstanceId) -> Outcome<PathBuf> {
        let dir = self.of(id);
        fs::create_dir_all(&self.0).map_err(Problem::file("make", &self.0))?;
        match fs::DirBuilder::new().mode(0o700).create(&dir) {
            Err(e) if e.kind() != io::ErrorKind::AlreadyExists => Err(Problem::file("make", &dir)(e)),
            _ => {
                sync_dir(&self.0)?;
                Ok(dir)
            }
        }
    }

    /// Removes an instance that does not run.
    pub(crate) fn remove(&self, id: &InstanceId, before_removal: impl FnOnce()) -> Outcome<()> {
        let (dir, trash) = (self.of(id), self.trash(id));
        // An earlier deletion that was cut short.
        remove_tree(&trash)?;
        match fs::rename(&dir, &trash) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
            other => other.map_err(Problem::file("rename", &dir))?,
        }
        sync_dir(&self.0)?;
        before_removal();
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
    fd: OwnedFd,
}

impl InstanceDir {
    pub(crate) fn open(path: PathBuf) -> io::Result<Self> {
        use rustix::fs::{Mode, OFlags};
        let fd = rustix::fs::open(&path, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
        Ok(Self { path, fd })
    }

    pub(crate) fn file(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }

    /// A path of one of its sockets that is short enough, good in this process as long as `self` lives.
    pub(crate) fn socket(&self, name: &str) -> PathBuf {
        PathBuf::from(format!("/proc/self/fd/{}/{name}", self.fd.as_raw_fd()))
    }

    /// A path of one of its sockets that other processes can use too.
    pub(crate) fn public_socket(&self, name: &str) -> PathBuf {
        let path = self.file(name);
        if path.as_os_str().len() <= MAX_SOCKET_PATH_BYTES {
            return path;
        }
        PathBuf::from(format!("/proc/{}/fd/{}/{name}", std::process::id(), self.fd.as_raw_fd()))
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

    /// Opens a file for appending, private to us. Existing content stays.
    pub(crate) fn append(&self, name: &str) -> Outcome<File> {
        let path = self.file(name);
        let file = fs::OpenOptions::new().create(true).append(true).read(true).mode(0o600).open(&path);
        file.map_err(Problem::file("open", &path))
    }

    pub(crate) fn empty(&self, name: &str) -> Outcome<()> {
        self.append(name)?.set_len(0).map_err(Problem::file("truncate", &self.file(name)))
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
