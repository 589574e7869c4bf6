//! Bounds of what a machine reads and writes, kept by QEMU: all its disks share them.

use serde_json::json;

use crate::live::Live;
use crate::machine::Machine;

/// The group whose disks share the bounds.
const GROUP: &str = "limits";

/// Gives every disk of a machine that was just started or found the bounds of its specification.
pub(crate) async fn apply(machine: &Machine, live: &Live) {
    let limits = machine.stored().config.spec.limits.unwrap_or_default();
    if limits.io_read_bps > 0 || limits.io_write_bps > 0 {
        set(machine, live).await;
    }
}

/// Gives every disk the bounds of the specification, or takes them away. What fails is logged: a machine without its
/// bounds is better than none.
pub(crate) async fn set(machine: &Machine, live: &Live) {
    let stored = machine.stored();
    let limits = stored.config.spec.limits.unwrap_or_default();
    let (read, write) = (limits.io_read_bps.max(0), limits.io_write_bps.max(0));
    for (number, _) in stored.writable() {
        let device = format!("virtio-disk{number}");
        // The disk belongs to the virtio device inside the PCI device.
        let path = format!("/machine/peripheral/{device}/virtio-backend");
        let mut bounds = json!({ "id": path, "bps": 0, "bps_rd": read, "bps_wr": write });
        for unbounded in ["iops", "iops_rd", "iops_wr"] {
            bounds[unbounded] = 0.into();
        }
        if (read, write) != (0, 0) {
            bounds["group"] = GROUP.into();
        }
        if let Err(error) = live.monitor.command("block_set_io_throttle", Some(bounds)).await {
            tracing::warn!(instance = %machine.id, %error, device, "the bounds of a disk could not be set");
        }
    }
}
