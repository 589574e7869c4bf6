//! Changing what an instance is made of.

use std::sync::Arc;

use hv_driver::{Capability, DriverError, InstanceConfig, Result, Updated};
use hv_types::InstanceSpec;

use crate::record::Phase;
use crate::script::Operation;
use crate::shared::Shared;
use crate::{half_created, late, stays_here};

/// Why a new specification can never be that of an instance that is made of this one.
fn impossible(old: &InstanceSpec, new: &InstanceSpec) -> Option<String> {
    let fixed = [
        ("image", old.image != new.image),
        ("kernel", old.kernel != new.kernel),
        ("initrd", old.initrd != new.initrd),
        ("firmware", old.firmware != new.firmware),
        ("tpm", old.tpm != new.tpm),
        ("user_data", old.user_data != new.user_data),
    ];
    if let Some((field, _)) = fixed.into_iter().find(|(_, differs)| *differs) {
        return Some(format!("spec.{field}: it is fixed when the instance is created; create another one"));
    }
    old.disks.iter().find_map(|before| {
        let after = new.disks.iter().find(|disk| disk.name == before.name);
        let name = &before.name;
        match after {
            Some(after) if after.size_bytes < before.size_bytes => {
                Some(format!("spec.disks: `{name}` cannot shrink; make a new disk"))
            }
            Some(after) if after.boot != before.boot => {
                Some(format!("spec.disks: `{name}` cannot become the boot disk, or cease to be it"))
            }
            _ => None,
        }
    })
}

impl Shared {
    pub(crate) async fn update(self: &Arc<Self>, config: &InstanceConfig) -> Result<Updated> {
        let id = &config.id;
        {
            let record = self.settled(&mut self.live.lock(), id, "update")?;
            if record.phase == Phase::Creating {
                return Err(half_created(id, "update"));
            }
            stays_here(&record, "update")?;
            let wanted = record.waiting.as_ref().unwrap_or(&record.config.spec);
            if let Some(reason) = impossible(wanted, &config.spec) {
                return Err(DriverError::invalid(id, reason));
            }
            if config.spec.is_in_rescue() {
                self.require(Capability::Rescue, "start from a rescue image")?;
            }
            if let Some(rescue) = config.in_rescue().filter(|_| wanted.rescue != config.spec.rescue) {
                self.check_image(&rescue, "spec.rescue")?;
            }
            if config.spec.limits.is_some() {
                self.require(Capability::Limits, "keep limits")?;
            }
            self.script_of(config)?;
        }
        let is_late = self.gate(id, Operation::Update).await?;
        let mut live = self.live.lock();
        let mut record = self.settled(&mut live, id, "update")?;
        stays_here(&record, "update")?;
        let waits = self.script_of(config)?.update_waits;
        record.config.name.clone_from(&config.name);
        record.config.metadata = config.metadata.clone();
        record.config.rescue_image.clone_from(&config.rescue_image);
        if record.phase.runs() {
            let applied = self.live_part(&record.config.spec, &config.spec, waits);
            record.waiting = (applied != config.spec).then(|| config.spec.clone());
            record.config.spec = applied;
        } else {
            record.waiting = None;
            record.config.spec = config.spec.clone();
        }
        self.save(&record, "update")?;
        late(id, Operation::Update, is_late)?;
        Ok(match &record.waiting {
            None => Updated::Done,
            Some(wanted) => Updated::AtNextStart(waiting_for(&record.config.spec, wanted)),
        })
    }

    /// What can become true of a specification while the instance runs.
    fn live_part(&self, old: &InstanceSpec, new: &InstanceSpec, waits: bool) -> InstanceSpec {
        let can = |capability| !waits && self.options.capabilities.contains(&capability);
        let mut applied = old.clone();
        if can(Capability::ResizeLive) {
            (applied.cpu_cores, applied.memory_bytes) = (new.cpu_cores, new.memory_bytes);
        }
        if can(Capability::HotplugDisk) {
            applied.disks.clone_from(&new.disks);
        }
        if can(Capability::HotplugNetwork) {
            applied.network.clone_from(&new.network);
        }
        if can(Capability::Limits) {
            applied.limits = new.limits;
        }
        applied
    }
}

/// What waits, in words.
fn waiting_for(now: &InstanceSpec, wanted: &InstanceSpec) -> String {
    let parts = [
        ("cores", now.cpu_cores != wanted.cpu_cores),
        ("memory", now.memory_bytes != wanted.memory_bytes),
        ("disks", now.disks != wanted.disks),
        ("network", now.network != wanted.network),
        ("limits", now.limits != wanted.limits),
        ("the disk that it boots from", now.rescue != wanted.rescue),
    ];
    let mut names: Vec<_> = parts.into_iter().filter(|(_, differs)| *differs).map(|(name, _)| name).collect();
    if names.is_empty() {
        names.push("what is not a matter of size");
    }
    format!("{} cannot be changed while it runs", names.join(", "))
}
