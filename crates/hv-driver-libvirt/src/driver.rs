//! The driver contract, fulfilled with libvirtd.

use std::sync::Arc;

use async_trait::async_trait;
use bytes::Bytes;
use futures::stream::BoxStream;
use hv_driver::{
    Console, Display, Driver, DriverError, DriverEvent, Exec, ExecRequest, Exit, FenceTarget, Fingerprint,
    Handle, Incoming, IncomingRequest, InstanceConfig, LogRequest, MigrateRequest, MigrationStatus, Observed,
    Result, SnapshotInfo, SnapshotRequest, Stats, StopMode, Updated,
};
use hv_machine::{console, heard};
use hv_types::{ImageInfo, InstanceId, InstanceType};
use serde_json::Value;

use crate::console::log_of;
use crate::files::VNC_SOCKET;
use crate::inner::{Found, Inner};
use crate::machine::{Seen, fence_target};
use crate::{LibvirtOptions, NAME, agent, rescue};

/// Version of the handle's data, which is empty: everything is found by the instance's id.
const HANDLE_VERSION: u32 = 1;

/// Virtual machines, each a domain of libvirtd.
pub struct LibvirtDriver {
    inner: Arc<Inner>,
}

impl Drop for LibvirtDriver {
    fn drop(&mut self) {
        self.inner.shared.link.cancelled.cancel();
    }
}

impl LibvirtDriver {
    /// A driver over a state directory. Neither it nor libvirtd need be there: [`Driver::fingerprint`] says what is
    /// missing.
    #[must_use]
    pub fn new(options: LibvirtOptions) -> Self {
        let driver = Self { inner: Arc::new(Inner::new(options)) };
        // Where there is no runtime yet the first call begins.
        if tokio::runtime::Handle::try_current().is_ok() {
            driver.inner.begin();
        }
        driver
    }
}

pub(crate) fn handle() -> Handle {
    Handle { driver: NAME.to_owned(), version: HANDLE_VERSION, data: Value::Null }
}

#[async_trait]
impl Driver for LibvirtDriver {
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
        self.inner.fingerprint().await
    }

    async fn images(&self) -> Result<Vec<ImageInfo>> {
        self.inner.images.list().map_err(|e| DriverError::Unavailable {
            driver: NAME,
            reason: format!("the images in {} cannot be listed: {e}", self.inner.options.image_dir.display()),
        })
    }

    async fn create(&self, config: &InstanceConfig) -> Result<Handle> {
        match self.inner.find(&config.id, "create")? {
            Found::Whole(_) => return Ok(handle()),
            Found::Nothing => {}
            // Nothing of it was ever used.
            Found::Part => self.inner.remove(&config.id).await?,
        }
        let node = self.inner.node().await?;
        let plan = self.inner.plan(config, &node).await?;
        self.inner.make(&plan, &node).await?;
        Ok(handle())
    }

    async fn start(&self, id: &InstanceId) -> Result<Handle> {
        let machine = self.inner.machine(id, "start")?;
        let node = self.inner.node().await?;
        machine.start(&node).await?;
        Ok(handle())
    }

    async fn stop(&self, id: &InstanceId, mode: StopMode) -> Result<()> {
        match self.inner.find(id, "stop")? {
            Found::Nothing => Err(DriverError::NotFound(id.clone())),
            Found::Part => Ok(()),
            Found::Whole(machine) => machine.stop(mode).await,
        }
    }

    async fn pause(&self, id: &InstanceId) -> Result<()> {
        self.inner.machine(id, "pause")?.pause().await
    }

    async fn resume(&self, id: &InstanceId) -> Result<()> {
        self.inner.machine(id, "resume")?.resume().await
    }

    async fn delete(&self, id: &InstanceId) -> Result<()> {
        if let Found::Whole(machine) = self.inner.find(id, "delete")? {
            machine.stop(StopMode::Force).await?;
            let daemon = self.inner.daemon().await?;
            daemon.undefine(&machine.stored().domain()).await.map_err(machine.failed("delete"))?;
        }
        self.inner.remove(id).await?;
        self.inner.machines.lock().remove(id);
        Ok(())
    }

    async fn recover(&self, id: &InstanceId, _handle: Option<&Handle>) -> Result<Observed> {
        if let Found::Whole(machine) = self.inner.find(id, "recover")? {
            // Without libvirtd what is awaited is found when it is back.
            let node = self.inner.node().await.ok();
            let seen = machine.adopt(node).await.map_err(machine.failed("recover"))?;
            tracing::info!(instance = %id, ?seen, "found a virtual machine");
        }
        self.observe(id).await
    }

    async fn observe(&self, id: &InstanceId) -> Result<Observed> {
        match self.inner.find(id, "observe")? {
            Found::Nothing => Ok(Observed::Absent),
            Found::Part => Ok(Observed::Stopped(Exit::NeverStarted)),
            Found::Whole(machine) => match machine.observe().await {
                // Deleted while it was looked at.
                Err(_) if !machine.dir.path.exists() => Ok(Observed::Absent),
                other => other,
            },
        }
    }

    fn fence_target(&self, id: &InstanceId) -> Option<FenceTarget> {
        Some(fence_target(&self.inner.state.of(id)))
    }

    async fn list(&self) -> Result<Vec<InstanceId>> {
        self.inner.state.list().map_err(|e| DriverError::Unavailable {
            driver: NAME,
            reason: format!(
                "{} cannot be read: {e}; check the agent's state directory and its permissions",
                self.inner.state.0.display()
            ),
        })
    }

    fn events(&self) -> BoxStream<'static, DriverEvent> {
        heard(self.inner.shared.events.subscribe())
    }

    fn health_turns(&self) -> BoxStream<'static, ()> {
        self.inner.begin();
        self.inner.shared.link.turns()
    }

    async fn update(&self, config: &InstanceConfig) -> Result<Updated> {
        let machine = self.inner.machine(&config.id, "change")?;
        let node = self.inner.node().await?;
        let plan = self.inner.plan(config, &node).await?;
        machine.update(&plan, &node).await
    }

    async fn snapshot(&self, id: &InstanceId, request: &SnapshotRequest) -> Result<SnapshotInfo> {
        let machine = self.inner.machine(id, "snapshot")?;
        rescue::refuse(&machine, "snapshot")?;
        let node = self.inner.node().await?;
        machine.snapshot(&node, request).await
    }

    async fn revert(&self, id: &InstanceId, name: &str) -> Result<()> {
        let machine = self.inner.machine(id, "revert")?;
        rescue::refuse(&machine, "revert")?;
        machine.revert(name).await
    }

    async fn delete_snapshot(&self, id: &InstanceId, name: &str) -> Result<()> {
        self.inner.machine(id, "delete a snapshot of")?.delete_snapshot(name).await
    }

    async fn snapshots(&self, id: &InstanceId) -> Result<Vec<SnapshotInfo>> {
        self.inner.machine(id, "list snapshots of")?.snapshots().await
    }

    async fn prepare_incoming(&self, config: &InstanceConfig, request: &IncomingRequest) -> Result<Incoming> {
        let id = &config.id;
        self.inner.can_move(request.storage)?;
        match self.inner.find(id, "migrate")? {
            Found::Whole(machine) => {
                let note = machine.note().map_err(machine.failed("migrate"))?;
                match note.filter(|note| note.migration == request.migration) {
                    Some(note) if !note.target.is_null() => return Ok(Incoming { target: note.target }),
                    // Cut short before it began to wait.
                    Some(_) => {}
                    None => {
                        let reason = "it is on this node already; delete it first";
                        return Err(DriverError::wrong_state(id, "migrate", reason));
                    }
                }
            }
            Found::Nothing => self.inner.receive(config, request).await?,
            Found::Part => {
                self.inner.remove(id).await?;
                self.inner.receive(config, request).await?;
            }
        }
        let (node, machine) = (self.inner.node().await?, self.inner.machine(id, "migrate")?);
        let waiting = machine.wait_for(&node, &request.migration, request.storage, request.listen).await;
        Ok(Incoming { target: waiting.map_err(machine.failed("migrate"))? })
    }

    async fn migrate(&self, id: &InstanceId, request: &MigrateRequest) -> Result<()> {
        self.inner.can_move(request.storage)?;
        let machine = self.inner.machine(id, "migrate")?;
        rescue::refuse(&machine, "migrate")?;
        machine.migrate(request).await
    }

    async fn migration(&self, id: &InstanceId) -> Result<Option<MigrationStatus>> {
        self.inner.machine(id, "migrate")?.migration_status().await
    }

    async fn abort_migration(&self, id: &InstanceId) -> Result<()> {
        self.inner.machine(id, "abort a migration of")?.abort_migration().await
    }

    async fn stats(&self, id: &InstanceId) -> Result<Stats> {
        let machine = self.inner.machine(id, "stats")?;
        machine.running("stats").await?;
        let daemon = self.inner.daemon().await?;
        let stats = self.inner.stats.of(&daemon, machine.stored().uuid).await.map_err(machine.failed("stats"))?;
        stats.ok_or_else(|| DriverError::wrong_state(id, "stats", "it does not run; start it first"))
    }

    async fn console(&self, id: &InstanceId) -> Result<Console> {
        let live = self.inner.machine(id, "console")?.running("console").await?;
        let ended = || DriverError::wrong_state(id, "console", "it has just ended; start it first");
        let output = live.console.view().await.ok_or_else(ended)?;
        Ok(Console { output, input: live.console.keyboard() })
    }

    async fn exec(&self, id: &InstanceId, request: ExecRequest) -> Result<Exec> {
        let machine = self.inner.machine(id, "exec")?;
        machine.running("exec").await?;
        if machine.look().await.map_err(machine.failed("exec"))? == Seen::Paused {
            return Err(DriverError::wrong_state(id, "exec", "it is paused; resume it first"));
        }
        agent::exec(machine, request).await
    }

    async fn logs(&self, id: &InstanceId, request: LogRequest) -> Result<BoxStream<'static, Result<Bytes>>> {
        let machine = self.inner.machine(id, "logs")?;
        // Whoever follows must know whether it runs.
        let live = if request.follow { machine.running("logs").await.ok() } else { machine.known_live() };
        let hub = live.as_ref().map(|live| &live.console);
        let logs = console::logs(&log_of(&machine.dir), hub, request).await;
        logs.map_err(|e| DriverError::failed(id, "logs", e))
    }

    async fn display(&self, id: &InstanceId) -> Result<Display> {
        let machine = self.inner.machine(id, "display")?;
        machine.running("display").await?;
        Ok(Display::Vnc(machine.dir.file(VNC_SOCKET)))
    }
}
