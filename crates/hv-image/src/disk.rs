//! Forms of single files: disks and kernels.

use std::fs::File;

use hv_driver::{DiskFormat, ImageContent};
use hv_types::InstanceType;

use crate::convert::QemuImg;
use crate::download::blocking;
use crate::form::Form;
use crate::header::{self, Format, Header};
use crate::job::Job;
use crate::progress::Phase;
use crate::reference::Digest;
use crate::{ImageError, Result};

/// What a file is.
pub(crate) async fn inspect(job: &Job, blob: &Digest) -> Result<Header> {
    let path = job.inner.layout.blob(blob);
    let inspected = blocking(move || {
        let file = File::open(&path).map_err(ImageError::io("open", &path))?;
        header::inspect(&file).map_err(ImageError::io("read", &path))
    });
    inspected.await?.map_err(|reason| job.refused(reason))
}

/// Makes the form of a blob that is one file, and takes it into the store.
pub(crate) async fn make(job: &Job, blob: &Digest, header: Header, key: &str) -> Result<()> {
    job.progress.begin(Phase::Verifying, 0);
    let form = match (job.instance_type, header.format) {
        (InstanceType::Container, _) => {
            return Err(job.unsupported("containers start from OCI images; this is a single file"));
        }
        (_, Format::Tar) => {
            return Err(job.unsupported(
                "it is a tar file, but not of an OCI image layout; containers and microVMs take those",
            ));
        }
        (InstanceType::Vm, Format::Elf) => {
            return Err(job.unsupported("it is a kernel; name it in `spec.kernel`, or pull it for microVMs"));
        }
        (InstanceType::Microvm, Format::Elf) => {
            link(job, blob, "kernel", |path| ImageContent::Kernel { path })?
        }
        (_, Format::Raw) => {
            bound(job, header.virtual_bytes.unwrap_or(0))?;
            link(job, blob, "disk.raw", |path| ImageContent::Disk { path, format: DiskFormat::Raw })?
        }
        (InstanceType::Vm, Format::Qcow2) => {
            check(job, blob, header).await?;
            link(job, blob, "disk.qcow2", |path| ImageContent::Disk { path, format: DiskFormat::Qcow2 })?
        }
        (InstanceType::Vm, Format::Vmdk | Format::Vhd | Format::Vhdx) => {
            convert(job, blob, header, DiskFormat::Qcow2).await?
        }
        (InstanceType::Microvm, Format::Qcow2 | Format::Vmdk | Format::Vhd | Format::Vhdx) => {
            convert(job, blob, header, DiskFormat::Raw).await?
        }
    };
    let (job, key) = (job.clone(), key.to_owned());
    blocking(move || job.keep_form(&key, form)).await
}

fn link(
    job: &Job,
    blob: &Digest,
    name: &str,
    content: impl FnOnce(std::path::PathBuf) -> ImageContent,
) -> Result<Form> {
    let mut form = Form::begin(&job.inner.layout)?;
    form.link(&job.inner.layout, blob, name)?;
    form.describe(blob.as_str(), content(name.into()), "");
    Ok(form)
}

fn qemu_img(job: &Job) -> QemuImg<'_> {
    QemuImg { image: &job.image, options: &job.inner.options, layout: &job.inner.layout, cancel: &job.cancel }
}

fn bound(job: &Job, virtual_bytes: u64) -> Result<()> {
    match virtual_bytes > job.inner.options.max_unpacked_bytes {
        true => Err(job.unpacks_to_too_much("the size of its disk")),
        false => Ok(()),
    }
}

/// Holds a disk against the bounds, first by what its header says, then by what QEMU makes of it.
async fn check(job: &Job, blob: &Digest, header: Header) -> Result<u64> {
    bound(job, header.virtual_bytes.unwrap_or(0))?;
    if job.inner.options.qemu_img.is_none()
        && let (Format::Qcow2, Some(virtual_bytes)) = (header.format, header.virtual_bytes)
    {
        return Ok(virtual_bytes);
    }
    let path = job.inner.layout.blob(blob);
    let virtual_bytes = qemu_img(job).virtual_bytes(&path, header.format).await?;
    bound(job, virtual_bytes)?;
    if header.format == Format::Qcow2 {
        qemu_img(job).check_qcow2(&path).await?;
    }
    Ok(virtual_bytes)
}

async fn convert(job: &Job, blob: &Digest, header: Header, to: DiskFormat) -> Result<Form> {
    let virtual_bytes = check(job, blob, header).await?;
    job.progress.begin(Phase::Converting, virtual_bytes);
    let (name, format) = match to {
        DiskFormat::Qcow2 => ("disk.qcow2", Format::Qcow2),
        DiskFormat::Raw => ("disk.raw", Format::Raw),
    };
    let mut form = Form::begin(&job.inner.layout)?;
    let (input, output) = (job.inner.layout.blob(blob), form.path(name));
    qemu_img(job).convert((&input, header.format), (&output, format), virtual_bytes).await?;
    let digest = blob.clone();
    blocking(move || {
        form.adopt(name)?;
        form.describe(digest.as_str(), ImageContent::Disk { path: name.into(), format: to }, "");
        Ok(form)
    })
    .await
}
