//! What every task of the agent shares.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use hv_driver::Driver;
use hv_types::{InstanceId, InstanceType, NodeId};

use crate::devices::Devices;
use crate::entry::Entry;
use crate::fencing::{Guard, Seam};
use crate::images::Images;
use crate::journal::{Journal, JournalError};
use crate::plan::Step;
use crate::reporter::Reports;

/// Bounds on work; the defaults are what a node uses, tests shorten them.
#[derive(Clone, Debug)]
pub struct Tuning {
    /// How often a step is tried before its instance is FAILED.
    pub attempts: u32,
    /// Pause after the first failed attempt.
    pub retry_base: Duration,
    /// Longest pause.
    pub retry_max: Duration,
    /// How often an instance is looked at without a reason.
    pub look_every: Duration,
    /// How often the node is looked at.
    pub inventory_every: Duration,
    /// How long a driver may take to look at an instance, or to list what it has.
    pub look_deadline: Duration,
    /// How long the fetch of an image may take. It goes on where it was when it is tried again.
    pub fetch_deadline: Duration,
    /// How long a driver may take to create an instance.
    pub create_deadline: Duration,
    /// How long a driver may take for any other step; for a stop, on top of the guest's own time.
    pub step_deadline: Duration,
    /// The machine; tests put a made-up one in its place.
    pub machine: Machine,
    /// The clock and the fencer; tests put their own in their place.
    pub fencing: Seam,
}

/// What the agent takes from the machine that it runs on.
#[derive(Clone, Debug, Default)]
pub enum Machine {
    /// All of it: its boot, what is in use of it, and threads that may block.
    #[default]
    Real,
    /// Made up: nothing is measured, and what may block is done in place, so that a run depends on no thread.
    Simulated {
        /// Which boot of it this is.
        boot_id: String,
    },
}

impl Machine {
    /// Which boot of the machine this is.
    pub(crate) fn boot_id(&self) -> String {
        match self {
            Self::Real => crate::inventory::boot_id(),
            Self::Simulated { boot_id } => boot_id.clone(),
        }
    }

    /// Does what may block without holding up the runtime.
    pub(crate) async fn block_on<T: Send + 'static>(&self, work: impl FnOnce() -> T + Send + 'static) -> T {
        match self {
            Self::Real => match tokio::task::spawn_blocking(work).await {
                Ok(result) => result,
                Err(error) => std::panic::resume_unwind(error.into_panic()),
            },
            Self::Simulated { .. } => work(),
        }
    }
}

impl Default for Tuning {
    fn default() -> Self {
        Self {
            attempts: 6,
            retry_base: Duration::from_secs(1),
            retry_max: Duration::from_mins(1),
            look_every: Duration::from_secs(10),
            inventory_every: Duration::from_mins(1),
            look_deadline: Duration::from_secs(15),
            fetch_deadline: Duration::from_hours(6),
            create_deadline: Duration::from_mins(10),
            step_deadline: Duration::from_mins(2),
            machine: Machine::Real,
            fencing: Seam::default(),
        }
    }
}

impl Tuning {
    /// How long a driver may take for a step; `guest_time` is what a guest may take to stop.
    pub(crate) fn deadline(&self, step: Step, guest_time: Duration) -> Duration {
        match step {
            Step::Create => self.create_deadline,
            Step::Stop => self.step_deadline + guest_time,
            Step::Start | Step::Pause | Step::Resume | Step::Delete | Step::TakeBack | Step::Update => {
                self.step_deadline
            }
        }
    }
}

/// The drivers of this node, in the order in which they are preferred.
#[derive(Clone, Default)]
pub struct DriverSet {
    drivers: Vec<Arc<dyn Driver>>,
}

impl DriverSet {
    /// These drivers; where two run the same type, new instances go to the first.
    #[must_use]
    pub fn new(drivers: Vec<Arc<dyn Driver>>) -> Self {
        Self { drivers }
    }

    /// Every driver.
    pub(crate) fn all(&self) -> &[Arc<dyn Driver>] {
        &self.drivers
    }

    /// The driver of this name.
    pub(crate) fn named(&self, name: &str) -> Option<Arc<dyn Driver>> {
        self.drivers.iter().find(|driver| driver.name() == name).cloned()
    }

    /// The driver for a new instance: of those that run its type the first that has its image, else the first.
    pub(crate) async fn for_instance(
        &self,
        instance_type: InstanceType,
        image: &str,
        deadline: Duration,
    ) -> Option<Arc<dyn Driver>> {
        let first = self.for_type(instance_type)?;
        let able: Vec<_> =
            self.drivers.iter().filter(|driver| driver.instance_type() == instance_type).collect();
        if able.len() > 1 {
            for driver in able {
                // One that does not answer has no image to offer.
                let images = tokio::time::timeout(deadline, driver.images()).await;
                if let Ok(Ok(images)) = images
                    && images.iter().any(|known| known.name == image)
                {
                    return Some(Arc::clone(driver));
                }
            }
        }
        Some(first)
    }

    /// The driver for a new instance that is made from another: of those that run its type the one that has that other,
    /// else the first.
    pub(crate) async fn for_clone(
        &self,
        instance_type: InstanceType,
        source: &InstanceId,
        deadline: Duration,
    ) -> Option<Arc<dyn Driver>> {
        for driver in self.drivers.iter().filter(|driver| driver.instance_type() == instance_type) {
            let known = tokio::time::timeout(deadline, driver.list()).await;
            if let Ok(Ok(known)) = known
                && known.contains(source)
            {
                return Some(Arc::clone(driver));
            }
        }
        self.for_type(instance_type)
    }

    /// The first driver of a type that gives devices on.
    pub(crate) fn for_devices(&self, instance_type: InstanceType) -> Option<Arc<dyn Driver>> {
        let takes =
            |driver: &&Arc<dyn Driver>| driver.instance_type() == instance_type && driver.takes_devices();
        self.drivers.iter().find(takes).cloned()
    }

    /// The first driver of a type.
    pub(crate) fn for_type(&self, instance_type: InstanceType) -> Option<Arc<dyn Driver>> {
        self.drivers.iter().find(|driver| driver.instance_type() == instance_type).cloned()
    }
}

/// What every task of the agent shares.
pub(crate) struct Context {
    pub(crate) node_id: NodeId,
    pub(crate) boot_id: String,
    pub(crate) drivers: DriverSet,
    pub(crate) tuning: Tuning,
    pub(crate) journal: Arc<Journal>,
    pub(crate) reports: Reports,
    pub(crate) guard: Arc<Guard>,
    pub(crate) images: Arc<Images>,
    pub(crate) devices: Arc<Devices>,
    /// Instances whose journal cannot be read, and why.
    pub(crate) damaged: BTreeMap<InstanceId, String>,
}

impl Context {
    /// Saves an entry without holding up the runtime.
    pub(crate) async fn save(&self, entry: Entry) -> Result<(), JournalError> {
        self.with_journal(move |journal| journal.save(&entry)).await
    }

    /// Forgets an entry without holding up the runtime.
    pub(crate) async fn forget(&self, id: InstanceId) -> Result<(), JournalError> {
        self.with_journal(move |journal| journal.remove(&id)).await
    }

    /// Works with the journal on a thread that may block.
    pub(crate) async fn with_journal<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Journal) -> Result<T, JournalError> + Send + 'static,
    ) -> Result<T, JournalError> {
        let journal = Arc::clone(&self.journal);
        self.tuning.machine.block_on(move || work(&journal)).await
    }
}

#[cfg(test)]
mod tests {
    use hv_driver_fake::{FakeDriver, FakeOptions};

    use super::*;

    #[tokio::test]
    async fn of_two_drivers_the_one_that_has_the_image_is_taken() {
        let fake = |image: &str| -> Arc<dyn Driver> {
            Arc::new(FakeDriver::new(FakeOptions {
                images: vec![image.to_owned()],
                ..FakeOptions::default()
            }))
        };
        let (first, second) = (fake("a"), fake("b"));
        let drivers = DriverSet::new(vec![Arc::clone(&first), Arc::clone(&second)]);
        for (image, expected) in [("a", &first), ("b", &second), ("c", &first)] {
            let taken = drivers.for_instance(InstanceType::Vm, image, Duration::from_secs(1)).await.unwrap();
            assert!(Arc::ptr_eq(&taken, expected), "{image}");
        }
        assert!(drivers.for_instance(InstanceType::Microvm, "a", Duration::from_secs(1)).await.is_none());
    }
}
