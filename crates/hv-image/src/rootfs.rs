//! A microVM's root file system from the layers of an OCI image.

use std::ffi::OsString;
use std::fs::{self, File};
use std::path::Path;
use std::process::Stdio;

use hv_driver::ImageContent;

use crate::confine::{Confined, Identity};
use crate::download::blocking;
use crate::form::Form;
use crate::job::Job;
use crate::layer::{Fault, Inspect, Layers, Sink};
use crate::manifest::Config;
use crate::progress::Phase;
use crate::reference::Digest;
use crate::unpack::Unpacker;
use crate::{ImageError, Result};

/// Memory that `mke2fs` may map.
const MEMORY_BYTES: u64 = 2 << 30;
/// What is free in a new root file system, for what its guest writes.
const SPARE_BYTES: u64 = 64 << 20;
const SPARE_INODES: u64 = 4096;
/// Bytes of an inode with what points to it, on average.
const INODE_BYTES: u64 = 512;
/// The size of a file system is a multiple of it.
const GRANULE_BYTES: u64 = 4 << 20;
const FILE: &str = "rootfs.ext4";

/// The layers of an image whose blobs are in the store: digests as fetched, and of their uncompressed form.
#[derive(Clone)]
pub(crate) struct Content {
    pub(crate) manifest: Digest,
    pub(crate) layers: Vec<Digest>,
    pub(crate) diff_ids: Vec<Digest>,
    pub(crate) compressed_bytes: u64,
}

fn read_layers(job: &Job, content: &Content, sink: &mut dyn Sink) -> Result<()> {
    let options = &job.inner.options;
    let mut layers = Layers::new(options.max_unpacked_bytes, &job.cancel, &job.progress);
    for (blob, diff_id) in content.layers.iter().zip(&content.diff_ids) {
        layers.read(&job.inner.layout.blob(blob), diff_id, sink).map_err(|fault| error(job, fault))?;
    }
    Ok(())
}

fn error(job: &Job, fault: Fault) -> ImageError {
    match fault {
        Fault::Refused(reason) => job.refused(reason),
        Fault::TooLarge(what) => job.unpacks_to_too_much(&what),
        Fault::Cancelled => job.cancelled(),
        Fault::NoSpace(free_bytes) => ImageError::NoSpace {
            image: job.image.clone(),
            free_bytes,
            min_free_bytes: job.inner.options.min_free_bytes,
        },
        Fault::Io(source) => {
            ImageError::Io { what: "unpack an image in", path: job.inner.layout.tmp(), source }
        }
    }
}

/// Reads all layers and makes nothing of them: what a runtime will unpack is sound.
pub(crate) async fn inspect(job: &Job, content: &Content) -> Result<()> {
    job.progress.begin(Phase::Verifying, content.compressed_bytes);
    let (job, content) = (job.clone(), content.clone());
    blocking(move || read_layers(&job, &content, &mut Inspect)).await
}

/// Makes the form.
pub(crate) async fn make(job: &Job, content: &Content, config: &Config) -> Result<Form> {
    let program = job.inner.options.mke2fs.clone();
    let program = program.ok_or_else(|| {
        job.unsupported("this node has no mke2fs to make a file system of it; install e2fsprogs")
    })?;
    job.progress.begin(Phase::Converting, content.compressed_bytes);
    let (unpacking, layers) = (job.clone(), content.clone());
    let (form, tree, bytes, inodes) = blocking(move || {
        let job = unpacking;
        let form = Form::begin(&job.inner.layout)?;
        let tree = job.inner.layout.scratch()?;
        let mut unpacker = Unpacker::new(tree.path(), &job.inner.layout, job.inner.options.min_free_bytes)
            .map_err(ImageError::io("open", tree.path()))?;
        read_layers(&job, &layers, &mut unpacker)?;
        let (bytes, inodes) = unpacker.finish().map_err(|fault| error(&job, fault))?;
        Ok((form, tree, bytes, inodes))
    })
    .await?;
    let inodes = inodes + SPARE_INODES;
    let size = bytes + bytes / 16 + inodes * INODE_BYTES + SPARE_BYTES;
    let size = size.next_multiple_of(GRANULE_BYTES);
    let path = form.path(FILE);
    File::create_new(&path).and_then(|file| file.set_len(size)).map_err(ImageError::io("create", &path))?;
    let confined = Confined {
        image: &job.image,
        name: "mke2fs",
        program: &program,
        args: mke2fs_args(&content.manifest, &path, tree.path(), inodes),
        stdin: Stdio::null(),
        stdout: None,
        identity: Identity::Reader,
        memory_bytes: MEMORY_BYTES,
        file_bytes: size,
        timeout: job.inner.options.convert_timeout,
    };
    let finished = confined.run((&job.inner.layout, job.inner.options.min_free_bytes), &job.cancel).await?;
    finished.check(&job.image, "mke2fs")?;
    let described = ImageContent::RootFs {
        path: FILE.into(),
        command: config.command(),
        env: config.env(),
        working_dir: config.working_dir(),
    };
    let (manifest, architecture) = (content.manifest.clone(), config.architecture.clone());
    blocking(move || {
        let mut form = form;
        fs::remove_dir_all(tree.path()).map_err(ImageError::io("remove", tree.path()))?;
        form.adopt(FILE)?;
        form.describe(manifest.as_str(), described, &architecture);
        Ok(form)
    })
    .await
}

/// An ext4 without reserved blocks, whose identifiers follow from the image.
fn mke2fs_args(manifest: &Digest, path: &Path, tree: &Path, inodes: u64) -> Vec<OsString> {
    let hex = manifest.hex();
    let uuid = format!("{}-{}-4{}-8{}-{}", &hex[..8], &hex[8..12], &hex[13..16], &hex[17..20], &hex[20..32]);
    let mut args: Vec<OsString> =
        ["-q", "-F", "-t", "ext4", "-m", "0", "-b", "4096", "-L", "rootfs", "-O", "^resize_inode"]
            .map(OsString::from)
            .to_vec();
    args.extend([
        "-U".into(),
        uuid.clone().into(),
        "-E".into(),
        format!("hash_seed={uuid},lazy_itable_init=1").into(),
    ]);
    args.extend(["-N".into(), inodes.to_string().into(), "-d".into(), tree.into(), path.into()]);
    args
}
