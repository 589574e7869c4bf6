//! Directories of instances, and how files in them are written so that a crash at any instant is survived.
//!
//! # Theory of operation
//! An instance is the directory `<state_dir>/<id>/`. Deletion first renames it to `.<id>.deleting`, so that what is left
//! of it can never be taken for an instance. A file is replaced as a whole, by one that is completely on disk.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{self, Write as _};
use std::marker::PhantomData;
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use hv_types::InstanceId;
use rustix::fs::{FlockOperation, Mode, OFlags};
use serde::Serialize;
use serde::de::DeserializeOwned;

/// What a driver's problems must be able to say of files.
pub trait FileProblem: Sized {
    /// A call on a file failed.
    fn failed(action: &'static str, path: &Path, source: io::Error) -> Self;

    /// A file's content is not what it should be.
    fn damaged(path: PathBuf, source: serde_json::Error) -> Self;
}

fn failed<'a, P: FileProblem>(
    action: &'static str,
    path: &'a Path,
) -> impl FnOnce(io::Error) -> P + use<'a, P> {
    move |source| P::failed(action, path, source)
}

/// All instances of a driver.
#[derive(Clone, Debug)]
pub struct StateDir(pub PathBuf);

impl StateDir {
    /// Where an instance is.
    #[must_use]
    pub fn of(&self, id: &InstanceId) -> PathBuf {
        self.0.join(id.as_str())
    }

    /// Where what is left of an instance is that is being deleted.
    #[must_use]
    pub fn trash(&self, id: &InstanceId) -> PathBuf {
        self.0.join(format!(".{id}.deleting"))
    }

    /// Every instance of which something is there. A directory that is not there has none.
    ///
    /// # Errors
    /// If the directory cannot be read.
    pub fn list(&self) -> io::Result<Vec<InstanceId>> {
        let entries = match fs::read_dir(&self.0) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            other => other?,
        };
        let mut ids = BTreeSet::new();
        for entry in entries {
            let entry = entry?;
            let name = entry.file_name();
            let Some(name) = name.to_str() else { continue };
            let name = name.strip_prefix('.').and_then(|rest| rest.strip_suffix(".deleting")).unwrap_or(name);
            // What is being deleted while we look is gone.
            let is_dir = entry.file_type().is_ok_and(|kind| kind.is_dir());
            if let (Ok(id), true) = (name.parse(), is_dir) {
                ids.insert(id);
            }
        }
        Ok(ids.into_iter().collect())
    }

    /// Makes an instance's directory, with the permissions `mode`; one that is there will do.
    ///
    /// # Errors
    /// If it cannot be made.
    pub fn make<P: FileProblem>(&self, id: &InstanceId, mode: u32) -> Result<PathBuf, P> {
        let dir = self.of(id);
        fs::create_dir_all(&self.0).map_err(failed("make", &self.0))?;
        match fs::DirBuilder::new().mode(mode).create(&dir) {
            Err(e) if e.kind() != io::ErrorKind::AlreadyExists => Err(P::failed("make", &dir, e)),
            _ => {
                sync_dir(&self.0)?;
                Ok(dir)
            }
        }
    }

    /// Takes an instance that does not run out of the list; [`Self::trash`] is then to be removed. `false` if it is not
    /// there.
    ///
    /// # Errors
    /// If it cannot be moved, or an earlier deletion that was cut short cannot be finished.
    pub fn set_aside<P: FileProblem>(&self, id: &InstanceId) -> Result<bool, P> {
        let (dir, trash) = (self.of(id), self.trash(id));
        remove_tree(&trash)?;
        match fs::rename(&dir, &trash) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(false),
            other => other.map_err(failed("rename", &dir))?,
        }
        sync_dir(&self.0)?;
        Ok(true)
    }

    /// Removes an instance that does not run.
    ///
    /// # Errors
    /// As of [`Self::set_aside`], and if something of it cannot be removed.
    pub fn remove<P: FileProblem>(&self, id: &InstanceId) -> Result<(), P> {
        match self.set_aside(id)? {
            true => remove_tree(&self.trash(id)),
            false => Ok(()),
        }
    }

    /// Whether instances can be made here.
    ///
    /// # Errors
    /// Says what to do.
    pub fn check_writable(&self) -> Result<(), String> {
        let told = |action: &str, cause: io::Error| {
            let dir = self.0.display();
            format!("{action} {dir}: {cause}; correct the agent's state directory or its permissions")
        };
        fs::create_dir_all(&self.0).map_err(|e| told("make", e))?;
        let access = rustix::fs::access(&self.0, rustix::fs::Access::WRITE_OK | rustix::fs::Access::EXEC_OK);
        access.map_err(|e| told("write to", e.into()))
    }
}

/// Removes a directory with all that is in it, if it is there. Symbolic links in it are removed, not followed.
///
/// # Errors
/// If something of it cannot be removed.
pub fn remove_tree<P: FileProblem>(path: &Path) -> Result<(), P> {
    match fs::remove_dir_all(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(P::failed("remove", path, e)),
        _ => Ok(()),
    }
}

/// Removes a file, if it is there.
///
/// # Errors
/// If it is there and cannot be removed.
pub fn remove_file<P: FileProblem>(path: &Path) -> Result<(), P> {
    match fs::remove_file(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(P::failed("remove", path, e)),
        _ => Ok(()),
    }
}

/// One instance's directory, which need not be complete. Its errors are the driver's, `P`.
#[derive(Debug)]
pub struct InstanceDir<P> {
    /// Where it is.
    pub path: PathBuf,
    problem: PhantomData<fn() -> P>,
}

impl<P: FileProblem> InstanceDir<P> {
    /// The directory at a path, whether there is one or not.
    pub fn at(path: impl Into<PathBuf>) -> Self {
        Self { path: path.into(), problem: PhantomData }
    }

    /// The directory at a path.
    ///
    /// # Errors
    /// If there is none; a symbolic link is none.
    pub fn open(path: PathBuf) -> io::Result<Self> {
        match fs::symlink_metadata(&path)?.is_dir() {
            true => Ok(Self::at(path)),
            false => Err(io::Error::from(io::ErrorKind::NotADirectory)),
        }
    }

    /// The path of a file in it.
    #[must_use]
    pub fn file(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }

    /// What a file says; `None` if it is not there.
    ///
    /// # Errors
    /// If it is there and cannot be read or understood.
    pub fn read<T: DeserializeOwned>(&self, name: &str) -> Result<Option<T>, P> {
        let path = self.file(name);
        match fs::read(&path) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(e) => Err(P::failed("read", &path, e)),
            Ok(bytes) => serde_json::from_slice(&bytes).map(Some).map_err(|e| P::damaged(path, e)),
        }
    }

    /// Replaces a file: see [`write_atomically`].
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn write<T: Serialize>(&self, name: &str, value: &T) -> Result<(), P> {
        let bytes = serde_json::to_vec_pretty(value).map_err(|e| P::damaged(self.file(name), e))?;
        write_atomically(&self.file(name), &bytes)
    }

    /// Writes something about the present run. After a crash of the host the old content may be there, which does not
    /// matter, as nothing runs then; but no part of either.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn note<T: Serialize>(&self, name: &str, value: &T) -> Result<(), P> {
        let bytes = serde_json::to_vec(value).map_err(|e| P::damaged(self.file(name), e))?;
        let partial = write_partial(&self.file(name), &bytes)?;
        fs::rename(&partial, self.file(name)).map_err(failed("rename", &partial))
    }

    /// Removes a file, if it is there.
    ///
    /// # Errors
    /// If it is there and cannot be removed.
    pub fn remove(&self, name: &str) -> Result<(), P> {
        remove_file(&self.file(name))
    }

    /// Opens a file for appending, private to us. Existing content stays.
    ///
    /// # Errors
    /// If it cannot be opened. So with the two that follow.
    pub fn append(&self, name: &str) -> Result<File, P> {
        self.append_with(name, 0o600)
    }

    /// Makes an empty file if there is none, with the permissions `mode`. Existing content stays.
    ///
    /// # Errors
    /// As of [`Self::append`].
    pub fn touch(&self, name: &str, mode: u32) -> Result<(), P> {
        self.append_with(name, mode).map(drop)
    }

    /// Makes an empty file, or empties one.
    ///
    /// # Errors
    /// As of [`Self::append`].
    pub fn empty(&self, name: &str) -> Result<(), P> {
        self.append(name)?.set_len(0).map_err(failed("truncate", &self.file(name)))
    }

    fn append_with(&self, name: &str, mode: u32) -> Result<File, P> {
        let path = self.file(name);
        let file = fs::OpenOptions::new().create(true).append(true).read(true).mode(mode).open(&path);
        file.map_err(failed("open", &path))
    }

    /// Locks a file (flock(2)), which is made if there is none; `None` if another has the lock.
    ///
    /// # Errors
    /// If the file cannot be opened or locked.
    pub fn try_lock(&self, name: &str) -> Result<Option<File>, P> {
        let file = self.append(name)?;
        match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => Ok(Some(file)),
            Err(rustix::io::Errno::WOULDBLOCK) => Ok(None),
            Err(e) => Err(P::failed("lock", &self.file(name), e.into())),
        }
    }
}

/// A directory by descriptor: paths below it through `/proc` are short enough for socket addresses, which have at most
/// 107 bytes (unix(7)).
#[derive(Debug)]
pub struct Short(OwnedFd);

impl Short {
    /// Of a directory.
    ///
    /// # Errors
    /// If there is none.
    pub fn open(dir: &Path) -> io::Result<Self> {
        Ok(Self(rustix::fs::open(dir, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?))
    }

    /// Good in this process as long as `self` lives.
    #[must_use]
    pub fn path(&self, name: &str) -> PathBuf {
        PathBuf::from(format!("/proc/self/fd/{}/{name}", self.0.as_raw_fd()))
    }

    /// Good in other processes too, as long as `self` lives.
    #[must_use]
    pub fn public_path(&self, name: &str) -> PathBuf {
        PathBuf::from(format!("/proc/{}/fd/{}/{name}", std::process::id(), self.0.as_raw_fd()))
    }
}

/// Replaces a file: either the old content or the new one is there after a crash, never a part.
///
/// # Errors
/// If it cannot be written.
pub fn write_atomically<P: FileProblem>(path: &Path, bytes: &[u8]) -> Result<(), P> {
    let partial = write_partial(path, bytes)?;
    settle(&partial, path)
}

/// Writes a file that is completely on disk, beside the one that it is to replace.
fn write_partial<P: FileProblem>(path: &Path, bytes: &[u8]) -> Result<PathBuf, P> {
    let mut partial = path.as_os_str().to_owned();
    partial.push(".partial");
    let partial = PathBuf::from(partial);
    let write = || {
        let mut options = fs::OpenOptions::new();
        let mut file = options.create(true).write(true).truncate(true).mode(0o600).open(&partial)?;
        file.write_all(bytes)?;
        file.sync_all()
    };
    write().map_err(failed("write", &partial))?;
    Ok(partial)
}

/// Gives a file that is completely on disk its final name.
///
/// # Errors
/// If it cannot be renamed, or its directory not be written.
pub fn settle<P: FileProblem>(partial: &Path, path: &Path) -> Result<(), P> {
    fs::rename(partial, path).map_err(failed("rename", partial))?;
    path.parent().map_or(Ok(()), sync_dir)
}

/// Makes sure that the names in a directory are on disk.
///
/// # Errors
/// If they cannot be written.
pub fn sync_dir<P: FileProblem>(path: &Path) -> Result<(), P> {
    File::open(path).and_then(|dir| dir.sync_all()).map_err(failed("flush", path))
}

/// Milliseconds since 1970.
#[must_use]
pub fn now_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, PartialEq)]
    enum Problem {
        Failed(String),
        Damaged,
    }

    impl FileProblem for Problem {
        fn failed(action: &'static str, path: &Path, source: io::Error) -> Self {
            Self::Failed(format!("{action} {}: {source}", path.display()))
        }

        fn damaged(_path: PathBuf, _source: serde_json::Error) -> Self {
            Self::Damaged
        }
    }

    type Dir = InstanceDir<Problem>;
    type Done = Result<(), Problem>;

    fn id(name: &str) -> InstanceId {
        name.parse().unwrap()
    }

    #[test]
    fn what_is_half_deleted_is_listed_and_removed() -> Done {
        let dir = tempfile::tempdir().unwrap();
        let state = StateDir(dir.path().join("state"));
        assert_eq!(state.list().unwrap(), []);
        for name in ["one", "two"] {
            state.make(&id(name), 0o700)?;
        }
        fs::write(state.0.join("a-file"), "").unwrap();
        assert!(state.set_aside(&id("two"))?);
        assert_eq!(state.list().unwrap(), [id("one"), id("two")]);
        // It comes again before the first deletion is over: what is left of that goes first.
        state.make(&id("two"), 0o700)?;
        fs::write(state.of(&id("two")).join("new"), "").unwrap();
        assert!(state.set_aside(&id("two"))?);
        assert!(state.trash(&id("two")).join("new").exists());
        assert!(!state.set_aside(&id("three"))?);
        assert!(state.set_aside(&id("one"))?);
        state.remove(&id("two"))?;
        remove_tree(&state.trash(&id("one")))?;
        assert_eq!(state.list().unwrap(), []);
        Ok(())
    }

    #[test]
    fn a_listing_beside_deletions_does_not_fail() {
        let dir = tempfile::tempdir().unwrap();
        let state = StateDir(dir.path().to_owned());
        let deleting = state.clone();
        let deleter = std::thread::spawn(move || -> Done {
            for round in 0..200 {
                let id = id(&format!("i{round}"));
                deleting.make(&id, 0o700)?;
                deleting.remove(&id)?;
            }
            Ok(())
        });
        while !deleter.is_finished() {
            state.list().unwrap();
        }
        deleter.join().unwrap().unwrap();
    }

    #[test]
    fn a_file_says_what_was_written_last_or_that_it_is_damaged() {
        let dir = tempfile::tempdir().unwrap();
        let dir = Dir::open(dir.path().to_owned()).unwrap();
        assert!(dir.read::<u64>("number").unwrap().is_none());
        dir.write("number", &1).unwrap();
        dir.note("number", &2).unwrap();
        assert_eq!(dir.read::<u64>("number").unwrap(), Some(2));
        dir.empty("number").unwrap();
        assert_eq!(dir.read::<u64>("number"), Err(Problem::Damaged));
        dir.remove("number").unwrap();
        dir.remove("number").unwrap();
        assert!(Dir::open(dir.file("number")).is_err());
    }

    #[test]
    fn a_lock_is_had_once() {
        let dir = tempfile::tempdir().unwrap();
        let dir = Dir::at(dir.path());
        let lock = dir.try_lock("lock").unwrap();
        assert!(lock.is_some() && dir.try_lock("lock").unwrap().is_none());
        drop(lock);
        assert!(dir.try_lock("lock").unwrap().is_some());
    }
}
