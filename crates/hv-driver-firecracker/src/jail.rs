//! How a VMM is started: through the jailer, which gives it a user, a root directory, a cgroup and a network namespace
//! of its own, or directly.
//!
//! The jailer *becomes* the VMM (execve(2), same process, same standard input), as it is not told to make a PID namespace
//! or a daemon: so the lock that is its standard input is the VMM's.

use std::fs;
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use hv_types::{InstanceId, ResourceLimits};
use rustix::fs::AtFlags;
use rustix::process::{Gid, Uid};
use tokio::process::Command;

use crate::FirecrackerOptions;
use crate::files::{
    API_SOCKET, INITRD, InstanceDir, KERNEL, LOG, METRICS, Stored, VSOCK_SOCKET, jail_id, remove_file,
    remove_tree, root_of,
};
use crate::platform::Platform;
use crate::problem::{Outcome, Problem};
use crate::rescue::{RESCUE_INITRD, RESCUE_KERNEL};

/// The cgroup below which each jailed VMM has one.
const PARENT_CGROUP: &str = "hypervisor-microvm";
/// Where cgroups are.
const CGROUPS: &str = "/sys/fs/cgroup";
/// The controllers of version 1 whose bounds are set here.
const CONTROLLERS: [&str; 2] = ["cpu", "memory"];
/// The largest API body and metadata: what the longest user data becomes when each byte is escaped.
const MAX_BODY_BYTES: usize = 6 * hv_types::instance::spec::MAX_USER_DATA_BYTES + (64 << 10);

/// Makes the root where the jailer will look for it.
pub(crate) fn make_root(dir: &InstanceDir, id: &InstanceId) -> Outcome<PathBuf> {
    let root = root_of(dir, id);
    let made = fs::DirBuilder::new().recursive(true).mode(0o700).create(&root);
    made.map_err(Problem::file("make", &root))?;
    Ok(root)
}

/// Moves the root to where a VMM of this name has it, and takes away what the last one left in it.
pub(crate) fn prepare_root(dir: &InstanceDir, stored: &Stored, platform: &Platform) -> Outcome<PathBuf> {
    let id = &stored.config.id;
    let wanted = dir.file("jail").join(platform.exec_name());
    let root = root_of(dir, id);
    let present = root.ancestors().nth(2).unwrap_or(&root).to_owned();
    if present != wanted {
        fs::rename(&present, &wanted).map_err(Problem::file("rename", &present))?;
    }
    let root = root_of(dir, id);
    // The jailer refuses to make devices that are there. A vsock's socket that is there fails the load of a snapshot.
    for name in ["dev", "run", "proc", "sys"] {
        remove_tree(&root.join(name))?;
    }
    for name in [API_SOCKET, VSOCK_SOCKET, LOG, METRICS, platform.exec_name(), "firecracker.pid"] {
        remove_file(&root.join(name))?;
    }
    // Firecracker opens both, and makes neither.
    for name in [LOG, METRICS] {
        let path = root.join(name);
        let made = fs::OpenOptions::new().create_new(true).write(true).mode(0o600).open(&path);
        made.map_err(Problem::file("make", &path))?;
    }
    if platform.jailer.is_some() {
        let disks = stored.disks.iter().map(|disk| disk.file.as_str());
        for name in disks.chain([KERNEL, INITRD, RESCUE_KERNEL, RESCUE_INITRD, LOG, METRICS]) {
            give(&root.join(name), stored.uid)?;
        }
    }
    Ok(root)
}

/// Gives a file to a user. What is not there need not be given.
pub(crate) fn give(path: &Path, uid: u32) -> Outcome<()> {
    let (user, group) = (Some(Uid::from_raw(uid)), Some(Gid::from_raw(uid)));
    match rustix::fs::chownat(rustix::fs::CWD, path, user, group, AtFlags::SYMLINK_NOFOLLOW) {
        Err(e) if e != rustix::io::Errno::NOENT => Err(Problem::file("give away", path)(e.into())),
        _ => Ok(()),
    }
}

/// The command that becomes the VMM. Its directories must be there.
pub(crate) fn command(
    options: &FirecrackerOptions,
    platform: &Platform,
    dir: &InstanceDir,
    stored: &Stored,
    root: &Path,
) -> Command {
    let id = jail_id(&stored.config.id);
    let mut command = match &platform.jailer {
        None => Command::new(&platform.binary),
        Some(jailer) => {
            let mut command = Command::new(jailer);
            let uid = stored.uid.to_string();
            command.args(["--id", &id, "--uid", &uid, "--gid", &uid, "--exec-file"]).arg(&platform.binary);
            command.arg("--chroot-base-dir").arg(dir.file("jail"));
            if let Some(netns) = &options.netns {
                command.arg("--netns").arg(netns);
            }
            let bounds = cgroup_bounds(stored.config.spec.limits.as_ref(), is_unified());
            if !bounds.is_empty() {
                let version = if is_unified() { "2" } else { "1" };
                command.args(["--cgroup-version", version, "--parent-cgroup"]);
                command.arg(format!("{PARENT_CGROUP}/{}", stored.config.id));
                for bound in bounds {
                    command.arg("--cgroup").arg(bound);
                }
            }
            command.arg("--");
            command
        }
    };
    if platform.jailer.is_none() {
        command.args(["--id", &id]);
    }
    let bytes = MAX_BODY_BYTES.to_string();
    command.args(["--api-sock", API_SOCKET, "--log-path", LOG, "--level", "Info", "--show-level"]);
    command.args(["--http-api-max-payload-size", &bytes, "--mmds-size-limit", &bytes]);
    command.current_dir(root);
    command
}

/// Whether the node has cgroups of version 2 only.
fn is_unified() -> bool {
    Path::new(CGROUPS).join("cgroup.controllers").exists()
}

/// What cannot be bounded here, and why.
pub(crate) fn unbounded(limits: &ResourceLimits, is_jailed: bool) -> Option<String> {
    let by_cgroup = limits.cpu_quota > 0 || limits.memory_limit > 0 || limits.memory_swap > 0;
    if limits.pids > 0 {
        return Some(
            "spec.limits.pids: the processes of a guest are its own kernel's; bound them there".into(),
        );
    }
    if by_cgroup && !is_jailed {
        return Some(
            "spec.limits: processor time and memory are bounded by the jailer's cgroup, and this node does \
                     not jail (drivers.firecracker.use_jailer)"
                .into(),
        );
    }
    let missing = CONTROLLERS.iter().find(|name| !Path::new(CGROUPS).join(name).is_dir());
    match missing {
        Some(name) if by_cgroup && !is_unified() => {
            Some(format!("spec.limits: there is no cgroup controller `{name}` in {CGROUPS}; mount it"))
        }
        _ => None,
    }
}

/// What the jailer writes into the cgroup. Swap of version 1 counts with memory, of version 2 beside it.
fn cgroup_bounds(limits: Option<&ResourceLimits>, is_unified: bool) -> Vec<String> {
    /// The kernel's own period, in microseconds.
    const PERIOD: i64 = 100_000;
    let Some(limits) = limits else { return Vec::new() };
    let mut bounds = Vec::new();
    let period = if limits.cpu_period > 0 { limits.cpu_period } else { PERIOD };
    match (limits.cpu_quota, is_unified) {
        (..=0, _) => {}
        (quota, true) => bounds.push(format!("cpu.max={quota} {period}")),
        (quota, false) => {
            bounds.push(format!("cpu.cfs_period_us={period}"));
            bounds.push(format!("cpu.cfs_quota_us={quota}"));
        }
    }
    if limits.memory_limit > 0 {
        let name = if is_unified { "memory.max" } else { "memory.limit_in_bytes" };
        bounds.push(format!("{name}={}", limits.memory_limit));
    }
    match (limits.memory_swap, is_unified) {
        (..=0, _) => {}
        (both, true) => bounds.push(format!("memory.swap.max={}", (both - limits.memory_limit).max(0))),
        (both, false) => bounds.push(format!("memory.memsw.limit_in_bytes={both}")),
    }
    bounds
}

/// Removes the cgroups of an instance that does not run.
pub(crate) fn remove_cgroups(id: &InstanceId) {
    let top = Path::new(CGROUPS);
    let controllers = CONTROLLERS.map(|name| top.join(name));
    for hierarchy in controllers.iter().map(PathBuf::as_path).chain([top]) {
        let parent = hierarchy.join(PARENT_CGROUP).join(id.as_str());
        for dir in [parent.join(jail_id(id)), parent] {
            match fs::remove_dir(&dir) {
                Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
                    tracing::warn!(error = %e, cgroup = %dir.display(), "a cgroup stays behind");
                }
                _ => {}
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_become_bounds_of_either_version() {
        let limits = ResourceLimits {
            cpu_quota: 50_000,
            memory_limit: 1 << 30,
            memory_swap: 3 << 30,
            ..Default::default()
        };
        let v1 = [
            "cpu.cfs_period_us=100000",
            "cpu.cfs_quota_us=50000",
            "memory.limit_in_bytes=1073741824",
            "memory.memsw.limit_in_bytes=3221225472",
        ];
        let v2 = ["cpu.max=50000 100000", "memory.max=1073741824", "memory.swap.max=2147483648"];
        assert_eq!(cgroup_bounds(Some(&limits), false), v1);
        assert_eq!(cgroup_bounds(Some(&limits), true), v2);
        assert!(cgroup_bounds(Some(&ResourceLimits::default()), false).is_empty());
    }
}
