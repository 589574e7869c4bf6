//! Preparing an instance: its root with kernel and disks, and last its configuration.

use std::path::Path;

use hv_driver::InstanceConfig;
use hv_types::{DiskSpec, InstanceSpec, ResourceLimits};

use crate::FirecrackerOptions;
use crate::disks;
use crate::files::{CONFIG, DIR_MODE, INITRD, InstanceDir, KERNEL, StateDir, Stored, StoredDisk};
use crate::images::Boot;
use crate::jail;
use crate::problem::{Outcome, Problem};

/// Most cores of a microVM (`MachineConfiguration.vcpu_count`).
const MAX_CORES: u32 = 32;
/// Networks that name the one this driver has: its bridge.
const OWN_NETWORKS: [&str; 2] = ["", "default"];

/// What of a specification this driver cannot do: the operation it would be and why not.
pub(crate) fn unsupported(
    spec: &InstanceSpec,
    options: &FirecrackerOptions,
    is_jailed: bool,
) -> Option<(&'static str, String)> {
    if let Some(network) = &spec.network {
        let reason = if options.bridge.is_none() {
            "spec.network: this node has no bridge for microVMs; set drivers.firecracker.bridge".to_owned()
        } else if !OWN_NETWORKS.contains(&network.network_id.as_str()) {
            format!("spec.network.network_id `{}`: it knows the node's bridge only", network.network_id)
        } else if !network.security_groups.is_empty()
            || !network.subnet_id.is_empty()
            || network.assign_public_ip
        {
            "spec.network: the node's bridge has no subnets, security groups or public addresses".to_owned()
        } else {
            String::new()
        };
        if !reason.is_empty() {
            return Some(("connect an instance so", reason));
        }
    }
    if (spec.network.is_some() || !spec.user_data.is_empty()) && !rustix::process::geteuid().is_root() {
        let reason = "spec.network and spec.user_data need a tap interface, which takes root";
        return Some(("connect an instance", reason.to_owned()));
    }
    if !spec.volume_mounts.is_empty() {
        return Some(("mount volumes", "spec.volume_mounts: use spec.disks for a microVM".to_owned()));
    }
    if !spec.devices.is_empty() {
        let reason = "spec.devices: firecracker passes no PCI devices on, and this driver binds no processors and pages";
        return Some(("have devices of the node", reason.to_owned()));
    }
    if !spec.user.is_empty() {
        let reason =
            "spec.user: the kernel starts its first process as root; name a command that changes to it";
        return Some(("run as another user", reason.to_owned()));
    }
    if spec.firmware.is_some() || spec.tpm {
        return Some((
            "boot so",
            "spec.firmware and spec.tpm: firecracker boots a kernel directly".to_owned(),
        ));
    }
    let reason = spec.limits.as_ref().and_then(|limits| jail::unbounded(limits, is_jailed))?;
    Some(("enforce limits", reason))
}

/// What this node can never run.
pub(crate) fn check(spec: &InstanceSpec, boot_disk_bytes: Option<u64>) -> Result<(), String> {
    if spec.cpu_cores == 0 || spec.cpu_cores > MAX_CORES {
        return Err(format!(
            "spec.cpu_cores must be between 1 and {MAX_CORES} for a microVM; got {}",
            spec.cpu_cores
        ));
    }
    let limits = spec.limits.unwrap_or_default();
    if limits.memory_limit > 0 && limits.memory_limit.unsigned_abs() < spec.memory_bytes {
        return Err(
            "spec.limits.memory_limit must be at least spec.memory_bytes: the guest has all of it".to_owned()
        );
    }
    let is_negative = |limits: &ResourceLimits| {
        [limits.cpu_quota, limits.cpu_period, limits.memory_swap, limits.io_read_bps, limits.io_write_bps]
            .iter()
            .any(|bound| *bound < 0)
    };
    if is_negative(&limits) {
        return Err("spec.limits must not be negative; 0 is no bound".to_owned());
    }
    match (spec.disks.iter().find(|disk| disk.boot), boot_disk_bytes) {
        (Some(disk), Some(least)) if disk.size_bytes != 0 && disk.size_bytes < least => Err(format!(
            "spec.disks[{}].size_bytes must be at least the image's {least} bytes; got {}",
            disk.name, disk.size_bytes
        )),
        (Some(disk), None) if disk.size_bytes == 0 => {
            Err(format!("spec.disks[{}].size_bytes must be given, because the image has no disk", disk.name))
        }
        _ => Ok(()),
    }
}

/// Makes everything anew that an earlier attempt may have left in part, and marks it complete.
pub(crate) fn prepare(state: &StateDir, config: &InstanceConfig, boot: &Boot, uid: u32) -> Outcome<()> {
    let path = state.make(&config.id, DIR_MODE)?;
    let dir = InstanceDir::open(path.clone()).map_err(Problem::file("open", &path))?;
    let root = jail::make_root(&dir, &config.id)?;
    disks::copy(&boot.kernel, &root.join(KERNEL), 0)?;
    if let Some(initrd) = &boot.initrd {
        disks::copy(initrd, &root.join(INITRD), 0)?;
    }
    let disks = plan(&config.spec, boot.disk.is_some());
    for (disk, size_bytes) in &disks {
        match (&boot.disk, disk.is_root) {
            (Some(image), true) => {
                disks::copy(image, &root.join(&disk.file), size_bytes.next_multiple_of(512))?;
            }
            _ => disks::make_empty(&root.join(&disk.file), *size_bytes)?,
        }
    }
    let disks = disks.into_iter().map(|(disk, _)| disk).collect();
    let has_initrd = boot.initrd.is_some();
    let (config, cmdline) = (config.clone(), boot.cmdline.clone());
    dir.write(CONFIG, &Stored { version: Stored::VERSION, config, cmdline, has_initrd, disks, uid })
}

/// The disks of a specification with their sizes, the image's own first.
pub(crate) fn plan(spec: &InstanceSpec, has_root: bool) -> Vec<(StoredDisk, u64)> {
    let asked = spec.disks.iter().find(|disk| disk.boot);
    let mut plan = Vec::new();
    if has_root {
        let name = asked.map_or("boot", |disk| &disk.name).to_owned();
        let disk = StoredDisk { file: "boot.raw".to_owned(), name, is_root: true };
        plan.push((disk, asked.map_or(0, |disk| disk.size_bytes)));
    }
    let is_extra = |disk: &&DiskSpec| !(disk.boot && has_root);
    for (index, disk) in spec.disks.iter().filter(is_extra).enumerate() {
        let stored = StoredDisk { file: format!("disk{index}.raw"), name: disk.name.clone(), is_root: false };
        plan.push((stored, disk.size_bytes));
    }
    plan
}

/// How large an image's disk is.
pub(crate) fn size_of(path: &Path) -> Outcome<u64> {
    let found = std::fs::metadata(path).map_err(Problem::file("look at", path))?;
    Ok(found.len())
}
