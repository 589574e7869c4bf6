//! Changes of instances that exist.
//!
//! # Theory of operation
//! What the instance is to be is written down first, then the running machine is brought there step by step. Each step
//! looks at what QEMU has, so an update that was cut short is finished by the next one. What the machine cannot do while
//! it runs waits for its next start, which makes it of what is written down.

use std::sync::Arc;

use hv_driver::{DriverError, InstanceConfig, Result, Updated};
use hv_types::{DiskSpec, InstanceSpec};

use crate::NAME;
use crate::create::{self, Tools, make_disk, qcow2, run_tool, write_seed};
use crate::files::{BOOT_DISK, INCOMING, STARTED, Stored, StoredDisk};
use crate::limits;
use crate::live::Live;
use crate::machine::Machine;
use crate::migration;
use crate::problem::{Outcome, Problem};
use crate::rescue::{self, StoredRescue};

mod running;

/// Makes an instance what a configuration says.
pub(crate) async fn update(
    machine: &Arc<Machine>,
    config: &InstanceConfig,
    rescue: Option<StoredRescue>,
    tools: &Tools,
    machine_type: &str,
) -> Result<Updated> {
    let _change = machine.change.lock().await;
    let id = &machine.id;
    if let Some((operation, reason)) = create::unsupported(&config.spec) {
        return Err(DriverError::Unsupported { driver: NAME, operation, reason });
    }
    let before = machine.stored();
    let invalid = |reason| DriverError::invalid(id, reason);
    unchangeable(&before.config.spec, &config.spec).map_err(invalid)?;
    let live = machine.live_now("update").await?;
    let refused = |reason: &str| Err(DriverError::wrong_state(id, "update", reason));
    if machine.dir.file(INCOMING).exists() || migration::goes_on(machine).map_err(machine.failed("update"))? {
        return refused("it is being handed over");
    }
    if migration::is_handed_over(machine, live.as_deref()).await.map_err(machine.failed("update"))? {
        return refused("it was handed over to another node");
    }
    let in_rescue = live.is_some() && rescue::runs_in_rescue(machine).map_err(machine.failed("update"))?;
    let same = InstanceSpec { rescue: before.config.spec.rescue.clone(), ..config.spec.clone() };
    if in_rescue && same != before.config.spec {
        return refused("it runs in rescue, where nothing of it can be changed; stop it first");
    }
    let taken = match &live {
        Some(live) => running::numbers(live).await.map_err(machine.failed("update"))?,
        None => Vec::new(),
    };
    let after = Stored { rescue, ..plan(&before, config, &taken).map_err(invalid)? };
    make_so(machine, &before, after, live.as_deref(), tools, machine_type)
        .await
        .map_err(machine.failed("update"))
}

/// What can never be another.
fn unchangeable(before: &InstanceSpec, after: &InstanceSpec) -> std::result::Result<(), String> {
    let fixed = [
        ("spec.image", before.image != after.image),
        ("spec.kernel", before.kernel != after.kernel),
        ("spec.initrd", before.initrd != after.initrd),
        ("spec.kernel_args", before.kernel_args != after.kernel_args),
        ("spec.firmware", before.firmware != after.firmware),
    ];
    if let Some((field, _)) = fixed.iter().find(|(_, differs)| *differs) {
        return Err(format!("{field} is fixed when an instance is created; create another instance"));
    }
    create::cores(after.cpu_cores)
}

/// What is written down, with the disks as they are to be.
fn plan(before: &Stored, config: &InstanceConfig, taken: &[usize]) -> std::result::Result<Stored, String> {
    let mut after = before.clone();
    after.config = InstanceConfig {
        image: before.config.image.clone(),
        devices: before.config.devices.clone(),
        ..config.clone()
    };
    let boots_from_image = before.disks.iter().any(|disk| disk.file == BOOT_DISK);
    for (number, disk) in before.numbered() {
        after
            .disks
            .iter_mut()
            .filter(|known| known.file == disk.file)
            .for_each(|known| known.number = Some(number));
    }
    let is_boot = |disk: &&DiskSpec| disk.boot && boots_from_image;
    if let Some(asked) = config.spec.disks.iter().find(is_boot).filter(|disk| disk.size_bytes > 0) {
        let boot = after.disks.iter_mut().find(|disk| disk.file == BOOT_DISK);
        boot.map_or(Ok(()), |boot| grow(boot, asked))?;
    }
    let asked: Vec<_> = config.spec.disks.iter().filter(|disk| !is_boot(disk)).collect();
    after.disks.retain(|disk| disk.is_fixed() || asked.iter().any(|asked| is_called(disk, &asked.name)));
    for asked in asked {
        if let Some(known) =
            after.disks.iter_mut().find(|disk| !disk.is_fixed() && is_called(disk, &asked.name))
        {
            grow(known, asked)?;
            continue;
        }
        let is_free = |number: &usize| {
            !taken.contains(number)
                && !before.numbered().chain(after.numbered()).any(|(used, _)| used == *number)
        };
        let number = (0..).find(is_free).unwrap_or_default();
        let file = format!("disk-{number}.qcow2");
        let seed = after.disks.iter().position(|disk| disk.read_only).unwrap_or(after.disks.len());
        after.disks.insert(seed, qcow2(&file, &asked.name, number, asked.size_bytes));
    }
    Ok(after)
}

/// Earlier releases kept no names, but the serial number is one.
fn is_called(disk: &StoredDisk, name: &str) -> bool {
    disk.name == name || (disk.name.is_empty() && disk.serial == name)
}

fn grow(disk: &mut StoredDisk, asked: &DiskSpec) -> std::result::Result<(), String> {
    let wanted = asked.size_bytes.next_multiple_of(512);
    if wanted < disk.size_bytes {
        return Err(format!(
            "spec.disks[{}].size_bytes: a disk only grows; it has {} bytes, and {} were asked for",
            asked.name, disk.size_bytes, asked.size_bytes
        ));
    }
    disk.size_bytes = wanted;
    Ok(())
}

async fn make_so(
    machine: &Machine,
    before: &Stored,
    after: Stored,
    live: Option<&Live>,
    tools: &Tools,
    machine_type: &str,
) -> Outcome<Updated> {
    for (_, disk) in after.writable() {
        let path = machine.dir.path.join(after.disk_path(disk));
        match before.disks.iter().find(|known| known.file == disk.file) {
            None => make_disk(&tools.qemu_img, &path, None, disk.size_bytes).await?,
            Some(known) if known.size_bytes < disk.size_bytes && live.is_none() => {
                resize(tools, &path, disk).await?;
            }
            Some(_) => {}
        }
    }
    let renewed = before.config.name != after.config.name
        || before.config.spec.user_data != after.config.spec.user_data;
    if renewed && after.disks.iter().any(|disk| disk.read_only) {
        write_seed(&machine.dir, &after.config)?;
    }
    machine.store(after.clone())?;
    let waits = match live {
        Some(live) => {
            let started = machine.dir.read::<Stored>(STARTED)?.unwrap_or_else(|| before.clone());
            let mut waits = Vec::new();
            if started.rescue.is_none() {
                limits::set(machine, live).await;
                waits = running::bring(live, &started, &after, machine_type).await?;
            } else if started.config.name != after.config.name {
                waits.push(running::NAME_WAITS.to_owned());
            }
            if started.rescue != after.rescue {
                waits.push("the disk that it boots from is chosen when it starts".to_owned());
            }
            waits
        }
        None => Vec::new(),
    };
    // Whoever still has it open keeps it as long.
    for gone in before.disks.iter().filter(|known| !after.disks.iter().any(|disk| disk.file == known.file)) {
        let path = machine.dir.path.join(before.disk_path(gone));
        match std::fs::remove_file(&path) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
                return Err(Problem::file("remove", &path)(e));
            }
            _ => {}
        }
    }
    Ok(if waits.is_empty() { Updated::Done } else { Updated::AtNextStart(waits.join("; ")) })
}

async fn resize(tools: &Tools, path: &std::path::Path, disk: &StoredDisk) -> Outcome<()> {
    let mut command = tokio::process::Command::new(&tools.qemu_img);
    command.args(["resize", "-q", "-f", disk.format.name()]).arg(path).arg(disk.size_bytes.to_string());
    run_tool(command, "qemu-img").await.map(drop)
}
