//! What the API's bodies look like: the parts of Firecracker's contract that are used here.

use serde::{Deserialize, Serialize};

/// `InstanceInfo`.
#[derive(Clone, Debug, Deserialize)]
pub(crate) struct InstanceInfo {
    pub(crate) state: State,
}

/// What a VMM does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
pub(crate) enum State {
    #[serde(rename = "Not started")]
    NotStarted,
    Running,
    Paused,
}

/// `MachineConfiguration`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct MachineConfig {
    pub(crate) vcpu_count: u32,
    pub(crate) mem_size_mib: u64,
    pub(crate) track_dirty_pages: bool,
}

/// `BootSource`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct BootSource {
    pub(crate) kernel_image_path: &'static str,
    pub(crate) boot_args: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) initrd_path: Option<&'static str>,
}

/// `Drive`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct Drive {
    pub(crate) drive_id: String,
    pub(crate) is_root_device: bool,
    pub(crate) is_read_only: bool,
    pub(crate) path_on_host: String,
    /// `Writeback` passes the guest's flushes on; `Unsafe` drops them.
    pub(crate) cache_type: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) rate_limiter: Option<RateLimiter>,
}

/// `PartialDrive`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct DriveLimit {
    pub(crate) drive_id: String,
    pub(crate) rate_limiter: RateLimiter,
}

/// `RateLimiter`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct RateLimiter {
    pub(crate) bandwidth: TokenBucket,
}

impl RateLimiter {
    /// So many bytes each second. 0 is no bound.
    pub(crate) fn bytes_per_second(size: u64) -> Self {
        // A bucket without a size or a time is none.
        Self { bandwidth: TokenBucket { size, refill_time: if size == 0 { 0 } else { 1000 } } }
    }
}

/// `TokenBucket`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct TokenBucket {
    pub(crate) size: u64,
    /// Milliseconds.
    pub(crate) refill_time: u64,
}

/// `NetworkInterface`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct NetworkInterface {
    pub(crate) iface_id: &'static str,
    pub(crate) host_dev_name: String,
    pub(crate) guest_mac: String,
}

/// `Balloon`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct Balloon {
    pub(crate) amount_mib: u64,
    pub(crate) deflate_on_oom: bool,
    pub(crate) stats_polling_interval_s: u32,
}

/// `BalloonUpdate`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct BalloonTarget {
    pub(crate) amount_mib: u64,
}

/// `BalloonStats`; what the guest does not tell is absent.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub(crate) struct BalloonStatistics {
    pub(crate) disk_caches: Option<u64>,
}

/// `Vsock`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct Vsock {
    pub(crate) guest_cid: u32,
    pub(crate) uds_path: &'static str,
}

/// `Metrics`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct Metrics {
    pub(crate) metrics_path: &'static str,
}

/// `MmdsConfig`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct MmdsConfig {
    pub(crate) version: &'static str,
    pub(crate) network_interfaces: [&'static str; 1],
}

/// `InstanceActionInfo`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct Actions {
    pub(crate) action_type: Action,
}

/// What a VMM can be told to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub(crate) enum Action {
    InstanceStart,
    SendCtrlAltDel,
    FlushMetrics,
}

/// `Vm`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct Vm {
    pub(crate) state: VmState,
}

/// What a machine can be set to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub(crate) enum VmState {
    Paused,
    Resumed,
}

/// `SnapshotCreateParams`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct SnapshotCreate {
    pub(crate) snapshot_type: SnapshotType,
    pub(crate) snapshot_path: String,
    pub(crate) mem_file_path: String,
}

/// How much of the memory is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum SnapshotType {
    Full,
    Diff,
}

/// `SnapshotLoadParams`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct SnapshotLoad {
    pub(crate) snapshot_path: &'static str,
    pub(crate) mem_backend: MemoryBackend,
    pub(crate) enable_diff_snapshots: bool,
    pub(crate) resume_vm: bool,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(crate) network_overrides: Vec<NetworkOverride>,
}

/// `MemoryBackend`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct MemoryBackend {
    pub(crate) backend_type: &'static str,
    pub(crate) backend_path: &'static str,
}

/// `NetworkOverride`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct NetworkOverride {
    pub(crate) iface_id: &'static str,
    pub(crate) host_dev_name: String,
}
