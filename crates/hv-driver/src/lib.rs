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
use hv_types::{ImageInfo, InstanceId, InstanceSpec, InstanceType, Metadata};
use serde::{Deserialize, Serialize};
use tokio::sync::mpsc;

#[cfg(feature = "conformance")]
pub mod conformance;
mod error;
pub mod fence;
pub mod log;

pub use error::{DriverError, Result};
pub use fence::FenceTarget;

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
}

impl Capability {
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
}

/// Where a screen is served.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Display {
    /// The VNC protocol (RFC 6143) on a unix socket of this node.
    Vnc(PathBuf),
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
}
