//! Reading what a container has printed: its log, its history, and what comes.

use std::fs::{self, Metadata};
use std::io;
use std::path::Path;
use std::time::SystemTime;

use bytes::Bytes;
use futures::StreamExt as _;
use futures::stream::{self, BoxStream};
use hv_driver::{LogRequest, log};
use hv_machine::log::{Log, PIECE_BYTES, Places, Tail, Text, first_since};
use hv_machine::notify::{Changes, Notify};
use tokio::sync::watch;

use crate::keeper::{TIMES, TIMES_OLD};

/// How much of what was printed before a console shows, in bytes.
pub(crate) const HISTORY_BYTES: u64 = 256 << 10;

/// What a stream of output gives.
pub(crate) type Output = BoxStream<'static, hv_driver::Result<Bytes>>;

/// All of a log that is asked for, and the place where it goes on.
fn open(dir: &Path, want: Want) -> io::Result<(Vec<u8>, Tail)> {
    let places = |old: Option<&Metadata>, log: Option<&Metadata>| {
        let length = |file: Option<&Metadata>| file.map_or(0, Metadata::len);
        want.places(dir, length(old), length(log))
    };
    Log::new(dir).read(places).map(Text::joined)
}

/// Which part is wanted.
#[derive(Clone, Copy)]
enum Want {
    Recent(u64),
    Since(Option<SystemTime>),
}

impl Want {
    /// Where to begin in the two files of a log, of so many bytes each.
    fn places(self, dir: &Path, old: u64, length: u64) -> Places {
        match self {
            Self::Recent(bytes) if bytes <= length => Places { old: None, log: length - bytes },
            Self::Recent(bytes) => Places { old: Some(old.saturating_sub(bytes - length)), log: 0 },
            Self::Since(None) => Places { old: Some(0), log: 0 },
            Self::Since(Some(since)) => {
                let place = |name: &str| {
                    let times = fs::read_to_string(dir.join(name)).unwrap_or_default();
                    first_since(notes(&times), since)
                };
                match place(TIMES_OLD) {
                    Some(old) => Places { old: Some(old), log: 0 },
                    None => Places { old: None, log: place(TIMES).unwrap_or(length) },
                }
            }
        }
    }
}

/// What the keeper noted of when what was written: a time and a place on each line.
fn notes(times: &str) -> impl Iterator<Item = (u64, u64)> {
    times.lines().filter_map(|line| {
        let (time, place) = line.split_once(' ')?;
        Some((time.parse().ok()?, place.parse().ok()?))
    })
}

/// A console's output: the history, then what comes, until the instance has ended.
pub(crate) fn console(dir: &Path, ended: watch::Receiver<bool>) -> io::Result<Output> {
    let changes = Changes::of(Notify::writes_in(dir));
    let (history, tail) = open(dir, Want::Recent(HISTORY_BYTES))?;
    Ok(follow(history, tail, changes, ended))
}

/// A log, as far as it is asked for. `ended`: when a log that is followed goes on no more; `None`: it does not.
pub(crate) fn logs(
    dir: &Path,
    request: LogRequest,
    ended: Option<watch::Receiver<bool>>,
) -> io::Result<Output> {
    let changes = Changes::of(Notify::writes_in(dir));
    let (mut text, tail) = open(dir, Want::Since(request.since))?;
    if let Some(lines) = request.tail_lines {
        text = text.split_off(text.len() - log::last_lines(&text, lines).len());
    }
    Ok(match ended.filter(|_| request.follow) {
        Some(ended) => follow(text, tail, changes, ended),
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

fn follow(history: Vec<u8>, tail: Tail, changes: Changes, ended: watch::Receiver<bool>) -> Output {
    struct State {
        tail: Tail,
        changes: Changes,
        ended: watch::Receiver<bool>,
        is_over: bool,
    }
    let state = State { tail, changes, ended, is_over: false };
    let rest = stream::unfold(state, |mut state| async move {
        loop {
            match state.tail.more() {
                Ok(piece) if !piece.is_empty() => return Some((Ok(piece), state)),
                Ok(_) => {}
                Err(error) => {
                    tracing::warn!(%error, log = %state.tail.path().display(), "a log cannot be read");
                    return None;
                }
            }
            if state.is_over {
                return None;
            }
            tokio::select! {
                // What was printed last is read once more after the end.
                _ = state.ended.wait_for(|ended| *ended) => state.is_over = true,
                () = state.changes.changed() => {}
            }
        }
    });
    pieces(history.into()).chain(rest).boxed()
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use hv_machine::log::{LOG, LOG_OLD};

    use super::*;
    use crate::keeper;

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
            let at = SystemTime::UNIX_EPOCH + Duration::from_millis(since);
            assert_eq!(first_since(notes(times), at), expected, "{since}");
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
            let mut log = keeper::Log::open(path, 4096).unwrap();
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
