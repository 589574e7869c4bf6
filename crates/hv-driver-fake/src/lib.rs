//! A scriptable driver that runs nothing: delays, failures and crashes on demand.
//!
//! # Theory of operation
//! "Running" is a word in a file of the state directory, so instances outlive the agent as those of a real runtime
//! do. A guest that ends by itself is a time in that file: whoever looks later finds it ended. [`read_ledger`] tells
//! every start and end that ever happened, so that a test can prove that there was no second one.

mod guest;
mod options;
mod record;

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use async_trait::async_trait;
use bytes::Bytes;
use futures::StreamExt as _;
use futures::stream::{self, BoxStream};
use hv_driver::{
    Capability, Console, Display, Driver, DriverError, DriverEvent, Exec, ExecRequest, Exit, Fingerprint,
    Handle, InstanceConfig, LogRequest, Observed, Result, Running, Stats, StopMode,
};
use hv_types::{ImageInfo, InstanceId, InstanceType};
use parking_lot::Mutex;
use tokio::sync::broadcast;

pub use options::{ALWAYS, ANNOTATION_PREFIX, FakeOptions, Operation, Script, Step};
pub use record::{LedgerEntry, LedgerEvent, Phase, Record, read_ledger, read_record};

use record::{Files, now_ms};

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

struct Shared {
    options: FakeOptions,
    files: Files,
    script: Mutex<Script>,
    /// Held over every change of files; the map has those instances that are watched in this process.
    live: Mutex<HashMap<InstanceId, broadcast::Sender<Bytes>>>,
    events: broadcast::Sender<DriverEvent>,
    draws: AtomicU64,
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
            options,
        };
        Self { shared: Arc::new(shared) }
    }

    /// From now on things go as this script says.
    pub fn set_script(&self, script: Script) {
        *self.shared.script.lock() = script;
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

type Live = HashMap<InstanceId, broadcast::Sender<Bytes>>;

impl Shared {
    fn load(&self, id: &InstanceId, operation: &'static str) -> Result<Option<Record>> {
        self.files.load(id).map_err(|e| DriverError::failed(id, operation, e))
    }

    fn save(&self, record: &Record, operation: &'static str) -> Result<()> {
        self.files.save(record).map_err(|e| DriverError::failed(&record.config.id, operation, e))
    }

    /// The record of an instance that must be there, ended if its time has come.
    fn settled(&self, live: &mut Live, id: &InstanceId, operation: &'static str) -> Result<Record> {
        let mut record = self.load(id, operation)?.ok_or_else(|| DriverError::NotFound(id.clone()))?;
        if let Phase::Running { exit_at_ms: Some(at), exit_code, .. } = record.phase
            && now_ms() >= at
        {
            let exit = match exit_code {
                0 => Exit::Finished,
                code => Exit::Failed(format!("exit code {code}")),
            };
            self.ended(live, &mut record, exit)?;
            self.tell(id, "the guest ended by itself");
        }
        Ok(record)
    }

    fn ended(&self, live: &mut Live, record: &mut Record, exit: Exit) -> Result<()> {
        record.phase = Phase::Stopped(exit);
        self.save(record, "stop")?;
        self.note(&record.config.id, LedgerEvent::Ended, "stop")?;
        live.remove(&record.config.id);
        Ok(())
    }

    fn note(&self, id: &InstanceId, what: LedgerEvent, operation: &'static str) -> Result<()> {
        self.files.note(id, what).map_err(|e| DriverError::failed(id, operation, e))
    }

    fn tell(&self, id: &InstanceId, what: &str) {
        // Nobody listening is no error.
        let _ = self.events.send(DriverEvent { id: id.clone(), what: what.to_owned() });
    }

    fn print(&self, live: &mut Live, id: &InstanceId, text: &[u8]) -> std::io::Result<()> {
        self.files.print(id, text)?;
        if let Some(viewers) = live.get(id) {
            let _ = viewers.send(Bytes::copy_from_slice(text));
        }
        Ok(())
    }

    fn require(&self, capability: Capability, operation: &'static str) -> Result<()> {
        if self.options.capabilities.contains(&capability) {
            return Ok(());
        }
        let reason = format!("`{}` is not among its configured capabilities", capability.name());
        Err(DriverError::Unsupported { driver: NAME, operation, reason })
    }

    fn handle(record: &Record) -> Handle {
        let data = serde_json::json!({ "starts": record.starts });
        Handle { driver: NAME.to_owned(), version: HANDLE_VERSION, data }
    }

    /// Waits and fails as the script says. `Ok(true)`: do it, then report a failure all the same.
    async fn gate(&self, id: &InstanceId, operation: Operation) -> Result<bool> {
        let (step, attempt) = {
            let _live = self.live.lock();
            let name = operation.name();
            let mut record = self.load(id, name)?.ok_or_else(|| DriverError::NotFound(id.clone()))?;
            let mut script = self.script_of(&record.config)?;
            let step = std::mem::take(script.step_mut(operation));
            let attempt = record.attempts.get(&operation).copied().unwrap_or(0);
            if step.counts() {
                record.attempts.insert(operation, attempt.saturating_add(1));
                self.save(&record, name)?;
            }
            (step, attempt)
        };
        if attempt < step.hang {
            std::future::pending::<()>().await;
        }
        tokio::time::sleep(step.delay).await;
        if step.fail_permanently {
            return Err(DriverError::invalid(id, format!("{} fails as scripted", operation.name())));
        }
        if attempt < step.fail || self.draw() < step.fail_probability {
            return Err(DriverError::failed(id, operation.name(), "scripted failure"));
        }
        Ok(attempt < step.fail_late)
    }

    fn script_of(&self, config: &InstanceConfig) -> Result<Script> {
        let script = self.script.lock().clone();
        script.with_annotations(&config.metadata).map_err(|reason| DriverError::invalid(&config.id, reason))
    }

    /// The next number of a sequence that the seed determines, from 0 to below 1 (splitmix64).
    fn draw(&self) -> f64 {
        let mut z = self
            .draws
            .fetch_add(0x9e37_79b9_7f4a_7c15, Ordering::Relaxed)
            .wrapping_add(0x9e37_79b9_7f4a_7c15);
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^= z >> 31;
        (z >> 11) as f64 / (1u64 << 53) as f64
    }

    fn observed(record: &Record) -> Observed {
        let running = |since_ms: u64| Running {
            since: Some(UNIX_EPOCH + Duration::from_millis(since_ms)),
            ip: Some(std::net::IpAddr::from([192, 0, 2, 15])),
        };
        match &record.phase {
            Phase::Creating => Observed::Stopped(Exit::NeverStarted),
            Phase::Stopped(exit) => Observed::Stopped(exit.clone()),
            Phase::Running { since_ms, .. } => Observed::Running(running(*since_ms)),
            Phase::Paused { since_ms } => Observed::Paused(running(*since_ms)),
        }
    }

    /// Looks again when the guest is to end, so that the end is told without being asked for.
    fn watch_end(self: &Arc<Self>, record: &Record) {
        let Phase::Running { exit_at_ms: Some(at), .. } = record.phase else { return };
        let shared = Arc::downgrade(self);
        let id = record.config.id.clone();
        tokio::spawn(async move {
            tokio::time::sleep(Duration::from_millis(at.saturating_sub(now_ms()))).await;
            if let Some(shared) = shared.upgrade() {
                let mut live = shared.live.lock();
                // What cannot be read now is told to whoever asks next.
                let _ = shared.settled(&mut live, &id, "observe");
            }
        });
    }

    fn check(&self, config: &InstanceConfig) -> Result<()> {
        let image = &config.spec.image;
        let direct = image.is_empty() && !config.spec.kernel.is_empty();
        if !direct && !self.options.images.contains(image) {
            let images = self.options.images.join(", ");
            let reason = format!("spec.image: there is no image `{image}` on this node; there are: {images}");
            return Err(DriverError::invalid(&config.id, reason));
        }
        self.script_of(config).map(drop)
    }

    fn started(&self, live: &mut Live, record: &mut Record, script: &Script) -> Result<()> {
        let id = record.config.id.clone();
        let now = now_ms();
        let exit_at_ms =
            script.exit_after.map(|after| now + u64::try_from(after.as_millis()).unwrap_or(u64::MAX / 2));
        record.phase = Phase::Running { since_ms: now, exit_at_ms, exit_code: script.exit_code };
        record.starts += 1;
        // The ledger first: a start that was recorded twice would be found, one that was not recorded would not.
        self.note(&id, LedgerEvent::Started, "start")?;
        self.save(record, "start")?;
        let greeting = format!("fake-guest: hello from {}\r\n", record.config.name);
        self.print(live, &id, greeting.as_bytes()).map_err(|e| DriverError::failed(&id, "start", e))
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

#[async_trait]
impl Driver for FakeDriver {
    fn name(&self) -> &'static str {
        NAME
    }

    fn instance_type(&self) -> InstanceType {
        self.shared.options.instance_type
    }

    async fn fingerprint(&self) -> Fingerprint {
        let options = &self.shared.options;
        let message = match options.healthy {
            true => "runs nothing: for tests only",
            false => "configured to be unhealthy; set drivers.fake.healthy to true",
        };
        Fingerprint {
            healthy: options.healthy,
            version: env!("CARGO_PKG_VERSION").to_owned(),
            message: message.to_owned(),
            capabilities: options.capabilities.clone(),
            images_are_local: true,
        }
    }

    async fn images(&self) -> Result<Vec<ImageInfo>> {
        let image = |name: &String| ImageInfo {
            name: name.clone(),
            instance_type: self.shared.options.instance_type,
            size_bytes: 1 << 20,
            created_at: UNIX_EPOCH,
        };
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
                    let (config, phase) = (config.clone(), Phase::Creating);
                    let record = Record { config, phase, starts: 0, attempts: Default::default() };
                    self.shared.save(&record, "create")?;
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
        self.shared.note(id, LedgerEvent::Created, "create")?;
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
            Phase::Stopped(_) => {}
        }
        let is_late = self.shared.gate(id, Operation::Start).await?;
        let record = {
            let mut live = self.shared.live.lock();
            let mut record = self.shared.settled(&mut live, id, "start")?;
            let script = self.shared.script_of(&record.config)?;
            if matches!(record.phase, Phase::Stopped(_)) {
                self.shared.started(&mut live, &mut record, &script)?;
            }
            record
        };
        self.shared.watch_end(&record);
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
        self.shared.require(Capability::Pause, "resume")?;
        let record = self.shared.settled(&mut self.shared.live.lock(), id, "resume")?;
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
        self.shared.watch_end(&record);
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
        self.shared.note(id, LedgerEvent::Deleted, "delete")?;
        self.shared.files.remove(id).map_err(|e| DriverError::failed(id, "delete", e))?;
        late(id, Operation::Delete, is_late)
    }

    async fn recover(&self, id: &InstanceId, _handle: Option<&Handle>) -> Result<Observed> {
        let observed = self.observe(id).await?;
        if let Some(record) = self.shared.load(id, "recover")? {
            self.shared.watch_end(&record);
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

    async fn list(&self) -> Result<Vec<InstanceId>> {
        self.shared.files.list().map_err(|e| DriverError::Unavailable {
            driver: NAME,
            reason: format!(
                "cannot read {}: {e}; check drivers.fake.state_dir",
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
        let record = self.shared.settled(&mut self.shared.live.lock(), id, "exec")?;
        match record.phase {
            Phase::Running { .. } => Ok(guest::exec(request, &record.config.spec.env)),
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
}
