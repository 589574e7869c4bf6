//! PCI devices from the host's drivers to vfio-pci and back.
//!
//! # Theory of operation
//! `driver_override` names the only driver that may take the device; the driver that has it is told to let it go, and the
//! kernel to look for one again (Linux: Documentation/ABI/testing/sysfs-bus-pci). The way back is the same without an
//! override, so that nothing need be remembered: whoever would take the device after a boot takes it.
//!
//! # Failure and recovery
//! Either all devices of a grant are bound or, as far as the kernel lets them, all are handed back. Both ways can be
//! repeated.

use std::io;
use std::path::{Path, PathBuf};

use super::sysfs::link;

/// The driver that hands devices to processes.
const VFIO: &str = "vfio-pci";

/// Why a device could not be handed over.
#[derive(Debug, thiserror::Error)]
pub(crate) enum VfioError {
    /// The kernel did not take what was written.
    #[error("cannot write {text:?} to {}", path.display())]
    Write {
        /// What.
        text: String,
        /// Where.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// Another driver has it, or none.
    #[error(
        "device {address} has driver {driver:?} and not vfio-pci; load it with `modprobe vfio-pci`, and see the kernel's log"
    )]
    NotTaken {
        /// Which device.
        address: String,
        /// Who has it; empty for nobody.
        driver: String,
    },
}

type Write<'a> = &'a dyn Fn(&Path, &str) -> io::Result<()>;

/// Has vfio-pci take the devices. If one cannot be had, none is kept.
pub(super) fn bind(root: &Path, addresses: &[String], write: Write<'_>) -> Result<(), VfioError> {
    for (index, address) in addresses.iter().enumerate() {
        if let Err(error) = bind_one(root, address, write) {
            if let Err(another) = restore(root, &addresses[..=index], write) {
                let another = hv_telemetry::error_chain(&another);
                tracing::warn!(
                    address,
                    error = another,
                    "a device could not be handed back to the host's driver"
                );
            }
            return Err(error);
        }
    }
    Ok(())
}

/// Lets the host's drivers take the devices again. Goes on where one fails; the first failure is told.
pub(super) fn restore(root: &Path, addresses: &[String], write: Write<'_>) -> Result<(), VfioError> {
    let results: Vec<_> = addresses.iter().map(|address| restore_one(root, address, write)).collect();
    results.into_iter().collect()
}

fn device(root: &Path, address: &str) -> PathBuf {
    root.join("bus/pci/devices").join(address)
}

fn put(path: PathBuf, text: &str, write: Write<'_>) -> Result<(), VfioError> {
    write(&path, text).map_err(|source| VfioError::Write { text: text.to_owned(), path, source })
}

fn bind_one(root: &Path, address: &str, write: Write<'_>) -> Result<(), VfioError> {
    let dir = device(root, address);
    let driver = || link(&dir.join("driver"));
    if driver().as_deref() == Some(VFIO) {
        return Ok(());
    }
    put(dir.join("driver_override"), VFIO, write)?;
    if driver().is_some() {
        put(dir.join("driver/unbind"), address, write)?;
    }
    put(root.join("bus/pci/drivers_probe"), address, write)?;
    match driver() {
        Some(driver) if driver == VFIO => Ok(()),
        driver => {
            Err(VfioError::NotTaken { address: address.to_owned(), driver: driver.unwrap_or_default() })
        }
    }
}

fn restore_one(root: &Path, address: &str, write: Write<'_>) -> Result<(), VfioError> {
    let dir = device(root, address);
    let driver = || link(&dir.join("driver"));
    // A line's end alone takes the override away.
    put(dir.join("driver_override"), "\n", write)?;
    if driver().as_deref() == Some(VFIO) {
        put(dir.join("driver/unbind"), address, write)?;
    }
    if driver().is_none() {
        put(root.join("bus/pci/drivers_probe"), address, write)?;
    }
    Ok(())
}
