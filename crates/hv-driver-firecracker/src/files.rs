//! What lies on disk of each instance, and how it is written so that a crash at any instant is survived.
//!
//! # Theory of operation
//! An instance is the directory `<state_dir>/<id>/`. `config.json` is written last, so it says that the rest is
//! complete; a directory without it is half created. `run.json` counts the starts, `exit.json` tells how the run of
//! that number ended. Deletion first renames the directory to `.<id>.deleting`, so that what is left of it can never
//! be taken for an instance.
//!
//! What the VMM may touch lies in the instance's *root*, the directory `root` of `jail/<name of the VMM>/<jail id>`: where the jailer wants
//! it, and the VMM's working directory with and without a jail. It names everything relatively, so a snapshot can be
//! loaded in any other root. The VMM is not trusted with it: nothing there is followed if it is a symbolic link.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use hv_driver::{Exit, InstanceConfig};
pub(crate) use hv_machine::files::{Short, StateDir, now_ms, remove_file, remove_tree, settle, sync_dir};
pub(crate) use hv_machine::log::LOG as CONSOLE;
use hv_types::InstanceId;
use rustix::fs::{Mode, OFlags};
use serde::{Deserialize, Serialize};

use crate::problem::Problem;

pub(crate) const CONFIG: &str = "config.json";
pub(crate) const RUN: &str = "run.json";
pub(crate) const EXIT: &str = "exit.json";
/// The run of which the guest was asked to end.
pub(crate) const ASKED: &str = "asked.json";
/// The VMM stands still for us; it goes on when this is found.
pub(crate) const HELD: &str = "held.json";
/// What the next start makes of the instance.
pub(crate) const NEXT: &str = "next.json";
/// The snapshot from which the next start goes on.
pub(crate) const RESTORE: &str = "restore.json";
/// A pipe: the VMM's standard input, locked for as long as it lives, and what is typed on the serial port.
pub(crate) const LOCK: &str = "lock";
pub(crate) const STDERR: &str = "stderr.log";
pub(crate) const SNAPSHOTS: &str = "snapshots";

/// Names in the root.
pub(crate) const API_SOCKET: &str = "api.sock";
pub(crate) const VSOCK_SOCKET: &str = "vsock.sock";
pub(crate) const LOG: &str = "firecracker.log";
pub(crate) const METRICS: &str = "metrics.json";
pub(crate) const KERNEL: &str = "kernel";
pub(crate) const INITRD: &str = "initrd";
/// The memory and state that are loaded.
pub(crate) const LOAD_MEMORY: &str = "load.memory";
pub(crate) const LOAD_STATE: &str = "load.state";

/// What others may do with an instance's directory: nothing.
pub(crate) const DIR_MODE: u32 = 0o700;

/// An instance as it was created.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Stored {
    pub(crate) version: u32,
    pub(crate) config: InstanceConfig,
    pub(crate) cmdline: String,
    pub(crate) has_initrd: bool,
    pub(crate) disks: Vec<StoredDisk>,
    /// The VMM's user and group in the jail.
    pub(crate) uid: u32,
}

impl Stored {
    pub(crate) const VERSION: u32 = 1;

    /// Whether the guest has a network interface: for its network, or to reach its metadata.
    pub(crate) fn has_interface(&self) -> bool {
        let spec = &self.config.spec;
        spec.network.is_some() || !spec.user_data.is_empty()
    }
}

/// A disk of an instance, a raw file in its root.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct StoredDisk {
    pub(crate) file: String,
    /// As the specification calls it.
    pub(crate) name: String,
    /// The one that the kernel mounts.
    pub(crate) is_root: bool,
}

#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(crate) struct StoredRun {
    pub(crate) number: u64,
    pub(crate) started_ms: u64,
    /// The snapshot since which changes of memory are tracked; `None`: the next one must be complete.
    #[serde(default)]
    pub(crate) tracked_since: Option<String>,
}

impl StoredRun {
    pub(crate) fn since(&self) -> SystemTime {
        UNIX_EPOCH + std::time::Duration::from_millis(self.started_ms)
    }
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct StoredExit {
    pub(crate) run: u64,
    pub(crate) exit: Exit,
}

/// A mark of one run.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(crate) struct OfRun {
    pub(crate) run: u64,
}

/// One instance's directory, which need not be complete.
pub(crate) type InstanceDir = hv_machine::files::InstanceDir<Problem>;

/// The jail's id: Firecracker takes letters, digits and `-` only, which in the instance's own directory is enough.
pub(crate) fn jail_id(id: &InstanceId) -> String {
    id.as_str().chars().map(|letter| if letter.is_ascii_alphanumeric() { letter } else { '-' }).collect()
}

/// The VMM's root, wherever the name of the VMM at its last start has put it.
pub(crate) fn root_of(dir: &InstanceDir, id: &InstanceId) -> PathBuf {
    let jail = dir.file("jail");
    let first = fs::read_dir(&jail).ok().and_then(|mut entries| entries.next()?.ok());
    let below = first.map_or_else(|| jail.join("firecracker"), |entry| entry.path());
    below.join(jail_id(id)).join("root")
}

/// Opens a regular file of a root; a symbolic link or a pipe that the VMM put there is refused.
pub(crate) fn open_in_root(path: &Path, flags: OFlags) -> io::Result<File> {
    let flags = flags | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let file = File::from(rustix::fs::open(path, flags, Mode::empty())?);
    match file.metadata()?.is_file() {
        true => Ok(file),
        false => Err(io::Error::other("it is not a plain file")),
    }
}
