//! The serial console: what it printed, what it prints, and what is typed into it.
//!
//! # Theory of operation
//! Firecracker's standard output is `console.log`, opened for appending: what the guest prints is there whether or not an
//! agent is. One task per running instance follows that file and hands new pieces to all viewers; because it also hands
//! out the history, a viewer misses nothing and sees nothing twice. Input goes another way: see `keyboard`.
//!
//! # Caveats
//! The log is cut by copying and truncating. A byte that the guest prints between the two is lost. While no agent
//! runs, nothing cuts it.

use std::fs::{self, File};
use std::io::{self, Read, Seek as _, SeekFrom};
use std::path::Path;
use std::sync::Arc;

use bytes::Bytes;
use futures::StreamExt as _;
use futures::stream::{self, BoxStream};
use hv_driver::{Input, Result};
use tokio::sync::{broadcast, mpsc, oneshot, watch};
use tokio_util::sync::CancellationToken;

use crate::files::{CONSOLE, CONSOLE_OLD, InstanceDir, LOCK, STDERR};
use crate::keyboard;
use crate::notify::Notify;

/// `console.log` is cut when it is longer.
const MAX_LOG_BYTES: u64 = 2 << 20;
/// Its complaints are emptied when they are longer.
const MAX_SIDE_LOG_BYTES: u64 = 1 << 20;
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
        let lock = dir.file(LOCK);
        let task = Task { dir, offset: 0, viewers: broadcast::channel(VIEWER_QUEUE).0 };
        let also_cancelled = cancelled.clone();
        tokio::spawn(async move {
            tokio::select! {
                () = cancelled.cancelled() => {}
                () = task.run(attaching, ended) => {}
            }
        });
        // A guest that takes no input must not hold up its output.
        tokio::spawn(async move {
            tokio::select! {
                () = also_cancelled.cancelled() => {}
                () = pass_on(lock, typed) => {}
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
    let mut text = read_end(&dir.file(CONSOLE_OLD), ALL_BYTES)?;
    text.extend_from_slice(&recent);
    Ok(text)
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
        mut ended: watch::Receiver<bool>,
    ) {
        let watched = [CONSOLE, STDERR].map(|name| self.dir.file(name));
        let notify = match Notify::writes_to(&[&watched[0], &watched[1]]) {
            Ok(notify) => notify,
            Err(error) => {
                return tracing::warn!(%error, dir = %self.dir.path.display(), "the console cannot be followed");
            }
        };
        // What is there already is history.
        self.offset = fs::metadata(&watched[0]).map_or(0, |file| file.len());
        loop {
            let outcome = tokio::select! {
                changed = notify.changed() => changed.and_then(|()| self.forward()),
                request = attaching.recv() => match request {
                    Some((history, reply)) => self.attach(history, reply),
                    None => return,
                },
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
        let mut history = read_end(&self.dir.file(CONSOLE_OLD), limit.saturating_sub(recent.len() as u64))?;
        history.append(&mut recent);
        // Whoever asked may be gone.
        let _ = reply.send(Attached { history, live: self.viewers.subscribe() });
        Ok(())
    }

    /// Hands on what was printed since the last time, and keeps the logs within their bounds.
    fn forward(&mut self) -> io::Result<()> {
        let mut log = File::open(self.dir.file(CONSOLE))?;
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
        let complaints = self.dir.file(STDERR);
        if fs::metadata(&complaints).is_ok_and(|file| file.len() > MAX_SIDE_LOG_BYTES) {
            fs::OpenOptions::new().append(true).open(&complaints)?.set_len(0)?;
        }
        Ok(())
    }

    fn cut(&mut self) -> io::Result<()> {
        let partial = self.dir.file("console.log.partial");
        fs::copy(self.dir.file(CONSOLE), &partial)?;
        fs::rename(partial, self.dir.file(CONSOLE_OLD))?;
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

/// Types what the viewers type, in turn.
async fn pass_on(lock: std::path::PathBuf, mut typed: mpsc::Receiver<Bytes>) {
    while let Some(bytes) = typed.recv().await {
        if let Err(error) = keyboard::write(&lock, &bytes).await {
            tracing::debug!(%error, lock = %lock.display(), "input was dropped");
        }
    }
}
