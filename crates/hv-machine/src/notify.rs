//! Waiting for changes of files (inotify(7)).

use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::path::Path;
use std::time::Duration;

use rustix::fs::inotify::{self, CreateFlags, WatchFlags};
use tokio::io::unix::AsyncFd;
use tokio::runtime::Handle;

/// How often files are looked at where they cannot be watched.
const LOOK_INTERVAL: Duration = Duration::from_millis(100);

/// A descriptor whose readiness can be awaited.
///
/// # Errors
/// Of a descriptor that cannot be polled, and outside of a runtime.
#[expect(
    deprecated,
    reason = "its successor is unsafe because a type may give away its descriptor; those of this crate do not"
)]
pub fn awaitable<T: AsRawFd>(fd: T) -> io::Result<AsyncFd<T>> {
    AsyncFd::new(fd)
}

/// A watch, which is closed on a thread that may block: the kernel waits until nobody reads its marks, up to 15 ms.
struct Watch(Option<OwnedFd>);

impl AsRawFd for Watch {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_ref().map_or(-1, AsRawFd::as_raw_fd)
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        if let (Some(fd), Ok(runtime)) = (self.0.take(), Handle::try_current()) {
            runtime.spawn_blocking(move || drop(fd));
        }
    }
}

/// Tells when something changes. What exactly is for the caller to look up: notices may be merged or lost.
pub struct Notify {
    watch: AsyncFd<Watch>,
}

impl Notify {
    /// Tells of names that appear in a directory.
    ///
    /// # Errors
    /// Where there is no such directory, or the kernel has no more watches to give. So with the others.
    pub fn entries_of(dir: &Path) -> io::Result<Self> {
        Self::of(&[dir], WatchFlags::CREATE | WatchFlags::MOVED_TO)
    }

    /// Tells of writes to files.
    ///
    /// # Errors
    /// As of [`Self::entries_of`].
    pub fn writes_to(files: &[&Path]) -> io::Result<Self> {
        Self::of(files, WatchFlags::MODIFY)
    }

    /// Tells of writes to files in a directory, and of files that appear in it.
    ///
    /// # Errors
    /// As of [`Self::entries_of`].
    pub fn writes_in(dir: &Path) -> io::Result<Self> {
        Self::of(&[dir], WatchFlags::MODIFY | WatchFlags::CREATE | WatchFlags::MOVED_TO)
    }

    fn of(paths: &[&Path], changes: WatchFlags) -> io::Result<Self> {
        let fd = inotify::init(CreateFlags::NONBLOCK | CreateFlags::CLOEXEC)?;
        for path in paths {
            inotify::add_watch(&fd, *path, changes)?;
        }
        Ok(Self { watch: awaitable(Watch(Some(fd)))? })
    }

    /// Returns after the next change, or at once if there was one since the last call.
    ///
    /// # Errors
    /// If the notices cannot be read.
    pub async fn changed(&self) -> io::Result<()> {
        let mut guard = self.watch.readable().await?;
        let mut notices = [0u8; 4096];
        loop {
            let Some(fd) = &self.watch.get_ref().0 else { return Ok(()) };
            match rustix::io::read(fd, &mut notices) {
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

/// Changes of files, told where the kernel has watches to give, and looked for from time to time where it has none: a
/// user may have few of them (`fs.inotify.max_user_instances`), and a node has many instances.
pub struct Changes(Option<Notify>);

impl Changes {
    /// Those that the watch tells of, if it could be had.
    pub fn of(watch: io::Result<Notify>) -> Self {
        if let Err(error) = &watch {
            tracing::debug!(%error, "files cannot be watched, and are looked at from time to time");
        }
        Self(watch.ok())
    }

    /// Returns after the next change, or sooner.
    pub async fn changed(&self) {
        if let Some(notify) = &self.0
            && notify.changed().await.is_ok()
        {
            return;
        }
        tokio::time::sleep(LOOK_INTERVAL).await;
    }
}
