//! A scriptable driver that runs nothing: delays, failures and crashes on demand.
//!
//! # Theory of operation
//! "Running" is a word in a file of the state directory, so instances outlive the agent as those of a real runtime
//! do. A guest that ends by itself is a time in that file: whoever looks later finds it ended. [`read_ledger`] tells
//! every start and end that ever happened, so that a test can prove that there was no second one. A file beside it, as
//! the fencer makes it, ends a guest whatever the first file says.

mod carried;
mod commands;
mod console_log;
mod guest;
mod migrate;
mod options;
mod record;
mod script;
mod shared;
mod snapshots;
mod update;

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use async_trait::async_trait;
use bytes::Bytes;
use futures::StreamExt as _;
use futures::stream::{self, BoxStream};
use hv_driver::{
    Capability, Console, Display, Driver, DriverError, DriverEvent, Exec, ExecRequest, Exit, FenceTarget,
    Fingerprint, Handle, ImageContent, Incoming, IncomingRequest, InstanceConfig, LogRequest, MigrateRequest,
    MigrationStatus, Observed, Result, SnapshotInfo, SnapshotRequest, Stats, StopMode, Updated,
};
use hv_types::{ImageInfo, InstanceId, InstanceType};
use parking_lot::Mutex;
use tokio::sync::{broadcast, watch};

pub use carried::{Fate, Guest, Incoming as AwaitedHandOver, Outgoing, Progress, Snapshot};
pub use console_log::MAX_LOG_BYTES;
pub use options::{CAPABILITIES, FakeOptions};
pub use record::{LedgerEntry, LedgerEvent, Phase, Record, read_ledger, read_record};
pub use script::{ALWAYS, ANNOTATION_PREFIX, Operation, Script, Step};

use record::{Files, now_ms};
use shared::Shared;

/// The driver's name.
pub const NAME: &str = "fake";
/// Version of the handle's data.
const HANDLE_VERSION: u32 = 1;
/// How many events wait for a slow receiver before it loses the oldest.
const EVENT_QUEUE: usize = 1024;
/// How many pieces of console output wait for a slow viewer before it loses the oldest.
const CONSOLE_QUEUE: usize = 256;

/// The fake.
pub struct FakeDriver {
    shared: Arc<Shared>,
}

impl FakeDriver {
    /// A fake over a state directory, which need not be there yet.
    #[must_use]
    pub fn new(options: FakeOptions) -> Self {
        let shared = Shared {
            files: Files { dir: options.state_dir.clone() },
            script: Mutex::new(options.script.clone()),
            live: Mutex::default(),
            events: broadcast::channel(EVENT_QUEUE).0,
            draws: AtomicU64::new(options.script.seed),
            healthy: watch::Sender::new(options.healthy),
            options,
        };
        Self { shared: Arc::new(shared) }
    }

    /// From now on things go as this script says.
    pub fn set_script(&self, script: Script) {
        *self.shared.script.lock() = script;
    }

    /// From now on it says that it is healthy, or that it is not.
    pub fn set_healthy(&self, healthy: bool) {
        self.shared.healthy.send_replace(healthy);
    }

    /// The guest ends by itself now. Nothing happens if it does not run.
    ///
    /// # Errors
    /// The state directory cannot be read or written.
    pub fn end_guest(&self, id: &InstanceId, exit: Exit) -> Result<()> {
        let mut live = self.shared.live.lock();
        if let Some(mut record) = self.shared.load(id, "end")?
            && matches!(record.phase, Phase::Running { .. } | Phase::Paused { .. })
        {
            self.shared.ended(&mut live, &mut record, exit)?;
            self.shared.tell(id, "the guest ended by itself");
        }
        Ok(())
    }
}

fn late(id: &InstanceId, operation: Operation, is_late: bool) -> Result<()> {
    if is_late {
        return Err(DriverError::failed(id, operation.name(), "scripted: done, and reported as failed"));
    }
    Ok(())
}

fn half_created(id: &InstanceId, operation: &'static str) -> DriverError {
    DriverError::wrong_state(id, operation, "it was not completely created; create it again")
}

fn not_running(id: &InstanceId, operation: &'static str) -> DriverError {
    DriverError::wrong_state(id, operation, "it does not run; start it first")
}

/// Refuses what would make a second copy of what is moving.
fn stays_here(record: &Record, operation: &'static str) -> Result<()> {
    let reason = match (record.is_handed_over(), record.waits()) {
        (true, _) => "it was handed over to another node",
        (_, true) => "it waits for another node to hand it over",
        (false, false) => return Ok(()),
    };
    Err(DriverError::wrong_state(&record.config.id, operation, reason))
}

fn local_path(content: &ImageContent) -> &Path {
    match content {
        ImageContent::Disk { path, .. }
        | ImageContent::RootFs { path, .. }
        | ImageContent::Kernel { path } => path,
        ImageContent::Oci { layout, .. } => layout,
    }
}

#[async_trait]
impl Driver for FakeDriver {
    fn name(&self) -> &'static str {
        NAME
    }

    fn instance_type(&self) -> InstanceType {
        self.shared.options.instance_type
    }

    fn takes_devices(&self) -> bool {
        self.shared.options.capabilities.contains(&Capability::Devices)
    }

    async fn fingerprint(&self) -> Fingerprint {
        let options = &self.shared.options;
        let healthy = *self.shared.healthy.borrow();
        let message = match healthy {
            true => "runs nothing: for tests only",
            false => "told to be unhealthy; set its option `healthy` to true",
        };
        Fingerprint {
            healthy,
            version: env!("CARGO_PKG_VERSION").to_owned(),
            message: message.to_owned(),
            capabilities: options.capabilities.clone(),
            images_are_local: true,
        }
    }

    async fn images(&self) -> Result<Vec<ImageInfo>> {
        let instance_type = self.shared.options.instance_type;
        let image = |name: &String| ImageInfo::file(name, instance_type, 1 << 20, UNIX_EPOCH);
        Ok(self.shared.options.images.iter().map(image).collect())
    }

    async fn create(&self, config: &InstanceConfig) -> Result<Handle> {
        let id = &config.id;
        {
            let _live = self.shared.live.lock();
            match self.shared.load(id, "create")? {
                Some(record) if record.phase != Phase::Creating => return Ok(Shared::handle(&record)),
                Some(_) => {}
                None => {
                    self.shared.check(config)?;
                    self.shared.save(&Record::creating(config), "create")?;
                }
            }
        }
        let gate = self.shared.gate(id, Operation::Create).await;
        let _live = self.shared.live.lock();
        let is_late = match gate {
            Err(e) if !e.retryable() => {
                self.shared.files.remove(id).map_err(|e| DriverError::failed(id, "create", e))?;
                return Err(e);
            }
            other => other?,
        };
        let mut record = self.shared.load(id, "create")?.ok_or_else(|| DriverError::NotFound(id.clone()))?;
        record.phase = Phase::Stopped(Exit::NeverStarted);
        self.shared.note(id, LedgerEvent::Created, 0, "create")?;
        self.shared.save(&record, "create")?;
        late(id, Operation::Create, is_late)?;
        Ok(Shared::handle(&record))
    }

    async fn start(&self, id: &InstanceId) -> Result<Handle> {
        let record = self.shared.settled(&mut self.shared.live.lock(), id, "start")?;
        match record.phase {
            Phase::Running { .. } => return Ok(Shared::handle(&record)),
            Phase::Paused { .. } => {
                return Err(DriverError::wrong_state(id, "start", "it is paused; resume it"));
            }
            Phase::Creating => return Err(half_created(id, "start")),
            Phase::Stopped(_) => stays_here(&record, "start")?,
        }
        let is_late = self.shared.gate(id, Operation::Start).await?;
        let record = {
            let mut live = self.shared.live.lock();
            let mut record = self.shared.settled(&mut live, id, "start")?;
            let script = self.shared.script_of(&record.config)?;
            if matches!(record.phase, Phase::Stopped(_)) {
                stays_here(&record, "start")?;
                record.outgoing = None;
                self.shared.started(&mut live, &mut record, &script)?;
            }
            record
        };
        self.shared.watch(&record);
        late(id, Operation::Start, is_late)?;
        Ok(Shared::handle(&record))
    }

    async fn stop(&self, id: &InstanceId, mode: StopMode) -> Result<()> {
        let runs = |record: &Record| matches!(record.phase, Phase::Running { .. } | Phase::Paused { .. });
        let record = self.shared.settled(&mut self.shared.live.lock(), id, "stop")?;
        if !runs(&record) {
            return Ok(());
        }
        let is_late = self.shared.gate(id, Operation::Stop).await?;
        if let StopMode::Graceful(timeout) = mode
            && self.shared.script_of(&record.config)?.ignore_shutdown
        {
            tokio::time::sleep(timeout).await;
        }
        let mut live = self.shared.live.lock();
        let mut record = self.shared.settled(&mut live, id, "stop")?;
        if runs(&record) {
            self.shared.ended(&mut live, &mut record, Exit::Stopped)?;
        }
        late(id, Operation::Stop, is_late)
    }

    async fn pause(&self, id: &InstanceId) -> Result<()> {
        self.shared.require(Capability::Pause, "pause")?;
        let record = self.shared.settled(&mut self.shared.live.lock(), id, "pause")?;
        match record.phase {
            Phase::Paused { .. } => return Ok(()),
            Phase::Creating | Phase::Stopped(_) => return Err(not_running(id, "pause")),
            Phase::Running { .. } => {}
        }
        let is_late = self.shared.gate(id, Operation::Pause).await?;
        let mut live = self.shared.live.lock();
        let mut record = self.shared.settled(&mut live, id, "pause")?;
        let Phase::Running { since_ms, .. } = record.phase else { return Err(not_running(id, "pause")) };
        record.phase = Phase::Paused { since_ms };
        self.shared.save(&record, "pause")?;
        late(id, Operation::Pause, is_late)
    }

    async fn resume(&self, id: &InstanceId) -> Result<()> {
        let record = self.shared.settled(&mut self.shared.live.lock(), id, "resume")?;
        if record.waits() {
            return self.shared.take_up(id).await;
        }
        self.shared.require(Capability::Pause, "resume")?;
        stays_here(&record, "resume")?;
        match record.phase {
            Phase::Running { .. } => return Ok(()),
            Phase::Creating | Phase::Stopped(_) => return Err(not_running(id, "resume")),
            Phase::Paused { .. } => {}
        }
        let is_late = self.shared.gate(id, Operation::Resume).await?;
        let mut live = self.shared.live.lock();
        let mut record = self.shared.settled(&mut live, id, "resume")?;
        let Phase::Paused { since_ms } = record.phase else { return Err(not_running(id, "resume")) };
        let script = self.shared.script_of(&record.config)?;
        let exit_at_ms =
            script.exit_after.map(|after| now_ms() + u64::try_from(after.as_millis()).unwrap_or(0));
        record.phase = Phase::Running { since_ms, exit_at_ms, exit_code: script.exit_code };
        self.shared.save(&record, "resume")?;
        self.shared.watch(&record);
        late(id, Operation::Resume, is_late)
    }

    async fn delete(&self, id: &InstanceId) -> Result<()> {
        let is_late = match self.shared.gate(id, Operation::Delete).await {
            Err(DriverError::NotFound(_)) => return Ok(()),
            other => other?,
        };
        let mut live = self.shared.live.lock();
        let Some(mut record) = self.shared.load(id, "delete")? else { return Ok(()) };
        if matches!(record.phase, Phase::Running { .. } | Phase::Paused { .. }) {
            self.shared.ended(&mut live, &mut record, Exit::Stopped)?;
        }
        self.shared.note(id, LedgerEvent::Deleted, 0, "delete")?;
        self.shared.files.remove(id).map_err(|e| DriverError::failed(id, "delete", e))?;
        late(id, Operation::Delete, is_late)
    }

    async fn recover(&self, id: &InstanceId, _handle: Option<&Handle>) -> Result<Observed> {
        let observed = self.observe(id).await?;
        if let Some(record) = self.shared.load(id, "recover")? {
            self.shared.watch(&record);
        }
        Ok(observed)
    }

    async fn observe(&self, id: &InstanceId) -> Result<Observed> {
        match self.shared.settled(&mut self.shared.live.lock(), id, "observe") {
            Ok(record) => Ok(Shared::observed(&record)),
            Err(DriverError::NotFound(_)) => Ok(Observed::Absent),
            Err(e) => Err(e),
        }
    }

    fn fence_target(&self, id: &InstanceId) -> Option<FenceTarget> {
        let path = self.shared.files.marker_path(id);
        Some(FenceTarget::Marker { path: std::path::absolute(&path).unwrap_or(path) })
    }

    async fn list(&self) -> Result<Vec<InstanceId>> {
        self.shared.files.list().map_err(|e| DriverError::Unavailable {
            driver: NAME,
            reason: format!(
                "cannot read {}: {e}; check the agent's state directory",
                self.shared.files.dir.display()
            ),
        })
    }

    fn events(&self) -> BoxStream<'static, DriverEvent> {
        let receiver = self.shared.events.subscribe();
        stream::unfold(receiver, |mut receiver| async {
            loop {
                match receiver.recv().await {
                    Ok(event) => return Some((event, receiver)),
                    Err(broadcast::error::RecvError::Lagged(_)) => {}
                    Err(broadcast::error::RecvError::Closed) => return None,
                }
            }
        })
        .boxed()
    }

    fn health_turns(&self) -> BoxStream<'static, ()> {
        let mut healthy = self.shared.healthy.subscribe();
        let known = *healthy.borrow_and_update();
        stream::unfold((healthy, known), |(mut healthy, known)| async move {
            let turned = *healthy.wait_for(|healthy| *healthy != known).await.ok()?;
            Some(((), (healthy, turned)))
        })
        .boxed()
    }

    async fn stats(&self, id: &InstanceId) -> Result<Stats> {
        let record = self.shared.settled(&mut self.shared.live.lock(), id, "stats")?;
        let (Phase::Running { since_ms, .. } | Phase::Paused { since_ms }) = record.phase else {
            return Err(not_running(id, "stats"));
        };
        let elapsed = SystemTime::now()
            .duration_since(UNIX_EPOCH + Duration::from_millis(since_ms))
            .unwrap_or_default();
        let ms = u64::try_from(elapsed.as_millis()).unwrap_or(u64::MAX);
        let spec = &record.config.spec;
        // Every core is busy a tenth of the time.
        let cpu_time_ns = ms.saturating_mul(100_000).saturating_mul(u64::from(spec.cpu_cores));
        Ok(Stats {
            cpu_time_ns,
            memory_used_bytes: spec.memory_bytes / 2,
            memory_cache_bytes: spec.memory_bytes / 8,
            disk_read_bytes: ms.saturating_mul(64),
            disk_write_bytes: ms.saturating_mul(32),
            network_rx_bytes: ms.saturating_mul(16),
            network_tx_bytes: ms.saturating_mul(8),
        })
    }

    async fn console(&self, id: &InstanceId) -> Result<Console> {
        self.shared.require(Capability::Console, "console")?;
        guest::console(&self.shared, id)
    }

    async fn exec(&self, id: &InstanceId, request: ExecRequest) -> Result<Exec> {
        self.shared.require(Capability::Exec, "exec")?;
        if request.tty.is_some() {
            self.shared.require(Capability::ExecTty, "exec with a terminal")?;
        }
        let record = self.shared.settled(&mut self.shared.live.lock(), id, "exec")?;
        match record.phase {
            Phase::Running { .. } => Ok(commands::exec(request, &record.config)),
            Phase::Paused { .. } => {
                Err(DriverError::wrong_state(id, "exec", "it is paused; resume it first"))
            }
            Phase::Creating | Phase::Stopped(_) => Err(not_running(id, "exec")),
        }
    }

    async fn logs(&self, id: &InstanceId, request: LogRequest) -> Result<BoxStream<'static, Result<Bytes>>> {
        self.shared.require(Capability::Logs, "logs")?;
        guest::logs(&self.shared, id, request)
    }

    async fn display(&self, id: &InstanceId) -> Result<Display> {
        self.shared.settled(&mut self.shared.live.lock(), id, "display")?;
        let reason = "it draws nothing".to_owned();
        Err(DriverError::Unsupported { driver: NAME, operation: "display", reason })
    }

    async fn update(&self, config: &InstanceConfig) -> Result<Updated> {
        self.shared.update(config).await
    }

    async fn snapshot(&self, id: &InstanceId, request: &SnapshotRequest) -> Result<SnapshotInfo> {
        self.shared.refuse_in_rescue(id, "snapshot")?;
        self.shared.snapshot(id, request).await
    }

    async fn revert(&self, id: &InstanceId, name: &str) -> Result<()> {
        self.shared.refuse_in_rescue(id, "revert")?;
        self.shared.revert(id, name).await
    }

    async fn delete_snapshot(&self, id: &InstanceId, name: &str) -> Result<()> {
        self.shared.delete_snapshot(id, name)
    }

    async fn snapshots(&self, id: &InstanceId) -> Result<Vec<SnapshotInfo>> {
        self.shared.snapshots(id)
    }

    async fn clone_snapshot(
        &self,
        source: &InstanceId,
        name: &str,
        config: &InstanceConfig,
    ) -> Result<Handle> {
        self.shared.clone_snapshot(source, name, config).await
    }

    async fn prepare_incoming(&self, config: &InstanceConfig, request: &IncomingRequest) -> Result<Incoming> {
        self.shared.prepare_incoming(config, request).await
    }

    async fn migrate(&self, id: &InstanceId, request: &MigrateRequest) -> Result<()> {
        self.shared.refuse_in_rescue(id, "migrate")?;
        self.shared.migrate(id, request).await
    }

    async fn migration(&self, id: &InstanceId) -> Result<Option<MigrationStatus>> {
        self.shared.migration(id)
    }

    async fn abort_migration(&self, id: &InstanceId) -> Result<()> {
        self.shared.abort_migration(id).await
    }
}
