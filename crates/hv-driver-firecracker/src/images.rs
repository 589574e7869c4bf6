//! The image directory: what is there, and what a specification means by it.
//!
//! # Invariants
//! No name leads out of the directory, neither by its letters nor through a symbolic link.

use std::fs;
use std::io::{self, Read as _};
use std::path::{Path, PathBuf};
use std::time::UNIX_EPOCH;

use hv_driver::{DiskFormat, ImageContent, InstanceConfig};
use hv_types::{ImageInfo, InstanceType, validate};

use crate::FirecrackerOptions;
use crate::boot_args::{self, Process};

/// The ending of a kernel that is booted without a disk.
const KERNEL_ENDING: &str = "elf";
/// The endings of root drives, in the order in which they are looked for.
const DISK_ENDINGS: [&str; 3] = ["ext4", "raw", "img"];
/// The first bytes of an ELF file (System V ABI, "ELF Identification").
const ELF_MAGIC: [u8; 4] = *b"\x7fELF";
/// The first bytes of a qcow2 image ("QCOW magic", docs/interop/qcow2.txt of QEMU).
const QCOW2_MAGIC: [u8; 4] = *b"QFI\xfb";
/// Longest command line file, in bytes.
const MAX_CMDLINE_BYTES: u64 = 4096;

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
    dir: PathBuf,
    default_kernel: Option<PathBuf>,
    default_root_drive: Option<PathBuf>,
}

impl Images {
    pub(crate) fn new(options: &FirecrackerOptions) -> Self {
        let absolute = |path: &PathBuf| std::path::absolute(path).unwrap_or_else(|_| path.clone());
        Self {
            dir: absolute(&options.image_dir),
            default_kernel: options.default_kernel.as_ref().map(absolute),
            default_root_drive: options.default_root_drive.as_ref().map(absolute),
        }
    }

    /// What can be started. A directory that is not there has nothing.
    pub(crate) fn list(&self) -> io::Result<Vec<ImageInfo>> {
        let entries = match fs::read_dir(&self.dir) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            other => other?,
        };
        let mut images = std::collections::BTreeMap::new();
        for entry in entries {
            let path = entry?.path();
            let Some(name) = path.file_name().and_then(|name| name.to_str()) else { continue };
            let name = match name.rsplit_once('.') {
                Some((stem, ending)) if ending == KERNEL_ENDING || DISK_ENDINGS.contains(&ending) => stem,
                _ if path.is_dir() => name,
                _ => continue,
            };
            // What cannot be started is not offered.
            let Ok(parts) = self.image(name) else { continue };
            if parts.kernel.is_some() || self.default_kernel.is_some() {
                images.entry(name.to_owned()).or_insert_with(|| info(name, &parts));
            }
        }
        Ok(images.into_values().collect())
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
                self.image(&spec.image).map_err(|reason| self.with_choice(&spec.image, &reason))?
            }
            (None, true) => Parts { disk: self.default_root_drive.clone(), ..Parts::default() },
        };
        if !spec.kernel.is_empty() {
            parts.kernel = Some(self.file("spec.kernel", &spec.kernel)?);
            parts.initrd = None;
        }
        if !spec.initrd.is_empty() {
            parts.initrd = Some(self.file("spec.initrd", &spec.initrd)?);
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

    fn with_choice(&self, image: &str, reason: &str) -> String {
        let names: Vec<_> = self.list().unwrap_or_default().into_iter().map(|image| image.name).collect();
        let there = match names.is_empty() {
            true => format!("there are none in {}", self.dir.display()),
            false => format!("there are: {}", names.join(", ")),
        };
        format!("spec.image: image {} {reason}; {there}", validate::excerpt(image))
    }

    fn image(&self, name: &str) -> Result<Parts, String> {
        validate::file_name("name", name).map_err(|_| "is not the plain name of an image".to_owned())?;
        if let Some(dir) = self.inside(Path::new(name))?.filter(|path| path.is_dir()) {
            return self.directory(name, &dir);
        }
        let with = |ending: &str| -> Result<Option<PathBuf>, String> {
            Ok(self.inside(Path::new(&format!("{name}.{ending}")))?.filter(|path| path.is_file()))
        };
        if let Some(kernel) = with(KERNEL_ENDING)? {
            return Ok(Parts { kernel: Some(kernel), ..Parts::default() });
        }
        for ending in DISK_ENDINGS {
            if let Some(path) = with(ending)? {
                is_raw(&path)?;
                return Ok(Parts { disk: Some(path), ..Parts::default() });
            }
        }
        Err("is not on this node".to_owned())
    }

    fn directory(&self, name: &str, dir: &Path) -> Result<Parts, String> {
        let part = |file: &str| -> Result<Option<PathBuf>, String> {
            Ok(self.inside(&Path::new(name).join(file))?.filter(|path| path.is_file()))
        };
        let (kernel, disk) = (part("kernel")?, part("disk.raw")?);
        if kernel.is_none() && disk.is_none() {
            return Err(format!("has neither `kernel` nor `disk.raw` in {}", dir.display()));
        }
        if let Some(kernel) = &kernel {
            is_elf(kernel)?;
        }
        let cmdline = match part("cmdline")? {
            None => String::new(),
            Some(path) => read_bounded(&path, MAX_CMDLINE_BYTES)
                .map_err(|e| format!("has an unreadable `cmdline`: {e}"))?,
        };
        if let Some(disk) = &disk {
            is_raw(disk)?;
        }
        let cmdline = cmdline.trim().to_owned();
        Ok(Parts { kernel, initrd: part("initrd")?, cmdline, disk, process: None })
    }

    fn file(&self, field: &str, name: &str) -> Result<PathBuf, String> {
        validate::file_name(field, name).map_err(|invalid| invalid.to_string())?;
        let found = self.inside(Path::new(name)).map_err(|reason| format!("{field}: {name} {reason}"))?;
        let missing = || format!("{field}: there is no file `{name}` in {}", self.dir.display());
        found.filter(|path| path.is_file()).ok_or_else(missing)
    }

    /// The real path of what lies in the directory; `None` if nothing does.
    fn inside(&self, relative: &Path) -> Result<Option<PathBuf>, String> {
        let unreadable = |e: io::Error| format!("cannot be looked up: {e}");
        let real = match self.dir.join(relative).canonicalize() {
            Err(e) if matches!(e.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => {
                return Ok(None);
            }
            other => other.map_err(unreadable)?,
        };
        if !real.starts_with(self.dir.canonicalize().map_err(unreadable)?) {
            return Err("leads out of the image directory through a symbolic link".to_owned());
        }
        Ok(Some(real))
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

fn info(name: &str, parts: &Parts) -> ImageInfo {
    let files = [&parts.kernel, &parts.initrd, &parts.disk];
    let found: Vec<_> = files.into_iter().flatten().filter_map(|path| fs::metadata(path).ok()).collect();
    let size_bytes = found.iter().map(fs::Metadata::len).sum();
    let created_at = found.iter().filter_map(|file| file.modified().ok()).max().unwrap_or(UNIX_EPOCH);
    let mut info = ImageInfo::file(name, InstanceType::Microvm, size_bytes, created_at);
    info.form = if parts.disk.is_some() { "disk" } else { "kernel" }.to_owned();
    info
}

fn read_bounded(path: &Path, max_bytes: u64) -> io::Result<String> {
    let mut text = String::new();
    fs::File::open(path)?.take(max_bytes + 1).read_to_string(&mut text)?;
    if text.len() as u64 > max_bytes {
        return Err(io::Error::other(format!("it has more than {max_bytes} bytes")));
    }
    Ok(text)
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
