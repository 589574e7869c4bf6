//! A directory of images: names in it, and that none of them leads out of it.

use std::collections::BTreeSet;
use std::fs;
use std::io::{self, Read as _};
use std::path::{Path, PathBuf};
use std::time::UNIX_EPOCH;

use hv_types::{ImageInfo, InstanceType, validate};

/// Longest command line file, in bytes.
const MAX_CMDLINE_BYTES: u64 = 4096;

/// The image directory. No name leads out of it, neither by its letters nor through a symbolic link.
#[derive(Clone, Debug)]
pub struct ImageDir(pub PathBuf);

impl ImageDir {
    /// What may be an image: directories, and files with one of these endings, by their names without it. A directory
    /// that is not there has nothing.
    ///
    /// # Errors
    /// If the directory cannot be read.
    pub fn names(&self, endings: &[&str]) -> io::Result<BTreeSet<String>> {
        let entries = match fs::read_dir(&self.0) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(BTreeSet::new()),
            other => other?,
        };
        let mut names = BTreeSet::new();
        for entry in entries {
            let path = entry?.path();
            let Some(name) = path.file_name().and_then(|name| name.to_str()) else { continue };
            match name.rsplit_once('.') {
                Some((stem, ending)) if endings.contains(&ending) => names.insert(stem.to_owned()),
                _ => path.is_dir() && names.insert(name.to_owned()),
            };
        }
        Ok(names)
    }

    /// Why an image cannot be had, with what there is instead.
    #[must_use]
    pub fn with_choice(&self, image: &str, reason: &str, there: &[ImageInfo]) -> String {
        let names: Vec<_> = there.iter().map(|image| image.name.as_str()).collect();
        let there = match names.is_empty() {
            true => format!("there are none in {}", self.0.display()),
            false => format!("there are: {}", names.join(", ")),
        };
        format!("spec.image: image {} {reason}; {there}", validate::excerpt(image))
    }

    /// The directory of an image, if it is one.
    ///
    /// # Errors
    /// If the name is no name of an image, or leads out.
    pub fn directory(&self, name: &str) -> Result<Option<PathBuf>, String> {
        validate::file_name("name", name).map_err(|_| "is not the plain name of an image".to_owned())?;
        Ok(self.inside(Path::new(name))?.filter(|path| path.is_dir()))
    }

    /// The file of an image with this ending.
    ///
    /// # Errors
    /// If it leads out.
    pub fn with_ending(&self, name: &str, ending: &str) -> Result<Option<PathBuf>, String> {
        Ok(self.inside(Path::new(&format!("{name}.{ending}")))?.filter(|path| path.is_file()))
    }

    /// A file of an image that is a directory.
    ///
    /// # Errors
    /// If it leads out.
    pub fn part(&self, name: &str, file: &str) -> Result<Option<PathBuf>, String> {
        Ok(self.inside(&Path::new(name).join(file))?.filter(|path| path.is_file()))
    }

    /// The command line that an image that is a directory brings; empty if it brings none.
    ///
    /// # Errors
    /// If it cannot be read, or is too long.
    pub fn cmdline(&self, name: &str) -> Result<String, String> {
        let Some(path) = self.part(name, "cmdline")? else { return Ok(String::new()) };
        let text = read_bounded(&path, MAX_CMDLINE_BYTES);
        text.map(|text| text.trim().to_owned()).map_err(|e| format!("has an unreadable `cmdline`: {e}"))
    }

    /// A file in it that a field of a specification names.
    ///
    /// # Errors
    /// If it is not there, or leads out; says which field.
    pub fn file(&self, field: &str, name: &str) -> Result<PathBuf, String> {
        validate::file_name(field, name).map_err(|invalid| invalid.to_string())?;
        let found = self.inside(Path::new(name)).map_err(|reason| format!("{field}: {name} {reason}"))?;
        let missing = || format!("{field}: there is no file `{name}` in {}", self.0.display());
        found.filter(|path| path.is_file()).ok_or_else(missing)
    }

    /// The real path of what lies in the directory; `None` if nothing does.
    fn inside(&self, relative: &Path) -> Result<Option<PathBuf>, String> {
        let unreadable = |e: io::Error| format!("cannot be looked up: {e}");
        let real = match self.0.join(relative).canonicalize() {
            Err(e) if matches!(e.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => {
                return Ok(None);
            }
            other => other.map_err(unreadable)?,
        };
        if !real.starts_with(self.0.canonicalize().map_err(unreadable)?) {
            return Err("leads out of the image directory through a symbolic link".to_owned());
        }
        Ok(Some(real))
    }
}

/// What is told of an image made of these files.
#[must_use]
pub fn info(name: &str, instance_type: InstanceType, files: &[Option<&PathBuf>]) -> ImageInfo {
    let found: Vec<_> = files.iter().flatten().filter_map(|path| fs::metadata(path).ok()).collect();
    let size_bytes = found.iter().map(fs::Metadata::len).sum();
    let created_at = found.iter().filter_map(|file| file.modified().ok()).max().unwrap_or(UNIX_EPOCH);
    ImageInfo::file(name, instance_type, size_bytes, created_at)
}

fn read_bounded(path: &Path, max_bytes: u64) -> io::Result<String> {
    let mut text = String::new();
    fs::File::open(path)?.take(max_bytes + 1).read_to_string(&mut text)?;
    if text.len() as u64 > max_bytes {
        return Err(io::Error::other(format!("it has more than {max_bytes} bytes")));
    }
    Ok(text)
}
