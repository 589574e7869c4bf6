//! A blob on its way into the store: hashed as it is written, renamed to its digest when it is complete.
//!
//! # Failure and recovery
//! A download has a record beside its partial file that says how much of it is synced. After a crash only so
//! much of the file is believed,
//! hashed again, and gone on with. What arrives without such a record (an upload) starts over.

use std::fs::{self, File, OpenOptions, Permissions};
use std::io::{Read as _, Seek as _, SeekFrom, Write as _};
use std::os::unix::fs::PermissionsExt as _;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};
use tokio::sync::OwnedMutexGuard;

use crate::layout::{self, Layout, VERSION};
use crate::reference::Digest;
use crate::{ImageError, Result};

/// How much may be lost by a crash, in bytes; also how often the disk is looked at.
const SYNC_EVERY_BYTES: u64 = 8 << 20;
/// How much is hashed at a time, in bytes.
const CHUNK_BYTES: usize = 256 << 10;

/// What is written beside a partial file: `partial/<key>.json`.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct PartialRecord {
    version: u32,
    /// How many bytes are synced.
    synced_bytes: u64,
    /// What the server calls this content; empty where the digest says it.
    validator: String,
}

/// See the module.
pub(crate) struct Incoming {
    image: String,
    layout: Layout,
    min_free_bytes: u64,
    path: PathBuf,
    file: File,
    hasher: Sha256,
    length: u64,
    record: Option<(String, PartialRecord)>,
    /// Keeps others from the partial file.
    guard: Option<OwnedMutexGuard<()>>,
}

impl Incoming {
    /// A partial download, empty or as far as an earlier one came. Nobody else may have it: `guard`.
    pub(crate) fn resume(
        (image, key): (&str, &str),
        (layout, min_free_bytes): (&Layout, u64),
        guard: OwnedMutexGuard<()>,
    ) -> Result<Self> {
        let path = layout.partial().join(format!("{key}.part"));
        let record_path = layout.partial().join(format!("{key}.json"));
        let record = match record_path.exists() {
            // One that cannot be read is of no use; the download starts over.
            true => layout::read_record(&record_path).ok(),
            false => None,
        };
        let record =
            record.unwrap_or(PartialRecord { version: VERSION, synced_bytes: 0, validator: String::new() });
        let open = || OpenOptions::new().read(true).write(true).create(true).truncate(false).open(&path);
        let file = open().map_err(ImageError::io("open", &path))?;
        let mut incoming = Self {
            image: image.to_owned(),
            layout: layout.clone(),
            min_free_bytes,
            path,
            file,
            hasher: Sha256::new(),
            length: 0,
            record: Some((key.to_owned(), record)),
            guard: Some(guard),
        };
        incoming.look()?;
        incoming.believe()?;
        Ok(incoming)
    }

    /// Something that starts over if it is interrupted.
    pub(crate) fn fresh(image: &str, layout: &Layout, min_free_bytes: u64) -> Result<Self> {
        let path = layout.tmp().join(format!("{:032x}", rand::random::<u128>()));
        let open = OpenOptions::new().read(true).write(true).create_new(true).open(&path);
        let incoming = Self {
            image: image.to_owned(),
            layout: layout.clone(),
            min_free_bytes,
            file: open.map_err(ImageError::io("create", &path))?,
            path,
            hasher: Sha256::new(),
            length: 0,
            record: None,
            guard: None,
        };
        incoming.look()?;
        Ok(incoming)
    }

    /// How many bytes there are.
    pub(crate) fn length(&self) -> u64 {
        self.length
    }

    /// What the server called the content that the partial file is the beginning of.
    pub(crate) fn validator(&self) -> &str {
        self.record.as_ref().map_or("", |(_, record)| &record.validator)
    }

    /// Hashes as much of the partial file as is known to be synced, and cuts off the rest.
    fn believe(&mut self) -> Result<()> {
        let synced = self.record.as_ref().map_or(0, |(_, record)| record.synced_bytes);
        let mut buffer = vec![0; CHUNK_BYTES];
        let mut read = || -> std::io::Result<()> {
            while self.length < synced {
                let want = buffer.len().min(usize::try_from(synced - self.length).unwrap_or(CHUNK_BYTES));
                match self.file.read(&mut buffer[..want])? {
                    0 => break,
                    count => {
                        self.hasher.update(&buffer[..count]);
                        self.length += count as u64;
                    }
                }
            }
            self.file.set_len(self.length)?;
            self.file.seek(SeekFrom::Start(self.length)).map(drop)
        };
        read().map_err(ImageError::io("read", &self.path))
    }

    /// Forgets what there is; `validator` names what comes now.
    pub(crate) fn restart(&mut self, validator: &str) -> Result<()> {
        self.hasher = Sha256::new();
        self.length = 0;
        let cut = self.file.set_len(0).and_then(|()| self.file.seek(SeekFrom::Start(0)));
        cut.map_err(ImageError::io("cut", &self.path))?;
        if let Some((_, record)) = &mut self.record {
            record.validator = validator.to_owned();
        }
        self.note()
    }

    pub(crate) fn write(&mut self, bytes: &[u8]) -> Result<()> {
        self.file.write_all(bytes).map_err(ImageError::io("write", &self.path))?;
        self.hasher.update(bytes);
        let before = self.length / SYNC_EVERY_BYTES;
        self.length += bytes.len() as u64;
        if self.length / SYNC_EVERY_BYTES > before {
            self.keep()?;
            self.look()?;
        }
        Ok(())
    }

    /// Makes sure that what there is can be gone on with after a crash.
    pub(crate) fn keep(&mut self) -> Result<()> {
        if self.record.is_none() {
            return Ok(());
        }
        self.file.sync_data().map_err(ImageError::io("sync", &self.path))?;
        self.note()
    }

    fn note(&mut self) -> Result<()> {
        let Some((key, record)) = &mut self.record else { return Ok(()) };
        record.synced_bytes = self.length;
        self.layout.write_record(&self.layout.partial(), &format!("{key}.json"), record)
    }

    fn look(&self) -> Result<()> {
        let (free_bytes, min_free_bytes) = (self.layout.free_bytes()?, self.min_free_bytes);
        match free_bytes < min_free_bytes {
            true => Err(ImageError::NoSpace { image: self.image.clone(), free_bytes, min_free_bytes }),
            false => Ok(()),
        }
    }

    pub(crate) fn digest(&self) -> Digest {
        Digest::from_hash(&self.hasher.clone().finalize())
    }

    /// Makes it a blob.
    pub(crate) fn finish(self) -> Result<Digest> {
        let digest = self.digest();
        let target = self.layout.blob(&digest);
        let seal = || {
            self.file.set_permissions(Permissions::from_mode(0o444))?;
            self.file.sync_all()?;
            fs::rename(&self.path, &target)
        };
        // A blob that is there may have forms as hard links; the new file must not take its place.
        if target.exists() {
            layout::remove_file(&self.path)?;
        } else {
            seal().map_err(ImageError::io("seal", &target))?;
        }
        layout::sync_dir(&self.layout.blobs())?;
        self.forget_record()?;
        Ok(digest)
    }

    /// Gives it up and its space back.
    pub(crate) fn discard(self) -> Result<()> {
        layout::remove_file(&self.path)?;
        self.forget_record()
    }

    fn forget_record(&self) -> Result<()> {
        match &self.record {
            Some((key, _)) => layout::remove_file(&self.layout.partial().join(format!("{key}.json"))),
            None => Ok(()),
        }
    }
}

impl Drop for Incoming {
    fn drop(&mut self) {
        if self.record.is_none() {
            // Renamed already if it was finished; else nobody goes on with it.
            let _ = fs::remove_file(&self.path);
        }
        drop(self.guard.take());
    }
}
