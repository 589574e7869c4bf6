//! Preparing an instance: its disks, its seed, and last its configuration.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use hv_driver::{DiskFormat, InstanceConfig};
use hv_machine::images::{Base, Boot};
use hv_machine::seed;
use hv_telemetry::crash::{self, Point};
use hv_types::{DiskSpec, Firmware, InstanceSpec, ResourceLimits};

use crate::files::{
    BOOT_DISK, CONFIG, DIR_MODE, InstanceDir, OWNS_DISKS, SEED, StateDir, Stored, StoredDisk, UEFI_VARIABLES,
    settle, sync_dir, write_atomically,
};
use crate::problem::{Outcome, Problem};
use crate::rescue::StoredRescue;

/// Most cores that QEMU's x86 machines take.
const MAX_CORES: u32 = 255;
/// How much of a serial number virtio-blk passes on (virtio 1.2, 5.2.6: `VIRTIO_BLK_ID_BYTES`).
const MAX_SERIAL_BYTES: usize = 20;
/// What sizes of disks are multiples of.
const SECTOR_BYTES: u64 = 512;
/// Where distributions put UEFI firmware, and the variables that go with it.
const UEFI: [(&str, &str); 3] = [
    ("/usr/share/OVMF/OVMF_CODE_4M.fd", "/usr/share/OVMF/OVMF_VARS_4M.fd"),
    ("/usr/share/OVMF/OVMF_CODE.fd", "/usr/share/OVMF/OVMF_VARS.fd"),
    ("/usr/share/edk2/ovmf/OVMF_CODE.fd", "/usr/share/edk2/ovmf/OVMF_VARS.fd"),
];
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
    let of_processes = |limits: ResourceLimits| ResourceLimits { io_read_bps: 0, io_write_bps: 0, ..limits };
    if spec.limits.is_some_and(|limits| of_processes(limits) != ResourceLimits::default()) {
        let reason = "spec.limits: a virtual machine is bounded by cpu_cores and memory_bytes; of the limits it has \
                      io_read_bps and io_write_bps";
        return Some(("enforce such limits", reason.to_owned()));
    }
    if spec.tpm {
        let reason = "spec.tpm: it starts no swtpm; use a node with the libvirt driver";
        return Some(("give an instance a trusted platform module", reason.to_owned()));
    }
    if spec.firmware == Some(Firmware::Uefi)
        && let Err(remedy) = uefi()
    {
        return Some(("boot with UEFI", remedy));
    }
    None
}

/// Whether a machine can have so many cores.
pub(crate) fn cores(cores: u32) -> Result<(), String> {
    if cores == 0 || cores > MAX_CORES {
        return Err(format!("spec.cpu_cores must be between 1 and {MAX_CORES} on this node; got {cores}"));
    }
    Ok(())
}

/// What this node can never run.
pub(crate) fn check(spec: &InstanceSpec, boot: &Boot) -> Result<(), String> {
    cores(spec.cpu_cores)?;
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

/// Where the disks of a new instance come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Disks {
    /// From its image, or empty.
    Fresh,
    /// Another node copies them here: they are made empty, and depend on nothing.
    Copied,
    /// They are there, and another node still writes them.
    Shared,
}

/// What preparing needs to know of this node.
#[derive(Clone, Debug)]
pub(crate) struct Tools {
    pub(crate) qemu_img: PathBuf,
    /// Where disks are put, if not in the instance's own directory.
    pub(crate) disk_dir: Option<PathBuf>,
}

/// Makes everything anew that an earlier attempt may have left in part, and marks it complete.
pub(crate) async fn prepare(
    state: &StateDir,
    config: &InstanceConfig,
    boot: &Boot,
    tools: &Tools,
    from: Disks,
    rescue: Option<StoredRescue>,
) -> Outcome<Stored> {
    let path = state.make(&config.id, DIR_MODE)?;
    crash::reach(Point::QemuCreateAfterDir);
    let dir = InstanceDir::open(path.clone()).map_err(Problem::file("open", &path))?;
    let mut disk_dir = tools.disk_dir.as_ref().map(|all| all.join(config.id.as_str()));
    if from == Disks::Copied && !dir.file(OWNS_DISKS).exists() {
        // Both nodes see that directory, and the source's disks are in it.
        disk_dir = disk_dir.filter(|disk_dir| !disk_dir.exists());
    }
    let disks_in = disk_dir.clone().unwrap_or_else(|| path.clone());
    let plan = plan_disks(&config.spec, boot);
    if from != Disks::Shared {
        if let Some(disk_dir) = &disk_dir {
            // Whoever made the disks may remove them.
            dir.append(OWNS_DISKS)?;
            fs::create_dir_all(disk_dir).map_err(Problem::file("make", disk_dir))?;
            sync_dir(disk_dir)?;
        }
        for disk in &plan {
            let base = disk.base.filter(|_| from == Disks::Fresh);
            make_disk(&tools.qemu_img, &disks_in.join(&disk.stored.file), base, disk.stored.size_bytes)
                .await?;
        }
    }
    crash::reach(Point::QemuCreateAfterDisk);
    let mut disks: Vec<_> = plan.into_iter().map(|disk| disk.stored).collect();
    if boot.disk.is_some() || !config.spec.user_data.is_empty() {
        write_seed(&dir, config)?;
        let number = Some(disks.len());
        disks.push(StoredDisk {
            file: SEED.to_owned(),
            format: DiskFormat::Raw,
            serial: "cidata".to_owned(),
            read_only: true,
            number,
            name: String::new(),
            size_bytes: 0,
        });
    }
    let uefi = match config.spec.firmware {
        Some(Firmware::Uefi) => Some(give_uefi(&dir)?),
        Some(Firmware::Bios) | None => None,
    };
    let stored = Stored {
        version: Stored::VERSION,
        config: config.clone(),
        kernel: boot.kernel.clone(),
        initrd: boot.initrd.clone(),
        cmdline: boot.cmdline.clone(),
        disks,
        disk_dir,
        uefi,
        rescue,
    };
    dir.write(CONFIG, &stored)?;
    Ok(stored)
}

/// Writes what tells the guest its name and its user data.
pub(crate) fn write_seed(dir: &InstanceDir, config: &InstanceConfig) -> Outcome<()> {
    let volume = seed::volume(&config.id, &config.name, &config.spec.user_data)
        .map_err(Problem::file("make", &dir.file(SEED)))?;
    write_atomically(&dir.file(SEED), &volume)
}

/// The UEFI firmware of this node and its empty variables; the error is the remedy.
pub(crate) fn uefi() -> Result<(PathBuf, PathBuf), String> {
    let known = UEFI.iter().map(|(code, variables)| (PathBuf::from(code), PathBuf::from(variables)));
    let mut there = known.filter(|(code, variables)| code.is_file() && variables.is_file());
    there
        .next()
        .ok_or_else(|| "spec.firmware: this node has no UEFI firmware; apt-get install ovmf".to_owned())
}

fn give_uefi(dir: &InstanceDir) -> Outcome<PathBuf> {
    let missing = |remedy: String| {
        let source = std::io::Error::new(std::io::ErrorKind::NotFound, remedy);
        Problem::file("copy", Path::new(UEFI_VARIABLES))(source)
    };
    let (code, variables) = uefi().map_err(missing)?;
    let empty = fs::read(&variables).map_err(Problem::file("read", &variables))?;
    write_atomically(&dir.file(UEFI_VARIABLES), &empty)?;
    Ok(code)
}

struct PlannedDisk<'a> {
    stored: StoredDisk,
    base: Option<&'a Base>,
}

fn plan_disks<'a>(spec: &InstanceSpec, boot: &'a Boot) -> Vec<PlannedDisk<'a>> {
    let asked = spec.disks.iter().find(|disk| disk.boot);
    let mut plan = Vec::new();
    if let Some(base) = &boot.disk {
        let size_bytes = asked.map_or(0, |disk| disk.size_bytes).max(base.size_bytes);
        let name = asked.map_or("boot", |disk| &disk.name);
        plan.push(PlannedDisk { stored: qcow2(BOOT_DISK, name, 0, size_bytes), base: Some(base) });
    }
    let is_extra = |disk: &&DiskSpec| !(disk.boot && boot.disk.is_some());
    for (index, disk) in spec.disks.iter().filter(is_extra).enumerate() {
        let stored = qcow2(&format!("disk{index}.qcow2"), &disk.name, plan.len(), disk.size_bytes);
        plan.push(PlannedDisk { stored, base: None });
    }
    plan
}

pub(crate) fn qcow2(file: &str, name: &str, number: usize, size_bytes: u64) -> StoredDisk {
    StoredDisk {
        file: file.to_owned(),
        format: DiskFormat::Qcow2,
        serial: name.chars().filter(char::is_ascii_graphic).take(MAX_SERIAL_BYTES).collect(),
        read_only: false,
        number: Some(number),
        name: name.to_owned(),
        // As qemu-img rounds.
        size_bytes: size_bytes.next_multiple_of(SECTOR_BYTES),
    }
}

/// Makes a disk; an earlier one of that name is lost.
pub(crate) async fn make_disk(
    qemu_img: &Path,
    path: &Path,
    base: Option<&Base>,
    size_bytes: u64,
) -> Outcome<()> {
    let mut partial = path.as_os_str().to_owned();
    partial.push(".partial");
    let partial = PathBuf::from(partial);
    let (dir, name) = (partial.parent().unwrap_or(path), partial.file_name().unwrap_or_default());
    let mut command = tokio::process::Command::new(qemu_img);
    // In the directory and by its plain name, because qemu-img takes a colon for a protocol.
    command.current_dir(dir).args(["create", "-q", "-f", "qcow2"]);
    if let Some(base) = base {
        command.arg("-b").arg(&base.path).args(["-F", base.format.name()]);
    }
    command.arg(name).arg(size_bytes.to_string());
    run_tool(command, "qemu-img").await?;
    fs::File::open(&partial).and_then(|file| file.sync_all()).map_err(Problem::file("flush", &partial))?;
    settle(&partial, path)
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
