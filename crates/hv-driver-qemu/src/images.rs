//! The image directory: what is there, and what a specification means by it.
//!
//! # Invariants
//! No name leads out of the directory, neither by its letters nor through a symbolic link; nor does the header of a
//! disk image, which can name a backing file anywhere.

use std::fs;
use std::io::{self, Read as _};
use std::path::{Path, PathBuf};
use std::time::UNIX_EPOCH;

use hv_driver::{DiskFormat, ImageContent, InstanceConfig, LocalImage};
use hv_types::{ImageInfo, InstanceType, validate};
use serde::{Deserialize, Serialize};

/// The endings of disk images, in the order in which they are looked for.
const ENDINGS: [&str; 3] = ["qcow2", "raw", "img"];
/// The first bytes of a qcow2 image ("QCOW magic", docs/interop/qcow2.txt of QEMU).
const QCOW2_MAGIC: [u8; 4] = *b"QFI\xfb";
/// How much of a disk image is its header, in bytes.
const HEADER_BYTES: u64 = 104;
/// Longest command line file, in bytes.
const MAX_CMDLINE_BYTES: u64 = 4096;

/// The format of a disk image.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Format {
    Qcow2,
    Raw,
}

impl Format {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Qcow2 => "qcow2",
            Self::Raw => "raw",
        }
    }
}

/// A disk image that instances share and never write.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Base {
    pub(crate) path: PathBuf,
    pub(crate) format: Format,
    /// What the guest sees, in bytes.
    pub(crate) size_bytes: u64,
}

/// What an instance boots from.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Boot {
    pub(crate) kernel: Option<PathBuf>,
    pub(crate) initrd: Option<PathBuf>,
    pub(crate) cmdline: String,
    pub(crate) disk: Option<Base>,
}

/// The image directory.
pub(crate) struct Images {
    dir: PathBuf,
}

impl Images {
    pub(crate) fn new(dir: &Path) -> Self {
        Self { dir: dir.to_owned() }
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
                Some((stem, ending)) if ENDINGS.contains(&ending) => stem,
                _ if path.is_dir() => name,
                _ => continue,
            };
            // What cannot be started is not offered.
            let Ok(boot) = self.image(name) else { continue };
            images.entry(name.to_owned()).or_insert_with(|| info(name, &boot));
        }
        Ok(images.into_values().collect())
    }

    /// What `spec` boots from.
    ///
    /// # Errors
    /// Says which field is wrong, and what there is instead.
    pub(crate) fn resolve(&self, config: &InstanceConfig) -> Result<Boot, String> {
        let spec = &config.spec;
        let mut boot = match &config.image {
            Some(image) => local(image)?,
            None if spec.image.is_empty() => Boot::default(),
            None => self.image(&spec.image).map_err(|reason| self.with_choice(&spec.image, &reason))?,
        };
        if !spec.kernel.is_empty() {
            boot.kernel = Some(self.file("spec.kernel", &spec.kernel)?);
            boot.initrd = None;
        }
        if !spec.initrd.is_empty() {
            boot.initrd = Some(self.file("spec.initrd", &spec.initrd)?);
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

    fn with_choice(&self, image: &str, reason: &str) -> String {
        let names: Vec<_> = self.list().unwrap_or_default().into_iter().map(|image| image.name).collect();
        let there = match names.is_empty() {
            true => format!("there are none in {}", self.dir.display()),
            false => format!("there are: {}", names.join(", ")),
        };
        format!("spec.image: image {} {reason}; {there}", validate::excerpt(image))
    }

    fn image(&self, name: &str) -> Result<Boot, String> {
        validate::file_name("name", name).map_err(|_| "is not the plain name of an image".to_owned())?;
        if let Some(dir) = self.inside(Path::new(name))?.filter(|path| path.is_dir()) {
            return self.directory(name, &dir);
        }
        for ending in ENDINGS {
            if let Some(path) =
                self.inside(Path::new(&format!("{name}.{ending}")))?.filter(|path| path.is_file())
            {
                return Ok(Boot { disk: Some(base(&path)?), ..Boot::default() });
            }
        }
        Err("is not on this node".to_owned())
    }

    fn directory(&self, name: &str, dir: &Path) -> Result<Boot, String> {
        let part = |file: &str| -> Result<Option<PathBuf>, String> {
            Ok(self.inside(&Path::new(name).join(file))?.filter(|path| path.is_file()))
        };
        let kernel = part("kernel")?;
        let disk = part("disk.qcow2")?;
        if kernel.is_none() && disk.is_none() {
            return Err(format!("has neither `kernel` nor `disk.qcow2` in {}", dir.display()));
        }
        let cmdline = match part("cmdline")? {
            None => String::new(),
            Some(path) => read_bounded(&path, MAX_CMDLINE_BYTES)
                .map_err(|e| format!("has an unreadable `cmdline`: {e}"))?,
        };
        let disk = disk.as_deref().map(base).transpose()?;
        Ok(Boot { kernel, initrd: part("initrd")?, cmdline: cmdline.trim().to_owned(), disk })
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

/// What an image of the node's store boots. Its format is what the store says, whatever the file looks like.
fn local(image: &LocalImage) -> Result<Boot, String> {
    let refused = |form: &str, remedy: &str| Err(format!("spec.image: it is {form}; {remedy}"));
    match &image.content {
        ImageContent::Disk { path, format } => {
            let format = match format {
                DiskFormat::Qcow2 => Format::Qcow2,
                DiskFormat::Raw => Format::Raw,
            };
            let disk = base_of(path, format)
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

fn info(name: &str, boot: &Boot) -> ImageInfo {
    let files = [boot.kernel.as_ref(), boot.initrd.as_ref(), boot.disk.as_ref().map(|disk| &disk.path)];
    let found: Vec<_> = files.into_iter().flatten().filter_map(|path| fs::metadata(path).ok()).collect();
    let size_bytes = found.iter().map(fs::Metadata::len).sum();
    let created_at = found.iter().filter_map(|file| file.modified().ok()).max().unwrap_or(UNIX_EPOCH);
    ImageInfo::file(name, InstanceType::Vm, size_bytes, created_at)
}

fn read_bounded(path: &Path, max_bytes: u64) -> io::Result<String> {
    let mut text = String::new();
    fs::File::open(path)?.take(max_bytes + 1).read_to_string(&mut text)?;
    if text.len() as u64 > max_bytes {
        return Err(io::Error::other(format!("it has more than {max_bytes} bytes")));
    }
    Ok(text)
}

/// Reads a disk image's header. Only a `.raw` file is taken as raw whatever it contains.
fn base(path: &Path) -> Result<Base, String> {
    let ending = path.extension().and_then(|ending| ending.to_str()).unwrap_or_default();
    let is_raw = ending == "raw" || (ending == "img" && !header(path)?.0.starts_with(&QCOW2_MAGIC));
    base_of(path, if is_raw { Format::Raw } else { Format::Qcow2 })
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
fn base_of(path: &Path, format: Format) -> Result<Base, String> {
    let (header, length) = header(path)?;
    if format == Format::Raw {
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
    Ok(Base { path: path.to_owned(), format: Format::Qcow2, size_bytes: word(24) })
}

#[cfg(test)]
mod tests;
