//! What is typed on the serial port: written to the pipe that is Firecracker's standard input.
//!
//! # Theory of operation
//! The pipe is opened for each piece and closed after it: whoever has it open could be taken for the VMM by one who
//! fences thoroughly. Opening fails when nobody reads, which is when the VMM is gone.

use std::fs::File;
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};
use std::time::Duration;

use bytes::Bytes;
use rustix::fs::{Mode, OFlags};
use tokio::sync::mpsc;

/// How long the guest may take to accept input before the rest of it is dropped.
const INPUT_TIMEOUT: Duration = Duration::from_secs(10);
/// How often a full pipe is tried again: it cannot be waited on without staying open.
const RETRY_INTERVAL: Duration = Duration::from_millis(10);
/// The largest piece that a pipe takes whole or not at all (`PIPE_BUF`, pipe(7)).
const PIECE_BYTES: usize = 4096;

/// Types what the viewers type, in turn.
pub(crate) async fn pass_on(lock: PathBuf, mut typed: mpsc::Receiver<Bytes>) {
    while let Some(bytes) = typed.recv().await {
        if let Err(error) = write(&lock, &bytes).await {
            tracing::debug!(%error, lock = %lock.display(), "input was dropped");
        }
    }
}

/// Types.
async fn write(lock: &Path, bytes: &[u8]) -> io::Result<()> {
    let deadline = tokio::time::Instant::now() + INPUT_TIMEOUT;
    for piece in bytes.chunks(PIECE_BYTES) {
        loop {
            match write_now(lock, piece) {
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
                other => break other?,
            }
            if tokio::time::Instant::now() > deadline {
                return Err(io::Error::from(io::ErrorKind::TimedOut));
            }
            tokio::time::sleep(RETRY_INTERVAL).await;
        }
    }
    Ok(())
}

fn write_now(lock: &Path, piece: &[u8]) -> io::Result<()> {
    let flags = OFlags::WRONLY | OFlags::NONBLOCK | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    File::from(rustix::fs::open(lock, flags, Mode::empty())?).write_all(piece)
}
