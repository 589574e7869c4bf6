//! The driver contract, fulfilled with Firecracker.

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;

use async_trait::async_trait;
use bytes::Bytes;
use futures::stream::BoxStream;
use hv_driver::{
    Capability, Console, Display, Driver, DriverError, DriverEvent, Exec, ExecRequest, Exit, FenceTarget,
    Fingerprint, Handle, InstanceConfig, LogRequest, Observed, Result, SnapshotInfo, SnapshotRequest, Stats,
    StopMode, Updated,
};
use hv_machine::log::Log;
use hv_machine::{Found, check_version, console, heard};
use hv_types::{ImageInfo, InstanceId, InstanceType};
use parking_lot::Mutex;
use serde_json::Value;
use tokio::sync::broadcast;
use tokio_util::sync::CancellationToken;

use crate::files::{CONFIG, InstanceDir, LOCK, StateDir, Stored, root_of};
use crate::images::Images;
use crate::machine::{Live, Machine, Shared};
use crate::platform::Platform;
use crate::problem::{Outcome, Problem};
use crate::{FirecrackerOptions, NAME, jail, tap};

mod change;
mod usage;

/// Version of the handle's data, which is empty: everything is found by the instance's id.
const HANDLE_VERSION: u32 = 1;
/// How many events wait for a slow receiver before it loses the oldest.
const EVENT_QUEUE: usize = 1024;

/// What it can do where Firecracker is there; in a jail it keeps limits too.
const CAPABILITIES: [Capability; 10] = [
    Capability::Pause,
    Capability::Console,
    Capability::Logs,
    Capability::UserData,
    Capability::DirectBoot,
    Capability::Snapshot,
    Capability::SnapshotMemory,
    Capability::Clone,
    Capability::Rescue,
    Capability::FetchedImages,
];

/// MicroVMs, each a Firecracker process of its own.
pub struct FirecrackerDriver {
    state: StateDir,
    images: Images,
    shared: Arc<Shared>,
    machines: Mutex<HashMap<InstanceId, Arc<Machine>>>,
    platform: tokio::sync::Mutex<Option<Arc<Platform>>>,
    /// The user ids in use, once they were looked up.
    uids: Mutex<Option<BTreeSet<u32>>>,
}

impl Drop for FirecrackerDriver {
    fn drop(&mut self) {
        self.shared.cancelled.cancel();
    }
}

impl FirecrackerDriver {
    /// A driver over a state directory. Neither it nor Firecracker need be there: [`Driver::fingerprint`] says what is
    /// missing.
    #[must_use]
    pub fn new(options: FirecrackerOptions) -> Self {
        let images = Images::new(&options);
        // A VMM runs in a directory of its own, so every path must be good from everywhere.
        let state = std::path::absolute(&options.state_dir).unwrap_or_else(|_| options.state_dir.clone());
        let shared = Shared {
            options,
            events: broadcast::channel(EVENT_QUEUE).0,
            cancelled: CancellationToken::new(),
        };
        Self {
            state: StateDir(state),
            images,
            shared: Arc::new(shared),
            machines: Mutex::default(),
            platform: tokio::sync::Mutex::default(),
            uids: Mutex::default(),
        }
    }

    /// Where on this node the guest's vsock is reached: a unix socket that takes `CONNECT <port>` and a line feed
    /// (Firecracker's docs/vsock.md). There while the instance runs.
    #[must_use]
    pub fn vsock_path(&self, id: &InstanceId) -> Option<std::path::PathBuf> {
        let path = self.state.of(id);
        let dir = InstanceDir::open(path).ok()?;
        Some(root_of(&dir, id).join(crate::files::VSOCK_SOCKET))
    }

    /// Takes so many bytes from a guest that has a balloon driver, rounded down to whole MiB; 0 gives all back.
    ///
    /// # Errors
    /// [`DriverError::WrongState`] if it does not run or has no such driver.
    pub async fn set_balloon(&self, id: &InstanceId, bytes: u64) -> Result<()> {
        let (_, live) = self.live(id, "set the balloon").await?;
        let target = crate::api::types::BalloonTarget { amount_mib: bytes >> 20 };
        let set = async { live.api().await?.inflate(&target).await };
        set.await.map_err(|problem| match problem {
            Problem::Refused { reason, .. } => DriverError::wrong_state(id, "set the balloon", reason),
            other => DriverError::failed(id, "set the balloon", other),
        })
    }

    async fn platform(&self) -> Result<Arc<Platform>> {
        let mut known = self.platform.lock().await;
        if let Some(platform) = known.as_ref().filter(|platform| platform.is_current()) {
            return Ok(platform.clone());
        }
        let inspected = Platform::inspect(&self.shared.options).await;
        let platform = inspected.map_err(|reason| DriverError::Unavailable { driver: NAME, reason })?;
        Ok(known.insert(Arc::new(platform)).clone())
    }

    fn is_jailed(&self) -> bool {
        self.shared.options.use_jailer && rustix::process::geteuid().is_root()
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

    /// A user id that no other instance has. It is in use until [`Self::free_uid`].
    fn take_uid(&self) -> Outcome<u32> {
        let mut known = self.uids.lock();
        if known.is_none() {
            let ids = self.state.list().map_err(Problem::file("read", &self.state.0))?;
            let stored = |id: &InstanceId| InstanceDir::at(self.state.of(id)).read::<Stored>(CONFIG).ok()?;
            *known = Some(ids.iter().filter_map(stored).map(|stored| stored.uid).collect());
        }
        let in_use = known.get_or_insert_default();
        let base = self.shared.options.uid_base;
        let mut all = base..base.saturating_add(FirecrackerOptions::UIDS);
        let free = all.find(|uid| !in_use.contains(uid)).ok_or(Problem::NoUid(FirecrackerOptions::UIDS))?;
        in_use.insert(free);
        Ok(free)
    }

    fn free_uid(&self, uid: u32) {
        if let Some(in_use) = self.uids.lock().as_mut() {
            in_use.remove(&uid);
        }
    }

    async fn remove(&self, id: &InstanceId) -> Result<()> {
        let (state, owned) = (self.state.clone(), id.clone());
        let removal = tokio::task::spawn_blocking(move || -> Outcome<()> {
            jail::remove_cgroups(&owned);
            state.remove(&owned)
        });
        match removal.await {
            Ok(outcome) => outcome.map_err(|e| DriverError::failed(id, "delete", e)),
            Err(panicked) => Err(DriverError::failed(id, "delete", panicked)),
        }
    }
}

fn handle() -> Handle {
    Handle { driver: NAME.to_owned(), version: HANDLE_VERSION, data: Value::Null }
}

#[async_trait]
impl Driver for FirecrackerDriver {
    fn name(&self) -> &'static str {
        NAME
    }

    fn instance_type(&self) -> InstanceType {
        InstanceType::Microvm
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
        let mut capabilities = CAPABILITIES.to_vec();
        if self.is_jailed() {
            capabilities.push(Capability::Limits);
        }
        Fingerprint { healthy, version, message, capabilities, images_are_local: true }
    }

    async fn images(&self) -> Result<Vec<ImageInfo>> {
        self.images.list().map_err(|e| DriverError::Unavailable {
            driver: NAME,
            reason: format!(
                "the images in {} cannot be listed: {e}",
                self.shared.options.image_dir.display()
            ),
        })
    }

    async fn create(&self, config: &InstanceConfig) -> Result<Handle> {
        match self.find(&config.id, "create")? {
            Found::Whole(_) => return Ok(handle()),
            Found::Nothing => {}
            // Nothing of it was ever used.
            Found::Part => self.remove(&config.id).await?,
        }
        self.make(config).await?;
        Ok(handle())
    }

    async fn start(&self, id: &InstanceId) -> Result<Handle> {
        let machine = self.machine(id, "start")?;
        let platform = self.platform().await?;
        let rescue = match machine.live("start").await? {
            Some(_) => None,
            None => self.rescue_of(&machine.next().map_err(machine.failed("start"))?)?,
        };
        machine.start(&platform, rescue).await?;
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
        let found = self.find(id, "delete")?;
        if let Found::Whole(machine) = &found {
            machine.stop(StopMode::Force).await?;
            let stored = machine.stored();
            // Also one that it had before a change.
            if stored.has_interface() || tap::may_exist(machine.tap_place(), stored.uid) {
                let removed = tap::remove(machine.tap_place(), stored.uid).await;
                removed.map_err(|e| DriverError::failed(id, "delete", e))?;
            }
        }
        self.remove(id).await?;
        self.machines.lock().remove(id);
        if let Found::Whole(machine) = found {
            self.free_uid(machine.stored().uid);
        }
        Ok(())
    }

    async fn recover(&self, id: &InstanceId, _handle: Option<&Handle>) -> Result<Observed> {
        self.observe(id).await
    }

    async fn observe(&self, id: &InstanceId) -> Result<Observed> {
        match self.find(id, "observe")? {
            Found::Nothing => Ok(Observed::Absent),
            Found::Part => Ok(Observed::Stopped(Exit::NeverStarted)),
            Found::Whole(machine) => machine.observe().await,
        }
    }

    /// The lock is taken before the VMM is started and is its own from then on: there is no moment between.
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
        self.usage(id).await
    }

    async fn console(&self, id: &InstanceId) -> Result<Console> {
        let (_, live) = self.live(id, "console").await?;
        let ended = || DriverError::wrong_state(id, "console", "it has just ended; start it first");
        let output = live.console.view().await.ok_or_else(ended)?;
        Ok(Console { output, input: live.console.keyboard() })
    }

    async fn exec(&self, id: &InstanceId, _request: ExecRequest) -> Result<Exec> {
        self.machine(id, "exec")?;
        Err(self.cannot("exec", "a microVM has no agent that runs commands; use its console"))
    }

    async fn logs(&self, id: &InstanceId, request: LogRequest) -> Result<BoxStream<'static, Result<Bytes>>> {
        let machine = self.machine(id, "logs")?;
        // Whoever follows must know whether it runs.
        let live = if request.follow { machine.live("logs").await? } else { machine.up_now() };
        let hub = live.as_ref().map(|live| &live.console);
        let logs = console::logs(&Log::new(&machine.dir.path), hub, request).await;
        logs.map_err(|e| DriverError::failed(id, "logs", e))
    }

    async fn display(&self, id: &InstanceId) -> Result<Display> {
        self.machine(id, "display")?;
        Err(self.cannot("show a screen", "a microVM has none; use its console"))
    }

    async fn update(&self, config: &InstanceConfig) -> Result<Updated> {
        self.change(config).await
    }

    async fn snapshot(&self, id: &InstanceId, request: &SnapshotRequest) -> Result<SnapshotInfo> {
        let machine = self.machine(id, "snapshot")?;
        machine.stored().config.refuse_in_rescue("snapshot")?;
        machine.snapshot(request).await
    }

    async fn revert(&self, id: &InstanceId, name: &str) -> Result<()> {
        let machine = self.machine(id, "revert")?;
        machine.stored().config.refuse_in_rescue("revert")?;
        let platform = self.platform().await?;
        machine.revert(name, &platform).await
    }

    async fn delete_snapshot(&self, id: &InstanceId, name: &str) -> Result<()> {
        self.machine(id, "delete a snapshot")?.delete_snapshot(name).await
    }

    async fn snapshots(&self, id: &InstanceId) -> Result<Vec<SnapshotInfo>> {
        match self.find(id, "list snapshots")? {
            Found::Nothing => Err(DriverError::NotFound(id.clone())),
            Found::Part => Ok(Vec::new()),
            Found::Whole(machine) => machine.snapshots(),
        }
    }

    async fn clone_snapshot(
        &self,
        source: &InstanceId,
        name: &str,
        config: &InstanceConfig,
    ) -> Result<Handle> {
        match self.find(&config.id, "clone")? {
            Found::Whole(_) => return Ok(handle()),
            Found::Nothing => {}
            Found::Part => self.remove(&config.id).await?,
        }
        self.make_clone(source, name, config).await?;
        Ok(handle())
    }
}
