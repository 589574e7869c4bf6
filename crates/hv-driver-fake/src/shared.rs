//! The state behind the driver: what the script says, what the files say, and who watches.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, UNIX_EPOCH};

use bytes::Bytes;
use hv_driver::{
    Capability, DriverError, DriverEvent, Exit, Handle, InstanceConfig, Observed, Result, Running,
};
use hv_types::InstanceId;
use parking_lot::Mutex;
use tokio::sync::{broadcast, watch};

use crate::carried::{Outgoing, Progress};
use crate::options::FakeOptions;
use crate::record::{Files, LedgerEvent, Phase, Record, now_ms};
use crate::script::{Operation, Script};
use crate::{HANDLE_VERSION, NAME};

/// What the driver and its tasks share.
pub(crate) struct Shared {
    pub(crate) options: FakeOptions,
    pub(crate) files: Files,
    pub(crate) script: Mutex<Script>,
    /// Held over every change of files; the map has those instances that are watched in this process.
    pub(crate) live: Mutex<HashMap<InstanceId, broadcast::Sender<Bytes>>>,
    pub(crate) events: broadcast::Sender<DriverEvent>,
    pub(crate) draws: AtomicU64,
    pub(crate) healthy: watch::Sender<bool>,
}

pub(crate) type Live = HashMap<InstanceId, broadcast::Sender<Bytes>>;

/// What ends cannot be handed over any more.
fn give_up_moving(record: &mut Record) {
    if let Some(outgoing) = record.outgoing.as_mut().filter(|outgoing| outgoing.progress == Progress::Going) {
        outgoing.progress = Progress::Failed("it ended before it was handed over".to_owned());
    }
}

impl Shared {
    pub(crate) fn load(&self, id: &InstanceId, operation: &'static str) -> Result<Option<Record>> {
        self.files.load(id).map_err(|e| DriverError::failed(id, operation, e))
    }

    pub(crate) fn save(&self, record: &Record, operation: &'static str) -> Result<()> {
        self.files.save(record).map_err(|e| DriverError::failed(&record.config.id, operation, e))
    }

    /// The record of an instance that must be there, ended if its time has come.
    pub(crate) fn settled(
        &self,
        live: &mut Live,
        id: &InstanceId,
        operation: &'static str,
    ) -> Result<Record> {
        let mut record = self.load(id, operation)?.ok_or_else(|| DriverError::NotFound(id.clone()))?;
        let fenced = self.files.fenced_at(id).map_err(|e| DriverError::failed(id, operation, e))?;
        if let Some(at_us) = fenced
            && record.phase.runs()
        {
            record.phase = Phase::Stopped(Exit::Fenced);
            give_up_moving(&mut record);
            let noted = self.files.note_at(id, LedgerEvent::Ended, record.starts, at_us);
            noted.map_err(|e| DriverError::failed(id, operation, e))?;
            self.save(&record, operation)?;
            live.remove(id);
            self.tell(id, "it was fenced");
        } else if record.outgoing.as_ref().and_then(Outgoing::due_ms).is_some_and(|due| now_ms() >= due) {
            self.migrated(live, &mut record)?;
        } else if let Phase::Running { exit_at_ms: Some(at), exit_code, .. } = record.phase
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

    pub(crate) fn ended(&self, live: &mut Live, record: &mut Record, exit: Exit) -> Result<()> {
        record.phase = Phase::Stopped(exit);
        give_up_moving(record);
        self.note(&record.config.id, LedgerEvent::Ended, record.starts, "stop")?;
        self.save(record, "stop")?;
        live.remove(&record.config.id);
        Ok(())
    }

    /// Writes down what is saved next; in this order a death in between loses nothing.
    pub(crate) fn note(
        &self,
        id: &InstanceId,
        what: LedgerEvent,
        start: u32,
        operation: &'static str,
    ) -> Result<()> {
        self.files.note(id, what, start).map_err(|e| DriverError::failed(id, operation, e))
    }

    pub(crate) fn tell(&self, id: &InstanceId, what: &str) {
        // Nobody listening is no error.
        let _ = self.events.send(DriverEvent { id: id.clone(), what: what.to_owned() });
    }

    pub(crate) fn print(&self, live: &mut Live, id: &InstanceId, text: &[u8]) -> std::io::Result<()> {
        self.files.print(id, text)?;
        if let Some(viewers) = live.get(id) {
            let _ = viewers.send(Bytes::copy_from_slice(text));
        }
        Ok(())
    }

    pub(crate) fn require(&self, capability: Capability, operation: &'static str) -> Result<()> {
        if self.options.capabilities.contains(&capability) {
            return Ok(());
        }
        let reason = format!("`{}` is not among its configured capabilities", capability.name());
        Err(DriverError::Unsupported { driver: NAME, operation, reason })
    }

    /// Refuses what an instance that runs in rescue, or is about to, cannot do.
    pub(crate) fn refuse_in_rescue(&self, id: &InstanceId, operation: &'static str) -> Result<()> {
        let record = self.settled(&mut self.live.lock(), id, operation)?;
        record.config.refuse_in_rescue(operation)?;
        let waits = record.waiting.filter(|spec| spec.is_in_rescue());
        waits.map_or(Ok(()), |spec| InstanceConfig { spec, ..record.config }.refuse_in_rescue(operation))
    }

    pub(crate) fn handle(record: &Record) -> Handle {
        let data = serde_json::json!({ "starts": record.starts });
        Handle { driver: NAME.to_owned(), version: HANDLE_VERSION, data }
    }

    /// Waits and fails as the script says. `Ok(true)`: do it, then report a failure all the same.
    pub(crate) async fn gate(&self, id: &InstanceId, operation: Operation) -> Result<bool> {
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
        // A transfer is slow behind its call, not in it.
        if operation != Operation::Migrate {
            tokio::time::sleep(step.delay).await;
        }
        if step.fail_permanently {
            return Err(DriverError::invalid(id, format!("{} fails as scripted", operation.name())));
        }
        if attempt < step.fail || self.draw() < step.fail_probability {
            return Err(DriverError::failed(id, operation.name(), "scripted failure"));
        }
        Ok(attempt < step.fail_late)
    }

    pub(crate) fn script_of(&self, config: &InstanceConfig) -> Result<Script> {
        let script = self.script.lock().clone();
        script.with_annotations(&config.metadata).map_err(|reason| DriverError::invalid(&config.id, reason))
    }

    /// The next number of a sequence that the seed determines, from 0 to below 1 (splitmix64).
    pub(crate) fn draw(&self) -> f64 {
        let mut z = self
            .draws
            .fetch_add(0x9e37_79b9_7f4a_7c15, Ordering::Relaxed)
            .wrapping_add(0x9e37_79b9_7f4a_7c15);
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^= z >> 31;
        (z >> 11) as f64 / (1u64 << 53) as f64
    }

    pub(crate) fn observed(record: &Record) -> Observed {
        let running = |since_ms: u64| Running {
            since: Some(UNIX_EPOCH + Duration::from_millis(since_ms)),
            ip: Some(std::net::IpAddr::from([192, 0, 2, 15])),
        };
        if record.is_handed_over() {
            return Observed::HandedOver;
        }
        match &record.phase {
            Phase::Stopped(_) if record.waits() => Observed::Paused(Running::default()),
            Phase::Creating => Observed::Stopped(Exit::NeverStarted),
            Phase::Stopped(exit) => Observed::Stopped(exit.clone()),
            Phase::Running { since_ms, .. } => Observed::Running(running(*since_ms)),
            Phase::Paused { since_ms } => Observed::Paused(running(*since_ms)),
        }
    }

    /// Looks again when the guest is to end, or is to be handed over, so that it is told without being asked for.
    pub(crate) fn watch(self: &Arc<Self>, record: &Record) {
        let exit_at_ms = match record.phase {
            Phase::Running { exit_at_ms, .. } => exit_at_ms,
            Phase::Creating | Phase::Stopped(_) | Phase::Paused { .. } => None,
        };
        let due_ms = record.outgoing.as_ref().and_then(Outgoing::due_ms);
        for at in exit_at_ms.into_iter().chain(due_ms) {
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
    }

    pub(crate) fn check(&self, config: &InstanceConfig) -> Result<()> {
        let asked = [
            (Capability::Rescue, "start from a rescue image", config.spec.is_in_rescue()),
            (Capability::Limits, "keep limits", config.spec.limits.is_some()),
            (Capability::Volumes, "mount volumes", !config.spec.volume_mounts.is_empty()),
            (Capability::UserData, "take user data", !config.spec.user_data.is_empty()),
            (Capability::DirectBoot, "boot a kernel", !config.spec.kernel.is_empty()),
            (Capability::FetchedImages, "start from a fetched image", config.image.is_some()),
            (Capability::Devices, "have devices of the node", !config.spec.devices.is_empty()),
        ];
        for (capability, operation, _) in asked.into_iter().filter(|(.., is_asked)| *is_asked) {
            self.require(capability, operation)?;
        }
        self.check_image(config, "spec.image")?;
        self.script_of(config).map(drop)
    }

    /// That there is what it boots from.
    pub(crate) fn check_image(&self, config: &InstanceConfig, field: &str) -> Result<()> {
        let image = &config.spec.image;
        let direct = image.is_empty() && !config.spec.kernel.is_empty();
        if let Some(local) = &config.image {
            let path = crate::local_path(&local.content);
            if !path.exists() {
                let reason = format!("image: {} is not in the image store; fetch it again", path.display());
                return Err(DriverError::invalid(&config.id, reason));
            }
        } else if !direct && !self.options.images.contains(image) {
            let images = self.options.images.join(", ");
            let reason = format!("{field}: there is no image `{image}` on this node; there are: {images}");
            return Err(DriverError::invalid(&config.id, reason));
        }
        if config.devices.is_none() && !config.spec.devices.is_empty() {
            return Err(DriverError::invalid(&config.id, "spec.devices: its node gave it nothing"));
        }
        Ok(())
    }

    /// It runs from now on. What it is made of changes if that waited for it; `outgoing` is left to the caller.
    pub(crate) fn started(&self, live: &mut Live, record: &mut Record, script: &Script) -> Result<()> {
        let id = record.config.id.clone();
        self.files.unmark(&id).map_err(|e| DriverError::failed(&id, "start", e))?;
        let now = now_ms();
        let exits = record.starts < script.exits.unwrap_or(u32::MAX);
        let exit_at_ms = script
            .exit_after
            .filter(|_| exits)
            .map(|after| now + u64::try_from(after.as_millis()).unwrap_or(u64::MAX / 2));
        record.phase = Phase::Running { since_ms: now, exit_at_ms, exit_code: script.exit_code };
        record.starts += 1;
        let boots = !std::mem::take(&mut record.goes_on);
        if boots {
            record.guest.memory = 0;
        }
        if let Some(spec) = record.waiting.take() {
            record.config.spec = spec;
        }
        self.note(&id, LedgerEvent::Started, record.starts, "start")?;
        self.save(record, "start")?;
        if !boots {
            return Ok(());
        }
        let (name, rescue) = (&record.config.name, &record.config.spec.rescue);
        let greeting = match rescue.as_str() {
            "" => format!("fake-guest: hello from {name}\r\n"),
            image => format!("fake-rescue: hello from {image} for {name}\r\n"),
        };
        self.print(live, &id, greeting.as_bytes()).map_err(|e| DriverError::failed(&id, "start", e))
    }
}
