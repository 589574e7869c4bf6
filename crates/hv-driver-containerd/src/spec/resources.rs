//! Bounds of processor time, memory, processes and disks.

use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use containerd_client::types::Mount as WireMount;
use hv_types::InstanceSpec;
use oci_spec::OciSpecError;
use oci_spec::runtime::{
    LinuxBlockIoBuilder, LinuxCpuBuilder, LinuxMemoryBuilder, LinuxPidsBuilder, LinuxResources,
    LinuxResourcesBuilder, LinuxThrottleDeviceBuilder,
};
use prost_types::Any;

use super::limits_of;
use crate::cgroup;
use crate::problem::{Outcome, Problem};

/// What containerd calls the document.
const RESOURCES_TYPE: &str = "types.containerd.io/opencontainers/runtime-spec/1/LinuxResources";
/// The period over which processor time is bounded, in microseconds: the kernel's default.
const CPU_PERIOD_US: u64 = 100_000;
/// The weight of one core: the kernel's default of a whole group.
const SHARES_PER_CORE: u64 = 1024;
/// The most shares that the kernel takes.
const MAX_SHARES: u64 = 262_144;
/// Processes and threads where nothing is said.
const DEFAULT_PIDS: i64 = 4096;

/// The disk that a root file system lies on, as device numbers; `None` if it is not a disk's.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Disk(Option<(u32, u32)>);

impl Disk {
    /// Of the mounts of a root file system.
    pub(crate) fn of(root: &[WireMount]) -> Self {
        let upper = |mount: &WireMount| {
            let option = mount.options.iter().find_map(|option| option.strip_prefix("upperdir="));
            option.map_or_else(|| PathBuf::from(&mount.source), PathBuf::from)
        };
        Self(root.first().and_then(|mount| whole_disk(&upper(mount))))
    }
}

fn whole_disk(path: &Path) -> Option<(u32, u32)> {
    let device = fs::metadata(path).ok()?.dev();
    let (major, minor) = (rustix::fs::major(device), rustix::fs::minor(device));
    let node = fs::canonicalize(format!("/sys/dev/block/{major}:{minor}")).ok()?;
    // A partition lies below its disk, and only disks are bounded.
    let disk = if node.join("partition").exists() { node.parent()?.to_owned() } else { node };
    let numbers = fs::read_to_string(disk.join("dev")).ok()?;
    let (major, minor) = numbers.trim().split_once(':')?;
    Some((major.parse().ok()?, minor.parse().ok()?))
}

/// The bounds of a specification.
pub(crate) fn of(spec: &InstanceSpec, disk: Disk) -> Outcome<LinuxResources> {
    let io = io_bounds(spec, disk)?;
    build(spec, io).map_err(|e| Problem::Spec(e.to_string()))
}

/// Bounds that can be changed while it runs, as containerd takes them.
pub(crate) fn document(spec: &InstanceSpec) -> Outcome<Any> {
    let resources = build(spec, None).map_err(|e| Problem::Spec(e.to_string()))?;
    let value = serde_json::to_vec(&resources).map_err(|e| Problem::Spec(e.to_string()))?;
    Ok(Any { type_url: RESOURCES_TYPE.to_owned(), value })
}

struct IoBounds {
    disk: (u32, u32),
    read_bps: u64,
    write_bps: u64,
}

fn io_bounds(spec: &InstanceSpec, disk: Disk) -> Outcome<Option<IoBounds>> {
    let limits = limits_of(spec);
    let bound = |value: i64| u64::try_from(value).unwrap_or(0);
    let (read_bps, write_bps) = (bound(limits.io_read_bps), bound(limits.io_write_bps));
    if read_bps == 0 && write_bps == 0 {
        return Ok(None);
    }
    let disk = disk.0.ok_or_else(|| {
        Problem::Invalid(
            "its I/O cannot be bounded here: containerd's root does not lie on a disk of its own".to_owned(),
        )
    })?;
    Ok(Some(IoBounds { disk, read_bps, write_bps }))
}

fn build(spec: &InstanceSpec, io: Option<IoBounds>) -> Result<LinuxResources, OciSpecError> {
    let limits = limits_of(spec);
    let positive = |value: i64| (value > 0).then_some(value);
    let period =
        positive(limits.cpu_period).and_then(|period| u64::try_from(period).ok()).unwrap_or(CPU_PERIOD_US);
    let cores = u64::from(spec.cpu_cores.max(1));
    let whole = i64::try_from(cores.saturating_mul(period)).unwrap_or(i64::MAX);
    let cpu = LinuxCpuBuilder::default()
        .shares((cores * SHARES_PER_CORE).min(MAX_SHARES))
        .quota(positive(limits.cpu_quota).unwrap_or(whole))
        .period(period)
        .build()?;
    let asked = i64::try_from(spec.memory_bytes).unwrap_or(i64::MAX);
    let memory_limit = positive(limits.memory_limit).map_or(asked, |limit| limit.min(asked));
    let mut memory = LinuxMemoryBuilder::default().limit(memory_limit);
    if cgroup::counts_swap() {
        // With swap; nothing said is no swap.
        memory = memory.swap(positive(limits.memory_swap).unwrap_or(memory_limit).max(memory_limit));
    }
    let pids = LinuxPidsBuilder::default().limit(positive(limits.pids).unwrap_or(DEFAULT_PIDS)).build()?;
    let resources = LinuxResourcesBuilder::default().cpu(cpu).memory(memory.build()?).pids(pids);
    let Some(io) = io else { return resources.build() };
    let device = |rate: u64| {
        let device =
            LinuxThrottleDeviceBuilder::default().major(i64::from(io.disk.0)).minor(i64::from(io.disk.1));
        device.rate(rate).build()
    };
    let mut block = LinuxBlockIoBuilder::default();
    if io.read_bps > 0 {
        block = block.throttle_read_bps_device(vec![device(io.read_bps)?]);
    }
    if io.write_bps > 0 {
        block = block.throttle_write_bps_device(vec![device(io.write_bps)?]);
    }
    resources.block_io(block.build()?).build()
}
