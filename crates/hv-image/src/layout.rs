//! Where things lie in the store's directory, and how files come there: whole or not at all.

use std::fs::{self, File, OpenOptions, Permissions};
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::reference::Digest;
use crate::{ImageError, Result};

/// Longest record file, in bytes.
const MAX_RECORD_BYTES: u64 = 16 << 20;
/// The format of all records.
pub(crate) const VERSION: u32 = 1;

/// The directories of a store.
#[derive(Clone, Debug)]
pub(crate) struct Layout {
    dir: PathBuf,
}

impl Layout {
    /// Makes what is missing. What drivers open may be entered by everybody, the rest by the store's owner
    /// only.
    pub(crate) fn create(dir: &Path) -> Result<Self> {
        let layout = Self { dir: dir.to_owned() };
        let made = [(layout.dir.clone(), 0o755), (layout.blobs(), 0o755), (layout.forms(), 0o755)];
        let private =
            [layout.partial(), layout.images(), layout.users(), layout.tmp()].map(|dir| (dir, 0o700));
        for (dir, mode) in made.into_iter().chain(private) {
            fs::create_dir_all(&dir).map_err(ImageError::io("create", &dir))?;
            fs::set_permissions(&dir, Permissions::from_mode(mode))
                .map_err(ImageError::io("set the mode of", &dir))?;
        }
        Ok(layout)
    }

    pub(crate) fn lock(&self) -> PathBuf {
        self.dir.join("lock")
    }

    pub(crate) fn blobs(&self) -> PathBuf {
        self.dir.join("blobs/sha256")
    }

    pub(crate) fn blob(&self, digest: &Digest) -> PathBuf {
        self.blobs().join(digest.hex())
    }

    pub(crate) fn forms(&self) -> PathBuf {
        self.dir.join("forms")
    }

    pub(crate) fn form(&self, key: &str) -> PathBuf {
        self.forms().join(key)
    }

    pub(crate) fn partial(&self) -> PathBuf {
        self.dir.join("partial")
    }

    pub(crate) fn images(&self) -> PathBuf {
        self.dir.join("images")
    }

    pub(crate) fn users(&self) -> PathBuf {
        self.dir.join("users")
    }

    pub(crate) fn tmp(&self) -> PathBuf {
        self.dir.join("tmp")
    }

    /// A directory that nobody else uses, for the store's owner only; removed with what is in it when it is
    /// dropped.
    pub(crate) fn scratch(&self) -> Result<Scratch> {
        let path = self.tmp().join(format!("{:032x}", rand::random::<u128>()));
        fs::create_dir(&path).map_err(ImageError::io("create", &path))?;
        let scratch = Scratch { path };
        fs::set_permissions(&scratch.path, Permissions::from_mode(0o700))
            .map_err(ImageError::io("set the mode of", &scratch.path))?;
        Ok(scratch)
    }

    /// What is free on the file system, in bytes, for those who are not root.
    pub(crate) fn free_bytes(&self) -> Result<u64> {
        let stat =
            rustix::fs::statvfs(&self.dir).map_err(|e| ImageError::io("examine", &self.dir)(e.into()))?;
        Ok(stat.f_bavail.saturating_mul(stat.f_frsize))
    }

    /// Writes a record under `dir/name`, durably, in place of what was there.
    pub(crate) fn write_record(&self, dir: &Path, name: &str, record: &impl Serialize) -> Result<()> {
        let bytes = serde_json::to_vec_pretty(record).map_err(|e| ImageError::io("encode", dir)(e.into()))?;
        let target = dir.join(name);
        let unfinished = self.tmp().join(format!("{:032x}", rand::random::<u128>()));
        write_new(&unfinished, &bytes, 0o600)?;
        fs::rename(&unfinished, &target).map_err(ImageError::io("write", &target))?;
        sync_dir(dir)
    }
}

/// See [`Layout::scratch`].
pub(crate) struct Scratch {
    path: PathBuf,
}

impl Scratch {
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        // What cannot be removed now is swept away when the store is opened.
        let _ = fs::remove_dir_all(&self.path);
    }
}

/// Writes a file that is not there yet and syncs it.
pub(crate) fn write_new(path: &Path, bytes: &[u8], mode: u32) -> Result<()> {
    let write = || -> io::Result<()> {
        let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)?;
        file.write_all(bytes)?;
        file.set_permissions(Permissions::from_mode(mode))?;
        file.sync_all()
    };
    write().map_err(ImageError::io("write", path))
}

/// Makes the names in a directory durable.
pub(crate) fn sync_dir(dir: &Path) -> Result<()> {
    File::open(dir).and_then(|dir| dir.sync_all()).map_err(ImageError::io("sync", dir))
}

/// Removes a file; one that is not there is removed already.
pub(crate) fn remove_file(path: &Path) -> Result<()> {
    match fs::remove_file(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(ImageError::io("remove", path)(e)),
        _ => Ok(()),
    }
}

/// Reads at most `max_bytes`; a longer file is an error.
pub(crate) fn read_bounded(path: &Path, max_bytes: u64) -> Result<Vec<u8>> {
    let read = || -> io::Result<Vec<u8>> {
        let mut bytes = Vec::new();
        File::open(path)?.take(max_bytes + 1).read_to_end(&mut bytes)?;
        match bytes.len() as u64 > max_bytes {
            true => Err(io::Error::other(format!("it has more than {max_bytes} bytes"))),
            false => Ok(bytes),
        }
    };
    read().map_err(ImageError::io("read", path))
}

/// Reads a record; one of a newer version is refused.
pub(crate) fn read_record<T: DeserializeOwned>(path: &Path) -> Result<T> {
    #[derive(serde::Deserialize)]
    struct Versioned {
        version: u32,
    }
    let bytes = read_bounded(path, MAX_RECORD_BYTES)?;
    let malformed = |e: serde_json::Error| ImageError::io("decode", path)(e.into());
    let versioned: Versioned = serde_json::from_slice(&bytes).map_err(malformed)?;
    if versioned.version > VERSION {
        return Err(ImageError::Newer { path: path.to_owned(), version: versioned.version });
    }
    serde_json::from_slice(&bytes).map_err(malformed)
}

/// The paths in a directory, in order.
pub(crate) fn entries(dir: &Path) -> Result<Vec<PathBuf>> {
    let read = || fs::read_dir(dir)?.map(|entry| Ok(entry?.path())).collect::<io::Result<Vec<_>>>();
    let mut paths = read().map_err(ImageError::io("list", dir))?;
    paths.sort();
    Ok(paths)
}

/// The SHA-256 of a file, and its length.
pub(crate) fn hash_file(path: &Path) -> io::Result<(Digest, u64)> {
    use sha2::Digest as _;
    let mut file = File::open(path)?;
    let mut hasher = sha2::Sha256::new();
    let length = io::copy(&mut file, &mut hasher)?;
    Ok((Digest::from_hash(&hasher.finalize()), length))
}

/// What a file takes up on disk, in bytes: less than its length where it has holes.
pub(crate) fn allocated_bytes(path: &Path) -> u64 {
    use std::os::unix::fs::MetadataExt as _;
    fs::metadata(path).map_or(0, |metadata| metadata.blocks() * 512)
}
