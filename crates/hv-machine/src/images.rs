//! The images that QEMU boots: what of them is there, and what a specification means by it.
//!
//! # Invariants
//! No name leads out of the directory, neither by its letters nor through a symbolic link; nor does the header of a
//! disk image, which can name a backing file anywhere.

use std::fs;
use std::io::{self, Read as _};
use std::path::{Path, PathBuf};

use hv_driver::{DiskFormat, ImageContent, LocalImage};
use hv_types::{ImageInfo, InstanceSpec, InstanceType};

use crate::image_dir::{ImageDir, info};

/// The endings of disk images, in the order in which they are looked for.
const ENDINGS: [&str; 3] = ["qcow2", "raw", "img"];
/// The first bytes of a qcow2 image ("QCOW magic", docs/interop/qcow2.txt of QEMU).
const QCOW2_MAGIC: [u8; 4] = *b"QFI\xfb";
/// How much of a disk image is its header, in bytes.
const HEADER_BYTES: u64 = 104;

/// A disk image that instances share and never write.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Base {
    /// Its file.
    pub path: PathBuf,
    /// How it is laid out.
    pub format: DiskFormat,
    /// What the guest sees, in bytes.
    pub size_bytes: u64,
}

/// What an instance boots from.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Boot {
    /// The kernel, if it is not on the disk.
    pub kernel: Option<PathBuf>,
    /// Its initial file system.
    pub initrd: Option<PathBuf>,
    /// Its command line.
    pub cmdline: String,
    /// What the boot disk is made from.
    pub disk: Option<Base>,
}

/// The image directory.
pub struct Images(ImageDir);

impl Images {
    /// That at a path.
    #[must_use]
    pub fn new(dir: &Path) -> Self {
        Self(ImageDir(dir.to_owned()))
    }

    /// What can be started.
    ///
    /// # Errors
    /// If the directory cannot be read; one that is not there has nothing.
    pub fn list(&self) -> io::Result<Vec<ImageInfo>> {
        let names = self.0.names(&ENDINGS)?;
        // What cannot be started is not offered.
        let infos = names.iter().filter_map(|name| {
            let boot = self.image(name).ok()?;
            let disk = boot.disk.as_ref().map(|disk| &disk.path);
            Some(info(name, InstanceType::Vm, &[boot.kernel.as_ref(), boot.initrd.as_ref(), disk]))
        });
        Ok(infos.collect())
    }

    /// What `spec` boots from. `image`: the one that it names, if the node's store has it.
    ///
    /// # Errors
    /// Says which field is wrong, and what there is instead.
    pub fn resolve(&self, spec: &InstanceSpec, image: Option<&LocalImage>) -> Result<Boot, String> {
        let mut boot = match image {
            Some(image) => local(image)?,
            None if spec.image.is_empty() => Boot::default(),
            None => self.image(&spec.image).map_err(|reason| {
                self.0.with_choice(&spec.image, &reason, &self.list().unwrap_or_default())
            })?,
        };
        if !spec.kernel.is_empty() {
            boot.kernel = Some(self.0.file("spec.kernel", &spec.kernel)?);
            boot.initrd = None;
        }
        if !spec.initrd.is_empty() {
            boot.initrd = Some(self.0.file("spec.initrd", &spec.initrd)?);
        }
        if boot.kernel.is_none() && boot.disk.is_none() {
            return Err("spec.image: there is nothing to boot; name an image or a kernel".to_owned());
        }
        if boot.kernel.is_none() && (boot.initrd.is_some() || !spec.kernel_args.is_empty()) {
            let reason = "spec.kernel_args and spec.initrd need a kernel; name one in spec.kernel, or use an image that \
                          is a directory with a kernel";
            return Err(reason.to_owned());
        }
        boot.cmdline = format!("{} {}", boot.cmdline, spec.kernel_args).trim().to_owned();
        if boot.cmdline.len() > hv_types::instance::spec::MAX_KERNEL_ARGS_BYTES {
            return Err("spec.kernel_args: too long together with the image's own command line".to_owned());
        }
        Ok(boot)
    }

    fn image(&self, name: &str) -> Result<Boot, String> {
        if let Some(dir) = self.0.directory(name)? {
            return self.directory(name, &dir);
        }
        for ending in ENDINGS {
            if let Some(path) = self.0.with_ending(name, ending)? {
                return Ok(Boot { disk: Some(base(&path)?), ..Boot::default() });
            }
        }
        Err("is not on this node".to_owned())
    }

    fn directory(&self, name: &str, dir: &Path) -> Result<Boot, String> {
        let (kernel, disk) = (self.0.part(name, "kernel")?, self.0.part(name, "disk.qcow2")?);
        if kernel.is_none() && disk.is_none() {
            return Err(format!("has neither `kernel` nor `disk.qcow2` in {}", dir.display()));
        }
        let cmdline = self.0.cmdline(name)?;
        let disk = disk.as_deref().map(base).transpose()?;
        Ok(Boot { kernel, initrd: self.0.part(name, "initrd")?, cmdline, disk })
    }
}

/// What an image of the node's store boots. Its format is what the store says, whatever the file looks like.
fn local(image: &LocalImage) -> Result<Boot, String> {
    let refused = |form: &str, remedy: &str| Err(format!("spec.image: it is {form}; {remedy}"));
    match &image.content {
        ImageContent::Disk { path, format } => {
            let disk = base_of(path, *format)
                .map_err(|reason| format!("spec.image: image {} {reason}", image.digest))?;
            Ok(Boot { disk: Some(disk), ..Boot::default() })
        }
        ImageContent::Kernel { path } if path.is_file() => {
            Ok(Boot { kernel: Some(path.clone()), ..Boot::default() })
        }
        ImageContent::Kernel { path } => refused("a kernel", &format!("but there is no {}", path.display())),
        ImageContent::Oci { .. } => {
            refused("a container image", "use an instance of type container, or a disk image")
        }
        ImageContent::RootFs { .. } => {
            refused("a root file system", "name a disk image, or one with a kernel")
        }
    }
}

/// Reads a disk image's header. Only a `.raw` file is taken as raw whatever it contains.
fn base(path: &Path) -> Result<Base, String> {
    let ending = path.extension().and_then(|ending| ending.to_str()).unwrap_or_default();
    let is_raw = ending == "raw" || (ending == "img" && !header(path)?.0.starts_with(&QCOW2_MAGIC));
    base_of(path, if is_raw { DiskFormat::Raw } else { DiskFormat::Qcow2 })
}

/// The first bytes of a file, and its length.
fn header(path: &Path) -> Result<(Vec<u8>, u64), String> {
    let unreadable = |e: io::Error| format!("cannot be read: {e}");
    let mut header = Vec::new();
    let file = fs::File::open(path).map_err(unreadable)?;
    let length = file.metadata().map_err(unreadable)?.len();
    file.take(HEADER_BYTES).read_to_end(&mut header).map_err(unreadable)?;
    Ok((header, length))
}

/// A disk image of a known format.
fn base_of(path: &Path, format: DiskFormat) -> Result<Base, String> {
    let (header, length) = header(path)?;
    if format == DiskFormat::Raw {
        return Ok(Base { path: path.to_owned(), format, size_bytes: length.next_multiple_of(512) });
    }
    if !header.starts_with(&QCOW2_MAGIC) || header.len() as u64 != HEADER_BYTES {
        return Err("is no qcow2 image; check the file".to_owned());
    }
    // Offsets as in docs/interop/qcow2.txt: version 4, backing file 8, virtual size 24, incompatible features 72.
    let word = |at: usize| u64::from_be_bytes(std::array::from_fn(|i| header[at + i]));
    let version = u32::from_be_bytes(std::array::from_fn(|i| header[4 + i]));
    let has_data_file = version >= 3 && word(72) & 0b100 != 0;
    if word(8) != 0 || has_data_file {
        return Err("depends on another file; flatten it with `qemu-img convert -O qcow2`".to_owned());
    }
    Ok(Base { path: path.to_owned(), format: DiskFormat::Qcow2, size_bytes: word(24) })
}

#[cfg(test)]
mod tests;
