//! The serial console: what it printed, what it prints, and what is typed into it.
//!
//! # Theory of operation
//! QEMU appends everything the guest prints to `console.log`, whether or not an agent is there. One task per running
//! instance follows that file and hands new pieces to all viewers; because it also hands out the history, a viewer
//! misses nothing and sees nothing twice. The serial socket is used for input only: what arrives on it is in the file
//! too, and is read and dropped so that the guest is never held up.
//!
//! # Caveats
//! The log is cut by copying and truncating. A byte that the guest prints between the two is lost. While no agent
//! runs, nothing cuts it.

use std::fs::{self, File};
use std::io::{self, Read, Seek as _, SeekFrom};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::StreamExt as _;
use futures::stream::{self, BoxStream};
use hv_driver::{Input, Result};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::{broadcast, mpsc, oneshot, watch};
use tokio_util::sync::CancellationToken;

use crate::files::{CONSOLE, CONSOLE_OLD, CONSOLE_SOCKET, InstanceDir};
use crate::notify::Notify;

/// `console.log` is cut when it is longer.
const MAX_LOG_BYTES: u64 = 2 << 20;
/// More than one log ever has.
const ALL_BYTES: u64 = 4 * MAX_LOG_BYTES;
/// How much of what was printed before a console shows.
const HISTORY_BYTES: u64 = 256 << 10;
/// The largest piece handed to viewers.
const PIECE_BYTES: usize = 16 << 10;
/// How many pieces wait for a slow viewer before it loses the oldest.
const VIEWER_QUEUE: usize = 128;
/// How many pieces of input wait for the guest.
const INPUT_QUEUE: usize = 64;
/// How long the guest may take to accept input before it is dropped.
const INPUT_TIMEOUT: Duration = Duration::from_secs(10);

pub(crate) struct Attached {
    pub(crate) history: Vec<u8>,
    pub(crate) live: broadcast::Receiver<Bytes>,
}

/// How much of the past to hand out.
#[derive(Clone, Copy)]
pub(crate) enum History {
    Recent,
    All,
}

/// Reaches the task of one running instance.
#[derive(Clone)]
pub(crate) struct ConsoleHub {
    attach: mpsc::Sender<(History, oneshot::Sender<Attached>)>,
    input: mpsc::Sender<Bytes>,
}

impl ConsoleHub {
    pub(crate) fn start(
        dir: Arc<InstanceDir>,
        ended: watch::Receiver<bool>,
        cancelled: CancellationToken,
    ) -> Self {
        let (attach, attaching) = mpsc::channel(16);
        let (input, typed) = mpsc::channel(INPUT_QUEUE);
        let task = Task { dir, offset: 0, viewers: broadcast::channel(VIEWER_QUEUE).0 };
        tokio::spawn(async move {
            tokio::select! {
                () = cancelled.cancelled() => {}
                () = task.run(attaching, typed, ended) => {}
            }
        });
        Self { attach, input }
    }

    /// `None` if the instance has ended.
    pub(crate) async fn attach(&self, history: History) -> Option<Attached> {
        let (reply, attached) = oneshot::channel();
        self.attach.send((history, reply)).await.ok()?;
        attached.await.ok()
    }

    /// A sender for one viewer. It stays usable after the instance ended; what is typed then goes nowhere.
    pub(crate) fn keyboard(&self) -> mpsc::Sender<Input> {
        let (sender, mut typed) = mpsc::channel(INPUT_QUEUE);
        let input = self.input.clone();
        tokio::spawn(async move {
            while let Some(event) = typed.recv().await {
                if let Input::Data(bytes) = event
                    && input.send(bytes).await.is_err()
                {
                    return;
                }
            }
        });
        sender
    }
}

pub(crate) fn stream_of(attached: Attached) -> BoxStream<'static, Result<Bytes>> {
    let history = (!attached.history.is_empty()).then(|| Ok(Bytes::from(attached.history)));
    let live = stream::unfold(attached.live, |mut live| async {
        loop {
            match live.recv().await {
                Ok(bytes) => return Some((Ok(bytes), live)),
                Err(broadcast::error::RecvError::Lagged(_)) => {}
                Err(broadcast::error::RecvError::Closed) => return None,
            }
        }
    });
    stream::iter(history).chain(live).boxed()
}

/// Everything printed that is kept.
pub(crate) fn printed(dir: &InstanceDir) -> io::Result<Vec<u8>> {
    let recent = read_end(&dir.file(CONSOLE), ALL_BYTES)?;
    let mut text = older(dir, ALL_BYTES)?;
    text.extend_from_slice(&recent);
    Ok(text)
}

/// What was printed before the log was last cut.
fn older(dir: &InstanceDir, limit: u64) -> io::Result<Vec<u8>> {
    for name in CONSOLE_OLD {
        let text = read_end(&dir.file(name), limit)?;
        if !text.is_empty() {
            return Ok(text);
        }
    }
    Ok(Vec::new())
}

fn read_end(path: &Path, limit: u64) -> io::Result<Vec<u8>> {
    let mut file = match File::open(path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        other => other?,
    };
    let length = file.metadata()?.len();
    file.seek(SeekFrom::Start(length.saturating_sub(limit)))?;
    let mut bytes = Vec::new();
    file.take(limit).read_to_end(&mut bytes)?;
    Ok(bytes)
}

struct Task {
    dir: Arc<InstanceDir>,
    /// How much of `console.log` the viewers have got.
    offset: u64,
    viewers: broadcast::Sender<Bytes>,
}

impl Task {
    async fn run(
        mut self,
        mut attaching: mpsc::Receiver<(History, oneshot::Sender<Attached>)>,
        mut typed: mpsc::Receiver<Bytes>,
        mut ended: watch::Receiver<bool>,
    ) {
        let log = self.dir.file(CONSOLE);
        // The directory, because virtlogd puts another file in the log's place.
        let notify = match Notify::writes_in(&self.dir.path) {
            Ok(notify) => notify,
            Err(error) => {
                return tracing::warn!(%error, dir = %self.dir.path.display(), "the console cannot be followed");
            }
        };
        // What is there already is history.
        self.offset = fs::metadata(&log).map_or(0, |file| file.len());
        let mut socket = self.connect().await;
        loop {
            let outcome = tokio::select! {
                changed = notify.changed() => changed.and_then(|()| self.forward()),
                request = attaching.recv() => match request {
                    Some((history, reply)) => self.attach(history, reply),
                    None => return,
                },
                Some(bytes) = typed.recv() => {
                    if socket.is_none() {
                        socket = self.connect().await;
                    }
                    if let Some((_, keyboard)) = &mut socket
                        && !matches!(tokio::time::timeout(INPUT_TIMEOUT, keyboard.write_all(&bytes)).await, Ok(Ok(())))
                    {
                        socket = None;
                    }
                    Ok(())
                }
                () = drain(socket.as_mut().map(|(screen, _)| screen)) => {
                    socket = None;
                    Ok(())
                }
                () = end_of(&mut ended) => {
                    if let Err(error) = self.forward() {
                        tracing::warn!(%error, dir = %self.dir.path.display(), "the end of the console cannot be read");
                    }
                    return;
                }
            };
            if let Err(error) = outcome {
                tracing::warn!(%error, dir = %self.dir.path.display(), "the console cannot be read");
            }
        }
    }

    async fn connect(&self) -> Option<(OwnedReadHalf, OwnedWriteHalf)> {
        let connected = UnixStream::connect(self.dir.file(CONSOLE_SOCKET)).await;
        connected.ok().map(UnixStream::into_split)
    }

    fn attach(&mut self, history: History, reply: oneshot::Sender<Attached>) -> io::Result<()> {
        self.forward()?;
        let limit = match history {
            History::Recent => HISTORY_BYTES,
            History::All => ALL_BYTES,
        };
        // Up to where the viewers are and no further: the rest comes to this one as it comes to the others.
        let mut recent = Vec::new();
        let mut log = File::open(self.dir.file(CONSOLE))?;
        let start = self.offset.saturating_sub(limit);
        log.seek(SeekFrom::Start(start))?;
        log.take(self.offset - start).read_to_end(&mut recent)?;
        let mut history = older(&self.dir, limit.saturating_sub(recent.len() as u64))?;
        history.append(&mut recent);
        // Whoever asked may be gone.
        let _ = reply.send(Attached { history, live: self.viewers.subscribe() });
        Ok(())
    }

    /// Hands on what was printed since the last time, and keeps the logs within their bounds.
    fn forward(&mut self) -> io::Result<()> {
        let mut log = match File::open(self.dir.file(CONSOLE)) {
            // Just being replaced.
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
            other => other?,
        };
        if log.metadata()?.len() < self.offset {
            self.offset = 0;
        }
        log.seek(SeekFrom::Start(self.offset))?;
        let mut piece = vec![0; PIECE_BYTES];
        loop {
            let length = log.read(&mut piece)?;
            if length == 0 {
                break;
            }
            self.offset += length as u64;
            // Nobody watching is no error.
            let _ = self.viewers.send(Bytes::copy_from_slice(&piece[..length]));
        }
        if self.offset > MAX_LOG_BYTES {
            self.cut()?;
        }
        Ok(())
    }

    fn cut(&mut self) -> io::Result<()> {
        let partial = self.dir.file("console.log.partial");
        fs::copy(self.dir.file(CONSOLE), &partial)?;
        fs::rename(partial, self.dir.file(CONSOLE_OLD[1]))?;
        fs::OpenOptions::new().append(true).open(self.dir.file(CONSOLE))?.set_len(0)?;
        self.offset = 0;
        Ok(())
    }
}

/// Returns when the machine has ended.
pub(crate) async fn end_of(ended: &mut watch::Receiver<bool>) {
    // If the sender is gone nobody will say it any more, and that is an end too.
    let _ = ended.wait_for(|ended| *ended).await;
}

/// Reads and drops what arrives; returns when the other side hangs up, never if there is none.
async fn drain(screen: Option<&mut OwnedReadHalf>) {
    let Some(screen) = screen else { return std::future::pending().await };
    let mut dropped = [0; 4096];
    while let Ok(1..) = screen.read(&mut dropped).await {}
}
