//! What this node has and how its drivers are doing.

use std::net::{IpAddr, Ipv4Addr, UdpSocket};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use futures::StreamExt as _;
use futures::future::join_all;
use futures::stream::select_all;
use hv_driver::{Driver, Fingerprint};
use hv_proto::v1::NodeUsage;
use hv_types::node::MAX_IMAGES;
use hv_types::{DeviceInventory, DriverInfo, ImageInfo, InstanceType, NodeCondition, Resources};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::context::{Context, Machine};

/// The pause after a look at the node, however many drivers turn meanwhile.
const LEAST_PAUSE: Duration = Duration::from_millis(250);

/// What the control plane is told of this node, beside its name and place.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Inventory {
    pub(crate) capacity: Resources,
    pub(crate) allocatable: Resources,
    pub(crate) drivers: Vec<DriverInfo>,
    pub(crate) images: Vec<ImageInfo>,
    pub(crate) devices: DeviceInventory,
    pub(crate) conditions: Vec<NodeCondition>,
}

/// What the machine has, as far as instances may use it: `state_dir` is where their disks will be.
pub(crate) fn capacity(state_dir: &Path) -> Resources {
    let memory_bytes = match sysinfo::System::new() {
        Ok(mut system) => {
            system.refresh_memory();
            system.total_memory()
        }
        Err(error) => {
            tracing::error!(%error, "this machine's memory cannot be told; the node offers none");
            0
        }
    };
    let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    let (disk_bytes, _) = disk_space(state_dir);
    Resources { cpu_cores: u32::try_from(cores).unwrap_or(u32::MAX), memory_bytes, disk_bytes, gpu_count: 0 }
}

/// Size of the file system and what is used of it, in bytes; 0 where it cannot be told.
#[cfg(unix)]
fn disk_space(dir: &Path) -> (u64, u64) {
    let Ok(space) = rustix::fs::statvfs(dir) else { return (0, 0) };
    let total = space.f_blocks.saturating_mul(space.f_frsize);
    (total, total.saturating_sub(space.f_bavail.saturating_mul(space.f_frsize)))
}

/// Size of the file system and what is used of it, in bytes; 0 where it cannot be told.
#[cfg(not(unix))]
fn disk_space(dir: &Path) -> (u64, u64) {
    let disks = sysinfo::Disks::new_with_refreshed_list();
    let holds = |disk: &&sysinfo::Disk| dir.starts_with(disk.mount_point());
    let nearest = disks.iter().filter(holds).max_by_key(|disk| disk.mount_point().as_os_str().len());
    nearest.map_or((0, 0), |d| (d.total_space(), d.total_space().saturating_sub(d.available_space())))
}

/// Which boot of the machine this is.
pub(crate) fn boot_id() -> String {
    // Linux: random(4), /proc/sys/kernel/random/boot_id.
    std::fs::read_to_string("/proc/sys/kernel/random/boot_id").map_or_else(
        |_| sysinfo::System::boot_time().unwrap_or_default().to_string(),
        |id| id.trim().to_owned(),
    )
}

/// The system's host name.
pub(crate) fn hostname() -> String {
    sysinfo::System::host_name().ok().filter(|name| !name.is_empty()).unwrap_or_else(|| "localhost".into())
}

/// The address from which this machine reaches `authority` (`host:port`). Nothing is sent: connecting a datagram
/// socket only asks the routing table. May block on the resolver.
pub(crate) fn own_address(authority: &str) -> IpAddr {
    let ask = || {
        let target = std::net::ToSocketAddrs::to_socket_addrs(authority).ok()?.next()?;
        let any = if target.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
        let socket = UdpSocket::bind(any).ok()?;
        socket.connect(target).ok()?;
        Some(socket.local_addr().ok()?.ip())
    };
    ask().filter(|ip| !ip.is_unspecified()).unwrap_or(IpAddr::V4(Ipv4Addr::LOCALHOST))
}

/// Reads what is really in use.
pub(crate) struct Usage {
    /// `None` where this machine does not tell.
    system: Option<sysinfo::System>,
}

impl Usage {
    /// Of a made-up machine nothing is read.
    pub(crate) fn of(machine: &Machine) -> Self {
        let system = match machine {
            Machine::Real => sysinfo::System::new().ok(),
            Machine::Simulated { .. } => None,
        };
        Self { system }
    }

    /// What is in use; the processor's since the reading before.
    pub(crate) fn read(&mut self, state_dir: &Path) -> NodeUsage {
        let (mut cpu_usage_percent, mut memory_used_bytes, mut used) = (0.0, 0, 0);
        if let Some(system) = &mut self.system {
            used = disk_space(state_dir).1;
            system.refresh_cpu_usage();
            system.refresh_memory();
            cpu_usage_percent = system.cpus().iter().map(|cpu| f64::from(cpu.usage())).sum();
            memory_used_bytes = i64::try_from(system.used_memory()).unwrap_or(i64::MAX);
        }
        NodeUsage {
            cpu_usage_percent,
            memory_used_bytes,
            disk_used_bytes: i64::try_from(used).unwrap_or(i64::MAX),
        }
    }
}

/// Reads what is in use every so often, until the agent stops; on a thread that may block, because a file system may
/// hang.
pub(crate) async fn follow_usage(
    context: Arc<Context>,
    state_dir: PathBuf,
    every: Duration,
    usage: watch::Sender<NodeUsage>,
    stopping: CancellationToken,
) {
    let machine = context.tuning.machine.clone();
    let mut reader = Usage::of(&machine);
    let read = async {
        loop {
            let dir = state_dir.clone();
            let (same, read) = machine
                .block_on(move || {
                    let read = reader.read(&dir);
                    (reader, read)
                })
                .await;
            reader = same;
            usage.send_replace(read);
            tokio::time::sleep(every).await;
        }
    };
    stopping.run_until_cancelled(read).await;
}

/// Keeps the inventory up to date.
pub(crate) struct Inventor {
    pub(crate) context: Arc<Context>,
    pub(crate) inventory: watch::Sender<Option<Inventory>>,
    pub(crate) capacity: Resources,
    pub(crate) allocatable: Resources,
    /// Only these types; empty: all.
    pub(crate) types: Vec<InstanceType>,
}

impl Inventor {
    /// Looks at the node now and then, and at once when its images have changed or a driver's health turns, until the
    /// agent stops.
    pub(crate) async fn run(self, stopping: CancellationToken) {
        let mut ticks = tokio::time::interval(self.context.tuning.inventory_every);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        // Before the first look, so that no turn falls between the two.
        let mut turns = select_all(self.context.drivers.all().iter().map(|driver| driver.health_turns()));
        loop {
            tokio::select! {
                () = stopping.cancelled() => return,
                _ = ticks.tick() => {}
                () = self.context.images.changed() => {}
                Some(()) = turns.next() => {}
            }
            let Some(taken) = stopping.run_until_cancelled(self.take()).await else { return };
            self.inventory.send_if_modified(|old| {
                let merged = settle(old.as_ref(), taken);
                let differs = old.as_ref() != Some(&merged);
                *old = Some(merged);
                differs
            });
            // A runtime that comes and goes all the time must not keep node and server busy.
            let pause = tokio::time::sleep(LEAST_PAUSE);
            if stopping.run_until_cancelled(pause).await.is_none() {
                return;
            }
        }
    }

    async fn take(&self) -> Inventory {
        let looked = join_all(self.context.drivers.all().iter().map(|driver| self.look(driver))).await;
        let mut drivers = Vec::new();
        let mut images = Vec::new();
        for (info, found) in looked {
            drivers.push(info);
            images.extend(found);
        }
        let conditions = drivers.iter().map(condition_of).chain(self.journal_condition()).collect();
        drivers.retain(|info| self.types.is_empty() || self.types.contains(&info.instance_type));
        for image in self.context.images.list() {
            let is_known =
                |known: &ImageInfo| (&known.name, known.instance_type) == (&image.name, image.instance_type);
            if !images.iter().any(is_known) {
                images.push(image);
            }
        }
        if images.len() > MAX_IMAGES {
            tracing::warn!(images = images.len(), "only the first {MAX_IMAGES} images are reported");
            images.truncate(MAX_IMAGES);
        }
        let devices = self.devices().await;
        let (capacity, allocatable) = (self.capacity, self.allocatable);
        Inventory { capacity, allocatable, drivers, images, devices, conditions }
    }

    /// Nothing where no driver could give it on.
    async fn devices(&self) -> DeviceInventory {
        if !self.context.drivers.all().iter().any(|driver| driver.takes_devices()) {
            return DeviceInventory::default();
        }
        let devices = Arc::clone(&self.context.devices);
        self.context.tuning.machine.block_on(move || devices.inventory()).await
    }

    async fn look(&self, driver: &Arc<dyn Driver>) -> (DriverInfo, Vec<ImageInfo>) {
        let deadline = self.context.tuning.look_deadline;
        let fingerprint =
            tokio::time::timeout(deadline, driver.fingerprint()).await.unwrap_or_else(|_| Fingerprint {
                healthy: false,
                version: String::new(),
                message: format!("it did not answer within {} s; see the agent's log", deadline.as_secs()),
                capabilities: Vec::new(),
                images_are_local: true,
            });
        let images = if fingerprint.healthy {
            match tokio::time::timeout(deadline, driver.images()).await {
                Ok(Ok(images)) => images,
                Ok(Err(error)) => {
                    let error = hv_telemetry::error_chain(&error);
                    tracing::warn!(driver = driver.name(), error, "the driver cannot list its images");
                    Vec::new()
                }
                Err(_) => Vec::new(),
            }
        } else {
            Vec::new()
        };
        let info = DriverInfo {
            name: driver.name().to_owned(),
            instance_type: driver.instance_type(),
            healthy: fingerprint.healthy,
            version: fingerprint.version,
            message: fingerprint.message,
            capabilities: fingerprint.capabilities.iter().map(|c| c.name().to_owned()).collect(),
            images_are_local: fingerprint.images_are_local,
        };
        (info, images)
    }

    fn journal_condition(&self) -> Option<NodeCondition> {
        let damaged = &self.context.damaged;
        let (id, why) = damaged.first_key_value()?;
        let message = format!(
            "{} instances are left alone because their journal is damaged, as {id} ({why}); restore the file, or remove \
             it once the instance is not needed",
            damaged.len()
        );
        Some(condition("Journal", false, "Damaged", message))
    }
}

fn condition(kind: impl Into<String>, ok: bool, reason: &str, message: String) -> NodeCondition {
    NodeCondition {
        kind: kind.into(),
        status: if ok { "True" } else { "False" }.into(),
        reason: reason.into(),
        message,
        last_transition: SystemTime::now(),
    }
}

/// `DriverQemu`: whether it can run something, and if not the remedy.
fn condition_of(info: &DriverInfo) -> NodeCondition {
    let mut letters = info.name.chars();
    let first = letters.next().map(|first| first.to_ascii_uppercase());
    let kind = format!("Driver{}{}", first.map(String::from).unwrap_or_default(), letters.as_str());
    condition(kind, info.healthy, if info.healthy { "Healthy" } else { "Unhealthy" }, info.message.clone())
}

/// The new inventory; conditions whose status is as before keep the time of their last change.
fn settle(old: Option<&Inventory>, mut new: Inventory) -> Inventory {
    for condition in &mut new.conditions {
        let before = old.and_then(|old| old.conditions.iter().find(|c| c.kind == condition.kind));
        if let Some(before) = before.filter(|before| before.status == condition.status) {
            condition.last_transition = before.last_transition;
        }
    }
    new
}

#[cfg(test)]
mod tests {
    use super::*;

    fn info(healthy: bool) -> DriverInfo {
        DriverInfo {
            name: "qemu".into(),
            instance_type: InstanceType::Vm,
            healthy,
            version: String::new(),
            message: "install qemu-system-x86".into(),
            capabilities: Vec::new(),
            images_are_local: true,
        }
    }

    #[test]
    fn an_unhealthy_driver_becomes_a_condition_with_its_remedy() {
        let condition = condition_of(&info(false));
        assert_eq!((condition.kind.as_str(), condition.status.as_str()), ("DriverQemu", "False"));
        assert_eq!(condition.message, "install qemu-system-x86");
    }

    #[test]
    fn a_condition_keeps_the_time_of_its_last_change() {
        let of = |healthy, at| {
            let condition = NodeCondition { last_transition: at, ..condition_of(&info(healthy)) };
            Inventory {
                capacity: Resources::default(),
                allocatable: Resources::default(),
                drivers: Vec::new(),
                images: Vec::new(),
                devices: DeviceInventory::default(),
                conditions: vec![condition],
            }
        };
        let (early, late) = (SystemTime::UNIX_EPOCH, SystemTime::now());
        let old = of(true, early);
        assert_eq!(settle(Some(&old), of(true, late)), old);
        assert_eq!(settle(Some(&old), of(false, late)).conditions[0].last_transition, late);
    }

    #[test]
    fn this_machine_has_something() {
        let dir = tempfile::tempdir().unwrap();
        let capacity = capacity(dir.path());
        assert!(
            capacity.cpu_cores > 0 && capacity.memory_bytes > 0 && capacity.disk_bytes > 0,
            "{capacity:?}"
        );
        assert!(!boot_id().is_empty() && !hostname().is_empty());
        assert!(own_address("127.0.0.1:9").is_loopback());
    }
}
