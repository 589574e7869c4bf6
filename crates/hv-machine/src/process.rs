//! A process that holds an instance's lock: who it is, whether it lives, how it is killed.
//!
//! # Theory of operation
//! The standard input of an instance's process is the instance's lock, locked (flock(2)). The lock belongs to the open
//! file, so it is held from before the process exists until its last instruction, whatever happens to the agent; nobody
//! can start a second one meanwhile. Whoever has that file as standard input *is* the instance's process: a pid from
//! elsewhere is only a hint. From then on a pidfd names the process, so that a pid used again is never killed.

use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::process::ExitStatus;
use std::time::Duration;

use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use tokio::io::unix::AsyncFd;
use tokio::process::Child;

use crate::notify::awaitable;

/// How long a process that was just forked may take until it is what it is to become.
const FIND_TIMEOUT: Duration = Duration::from_secs(5);
/// How often it is looked for meanwhile. There is nothing to wait on: the process is not ours.
const FIND_INTERVAL: Duration = Duration::from_millis(20);

/// A process, alive or a moment ago.
#[derive(Debug)]
pub struct Process {
    /// Its number; it means another process once this one has ended.
    pub pid: i32,
    fd: AsyncFd<OwnedFd>,
}

impl Process {
    /// The process of this number.
    ///
    /// # Errors
    /// If there is none.
    pub fn open(pid: i32) -> io::Result<Self> {
        let raw = Pid::from_raw(pid).ok_or_else(|| io::Error::from(io::ErrorKind::InvalidInput))?;
        Ok(Self { pid, fd: awaitable(pidfd_open(raw, PidfdFlags::empty())?)? })
    }

    /// The process that has a lock as its standard input; `None` if the lock is free by now, which `is_free` tells.
    /// `hint`: who it may be.
    ///
    /// # Errors
    /// Those of `is_free`, and `unfindable` if the lock is held and nobody is found for some seconds.
    pub async fn find<P>(
        lock: &Path,
        hint: impl Fn() -> Option<i32>,
        is_free: impl Fn() -> Result<bool, P>,
        unfindable: impl FnOnce() -> P,
    ) -> Result<Option<Self>, P> {
        let deadline = tokio::time::Instant::now() + FIND_TIMEOUT;
        loop {
            if let Some(found) = find_now(lock, hint()) {
                return Ok(Some(found));
            }
            if is_free()? {
                return Ok(None);
            }
            if tokio::time::Instant::now() > deadline {
                return Err(unfindable());
            }
            tokio::time::sleep(FIND_INTERVAL).await;
        }
    }

    /// Kills it. One that has ended is dead enough.
    ///
    /// # Errors
    /// If it may not be killed.
    pub fn kill(&self) -> io::Result<()> {
        match pidfd_send_signal(self.fd.get_ref(), Signal::KILL) {
            Err(e) if e != rustix::io::Errno::SRCH => Err(e.into()),
            _ => Ok(()),
        }
    }

    /// Waits for its end. How it ended is known only of a child.
    pub async fn ended(&self, child: Option<&mut Child>) -> Option<ExitStatus> {
        if let Some(child) = child {
            return child.wait().await.ok();
        }
        // A pidfd becomes readable when its process ends (pidfd_open(2)).
        let _ = self.fd.readable().await;
        None
    }

    /// Processor time used, in nanoseconds, and resident memory, in bytes (proc(5)).
    ///
    /// # Errors
    /// If it has ended.
    pub fn usage(&self) -> io::Result<(u64, u64)> {
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

fn find_now(lock: &Path, hint: Option<i32>) -> Option<Process> {
    let all = fs::read_dir("/proc").ok()?.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok());
    let lock = fs::metadata(lock).ok()?;
    let holds = |pid: i32| {
        let stdin = fs::metadata(format!("/proc/{pid}/fd/0")).ok();
        stdin.is_some_and(|file| (file.dev(), file.ino()) == (lock.dev(), lock.ino()))
    };
    for pid in hint.into_iter().chain(all) {
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

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::process::Stdio;

    use super::*;

    #[tokio::test]
    async fn whoever_has_the_lock_as_its_input_is_found_whatever_the_hint() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("lock");
        let lock = File::options().create(true).append(true).read(true).open(&path).unwrap();
        let (free, held) = (|| Ok(true), || Ok(false));
        let unfindable = || "unfindable";
        assert!(Process::find(&path, || Some(1), free, unfindable).await.unwrap().is_none());
        let mut command = tokio::process::Command::new("sleep");
        let mut child = command.arg("600").stdin(Stdio::from(lock)).kill_on_drop(true).spawn().unwrap();
        let process = Process::find(&path, || Some(1), held, unfindable).await.unwrap().expect("a process");
        assert_eq!(Some(process.pid.unsigned_abs()), child.id());
        process.usage().unwrap();
        process.kill().unwrap();
        assert!(!process.ended(Some(&mut child)).await.expect("a status").success());
        // Dead, and known to be.
        process.kill().unwrap();
        assert!(process.ended(None).await.is_none());
    }

    /// Of this one: the kernel counts the pages of a young process only roughly.
    #[tokio::test]
    async fn a_process_uses_memory() {
        let this = Process::open(std::process::id().try_into().unwrap()).unwrap();
        assert!(this.usage().unwrap().1 > 1 << 20);
    }
}
