//! The driver contract, fulfilled with QEMU.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;

use async_trait::async_trait;
use bytes::Bytes;
use futures::stream::BoxStream;
use hv_driver::{
    Capability, Console, Display, Driver, DriverError, DriverEvent, Exec, ExecRequest, Exit, FenceTarget,
    Fingerprint, Handle, Incoming, IncomingRequest, InstanceConfig, LogRequest, MigrateRequest,
    MigrationStatus, Observed, Result, SnapshotInfo, SnapshotRequest, Stats, StopMode, Updated,
};
use hv_machine::images::Images;
use hv_machine::log::Log;
use hv_machine::{Found, check_version, console, heard};
use hv_telemetry::crash::{self, Point};
use hv_types::{ImageInfo, InstanceId, InstanceType};
use parking_lot::Mutex;
use serde_json::Value;
use tokio::sync::broadcast;
use tokio_util::sync::CancellationToken;

use crate::create::{Disks, Tools};
use crate::files::{CONFIG, InstanceDir, LOCK, OWNS_DISKS, StateDir, Stored, VNC_SOCKET, remove_tree};
use crate::live::Live;
use crate::machine::{Machine, Shared};
use crate::migration::{self, Outgoing};
use crate::platform::{self, Platform};
use crate::problem::{Outcome, Problem};
use crate::{NAME, QemuOptions, agent, create, rescue, snapshots, update};

mod incoming;

/// Version of the handle's data, which is empty: everything is found by the instance's id.
const HANDLE_VERSION: u32 = 1;
/// How many events wait for a slow receiver before it loses the oldest.
const EVENT_QUEUE: usize = 1024;

/// What it can do where QEMU is there.
const CAPABILITIES: [Capability; 16] = [
    Capability::Pause,
    Capability::Console,
    Capability::Logs,
    Capability::Exec,
    Capability::Display,
    Capability::UserData,
    Capability::DirectBoot,
    Capability::ResizeLive,
    Capability::HotplugDisk,
    Capability::Snapshot,
    Capability::SnapshotMemory,
    Capability::Migrate,
    Capability::MigrateStorage,
    Capability::Rescue,
    Capability::FetchedImages,
    Capability::Devices,
];

/// Virtual machines, each a QEMU process of its own.
pub struct QemuDriver {
    options: QemuOptions,
    /// Where the disks of new instances are put, if not in their own directories.
    disk_dir: Option<PathBuf>,
    state: StateDir,
    images: Images,
    shared: Arc<Shared>,
    machines: Mutex<HashMap<InstanceId, Arc<Machine>>>,
    platform: tokio::sync::Mutex<Option<Arc<Platform>>>,
}

impl Drop for QemuDriver {
    fn drop(&mut self) {
        self.shared.cancelled.cancel();
    }
}

impl QemuDriver {
    /// A driver over a state directory. Neither it nor QEMU need be there: [`Driver::fingerprint`] says what is missing.
    #[must_use]
    pub fn new(options: QemuOptions) -> Self {
        let shared =
            Shared { events: broadcast::channel(EVENT_QUEUE).0, cancelled: CancellationToken::new() };
        // QEMU runs in a directory of its own, so every path must be good from everywhere.
        let absolute = |path: &std::path::Path| std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
        Self {
            state: StateDir(absolute(&options.state_dir)),
            images: Images::new(&absolute(&options.image_dir)),
            shared: Arc::new(shared),
            machines: Mutex::default(),
            platform: tokio::sync::Mutex::default(),
            disk_dir: None,
            options,
        }
    }

    /// Puts the disks of instances that are created from now on below this directory, each in one named after its
    /// instance. Where several nodes mount the same directory at the same place, instances can be handed over
    /// between them without copying disks.
    #[must_use]
    pub fn with_disk_dir(mut self, dir: &std::path::Path) -> Self {
        self.disk_dir = std::path::absolute(dir).ok();
        self
    }

    async fn platform(&self) -> Result<Arc<Platform>> {
        let mut known = self.platform.lock().await;
        if let Some(platform) = known.as_ref().filter(|platform| platform.is_current()) {
            return Ok(platform.clone());
        }
        let inspected = Platform::inspect(&self.options).await;
        let platform = inspected.map_err(|reason| DriverError::Unavailable { driver: NAME, reason })?;
        Ok(known.insert(Arc::new(platform)).clone())
    }

    fn find(&self, id: &InstanceId, operation: &'static str) -> Result<Found<Machine>> {
        let mut machines = self.machines.lock();
        if let Some(machine) = machines.get(id) {
            return Ok(Found::Whole(machine.clone()));
        }
        let path = self.state.of(id);
        let dir = match InstanceDir::open(path.clone()) {
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
                return Ok(if self.state.trash(id).exists() { Found::Part } else { Found::Nothing });
            }
            other => other
                .map_err(Problem::file("open", &path))
                .map_err(|e| DriverError::failed(id, operation, e))?,
        };
        let stored = dir.read::<Stored>(CONFIG).map_err(|e| DriverError::failed(id, operation, e))?;
        let Some(stored) = stored else { return Ok(Found::Part) };
        check_version(id, stored.version, Stored::VERSION)?;
        let machine = Arc::new(Machine::new(dir, stored, self.shared.clone()));
        machines.insert(id.clone(), machine.clone());
        Ok(Found::Whole(machine))
    }

    fn machine(&self, id: &InstanceId, operation: &'static str) -> Result<Arc<Machine>> {
        self.find(id, operation)?.whole(id, operation)
    }

    async fn live(&self, id: &InstanceId, operation: &'static str) -> Result<(Arc<Machine>, Arc<Live>)> {
        let machine = self.machine(id, operation)?;
        match machine.live(operation).await? {
            Some(live) => Ok((machine, live)),
            None => Err(DriverError::wrong_state(id, operation, "it does not run; start it first")),
        }
    }

    async fn make(&self, config: &InstanceConfig, from: Disks) -> Result<()> {
        let id = &config.id;
        if let Some((operation, reason)) = create::unsupported(&config.spec) {
            return Err(DriverError::Unsupported { driver: NAME, operation, reason });
        }
        let invalid = |reason| DriverError::invalid(id, reason);
        if config.devices.is_none() && !config.spec.devices.is_empty() {
            return Err(invalid("spec.devices: its node gave it nothing".to_owned()));
        }
        let boot = self.images.resolve(&config.spec, config.image.as_ref()).map_err(invalid)?;
        create::check(&config.spec, &boot).map_err(invalid)?;
        let rescue = rescue::plan(&self.images, config, None).map_err(invalid)?;
        let made = create::prepare(&self.state, config, &boot, &self.tools(), from, rescue).await;
        made.map(drop).map_err(|problem| match problem {
            Problem::Spawn { tool, remedy, source } => DriverError::Unavailable {
                driver: NAME,
                reason: format!("{tool} could not be run ({source}); {remedy}"),
            },
            other => DriverError::failed(id, "create", other),
        })
    }

    fn tools(&self) -> Tools {
        let qemu_img = self.options.qemu_img.clone().or_else(|| platform::find("qemu-img"));
        Tools {
            qemu_img: qemu_img.unwrap_or_else(|| PathBuf::from("qemu-img")),
            disk_dir: self.disk_dir.clone(),
        }
    }

    /// Removes the disks that lie elsewhere, unless they are another node's.
    fn remove_disks(&self, id: &InstanceId) -> Outcome<()> {
        let path = self.state.of(id);
        let Ok(dir) = InstanceDir::open(path) else { return Ok(()) };
        let given_away = Outgoing::read(&dir)?.is_some_and(|outgoing| outgoing.gave_disks_away());
        if !dir.file(OWNS_DISKS).exists() || given_away {
            return Ok(());
        }
        let stored = dir.read::<Stored>(CONFIG)?.and_then(|stored| stored.disk_dir);
        let planned = self.disk_dir.as_ref().map(|all| all.join(id.as_str()));
        stored.or(planned).map_or(Ok(()), |disks| remove_tree(&disks))
    }

    async fn remove(&self, id: &InstanceId) -> Result<()> {
        self.remove_disks(id).map_err(|e| DriverError::failed(id, "delete", e))?;
        let (state, owned) = (self.state.clone(), id.clone());
        let removal = tokio::task::spawn_blocking(move || -> Outcome<()> {
            if !state.set_aside(&owned)? {
                return Ok(());
            }
            crash::reach(Point::QemuDeleteBeforeRmdir);
            remove_tree(&state.trash(&owned))
        });
        let removal = removal.await;
        match removal {
            Ok(outcome) => outcome.map_err(|e| DriverError::failed(id, "delete", e)),
            Err(panicked) => Err(DriverError::failed(id, "delete", panicked)),
        }
    }
}

fn handle() -> Handle {
    Handle { driver: NAME.to_owned(), version: HANDLE_VERSION, data: Value::Null }
}

#[async_trait]
impl Driver for QemuDriver {
    fn name(&self) -> &'static str {
        NAME
    }

    fn instance_type(&self) -> InstanceType {
        InstanceType::Vm
    }

    fn takes_devices(&self) -> bool {
        true
    }

    async fn fingerprint(&self) -> Fingerprint {
        let (healthy, version, message) = match self.platform().await {
            Ok(platform) => match self.state.check_writable() {
                Ok(()) => (true, platform.version.clone(), platform.message.clone()),
                Err(reason) => (false, platform.version.clone(), reason),
            },
            Err(DriverError::Unavailable { reason, .. }) => (false, String::new(), reason),
            Err(other) => (false, String::new(), other.to_string()),
        };
        Fingerprint { healthy, version, message, capabilities: CAPABILITIES.to_vec(), images_are_local: true }
    }

    async fn images(&self) -> Result<Vec<ImageInfo>> {
        self.images.list().map_err(|e| DriverError::Unavailable {
            driver: NAME,
            reason: format!("the images in {} cannot be listed: {e}", self.options.image_dir.display()),
        })
    }

    async fn create(&self, config: &InstanceConfig) -> Result<Handle> {
        match self.find(&config.id, "create")? {
            Found::Whole(_) => return Ok(handle()),
            Found::Nothing => {}
            // Nothing of it was ever used.
            Found::Part => self.remove(&config.id).await?,
        }
        self.make(config, Disks::Fresh).await?;
        Ok(handle())
    }

    async fn start(&self, id: &InstanceId) -> Result<Handle> {
        let machine = self.machine(id, "start")?;
        let platform = self.platform().await?;
        snapshots::finish_revert(&machine, &self.tools()).await?;
        machine.start(&platform, &self.options.machine, &self.tools()).await?;
        Ok(handle())
    }

    async fn stop(&self, id: &InstanceId, mode: StopMode) -> Result<()> {
        match self.find(id, "stop")? {
            Found::Nothing => Err(DriverError::NotFound(id.clone())),
            Found::Part => Ok(()),
            Found::Whole(machine) => machine.stop(mode).await,
        }
    }

    async fn pause(&self, id: &InstanceId) -> Result<()> {
        self.machine(id, "pause")?.set_paused(true).await
    }

    async fn resume(&self, id: &InstanceId) -> Result<()> {
        self.machine(id, "resume")?.set_paused(false).await
    }

    async fn delete(&self, id: &InstanceId) -> Result<()> {
        if let Found::Whole(machine) = self.find(id, "delete")? {
            machine.stop(StopMode::Force).await?;
        }
        self.remove(id).await?;
        self.machines.lock().remove(id);
        Ok(())
    }

    async fn recover(&self, id: &InstanceId, _handle: Option<&Handle>) -> Result<Observed> {
        let observed = self.observe(id).await?;
        // A hand-over that was begun goes on.
        if let Found::Whole(machine) = self.find(id, "recover")? {
            migration::source::status(&machine).await?;
        }
        Ok(observed)
    }

    async fn observe(&self, id: &InstanceId) -> Result<Observed> {
        match self.find(id, "observe")? {
            Found::Nothing => Ok(Observed::Absent),
            Found::Part => Ok(Observed::Stopped(Exit::NeverStarted)),
            Found::Whole(machine) => machine.observe().await,
        }
    }

    /// The lock is taken before QEMU is started and is QEMU's own from then on: there is no moment between.
    fn fence_target(&self, id: &InstanceId) -> Option<FenceTarget> {
        Some(FenceTarget::LockHolder { path: self.state.of(id).join(LOCK) })
    }

    async fn list(&self) -> Result<Vec<InstanceId>> {
        self.state.list().map_err(|e| DriverError::Unavailable {
            driver: NAME,
            reason: format!(
                "{} cannot be read: {e}; check the agent's state directory and its permissions",
                self.state.0.display()
            ),
        })
    }

    fn events(&self) -> BoxStream<'static, DriverEvent> {
        heard(self.shared.events.subscribe())
    }

    async fn stats(&self, id: &InstanceId) -> Result<Stats> {
        let (_, live) = self.live(id, "stats").await?;
        let failed = |problem: Problem| DriverError::failed(id, "stats", problem);
        let (cpu_time_ns, memory_used_bytes) =
            live.process.usage().map_err(Problem::Process).map_err(failed)?;
        let devices = live.monitor.command("query-blockstats", None).await.map_err(failed)?;
        let sum = |counter: &str| {
            let counters = devices
                .as_array()
                .into_iter()
                .flatten()
                .filter_map(|device| device["stats"][counter].as_u64());
            counters.sum()
        };
        Ok(Stats {
            cpu_time_ns,
            memory_used_bytes,
            disk_read_bytes: sum("rd_bytes"),
            disk_write_bytes: sum("wr_bytes"),
            // QEMU's user-mode network counts nothing.
            ..Stats::default()
        })
    }

    async fn console(&self, id: &InstanceId) -> Result<Console> {
        let (_, live) = self.live(id, "console").await?;
        let ended = || DriverError::wrong_state(id, "console", "it has just ended; start it first");
        let output = live.console.view().await.ok_or_else(ended)?;
        Ok(Console { output, input: live.console.keyboard() })
    }

    async fn exec(&self, id: &InstanceId, request: ExecRequest) -> Result<Exec> {
        let (machine, live) = self.live(id, "exec").await?;
        if live.is_paused().await {
            return Err(DriverError::wrong_state(id, "exec", "it is paused; resume it first"));
        }
        agent::exec(machine, request).await
    }

    async fn logs(&self, id: &InstanceId, request: LogRequest) -> Result<BoxStream<'static, Result<Bytes>>> {
        let machine = self.machine(id, "logs")?;
        // Whoever follows must know whether it runs.
        let live = if request.follow { machine.live("logs").await? } else { machine.known_live() };
        let hub = live.as_ref().map(|live| &live.console);
        let logs = console::logs(&Log::new(&machine.dir.path), hub, request).await;
        logs.map_err(|e| DriverError::failed(id, "logs", e))
    }

    async fn display(&self, id: &InstanceId) -> Result<Display> {
        let (machine, _) = self.live(id, "display").await?;
        Ok(Display::Vnc(machine.dir.public_socket(VNC_SOCKET)))
    }

    async fn update(&self, config: &InstanceConfig) -> Result<Updated> {
        let machine = self.machine(&config.id, "update")?;
        let rescue = rescue::plan(&self.images, config, Some(&machine.stored()))
            .map_err(|reason| DriverError::invalid(&config.id, reason))?;
        update::update(&machine, config, rescue, &self.tools(), &self.options.machine).await
    }

    async fn snapshot(&self, id: &InstanceId, request: &SnapshotRequest) -> Result<SnapshotInfo> {
        let machine = self.machine(id, "snapshot")?;
        rescue::refuse(&machine, "snapshot")?;
        snapshots::take(&machine, request, &self.tools()).await
    }

    async fn revert(&self, id: &InstanceId, name: &str) -> Result<()> {
        let machine = self.machine(id, "revert")?;
        rescue::refuse(&machine, "revert")?;
        let platform = self.platform().await?;
        snapshots::revert(&machine, name, &self.tools(), &platform, &self.options.machine).await
    }

    async fn delete_snapshot(&self, id: &InstanceId, name: &str) -> Result<()> {
        snapshots::delete(&self.machine(id, "delete a snapshot")?, name, &self.tools()).await
    }

    async fn snapshots(&self, id: &InstanceId) -> Result<Vec<SnapshotInfo>> {
        let machine = self.machine(id, "list snapshots")?;
        snapshots::list(&machine).await
    }

    async fn clone_snapshot(
        &self,
        _source: &InstanceId,
        _name: &str,
        _config: &InstanceConfig,
    ) -> Result<Handle> {
        Err(self
            .cannot("clone", "its snapshots lie inside the disks of the instance that they were taken of"))
    }

    async fn prepare_incoming(&self, config: &InstanceConfig, request: &IncomingRequest) -> Result<Incoming> {
        self.expect(config, request).await
    }

    async fn migrate(&self, id: &InstanceId, request: &MigrateRequest) -> Result<()> {
        let machine = self.machine(id, "migrate")?;
        rescue::refuse(&machine, "migrate")?;
        let platform = self.platform().await?;
        migration::source::migrate(&machine, request, &self.options.machine, &platform).await
    }

    async fn migration(&self, id: &InstanceId) -> Result<Option<MigrationStatus>> {
        let machine = self.machine(id, "migration")?;
        let incoming = migration::target::status(&machine).await;
        match incoming.map_err(|e| DriverError::failed(id, "migration", e))? {
            Some(incoming) => Ok(Some(incoming)),
            None => migration::source::status(&machine).await,
        }
    }

    async fn abort_migration(&self, id: &InstanceId) -> Result<()> {
        migration::source::abort(&self.machine(id, "abort a migration")?).await
    }
}
