//! The agent's side of the conversation with the fencer's process: finds it, starts it, talks to it.
//!
//! # Theory of operation
//! The fencer listens on a unix socket in the state directory. A message is its length, four bytes with the lowest
//! first, and then JSON; each is answered before the next is sent. The fencer's standard input is its lock file, locked
//! for as long as it lives, so that there is one for each state directory, and so that one that hangs can be killed as
//! an instance is.

use std::fs::OpenOptions;
use std::io;
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use async_trait::async_trait;
use hv_driver::FenceTarget;
use hv_driver::fence::{self, Zeal};
use hv_types::InstanceId;
use serde::Serialize;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::UnixStream;
use tokio::time::Instant;

use super::core::{Message, PROTOCOL, Reply, Standing};
use super::marks::Marks;
use super::{LOCK, Link, Port};

/// The fencer's socket.
pub(super) const SOCKET: &str = "fencer.sock";
/// What it says.
const LOG: &str = "fencer.log";
/// A log longer than this is begun anew with the next fencer.
const MAX_LOG_BYTES: u64 = 1 << 20;
/// Longest message: an account of as many instances as a node can have.
pub(super) const MAX_MESSAGE_BYTES: usize = 4 << 20;
/// How long the fencer may take to answer: longer, and it is of no use.
const ANSWER_TIMEOUT: Duration = Duration::from_millis(500);
/// How long it may take to answer the first message: longer, and it is killed. Long, because a busy machine is no reason.
const HELLO_TIMEOUT: Duration = Duration::from_secs(2);
/// How long it may take to be there.
const OPEN_TIMEOUT: Duration = Duration::from_secs(5);
/// The least time between two attempts to start one.
const SPAWN_EVERY: Duration = Duration::from_millis(250);
/// How often its socket is tried meanwhile; nothing announces it.
const OPEN_RETRY: Duration = Duration::from_millis(10);

/// A message as it travels.
pub(super) fn frame(message: &impl Serialize) -> io::Result<Vec<u8>> {
    let mut bytes = vec![0; 4];
    serde_json::to_writer(&mut bytes, message)?;
    let length = u32::try_from(bytes.len() - 4).unwrap_or(u32::MAX);
    if length as usize > MAX_MESSAGE_BYTES {
        return Err(io::Error::other("the message is too long"));
    }
    bytes[..4].copy_from_slice(&length.to_le_bytes());
    Ok(bytes)
}

/// How long the message is whose first four bytes these are.
pub(super) fn length(head: [u8; 4]) -> io::Result<usize> {
    let length = u32::from_le_bytes(head) as usize;
    if length > MAX_MESSAGE_BYTES {
        return Err(io::Error::other(format!("a message of {length} bytes")));
    }
    Ok(length)
}

/// A directory, to name what is in it by paths that are short enough for sockets (unix(7)).
pub(super) fn open_dir(dir: &Path) -> io::Result<OwnedFd> {
    use rustix::fs::{Mode, OFlags};
    std::fs::DirBuilder::new().recursive(true).mode(0o700).create(dir)?;
    Ok(rustix::fs::open(dir, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?)
}

/// The socket's path, good in this process as long as the directory is open.
pub(super) fn socket_path(dir: &OwnedFd) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{}/{SOCKET}", dir.as_raw_fd()))
}

/// The fencer's process of one state directory.
pub(super) struct ProcessPort {
    program: PathBuf,
    state_dir: PathBuf,
    dir: PathBuf,
    marks: Marks,
}

impl ProcessPort {
    pub(super) fn new(program: &Path, state_dir: &Path) -> Self {
        Self {
            program: program.to_owned(),
            state_dir: state_dir.to_owned(),
            dir: state_dir.join(super::DIRECTORY),
            marks: Marks::of(state_dir),
        }
    }

    fn spawn(&self) -> io::Result<tokio::process::Child> {
        let open = |name: &str| {
            OpenOptions::new().create(true).append(true).read(true).mode(0o600).open(self.dir.join(name))
        };
        let (lock, log) = (open(LOCK)?, open(LOG)?);
        if log.metadata()?.len() > MAX_LOG_BYTES {
            log.set_len(0)?;
        }
        let mut command = tokio::process::Command::new(&self.program);
        command.arg("fencer").arg("--state-dir").arg(&self.state_dir).env_clear();
        command.stdin(Stdio::from(lock)).stdout(Stdio::null()).stderr(Stdio::from(log));
        command.kill_on_drop(false).spawn()
    }

    async fn connect(&self) -> io::Result<UnixStream> {
        let dir = open_dir(&self.dir)?;
        UnixStream::connect(socket_path(&dir)).await
    }

    /// Gets rid of a fencer that does not answer.
    async fn end(&self) {
        let target = FenceTarget::LockHolder { path: self.dir.join(LOCK) };
        let killed = tokio::task::spawn_blocking(move || fence::kill(&target, Zeal::Instance)).await;
        tracing::warn!(outcome = ?killed.ok(), "the fencer does not answer and was killed");
    }

    async fn try_open(&self, agent: &str) -> Result<(Box<dyn Link>, Standing), String> {
        let deadline = Instant::now() + OPEN_TIMEOUT;
        let mut child: Option<(tokio::process::Child, Instant)> = None;
        loop {
            if let Ok(stream) = self.connect().await {
                let mut link = ProcessLink { stream };
                let hello = Message::Hello { protocol: PROTOCOL, agent: agent.to_owned() };
                match link.tell_within(HELLO_TIMEOUT, hello).await {
                    Ok(Reply::Standing(standing)) => return Ok((Box::new(link), standing)),
                    Ok(other) => return Err(format!("the fencer gave no account of itself: {other:?}")),
                    Err(_) => self.end().await,
                }
            }
            if Instant::now() > deadline {
                let dir = self.dir.display();
                return Err(format!("the fencer does not start within {OPEN_TIMEOUT:?}; see {dir}/{LOG}"));
            }
            let has_ended = match &mut child {
                Some((child, since)) => {
                    matches!(child.try_wait(), Ok(Some(_))) && since.elapsed() >= SPAWN_EVERY
                }
                None => true,
            };
            if has_ended {
                let spawned = self.spawn().map_err(|e| format!("the fencer cannot be started: {e}"))?;
                child = Some((spawned, Instant::now()));
            }
            tokio::time::sleep(OPEN_RETRY).await;
        }
    }
}

#[async_trait]
impl Port for ProcessPort {
    async fn open(&self, agent: &str) -> Result<(Box<dyn Link>, Standing), String> {
        open_dir(&self.dir).map_err(|e| format!("{} cannot be used: {e}", self.dir.display()))?;
        self.try_open(agent).await
    }

    fn is_marked(&self, id: &InstanceId) -> bool {
        self.marks.is_marked(id)
    }

    fn mark(&self, id: &InstanceId) {
        if let Err(error) = self.marks.mark(id, "agent") {
            tracing::warn!(instance = %id, %error, "that it was fenced could not be written down");
        }
    }

    fn unmark(&self, id: &InstanceId) {
        self.marks.unmark(id);
    }
}

/// A connection to the fencer's process.
struct ProcessLink {
    stream: UnixStream,
}

impl ProcessLink {
    async fn exchange(&mut self, message: &Message) -> io::Result<Reply> {
        self.stream.write_all(&frame(message)?).await?;
        let mut head = [0; 4];
        self.stream.read_exact(&mut head).await?;
        let mut body = vec![0; length(head)?];
        self.stream.read_exact(&mut body).await?;
        Ok(serde_json::from_slice(&body)?)
    }

    async fn tell_within(&mut self, timeout: Duration, message: Message) -> Result<Reply, String> {
        match tokio::time::timeout(timeout, self.exchange(&message)).await {
            Ok(Ok(reply)) => Ok(reply),
            Ok(Err(error)) => Err(format!("the fencer is gone: {error}")),
            Err(_) => Err(format!("the fencer does not answer within {timeout:?}")),
        }
    }
}

#[async_trait]
impl Link for ProcessLink {
    async fn tell(&mut self, message: Message) -> Result<Reply, String> {
        self.tell_within(ANSWER_TIMEOUT, message).await
    }

    async fn closed(&mut self) {
        // Nothing is said that was not asked for: whatever comes here is the end.
        let _ = self.stream.read_u8().await;
    }
}
