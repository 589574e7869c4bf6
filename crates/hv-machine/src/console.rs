//! The serial console of a machine: what it printed, what it prints, and what is typed into it.
//!
//! # Theory of operation
//! Whoever runs the machine appends everything that the guest prints to `console.log`, whether or not an agent is there.
//! One task per running instance follows that file and hands new pieces to all viewers; because it also hands out the
//! history, a viewer misses nothing and sees nothing twice. It keeps the log within its bound, and in mind when which
//! part of it was printed. Input has a task of its own, so that neither waits for the other.
//!
//! # Caveats
//! The log is cut by copying and emptying. A byte that the guest prints in the instant between is lost. While no agent
//! runs, nothing cuts it, and of what was printed then only the last time is known.

use std::fs::{self, File, Metadata};
use std::io;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use futures::StreamExt as _;
use futures::stream::{self, BoxStream};
use hv_driver::{Input, LogRequest, Result, log};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::UnixStream;
use tokio::net::unix::OwnedReadHalf;
use tokio::sync::{broadcast, mpsc, oneshot, watch};
use tokio_util::sync::CancellationToken;

use crate::heard::heard;
use crate::log::{Log, Places, Tail, Times, ms_of, read_from};
use crate::notify::{Changes, Notify};

/// `console.log` is cut when it is longer.
const MAX_LOG_BYTES: u64 = 2 << 20;
/// Other logs are emptied when they are longer.
const MAX_SIDE_LOG_BYTES: u64 = 1 << 20;
/// More than a log ever has.
const ALL_BYTES: u64 = 4 * MAX_LOG_BYTES;
/// How much of what was printed before a console shows.
const HISTORY_BYTES: u64 = 256 << 10;
/// How many pieces wait for a slow viewer before it loses the oldest.
const VIEWER_QUEUE: usize = 128;
/// How many viewers wait to be attached.
const ATTACH_QUEUE: usize = 16;
/// How many pieces of input wait for the guest.
const INPUT_QUEUE: usize = 64;
/// File systems keep times less exactly than clocks tell them.
const CLOCK_STEP: Duration = Duration::from_secs(1);
/// How long the guest may take to accept input before it is dropped.
const INPUT_TIMEOUT: Duration = Duration::from_secs(10);

/// What a console or a log gives.
pub type Output = BoxStream<'static, Result<Bytes>>;

/// What there is of a console on disk.
#[derive(Clone, Debug)]
pub struct Screen {
    /// What the guest prints.
    pub log: Log,
    /// Whether somebody else puts another file in the log's place when it is long.
    pub is_replaced: bool,
    /// Other logs beside it, which are there and are to have a bound.
    pub side_logs: Vec<PathBuf>,
}

struct Attached {
    history: Vec<u8>,
    live: broadcast::Receiver<Bytes>,
}

impl Attached {
    fn output(self) -> Output {
        at_once(self.history).chain(heard(self.live).map(Ok)).boxed()
    }
}

/// How much of the past to hand out.
#[derive(Clone, Copy)]
enum History {
    Recent,
    Since(Option<SystemTime>),
}

type Attaching = (History, oneshot::Sender<Attached>);

/// Reaches the tasks of one running instance.
#[derive(Clone)]
pub struct ConsoleHub {
    attach: mpsc::Sender<Attaching>,
    input: mpsc::Sender<Bytes>,
}

impl ConsoleHub {
    /// Follows what is printed, and has `keyboard` pass on what is typed, until the machine has ended or the driver is
    /// gone.
    pub fn start<F: Future<Output = ()> + Send + 'static>(
        screen: Screen,
        keyboard: impl FnOnce(mpsc::Receiver<Bytes>) -> F,
        ended: watch::Receiver<bool>,
        cancelled: CancellationToken,
    ) -> Self {
        let (attach, attaching) = mpsc::channel(ATTACH_QUEUE);
        let (input, typed) = mpsc::channel(INPUT_QUEUE);
        let keyboard = keyboard(typed);
        let (mut also_ended, also_cancelled) = (ended.clone(), cancelled.clone());
        tokio::spawn(async move {
            tokio::select! {
                () = cancelled.cancelled() => {}
                () = follow(screen, attaching, ended) => {}
            }
        });
        tokio::spawn(async move {
            tokio::select! {
                () = also_cancelled.cancelled() => {}
                () = end_of(&mut also_ended) => {}
                () = keyboard => {}
            }
        });
        Self { attach, input }
    }

    async fn attach(&self, history: History) -> Option<Attached> {
        let (reply, attached) = oneshot::channel();
        self.attach.send((history, reply)).await.ok()?;
        attached.await.ok()
    }

    /// For one viewer: what was printed lately, and what is printed until the instance ends. `None` if it has ended.
    pub async fn view(&self) -> Option<Output> {
        self.attach(History::Recent).await.map(Attached::output)
    }

    /// A sender for one viewer. It stays usable after the instance ended; what is typed then goes nowhere.
    #[must_use]
    pub fn keyboard(&self) -> mpsc::Sender<Input> {
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

fn at_once(text: Vec<u8>) -> Output {
    stream::iter((!text.is_empty()).then(|| Ok(Bytes::from(text)))).boxed()
}

/// A log, as far as it is asked for: never less than that. `hub`: that of the instance, if it runs; it alone knows more
/// of times than when a file was written last, and goes on with what comes.
///
/// # Errors
/// If the log cannot be read.
pub async fn logs(log: &Log, hub: Option<&ConsoleHub>, request: LogRequest) -> io::Result<Output> {
    let attached = match hub {
        Some(hub) => hub.attach(History::Since(request.since)).await,
        None => None,
    };
    let (mut text, live) = match attached {
        Some(attached) => (attached.history, Some(attached.live)),
        None => (printed(log, request.since)?, None),
    };
    if let Some(lines) = request.tail_lines {
        text = text.split_off(text.len() - log::last_lines(&text, lines).len());
    }
    Ok(match live.filter(|_| request.follow) {
        Some(live) => Attached { history: text, live }.output(),
        None => at_once(text),
    })
}

/// Until when a file may have been written, in milliseconds since 1970.
fn written_ms(about: &Metadata) -> u64 {
    about.modified().map_or(u64::MAX, |time| ms_of(time + CLOCK_STEP))
}

/// Everything printed that is kept: a file of it whole, or, if it is older than asked for, not at all.
fn printed(log: &Log, since: Option<SystemTime>) -> io::Result<Vec<u8>> {
    let begin = |about: &Metadata| {
        let is_wanted = since.is_none_or(|since| written_ms(about) >= ms_of(since));
        is_wanted.then(|| about.len().saturating_sub(ALL_BYTES))
    };
    let mut text = log.read(|old, log| Places {
        old: old.and_then(begin),
        log: log.map_or(0, |about| begin(about).unwrap_or(about.len())),
    })?;
    if text.log.starts_with(&text.old) {
        // An agent that died while it cut the log had copied it, and not emptied it yet.
        text.old.clear();
    }
    Ok(text.joined().0)
}

struct Follower {
    screen: Screen,
    tail: Tail,
    /// Times of the log, and of what it had before it was cut.
    times: Times,
    old_times: Times,
    viewers: broadcast::Sender<Bytes>,
}

async fn follow(screen: Screen, mut attaching: mpsc::Receiver<Attaching>, mut ended: watch::Receiver<bool>) {
    let dir = screen.log.dir().to_owned();
    let changes = Changes::of(watch_for(&screen));
    let mut follower = match Follower::new(screen) {
        Ok(follower) => follower,
        Err(error) => {
            return tracing::warn!(%error, dir = %dir.display(), "the console cannot be followed");
        }
    };
    loop {
        let outcome = tokio::select! {
            () = changes.changed() => follower.forward(),
            request = attaching.recv() => match request {
                Some((history, reply)) => follower.attach(history, reply),
                None => return,
            },
            () = end_of(&mut ended) => {
                if let Err(error) = follower.forward() {
                    tracing::warn!(%error, dir = %dir.display(), "the end of the console cannot be read");
                }
                return;
            }
        };
        if let Err(error) = outcome {
            tracing::warn!(%error, dir = %dir.display(), "the console cannot be read");
        }
    }
}

fn watch_for(screen: &Screen) -> io::Result<Notify> {
    if screen.is_replaced {
        return Notify::writes_in(screen.log.dir());
    }
    let log = screen.log.path();
    let files: Vec<&Path> =
        [log.as_path()].into_iter().chain(screen.side_logs.iter().map(PathBuf::as_path)).collect();
    Notify::writes_to(&files)
}

impl Follower {
    fn new(screen: Screen) -> io::Result<Self> {
        let old = screen.log.older(None)?.map(|file| file.metadata()).transpose()?;
        let times_of = |about: Option<&Metadata>| {
            about.map_or_else(Times::default, |about| Times::of_whole(written_ms(about)))
        };
        let about = fs::metadata(screen.log.path()).ok();
        Ok(Self {
            // What is there already is history.
            tail: Tail::at_end(&screen.log)?,
            times: times_of(about.as_ref()),
            old_times: times_of(old.as_ref()),
            viewers: broadcast::channel(VIEWER_QUEUE).0,
            screen,
        })
    }

    fn attach(&mut self, history: History, reply: oneshot::Sender<Attached>) -> io::Result<()> {
        self.forward()?;
        let history = self.history(history)?;
        // Whoever asked may be gone.
        let _ = reply.send(Attached { history, live: self.viewers.subscribe() });
        Ok(())
    }

    /// Up to where the viewers are and no further: the rest comes to a new one as it comes to the others.
    fn history(&self, history: History) -> io::Result<Vec<u8>> {
        let end = self.tail.position();
        let from_end = |length: u64, limit: u64| length.saturating_sub(limit);
        let (recent, limit, old_place) = match history {
            History::Recent => {
                let recent = self.tail.since(from_end(end, HISTORY_BYTES))?;
                let left = HISTORY_BYTES.saturating_sub(recent.len() as u64);
                (recent, left, Some(0))
            }
            History::Since(since) => {
                let old_place = since.map_or(Some(0), |since| self.old_times.first_since(since));
                let place = match (old_place, since) {
                    (None, Some(since)) => self.times.first_since(since).unwrap_or(end),
                    _ => 0,
                };
                (self.tail.since(place.max(from_end(end, ALL_BYTES)))?, ALL_BYTES, old_place)
            }
        };
        let mut text = Vec::new();
        if let Some(place) = old_place
            && limit > 0
            && let Some(old) = self.screen.log.older(self.tail.inode())?
        {
            read_from(&old, place.max(from_end(old.metadata()?.len(), limit)), &mut text)?;
        }
        text.extend_from_slice(&recent);
        Ok(text)
    }

    /// Hands on what was printed since the last time, and keeps the logs within their bounds.
    fn forward(&mut self) -> io::Result<()> {
        self.pass_on()?;
        if self.tail.position() > MAX_LOG_BYTES {
            self.cut()?;
        }
        for path in &self.screen.side_logs {
            if fs::metadata(path).is_ok_and(|file| file.len() > MAX_SIDE_LOG_BYTES) {
                empty(path)?;
            }
        }
        Ok(())
    }

    fn pass_on(&mut self) -> io::Result<()> {
        loop {
            let begins = self.tail.begins();
            let piece = self.tail.more()?;
            if self.tail.begins() != begins {
                self.old_times = std::mem::take(&mut self.times);
            }
            if piece.is_empty() {
                return Ok(());
            }
            self.times.note(ms_of(SystemTime::now()), self.tail.position() - piece.len() as u64);
            // Nobody watching is no error.
            let _ = self.viewers.send(piece);
        }
    }

    fn cut(&mut self) -> io::Result<()> {
        let partial = self.screen.log.dir().join("console.log.partial");
        let mut log = File::options().read(true).append(true).open(self.screen.log.path())?;
        let mut old = File::options().create(true).write(true).truncate(true).mode(0o600).open(&partial)?;
        io::copy(&mut log, &mut old)?;
        fs::rename(partial, self.screen.log.old_path())?;
        // What was printed meanwhile.
        io::copy(&mut log, &mut old)?;
        self.pass_on()?;
        log.set_len(0)?;
        self.tail.begin_anew();
        self.old_times = std::mem::take(&mut self.times);
        Ok(())
    }
}

fn empty(path: &Path) -> io::Result<()> {
    File::options().append(true).open(path)?.set_len(0)
}

/// Returns when the machine has ended.
pub async fn end_of(ended: &mut watch::Receiver<bool>) {
    // If the sender is gone nobody will say it any more, and that is an end too.
    let _ = ended.wait_for(|ended| *ended).await;
}

/// Passes on what is typed to a socket that is QEMU's side of a serial port, and drops what comes from there: all of
/// that is in the log, and a guest is held up if nobody takes it.
pub async fn type_on_socket(path: &Path, mut typed: mpsc::Receiver<Bytes>) {
    let connect = || async { UnixStream::connect(path).await.ok().map(UnixStream::into_split) };
    let mut socket = connect().await;
    loop {
        let bytes = tokio::select! {
            bytes = typed.recv() => match bytes {
                Some(bytes) => bytes,
                None => return,
            },
            () = drain(socket.as_mut().map(|(screen, _)| screen)) => {
                socket = None;
                continue;
            }
        };
        if socket.is_none() {
            socket = connect().await;
        }
        let Some((screen, keyboard)) = &mut socket else { continue };
        let is_taken = tokio::select! {
            written = tokio::time::timeout(INPUT_TIMEOUT, keyboard.write_all(&bytes)) => matches!(written, Ok(Ok(()))),
            () = drain(Some(screen)) => false,
        };
        if !is_taken {
            socket = None;
        }
    }
}

/// Reads and drops what arrives; returns when the other side hangs up, never if there is none.
async fn drain(screen: Option<&mut OwnedReadHalf>) {
    let Some(screen) = screen else { return std::future::pending().await };
    let mut dropped = [0; 4096];
    while let Ok(1..) = screen.read(&mut dropped).await {}
}

#[cfg(test)]
mod tests;
