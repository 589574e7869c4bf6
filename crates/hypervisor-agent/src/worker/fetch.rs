//! The image of an instance, before its driver creates it.

use std::sync::Arc;
use std::time::Duration;

use hv_driver::{Driver, DriverError, InstanceConfig, LocalImage};
use hv_image::Progress;
use hv_types::{InstanceState, Wanted};
use parking_lot::Mutex;
use tokio::sync::watch;
use tokio::time::Instant;
use tokio_util::task::AbortOnDropHandle;

use super::{Called, Worker};
use crate::entry::Entry;
use crate::images::told;
use crate::plan::Step;

/// How often it is looked how far a fetch is.
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// What it is called in errors.
const OPERATION: &str = "fetch the image";

/// What a fetch comes to: the image, or that the driver looks for it itself.
type Outcome = Result<Option<LocalImage>, DriverError>;

/// A fetch under way; dropping it gives it up.
struct Fetch {
    outcome: Arc<Mutex<Option<Outcome>>>,
    /// Closed when there is an outcome.
    going: watch::Receiver<()>,
    _task: AbortOnDropHandle<()>,
}

impl Fetch {
    fn begin(work: impl Future<Output = Outcome> + Send + 'static) -> Self {
        let outcome = Arc::new(Mutex::new(None));
        let (end, going) = watch::channel(());
        let slot = Arc::clone(&outcome);
        let task = tokio::spawn(async move {
            let done = work.await;
            *slot.lock() = Some(done);
            drop(end);
        });
        Self { outcome, going, _task: AbortOnDropHandle::new(task) }
    }
}

/// The fetch of an image for an instance that another node is about to hand over. It goes on while nobody asks for it.
pub(super) struct IncomingFetch {
    migration: String,
    fetch: Fetch,
    seen: watch::Receiver<Progress>,
}

impl Worker {
    /// Sees to it that the image of an instance that waits here is on this node. `Some`: it is being fetched, and so far.
    pub(super) async fn provide_incoming(
        &mut self,
        driver: &Arc<dyn Driver>,
        migration: &str,
        digest: Option<String>,
    ) -> Result<Option<Progress>, DriverError> {
        let (config, instance_type) = (self.entry.config.clone(), self.entry.instance_type);
        let images = Arc::clone(&self.context.images);
        let is_needed = digest.is_some() || images.concerns(&config, instance_type);
        if config.image.is_some() || !is_needed {
            return Ok(None);
        }
        let begun = self.incoming_fetch.take().filter(|begun| begun.migration == migration);
        let fetching = begun.unwrap_or_else(|| {
            let (progress, seen) = watch::channel(Default::default());
            let (id, deadline) = (config.id.clone(), self.context.tuning.fetch_deadline);
            let work = images.provide(Arc::clone(driver), config, instance_type, digest, progress);
            let bounded = async move {
                let timeout_ms = u64::try_from(deadline.as_millis()).unwrap_or(u64::MAX);
                let late = || DriverError::Timeout { id, operation: OPERATION, timeout_ms };
                tokio::time::timeout(deadline, work).await.unwrap_or_else(|_| Err(late()))
            };
            IncomingFetch { migration: migration.to_owned(), fetch: Fetch::begin(bounded), seen }
        });
        let mut going = fetching.fetch.going.clone();
        let look = Box::pin(async move {
            // Either way it is looked at what there is.
            let _ = tokio::time::timeout(LOOK_EVERY, going.changed()).await;
            Ok(())
        });
        let is_given_up = |entry: &Entry| entry.wanted == Wanted::Deleted || entry.released;
        if let Called::Overtaken = self.call(look, 2 * LOOK_EVERY, OPERATION, None, is_given_up).await {
            return Err(DriverError::wrong_state(self.entry.id(), OPERATION, "it was given up meanwhile"));
        }
        let outcome = fetching.fetch.outcome.lock().take();
        match outcome {
            Some(image) => {
                self.entry.config.image = image?;
                self.unsaved = true;
                Ok(None)
            }
            None => {
                let progress = *fetching.seen.borrow();
                self.incoming_fetch = Some(fetching);
                Ok(Some(progress))
            }
        }
    }

    /// Sees to it that the images that a step needs are on this node. False: one is not, and what was to be done with it
    /// is over, or put off.
    pub(super) async fn provide_images(&mut self, driver: &Arc<dyn Driver>, step: Step, serial: u64) -> bool {
        // What is made from a snapshot needs no image.
        if step == Step::Create && self.entry.config.spec.clone_of.is_none() {
            match self.provide_image(driver, self.entry.config.clone(), step, serial).await {
                Some(image) => self.entry.config.image = image,
                None => return false,
            }
        }
        let Some(rescue) = self.entry.config.in_rescue().filter(|rescue| rescue.image.is_none()) else {
            return true;
        };
        match self.provide_image(driver, rescue, step, serial).await {
            Some(image) => self.entry.config.rescue_image = image,
            None => return false,
        }
        true
    }

    /// Sees to it that the image of a configuration is on this node, and tells how far it is. `None`: it is not.
    async fn provide_image(
        &mut self,
        driver: &Arc<dyn Driver>,
        config: InstanceConfig,
        step: Step,
        serial: u64,
    ) -> Option<Option<LocalImage>> {
        let images = Arc::clone(&self.context.images);
        let instance_type = self.entry.instance_type;
        if !images.concerns(&config, instance_type) {
            return Some(config.image);
        }
        let (progress, seen) = watch::channel(Default::default());
        let shown = match step {
            Step::Create => InstanceState::Creating,
            _ => self.view.borrow().record.state,
        };
        let fetch = Fetch::begin(images.provide(Arc::clone(driver), config, instance_type, None, progress));
        let end = Instant::now() + self.context.tuning.fetch_deadline;
        let is_pointless = |entry: &Entry| entry.wanted == Wanted::Deleted || entry.released;
        let error = loop {
            let mut going = fetch.going.clone();
            let look = Box::pin(async move {
                // Either way it is looked at what there is.
                let _ = tokio::time::timeout(LOOK_EVERY, going.changed()).await;
                Ok(())
            });
            let left = end.saturating_duration_since(Instant::now());
            match self.call(look, left, OPERATION, None, is_pointless).await {
                Called::Overtaken => return None,
                Called::Done(Err(error)) => break error,
                Called::Done(Ok(())) => {}
            }
            let outcome = fetch.outcome.lock().take();
            match outcome {
                Some(Ok(image)) => return Some(image),
                Some(Err(error)) => break error,
                None => {
                    let reason = told(*seen.borrow());
                    self.publish(shown, &reason);
                }
            }
        };
        self.look = true;
        self.setback(step, serial, &error);
        None
    }
}
