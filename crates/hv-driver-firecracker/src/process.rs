//! The Firecracker process: who it is, whether it lives, how it is killed.
//!
//! # Theory of operation
//! Its standard input is the instance's lock, a pipe that is locked (flock(2)) and opened for reading and writing. The
//! lock belongs to the open file, which the jailer hands on when it becomes Firecracker, so it is held from before the
//! process exists until its last instruction, whatever happens to the agent; nobody can start a second one meanwhile.
//! Whoever has that pipe as standard input *is* the instance's VMM. From then on a pidfd names the process, so that a
//! pid used again is never killed. Firecracker reads the serial port's input from the same pipe: see `keyboard`.

use std::fs::{self, File};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::path::PathBuf;
use std::process::ExitStatus;
use std::time::Duration;

use rustix::fs::{CWD, FileType, FlockOperation, Mode, OFlags};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use tokio::io::unix::AsyncFd;
use tokio::process::Child;

use crate::files::{InstanceDir, LOCK};
use crate::notify::awaitable;
use crate::problem::{Outcome, Problem};

/// How long a process that was just forked may take until it can be found.
const FIND_TIMEOUT: Duration = Duration::from_secs(5);
/// How often it is looked for meanwhile. There is nothing to wait on: the process is not ours.
const FIND_INTERVAL: Duration = Duration::from_millis(20);

/// The lock, taken; `None` if a VMM has it.
pub(crate) fn try_lock(dir: &InstanceDir) -> Outcome<Option<File>> {
    let path = dir.file(LOCK);
    let failed = |e: rustix::io::Errno| Problem::file("lock", &path)(e.into());
    match rustix::fs::mknodat(CWD, &path, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0) {
        Err(e) if e != rustix::io::Errno::EXIST => return Err(failed(e)),
        _ => {}
    }
    // Opened for both, so that the guest never reads the end of its input, and the opening does not wait.
    let flags = OFlags::RDWR | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    let file = File::from(rustix::fs::open(&path, flags, Mode::empty()).map_err(failed)?);
    let kind = file.metadata().map_err(Problem::file("look at", &path))?.file_type();
    if !kind.is_fifo() {
        return Err(Problem::file("lock", &path)(io::Error::other("it is no pipe")));
    }
    match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(Some(file)),
        Err(rustix::io::Errno::WOULDBLOCK) => Ok(None),
        Err(e) => Err(failed(e)),
    }
}

/// A Firecracker process, alive or a moment ago.
#[derive(Debug)]
pub(crate) struct Process {
    pub(crate) pid: i32,
    fd: AsyncFd<OwnedFd>,
}

impl Process {
    pub(crate) fn open(pid: i32) -> io::Result<Self> {
        let raw = Pid::from_raw(pid).ok_or_else(|| io::Error::from(io::ErrorKind::InvalidInput))?;
        Ok(Self { pid, fd: awaitable(pidfd_open(raw, PidfdFlags::empty())?)? })
    }

    /// The process that holds an instance's lock; `None` if the lock is free by now.
    pub(crate) async fn find(dir: &InstanceDir) -> Outcome<Option<Self>> {
        let deadline = tokio::time::Instant::now() + FIND_TIMEOUT;
        loop {
            if let Some(found) = find_now(dir) {
                return Ok(Some(found));
            }
            if try_lock(dir)?.is_some() {
                return Ok(None);
            }
            if tokio::time::Instant::now() > deadline {
                return Err(Problem::Unfindable(dir.file(LOCK)));
            }
            tokio::time::sleep(FIND_INTERVAL).await;
        }
    }

    pub(crate) fn kill(&self) -> Outcome<()> {
        match pidfd_send_signal(self.fd.get_ref(), Signal::KILL) {
            Err(e) if e != rustix::io::Errno::SRCH => Err(Problem::Process(e.into())),
            _ => Ok(()),
        }
    }

    /// Waits for its end. How it ended is known only of a child.
    pub(crate) async fn ended(&self, child: Option<&mut Child>) -> Option<ExitStatus> {
        if let Some(child) = child {
            return child.wait().await.ok();
        }
        // A pidfd becomes readable when its process ends (pidfd_open(2)).
        let _ = self.fd.readable().await;
        None
    }

    /// Processor time used, in nanoseconds, and resident memory, in bytes (proc(5)).
    pub(crate) fn usage(&self) -> io::Result<(u64, u64)> {
        let stat = fs::read_to_string(format!("/proc/{}/stat", self.pid))?;
        // The second field is the name in parentheses and may contain anything.
        let fields: Vec<&str> =
            stat.rsplit(')').next().unwrap_or_default().split_ascii_whitespace().collect();
        let number =
            |field: usize| fields.get(field - 3).and_then(|text| text.parse::<u64>().ok()).unwrap_or(0);
        let ns_per_tick = 1_000_000_000 / rustix::param::clock_ticks_per_second().max(1);
        let page = rustix::param::page_size() as u64;
        Ok(((number(14) + number(15)) * ns_per_tick, number(24) * page))
    }
}

fn find_now(dir: &InstanceDir) -> Option<Process> {
    let all = fs::read_dir("/proc").ok()?.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok());
    let lock = fs::metadata(dir.file(LOCK)).ok()?;
    let holds = |pid: i32| {
        let stdin = fs::metadata(PathBuf::from(format!("/proc/{pid}/fd/0"))).ok();
        stdin.is_some_and(|file| (file.dev(), file.ino()) == (lock.dev(), lock.ino()))
    };
    for pid in all {
        // Looked at once more through the pidfd's eyes: now it can be no other process.
        if holds(pid)
            && let Ok(process) = Process::open(pid)
            && holds(pid)
        {
            return Some(process);
        }
    }
    None
}
