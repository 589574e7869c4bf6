//! A form while it is made: a directory that becomes `forms/<key>` when everything in it is synced and
//! recorded.

use std::collections::BTreeMap;
use std::fs::{self, File, Permissions};
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

use hv_driver::ImageContent;

use crate::layout::{self, Layout, Scratch, VERSION};
use crate::record::FormRecord;
use crate::reference::Digest;
use crate::{ImageError, Result};

/// See the module.
pub(crate) struct Form {
    scratch: Scratch,
    files: BTreeMap<PathBuf, Digest>,
    described: Option<FormRecord>,
}

impl Form {
    pub(crate) fn begin(layout: &Layout) -> Result<Self> {
        Ok(Self { scratch: layout.scratch()?, files: BTreeMap::new(), described: None })
    }

    /// Where a file of it is written to.
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.scratch.path().join(name)
    }

    pub(crate) fn directory(&self, name: &str) -> Result<()> {
        let path = self.path(name);
        fs::create_dir_all(&path).map_err(ImageError::io("create", &path))
    }

    /// Adds a blob of the store as a hard link.
    pub(crate) fn link(&mut self, layout: &Layout, blob: &Digest, name: &str) -> Result<()> {
        let path = self.path(name);
        fs::hard_link(layout.blob(blob), &path).map_err(ImageError::io("link", &path))?;
        self.files.insert(name.into(), blob.clone());
        Ok(())
    }

    /// Adds a small file.
    pub(crate) fn write(&mut self, name: &str, bytes: &[u8]) -> Result<()> {
        layout::write_new(&self.path(name), bytes, 0o444)?;
        self.files.insert(name.into(), Digest::of(bytes));
        Ok(())
    }

    /// Adds a file that a program wrote to [`Self::path`].
    pub(crate) fn adopt(&mut self, name: &str) -> Result<()> {
        let path = self.path(name);
        let seal = || {
            let file = File::open(&path)?;
            file.set_permissions(Permissions::from_mode(0o444))?;
            file.sync_all()?;
            layout::hash_file(&path)
        };
        let (digest, _) = seal().map_err(ImageError::io("seal", &path))?;
        self.files.insert(name.into(), digest);
        Ok(())
    }

    /// Says what it is: the digest of what it was made of, and how drivers see it, with paths relative to it.
    pub(crate) fn describe(&mut self, digest: &str, content: ImageContent, architecture: &str) {
        self.described = Some(FormRecord {
            version: VERSION,
            digest: digest.to_owned(),
            content,
            architecture: architecture.to_owned(),
            files: BTreeMap::new(),
            size_bytes: 0,
        });
    }

    /// Writes the record and syncs everything.
    pub(crate) fn seal(mut self) -> Result<(FormRecord, Scratch)> {
        let mut record = self.described.take().ok_or_else(|| {
            ImageError::io("describe", self.scratch.path())(std::io::Error::other("nothing was made in it"))
        })?;
        record.files = self.files.iter().map(|(path, digest)| (path.clone(), digest.to_string())).collect();
        record.size_bytes =
            self.files.keys().map(|name| layout::allocated_bytes(&self.scratch.path().join(name))).sum();
        let bytes = serde_json::to_vec_pretty(&record)
            .map_err(|e| ImageError::io("encode", self.scratch.path())(e.into()))?;
        layout::write_new(&self.path(FormRecord::FILE), &bytes, 0o444)?;
        open_and_sync(self.scratch.path())?;
        Ok((record, self.scratch))
    }
}

/// Lets everybody enter a directory and those in it, and syncs them.
fn open_and_sync(dir: &Path) -> Result<()> {
    for path in layout::entries(dir)? {
        if fs::symlink_metadata(&path).is_ok_and(|metadata| metadata.is_dir()) {
            open_and_sync(&path)?;
        }
    }
    fs::set_permissions(dir, Permissions::from_mode(0o755))
        .map_err(ImageError::io("set the mode of", dir))?;
    layout::sync_dir(dir)
}

/// Reads every file of a form again. The error names the file and says what is wrong.
pub(crate) fn verify(image: &str, record: &FormRecord, dir: &Path) -> Result<()> {
    for (name, expected) in &record.files {
        let path = dir.join(name);
        let damaged =
            |reason: String| ImageError::Damaged { image: image.to_owned(), path: path.clone(), reason };
        let metadata = fs::symlink_metadata(&path).map_err(|e| damaged(format!("cannot be read: {e}")))?;
        if !metadata.is_file() || metadata.mode() & 0o222 != 0 {
            return Err(damaged("is not a read-only file any more".to_owned()));
        }
        let (actual, _) = layout::hash_file(&path).map_err(|e| damaged(format!("cannot be read: {e}")))?;
        if actual.as_str() != expected {
            return Err(damaged(format!("has the digest {actual} instead of {expected}")));
        }
    }
    Ok(())
}
