//! Uploads: what is not fetched but brought.

use std::fs::File;
use std::io::Read as _;
use std::path::Path;

use bytes::Bytes;
use futures::{Stream, StreamExt as _};
use tokio::sync::mpsc;

use crate::download::blocking;
use crate::incoming::Incoming;
use crate::job::{Job, Pin};
use crate::layer::{Fault, clean};
use crate::manifest::MAX_INDEX_DEPTH;
use crate::oci::Source;
use crate::progress::Phase;
use crate::pull;
use crate::reference::Digest;
use crate::registry::MAX_MANIFEST_BYTES;
use crate::store::StoredImage;
use crate::tar::{Kind, Tar};
use crate::{ImageError, Result};

/// Chunks between the caller and the disk.
const QUEUE_CHUNKS: usize = 16;
/// How much is copied at a time, in bytes.
const CHUNK_BYTES: usize = 256 << 10;
/// Most blobs of an image layout that is brought.
const MAX_LAYOUT_BLOBS: usize = 1024;

/// See [`Store::import`](crate::Store::import).
pub(crate) async fn import<S>(
    job: &Job,
    mut data: S,
    size_bytes: u64,
    digest: Option<Digest>,
) -> Result<StoredImage>
where
    S: Stream<Item = std::io::Result<Bytes>> + Send + Unpin,
{
    job.progress.begin(Phase::Downloading, size_bytes);
    let mut incoming = Incoming::fresh(&job.image, &job.inner.layout, job.inner.options.min_free_bytes)?;
    let (sender, mut receiver) = mpsc::channel::<Bytes>(QUEUE_CHUNKS);
    let writing = job.clone();
    let writer = tokio::task::spawn_blocking(move || {
        while let Some(chunk) = receiver.blocking_recv() {
            append(&writing, &mut incoming, &chunk)?;
        }
        Ok::<_, ImageError>(incoming)
    });
    let broken = loop {
        let chunk = tokio::select! {
            chunk = data.next() => chunk,
            () = job.cancel.cancelled() => break Err(job.cancelled()),
        };
        match chunk {
            None => break Ok(()),
            Some(Err(e)) => break Err(ImageError::io("receive", &job.name)(e)),
            // The writer hangs up only when it failed, which its result tells.
            Some(Ok(chunk)) => {
                if sender.send(chunk).await.is_err() {
                    break Ok(());
                }
            }
        }
    };
    drop(sender);
    let incoming = writer.await.expect("the writer does not panic")?;
    broken?;
    if size_bytes != 0 && incoming.length() != size_bytes {
        let reason = format!("{} bytes came instead of {size_bytes}; bring it again", incoming.length());
        return Err(job.refused(reason));
    }
    let completing = job.clone();
    let blob = blocking(move || complete(&completing, incoming, digest.as_ref())).await?;
    pull::finish_file(job, blob, String::new(), String::new()).await
}

/// Writes what came, within the bound of an image.
pub(crate) fn append(job: &Job, incoming: &mut Incoming, bytes: &[u8]) -> Result<()> {
    let max = job.inner.options.max_image_bytes;
    if incoming.length().saturating_add(bytes.len() as u64) > max {
        return Err(ImageError::TooLarge {
            image: job.image.clone(),
            what: "its size".to_owned(),
            limit: format!("{max} bytes"),
            option: "max_image_bytes",
        });
    }
    incoming.write(bytes)?;
    job.progress.add(bytes.len() as u64);
    Ok(())
}

/// Makes a blob of what came, if it is what it should be.
pub(crate) fn complete(job: &Job, incoming: Incoming, digest: Option<&Digest>) -> Result<Digest> {
    let actual = incoming.digest();
    match digest.filter(|expected| **expected != actual) {
        None => incoming.finish(),
        Some(expected) => Err(ImageError::DigestMismatch {
            image: job.image.clone(),
            what: "the file".to_owned(),
            expected: expected.to_string(),
            actual: actual.to_string(),
        }),
    }
}

/// An OCI image layout that was brought as a tar file: its blobs become the store's, then it is as if a
/// registry had them.
pub(crate) async fn image_layout(job: &Job, archive: &Digest, source: String) -> Result<StoredImage> {
    let (reading, path) = (job.clone(), job.inner.layout.blob(archive));
    let (index, blobs) = blocking(move || {
        let mut blobs = Vec::new();
        let index = extract(&reading, &path, &mut blobs);
        // What was taken out before the fault goes as well.
        let index = index.inspect_err(|_| sweep(&reading, std::mem::take(&mut blobs)));
        Ok((index?, blobs))
    })
    .await?;
    // The index of the layout is one more index around the image's own.
    let result = pull::finish(job, &Source::Blobs, index.as_str(), source).await;
    sweep(job, blobs);
    result
}

/// Removes the blobs that no form took.
fn sweep(job: &Job, blobs: Vec<(Digest, Pin)>) {
    for (digest, pin) in blobs {
        drop(pin);
        if let Err(error) = job.inner.state.lock().remove_blob(&digest) {
            tracing::warn!(error = %error, "a blob that nobody needs could not be removed");
        }
    }
}

/// Takes the blobs out of an archive, each verified against its name. Answers with the index, which is one
/// of them.
fn extract(job: &Job, archive: &Path, blobs: &mut Vec<(Digest, Pin)>) -> Result<Digest> {
    let file = File::open(archive).map_err(ImageError::io("open", archive))?;
    let mut tar = Tar::new(std::io::BufReader::with_capacity(CHUNK_BYTES, file));
    let unreadable = |e: std::io::Error| job.refused(format!("its tar file cannot be read: {e}"));
    let mut index = None;
    while let Some(entry) = tar.next().map_err(unreadable)? {
        let path = clean(&entry.path).map_err(|fault| match fault {
            Fault::Refused(reason) => job.refused(reason),
            _ => job.refused("one of its paths cannot be used"),
        })?;
        let expected: Option<Digest> = match path[..] {
            _ if entry.kind != Kind::File => continue,
            [b"blobs", b"sha256", hex] => Some(
                format!("sha256:{}", String::from_utf8_lossy(hex))
                    .parse()
                    .map_err(|e: hv_types::Invalid| job.refused(format!("one of its blobs: {e}")))?,
            ),
            [b"index.json"] if entry.size <= MAX_MANIFEST_BYTES => None,
            _ => continue,
        };
        if blobs.len() >= MAX_LAYOUT_BLOBS {
            return Err(job.refused(format!("it has more than {MAX_LAYOUT_BLOBS} blobs")));
        }
        let mut incoming = Incoming::fresh(&job.image, &job.inner.layout, job.inner.options.min_free_bytes)?;
        let mut buffer = vec![0; CHUNK_BYTES];
        loop {
            let count = tar.read(&mut buffer).map_err(unreadable)?;
            if count == 0 {
                break;
            }
            append(job, &mut incoming, &buffer[..count])?;
        }
        let pin = job.pin(incoming.digest());
        let digest = complete(job, incoming, expected.as_ref())?;
        if expected.is_none() {
            index = Some(digest.clone());
        }
        blobs.push((digest, pin));
    }
    index.ok_or_else(|| {
        job.refused(format!(
            "it has no index.json of an OCI image layout (at most {MAX_INDEX_DEPTH} indexes deep); save it as an OCI archive"
        ))
    })
}
