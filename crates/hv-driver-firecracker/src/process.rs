//! The Firecracker process, by the lock that it holds: see [`Process`].
//!
//! # Theory of operation
//! The lock is a pipe, opened for reading and writing, which the jailer hands on when it becomes Firecracker. Firecracker
//! reads the serial port's input from the same pipe: see `keyboard`.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileTypeExt as _;

use hv_machine::process::Process;
use rustix::fs::{CWD, FileType, FlockOperation, Mode, OFlags};

use crate::files::{InstanceDir, LOCK};
use crate::problem::{Outcome, Problem};

/// The lock, taken; `None` if a VMM has it.
pub(crate) fn try_lock(dir: &InstanceDir) -> Outcome<Option<File>> {
    let path = dir.file(LOCK);
    let failed = |e: rustix::io::Errno| Problem::file("lock", &path)(e.into());
    match rustix::fs::mknodat(CWD, &path, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0) {
        Err(e) if e != rustix::io::Errno::EXIST => return Err(failed(e)),
        _ => {}
    }
    // Opened for both, so that the guest never reads the end of its input, and the opening does not wait.
    let flags = OFlags::RDWR | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    let file = File::from(rustix::fs::open(&path, flags, Mode::empty()).map_err(failed)?);
    let kind = file.metadata().map_err(Problem::file("look at", &path))?.file_type();
    if !kind.is_fifo() {
        return Err(Problem::file("lock", &path)(io::Error::other("it is no pipe")));
    }
    match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(Some(file)),
        Err(rustix::io::Errno::WOULDBLOCK) => Ok(None),
        Err(e) => Err(failed(e)),
    }
}

/// The process that holds an instance's lock; `None` if the lock is free by now.
pub(crate) async fn find(dir: &InstanceDir) -> Outcome<Option<Process>> {
    let is_free = || Ok(try_lock(dir)?.is_some());
    Process::find(&dir.file(LOCK), || None, is_free, || Problem::Unfindable(dir.file(LOCK))).await
}
