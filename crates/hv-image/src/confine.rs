//! Runs a program over hostile files: no network, no other processes in sight, no privileges to gain,
//! bounded memory,
//! processor time, output and patience.
//!
//! # Theory of operation
//! Small programs of util-linux that are each given the rest of the command line, never a shell: `unshare`
//! (own network,
//! IPC and process namespaces), `prlimit`, `setpriv`. `qemu-img` gets its files as descriptors 0 and 1 and
//! names them
//! `/proc/self/fd/0` and `/proc/self/fd/1`, so that it need not be able to enter the store, or any
//! directory. Where the
//! store is root's, it runs with user and group ids that own nothing and without capabilities; else in a
//! user namespace
//! of its own.

use std::ffi::OsString;
use std::path::Path;
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt as _};
use tokio::process::Command;
use tokio_util::sync::CancellationToken;

use crate::layout::Layout;
use crate::{ImageError, Result};

/// Most that is kept of what a program says.
const MAX_SAID_BYTES: usize = 64 << 10;
/// Most of it that an error repeats, in characters.
const MAX_REPEATED_CHARS: usize = 300;
/// How often the disk is looked at while a program writes.
const LOOK_EVERY: Duration = Duration::from_millis(200);
/// Most files that a program may have open.
const MAX_FILES: u32 = 64;

/// What a program may do.
pub(crate) struct Confined<'a> {
    pub(crate) image: &'a str,
    /// For messages.
    pub(crate) name: &'static str,
    pub(crate) program: &'a Path,
    pub(crate) args: Vec<OsString>,
    pub(crate) stdin: Stdio,
    /// `None`: what it prints is the answer.
    pub(crate) stdout: Option<Stdio>,
    /// Who it is where the store is root's.
    pub(crate) identity: Identity,
    pub(crate) memory_bytes: u64,
    pub(crate) file_bytes: u64,
    pub(crate) timeout: Duration,
}

/// Who a program is where the store is root's.
#[derive(Clone, Copy)]
pub(crate) enum Identity {
    /// Ids that own nothing, no capabilities.
    Nobody(u32, u32),
    /// Root that may read every file, and nothing more.
    Reader,
}

/// What a program said, and how it ended.
pub(crate) struct Finished {
    pub(crate) status: ExitStatus,
    pub(crate) stdout: Vec<u8>,
    pub(crate) stderr: Vec<u8>,
}

impl Confined<'_> {
    /// Runs it. Ends it when it takes too long, when `cancel` says so, and when the disk of the store is
    /// nearly full.
    pub(crate) async fn run(self, space: (&Layout, u64), cancel: &CancellationToken) -> Result<Finished> {
        let (image, name, timeout) = (self.image, self.name, self.timeout);
        let failed = |reason: String| ImageError::Tool { image: image.to_owned(), program: name, reason };
        let program = self.program.to_owned();
        let mut child = self.command().spawn().map_err(ImageError::io("start unshare for", program))?;
        let mut watch = tokio::time::interval(LOOK_EVERY);
        let deadline = tokio::time::sleep(timeout);
        let (out, err) = (child.stdout.take(), child.stderr.take());
        let work = async { tokio::join!(said(out), said(err), child.wait()) };
        tokio::pin!(work, deadline);
        // Dropping the child kills unshare, and with it, through --kill-child, all of its namespace.
        loop {
            tokio::select! {
                (stdout, stderr, status) = &mut work => {
                    let status = status.map_err(ImageError::io("wait for", name))?;
                    return Ok(Finished { status, stdout, stderr });
                }
                () = cancel.cancelled() => return Err(ImageError::Cancelled { image: image.to_owned() }),
                () = &mut deadline => return Err(failed(format!("it took longer than {} s", timeout.as_secs()))),
                _ = watch.tick() => {
                    let (free_bytes, min_free_bytes) = (space.0.free_bytes()?, space.1);
                    if free_bytes < min_free_bytes {
                        return Err(ImageError::NoSpace { image: image.to_owned(), free_bytes, min_free_bytes });
                    }
                }
            }
        }
    }

    fn command(self) -> Command {
        let is_root = rustix::process::geteuid().is_root();
        let mut command = Command::new("unshare");
        if !is_root {
            command.args(["--user", "--map-root-user"]);
        }
        command.args(["--net", "--ipc", "--pid", "--fork", "--kill-child", "--", "prlimit", "--core=0"]);
        command.arg(format!("--as={}", self.memory_bytes));
        command.arg(format!("--cpu={}", self.timeout.as_secs().max(1)));
        command.arg(format!("--fsize={}", self.file_bytes));
        command.arg(format!("--nofile={MAX_FILES}"));
        command.args(["--", "setpriv", "--no-new-privs"]);
        match self.identity {
            Identity::Nobody(user, group) if is_root => {
                command.arg(format!("--reuid={user}")).arg(format!("--regid={group}"));
                command.args(["--clear-groups", "--inh-caps=-all", "--bounding-set=-all"]);
            }
            Identity::Reader if is_root => {
                command.args(["--inh-caps=-all", "--bounding-set=-all,+dac_read_search"]);
            }
            Identity::Nobody(..) | Identity::Reader => {}
        }
        command.arg("--").arg(self.program).args(self.args);
        command.env_clear().env("LANG", "C").env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin").current_dir("/");
        command.stdin(self.stdin).stdout(self.stdout.unwrap_or_else(Stdio::piped)).stderr(Stdio::piped());
        command.kill_on_drop(true);
        command
    }
}

impl Finished {
    /// An error if it did not end well, with what it said.
    pub(crate) fn check(&self, image: &str, program: &'static str) -> Result<()> {
        if self.status.success() {
            return Ok(());
        }
        let said = String::from_utf8_lossy(&self.stderr);
        let said: String =
            said.trim().chars().take(MAX_REPEATED_CHARS).flat_map(char::escape_debug).collect();
        let reason = match said.is_empty() {
            true => format!("it ended with {}", self.status),
            false => format!("{said} ({})", self.status),
        };
        Err(ImageError::Tool { image: image.to_owned(), program, reason })
    }
}

/// Reads all that a program says, and keeps the beginning.
async fn said(pipe: Option<impl AsyncRead + Unpin>) -> Vec<u8> {
    let mut kept = Vec::new();
    let Some(mut pipe) = pipe else { return kept };
    let mut buffer = [0; 4096];
    while let Ok(count @ 1..) = pipe.read(&mut buffer).await {
        let room = MAX_SAID_BYTES.saturating_sub(kept.len()).min(count);
        kept.extend_from_slice(&buffer[..room]);
    }
    kept
}
