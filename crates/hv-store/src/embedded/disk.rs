//! The file: opening and locking it, its transactions, and what its errors mean.

use std::fs;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};

use std::sync::atomic::{AtomicBool, Ordering};

use parking_lot::RwLock;
use redb::{Database, Durability, ReadTransaction, ReadableDatabase, WriteTransaction};

use super::EmbeddedOptions;
use super::room::Room;
use super::tables::{Meta, Tables, TablesError, TablesResult};
use crate::{Result, StoreError};

/// The file's name in the store's directory.
const FILE_NAME: &str = "store.redb";

/// The open file. Reads share it; recovery from a failed write closes and opens it again.
pub(super) struct Disk {
    dir: PathBuf,
    file: PathBuf,
    cache_bytes: usize,
    verify: bool,
    pub(super) room: Room,
    database: RwLock<Option<Database>>,
    closed: AtomicBool,
    /// The file is closed to reads because it is being made smaller.
    compacting: AtomicBool,
}

impl Disk {
    /// Opens or creates the file in `dir`.
    pub(super) fn open(dir: &Path, options: &EmbeddedOptions) -> Result<(Self, Meta)> {
        let disk = Self {
            dir: dir.to_owned(),
            file: dir.join(FILE_NAME),
            cache_bytes: options.cache_bytes,
            verify: options.verify_on_open,
            room: Room::new(dir, options.min_free_bytes),
            database: RwLock::new(None),
            closed: AtomicBool::new(false),
            compacting: AtomicBool::new(false),
        };
        disk.create_files().map_err(|source| disk.io_error("creating the directory", source.into()))?;
        let meta = disk.reopen()?;
        Ok((disk, meta))
    }

    /// The directory, for messages.
    pub(super) fn place(&self) -> String {
        self.dir.display().to_string()
    }

    fn create_files(&self) -> io::Result<()> {
        let mut builder = fs::DirBuilder::new();
        builder.recursive(true);
        let mut options = fs::OpenOptions::new();
        options.read(true).write(true).create(true).truncate(false);
        #[cfg(unix)]
        {
            use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
            builder.mode(0o700);
            options.mode(0o600);
        }
        builder.create(&self.dir)?;
        options.open(&self.file)?;
        // The file's name must survive a power cut as its content does.
        #[cfg(unix)]
        fs::File::open(&self.dir)?.sync_all()?;
        Ok(())
    }

    /// Closes the file if it is open and opens it again. Reads wait meanwhile, and fail if this does.
    pub(super) fn reopen(&self) -> Result<Meta> {
        let mut slot = self.database.write();
        drop(slot.take());
        match self.open_file(&mut slot) {
            Err(StoreError::Full(_)) => {
                self.room.release();
                self.open_file(&mut slot)
            }
            result => result,
        }
    }

    fn open_file(&self, slot: &mut Option<Database>) -> Result<Meta> {
        let mut builder = Database::builder();
        builder.set_cache_size(self.cache_bytes).set_check_integrity_on_open(self.verify);
        let file = self.dir.display().to_string();
        builder.set_repair_callback(move |repair| {
            let percent = (repair.progress() * 100.0).round();
            tracing::info!(dir = %file, percent, "the store was not closed; checking it");
        });
        // A damaged file can make the database panic before its own checks find the damage.
        let opened = catch_unwind(AssertUnwindSafe(|| {
            let database = builder.create(&self.file)?;
            let meta = prepare(&database)?;
            Ok::<_, TablesError>((database, meta))
        }));
        match opened {
            Ok(Ok((database, meta))) => {
                *slot = Some(database);
                Ok(meta)
            }
            Ok(Err(TablesError::Database(redb::Error::DatabaseAlreadyOpen))) => {
                let why = "another process has it open; stop that one, or choose another directory";
                Err(self.io_error("locking the file", why.into()))
            }
            Ok(Err(error)) => Err(self.error("opening the file", error)),
            Err(_) => {
                let why = "the file is damaged; move it away and restore a backup";
                Err(self.io_error("opening the file", why.into()))
            }
        }
    }

    /// Closes the file. What was acknowledged is on disk already.
    pub(super) fn close(&self) {
        self.closed.store(true, Ordering::Relaxed);
        if let Some(database) = self.database.write().take()
            && let Err(error) = database.close()
        {
            tracing::warn!(dir = %self.dir.display(), %error, "the store was not closed cleanly; it will be checked when it is opened");
        }
    }

    /// Takes the file away from reads, to make it smaller. They wait until [`Self::end_compaction`].
    pub(super) fn begin_compaction(&self) -> Option<Database> {
        self.compacting.store(true, Ordering::Release);
        self.database.write().take()
    }

    /// Gives the file back to reads; without one they fail until it is opened again.
    pub(super) fn end_compaction(&self, database: Option<Database>) {
        *self.database.write() = database;
        self.compacting.store(false, Ordering::Release);
    }

    pub(super) fn is_compacting(&self) -> bool {
        self.compacting.load(Ordering::Acquire)
    }

    /// A snapshot of everything committed so far.
    pub(super) fn read(&self) -> TablesResult<ReadTransaction> {
        let database = self.database.read();
        let database = database.as_ref().ok_or(redb::Error::DatabaseClosed)?;
        Ok(database.begin_read()?)
    }

    /// Whether a read failed only because the file is being opened again after a failed write.
    pub(super) fn is_interrupted(&self, error: &TablesError) -> bool {
        let interrupted =
            matches!(error, TablesError::Database(redb::Error::DatabaseClosed | redb::Error::PreviousIo));
        interrupted && !self.is_closed()
    }

    fn is_closed(&self) -> bool {
        self.closed.load(Ordering::Relaxed)
    }

    /// A write transaction whose commit returns after the data is on disk.
    pub(super) fn write(&self) -> TablesResult<WriteTransaction> {
        let database = self.database.read();
        let database = database.as_ref().ok_or(redb::Error::DatabaseClosed)?;
        let mut txn = database.begin_write()?;
        txn.set_durability(Durability::Immediate).map_err(redb::Error::from)?;
        Ok(txn)
    }

    /// What `error` means for whoever asked for `operation`.
    pub(super) fn error(&self, operation: &'static str, error: TablesError) -> StoreError {
        if is_full(&error) {
            return StoreError::Full(format!("{operation} in {}: {error}", self.dir.display()));
        }
        match error {
            TablesError::Database(redb::Error::DatabaseClosed) if self.is_closed() => StoreError::Closed,
            error => self.io_error(operation, Box::new(error)),
        }
    }

    pub(super) fn io_error(
        &self,
        operation: &'static str,
        source: Box<dyn std::error::Error + Send + Sync>,
    ) -> StoreError {
        StoreError::Io { operation, path: self.dir.display().to_string(), source }
    }

    /// Room that the file takes.
    pub(super) fn size_bytes(&self) -> Result<u64> {
        let metadata = fs::metadata(&self.file)
            .map_err(|source| self.io_error("reading the file's size", source.into()))?;
        #[cfg(unix)]
        {
            use std::os::unix::fs::MetadataExt;
            Ok(metadata.blocks() * 512)
        }
        #[cfg(not(unix))]
        Ok(metadata.len())
    }
}

/// Creates what a new file needs; says where an old one stands.
fn prepare(database: &Database) -> TablesResult<Meta> {
    let txn = database.begin_write()?;
    let meta = {
        let mut tables = Tables::open(&txn)?;
        let meta = tables.meta()?.unwrap_or(Meta::EMPTY);
        tables.set_meta(meta)?;
        meta
    };
    txn.commit()?;
    Ok(meta)
}

/// Whether the cause is a lack of room.
pub(super) fn is_full(error: &TablesError) -> bool {
    match error {
        TablesError::Database(redb::Error::Io(error)) => {
            matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
        }
        _ => false,
    }
}
