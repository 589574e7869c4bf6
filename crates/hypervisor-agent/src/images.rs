//! The images of this node: fetched where a reference says where from, handed to instances, taken back when they are gone.
//!
//! # Theory of operation
//! `spec.image` is a reference (`oci://…`), which the node fetches under that very name, or a name. What the store has by that
//! name is handed to the instance; any other name is the driver's own business. An instance keeps what it was given
//! until it is gone from this node: the store writes that down, so that nothing is removed under it.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use hv_config::{ByteSize, HumanDuration};
use hv_driver::{Capability, Driver, DriverError, InstanceConfig, LocalImage};
use hv_image::{ImageError, Progress, PullRequest, Reference, Store, StoreOptions};
use hv_telemetry::error_chain;
use hv_types::image::is_reference;
use hv_types::{ImageInfo, InstanceId, InstanceType};
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use tokio::sync::{Notify, watch};
use tokio_util::sync::CancellationToken;

/// How often images that nobody needs are looked for.
const COLLECT_EVERY: Duration = Duration::from_hours(1);
/// What an operation on an image is called in errors.
const FETCH: &str = "fetch the image";

/// The image store.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Settings {
    /// Whether this node keeps images of its own. Off: only what lies in the drivers' image directories can be started.
    pub enabled: bool,
    /// Where they lie; unset: `image-store` in the state directory.
    pub dir: Option<std::path::PathBuf>,
    /// Registries and web servers (`host` or `host:port`) that are spoken to without TLS.
    pub allowed_plain_http: Vec<String>,
    /// For a registry those that are asked before it.
    pub mirrors: std::collections::BTreeMap<String, Vec<String>>,
    /// Names and passwords for registries, in the format of docker's `config.json`.
    pub credentials_file: Option<std::path::PathBuf>,
    /// `file://` reaches only what lies in these directories.
    pub file_dirs: Vec<std::path::PathBuf>,
    /// Certificates that are trusted beside the system's.
    pub ca_file: Option<std::path::PathBuf>,
    /// The largest image that is fetched.
    pub max_size: ByteSize,
    /// What must stay free on the disk; a fetch that would take it is refused.
    pub min_free: ByteSize,
    /// Images that no instance used for so long are removed.
    pub unused_for: HumanDuration,
    /// Where less than this is free, unused images are removed sooner.
    pub keep_free: ByteSize,
}

impl Default for Settings {
    fn default() -> Self {
        const GIB: u64 = 1 << 30;
        Self {
            enabled: true,
            dir: None,
            allowed_plain_http: Vec::new(),
            mirrors: Default::default(),
            credentials_file: None,
            file_dirs: Vec::new(),
            ca_file: None,
            max_size: ByteSize::from_bytes(64 * GIB),
            min_free: ByteSize::from_bytes(GIB),
            unused_for: HumanDuration::new(Duration::from_hours(14 * 24)),
            keep_free: ByteSize::from_bytes(4 * GIB),
        }
    }
}

impl Settings {
    fn options(&self, state_dir: &std::path::Path) -> StoreOptions {
        let dir = self.dir.clone().unwrap_or_else(|| state_dir.join("image-store"));
        StoreOptions {
            allowed_plain_http: self.allowed_plain_http.clone(),
            mirrors: self.mirrors.clone(),
            credentials: self.credentials_file.clone(),
            allowed_file_dirs: self.file_dirs.clone(),
            ca_file: self.ca_file.clone(),
            max_image_bytes: self.max_size.bytes(),
            min_free_bytes: self.min_free.bytes(),
            ..StoreOptions::new(std::path::absolute(&dir).unwrap_or(dir))
        }
    }
}

/// The images of this node; without a store it has none.
#[derive(Default)]
pub(crate) struct Images {
    store: Option<Store>,
    unused_for: Duration,
    keep_free: u64,
    /// Whether a driver starts from what the store hands out, once that is known.
    takers: Mutex<HashMap<&'static str, bool>>,
    /// Told when the store has other images than before.
    changed: Notify,
}

impl Images {
    /// Opens the store that the settings ask for. Blocks.
    ///
    /// # Errors
    /// It cannot be opened.
    pub(crate) fn open(settings: &Settings, state_dir: &std::path::Path) -> Result<Self, ImageError> {
        let store = settings.enabled.then(|| Store::open(settings.options(state_dir))).transpose()?;
        Ok(Self {
            store,
            unused_for: settings.unused_for.get(),
            keep_free: settings.keep_free.bytes(),
            takers: Mutex::default(),
            changed: Notify::new(),
        })
    }

    /// The store, where there is one.
    pub(crate) fn store(&self) -> Option<&Store> {
        self.store.as_ref()
    }

    /// The store has other images than before: the control plane is to hear of it at once.
    pub(crate) fn have_changed(&self) {
        self.changed.notify_one();
    }

    /// Returns once the store has other images than when this returned last.
    pub(crate) async fn changed(&self) {
        self.changed.notified().await;
    }

    /// What the store has, for the node's inventory.
    pub(crate) fn list(&self) -> Vec<ImageInfo> {
        self.store.iter().flat_map(Store::list).map(|image| image.info).collect()
    }

    /// Whether an instance's image is one that has to be fetched, or that the store has.
    pub(crate) fn concerns(&self, config: &InstanceConfig, instance_type: InstanceType) -> bool {
        let image = &config.spec.image;
        let has = |store: &Store| is_reference(image) || store.get(image, instance_type).is_some();
        !image.is_empty() && self.store.as_ref().is_some_and(has)
    }

    /// The image of an instance, fetched if need be, and kept for it from now on; `None`: its driver looks for it itself.
    /// It is the one with this digest, where one is given.
    ///
    /// # Errors
    /// It cannot be had; whether trying again may help is as the error says.
    pub(crate) async fn provide(
        self: Arc<Self>,
        driver: Arc<dyn Driver>,
        config: InstanceConfig,
        instance_type: InstanceType,
        digest: Option<String>,
        progress: watch::Sender<Progress>,
    ) -> Result<Option<LocalImage>, DriverError> {
        let (id, image) = (&config.id, &config.spec.image);
        let concerned = self.store.as_ref().filter(|_| self.concerns(&config, instance_type));
        let Some(store) = concerned else {
            return match digest {
                None => Ok(None),
                Some(digest) => Err(missing(id, image, &digest)),
            };
        };
        if !self.is_taken_by(&driver).await {
            if !is_reference(image) {
                return Ok(None);
            }
            return Err(DriverError::Unsupported {
                driver: driver.name(),
                operation: "start from a fetched image",
                reason: format!("spec.image: {image} is a reference; name an image of the node instead"),
            });
        }
        let refuse = |error: ImageError| refused(id, error);
        let is_it = |known: &str| digest.as_ref().is_none_or(|digest| digest == known);
        if !store.get(image, instance_type).is_some_and(|known| is_it(&known.info.digest)) {
            if let Some(digest) = digest.as_ref().filter(|_| !is_reference(image)) {
                return Err(missing(id, image, digest));
            }
            let reference: Reference = image.parse().map_err(refuse)?;
            let request =
                PullRequest { reference, name: image.clone(), instance_type, digest: digest.clone() };
            store.pull(&request, &progress, &CancellationToken::new()).await.map_err(refuse)?;
            self.have_changed();
        }
        let local = store.acquire(image, instance_type, id).await.map_err(refuse)?;
        match digest {
            Some(digest) if digest != local.digest => Err(missing(id, image, &digest)),
            _ => Ok(Some(local)),
        }
    }

    async fn is_taken_by(&self, driver: &Arc<dyn Driver>) -> bool {
        if let Some(known) = self.takers.lock().get(driver.name()) {
            return *known;
        }
        let fingerprint = driver.fingerprint().await;
        let takes = fingerprint.capabilities.contains(&Capability::FetchedImages);
        if fingerprint.healthy {
            self.takers.lock().insert(driver.name(), takes);
        }
        takes
    }

    /// Takes back what an instance that is gone was given. What fails is done at the next start.
    pub(crate) async fn release(&self, id: &InstanceId) {
        let Some(store) = &self.store else { return };
        if let Err(error) = store.release(id).await {
            tracing::warn!(instance = %id, error = error_chain(&error), "its image stays in use");
        }
    }

    /// Takes back what instances were given that this node does not know any more.
    pub(crate) async fn release_all_but(&self, known: &HashSet<InstanceId>) {
        let Some(store) = &self.store else { return };
        for user in store.users().into_iter().filter(|user| !known.contains(user)) {
            self.release(&user).await;
        }
    }

    /// Removes now and then what nobody needs.
    pub(crate) async fn collect_forever(self: Arc<Self>, stopping: CancellationToken) {
        let Some(store) = &self.store else { return };
        let collect = async {
            loop {
                tokio::time::sleep(COLLECT_EVERY).await;
                match store.collect(self.unused_for, self.keep_free, false).await {
                    Ok(gone) if gone.is_empty() => {}
                    Ok(gone) => {
                        self.have_changed();
                        tracing::info!(images = gone.len(), "unused images were removed");
                    }
                    Err(error) => {
                        tracing::warn!(error = error_chain(&error), "unused images cannot be removed");
                    }
                }
            }
        };
        stopping.run_until_cancelled(collect).await;
    }
}

fn missing(id: &InstanceId, image: &str, digest: &str) -> DriverError {
    let reason = format!(
        "spec.image: this node has no {image} of {digest}, and cannot fetch it by that; `hypervisor-ctl image push` or \
         `image pull` it here first"
    );
    DriverError::invalid(id, reason)
}

fn refused(id: &InstanceId, error: ImageError) -> DriverError {
    if error.is_transient() {
        DriverError::failed(id, FETCH, error)
    } else {
        DriverError::invalid(id, format!("spec.image: {}", error_chain(&error)))
    }
}

/// How far a fetch is, for people.
pub(crate) fn told(progress: Progress) -> String {
    const MIB: u64 = 1 << 20;
    let Progress { phase, done_bytes, total_bytes } = progress;
    let phase = phase.name();
    if total_bytes == 0 {
        return format!("its image: {phase}");
    }
    // In steps, so that a report is sent for each twentieth and not for each packet.
    let percent = done_bytes.saturating_mul(20) / total_bytes * 5;
    format!("its image: {phase}, {percent} % of {} MiB", total_bytes.div_ceil(MIB))
}

#[cfg(test)]
mod tests {
    use hv_image::Phase;

    use super::*;

    #[test]
    fn progress_is_told_in_twentieths() {
        let progress =
            |done_bytes, total_bytes| Progress { phase: Phase::Downloading, done_bytes, total_bytes };
        assert_eq!(told(progress(0, 0)), "its image: downloading");
        assert_eq!(told(progress(0, 1 << 30)), "its image: downloading, 0 % of 1024 MiB");
        assert_eq!(told(progress((1 << 30) / 2 + 7, 1 << 30)), "its image: downloading, 50 % of 1024 MiB");
        assert_eq!(told(progress(1 << 30, 1 << 30)), "its image: downloading, 100 % of 1024 MiB");
    }
}
