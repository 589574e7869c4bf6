//! Rescue: a start from another image, with the instance's own disks behind it.
//!
//! # Theory of operation
//! The rescue image's kernel and disk are copied into the machine's root under names of their own at every start in
//! rescue, and removed by the first start out of it. What the instance has of its own is only read to be attached, so a
//! crash at any point leaves it as it was.

use std::path::Path;

use crate::disks;
use crate::files::{Stored, StoredDisk, remove_file};
use crate::images::Boot;
use crate::problem::Outcome;

/// Names in the root.
pub(crate) const RESCUE_KERNEL: &str = "rescue-kernel";
pub(crate) const RESCUE_INITRD: &str = "rescue-initrd";
const RESCUE_DISK: &str = "rescue.raw";

/// Puts into the root what a start in rescue needs. Blocks.
pub(crate) fn lay(root: &Path, boot: &Boot) -> Outcome<()> {
    clear(root)?;
    disks::copy(&boot.kernel, &root.join(RESCUE_KERNEL), 0)?;
    if let Some(initrd) = &boot.initrd {
        disks::copy(initrd, &root.join(RESCUE_INITRD), 0)?;
    }
    if let Some(disk) = &boot.disk {
        disks::copy(disk, &root.join(RESCUE_DISK), 0)?;
    }
    Ok(())
}

/// Takes away what the last start in rescue left.
pub(crate) fn clear(root: &Path) -> Outcome<()> {
    [RESCUE_KERNEL, RESCUE_INITRD, RESCUE_DISK].iter().try_for_each(|name| remove_file(&root.join(name)))
}

/// What a machine in rescue is started as: the rescue image's disk is its first, and the one that the kernel mounts.
pub(crate) fn as_started(stored: &Stored, boot: &Boot) -> Stored {
    let mut started =
        Stored { cmdline: boot.cmdline.clone(), has_initrd: boot.initrd.is_some(), ..stored.clone() };
    for disk in &mut started.disks {
        disk.is_root = false;
    }
    if boot.disk.is_some() {
        let disk = StoredDisk { file: RESCUE_DISK.to_owned(), name: "rescue".to_owned(), is_root: true };
        started.disks.insert(0, disk);
    }
    started
}
