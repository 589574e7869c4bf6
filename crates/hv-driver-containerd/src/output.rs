//! Reading what a container has printed: its log, its history, and what comes.

use std::fs::{self, File};
use std::io::{self, Read as _, Seek as _, SeekFrom};
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use futures::StreamExt as _;
use futures::stream::{self, BoxStream};
use hv_driver::{LogRequest, log};
use rustix::fs::inotify::{self, CreateFlags, WatchFlags};
use tokio::io::unix::AsyncFd;
use tokio::sync::watch;

use crate::keeper::{LOG, LOG_OLD, TIMES, TIMES_EVERY_MS, TIMES_OLD};

/// How much of what was printed before a console shows, in bytes.
pub(crate) const HISTORY_BYTES: u64 = 256 << 10;
/// Most bytes that are handed on at once.
const PIECE_BYTES: usize = 32 << 10;
/// How often the log is looked at where the kernel has no more watches to give.
const LOOK_INTERVAL: Duration = Duration::from_millis(50);
/// How often a log that is being cut just now is opened anew.
const MAX_TRIES: u32 = 16;

/// What a stream of output gives.
pub(crate) type Output = BoxStream<'static, hv_driver::Result<Bytes>>;

/// A place in a log that goes on.
struct Tail {
    path: PathBuf,
    /// `None`: nothing was ever printed.
    file: Option<File>,
    inode: u64,
}

/// All of a log that is asked for, and the place where it goes on.
fn open(dir: &Path, want: Want) -> io::Result<(Vec<u8>, Tail)> {
    let path = dir.join(LOG);
    for _ in 0..MAX_TRIES {
        // While both are held open neither a cut nor a second one takes away what they say, nor is an inode used again.
        let old = open_if_there(&dir.join(LOG_OLD))?;
        let file = open_if_there(&path)?;
        let length = length_of(file.as_ref())?;
        let (old_from, from) = want.places(dir, length_of(old.as_ref())?, length);
        let is_cut = inode_at(&dir.join(LOG_OLD))? != inode_of(old.as_ref())?
            || inode_at(&path)? != inode_of(file.as_ref())?;
        if is_cut {
            continue;
        }
        let mut history = Vec::new();
        if let Some(from) = old_from {
            read_from(old.as_ref(), from, &mut history)?;
        }
        read_from(file.as_ref(), from, &mut history)?;
        // Before the first word, and in the middle of a cut, there is none: it goes on at the begin of the next.
        let inode = inode_of(file.as_ref())?.unwrap_or_default();
        return Ok((history, Tail { path, file, inode }));
    }
    Err(io::Error::other("the log is cut faster than it can be read"))
}

fn open_if_there(path: &Path) -> io::Result<Option<File>> {
    match File::open(path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
        other => other.map(Some),
    }
}

fn length_of(file: Option<&File>) -> io::Result<u64> {
    file.map_or(Ok(0), |file| Ok(file.metadata()?.len()))
}

fn inode_of(file: Option<&File>) -> io::Result<Option<u64>> {
    file.map(|file| Ok(file.metadata()?.ino())).transpose()
}

fn inode_at(path: &Path) -> io::Result<Option<u64>> {
    match fs::metadata(path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
        other => other.map(|file| Some(file.ino())),
    }
}

/// Which part is wanted.
#[derive(Clone, Copy)]
enum Want {
    Recent(u64),
    Since(Option<SystemTime>),
}

impl Want {
    /// Where to begin in the old log, `None` for not at all, and in the present one; both of so many bytes.
    fn places(self, dir: &Path, old: u64, length: u64) -> (Option<u64>, u64) {
        match self {
            Self::Recent(bytes) if bytes <= length => (None, length - bytes),
            Self::Recent(bytes) => (Some(old.saturating_sub(bytes - length)), 0),
            Self::Since(None) => (Some(0), 0),
            Self::Since(Some(since)) => {
                let since = since.duration_since(UNIX_EPOCH).unwrap_or_default();
                let since_ms = u64::try_from(since.as_millis()).unwrap_or(u64::MAX);
                let place = |name: &str| {
                    let times = fs::read_to_string(dir.join(name)).unwrap_or_default();
                    first_since(&times, since_ms)
                };
                match place(TIMES_OLD) {
                    Some(old) => (Some(old), 0),
                    None => (None, place(TIMES).unwrap_or(length)),
                }
            }
        }
    }
}

/// The place of the first output that may be as young as this. Every line is a time and the place from which on
/// something was written then or within [`TIMES_EVERY_MS`].
fn first_since(times: &str, since_ms: u64) -> Option<u64> {
    let notes = times.lines().filter_map(|line| {
        let (time, place) = line.split_once(' ')?;
        Some((time.parse::<u64>().ok()?, place.parse::<u64>().ok()?))
    });
    let mut young = notes.filter(|(time, _)| time.saturating_add(TIMES_EVERY_MS) >= since_ms);
    young.next().map(|(_, place)| place)
}

fn read_from(file: Option<&File>, from: u64, bytes: &mut Vec<u8>) -> io::Result<()> {
    let Some(mut file) = file else { return Ok(()) };
    file.seek(SeekFrom::Start(from))?;
    file.read_to_end(bytes)?;
    Ok(())
}

impl Tail {
    /// What has come since; empty for nothing.
    fn more(&mut self) -> io::Result<Bytes> {
        let mut piece = vec![0; PIECE_BYTES];
        loop {
            if let Some(file) = &mut self.file {
                let length = file.read(&mut piece)?;
                if length > 0 {
                    piece.truncate(length);
                    return Ok(piece.into());
                }
            }
            // All is read: either that is all, or the log was cut and goes on in a new file.
            let next = match File::open(&self.path) {
                Ok(next) => next,
                Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Bytes::new()),
                Err(e) => return Err(e),
            };
            let inode = next.metadata()?.ino();
            if inode == self.inode {
                return Ok(Bytes::new());
            }
            // What was written between the last read and the cut.
            if let Some(file) = &mut self.file {
                let length = file.read(&mut piece)?;
                if length > 0 {
                    piece.truncate(length);
                    return Ok(piece.into());
                }
            }
            (self.file, self.inode) = (Some(next), inode);
        }
    }
}

/// Tells when something changes in a directory.
struct Notify(Option<AsyncFd<OwnedFd>>);

impl Notify {
    fn of(dir: &Path) -> Self {
        let watch = || {
            let fd = inotify::init(CreateFlags::NONBLOCK | CreateFlags::CLOEXEC)?;
            inotify::add_watch(&fd, dir, WatchFlags::MODIFY | WatchFlags::CREATE)?;
            awaitable(fd)
        };
        // A machine has a bound on watches; without one the log is looked at from time to time.
        Self(watch().ok())
    }

    async fn changed(&self) {
        let Some(fd) = &self.0 else { return tokio::time::sleep(LOOK_INTERVAL).await };
        let Ok(mut guard) = fd.readable().await else { return tokio::time::sleep(LOOK_INTERVAL).await };
        let mut notices = [0u8; 4096];
        while rustix::io::read(fd.get_ref(), &mut notices).is_ok() {}
        guard.clear_ready();
    }
}

#[expect(
    deprecated,
    reason = "its successor is unsafe because a type may give away its descriptor; OwnedFd does not"
)]
fn awaitable(fd: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    AsyncFd::new(fd)
}

/// A console's output: the history, then what comes, until the instance has ended.
pub(crate) fn console(dir: &Path, ended: watch::Receiver<bool>) -> io::Result<Output> {
    let notify = Notify::of(dir);
    let (history, tail) = open(dir, Want::Recent(HISTORY_BYTES))?;
    Ok(follow(history, tail, notify, ended))
}

/// A log, as far as it is asked for. `ended`: when a log that is followed goes on no more; `None`: it does not.
pub(crate) fn logs(
    dir: &Path,
    request: LogRequest,
    ended: Option<watch::Receiver<bool>>,
) -> io::Result<Output> {
    let notify = Notify::of(dir);
    let (mut text, tail) = open(dir, Want::Since(request.since))?;
    if let Some(lines) = request.tail_lines {
        text = text.split_off(text.len() - log::last_lines(&text, lines).len());
    }
    Ok(match ended.filter(|_| request.follow) {
        Some(ended) => follow(text, tail, notify, ended),
        None => pieces(text.into()),
    })
}

fn pieces(text: Bytes) -> Output {
    let cut = move |mut rest: Bytes| {
        let piece = rest.split_to(rest.len().min(PIECE_BYTES));
        std::future::ready((!piece.is_empty()).then_some((Ok(piece), rest)))
    };
    stream::unfold(text, cut).boxed()
}

fn follow(history: Vec<u8>, tail: Tail, notify: Notify, ended: watch::Receiver<bool>) -> Output {
    struct State {
        tail: Tail,
        notify: Notify,
        ended: watch::Receiver<bool>,
        is_over: bool,
    }
    let state = State { tail, notify, ended, is_over: false };
    let rest = stream::unfold(state, |mut state| async move {
        loop {
            match state.tail.more() {
                Ok(piece) if !piece.is_empty() => return Some((Ok(piece), state)),
                Ok(_) => {}
                Err(error) => {
                    tracing::warn!(%error, log = %state.tail.path.display(), "a log cannot be read");
                    return None;
                }
            }
            if state.is_over {
                return None;
            }
            tokio::select! {
                // What was printed last is read once more after the end.
                _ = state.ended.wait_for(|ended| *ended) => state.is_over = true,
                () = state.notify.changed() => {}
            }
        }
    });
    pieces(history.into()).chain(rest).boxed()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::keeper::Log;

    #[test]
    fn since_gives_never_less_than_was_asked_for() {
        let times = "1000 0\n1200 50\n5000 80\n";
        let cases = [
            (0, Some(0)),
            (1000, Some(0)),
            (1101, Some(50)),
            (1300, Some(50)),
            (1301, Some(80)),
            (5101, None),
        ];
        for (since, expected) in cases {
            assert_eq!(first_since(times, since), expected, "{since}");
        }
    }

    #[test]
    fn a_log_whose_cut_stands_still_half_way_is_read_and_followed() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join(LOG_OLD), "a").unwrap();
        let (history, mut tail) = open(dir.path(), Want::Since(None)).unwrap();
        assert_eq!(history, b"a");
        assert!(tail.more().unwrap().is_empty());
        fs::write(dir.path().join(LOG), "b").unwrap();
        assert_eq!(tail.more().unwrap(), "b");
    }

    #[test]
    fn a_log_that_is_cut_all_the_time_is_read_without_a_gap() {
        const LINES: u32 = 20_000;
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().to_owned();
        let writer = std::thread::spawn(move || {
            let mut log = Log::open(path, 4096).unwrap();
            for line in 0..LINES {
                log.write(format!("{line:07}\n").as_bytes()).unwrap();
            }
        });
        while !writer.is_finished() {
            // What is cut faster than it is read says so; what is read has no gap.
            let Ok((text, _)) = open(dir.path(), Want::Since(None)) else { continue };
            let text = String::from_utf8(text).unwrap();
            // The last one may be half written.
            let whole = text.rfind('\n').map_or("", |end| &text[..end]);
            let lines: Vec<u32> = whole.lines().map(|line| line.parse().unwrap()).collect();
            assert!(lines.windows(2).all(|two| two[0] + 1 == two[1]), "{lines:?}");
        }
        writer.join().unwrap();
    }

    #[tokio::test]
    async fn a_log_that_is_cut_is_followed_without_a_gap() {
        let dir = tempfile::tempdir().unwrap();
        let (log, old) = (dir.path().join(LOG), dir.path().join(LOG_OLD));
        fs::write(&log, "a").unwrap();
        let (end, ended) = watch::channel(false);
        let mut output = console(dir.path(), ended).unwrap();
        assert_eq!(output.next().await.unwrap().unwrap(), "a");
        fs::write(&log, "ab").unwrap();
        fs::rename(&log, &old).unwrap();
        fs::write(&log, "c").unwrap();
        assert_eq!(output.next().await.unwrap().unwrap(), "b");
        assert_eq!(output.next().await.unwrap().unwrap(), "c");
        end.send(true).unwrap();
        assert!(output.next().await.is_none());
    }
}
