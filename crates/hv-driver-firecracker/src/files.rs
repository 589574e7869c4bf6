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
use std::io::{self, Write as _};
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use hv_driver::{Exit, InstanceConfig};
use hv_types::InstanceId;
use rustix::fs::{Mode, OFlags};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::problem::{Outcome, Problem};

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
pub(crate) const CONSOLE: &str = "console.log";
/// What `console.log` had before it was last cut.
pub(crate) const CONSOLE_OLD: &str = "console.log.1";
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
            // What is being deleted while we look is gone.
            let is_dir = entry.file_type().is_ok_and(|kind| kind.is_dir());
            if let (Ok(id), true) = (name.parse(), is_dir) {
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

/// Symbolic links in it are removed, not followed.
pub(crate) fn remove_tree(path: &Path) -> Outcome<()> {
    match fs::remove_dir_all(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(Problem::file("remove", path)(e)),
        _ => Ok(()),
    }
}

/// The jail's id: Firecracker takes letters, digits and `-` only, which in the instance's own directory is enough.
pub(crate) fn jail_id(id: &InstanceId) -> String {
    id.as_str().chars().map(|letter| if letter.is_ascii_alphanumeric() { letter } else { '-' }).collect()
}

/// One instance's directory, which need not be complete.
#[derive(Debug)]
pub(crate) struct InstanceDir {
    pub(crate) path: PathBuf,
}

impl InstanceDir {
    pub(crate) fn open(path: PathBuf) -> io::Result<Self> {
        match fs::symlink_metadata(&path)?.is_dir() {
            true => Ok(Self { path }),
            false => Err(io::Error::from(io::ErrorKind::NotADirectory)),
        }
    }

    pub(crate) fn file(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }

    /// The VMM's root, wherever the name of the VMM at its last start has put it.
    pub(crate) fn root(&self, id: &InstanceId) -> PathBuf {
        let jail = self.file("jail");
        let first = fs::read_dir(&jail).ok().and_then(|mut entries| entries.next()?.ok());
        let below = first.map_or_else(|| jail.join("firecracker"), |entry| entry.path());
        below.join(jail_id(id)).join("root")
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

    /// Writes something about the present run. After a crash of the host the old content may be there, which does not
    /// matter, as nothing runs then; but no part of either.
    pub(crate) fn note<T: Serialize>(&self, name: &str, value: &T) -> Outcome<()> {
        let bytes = serde_json::to_vec(value).map_err(|e| Problem::Damaged(self.file(name), e))?;
        let partial = write_partial(&self.file(name), &bytes)?;
        fs::rename(&partial, self.file(name)).map_err(Problem::file("rename", &partial))
    }

    pub(crate) fn remove(&self, name: &str) -> Outcome<()> {
        remove_file(&self.file(name))
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

pub(crate) fn remove_file(path: &Path) -> Outcome<()> {
    match fs::remove_file(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(Problem::file("remove", path)(e)),
        _ => Ok(()),
    }
}

/// A directory by descriptor: paths below it through `/proc/self/fd` are short enough for socket addresses, which have
/// at most 107 bytes (unix(7)).
#[derive(Debug)]
pub(crate) struct Short(OwnedFd);

impl Short {
    pub(crate) fn open(dir: &Path) -> io::Result<Self> {
        Ok(Self(rustix::fs::open(dir, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?))
    }

    /// Good in this process as long as `self` lives.
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        PathBuf::from(format!("/proc/self/fd/{}/{name}", self.0.as_raw_fd()))
    }
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

/// Either the old content or the new one is there after a crash, never a part.
pub(crate) fn write_atomically(path: &Path, bytes: &[u8]) -> Outcome<()> {
    let partial = write_partial(path, bytes)?;
    settle(&partial, path)
}

/// Writes a file that is completely on disk, beside the one that it is to replace.
fn write_partial(path: &Path, bytes: &[u8]) -> Outcome<PathBuf> {
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
    Ok(partial)
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
