//! What of a specification can change: cores, memory, disks.

use hv_proto::v1;

use super::super::document::Desired;
use crate::error::CtlError;
use crate::output::text::{escape, size};

/// The fields that can, by their names in JSON.
pub(super) const CHANGEABLE: [&str; 3] = ["cpuCores", "memoryBytes", "disks"];

/// What has to be asked for; the changes are told.
pub(super) fn plan(
    desired: &Desired,
    existing: &v1::Instance,
    changes: &mut Vec<String>,
) -> Result<Option<v1::UpdateInstanceRequest>, CtlError> {
    let now = existing.spec.clone().unwrap_or_default();
    let new = desired.request.spec.clone().unwrap_or_default();
    let given = |field: &str| desired.given.contains(&field);
    let mut update = v1::UpdateInstanceRequest::default();
    if given("cpuCores") && new.cpu_cores != now.cpu_cores {
        changes.push(format!("~ spec.cpu_cores: {} → {}", now.cpu_cores, new.cpu_cores));
        update.cpu_cores = Some(new.cpu_cores);
    }
    if given("memoryBytes") && new.memory_bytes != now.memory_bytes {
        changes.push(format!("~ spec.memory_bytes: {} → {}", size(now.memory_bytes), size(new.memory_bytes)));
        update.memory_bytes = Some(new.memory_bytes);
    }
    if given("disks") {
        disks(desired, &now.disks, &new.disks, &mut update, changes)?;
    }
    Ok((update != v1::UpdateInstanceRequest::default()).then_some(update))
}

fn disks(
    desired: &Desired,
    now: &[v1::DiskSpec],
    new: &[v1::DiskSpec],
    update: &mut v1::UpdateInstanceRequest,
    changes: &mut Vec<String>,
) -> Result<(), CtlError> {
    let refuse = |name: &str, why: &str| {
        let name = escape(name);
        Err(CtlError::Document(format!("{}: spec.disks: disk {name} {why}", desired.place)))
    };
    for disk in new {
        let name = escape(&disk.name);
        match now.iter().find(|known| known.name == disk.name) {
            None if disk.boot => {
                return refuse(&disk.name, "cannot be the boot disk of an instance that exists");
            }
            None => changes.push(format!("+ spec.disks.{name}: {}", size(disk.size_bytes))),
            Some(known) if known == disk => continue,
            Some(known) if known.boot != disk.boot || known.r#type != disk.r#type => {
                return refuse(&disk.name, "can only grow; take its old type and boot, or use another name");
            }
            Some(known) if disk.size_bytes < known.size_bytes => {
                let why = format!("has {}, and disks cannot shrink", size(known.size_bytes));
                return refuse(&disk.name, &why);
            }
            Some(known) => {
                let (from, to) = (size(known.size_bytes), size(disk.size_bytes));
                changes.push(format!("~ spec.disks.{name}: {from} → {to}"));
            }
        }
        update.set_disks.push(disk.clone());
    }
    for disk in now.iter().filter(|disk| new.iter().all(|kept| kept.name != disk.name)) {
        if disk.boot {
            return refuse(&disk.name, "is the boot disk, which cannot be removed; list it too");
        }
        changes.push(format!("- spec.disks.{}: {}", escape(&disk.name), size(disk.size_bytes)));
        update.remove_disks.push(disk.name.clone());
    }
    Ok(())
}
