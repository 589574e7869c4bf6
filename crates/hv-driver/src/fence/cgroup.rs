//! Everything that runs in a control group, killed (cgroups(7)).
//!
//! A process cannot leave its control group without rights that no instance has, and what it forks is born in it.

use std::fs::{self, OpenOptions};
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

/// How long killed processes may take to be gone before the try is given up; below a second.
const GONE_WITHIN: Duration = Duration::from_millis(200);
/// Most groups of one instance that are looked at.
const MAX_GROUPS: usize = 4096;

/// The processes in a group and in those below it. None where there is no such group.
pub(super) fn processes(group: &Path) -> io::Result<Vec<i32>> {
    let mut found = Vec::new();
    for dir in groups(group)? {
        let listed = match fs::read_to_string(dir.join("cgroup.procs")) {
            Ok(listed) => listed,
            // ENODEV: the group was removed while it was read.
            Err(e) if e.kind() == io::ErrorKind::NotFound || e.raw_os_error() == Some(19) => continue,
            Err(e) => return Err(e),
        };
        found.extend(listed.lines().filter_map(|line| line.trim().parse::<i32>().ok()));
    }
    Ok(found)
}

/// Kills them all, once, and waits a moment. How many were killed.
pub(super) fn kill(group: &Path) -> io::Result<usize> {
    let mut killed = Vec::new();
    for pid in processes(group)? {
        let process = Pid::from_raw(pid).and_then(|raw| pidfd_open(raw, PidfdFlags::empty()).ok());
        let Some(process) = process else { continue };
        killed.push((pid, process));
    }
    // Looked at once more now that the descriptors can mean no other processes.
    let still = processes(group)?;
    killed.retain(|(pid, process)| still.contains(pid) && pidfd_send_signal(process, Signal::KILL).is_ok());
    thaw(group)?;
    let deadline = Instant::now() + GONE_WITHIN;
    for (_, process) in &killed {
        let left = deadline.saturating_duration_since(Instant::now());
        let within = Timespec { tv_sec: 0, tv_nsec: i64::from(left.subsec_nanos()) };
        // A pidfd becomes readable when its process has ended (pidfd_open(2)).
        let _ = poll(&mut [PollFd::new(process, PollFlags::IN)], Some(&within));
    }
    Ok(killed.len())
}

/// In version 1 what is frozen dies only when it thaws, and then before its next instruction.
fn thaw(group: &Path) -> io::Result<()> {
    for dir in groups(group)? {
        let state = dir.join("freezer.state");
        match OpenOptions::new().write(true).open(&state) {
            Ok(mut file) => file.write_all(b"THAWED")?,
            Err(e) if e.kind() == io::ErrorKind::NotFound => {}
            Err(e) => return Err(e),
        }
    }
    Ok(())
}

fn groups(group: &Path) -> io::Result<Vec<PathBuf>> {
    let mut found = vec![group.to_owned()];
    let mut next = 0;
    while let Some(dir) = found.get(next).cloned() {
        next += 1;
        let entries = match fs::read_dir(&dir) {
            Ok(entries) => entries,
            Err(e) if e.kind() == io::ErrorKind::NotFound => continue,
            Err(e) => return Err(e),
        };
        for entry in entries.flatten() {
            if found.len() < MAX_GROUPS && entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                found.push(entry.path());
            }
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::super::{FenceTarget, Outcome, Zeal, kill, may_run};
    use super::*;

    /// A group of the test's own, where this machine lets it make one.
    fn group() -> Option<PathBuf> {
        let parents = ["/sys/fs/cgroup/freezer", "/sys/fs/cgroup"];
        let parent = parents.iter().map(Path::new).find(|dir| dir.join("cgroup.procs").exists())?;
        let dir = parent.join(format!("hv-fence-test-{}", std::process::id()));
        fs::create_dir(&dir).ok()?;
        Some(dir)
    }

    #[test]
    fn what_runs_in_a_group_is_killed_even_frozen() {
        let Some(group) = group() else {
            eprintln!("skipped: no control groups can be made here");
            return;
        };
        let lock = std::env::temp_dir().join(format!("hv-fence-group-{}", std::process::id()));
        let target = FenceTarget::Cgroup { path: group.clone(), lock };
        assert_eq!(may_run(&target), Some(false));
        let mut child = Command::new("sleep").arg("60").spawn().unwrap();
        fs::write(group.join("cgroup.procs"), child.id().to_string()).unwrap();
        assert_eq!(may_run(&target), Some(true));
        if group.join("freezer.state").exists() {
            fs::write(group.join("freezer.state"), "FROZEN").unwrap();
        } else {
            fs::write(group.join("cgroup.freeze"), "1").unwrap();
        }
        assert_eq!(kill(&target, Zeal::Instance), Outcome::Gone);
        assert!(!child.wait().unwrap().success());
        assert_eq!(may_run(&target), Some(false));
        fs::remove_dir(&group).unwrap();
        assert_eq!(kill(&target, Zeal::Instance), Outcome::Gone);
    }

    #[test]
    fn a_group_that_is_being_started_is_not_taken_for_an_end() {
        let lock = std::env::temp_dir().join(format!("hv-fence-starting-{}", std::process::id()));
        let file = fs::OpenOptions::new().create(true).append(true).read(true).open(&lock).unwrap();
        rustix::fs::flock(&file, rustix::fs::FlockOperation::NonBlockingLockExclusive).unwrap();
        let target = FenceTarget::Cgroup { path: "/sys/fs/cgroup/no-such-group".into(), lock: lock.clone() };
        assert_eq!(may_run(&target), Some(true));
        assert!(matches!(kill(&target, Zeal::Instance), Outcome::Alive(_)));
        drop(file);
        assert_eq!(kill(&target, Zeal::Instance), Outcome::Gone);
        fs::remove_file(&lock).unwrap();
    }
}
