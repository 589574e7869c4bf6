//! What lies on disk of each instance, and how it is written so that a crash at any instant is survived.
//!
//! # Theory of operation
//! An instance is the directory `<state_dir>/<id>/`. `config.json` is written last, so it says that the rest is
//! complete, containerd's records too; a directory without it is half created or half deleted. `run.json` counts the
//! starts, `exit.json` tells how the run of that number ended. The driver's own directories begin with a dot.

use std::fs::{self, File};
use std::io::{self, Write as _};
use std::net::IpAddr;
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use hv_driver::{Exit, InstanceConfig};
use hv_machine::files;
pub(crate) use hv_machine::files::now_ms;
use hv_types::InstanceId;
use rustix::fs::{CWD, FileType, Mode};
use serde::{Deserialize, Serialize};

use crate::image::ImageProcess;
use crate::problem::{Outcome, Problem};

pub(crate) const CONFIG: &str = "config.json";
pub(crate) const RUN: &str = "run.json";
pub(crate) const EXIT: &str = "exit.json";
/// Held by whoever is starting the instance.
pub(crate) const LOCK: &str = "lock";
/// The pipe that the container reads from.
pub(crate) const STDIN: &str = "stdin";
/// Host name, hosts and resolver, mounted in the container.
pub(crate) const ETC: &str = "etc";
/// The pipes of further commands.
pub(crate) const EXEC: &str = "exec";
/// Which addresses are taken, kept by the address plugin.
pub(crate) const ADDRESSES: &str = ".addresses";

/// An instance as it was created.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Stored {
    pub(crate) version: u32,
    pub(crate) config: InstanceConfig,
    /// What the image says of the process.
    pub(crate) image: ImageProcess,
}

impl Stored {
    pub(crate) const VERSION: u32 = 1;
}

/// The latest start.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
pub(crate) struct StoredRun {
    pub(crate) number: u64,
    pub(crate) started_ms: u64,
    /// 0 until it is known.
    pub(crate) pid: i32,
    pub(crate) ip: Option<IpAddr>,
    /// Whether the process was let begin.
    pub(crate) is_begun: bool,
}

impl StoredRun {
    pub(crate) fn since(self) -> SystemTime {
        UNIX_EPOCH + Duration::from_millis(self.started_ms)
    }
}

/// How a run ended.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct StoredExit {
    pub(crate) run: u64,
    pub(crate) exit: Exit,
    /// Whether nothing of the run is left in containerd.
    pub(crate) is_cleared: bool,
}

/// All instances.
#[derive(Clone, Debug)]
pub(crate) struct StateDir(pub(crate) PathBuf);

impl StateDir {
    pub(crate) fn of(&self, id: &InstanceId) -> InstanceDir {
        InstanceDir(files::InstanceDir::at(self.0.join(id.as_str())))
    }

    /// Every instance of which something is there.
    pub(crate) fn list(&self) -> io::Result<Vec<InstanceId>> {
        files::StateDir(self.0.clone()).list()
    }

    pub(crate) fn make(&self, id: &InstanceId) -> Outcome<InstanceDir> {
        let dir = self.of(id);
        fs::create_dir_all(&self.0).map_err(Problem::file("make", &self.0))?;
        match fs::DirBuilder::new().mode(0o700).create(&dir.path) {
            Err(e) if e.kind() != io::ErrorKind::AlreadyExists => Err(Problem::file("make", &dir.path)(e)),
            _ => Ok(dir),
        }
    }

    /// Removes the directory of an instance of which nothing else is left.
    pub(crate) fn remove(&self, id: &InstanceId) -> Outcome<()> {
        let dir = self.of(id);
        // From here on it is half deleted, and another delete goes on with it.
        dir.remove(CONFIG)?;
        match fs::remove_dir_all(&dir.path) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
            other => other.map_err(Problem::file("remove", &dir.path)),
        }
    }
}

/// One instance's directory.
#[derive(Debug)]
pub(crate) struct InstanceDir(files::InstanceDir<Problem>);

impl std::ops::Deref for InstanceDir {
    type Target = files::InstanceDir<Problem>;

    fn deref(&self) -> &Self::Target {
        &self.0
    }
}

impl InstanceDir {
    /// Replaces a file as a whole. It outlives a crash of the agent; of the machine only with `is_durable`.
    pub(crate) fn write<T: Serialize>(&self, name: &str, value: &T, is_durable: bool) -> Outcome<()> {
        let (path, partial) = (self.file(name), self.file(&format!("{name}.partial")));
        let bytes = serde_json::to_vec(value).map_err(|e| Problem::Damaged(path.clone(), e))?;
        let write = || {
            let mut file = File::create(&partial)?;
            file.write_all(&bytes)?;
            if is_durable {
                file.sync_all()?;
            }
            fs::rename(&partial, &path)
        };
        write().map_err(Problem::file("write", &path))
    }

    /// The lock of a start, taken; `None` if another has it.
    pub(crate) fn try_lock(&self) -> Outcome<Option<File>> {
        self.0.try_lock(LOCK)
    }
}

/// Makes a pipe with a name; one that is there already will do.
pub(crate) fn make_pipe(path: &Path) -> Outcome<()> {
    match rustix::fs::mknodat(CWD, path, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0) {
        Ok(()) | Err(rustix::io::Errno::EXIST) => Ok(()),
        Err(e) => Err(Problem::file("make the pipe", path)(e.into())),
    }
}
