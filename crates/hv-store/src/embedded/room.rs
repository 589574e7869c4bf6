//! Room on the file system: who may write when little is left, and a reserve for recovery.
//!
//! A write that finds no room leaves the database in need of repair, and the repair writes too. So the store holds a file
//! of zeros beside its own, gives it up when a write failed, and does not let anything grow until it has it back.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

/// The reserve's name in the store's directory, and its size.
const RESERVE_NAME: &str = "reserve";
const RESERVE_BYTES: usize = 4 << 20;
/// What must be free for deleting, expiry and compaction.
const DELETE_BYTES: u64 = 2 << 20;

/// What may be written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Admission {
    /// Anything.
    All,
    /// What frees room, a little at a time.
    Freeing,
    /// Nothing.
    Nothing,
}

pub(super) struct Room {
    dir: PathBuf,
    min_free_bytes: u64,
    reserved: AtomicBool,
    refusing: AtomicBool,
}

impl Room {
    pub(super) fn new(dir: &Path, min_free_bytes: u64) -> Self {
        let reserve = dir.join(RESERVE_NAME);
        let whole = fs::metadata(reserve).is_ok_and(|reserve| reserve.len() == RESERVE_BYTES as u64);
        Self {
            dir: dir.to_owned(),
            min_free_bytes,
            reserved: AtomicBool::new(whole),
            refusing: AtomicBool::new(false),
        }
    }

    /// What may be written if that takes `needed_bytes`.
    pub(super) fn admits(&self, needed_bytes: u64) -> Admission {
        let reserved = self.reserved.load(Ordering::Relaxed) || self.reserve();
        let Some(free_bytes) = self.free_bytes() else {
            return if reserved { Admission::All } else { Admission::Freeing };
        };
        // Copy on write: the old pages are given back one commit later.
        if reserved && free_bytes >= self.min_free_bytes.saturating_add(2 * needed_bytes) {
            self.refusing.store(false, Ordering::Relaxed);
            return Admission::All;
        }
        self.refusing.store(true, Ordering::Relaxed);
        if free_bytes >= DELETE_BYTES { Admission::Freeing } else { Admission::Nothing }
    }

    /// Whether writes were refused lately for lack of room.
    pub(super) fn is_short(&self) -> bool {
        self.refusing.load(Ordering::Relaxed)
            || self.free_bytes().is_some_and(|free_bytes| free_bytes < self.min_free_bytes)
    }

    /// What is left, in words.
    pub(super) fn describe(&self) -> String {
        let free_kib = self.free_bytes().unwrap_or(0) / 1024;
        let wanted_kib = self.min_free_bytes.max(RESERVE_BYTES as u64) / 1024;
        format!(
            "the file system of {} has {free_kib} KiB left; make it at least {wanted_kib} KiB",
            self.dir.display()
        )
    }

    /// Gives the reserve up, for a repair.
    pub(super) fn release(&self) {
        self.reserved.store(false, Ordering::Relaxed);
        self.refusing.store(true, Ordering::Relaxed);
        if let Err(error) = fs::remove_file(self.dir.join(RESERVE_NAME))
            && error.kind() != io::ErrorKind::NotFound
        {
            tracing::warn!(dir = %self.dir.display(), %error, "the reserve cannot be given up");
        }
    }

    /// Takes the reserve, if there is room for it and for as much again.
    fn reserve(&self) -> bool {
        if self.free_bytes().is_some_and(|free_bytes| free_bytes < 2 * RESERVE_BYTES as u64) {
            return false;
        }
        let path = self.dir.join(RESERVE_NAME);
        let written = File::create(&path).and_then(|mut file| {
            file.write_all(&vec![0; RESERVE_BYTES])?;
            file.sync_all()
        });
        if written.is_err() {
            // A part of it is of no use.
            drop(fs::remove_file(path));
            return false;
        }
        self.reserved.store(true, Ordering::Relaxed);
        true
    }

    /// What an unprivileged program can still use, where the platform tells.
    fn free_bytes(&self) -> Option<u64> {
        #[cfg(unix)]
        {
            let stat = rustix::fs::statvfs(&self.dir).ok()?;
            Some(stat.f_bavail.saturating_mul(stat.f_frsize))
        }
        #[cfg(not(unix))]
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_grows_where_more_must_stay_free_than_there_is() {
        let dir = tempfile::tempdir().unwrap();
        let room = Room::new(dir.path(), u64::MAX);
        assert_eq!(room.admits(0), Admission::Freeing);
        assert!(room.is_short());
        let room = Room::new(dir.path(), 0);
        assert_eq!(room.admits(1), Admission::All);
        assert!(!room.is_short());
    }

    #[test]
    fn a_reserve_that_was_given_up_is_taken_again() {
        let dir = tempfile::tempdir().unwrap();
        let room = Room::new(dir.path(), 0);
        room.admits(0);
        assert!(dir.path().join(RESERVE_NAME).exists());
        room.release();
        assert!(!dir.path().join(RESERVE_NAME).exists());
        assert!(room.is_short());
        assert_eq!(room.admits(0), Admission::All);
        assert!(dir.path().join(RESERVE_NAME).exists());
    }
}
