//! Pulls: from a reference to a stored image.

use std::fs::File;
use std::io::Read as _;
use std::path::Path;

use reqwest::Url;
use rustix::fs::{Mode, OFlags, ResolveFlags, openat2};

use crate::disk;
use crate::download::{Download, Fetched, Origin as From, blocking};
use crate::header::Format;
use crate::http::Http;
use crate::incoming::Incoming;
use crate::job::{Job, Origin};
use crate::oci::{self, Source};
use crate::progress::Phase;
use crate::reference::{Digest, Kind, Reference, Registry, Web};
use crate::registry::{Credentials, Repository};
use crate::store::StoredImage;
use crate::upload;
use crate::{ImageError, Result};

/// How much of a local file is copied at a time, in bytes.
const CHUNK_BYTES: usize = 1 << 20;

/// See [`Store::pull`](crate::Store::pull).
pub(crate) async fn pull(job: &Job, reference: &Reference, digest: Option<Digest>) -> Result<StoredImage> {
    let source = reference.to_string();
    if let Some(stored) = known(job, &source, digest.as_ref())? {
        return Ok(stored);
    }
    match reference.kind() {
        Kind::Registry(registry) => from_registry(job, registry, digest, source).await,
        Kind::Web(web) => from_web(job, web, digest, source).await,
        Kind::File(path) => from_file(job, path, digest, source).await,
    }
}

/// An image that is pinned by a digest, and that the store has, needs nobody else.
fn known(job: &Job, source: &str, digest: Option<&Digest>) -> Result<Option<StoredImage>> {
    let Some(digest) = digest else { return Ok(None) };
    let image = {
        let state = job.inner.state.lock();
        let fits = |image: &&crate::record::ImageRecord| {
            image.instance_type == job.instance_type
                && (image.source_digest == digest.as_str() || image.digest == digest.as_str())
        };
        state.images().find(fits).cloned()
    };
    let Some(image) = image else { return Ok(None) };
    let origin = Origin {
        source: source.to_owned(),
        source_digest: image.source_digest.clone(),
        validator: image.validator.clone(),
    };
    job.keep_image(&image.form, origin).map(Some)
}

async fn from_registry(
    job: &Job,
    place: &Registry,
    digest: Option<Digest>,
    source: String,
) -> Result<StoredImage> {
    let options = &job.inner.options;
    let http = Http::new(options)?;
    let credentials = Credentials::read(options.credentials.as_deref())?;
    let mirrors = options.mirrors.get(&place.host).into_iter().flatten();
    let hosts = mirrors.map(String::as_str).chain([place.host.as_str()]);
    let repositories = hosts
        .map(|host| Repository::new(&http, (&job.image, place, host), &credentials, &job.cancel))
        .collect();
    let registries = Source::Registries(repositories);
    let wanted = digest.as_ref().map_or(place.tag.as_str(), Digest::as_str);
    finish(job, &registries, wanted, source).await
}

/// From a source of an OCI image and what to begin with, a tag or digest, to a stored image.
pub(crate) async fn finish(job: &Job, source: &Source, wanted: &str, from: String) -> Result<StoredImage> {
    let resolved = source.resolve(job, wanted).await?;
    let key = job.form_key(resolved.digest.hex());
    let _pin = job.pin(&key);
    let _one = job.inner.flights.take(&key).await;
    if !job.has_form(&key) {
        oci::make(job, source, &resolved, &key).await?;
    }
    job.keep_image(
        &key,
        Origin { source: from, source_digest: resolved.source_digest.to_string(), validator: String::new() },
    )
}

async fn from_web(job: &Job, web: &Web, digest: Option<Digest>, source: String) -> Result<StoredImage> {
    if web.url.starts_with("http://") && digest.is_none() {
        return Err(ImageError::NotAllowed {
            image: job.image.clone(),
            reason: "plain HTTP needs a digest: append `#sha256:…`, or give one beside it".to_owned(),
        });
    }
    let http = Http::new(&job.inner.options)?;
    let url = Url::parse(&web.url)
        .map_err(|e| ImageError::InvalidReference { reference: job.image.clone(), reason: e.to_string() })?;
    let key = digest.as_ref().map_or_else(|| Digest::of(source.as_bytes()), Clone::clone);
    let (unless, form) = {
        let state = job.inner.state.lock();
        let image = state
            .image(&job.name, job.instance_type)
            .filter(|image| image.source == source && digest.is_none());
        image.map(|image| (image.validator.clone(), image.form.clone())).unwrap_or_default()
    };
    job.progress.begin(Phase::Downloading, 0);
    let _pin = job.pin(key.hex());
    let download = Download {
        job,
        what: "the file".to_owned(),
        key: key.hex().to_owned(),
        digest: digest.clone(),
        size: None,
        unless: unless.clone(),
    };
    match download.run(&[From::Web(&http, &url)]).await? {
        Fetched::Unchanged => {
            let digest = form.rsplit('-').next().map(|hex| format!("sha256:{hex}")).unwrap_or_default();
            job.keep_image(&form, Origin { source, source_digest: digest, validator: unless })
        }
        Fetched::Blob(blob, validator) => finish_file(job, blob, source, validator).await,
    }
}

/// From a blob that is one file to a stored image. The blob stays only as the form.
pub(crate) async fn finish_file(
    job: &Job,
    blob: Digest,
    source: String,
    validator: String,
) -> Result<StoredImage> {
    let pin = job.pin(&blob);
    let result = make_file(job, &blob, source, validator).await;
    drop(pin);
    let keeps = matches!(&result, Err(error) if !error.condemns());
    if !keeps {
        job.inner.state.lock().remove_blob(&blob)?;
    }
    result
}

async fn make_file(job: &Job, blob: &Digest, source: String, validator: String) -> Result<StoredImage> {
    let header = disk::inspect(job, blob).await?;
    if header.format == Format::Tar && job.instance_type != hv_types::InstanceType::Vm {
        return upload::image_layout(job, blob, source).await;
    }
    let key = job.form_key(blob.hex());
    let _pin = job.pin(&key);
    let _one = job.inner.flights.take(&key).await;
    if !job.has_form(&key) {
        disk::make(job, blob, header, &key).await?;
    }
    job.keep_image(&key, Origin { source, source_digest: blob.to_string(), validator })
}

async fn from_file(job: &Job, path: &Path, digest: Option<Digest>, source: String) -> Result<StoredImage> {
    let copying = (job.clone(), path.to_owned());
    let blob = blocking(move || copy(&copying.0, &copying.1, digest.as_ref())).await?;
    finish_file(job, blob, source, String::new()).await
}

/// Opens a file below one of the directories that the operator allows, wherever symbolic links below it lead.
fn open_allowed(job: &Job, path: &Path) -> Result<File> {
    let not_allowed =
        |reason: &str| ImageError::NotAllowed { image: job.image.clone(), reason: reason.to_owned() };
    for dir in &job.inner.options.allowed_file_dirs {
        let Ok(below) = path.strip_prefix(dir) else { continue };
        let root = File::open(dir).map_err(ImageError::io("open", dir))?;
        // A fifo without a writer would otherwise hold this thread.
        let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC | OFlags::NOCTTY;
        let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_MAGICLINKS;
        let file = match openat2(&root, below, flags, Mode::empty(), resolve) {
            Ok(file) => File::from(file),
            Err(rustix::io::Errno::XDEV | rustix::io::Errno::LOOP) => {
                return Err(not_allowed(
                    "it leads out of the directories in `allowed_file_dirs` through a symbolic link",
                ));
            }
            Err(rustix::io::Errno::NOENT) => {
                let source_says = format!("there is no file {}", path.display());
                return Err(ImageError::NotAtSource { image: job.image.clone(), source_says });
            }
            Err(errno) => return Err(ImageError::io("open", path)(errno.into())),
        };
        let metadata = file.metadata().map_err(ImageError::io("examine", path))?;
        return match metadata.is_file() {
            true => Ok(file),
            false => Err(not_allowed("it is no regular file")),
        };
    }
    Err(not_allowed("files are taken only from the directories in `allowed_file_dirs`"))
}

fn copy(job: &Job, path: &Path, digest: Option<&Digest>) -> Result<Digest> {
    let mut file = open_allowed(job, path)?;
    let length = file.metadata().map_err(ImageError::io("examine", path))?.len();
    job.progress.begin(Phase::Downloading, length);
    let mut incoming = Incoming::fresh(&job.image, &job.inner.layout, job.inner.options.min_free_bytes)?;
    let mut buffer = vec![0; CHUNK_BYTES];
    loop {
        if job.cancel.is_cancelled() {
            return Err(job.cancelled());
        }
        let count = file.read(&mut buffer).map_err(ImageError::io("read", path))?;
        if count == 0 {
            return upload::complete(job, incoming, digest);
        }
        upload::append(job, &mut incoming, &buffer[..count])?;
    }
}
