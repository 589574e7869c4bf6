//! OCI images: from what a reference names to the manifest for this node, to its blobs, to a form.

use std::collections::HashSet;

use bytes::Bytes;
use futures::future::BoxFuture;
use futures::{FutureExt as _, StreamExt as _, TryStreamExt as _};
use hv_driver::ImageContent;
use hv_types::InstanceType;
use serde_json::json;

use crate::disk;
use crate::download::{Download, Origin, blocking};
use crate::form::Form;
use crate::job::{Job, Pin};
use crate::layout;
use crate::manifest::{Config, Descriptor, Document, MAX_CONFIG_BYTES, MAX_INDEX_DEPTH, Manifest, choose};
use crate::progress::Phase;
use crate::reference::Digest;
use crate::registry::{MAX_MANIFEST_BYTES, Repository};
use crate::rootfs::{self, Content};
use crate::{ImageError, Result};

/// Blobs of one image that are fetched at a time.
const PARALLEL_BLOBS: usize = 3;

/// Where the parts of an image are.
pub(crate) enum Source {
    /// In registries that have the same, asked in this order.
    Registries(Vec<Repository>),
    /// Among the store's blobs, where an upload put them.
    Blobs,
}

/// The manifest for this node.
pub(crate) struct Resolved {
    /// Of what the reference names: an index, or the manifest itself.
    pub(crate) source_digest: Digest,
    pub(crate) digest: Digest,
    bytes: Bytes,
    manifest: Manifest,
}

impl Source {
    /// A manifest or index by digest, verified; or by tag, which nobody can verify.
    async fn document(&self, job: &Job, reference: &str) -> Result<(Digest, Bytes)> {
        let mut last = None;
        match self {
            Self::Blobs => {
                let digest: Digest = reference.parse()?;
                let path = job.inner.layout.blob(&digest);
                if !path.exists() {
                    return Err(job.refused(format!("it lacks its manifest {digest}")));
                }
                let bytes = blocking(move || layout::read_bounded(&path, MAX_MANIFEST_BYTES)).await?;
                return Ok((digest, bytes.into()));
            }
            Self::Registries(repositories) => {
                for repository in repositories {
                    match repository
                        .manifest(reference)
                        .await
                        .and_then(|bytes| verified(job, reference, bytes))
                    {
                        Ok(found) => return Ok(found),
                        Err(error @ ImageError::Cancelled { .. }) => return Err(error),
                        Err(error) => last = Some(error),
                    }
                }
            }
        }
        Err(last.unwrap_or_else(|| job.unsupported("no registry was asked")))
    }

    /// Follows indexes to the manifest for this node.
    pub(crate) async fn resolve(&self, job: &Job, reference: &str) -> Result<Resolved> {
        job.progress.begin(Phase::Resolving, 0);
        let architecture = &job.inner.options.architecture;
        let mut seen = HashSet::new();
        let mut source_digest = None;
        let mut next = reference.to_owned();
        for _ in 0..=MAX_INDEX_DEPTH {
            let (digest, bytes) = self.document(job, &next).await?;
            let source_digest = source_digest.get_or_insert_with(|| digest.clone()).clone();
            seen.insert(digest.clone());
            match Document::parse(&job.image, &bytes)? {
                Document::Manifest(manifest) => {
                    return Ok(Resolved { source_digest, digest, bytes, manifest });
                }
                Document::Index(manifests) => {
                    let chosen = choose(&job.image, &manifests, architecture)?.digest(&job.image)?;
                    if seen.contains(&chosen) {
                        return Err(job.refused("its index contains itself"));
                    }
                    next = chosen.to_string();
                }
            }
        }
        Err(job.refused(format!("its indexes are nested more than {MAX_INDEX_DEPTH} deep")))
    }

    async fn fetch(&self, job: &Job, what: String, descriptor: &Descriptor) -> Result<Digest> {
        let digest = descriptor.digest(&job.image)?;
        match self {
            Self::Registries(repositories) => {
                let origins: Vec<_> = repositories.iter().map(Origin::Registry).collect();
                let download = Download {
                    job,
                    what,
                    key: digest.hex().to_owned(),
                    digest: Some(digest.clone()),
                    size: Some(descriptor.size),
                    unless: String::new(),
                };
                download.run(&origins).await?;
            }
            Self::Blobs => {
                let length = std::fs::metadata(job.inner.layout.blob(&digest)).map(|metadata| metadata.len());
                if length.ok() != Some(descriptor.size) {
                    return Err(job.refused(format!("{what} is missing or has another size than it should")));
                }
                job.progress.add(descriptor.size);
            }
        }
        Ok(digest)
    }
}

fn verified(job: &Job, reference: &str, bytes: Bytes) -> Result<(Digest, Bytes)> {
    let actual = Digest::of(&bytes);
    match reference.parse::<Digest>() {
        Ok(expected) if expected != actual => Err(ImageError::DigestMismatch {
            image: job.image.clone(),
            what: "its manifest".to_owned(),
            expected: expected.to_string(),
            actual: actual.to_string(),
        }),
        _ => Ok((actual, bytes)),
    }
}

/// Fetches the blobs of a manifest and makes the form. If the image itself is at fault, what was fetched of
/// it goes.
pub(crate) async fn make(job: &Job, source: &Source, resolved: &Resolved, key: &str) -> Result<()> {
    let total = resolved.manifest.check(&job.image, &job.inner.options)?;
    let descriptors = || std::iter::once(&resolved.manifest.config).chain(&resolved.manifest.layers);
    let digests: Vec<_> =
        descriptors().map(|descriptor| descriptor.digest(&job.image)).collect::<Result<_>>()?;
    let pins: Vec<Pin> = digests.iter().map(|digest| job.pin(digest)).collect();
    let result = fetch_and_make(job, source, (resolved, total), key).await;
    drop(pins);
    // Layers that are only the source of a file system stay a while, as other images may share them.
    if let Err(error) = &result
        && error.condemns()
    {
        let state = job.inner.state.lock();
        for digest in &digests {
            state.remove_blob(digest)?;
        }
    }
    result
}

async fn fetch_and_make(
    job: &Job,
    source: &Source,
    (resolved, total): (&Resolved, u64),
    key: &str,
) -> Result<()> {
    job.progress.begin(Phase::Downloading, total);
    let manifest = &resolved.manifest;
    let config = source.fetch(job, "its configuration".to_owned(), &manifest.config).await?;
    let is_disk = !manifest.is_image() && job.instance_type != InstanceType::Container;
    let read = if is_disk { None } else { Some(read_config(job, &config, manifest).await?) };
    // Boxed and collected: a stream over the closure itself would make this future one that no task can be
    // spawned with.
    let fetch = |(index, layer)| {
        source.fetch(job, format!("layer {} of {}", index + 1, manifest.layers.len()), layer).boxed()
    };
    let fetches: Vec<BoxFuture<'_, Result<Digest>>> = manifest.layers.iter().enumerate().map(fetch).collect();
    let layers: Vec<Digest> = futures::stream::iter(fetches).buffered(PARALLEL_BLOBS).try_collect().await?;
    let Some(read) = read else { return artifact(job, &layers, key).await };
    let content = Content {
        manifest: resolved.digest.clone(),
        layers,
        diff_ids: read.diff_ids(&job.image)?,
        compressed_bytes: manifest.layers.iter().map(|layer| layer.size).sum(),
    };
    let form = match job.instance_type {
        InstanceType::Vm => {
            return Err(job.unsupported(
                "VMs start from disks; this is a file system, which microVMs and containers take",
            ));
        }
        InstanceType::Microvm => rootfs::make(job, &content, &read).await?,
        InstanceType::Container => {
            rootfs::inspect(job, &content).await?;
            image_layout(job, resolved, &config, &content, &read)?
        }
    };
    let (job, key) = (job.clone(), key.to_owned());
    blocking(move || job.keep_form(&key, form)).await
}

async fn read_config(job: &Job, blob: &Digest, manifest: &Manifest) -> Result<Config> {
    let path = job.inner.layout.blob(blob);
    let bytes = blocking(move || layout::read_bounded(&path, MAX_CONFIG_BYTES)).await?;
    Config::parse(&job.image, &bytes, &job.inner.options.architecture, manifest.layers.len())
}

/// A file that lies in a registry: an artifact of one layer.
async fn artifact(job: &Job, layers: &[Digest], key: &str) -> Result<()> {
    let [layer] = layers else {
        return Err(job.unsupported(
            "it is no image but an artifact of several files; one with a single file is taken",
        ));
    };
    let header = disk::inspect(job, layer).await?;
    disk::make(job, layer, header, key).await
}

/// An OCI image layout of this one image, its blobs being hard links of the store's.
fn image_layout(
    job: &Job,
    resolved: &Resolved,
    config: &Digest,
    content: &Content,
    read: &Config,
) -> Result<Form> {
    let mut form = Form::begin(&job.inner.layout)?;
    let directory = "layout/blobs/sha256";
    form.directory(directory)?;
    let blobs: HashSet<&Digest> = content.layers.iter().chain([config]).collect();
    for blob in blobs {
        form.link(&job.inner.layout, blob, &format!("{directory}/{}", blob.hex()))?;
    }
    form.write(&format!("{directory}/{}", resolved.digest.hex()), &resolved.bytes)?;
    form.write("layout/oci-layout", br#"{"imageLayoutVersion":"1.0.0"}"#)?;
    let media_type = media_type(&resolved.bytes);
    let index = json!({
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.index.v1+json",
        "manifests": [{
            "mediaType": media_type,
            "digest": resolved.digest.as_str(),
            "size": resolved.bytes.len(),
            "platform": { "os": "linux", "architecture": job.inner.options.architecture },
        }],
    });
    form.write("layout/index.json", index.to_string().as_bytes())?;
    let manifest = resolved.digest.to_string();
    form.describe(
        &manifest,
        ImageContent::Oci { layout: "layout".into(), manifest: manifest.clone() },
        &read.architecture,
    );
    Ok(form)
}

/// What a manifest says it is; OCI's own where it says nothing.
fn media_type(bytes: &[u8]) -> String {
    let value: serde_json::Value = serde_json::from_slice(bytes).unwrap_or_default();
    let said = value.get("mediaType").and_then(|media_type| media_type.as_str());
    said.unwrap_or("application/vnd.oci.image.manifest.v1+json").to_owned()
}
