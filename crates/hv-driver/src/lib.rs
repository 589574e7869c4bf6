//! The driver contract: what an agent asks of a runtime, and what a runtime promises.
//!
//! # Guarantees (each is checked by the `conformance` module, behind the feature of that name)
//! - Every operation is idempotent: repeated after a crash at any point it ends in the same state, without a second
//!   copy of anything. `create` of what exists, `start` of what runs, `stop` of what stands, `delete` of what is gone
//!   are successes.
//! - Everything that belongs to an instance lies in one place named after its id, so that [`Driver::list`] finds what
//!   a crash left behind, and [`Driver::delete`] leaves nothing.
//! - Instances outlive the agent. [`Driver::recover`] finds them again without touching them.
//! - Where [`Driver::fence_target`] names a target, killing it ends the instance whatever becomes of the driver and its
//!   process, and nothing but a `start` makes it run again.
//! - What a runtime cannot do is refused with [`DriverError::Unsupported`], never ignored.
//!
//! # Assumptions
//! The agent calls at most one changing operation per instance at a time; reads and streams come at any time.

use std::net::IpAddr;
use std::path::PathBuf;
use std::time::{Duration, SystemTime};

use async_trait::async_trait;
use bytes::Bytes;
use futures::stream::BoxStream;
use hv_types::{DeviceGrant, ImageInfo, InstanceId, InstanceSpec, InstanceType, Metadata};
use serde::{Deserialize, Serialize};
use tokio::sync::mpsc;

#[cfg(feature = "conformance")]
pub mod conformance;
mod error;
pub mod fence;
pub mod log;
mod migration;
mod snapshot;

pub use error::{DriverError, Result};
pub use fence::FenceTarget;
pub use migration::{Incoming, IncomingRequest, MigrateRequest, MigrationPhase, MigrationStatus, Storage};
pub use snapshot::{SnapshotInfo, SnapshotRequest};

/// What an instance is to be, as its driver sees it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct InstanceConfig {
    /// Which instance.
    pub id: InstanceId,
    /// Its name; also the guest's host name.
    pub name: String,
    /// What it is made of.
    pub spec: InstanceSpec,
    /// Labels and annotations.
    pub metadata: Metadata,
    /// The image of the specification, where the node's image store has it; `None`: the driver looks for it itself.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub image: Option<LocalImage>,
    /// The rescue image of the specification, where the node's image store has it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rescue_image: Option<LocalImage>,
    /// What its node gave it for itself; only to drivers that [`Driver::takes_devices`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub devices: Option<DeviceGrant>,
}

impl InstanceConfig {
    /// What it boots from while it is in rescue: as if it were an instance of the rescue image. `None`: it is not in
    /// rescue.
    #[must_use]
    pub fn in_rescue(&self) -> Option<Self> {
        if !self.spec.is_in_rescue() {
            return None;
        }
        let mut rescue = self.clone();
        rescue.spec.image = std::mem::take(&mut rescue.spec.rescue);
        rescue.image = rescue.rescue_image.take();
        let spec = &mut rescue.spec;
        for own in [&mut spec.kernel, &mut spec.initrd, &mut spec.kernel_args, &mut spec.working_dir] {
            own.clear();
        }
        spec.command.clear();
        spec.args.clear();
        spec.env.clear();
        Some(rescue)
    }

    /// Refuses what an instance in rescue cannot do: it runs from another disk than its own.
    ///
    /// # Errors
    /// It is in rescue.
    pub fn refuse_in_rescue(&self, operation: &'static str) -> Result<()> {
        if !self.spec.is_in_rescue() {
            return Ok(());
        }
        Err(DriverError::wrong_state(&self.id, operation, "it is in rescue; unrescue it first"))
    }
}

/// An image that lies in the node's image store, and stays there until the instance is deleted. Read-only.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LocalImage {
    /// Its identity: `sha256:` and 64 hexadecimal digits, of the file or of the manifest.
    pub digest: String,
    /// What it is and where.
    pub content: ImageContent,
}

/// The forms in which images come.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "form", rename_all = "snake_case")]
pub enum ImageContent {
    /// A disk with an operating system.
    Disk {
        /// The file, absolute.
        path: PathBuf,
        /// `qcow2` or `raw`.
        format: DiskFormat,
    },
    /// An OCI image layout (image-spec 1.1): `index.json`, `blobs/sha256/…`.
    Oci {
        /// The layout's directory, absolute.
        layout: PathBuf,
        /// The digest of the manifest for this node's architecture: `sha256:…`.
        manifest: String,
    },
    /// A file system without a partition table (ext4, raw), made from an OCI image for microVMs.
    RootFs {
        /// The file, absolute.
        path: PathBuf,
        /// The image's entry point and arguments.
        command: Vec<String>,
        /// The image's environment, `NAME=value`.
        env: Vec<String>,
        /// The image's working directory; empty: `/`.
        working_dir: String,
    },
    /// A kernel or a bare-metal guest (ELF), that is booted without a disk.
    Kernel {
        /// The file, absolute.
        path: PathBuf,
    },
}

/// How a disk image is laid out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DiskFormat {
    /// QEMU's copy-on-write format.
    Qcow2,
    /// The sectors, one after the other.
    Raw,
}

impl DiskFormat {
    /// As QEMU and its tools call it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Qcow2 => "qcow2",
            Self::Raw => "raw",
        }
    }
}

/// What a driver needs to find an instance again. Kept in the agent's journal; only the driver reads `data`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Handle {
    /// The driver's name.
    pub driver: String,
    /// The version of `data`; a driver reads its own and the one before.
    pub version: u32,
    /// The driver's own.
    pub data: serde_json::Value,
}

/// What an instance is doing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Observed {
    /// Nothing of it is there.
    Absent,
    /// It was prepared, perhaps not completely, and does not run.
    Stopped(Exit),
    /// It runs.
    Running(Running),
    /// It stands still in memory.
    Paused(Running),
    /// It was handed over to another node and stands still for good: only [`Driver::abort_migration`] may let it go
    /// on, [`Driver::resume`] and [`Driver::start`] never.
    HandedOver,
}

/// What is known of an instance that runs.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Running {
    /// Since when.
    pub since: Option<SystemTime>,
    /// The guest's address, once known.
    pub ip: Option<IpAddr>,
}

/// How it came that an instance does not run.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Exit {
    /// It was never started.
    NeverStarted,
    /// It ended by itself, without a fault: the guest powered off, or exit code 0.
    Finished,
    /// It was stopped through the driver.
    Stopped,
    /// It ended with a fault; the text says which: an exit code, a signal, out of memory.
    Failed(String),
    /// It was seen running and is gone, and nobody knows how: the host restarted, or the process was killed.
    Lost,
    /// The node stopped it because the control plane was out of reach and might start it elsewhere.
    Fenced,
}

/// How to stop.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StopMode {
    /// Ask the guest; after the timeout pull the plug.
    Graceful(Duration),
    /// Pull the plug.
    Force,
}

/// What a driver can do beyond the life cycle.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Capability {
    /// Hold and go on.
    Pause,
    /// A console that takes input.
    Console,
    /// Logs.
    Logs,
    /// Commands inside the guest.
    Exec,
    /// A screen.
    Display,
    /// cloud-init user data.
    UserData,
    /// Kernel and initial ram disk given in the specification.
    DirectBoot,
    /// Commands with a terminal.
    ExecTty,
    /// Cores and memory changed while it runs.
    ResizeLive,
    /// Disks attached and detached while it runs.
    HotplugDisk,
    /// Network interfaces attached and detached while it runs.
    HotplugNetwork,
    /// Its disks at a moment, to return to.
    Snapshot,
    /// Its disks and memory at a moment, to return to.
    SnapshotMemory,
    /// New instances from a snapshot.
    Clone,
    /// Moves to another node while it runs, with disks that both nodes reach.
    Migrate,
    /// Moves to another node while it runs, its disks copied.
    MigrateStorage,
    /// Started from another image with its own disk beside, to be repaired.
    Rescue,
    /// Bounds of processor time, memory and I/O from [`hv_types::instance::ResourceLimits`].
    Limits,
    /// Directories of the node mounted in it.
    Volumes,
    /// Images of the node's image store: [`InstanceConfig::image`].
    FetchedImages,
    /// Processors, huge pages and PCI devices of the node that it has for itself: [`InstanceConfig::devices`].
    Devices,
}

impl Capability {
    /// Every capability.
    pub const ALL: [Self; 21] = [
        Self::Pause,
        Self::Console,
        Self::Logs,
        Self::Exec,
        Self::ExecTty,
        Self::Display,
        Self::UserData,
        Self::DirectBoot,
        Self::ResizeLive,
        Self::HotplugDisk,
        Self::HotplugNetwork,
        Self::Snapshot,
        Self::SnapshotMemory,
        Self::Clone,
        Self::Migrate,
        Self::MigrateStorage,
        Self::Rescue,
        Self::Limits,
        Self::Volumes,
        Self::FetchedImages,
        Self::Devices,
    ];

    /// As the API spells it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Pause => "pause",
            Self::Console => "console",
            Self::Logs => "logs",
            Self::Exec => "exec",
            Self::Display => "display",
            Self::UserData => "user_data",
            Self::DirectBoot => "direct_boot",
            Self::ExecTty => "exec_tty",
            Self::ResizeLive => "resize_live",
            Self::HotplugDisk => "hotplug_disk",
            Self::HotplugNetwork => "hotplug_network",
            Self::Snapshot => "snapshot",
            Self::SnapshotMemory => "snapshot_memory",
            Self::Clone => "clone",
            Self::Migrate => "migrate",
            Self::MigrateStorage => "migrate_storage",
            Self::Rescue => "rescue",
            Self::Limits => "limits",
            Self::Volumes => "volumes",
            Self::FetchedImages => hv_types::DriverInfo::FETCHED_IMAGES,
            Self::Devices => "devices",
        }
    }
}

/// What a driver says of itself and its runtime.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fingerprint {
    /// Whether it can run something now.
    pub healthy: bool,
    /// The runtime's version, as far as known.
    pub version: String,
    /// Why it is not healthy, with the remedy; or what an operator should know.
    pub message: String,
    /// What it can do.
    pub capabilities: Vec<Capability>,
    /// Whether only what [`Driver::images`] lists can be started.
    pub images_are_local: bool,
}

/// How much an instance uses. Counters since it was started.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Stats {
    /// Processor time used, in nanoseconds. The agent derives the percentage from two readings.
    pub cpu_time_ns: u64,
    /// Memory in use, in bytes.
    pub memory_used_bytes: u64,
    /// Of it, cache, in bytes.
    pub memory_cache_bytes: u64,
    /// Bytes read from disks.
    pub disk_read_bytes: u64,
    /// Bytes written to disks.
    pub disk_write_bytes: u64,
    /// Bytes received.
    pub network_rx_bytes: u64,
    /// Bytes sent.
    pub network_tx_bytes: u64,
}

/// A terminal's size in characters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TerminalSize {
    /// Columns.
    pub width: u16,
    /// Rows.
    pub height: u16,
}

/// What a user types into a console or a command.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Input {
    /// Bytes.
    Data(Bytes),
    /// The terminal has another size now.
    Resize(TerminalSize),
    /// There will be no more bytes.
    Eof,
}

/// Both directions of a console. Dropping it detaches; the instance does not notice.
pub struct Console {
    /// What was printed before, as far as it is kept, then what is printed now. Ends when the instance does.
    pub output: BoxStream<'static, Result<Bytes>>,
    /// What the user types. Bounded; a runtime without resize ignores it.
    pub input: mpsc::Sender<Input>,
}

/// A command to run in a guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExecRequest {
    /// Program and arguments; never interpreted by a shell of ours.
    pub command: Vec<String>,
    /// Variables added to the guest's.
    pub env: Vec<(String, String)>,
    /// A terminal of this size; `None` is pipes.
    pub tty: Option<TerminalSize>,
}

/// What a command in a guest prints.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ExecOutput {
    /// Standard output.
    Stdout(Bytes),
    /// Standard error.
    Stderr(Bytes),
    /// It ended; always the last item.
    Exited {
        /// Its exit code; 128 + n for signal n.
        code: i32,
    },
}

/// A running command. Dropping it ends the command where the runtime can.
pub struct Exec {
    /// What it prints, then how it ended.
    pub output: BoxStream<'static, Result<ExecOutput>>,
    /// What the user types.
    pub input: mpsc::Sender<Input>,
}

/// Which part of a log.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LogRequest {
    /// Only the last so many lines; all that is kept if `None`.
    pub tail_lines: Option<u64>,
    /// Go on with what comes; ends when the instance does.
    pub follow: bool,
    /// Only what was printed since then, as exactly as the runtime keeps times: never less, perhaps more.
    pub since: Option<SystemTime>,
}

/// Where a screen is served.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Display {
    /// The VNC protocol (RFC 6143) on a unix socket of this node.
    Vnc(PathBuf),
}

/// What a change of the specification came to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Updated {
    /// The instance is as the new configuration says.
    Done,
    /// It will be when it is started the next time; the text says what has to wait and why.
    AtNextStart(String),
}

/// Something changed without being asked for; the agent looks at the instance.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DriverEvent {
    /// Which instance.
    pub id: InstanceId,
    /// Why, for the log.
    pub what: String,
}

/// A runtime of one type of instance on this node.
#[async_trait]
pub trait Driver: Send + Sync + 'static {
    /// Its name: `qemu`, `fake`, …
    fn name(&self) -> &'static str;

    /// What it runs.
    fn instance_type(&self) -> InstanceType;

    /// Whether its instances get what [`InstanceConfig::devices`] says: [`Capability::Devices`]. Any other driver refuses to
    /// create an instance whose specification asks for devices, and its node has none to give.
    fn takes_devices(&self) -> bool {
        false
    }

    /// Looks at the runtime. Never fails: what is missing is said in the answer. Cheap enough for every minute.
    async fn fingerprint(&self) -> Fingerprint;

    /// The images that can be started here.
    async fn images(&self) -> Result<Vec<ImageInfo>>;

    /// Prepares everything short of running. The spec of what exists is not changed by a second call.
    ///
    /// # Errors
    /// [`DriverError::InvalidConfig`] if this node can never run it (an unknown image, say); nothing is left behind.
    async fn create(&self, config: &InstanceConfig) -> Result<Handle>;

    /// Runs it. Returns when the runtime has it running, not when the guest is up.
    async fn start(&self, id: &InstanceId) -> Result<Handle>;

    /// Stops it. Returns when it does not run any more.
    async fn stop(&self, id: &InstanceId, mode: StopMode) -> Result<()>;

    /// Holds it still in memory.
    async fn pause(&self, id: &InstanceId) -> Result<()>;

    /// Lets it go on.
    async fn resume(&self, id: &InstanceId) -> Result<()>;

    /// Removes it with everything that belongs to it, running or not.
    async fn delete(&self, id: &InstanceId) -> Result<()>;

    /// Takes over what an earlier agent process left, without touching it; must precede every other call for that
    /// instance. `handle` is the last one journalled; there may be none, or one of an older version.
    async fn recover(&self, id: &InstanceId, handle: Option<&Handle>) -> Result<Observed>;

    /// What it is doing.
    async fn observe(&self, id: &InstanceId) -> Result<Observed>;

    /// How this instance is killed for certain without this driver: by another process, while the agent hangs or is
    /// dead. The answer holds from before the instance is first started until it is deleted. `None`: it cannot be.
    fn fence_target(&self, id: &InstanceId) -> Option<FenceTarget> {
        let _ = id;
        None
    }

    /// Every instance of which something is there.
    async fn list(&self) -> Result<Vec<InstanceId>>;

    /// Changes that nobody asked for, from now on. A receiver that is too slow loses the oldest and looks at all.
    fn events(&self) -> BoxStream<'static, DriverEvent>;

    /// One item per turn of its health that the driver notices by itself; who gets it asks for the fingerprint. A driver
    /// that notices nothing between two fingerprints never sends any.
    fn health_turns(&self) -> BoxStream<'static, ()> {
        Box::pin(futures::stream::pending())
    }

    /// How much it uses.
    async fn stats(&self, id: &InstanceId) -> Result<Stats>;

    /// Attaches to its console. Several may be attached at once.
    async fn console(&self, id: &InstanceId) -> Result<Console>;

    /// Runs a command in it.
    async fn exec(&self, id: &InstanceId, request: ExecRequest) -> Result<Exec>;

    /// Reads what it has printed; also of an instance that does not run.
    async fn logs(&self, id: &InstanceId, request: LogRequest) -> Result<BoxStream<'static, Result<Bytes>>>;

    /// Where its screen is.
    async fn display(&self, id: &InstanceId) -> Result<Display>;

    /// Makes an instance that exists, running or not, what this configuration says: name, cores, memory, limits, disks,
    /// network interfaces, and whether it is in rescue: from the next start on. A disk that is in the new configuration only is made, one that is missing from it is removed with what is on
    /// it; the boot disk may only grow. Idempotent. Whatever fails, what ran goes on as it was.
    ///
    /// # Errors
    /// [`DriverError::InvalidConfig`] for what can never be (another image, a disk that shrinks).
    async fn update(&self, config: &InstanceConfig) -> Result<Updated> {
        let _ = config;
        Err(self.cannot("be changed", "it is fixed when it is created"))
    }

    /// Keeps what the instance is at this moment under a name. A second request with the same name returns the first
    /// snapshot.
    async fn snapshot(&self, id: &InstanceId, request: &SnapshotRequest) -> Result<SnapshotInfo> {
        let _ = (id, request);
        Err(self.cannot("snapshot", "it has no snapshots"))
    }

    /// Returns to a snapshot. With memory it runs, or stands still, as it did then; without it does not run afterwards.
    async fn revert(&self, id: &InstanceId, name: &str) -> Result<()> {
        let _ = (id, name);
        Err(self.cannot("revert", "it has no snapshots"))
    }

    /// Forgets a snapshot; one that is not there is forgotten already.
    async fn delete_snapshot(&self, id: &InstanceId, name: &str) -> Result<()> {
        let _ = (id, name);
        Err(self.cannot("delete a snapshot", "it has no snapshots"))
    }

    /// The snapshots of an instance, oldest first.
    async fn snapshots(&self, id: &InstanceId) -> Result<Vec<SnapshotInfo>> {
        let _ = id;
        Err(self.cannot("list snapshots", "it has no snapshots"))
    }

    /// Creates an instance from the snapshot of another on this node: with its memory, where the snapshot has it. What must be unique
    /// (identity, addresses, entropy) is the new one's own.
    async fn clone_snapshot(
        &self,
        source: &InstanceId,
        name: &str,
        config: &InstanceConfig,
    ) -> Result<Handle> {
        let _ = (source, name, config);
        Err(self.cannot("clone", "it has no snapshots"))
    }

    /// Prepares an instance that is about to be handed over by another node: everything is there, it stands still and waits. It is
    /// observed as [`Observed::Paused`], and runs only after [`Driver::resume`]. [`Driver::delete`] gives it up.
    /// A second request with the same migration returns the same answer.
    async fn prepare_incoming(&self, config: &InstanceConfig, request: &IncomingRequest) -> Result<Incoming> {
        let _ = (config, request);
        Err(self.cannot("migrate", "its runtime cannot move what runs"))
    }

    /// Begins to hand a running instance over. Returns at once; [`Driver::migration`] tells how far it is. It runs here until
    /// everything is there, then is [`Observed::HandedOver`]. A second request with the same migration changes nothing.
    async fn migrate(&self, id: &InstanceId, request: &MigrateRequest) -> Result<()> {
        let _ = (id, request);
        Err(self.cannot("migrate", "its runtime cannot move what runs"))
    }

    /// How far the last migration is; `None` if there was none since it was started. Where an instance waits to be handed over,
    /// a driver that can tell says [`MigrationPhase::Memory`] while not everything of it has come.
    async fn migration(&self, id: &InstanceId) -> Result<Option<MigrationStatus>> {
        let _ = id;
        Err(self.cannot("migrate", "its runtime cannot move what runs"))
    }

    /// Ends a migration wherever it is, also after the hand-over: the instance runs on here. The caller has made sure that it will
    /// never run on the other node.
    async fn abort_migration(&self, id: &InstanceId) -> Result<()> {
        let _ = id;
        Err(self.cannot("migrate", "its runtime cannot move what runs"))
    }

    /// What it says of something that it cannot do.
    fn cannot(&self, operation: &'static str, reason: &str) -> DriverError {
        DriverError::Unsupported { driver: self.name(), operation, reason: reason.to_owned() }
    }
}
