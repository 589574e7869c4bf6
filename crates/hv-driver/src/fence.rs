//! How an instance is killed for certain by a process that has no driver.
//!
//! # Theory of operation
//! A target names something that exists before the instance can run and is let go only when it does not run any more,
//! so that there is no moment at which the instance runs and its target does not lead to it. Killing is repeated until
//! [`Outcome::Gone`] is seen; each try takes a bounded time and blocks the thread.

use std::io;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// How an instance is killed for certain. Kept and sent as JSON; a release reads its own kinds and those before.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum FenceTarget {
    /// Whichever process has this file as its standard input. The file is locked (flock(2)) from before that process
    /// exists until its last instruction, so a file that can be locked proves that nothing runs.
    LockHolder {
        /// The file, absolute.
        path: PathBuf,
    },
    /// As [`Self::LockHolder`], of a runtime that others start: whoever becomes the instance takes the lock first and
    /// then looks whether the permit is there. So once the permit is gone and the lock is free nothing runs, nor will.
    Permitted {
        /// The file that is locked, absolute.
        lock: PathBuf,
        /// The file without which nothing starts, absolute. It is removed first.
        permit: PathBuf,
    },
    /// A runtime that looks at this file before it believes that the instance runs: the file's existence ends it.
    Marker {
        /// The file, absolute. It holds the time of the end, in microseconds since 1970.
        path: PathBuf,
    },
    /// Whatever runs in this control group. Whoever starts the instance holds the lock (flock(2)) from before the
    /// first process is put into the group until the start is complete, and starts nothing that is not in the group:
    /// an empty group and a free lock prove that nothing runs and nothing will by itself.
    Cgroup {
        /// The group's directory, absolute; in version 1 that of the freezer. It need not exist.
        path: PathBuf,
        /// The file that is locked, absolute. It need not exist.
        lock: PathBuf,
    },
}

/// What a try to kill came to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It is certain that it does not run.
    Gone,
    /// It may still run; try again. The text says what was seen.
    Alive(String),
}

/// Whom a try may kill.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Zeal {
    /// Only the instance itself.
    Instance,
    /// Whoever holds on to it: also a process that is just about to become the instance.
    Everyone,
}

/// Kills, once. Whether something was there to be killed is not told: afterwards nothing is.
#[must_use]
pub fn kill(target: &FenceTarget, zeal: Zeal) -> Outcome {
    let all = kill_all(&[(target, zeal)]);
    all.into_iter().next().unwrap_or_else(|| Outcome::Alive("it was not tried".into()))
}

/// Kills all of them, once, and waits for them together: many take hardly longer than one. Outcomes in their order.
#[must_use]
pub fn kill_all(targets: &[(&FenceTarget, Zeal)]) -> Vec<Outcome> {
    // Before any lock is looked at: whoever takes one later finds no permit.
    let withdrawn: Vec<_> = targets.iter().map(|(target, _)| withdraw(target)).collect();
    let locks = targets.iter().filter_map(|(target, zeal)| match target {
        FenceTarget::LockHolder { path } | FenceTarget::Permitted { lock: path, .. } => {
            Some((path.as_path(), *zeal))
        }
        FenceTarget::Marker { .. } => None,
        FenceTarget::Cgroup { lock, .. } => Some((lock.as_path(), *zeal)),
    });
    let mut held = holder::kill_all(&locks.collect::<Vec<_>>()).into_iter();
    let mut held = || held.next().unwrap_or_else(|| Ok(Outcome::Alive("it was not tried".into())));
    let mut outcome = |target: &FenceTarget| match target {
        FenceTarget::LockHolder { .. } | FenceTarget::Permitted { .. } => held(),
        FenceTarget::Marker { path } => mark(path).map(|()| Outcome::Gone),
        FenceTarget::Cgroup { path, .. } => match held()? {
            Outcome::Gone => empty(path),
            // What is in it already can go; what is about to come makes another try necessary.
            alive @ Outcome::Alive(_) => empty(path).map(|_| alive),
        },
    };
    let told = |target: &FenceTarget, result: io::Result<Outcome>| {
        result.unwrap_or_else(|error| Outcome::Alive(format!("{}: {error}", target.path().display())))
    };
    let both = |((target, _), withdrawn): (&(&FenceTarget, Zeal), io::Result<()>)| {
        let seen = outcome(target);
        told(target, withdrawn.and(seen))
    };
    targets.iter().zip(withdrawn).map(both).collect()
}

/// Takes the permit away, where the target has one.
fn withdraw(target: &FenceTarget) -> io::Result<()> {
    match target {
        FenceTarget::Permitted { permit, .. } => match std::fs::remove_file(permit) {
            Err(e) if !matches!(e.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => Err(e),
            _ => Ok(()),
        },
        FenceTarget::LockHolder { .. } | FenceTarget::Marker { .. } | FenceTarget::Cgroup { .. } => Ok(()),
    }
}

/// Whether it runs, as far as can be told without its driver. `None`: this cannot be told of such a target.
#[must_use]
pub fn may_run(target: &FenceTarget) -> Option<bool> {
    match target {
        // What cannot be looked at may run.
        FenceTarget::LockHolder { path } | FenceTarget::Permitted { lock: path, .. } => {
            Some(!holder::is_free(path).unwrap_or(false))
        }
        FenceTarget::Marker { .. } => None,
        FenceTarget::Cgroup { path, lock } => Some(
            !holder::is_free(lock).unwrap_or(false)
                || cgroup::processes(path).map_or(true, |all| !all.is_empty()),
        ),
    }
}

/// Kills what is in a control group, and looks whether it is empty.
fn empty(path: &std::path::Path) -> io::Result<Outcome> {
    let killed = cgroup::kill(path)?;
    let left = cgroup::processes(path)?.len();
    Ok(match left {
        0 => Outcome::Gone,
        _ => Outcome::Alive(format!("{} has {left} processes; {killed} killed", path.display())),
    })
}

impl FenceTarget {
    /// The file that it turns on.
    #[must_use]
    pub fn path(&self) -> &std::path::Path {
        match self {
            Self::LockHolder { path }
            | Self::Marker { path }
            | Self::Cgroup { path, .. }
            | Self::Permitted { lock: path, .. } => path,
        }
    }
}

/// The first end counts; a marker that is there already stays as it is.
fn mark(path: &std::path::Path) -> io::Result<()> {
    use std::io::Write as _;
    if path.exists() {
        return Ok(());
    }
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    let text = since.as_micros().to_string();
    let partial = path.with_extension("partial");
    let mut file = match std::fs::File::create(&partial) {
        // Where there is no directory there is no instance.
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
        other => other?,
    };
    file.write_all(text.as_bytes())?;
    std::fs::rename(&partial, path)
}

#[cfg(target_os = "linux")]
mod cgroup;

#[cfg(not(target_os = "linux"))]
mod cgroup {
    //! Elsewhere there are no control groups.

    use std::io;
    use std::path::Path;

    pub(super) fn processes(_group: &Path) -> io::Result<Vec<i32>> {
        Ok(Vec::new())
    }

    pub(super) fn kill(_group: &Path) -> io::Result<usize> {
        Err(io::Error::from(io::ErrorKind::Unsupported))
    }
}

#[cfg(target_os = "linux")]
mod holder {
    //! The process that has a locked file as its standard input.

    use std::collections::HashMap;
    use std::fs::{self, File};
    use std::io;
    use std::os::fd::OwnedFd;
    use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
    use std::path::Path;
    use std::time::Duration;

    use rustix::event::{PollFd, PollFlags, Timespec, poll};
    use rustix::fs::{FlockOperation, OFlags};
    use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

    use super::{Outcome, Zeal};

    /// How long killed processes may take to be gone before the try is given up; below a second.
    const GONE_WITHIN: Duration = Duration::from_millis(200);

    /// Whether nobody holds the lock. Asked with a shared lock, so that those who ask do not disturb each other.
    pub(super) fn is_free(path: &Path) -> io::Result<bool> {
        // A lock may be a pipe that nobody writes to, which is no reason to wait.
        let nonblocking = i32::try_from(OFlags::NONBLOCK.bits()).unwrap_or_default();
        let file = match File::options().read(true).custom_flags(nonblocking).open(path) {
            Ok(file) => file,
            // Never started, or deleted, which precedes its end.
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(true),
            Err(e) => return Err(e),
        };
        match rustix::fs::flock(&file, FlockOperation::NonBlockingLockShared) {
            Ok(()) => Ok(true),
            Err(rustix::io::Errno::WOULDBLOCK) => Ok(false),
            Err(e) => Err(e.into()),
        }
    }

    /// Kills whoever has one of these locks, and waits a moment for all of them.
    pub(super) fn kill_all(locks: &[(&Path, Zeal)]) -> Vec<io::Result<Outcome>> {
        let taken: Taken = locks.iter().filter_map(|(path, zeal)| Some((held(path)?, *zeal))).collect();
        let killed = if taken.is_empty() { Vec::new() } else { signal(&taken).unwrap_or_default() };
        // A pidfd becomes readable when its process has ended (pidfd_open(2)).
        let deadline = std::time::Instant::now() + GONE_WITHIN;
        for process in &killed {
            let left = deadline.saturating_duration_since(std::time::Instant::now());
            let within = Timespec { tv_sec: 0, tv_nsec: i64::from(left.subsec_nanos()) };
            let _ = poll(&mut [PollFd::new(process, PollFlags::IN)], Some(&within));
        }
        let now = |path: &Path| {
            Ok(match is_free(path)? {
                true => Outcome::Gone,
                false => Outcome::Alive(format!("{} is locked; {} killed", path.display(), killed.len())),
            })
        };
        locks.iter().map(|(path, _)| now(path)).collect()
    }

    /// Locks that somebody holds, by device and inode.
    type Taken = HashMap<(u64, u64), Zeal>;

    fn held(path: &Path) -> Option<(u64, u64)> {
        if is_free(path).unwrap_or(false) {
            return None;
        }
        let file = fs::metadata(path).ok()?;
        Some((file.dev(), file.ino()))
    }

    /// Kills every process that holds one of these; this one is spared.
    fn signal(taken: &Taken) -> io::Result<Vec<OwnedFd>> {
        let own = i32::try_from(std::process::id()).unwrap_or_default();
        let is_taken = |file: &fs::Metadata, anywhere: bool| {
            let zeal = taken.get(&(file.dev(), file.ino()));
            zeal.is_some_and(|zeal| !anywhere || *zeal == Zeal::Everyone)
        };
        let thorough = taken.values().any(|zeal| *zeal == Zeal::Everyone);
        let holds = |pid: i32| {
            if fs::metadata(format!("/proc/{pid}/fd/0")).is_ok_and(|file| is_taken(&file, false)) {
                return true;
            }
            let is_one = |fd: io::Result<fs::DirEntry>| {
                fd.is_ok_and(|fd| fs::metadata(fd.path()).is_ok_and(|file| is_taken(&file, true)))
            };
            thorough && fs::read_dir(format!("/proc/{pid}/fd")).is_ok_and(|mut all| all.any(is_one))
        };
        let mut killed = Vec::new();
        for entry in fs::read_dir("/proc")? {
            let pid = entry?.file_name().to_str().and_then(|name| name.parse::<i32>().ok());
            let Some(pid) = pid.filter(|pid| *pid != own && holds(*pid)) else { continue };
            let Some(process) = Pid::from_raw(pid).and_then(|raw| pidfd_open(raw, PidfdFlags::empty()).ok())
            else {
                continue;
            };
            // Looked at once more now that the descriptor can mean no other process.
            if holds(pid) && pidfd_send_signal(&process, Signal::KILL).is_ok() {
                killed.push(process);
            }
        }
        Ok(killed)
    }
}

#[cfg(not(target_os = "linux"))]
mod holder {
    //! Elsewhere nothing tells who holds a lock.

    use std::io;
    use std::path::Path;

    use super::{Outcome, Zeal};

    pub(super) fn is_free(path: &Path) -> io::Result<bool> {
        Ok(!path.exists())
    }

    pub(super) fn kill_all(locks: &[(&Path, Zeal)]) -> Vec<io::Result<Outcome>> {
        let kill = |(path, _): &(&Path, Zeal)| match path.exists() {
            true => Err(io::Error::from(io::ErrorKind::Unsupported)),
            false => Ok(Outcome::Gone),
        };
        locks.iter().map(kill).collect()
    }
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use std::process::{Command, Stdio};

    use rustix::fs::FlockOperation;

    use super::*;

    fn locked(path: &std::path::Path) -> std::fs::File {
        let file = std::fs::OpenOptions::new().create(true).append(true).read(true).open(path).unwrap();
        rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive).unwrap();
        file
    }

    #[test]
    fn the_holder_of_a_lock_is_killed_and_nobody_else() {
        let dir = std::env::temp_dir().join(format!("hv-fence-{}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        let (one, other) = (dir.join("one"), dir.join("other"));
        let sleep = |path: &std::path::Path| {
            Command::new("sleep").arg("60").stdin(Stdio::from(locked(path))).spawn().unwrap()
        };
        let (mut a, mut b) = (sleep(&one), sleep(&other));
        let target = FenceTarget::LockHolder { path: one };
        assert_eq!(may_run(&target), Some(true));
        assert_eq!(kill(&target, Zeal::Instance), Outcome::Gone);
        assert_eq!(may_run(&target), Some(false));
        assert_eq!(kill(&target, Zeal::Instance), Outcome::Gone);
        assert!(!a.wait().unwrap().success());
        assert!(b.try_wait().unwrap().is_none());
        assert_eq!(kill(&FenceTarget::LockHolder { path: other }, Zeal::Everyone), Outcome::Gone);
        b.wait().unwrap();
        std::fs::remove_dir_all(&dir).unwrap();
    }

    #[test]
    fn a_lock_that_no_instance_holds_is_not_taken_for_an_end() {
        let path = std::env::temp_dir().join(format!("hv-fence-held-{}", std::process::id()));
        let held = locked(&path);
        let target = FenceTarget::LockHolder { path: path.clone() };
        assert!(matches!(kill(&target, Zeal::Instance), Outcome::Alive(_)));
        drop(held);
        assert_eq!(kill(&target, Zeal::Instance), Outcome::Gone);
        std::fs::remove_file(&path).unwrap();
        assert_eq!(kill(&target, Zeal::Instance), Outcome::Gone);
    }

    #[test]
    fn a_permit_is_withdrawn_before_the_lock_is_looked_at() {
        let dir = std::env::temp_dir().join(format!("hv-fence-permit-{}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        let (lock, permit) = (dir.join("lock"), dir.join("permit"));
        std::fs::write(&permit, "").unwrap();
        let mut child = Command::new("sleep").arg("60").stdin(Stdio::from(locked(&lock))).spawn().unwrap();
        let target = FenceTarget::Permitted { lock, permit: permit.clone() };
        assert_eq!(may_run(&target), Some(true));
        assert_eq!(kill(&target, Zeal::Instance), Outcome::Gone);
        assert!(!permit.exists());
        assert!(!child.wait().unwrap().success());
        // A permit that cannot be taken away is a start that cannot be ruled out.
        std::fs::create_dir(&permit).unwrap();
        assert!(matches!(kill(&target, Zeal::Instance), Outcome::Alive(_)));
        std::fs::remove_dir_all(&dir).unwrap();
        assert_eq!(kill(&target, Zeal::Instance), Outcome::Gone);
    }

    #[test]
    fn a_target_of_this_release_can_be_read_by_the_next() {
        let text = r#"{"kind":"lock_holder","path":"/x/lock"}"#;
        let target: FenceTarget = serde_json::from_str(text).unwrap();
        assert_eq!(target, FenceTarget::LockHolder { path: "/x/lock".into() });
        assert_eq!(serde_json::to_string(&target).unwrap(), text);
    }
}
