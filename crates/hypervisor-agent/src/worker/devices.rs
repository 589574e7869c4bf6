//! What an instance is given for itself, before its driver creates and starts it; and taken back when it is gone.

use std::sync::Arc;

use hv_driver::{Driver, DriverError};

use super::Worker;
use crate::plan::Step;

impl Worker {
    /// Sees to it that the instance has what it asks for, on record before it is used. False: it has not, and what was to be
    /// done with it is over, or put off.
    pub(super) async fn provide_devices(
        &mut self,
        driver: &Arc<dyn Driver>,
        step: Step,
        serial: u64,
    ) -> bool {
        // Who takes none refuses to create it, and says why.
        if self.entry.config.spec.devices.is_empty() || !driver.takes_devices() {
            return true;
        }
        match self.try_devices(step).await {
            Ok(ready) => ready,
            Err(error) => {
                self.look = true;
                self.setback(step, serial, &error);
                false
            }
        }
    }

    async fn try_devices(&mut self, step: Step) -> Result<bool, DriverError> {
        let (id, machine) = (self.entry.id().clone(), &self.context.tuning.machine);
        if self.entry.config.devices.is_none() {
            if step == Step::Start {
                let reason = "spec.devices: it was created without them; delete it and create it anew";
                return Err(DriverError::invalid(&id, reason));
            }
            let (devices, spec) = (Arc::clone(&self.context.devices), self.entry.config.spec.clone());
            let wanted = id.clone();
            let given = machine.block_on(move || devices.give(&wanted, &spec)).await;
            let grant = given.map_err(|why| DriverError::failed(&id, "give devices to it", why))?;
            tracing::info!(instance = %id, cpus = ?grant.cpus, pci = ?grant.pci, huge_pages = grant.huge_pages,
                numa_node = ?grant.numa_node, "given for itself");
            self.entry.config.devices = Some(grant);
            self.unsaved = true;
            if !self.save().await {
                return Ok(false);
            }
        }
        let Some(grant) = self.entry.config.devices.clone().filter(|grant| !grant.pci.is_empty()) else {
            return Ok(true);
        };
        let devices = Arc::clone(&self.context.devices);
        let machine = &self.context.tuning.machine;
        let bound = machine.block_on(move || devices.bind(&grant)).await;
        bound
            .map(|()| true)
            .map_err(|error| DriverError::failed(&id, "take its devices from the host", error))
    }

    /// Gives back what it had: nothing of it is left. What cannot be handed back to the host is still free for others.
    pub(super) async fn return_devices(&mut self) {
        let Some(grant) = self.entry.config.devices.take() else { return };
        let (devices, id) = (Arc::clone(&self.context.devices), self.entry.id().clone());
        let restored = self.context.tuning.machine.block_on(move || devices.restore(&grant)).await;
        if let Err(error) = restored {
            let error = hv_telemetry::error_chain(&error);
            tracing::warn!(instance = %id, error, "a device could not be handed back to the host's driver");
        }
        self.unsaved = true;
        if self.save().await {
            self.context.devices.release(&id);
        }
    }
}
