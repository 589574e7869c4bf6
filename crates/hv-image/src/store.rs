//! The store as its users see it.

use std::fs::OpenOptions;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use futures::Stream;
use hv_driver::LocalImage;
use hv_types::{ImageInfo, InstanceId, InstanceType};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::download::blocking;
use crate::flight::Flights;
use crate::job::{Inner, Job};
use crate::layout::Layout;
use crate::progress::Reporter;
use crate::reference::Digest;
use crate::state::{State, not_found};
use crate::{ImageError, Progress, Reference, Result, StoreOptions, collect, form, pull, upload};

/// Longest name of an image, in bytes; that of `spec.image`.
const MAX_NAME_BYTES: usize = 512;

/// What to fetch.
#[derive(Clone, Debug)]
pub struct PullRequest {
    /// Where from.
    pub reference: Reference,
    /// The name under which it is kept; the same name for another type of instance is another image.
    pub name: String,
    /// What it is for.
    pub instance_type: InstanceType,
    /// What it must be: `sha256:` and 64 hexadecimal digits, of the file, or of the manifest or index.
    /// Beside the digest of the
    /// reference; where both are given they must agree.
    pub digest: Option<String>,
}

/// What is being uploaded.
#[derive(Clone, Debug)]
pub struct ImportRequest {
    /// The name under which it is kept.
    pub name: String,
    /// What it is for.
    pub instance_type: InstanceType,
    /// How many bytes come; 0: not known.
    pub size_bytes: u64,
    /// What they must be; `None`: not checked.
    pub digest: Option<String>,
}

/// An image of the store.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StoredImage {
    /// What nodes report of it.
    pub info: ImageInfo,
    /// When an instance last acquired or released it, or it was pulled.
    pub last_used: SystemTime,
    /// The instances that use it, in order.
    pub users: Vec<InstanceId>,
}

/// What [`Store::collect`] removed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Collected {
    /// Its name.
    pub name: String,
    /// What it was for.
    pub instance_type: InstanceType,
    /// What it took up, in bytes, as far as no other image shares it.
    pub size_bytes: u64,
}

/// A node's image store. Cheap to clone; all clones are one store.
#[derive(Clone)]
pub struct Store {
    inner: Arc<Inner>,
}

impl Store {
    /// Opens the store, makes it if it is not there, and sweeps away what a crash left behind. Blocks for
    /// some milliseconds.
    ///
    /// # Errors
    /// [`ImageError::Locked`] where another process has it open; [`ImageError::Newer`] where a newer version
    /// wrote it.
    pub fn open(options: StoreOptions) -> Result<Self> {
        let layout = Layout::create(&options.dir)?;
        let path = layout.lock();
        let lock = OpenOptions::new().write(true).create(true).truncate(false).open(&path);
        let lock = lock.map_err(ImageError::io("open", &path))?;
        if lock.try_lock().is_err() {
            return Err(ImageError::Locked { dir: options.dir });
        }
        let state = parking_lot::Mutex::new(State::load(layout.clone())?);
        Ok(Self {
            inner: Arc::new(Inner { options, layout, state, flights: Flights::default(), _lock: lock }),
        })
    }

    /// The directory of the store.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.inner.options.dir
    }

    /// Fetches an image and makes what its instances start from. Where the store has it already and the
    /// source says it is still
    /// the same, nothing is fetched. Calls for the same thing share one download. A call that fails or is
    /// cancelled
    /// leaves what has arrived for the next one, unless the image itself was the reason.
    ///
    /// # Errors
    /// Every [`ImageError`] but those of the other methods.
    pub async fn pull(
        &self,
        request: &PullRequest,
        progress: &watch::Sender<Progress>,
        cancel: &CancellationToken,
    ) -> Result<StoredImage> {
        let stated = request.digest.as_deref().map(str::parse::<Digest>).transpose()?;
        let carried = request.reference.digest().map(str::parse::<Digest>).transpose()?;
        let digest = match (stated, carried) {
            (Some(stated), Some(carried)) if stated != carried => {
                let reason = "must be the digest that the reference carries, or none";
                return Err(hv_types::Invalid::new("digest", stated, reason).into());
            }
            (stated, carried) => stated.or(carried),
        };
        let job = self.job(
            &request.reference.to_string(),
            (&request.name, request.instance_type),
            (progress, cancel),
        )?;
        pull::pull(&job, &request.reference, digest).await
    }

    /// Takes an upload: a disk, a kernel, or, for containers and microVMs, an OCI image layout as a tar file.
    /// An upload that ends early leaves nothing.
    ///
    /// # Errors
    /// As [`Self::pull`].
    pub async fn import<S>(
        &self,
        data: S,
        request: &ImportRequest,
        progress: &watch::Sender<Progress>,
        cancel: &CancellationToken,
    ) -> Result<StoredImage>
    where
        S: Stream<Item = std::io::Result<Bytes>> + Send + Unpin,
    {
        let digest = request.digest.as_deref().map(str::parse::<Digest>).transpose()?;
        let job = self.job(&request.name, (&request.name, request.instance_type), (progress, cancel))?;
        upload::import(&job, data, request.size_bytes, digest).await
    }

    /// All images, by name and type.
    #[must_use]
    pub fn list(&self) -> Vec<StoredImage> {
        let state = self.inner.state.lock();
        state.images().map(|image| state.describe(image)).collect()
    }

    /// One image.
    #[must_use]
    pub fn get(&self, name: &str, instance_type: InstanceType) -> Option<StoredImage> {
        let state = self.inner.state.lock();
        state.image(name, instance_type).map(|image| state.describe(image))
    }

    /// Removes an image, for every type of instance that it is there for. One that is not there is removed
    /// already.
    ///
    /// # Errors
    /// [`ImageError::InUse`] while an instance uses it, for whichever type; then nothing is removed.
    pub async fn delete(&self, name: &str) -> Result<()> {
        let name = name.to_owned();
        self.change(move |state| state.delete(&name)).await
    }

    /// Hands an image to an instance, durably: it stays until [`Self::release`], whatever happens to its
    /// name. The same call
    /// again gives the same answer, also where the name means a newer image by now.
    ///
    /// # Errors
    /// [`ImageError::NotFound`] where the store does not have it.
    pub async fn acquire(
        &self,
        name: &str,
        instance_type: InstanceType,
        user: &InstanceId,
    ) -> Result<LocalImage> {
        let (name, user) = (name.to_owned(), user.clone());
        self.change(move |state| state.acquire(&name, instance_type, &user)).await
    }

    /// Takes back everything that an instance acquired. An instance that has nothing has given it back
    /// already.
    ///
    /// # Errors
    /// [`ImageError::Io`].
    pub async fn release(&self, user: &InstanceId) -> Result<()> {
        let user = user.clone();
        self.change(move |state| state.release(&user)).await
    }

    /// The instances that have acquired something, so that an agent can release for those that are gone.
    #[must_use]
    pub fn users(&self) -> Vec<InstanceId> {
        self.inner.state.lock().users()
    }

    /// Removes images that no instance uses: those not used for `unused_for`, and, while less than
    /// `keep_free` bytes are
    /// free, the others, longest unused first, but none that was used in the last ten minutes. Also sweeps
    /// away old partial downloads and what no image needs any
    /// more. `dry_run` only says what would go.
    ///
    /// # Errors
    /// [`ImageError::Io`].
    pub async fn collect(
        &self,
        unused_for: Duration,
        keep_free: u64,
        dry_run: bool,
    ) -> Result<Vec<Collected>> {
        let inner = Arc::clone(&self.inner);
        self.change(move |state| {
            collect::collect(state, &inner.layout, &inner.options, (unused_for, keep_free), dry_run)
        })
        .await
    }

    /// Reads every file of an image again and compares it with what was stored.
    ///
    /// # Errors
    /// [`ImageError::Damaged`] says which file; [`ImageError::NotFound`].
    pub async fn verify(&self, name: &str) -> Result<()> {
        let forms: Vec<_> = {
            let state = self.inner.state.lock();
            let images =
                InstanceType::ALL.iter().filter_map(|instance_type| state.image(name, *instance_type));
            images.filter_map(|image| Some((image.form.clone(), state.form(&image.form)?.clone()))).collect()
        };
        if forms.is_empty() {
            return Err(not_found(name, InstanceType::Vm));
        }
        let (layout, name) = (self.inner.layout.clone(), hv_types::validate::excerpt(name));
        blocking(move || {
            forms.iter().try_for_each(|(key, record)| form::verify(&name, record, &layout.form(key)))
        })
        .await
    }

    fn job(
        &self,
        image: &str,
        (name, instance_type): (&str, InstanceType),
        (progress, cancel): (&watch::Sender<Progress>, &CancellationToken),
    ) -> Result<Job> {
        hv_types::validate::printable("name", name, MAX_NAME_BYTES)?;
        Ok(Job {
            inner: Arc::clone(&self.inner),
            image: image.to_owned(),
            name: name.to_owned(),
            instance_type,
            progress: Reporter::new(progress),
            cancel: cancel.clone(),
        })
    }

    /// Changes what the store knows, where it may wait for the disk.
    async fn change<T: Send + 'static>(
        &self,
        change: impl FnOnce(&mut State) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        let inner = Arc::clone(&self.inner);
        blocking(move || change(&mut inner.state.lock())).await
    }
}
