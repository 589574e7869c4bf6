//! Rescue: a start from another image, with the instance's own disks behind it.
//!
//! # Theory of operation
//! What a machine in rescue boots from is part of what is stored of it. Its disk is an overlay over the rescue image that
//! every start makes anew and that goes with the first start out of rescue; it takes the first name on its bus, and the
//! machine's own boot disk another. The machine's own disks are neither made nor changed by any of this. A marker says
//! that the domain, as libvirtd has it, is the one in rescue.

use std::path::PathBuf;

use hv_driver::{DiskFormat, InstanceConfig, Result};
use serde::{Deserialize, Serialize};

use crate::create::{BOOT_TARGET, make_disk, rescue_disk};
use crate::files::{InstanceDir, Stored};
use hv_machine::images::Boot;
use crate::machine::Machine;
use crate::problem::Outcome;

/// The throw-away disk.
pub(crate) const RESCUE_DISK: &str = "rescue.qcow2";
/// Says that the domain is defined in rescue.
const MARKER: &str = "in-rescue";
/// What the boot disk is called beside the rescue disk: behind the seed.
const DISPLACED_TARGET: &str = "vdc";

/// What a machine in rescue boots from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct StoredRescue {
    kernel: Option<PathBuf>,
    initrd: Option<PathBuf>,
    cmdline: String,
    disk: Option<(PathBuf, DiskFormat, u64)>,
}

impl StoredRescue {
    pub(crate) fn of(boot: Boot) -> Self {
        let Boot { kernel, initrd, cmdline, disk } = boot;
        Self { kernel, initrd, cmdline, disk: disk.map(|base| (base.path, base.format, base.size_bytes)) }
    }
}

/// What the domain is described as for its next start.
pub(crate) fn as_started(stored: &Stored, dir: &InstanceDir) -> Stored {
    let mut started = stored.clone();
    let Some(rescue) = &stored.rescue else { return started };
    started.kernel.clone_from(&rescue.kernel);
    started.initrd.clone_from(&rescue.initrd);
    started.cmdline.clone_from(&rescue.cmdline);
    if let Some(base) = &rescue.disk {
        for disk in started.disks.iter_mut().filter(|disk| disk.target == BOOT_TARGET) {
            disk.target = DISPLACED_TARGET.to_owned();
        }
        started.disks.insert(0, rescue_disk(&dir.path, base));
    }
    started
}

/// Makes what a start needs, or removes what the last start in rescue left.
pub(crate) async fn lay(machine: &Machine) -> Outcome<()> {
    let (stored, dir) = (machine.stored(), &machine.dir);
    let Some(rescue) = &stored.rescue else { return dir.remove(RESCUE_DISK) };
    dir.touch(MARKER, 0o600)?;
    match &rescue.disk {
        Some(base) => make_disk(&rescue_disk(&dir.path, base)).await,
        None => dir.remove(RESCUE_DISK),
    }
}

/// The domain is defined: what it was before is forgotten.
pub(crate) fn defined(machine: &Machine) -> Outcome<()> {
    if machine.stored().rescue.is_some() { Ok(()) } else { machine.dir.remove(MARKER) }
}

/// Whether the domain is defined in rescue, or may be.
pub(crate) fn is_defined(machine: &Machine) -> bool {
    machine.dir.file(MARKER).exists()
}

/// Refuses what cannot be done in rescue.
pub(crate) fn refuse(machine: &Machine, operation: &'static str) -> Result<()> {
    let stored = machine.stored();
    stored.config.refuse_in_rescue(operation)?;
    if !is_defined(machine) {
        return Ok(());
    }
    let spec = hv_types::InstanceSpec { rescue: "rescue".to_owned(), ..stored.config.spec.clone() };
    InstanceConfig { spec, ..stored.config.clone() }.refuse_in_rescue(operation)
}
