//! Preparing an instance: its disks, its seed, and last its configuration.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use hv_driver::InstanceConfig;
use hv_telemetry::crash::{self, Point};
use hv_types::{DiskSpec, InstanceSpec};

use crate::files::{CONFIG, InstanceDir, SEED, StateDir, Stored, StoredDisk, settle, write_atomically};
use crate::images::{Base, Boot, Format};
use crate::problem::{Outcome, Problem};
use crate::seed;

/// Most cores that QEMU's x86 machines take.
const MAX_CORES: u32 = 255;
/// How much of a serial number virtio-blk passes on (virtio 1.2, 5.2.6: `VIRTIO_BLK_ID_BYTES`).
const MAX_SERIAL_BYTES: usize = 20;
/// Networks that name the one this driver has: user-mode networking.
const OWN_NETWORKS: [&str; 3] = ["", "default", "user"];

/// What of a specification this driver cannot do: the operation it would be and why not.
pub(crate) fn unsupported(spec: &InstanceSpec) -> Option<(&'static str, String)> {
    let network = spec.network.as_ref();
    if let Some(network) = network.filter(|network| !OWN_NETWORKS.contains(&network.network_id.as_str())) {
        let reason =
            format!("spec.network.network_id `{}`: it has user-mode networking only", network.network_id);
        return Some(("connect an instance to that network", reason));
    }
    if network.is_some_and(|n| !n.security_groups.is_empty() || !n.subnet_id.is_empty() || n.assign_public_ip)
    {
        let reason = "spec.network: user-mode networking has no subnets, security groups or public addresses";
        return Some(("connect an instance so", reason.to_owned()));
    }
    if !spec.volume_mounts.is_empty() {
        return Some((
            "mount volumes",
            "spec.volume_mounts: use spec.disks for a virtual machine".to_owned(),
        ));
    }
    if !spec.command.is_empty() || !spec.args.is_empty() || !spec.env.is_empty() {
        let reason =
            "spec.command, spec.args and spec.env are for containers; use spec.user_data or spec.kernel_args";
        return Some(("run a command instead of a guest system", reason.to_owned()));
    }
    if spec.limits.is_some_and(|limits| limits != hv_types::ResourceLimits::default()) {
        return Some((
            "enforce limits",
            "spec.limits: a virtual machine is bounded by cpu_cores and memory_bytes".to_owned(),
        ));
    }
    None
}

/// What this node can never run.
pub(crate) fn check(spec: &InstanceSpec, boot: &Boot) -> Result<(), String> {
    if spec.cpu_cores == 0 || spec.cpu_cores > MAX_CORES {
        return Err(format!(
            "spec.cpu_cores must be between 1 and {MAX_CORES} on this node; got {}",
            spec.cpu_cores
        ));
    }
    let boot_disk = spec.disks.iter().find(|disk| disk.boot);
    match (boot_disk, &boot.disk) {
        (Some(disk), Some(base)) if disk.size_bytes != 0 && disk.size_bytes < base.size_bytes => {
            let (asked, least) = (disk.size_bytes, base.size_bytes);
            Err(format!(
                "spec.disks[{}].size_bytes must be at least the image's {least} bytes; got {asked}",
                disk.name
            ))
        }
        (Some(disk), None) if disk.size_bytes == 0 => {
            Err(format!("spec.disks[{}].size_bytes must be given, because the image has no disk", disk.name))
        }
        _ => Ok(()),
    }
}

/// Makes everything anew that an earlier attempt may have left in part, and marks it complete.
pub(crate) async fn prepare(
    state: &StateDir,
    config: &InstanceConfig,
    boot: &Boot,
    qemu_img: Option<PathBuf>,
) -> Outcome<()> {
    let path = state.make(&config.id)?;
    crash::reach(Point::QemuCreateAfterDir);
    let dir = InstanceDir::open(path.clone()).map_err(Problem::file("open", &path))?;
    let plan = plan_disks(&config.spec, boot);
    if !plan.is_empty() {
        let qemu_img = qemu_img.unwrap_or_else(|| PathBuf::from("qemu-img"));
        for disk in &plan {
            make_disk(&qemu_img, &dir, disk).await?;
        }
    }
    crash::reach(Point::QemuCreateAfterDisk);
    let mut disks: Vec<_> = plan.into_iter().map(|disk| disk.stored).collect();
    if boot.disk.is_some() || !config.spec.user_data.is_empty() {
        let volume = seed::volume(config).map_err(Problem::file("make", &dir.file(SEED)))?;
        write_atomically(&dir.file(SEED), &volume)?;
        disks.push(StoredDisk {
            file: SEED.to_owned(),
            format: Format::Raw,
            serial: "cidata".to_owned(),
            read_only: true,
        });
    }
    let stored = Stored {
        version: Stored::VERSION,
        config: config.clone(),
        kernel: boot.kernel.clone(),
        initrd: boot.initrd.clone(),
        cmdline: boot.cmdline.clone(),
        disks,
    };
    dir.write(CONFIG, &stored)
}

struct PlannedDisk<'a> {
    stored: StoredDisk,
    base: Option<&'a Base>,
    size_bytes: u64,
}

fn plan_disks<'a>(spec: &InstanceSpec, boot: &'a Boot) -> Vec<PlannedDisk<'a>> {
    let asked = spec.disks.iter().find(|disk| disk.boot);
    let mut plan = Vec::new();
    if let Some(base) = &boot.disk {
        let size_bytes = asked.map_or(0, |disk| disk.size_bytes).max(base.size_bytes);
        let stored = qcow2("boot.qcow2", asked.map_or("boot", |disk| &disk.name));
        plan.push(PlannedDisk { stored, base: Some(base), size_bytes });
    }
    let is_extra = |disk: &&DiskSpec| !(disk.boot && boot.disk.is_some());
    for (index, disk) in spec.disks.iter().filter(is_extra).enumerate() {
        let stored = qcow2(&format!("disk{index}.qcow2"), &disk.name);
        plan.push(PlannedDisk { stored, base: None, size_bytes: disk.size_bytes });
    }
    plan
}

fn qcow2(file: &str, name: &str) -> StoredDisk {
    let serial = name.chars().filter(char::is_ascii_graphic).take(MAX_SERIAL_BYTES).collect();
    StoredDisk { file: file.to_owned(), format: Format::Qcow2, serial, read_only: false }
}

async fn make_disk(qemu_img: &Path, dir: &InstanceDir, disk: &PlannedDisk<'_>) -> Outcome<()> {
    let partial = format!("{}.partial", disk.stored.file);
    let mut command = tokio::process::Command::new(qemu_img);
    command.current_dir(&dir.path).args(["create", "-q", "-f", "qcow2"]);
    if let Some(base) = disk.base {
        command.arg("-b").arg(&base.path).args(["-F", base.format.name()]);
    }
    // Both are plain names of our own, and qemu-img rounds sizes up to whole sectors.
    command.arg(&partial).arg(disk.size_bytes.to_string());
    run_tool(command, "qemu-img").await?;
    let path = dir.file(&partial);
    fs::File::open(&path).and_then(|file| file.sync_all()).map_err(Problem::file("flush", &path))?;
    settle(&path, &dir.file(&disk.stored.file))
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
