//! Waiting for changes of files (inotify(7)).

use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;

use rustix::fs::inotify::{self, CreateFlags, WatchFlags};
use tokio::io::unix::AsyncFd;

/// A descriptor whose readiness can be awaited.
#[expect(
    deprecated,
    reason = "its successor is unsafe because a type may give away its descriptor; OwnedFd does not"
)]
pub(crate) fn awaitable(fd: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    AsyncFd::new(fd)
}

/// Tells when something changes. What exactly is for the caller to look up: notices may be merged or lost.
pub(crate) struct Notify {
    fd: AsyncFd<OwnedFd>,
}

impl Notify {
    /// Tells of writes to files.
    pub(crate) fn writes_to(files: &[&Path]) -> io::Result<Self> {
        let fd = inotify::init(CreateFlags::NONBLOCK | CreateFlags::CLOEXEC)?;
        for file in files {
            inotify::add_watch(&fd, *file, WatchFlags::MODIFY)?;
        }
        Ok(Self { fd: awaitable(fd)? })
    }

    /// Returns after the next change, or at once if there was one since the last call.
    pub(crate) async fn changed(&self) -> io::Result<()> {
        let mut guard = self.fd.readable().await?;
        let mut notices = [0u8; 4096];
        loop {
            match rustix::io::read(self.fd.get_ref(), &mut notices) {
                Ok(_) => {}
                Err(rustix::io::Errno::AGAIN) => {
                    guard.clear_ready();
                    return Ok(());
                }
                Err(e) => return Err(e.into()),
            }
        }
    }
}
