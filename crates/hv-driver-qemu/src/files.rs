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

use std::io;
use std::path::PathBuf;
use std::time::{SystemTime, UNIX_EPOCH};

use hv_driver::{DiskFormat, Exit, InstanceConfig};
use hv_machine::files::{self, Short};
pub(crate) use hv_machine::files::{StateDir, now_ms, remove_tree, settle, sync_dir, write_atomically};
pub(crate) use hv_machine::log::LOG as CONSOLE;
use serde::{Deserialize, Serialize};

use crate::problem::Problem;
use crate::rescue::{RESCUE_DISK, StoredRescue};

pub(crate) const CONFIG: &str = "config.json";
pub(crate) const RUN: &str = "run.json";
pub(crate) const EXIT: &str = "exit.json";
/// Held by QEMU as its standard input for as long as it lives.
pub(crate) const LOCK: &str = "lock";
pub(crate) const PID: &str = "qemu.pid";
pub(crate) const STDERR: &str = "stderr.log";
/// Everything that QEMU reported on its second monitor during the present run.
pub(crate) const EVENTS: &str = "events.log";
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

/// What others may do with an instance's directory: nothing.
pub(crate) const DIR_MODE: u32 = 0o700;

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
    /// What it boots from while it is in rescue.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) rescue: Option<StoredRescue>,
}

impl Stored {
    pub(crate) const VERSION: u32 = 1;

    /// A disk's file as QEMU is told: in the instance's directory, or absolute.
    pub(crate) fn disk_path(&self, disk: &StoredDisk) -> PathBuf {
        match &self.disk_dir {
            Some(dir) if !disk.read_only && disk.file != RESCUE_DISK => dir.join(&disk.file),
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
    pub(crate) format: DiskFormat,
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
    /// Whether the guest boots from it, now or otherwise, or it is the seed: neither comes nor goes.
    pub(crate) fn is_fixed(&self) -> bool {
        self.read_only || self.file == BOOT_DISK || self.file == RESCUE_DISK
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

/// One instance's directory, which need not be complete, and the way to the sockets in it.
#[derive(Debug)]
pub(crate) struct InstanceDir {
    dir: files::InstanceDir<Problem>,
    short: Short,
}

impl std::ops::Deref for InstanceDir {
    type Target = files::InstanceDir<Problem>;

    fn deref(&self) -> &Self::Target {
        &self.dir
    }
}

impl InstanceDir {
    pub(crate) fn open(path: PathBuf) -> io::Result<Self> {
        let short = Short::open(&path)?;
        Ok(Self { dir: files::InstanceDir::at(path), short })
    }

    /// A path of one of its sockets that is short enough, good in this process as long as `self` lives.
    pub(crate) fn socket(&self, name: &str) -> PathBuf {
        self.short.path(name)
    }

    /// A path of one of its sockets that other processes can use too.
    pub(crate) fn public_socket(&self, name: &str) -> PathBuf {
        let path = self.file(name);
        if path.as_os_str().len() <= MAX_SOCKET_PATH_BYTES { path } else { self.short.public_path(name) }
    }
}
