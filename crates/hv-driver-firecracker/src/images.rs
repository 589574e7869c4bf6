//! The image directory: what is there, and what a specification means by it.
//!
//! # Invariants
//! No name leads out of the directory, neither by its letters nor through a symbolic link.

use std::fs;
use std::io::{self, Read as _};
use std::path::{Path, PathBuf};

use hv_driver::{DiskFormat, ImageContent, InstanceConfig};
use hv_machine::image_dir::{ImageDir, info};
use hv_types::{ImageInfo, InstanceType};

use crate::FirecrackerOptions;
use crate::boot_args::{self, Process};

/// The ending of a kernel that is booted without a disk.
const KERNEL_ENDING: &str = "elf";
/// The endings of images, in the order in which they are looked for; all others are of root drives.
const ENDINGS: [&str; 4] = [KERNEL_ENDING, "ext4", "raw", "img"];
/// The first bytes of an ELF file (System V ABI, "ELF Identification").
const ELF_MAGIC: [u8; 4] = *b"\x7fELF";
/// The first bytes of a qcow2 image ("QCOW magic", docs/interop/qcow2.txt of QEMU).
const QCOW2_MAGIC: [u8; 4] = *b"QFI\xfb";

/// What an instance boots from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Boot {
    pub(crate) kernel: PathBuf,
    pub(crate) initrd: Option<PathBuf>,
    pub(crate) cmdline: String,
    /// A raw image that is copied.
    pub(crate) disk: Option<PathBuf>,
}

/// Parts of an image, before the defaults fill what is missing.
#[derive(Default)]
struct Parts {
    kernel: Option<PathBuf>,
    initrd: Option<PathBuf>,
    cmdline: String,
    disk: Option<PathBuf>,
    process: Option<Process>,
}

/// The image directory.
pub(crate) struct Images {
    dir: ImageDir,
    default_kernel: Option<PathBuf>,
    default_root_drive: Option<PathBuf>,
}

impl Images {
    pub(crate) fn new(options: &FirecrackerOptions) -> Self {
        let absolute = |path: &PathBuf| std::path::absolute(path).unwrap_or_else(|_| path.clone());
        Self {
            dir: ImageDir(absolute(&options.image_dir)),
            default_kernel: options.default_kernel.as_ref().map(absolute),
            default_root_drive: options.default_root_drive.as_ref().map(absolute),
        }
    }

    /// What can be started. A directory that is not there has nothing.
    pub(crate) fn list(&self) -> io::Result<Vec<ImageInfo>> {
        let names = self.dir.names(&ENDINGS)?;
        let infos = names.iter().filter_map(|name| {
            // What cannot be started is not offered.
            let parts = self.image(name).ok()?;
            (parts.kernel.is_some() || self.default_kernel.is_some()).then(|| described(name, &parts))
        });
        Ok(infos.collect())
    }

    /// What an instance boots from.
    ///
    /// # Errors
    /// Says which field is wrong, and what there is instead.
    pub(crate) fn resolve(&self, config: &InstanceConfig) -> Result<Boot, String> {
        let spec = &config.spec;
        let mut parts = match (&config.image, spec.image.is_empty()) {
            (Some(local), _) => content(&local.content)?,
            (None, false) => {
                let found = self.image(&spec.image);
                let there = || self.list().unwrap_or_default();
                found.map_err(|reason| self.dir.with_choice(&spec.image, &reason, &there()))?
            }
            (None, true) => Parts { disk: self.default_root_drive.clone(), ..Parts::default() },
        };
        if !spec.kernel.is_empty() {
            parts.kernel = Some(self.dir.file("spec.kernel", &spec.kernel)?);
            parts.initrd = None;
        }
        if !spec.initrd.is_empty() {
            parts.initrd = Some(self.dir.file("spec.initrd", &spec.initrd)?);
        }
        let Some(kernel) = parts.kernel.or_else(|| self.default_kernel.clone()) else {
            let reason = "spec.kernel: the image has no kernel; name one of the image directory, or set \
                          drivers.firecracker.default_kernel";
            return Err(reason.to_owned());
        };
        is_elf(&kernel)?;
        if let Some(disk) = &parts.disk {
            is_raw(disk).map_err(|reason| format!("spec.image: {reason}"))?;
        }
        let process = boot_args::process_of(spec, parts.process, parts.disk.is_some())?;
        let cmdline = boot_args::line(&parts.cmdline, &spec.kernel_args, process.as_ref())?;
        Ok(Boot { kernel, initrd: parts.initrd, cmdline, disk: parts.disk })
    }

    fn image(&self, name: &str) -> Result<Parts, String> {
        if let Some(dir) = self.dir.directory(name)? {
            return self.directory(name, &dir);
        }
        for ending in ENDINGS {
            match self.dir.with_ending(name, ending)? {
                Some(kernel) if ending == KERNEL_ENDING => {
                    return Ok(Parts { kernel: Some(kernel), ..Parts::default() });
                }
                Some(path) => {
                    is_raw(&path)?;
                    return Ok(Parts { disk: Some(path), ..Parts::default() });
                }
                None => {}
            }
        }
        Err("is not on this node".to_owned())
    }

    fn directory(&self, name: &str, dir: &Path) -> Result<Parts, String> {
        let (kernel, disk) = (self.dir.part(name, "kernel")?, self.dir.part(name, "disk.raw")?);
        if kernel.is_none() && disk.is_none() {
            return Err(format!("has neither `kernel` nor `disk.raw` in {}", dir.display()));
        }
        if let Some(kernel) = &kernel {
            is_elf(kernel)?;
        }
        let cmdline = self.dir.cmdline(name)?;
        if let Some(disk) = &disk {
            is_raw(disk)?;
        }
        Ok(Parts { kernel, initrd: self.dir.part(name, "initrd")?, cmdline, disk, process: None })
    }
}

/// What the node's image store has.
fn content(content: &ImageContent) -> Result<Parts, String> {
    match content {
        ImageContent::Kernel { path } => Ok(Parts { kernel: Some(path.clone()), ..Parts::default() }),
        ImageContent::Disk { path, format: DiskFormat::Raw } => {
            Ok(Parts { disk: Some(path.clone()), ..Parts::default() })
        }
        ImageContent::Disk { format: DiskFormat::Qcow2, .. } => {
            Err("spec.image: firecracker reads raw disks only; convert it with `qemu-img convert -O raw`"
                .into())
        }
        ImageContent::RootFs { path, command, env, working_dir } => {
            let (command, env, working_dir) = (command.clone(), env.clone(), working_dir.clone());
            let process = Some(Process { command, env, working_dir });
            Ok(Parts { disk: Some(path.clone()), process, ..Parts::default() })
        }
        ImageContent::Oci { .. } => {
            Err("spec.image: a microVM needs the image as a root file system; pull it for type microvm"
                .into())
        }
    }
}

fn described(name: &str, parts: &Parts) -> ImageInfo {
    let files = [parts.kernel.as_ref(), parts.initrd.as_ref(), parts.disk.as_ref()];
    let mut info = info(name, InstanceType::Microvm, &files);
    info.form = if parts.disk.is_some() { "disk" } else { "kernel" }.to_owned();
    info
}

fn begin(path: &Path) -> Result<[u8; 4], String> {
    let mut bytes = [0; 4];
    let unreadable = |e: io::Error| format!("{} cannot be read: {e}", path.display());
    let mut file = fs::File::open(path).map_err(unreadable)?;
    match file.read_exact(&mut bytes) {
        // Too short for either kind.
        Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => Ok([0; 4]),
        other => other.map(|()| bytes).map_err(unreadable),
    }
}

/// Firecracker boots an uncompressed kernel (`vmlinux`) on x86-64, and reads a disk as it lies there.
fn is_elf(kernel: &Path) -> Result<(), String> {
    match begin(kernel)? {
        // A kernel for arm64 is an image of its own kind.
        ELF_MAGIC => Ok(()),
        _ if cfg!(target_arch = "aarch64") => Ok(()),
        _ => Err(format!(
            "spec.kernel: {} is no ELF file; firecracker boots an uncompressed vmlinux",
            kernel.display()
        )),
    }
}

fn is_raw(disk: &Path) -> Result<(), String> {
    match begin(disk)? {
        QCOW2_MAGIC => Err("is qcow2; firecracker reads raw disks: `qemu-img convert -O raw`".to_owned()),
        _ => Ok(()),
    }
}
