//! A log that is cut while it is read: what it has, and what comes.
//!
//! # Theory of operation
//! A log is `console.log`, and beside it is what it had before it was cut. It is cut in one of two ways: renamed, after
//! which it goes on in a new file, or copied and emptied. A reader holds both files open and then looks whether they
//! still have their names: while they are held no inode is used again, and what was renamed keeps its content. What is
//! emptied becomes shorter, until its next copy takes the place of the older one: whoever finds neither after reading
//! has read what was there.

use std::fs::{self, File, Metadata};
use std::io::{self, Read as _, Seek as _, SeekFrom};
use std::os::unix::fs::{FileExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use bytes::Bytes;

/// The log.
pub const LOG: &str = "console.log";
/// What `console.log` had before it was cut.
pub const LOG_OLD: &str = "console.log.1";
/// How exactly times are kept, in milliseconds.
pub const TIMES_EVERY_MS: u64 = 100;
/// Most bytes that are handed on at once.
pub const PIECE_BYTES: usize = 16 << 10;
/// How often a log that is being cut just now is opened anew.
const MAX_TRIES: u32 = 16;
/// How many times are kept of a file; more are kept less exactly.
const MAX_TIMES: usize = 4096;

/// Where a log is.
#[derive(Clone, Debug)]
pub struct Log {
    dir: PathBuf,
    older: &'static [&'static str],
}

/// Where to begin.
#[derive(Clone, Copy, Debug)]
pub struct Places {
    /// In what the log had before it was cut; `None`: not at all.
    pub old: Option<u64>,
    /// In the log itself.
    pub log: u64,
}

/// What a log has, and the place where it goes on.
#[derive(Debug)]
pub struct Text {
    /// What it had before it was cut.
    pub old: Vec<u8>,
    /// What it has.
    pub log: Vec<u8>,
    /// What comes.
    pub tail: Tail,
}

impl Text {
    /// All of it.
    #[must_use]
    pub fn joined(self) -> (Vec<u8>, Tail) {
        let mut text = self.old;
        text.extend_from_slice(&self.log);
        (text, self.tail)
    }
}

impl Log {
    /// The log in a directory.
    pub fn new(dir: impl Into<PathBuf>) -> Self {
        Self::with_older(dir, &[LOG_OLD])
    }

    /// The log in a directory where what it had before may have one of several names: the first one counts that has
    /// anything.
    pub fn with_older(dir: impl Into<PathBuf>, older: &'static [&'static str]) -> Self {
        Self { dir: dir.into(), older }
    }

    /// The directory that it is in.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Its file.
    #[must_use]
    pub fn path(&self) -> PathBuf {
        self.dir.join(LOG)
    }

    /// Where it is put by whoever cuts it here.
    pub(crate) fn old_path(&self) -> PathBuf {
        self.dir.join(self.older.last().copied().unwrap_or(LOG_OLD))
    }

    /// All of a log from some places on, which are chosen by what its two files are.
    ///
    /// # Errors
    /// If a file cannot be read, or the log is cut faster than it can be opened.
    pub fn read(&self, places: impl Fn(Option<&Metadata>, Option<&Metadata>) -> Places) -> io::Result<Text> {
        let path = self.path();
        for _ in 0..MAX_TRIES {
            let old = self.older(None)?;
            let file = open_if_there(&path)?;
            let (about_old, about) = (metadata_of(old.as_ref())?, metadata_of(file.as_ref())?);
            let places = places(about_old.as_ref(), about.as_ref());
            let inode = about.as_ref().map(Metadata::ino);
            let inode_old = about_old.as_ref().map(Metadata::ino);
            if self.older_inode()? != inode_old || inode_at(&path)? != inode {
                continue;
            }
            let mut text =
                Text { old: Vec::new(), log: Vec::new(), tail: Tail::at(path.clone(), file, inode) };
            if let (Some(from), Some(old)) = (places.old, &old) {
                read_from(old, from, &mut text.old)?;
            }
            if let Some(file) = &text.tail.file {
                let from = places.log.min(about.as_ref().map_or(0, Metadata::len));
                text.tail.position = from + read_from(file, from, &mut text.log)?;
                // What was renamed is held; what was emptied is not what it was.
                let is_shorter = file.metadata()?.len() < about.as_ref().map_or(0, Metadata::len);
                if is_shorter || (inode_at(&path)? == inode && self.older_inode()? != inode_old) {
                    continue;
                }
            }
            return Ok(text);
        }
        Err(io::Error::other("the log is cut faster than it can be read"))
    }

    fn older_inode(&self) -> io::Result<Option<u64>> {
        Ok(metadata_of(self.older(None)?.as_ref())?.map(|about| about.ino()))
    }

    /// The file with what it had before, if that has anything. `but`: the inode of one that does not count.
    pub(crate) fn older(&self, but: Option<u64>) -> io::Result<Option<File>> {
        for name in self.older {
            let Some(file) = open_if_there(&self.dir.join(name))? else { continue };
            let about = file.metadata()?;
            if about.len() > 0 && Some(about.ino()) != but {
                return Ok(Some(file));
            }
        }
        Ok(None)
    }
}

fn open_if_there(path: &Path) -> io::Result<Option<File>> {
    match File::open(path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
        other => other.map(Some),
    }
}

fn metadata_of(file: Option<&File>) -> io::Result<Option<Metadata>> {
    file.map(File::metadata).transpose()
}

fn inode_at(path: &Path) -> io::Result<Option<u64>> {
    match fs::metadata(path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
        other => other.map(|file| Some(file.ino())),
    }
}

/// Reads to the end, and says how many bytes that were.
pub(crate) fn read_from(mut file: &File, from: u64, bytes: &mut Vec<u8>) -> io::Result<u64> {
    file.seek(SeekFrom::Start(from))?;
    file.read_to_end(bytes).map(|length| length as u64)
}

/// A place in a log that goes on.
#[derive(Debug)]
pub struct Tail {
    path: PathBuf,
    /// `None`: nothing was ever printed, or it is just being cut.
    file: Option<File>,
    inode: Option<u64>,
    position: u64,
    begins: u64,
}

impl Tail {
    fn at(path: PathBuf, file: Option<File>, inode: Option<u64>) -> Self {
        Self { path, file, inode, position: 0, begins: 0 }
    }

    /// The present end of a log.
    pub(crate) fn at_end(log: &Log) -> io::Result<Self> {
        let file = open_if_there(&log.path())?;
        let about = metadata_of(file.as_ref())?;
        let mut tail = Self::at(log.path(), file, about.as_ref().map(Metadata::ino));
        tail.position = about.map_or(0, |about| about.len());
        Ok(tail)
    }

    /// The file that it reads, or will.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// How many bytes of its file were read, or passed over.
    pub(crate) fn position(&self) -> u64 {
        self.position
    }

    /// How often it has begun anew, in another file or in one that was emptied.
    pub(crate) fn begins(&self) -> u64 {
        self.begins
    }

    /// Which file it is in.
    pub(crate) fn inode(&self) -> Option<u64> {
        self.inode
    }

    /// What its file has between a place and this one.
    pub(crate) fn since(&self, place: u64) -> io::Result<Vec<u8>> {
        let length = usize::try_from(self.position.saturating_sub(place)).unwrap_or(usize::MAX);
        let mut text = vec![0; length];
        let mut read = 0;
        while let Some(file) = &self.file
            && read < length
        {
            match file.read_at(&mut text[read..], place + read as u64)? {
                0 => break,
                more => read += more,
            }
        }
        text.truncate(read);
        Ok(text)
    }

    /// It was emptied, and goes on at its begin.
    pub(crate) fn begin_anew(&mut self) {
        self.position = 0;
        self.begins += 1;
    }

    /// What has come since; empty for nothing.
    ///
    /// # Errors
    /// If it cannot be read.
    pub fn more(&mut self) -> io::Result<Bytes> {
        loop {
            let piece = self.piece()?;
            if !piece.is_empty() {
                return Ok(piece);
            }
            // All is read: either that is all, or the log was cut and goes on in a new file.
            let Some(next) = open_if_there(&self.path)? else { return Ok(piece) };
            let about = next.metadata()?;
            if Some(about.ino()) == self.inode {
                if about.len() >= self.position {
                    return Ok(piece);
                }
                self.begin_anew();
                continue;
            }
            // What was written between the last read and the cut.
            let piece = self.piece()?;
            if !piece.is_empty() {
                return Ok(piece);
            }
            (self.file, self.inode) = (Some(next), Some(about.ino()));
            self.begin_anew();
        }
    }

    fn piece(&mut self) -> io::Result<Bytes> {
        let Some(file) = &self.file else { return Ok(Bytes::new()) };
        let mut piece = vec![0; PIECE_BYTES];
        let length = file.read_at(&mut piece, self.position)?;
        piece.truncate(length);
        self.position += length as u64;
        Ok(piece.into())
    }
}

/// The place of the first output that may be as young as this, if there is one. Of each note the first number is a time
/// in milliseconds since 1970, and the second the place from which on something was written until then, or within
/// [`TIMES_EVERY_MS`] after it.
pub fn first_since(notes: impl IntoIterator<Item = (u64, u64)>, since: SystemTime) -> Option<u64> {
    let since_ms = ms_of(since);
    let mut young = notes.into_iter().filter(|(time, _)| time.saturating_add(TIMES_EVERY_MS) >= since_ms);
    young.next().map(|(_, place)| place)
}

/// Milliseconds since 1970.
pub(crate) fn ms_of(time: SystemTime) -> u64 {
    let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

/// When which part of a file was written, as [`first_since`] takes it.
#[derive(Debug, Default)]
pub(crate) struct Times(Vec<(u64, u64)>);

impl Times {
    /// Of a file of which it is known only when it was last written.
    pub(crate) fn of_whole(written_ms: u64) -> Self {
        Self(vec![(written_ms, 0)])
    }

    /// Something was written at a place until now.
    pub(crate) fn note(&mut self, now_ms: u64, place: u64) {
        if self.0.last().is_some_and(|(time, _)| now_ms < time.saturating_add(TIMES_EVERY_MS)) {
            return;
        }
        self.0.push((now_ms, place));
        if self.0.len() > MAX_TIMES {
            // The later time and the earlier place: what is asked for is still in it.
            let halves = self.0.chunks(2).map(|pair| {
                let last = pair.iter().map(|(time, _)| *time).max();
                (last.unwrap_or(pair[0].0), pair[0].1)
            });
            self.0 = halves.collect();
        }
    }

    pub(crate) fn first_since(&self, since: SystemTime) -> Option<u64> {
        first_since(self.0.iter().copied(), since)
    }
}

#[cfg(test)]
mod tests;
