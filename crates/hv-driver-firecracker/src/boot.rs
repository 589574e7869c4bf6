//! What a VMM is told before its machine runs, in the order in which it must be told.

use hv_types::{InstanceSpec, ResourceLimits};
use serde_json::{Value, json};

use crate::api::Api;
use crate::api::types::{
    Action, Balloon, BootSource, Drive, DriveLimit, MachineConfig, MemoryBackend, Metrics, MmdsConfig,
    NetworkInterface, NetworkOverride, RateLimiter, SnapshotLoad, VmState, Vsock,
};
use crate::files::{INITRD, KERNEL, LOAD_MEMORY, LOAD_STATE, METRICS, Stored, StoredDisk, VSOCK_SOCKET};
use crate::problem::Outcome;
use crate::rescue::{RESCUE_INITRD, RESCUE_KERNEL};
use crate::tap;

/// What the guest's network card is called at the API.
const INTERFACE: &str = "eth0";
/// The guest's address on its vsock; the same in each, because each has a socket of its own on the host.
const GUEST_CID: u32 = 3;
/// How often the guest tells how much memory it uses, in seconds.
const BALLOON_INTERVAL_S: u32 = 1;
/// Bytes of a MiB.
const MIB: u64 = 1 << 20;

/// How the snapshot that is loaded is to go on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum After {
    /// It runs.
    Run,
    /// It stands still, as it did when it was taken.
    Stand,
}

/// From nothing to a machine that runs.
pub(crate) async fn boot(api: &mut Api, stored: &Stored, track_dirty_pages: bool) -> Outcome<()> {
    let spec = &stored.config.spec;
    api.set_metrics(&Metrics { metrics_path: METRICS }).await?;
    api.set_machine(&machine(spec, track_dirty_pages)).await?;
    let (kernel_image_path, initrd) =
        if spec.is_in_rescue() { (RESCUE_KERNEL, RESCUE_INITRD) } else { (KERNEL, INITRD) };
    let initrd_path = stored.has_initrd.then_some(initrd);
    let boot_args = stored.cmdline.clone();
    api.set_boot_source(&BootSource { kernel_image_path, boot_args, initrd_path }).await?;
    for disk in &stored.disks {
        api.set_drive(&drive(disk, spec.limits.as_ref())).await?;
    }
    if stored.has_interface() {
        let (host_dev_name, guest_mac) = (tap::name(stored.uid), tap::mac(stored.uid));
        api.set_interface(&NetworkInterface { iface_id: INTERFACE, host_dev_name, guest_mac }).await?;
        api.set_mmds(&MmdsConfig { version: "V2", network_interfaces: [INTERFACE] }).await?;
        api.set_metadata(&metadata(stored)).await?;
    }
    let balloon =
        Balloon { amount_mib: 0, deflate_on_oom: true, stats_polling_interval_s: BALLOON_INTERVAL_S };
    api.set_balloon(&balloon).await?;
    api.set_vsock(&Vsock { guest_cid: GUEST_CID, uds_path: VSOCK_SOCKET }).await?;
    // Without it a guest that is alone has nothing to seed its random numbers from.
    api.set_entropy().await?;
    api.act(Action::InstanceStart).await
}

/// From a snapshot to a machine that goes on from there. What must be unique is given anew before it does: its tap, its
/// metadata. The guest's kernel hears of a new generation (VMGenID) from Firecracker and reseeds its random numbers.
pub(crate) async fn load(api: &mut Api, stored: &Stored, track: bool, after: After) -> Outcome<()> {
    api.set_metrics(&Metrics { metrics_path: METRICS }).await?;
    let override_of = || NetworkOverride { iface_id: INTERFACE, host_dev_name: tap::name(stored.uid) };
    let network_overrides = stored.has_interface().then(override_of).into_iter().collect();
    let mem_backend = MemoryBackend { backend_type: "File", backend_path: LOAD_MEMORY };
    let request = SnapshotLoad {
        snapshot_path: LOAD_STATE,
        mem_backend,
        enable_diff_snapshots: track,
        resume_vm: false,
        network_overrides,
    };
    api.load_snapshot(&request).await?;
    retell(api, stored).await?;
    match after {
        After::Run => api.set_state(VmState::Resumed).await,
        After::Stand => Ok(()),
    }
}

/// Tells a machine that is there what can be told to it: its metadata, and how fast its disks may be.
pub(crate) async fn retell(api: &mut Api, stored: &Stored) -> Outcome<()> {
    if stored.has_interface() {
        api.set_metadata(&metadata(stored)).await?;
    }
    let limit = limiter(stored.config.spec.limits.as_ref());
    let rate_limiter = limit.unwrap_or(RateLimiter::bytes_per_second(0));
    for disk in &stored.disks {
        api.limit_drive(&DriveLimit { drive_id: drive_id(disk), rate_limiter }).await?;
    }
    Ok(())
}

fn machine(spec: &InstanceSpec, track_dirty_pages: bool) -> MachineConfig {
    MachineConfig {
        vcpu_count: spec.cpu_cores,
        mem_size_mib: spec.memory_bytes.div_ceil(MIB),
        track_dirty_pages,
    }
}

fn drive_id(disk: &StoredDisk) -> String {
    disk.file.chars().filter(char::is_ascii_alphanumeric).collect()
}

fn drive(disk: &StoredDisk, limits: Option<&ResourceLimits>) -> Drive {
    Drive {
        drive_id: drive_id(disk),
        is_root_device: disk.is_root,
        is_read_only: false,
        path_on_host: disk.file.clone(),
        cache_type: "Writeback",
        rate_limiter: limiter(limits),
    }
}

/// Firecracker bounds reading and writing together, so the lower bound of the two holds for both.
fn limiter(limits: Option<&ResourceLimits>) -> Option<RateLimiter> {
    let limits = limits?;
    let bounds = [limits.io_read_bps, limits.io_write_bps];
    let least =
        bounds.into_iter().filter_map(|bound| u64::try_from(bound).ok()).filter(|bound| *bound > 0).min();
    least.map(RateLimiter::bytes_per_second)
}

/// What the guest reads at 169.254.169.254: laid out as EC2's metadata, which cloud-init knows. A clone that goes on from
/// memory learns its card's own address from there: the card that it remembers is its source's.
fn metadata(stored: &Stored) -> Value {
    let config = &stored.config;
    let (id, name, mac) = (config.id.as_str(), &config.name, tap::mac(stored.uid));
    let meta = json!({ "instance-id": id, "local-hostname": name, "hostname": name, "mac": mac });
    json!({ "latest": { "meta-data": meta, "user-data": config.spec.user_data } })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_lower_of_two_io_bounds_holds() {
        let with =
            |read, write| ResourceLimits { io_read_bps: read, io_write_bps: write, ..Default::default() };
        assert_eq!(limiter(None), None);
        assert_eq!(limiter(Some(&with(0, 0))), None);
        assert_eq!(limiter(Some(&with(9, 0))), Some(RateLimiter::bytes_per_second(9)));
        assert_eq!(limiter(Some(&with(9, 4))), Some(RateLimiter::bytes_per_second(4)));
    }

    #[test]
    fn memory_is_rounded_up_to_whole_mebibytes() {
        let spec = InstanceSpec { memory_bytes: (32 << 20) + 1, cpu_cores: 2, ..InstanceSpec::default() };
        assert_eq!(machine(&spec, true).mem_size_mib, 33);
    }
}
