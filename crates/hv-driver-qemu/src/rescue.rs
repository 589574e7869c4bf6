//! Rescue: a start from another image, with the instance's own disks behind it.
//!
//! # Theory of operation
//! What a machine in rescue boots from is part of what is written down of it. Its disk is an overlay over the rescue
//! image that every start makes anew and that goes with the first start out of rescue. The machine's own disks are
//! neither made nor changed by any of this, so a crash at any point leaves them as they were.

use std::path::PathBuf;
use std::sync::Arc;

use hv_driver::{DiskFormat, InstanceConfig, Result};
use hv_machine::images::{Base, Boot, Images};
use serde::{Deserialize, Serialize};

use crate::create::{Tools, make_disk, qcow2};
use crate::files::{STARTED, Stored};
use crate::machine::Machine;
use crate::problem::Outcome;

/// The throw-away disk.
pub(crate) const RESCUE_DISK: &str = "rescue.qcow2";

/// What a machine in rescue boots from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct StoredRescue {
    kernel: Option<PathBuf>,
    initrd: Option<PathBuf>,
    cmdline: String,
    disk: Option<StoredBase>,
}

/// The rescue image's disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct StoredBase {
    path: PathBuf,
    format: DiskFormat,
    size_bytes: u64,
}

/// What a configuration in rescue boots from; `known` is what is written down of the instance already.
///
/// # Errors
/// Why this node cannot: there is no such image.
pub(crate) fn plan(
    images: &Images,
    config: &InstanceConfig,
    known: Option<&Stored>,
) -> std::result::Result<Option<StoredRescue>, String> {
    let Some(rescue) = config.in_rescue() else { return Ok(None) };
    // It may run from an image that is not there any more.
    let same = known.filter(|known| known.config.spec.rescue == config.spec.rescue);
    if let Some(same) = same.and_then(|known| known.rescue.clone()) {
        return Ok(Some(same));
    }
    let boot = images.resolve(&rescue.spec, rescue.image.as_ref()).map_err(|reason| {
        let reason = reason.strip_prefix("spec.image").unwrap_or(&reason).to_owned();
        format!("spec.rescue{}{reason}", if reason.starts_with(':') { "" } else { ": " })
    })?;
    let Boot { kernel, initrd, cmdline, disk } = boot;
    let disk = disk.map(|Base { path, format, size_bytes }| StoredBase { path, format, size_bytes });
    Ok(Some(StoredRescue { kernel, initrd, cmdline, disk }))
}

/// What a machine is started as: in rescue the throw-away disk is its first.
pub(crate) fn as_started(stored: &Stored) -> Stored {
    let mut started = stored.clone();
    let Some(rescue) = &stored.rescue else { return started };
    started.kernel.clone_from(&rescue.kernel);
    started.initrd.clone_from(&rescue.initrd);
    started.cmdline.clone_from(&rescue.cmdline);
    let numbers: Vec<_> = stored.numbered().map(|(number, _)| number).collect();
    for (disk, number) in started.disks.iter_mut().zip(&numbers) {
        disk.number = Some(*number);
    }
    if let Some(base) = &rescue.disk {
        let free = (0..).find(|number| !numbers.contains(number)).unwrap_or_default();
        started.disks.insert(0, qcow2(RESCUE_DISK, "rescue", free, base.size_bytes));
    }
    started
}

/// Makes the throw-away disk for a machine that is about to start, or removes the last one.
pub(crate) async fn lay(machine: &Machine, tools: &Tools) -> Outcome<()> {
    let stored = machine.stored();
    let Some(StoredBase { path, format, size_bytes }) =
        stored.rescue.as_ref().and_then(|rescue| rescue.disk.clone())
    else {
        return machine.dir.remove(RESCUE_DISK);
    };
    let base = Base { path, format, size_bytes };
    make_disk(&tools.qemu_img, &machine.dir.path.join(RESCUE_DISK), Some(&base), size_bytes).await
}

/// Whether the present run was started in rescue. The machine runs.
pub(crate) fn runs_in_rescue(machine: &Machine) -> Outcome<bool> {
    let started = machine.dir.read::<Stored>(STARTED)?;
    Ok(started.is_some_and(|started| started.rescue.is_some()))
}

/// Refuses what cannot be done in rescue.
pub(crate) fn refuse(machine: &Arc<Machine>, operation: &'static str) -> Result<()> {
    let started = machine.dir.read::<Stored>(STARTED).map_err(machine.failed(operation))?;
    if let Some(started) = started {
        started.config.refuse_in_rescue(operation)?;
    }
    machine.stored().config.refuse_in_rescue(operation)
}
