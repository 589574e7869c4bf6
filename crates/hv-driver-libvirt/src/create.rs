//! Preparing an instance: its disks, its seed, and last its configuration.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use hv_driver::{DiskFormat, InstanceConfig, Storage};
use hv_machine::images::{Base, Boot};
use hv_machine::seed;
use hv_types::instance::spec::Firmware;
use hv_types::{DiskSpec, InstanceSpec};

use crate::domain::MAX_CORES;
use crate::files::{CONFIG, DIR_MODE, InstanceDir, LOCK, SEED, StateDir, Stored, StoredDisk, settle, write_atomically};
use crate::node::Node;
use crate::problem::{Outcome, Problem};
use crate::rescue::{RESCUE_DISK, StoredRescue};

/// How much of a serial number virtio-blk passes on (virtio 1.2, 5.2.6: `VIRTIO_BLK_ID_BYTES`).
const MAX_SERIAL_BYTES: usize = 20;
/// What user-mode networking is called.
pub(crate) const USER_NETWORK: &str = "user";

/// What of a specification this driver cannot do: the operation it would be and why not.
pub(crate) fn unsupported(spec: &InstanceSpec) -> Option<(&'static str, String)> {
    let network = spec.network.as_ref();
    if network.is_some_and(|n| !n.security_groups.is_empty() || !n.subnet_id.is_empty() || n.assign_public_ip)
    {
        let reason = "spec.network: a libvirt network has no subnets, security groups or public addresses";
        return Some(("connect an instance so", reason.to_owned()));
    }
    if !spec.volume_mounts.is_empty() {
        let reason = "spec.volume_mounts: use spec.disks for a virtual machine";
        return Some(("mount volumes", reason.to_owned()));
    }
    if !spec.command.is_empty() || !spec.args.is_empty() || !spec.env.is_empty() {
        let reason =
            "spec.command, spec.args and spec.env are for containers; use spec.user_data or spec.kernel_args";
        return Some(("run a command instead of a guest system", reason.to_owned()));
    }
    if spec.limits.is_some_and(|limits| limits != hv_types::ResourceLimits::default()) {
        let reason = "spec.limits: a virtual machine is bounded by cpu_cores and memory_bytes";
        return Some(("enforce limits", reason.to_owned()));
    }
    None
}

/// What this node can never run.
pub(crate) fn check(spec: &InstanceSpec, boot: &Boot, node: &Node) -> Result<(), String> {
    if spec.cpu_cores == 0 || spec.cpu_cores > MAX_CORES {
        let asked = spec.cpu_cores;
        return Err(format!("spec.cpu_cores must be between 1 and {MAX_CORES} on this node; got {asked}"));
    }
    if spec.firmware == Some(Firmware::Uefi) && !node.has_uefi {
        return Err("spec.firmware: this node has no UEFI; apt-get install ovmf, or use `bios`".to_owned());
    }
    if spec.tpm && !node.has_tpm {
        return Err("spec.tpm: this node has no swtpm; apt-get install swtpm swtpm-tools".to_owned());
    }
    let boot_disk = spec.disks.iter().find(|disk| disk.boot);
    match (boot_disk, &boot.disk) {
        (Some(disk), Some(base)) if disk.size_bytes != 0 && disk.size_bytes < base.size_bytes => {
            let (asked, least) = (disk.size_bytes, base.size_bytes);
            let name = &disk.name;
            Err(format!("spec.disks[{name}].size_bytes must be at least the image's {least} bytes; got {asked}"))
        }
        (Some(disk), None) if disk.size_bytes == 0 => {
            Err(format!("spec.disks[{}].size_bytes must be given, because the image has no disk", disk.name))
        }
        _ => Ok(()),
    }
}

/// What the boot disk is called.
pub(crate) const BOOT_TARGET: &str = "vda";

/// What is decided before anything is made.
pub(crate) struct Plan<'a> {
    pub(crate) config: &'a InstanceConfig,
    pub(crate) boot: Boot,
    /// What it boots from while it is in rescue.
    pub(crate) rescue: Option<StoredRescue>,
    pub(crate) network: Option<String>,
    /// Where disks are made if not in the instance's directory.
    pub(crate) disk_dir: Option<PathBuf>,
    /// How its disks come from another node, if it does.
    pub(crate) incoming: Option<Storage>,
}

/// Makes everything anew that an earlier attempt may have left in part, and marks it complete.
pub(crate) async fn prepare(state: &StateDir, plan: &Plan<'_>, node: &Node) -> Outcome<Stored> {
    let config = plan.config;
    let path = state.make(&config.id, DIR_MODE)?;
    let dir = InstanceDir::at(path);
    dir.touch(LOCK, 0o600)?;
    std::os::unix::fs::chown(dir.file(LOCK), Some(node.owner.0), Some(node.owner.1))
        .map_err(Problem::file("hand over", &dir.file(LOCK)))?;
    let place = match &plan.disk_dir {
        Some(pool) => {
            fs::create_dir_all(pool).map_err(Problem::file("make", pool))?;
            fs::set_permissions(pool, fs::Permissions::from_mode(0o711)).map_err(Problem::file("open", pool))?;
            pool.clone()
        }
        None => dir.path.clone(),
    };
    let mut disks = plan_disks(&config.spec, &plan.boot, &place);
    for disk in &mut disks {
        match (plan.incoming, disk.path.exists()) {
            (None, _) => {}
            // They arrive whole.
            (Some(Storage::Copied), false) => disk.base = None,
            (Some(Storage::Shared), true) => continue,
            (Some(Storage::Copied), true) => {
                let reason = format!("{} is there already: do both nodes reach this pool?", disk.path.display());
                return Err(Problem::Unwanted(reason));
            }
            (Some(Storage::Shared), false) => {
                let reason = format!("{} is not there: do both nodes reach this pool?", disk.path.display());
                return Err(Problem::Unwanted(reason));
            }
        }
        make_disk(disk).await?;
    }
    if plan.boot.disk.is_some() || !config.spec.user_data.is_empty() {
        let path = dir.file(SEED);
        let volume = seed::volume(&config.id, &config.name, &config.spec.user_data).map_err(Problem::file("make", &path))?;
        write_atomically(&path, &volume)?;
        disks.push(StoredDisk {
            name: "cidata".to_owned(),
            path,
            format: DiskFormat::Raw,
            base: None,
            serial: "cidata".to_owned(),
            read_only: true,
            target: target("vd", 1),
            size_bytes: volume.len() as u64,
        });
    }
    let uuid = uuid::Uuid::parse_str(config.id.as_str()).unwrap_or_else(|_| uuid::Uuid::new_v4());
    let stored = Stored {
        version: Stored::VERSION,
        config: config.clone(),
        uuid,
        mac: mac(uuid),
        network: plan.network.clone(),
        kernel: plan.boot.kernel.clone(),
        initrd: plan.boot.initrd.clone(),
        cmdline: plan.boot.cmdline.clone(),
        disks,
        disk_dir: plan.disk_dir.clone(),
        rescue: plan.rescue.clone(),
    };
    dir.write(CONFIG, &stored)?;
    Ok(stored)
}

/// An address of our own (locally administered, in the range that QEMU's cards use), as stable as the id.
fn mac(uuid: uuid::Uuid) -> String {
    let [.., a, b, c] = *uuid.as_bytes();
    format!("52:54:00:{a:02x}:{b:02x}:{c:02x}")
}

/// The boot disk is `vda`, the others are `sda` and so on, in the specification's order.
fn plan_disks(spec: &InstanceSpec, boot: &Boot, place: &Path) -> Vec<StoredDisk> {
    let asked = spec.disks.iter().find(|disk| disk.boot);
    let mut plan = Vec::new();
    if let Some(base) = &boot.disk {
        let size_bytes = asked.map_or(0, |disk| disk.size_bytes).max(base.size_bytes);
        let name = asked.map_or("boot", |disk| &disk.name);
        plan.push(qcow2(place, "boot.qcow2", name, target("vd", 0), size_bytes, Some(base)));
    } else if let Some(asked) = asked {
        plan.push(qcow2(place, "boot.qcow2", &asked.name, target("vd", 0), asked.size_bytes, None));
    }
    for (index, disk) in spec.disks.iter().filter(|disk| !disk.boot).enumerate() {
        plan.push(extra(place, disk, index));
    }
    plan
}

/// A disk beside the boot disk, as the n-th on its bus.
pub(crate) fn extra(place: &Path, disk: &DiskSpec, index: usize) -> StoredDisk {
    let target = target("sd", index);
    qcow2(place, &format!("{target}.qcow2"), &disk.name, target, disk.size_bytes, None)
}

/// A disk of ours.
fn qcow2(
    place: &Path,
    file: &str,
    name: &str,
    target: String,
    size_bytes: u64,
    base: Option<&Base>,
) -> StoredDisk {
    StoredDisk {
        name: name.to_owned(),
        path: place.join(file),
        format: DiskFormat::Qcow2,
        base: base.map(|base| (base.path.clone(), base.format)),
        serial: serial(name),
        read_only: false,
        target,
        size_bytes,
    }
}

/// The throw-away disk of a machine in rescue.
pub(crate) fn rescue_disk(place: &Path, base: &(PathBuf, DiskFormat, u64)) -> StoredDisk {
    let base = Base { path: base.0.clone(), format: base.1, size_bytes: base.2 };
    qcow2(place, RESCUE_DISK, "rescue", BOOT_TARGET.to_owned(), base.size_bytes, Some(&base))
}

/// What of a name libvirt takes as a serial number.
fn serial(name: &str) -> String {
    let is_allowed = |c: &char| c.is_ascii_alphanumeric() || "-_.+".contains(*c);
    name.chars().filter(is_allowed).take(MAX_SERIAL_BYTES).collect()
}

/// The name of the n-th disk of a bus: `sda` … `sdz`, `sdaa` ….
fn target(bus: &str, index: usize) -> String {
    let letter = |n: usize| char::from(b'a' + u8::try_from(n % 26).unwrap_or(0));
    match index / 26 {
        0 => format!("{bus}{}", letter(index)),
        more => format!("{bus}{}{}", letter(more - 1), letter(index)),
    }
}

/// Makes a disk, or makes it anew.
pub(crate) async fn make_disk(disk: &StoredDisk) -> Outcome<()> {
    let mut partial = disk.path.as_os_str().to_owned();
    partial.push(".partial");
    let partial = PathBuf::from(partial);
    let mut command = tokio::process::Command::new("qemu-img");
    command.args(["create", "-q", "-f", "qcow2"]);
    if let Some((base, format)) = &disk.base {
        command.arg("-b").arg(base).args(["-F", format.name()]);
    }
    command.arg(&partial).arg(disk.size_bytes.to_string());
    run_tool(command, "qemu-img").await?;
    fs::File::open(&partial).and_then(|file| file.sync_all()).map_err(Problem::file("flush", &partial))?;
    settle(&partial, &disk.path)
}

/// Runs a tool to its end.
pub(crate) async fn run_tool(mut command: tokio::process::Command, tool: &str) -> Outcome<Vec<u8>> {
    let remedy = "apt-get install qemu-utils";
    let spawned = command.stdin(Stdio::null()).kill_on_drop(true).output().await;
    let output = spawned.map_err(|source| Problem::Spawn { tool: tool.to_owned(), remedy, source })?;
    if output.status.success() {
        return Ok(output.stdout);
    }
    let stderr = String::from_utf8_lossy(&output.stderr).trim().to_owned();
    Err(Problem::Tool { tool: tool.to_owned(), status: output.status.to_string(), stderr })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn serial_numbers_are_what_libvirt_takes() {
        assert_eq!(serial("data-1"), "data-1");
        assert_eq!(serial("<d>&'\" ü\n"), "d");
        assert_eq!(serial(&"x".repeat(99)).len(), MAX_SERIAL_BYTES);
    }

    #[test]
    fn disks_have_the_names_that_guests_give_them() {
        let names = [(0, "vda"), (25, "vdz"), (26, "vdaa"), (51, "vdaz"), (52, "vdba")];
        for (index, name) in names {
            assert_eq!(target("vd", index), name);
        }
    }
}
