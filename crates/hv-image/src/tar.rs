//! Reads tar files (POSIX.1-2001 ustar and pax, GNU long names) with a bound on everything. What is rare in
//! layers and hard to
//! read the same way everywhere (sparse files, multi-volume archives) is refused.

use std::io::{self, Read};

const BLOCK: usize = 512;
/// Longest path or link target, in bytes: `PATH_MAX`.
const MAX_PATH_BYTES: usize = 4096;
/// Longest pax header, in bytes.
const MAX_PAX_BYTES: u64 = 1 << 20;

/// What an entry is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    File,
    HardLink,
    Symlink,
    Directory,
    Device,
    Fifo,
}

/// The head of an entry.
#[derive(Clone, Debug)]
pub(crate) struct Entry {
    pub(crate) kind: Kind,
    pub(crate) path: Vec<u8>,
    pub(crate) link: Vec<u8>,
    pub(crate) mode: u32,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    pub(crate) size: u64,
    pub(crate) mtime: i64,
}

/// A tar file. After [`Self::next`] it reads the content of that entry.
pub(crate) struct Tar<R> {
    source: R,
    left: u64,
    padding: u64,
}

/// What pax headers and GNU long names say about the entry that follows.
#[derive(Default)]
struct Overrides {
    path: Option<Vec<u8>>,
    link: Option<Vec<u8>>,
    size: Option<u64>,
    uid: Option<u32>,
    gid: Option<u32>,
    mtime: Option<i64>,
}

impl<R: Read> Tar<R> {
    pub(crate) fn new(source: R) -> Self {
        Self { source, left: 0, padding: 0 }
    }

    /// The next entry; `None` at the end of the archive.
    pub(crate) fn next(&mut self) -> io::Result<Option<Entry>> {
        let mut overrides = Overrides::default();
        loop {
            self.skip_content()?;
            let Some(block) = self.header()? else { return Ok(None) };
            let size = number(&block[124..136])?;
            match block[156] {
                b'x' => {
                    let text = self.special(size)?;
                    pax(&text, &mut overrides)?;
                }
                // Defaults for all that follows: of what is used here none is ever given in them.
                b'g' => drop(self.special(size)?),
                b'L' => overrides.path = Some(cut(&self.special(size)?)),
                b'K' => overrides.link = Some(cut(&self.special(size)?)),
                kind => return self.entry(&block, kind, size, overrides).map(Some),
            }
        }
    }

    fn entry(&mut self, block: &[u8; BLOCK], kind: u8, size: u64, overrides: Overrides) -> io::Result<Entry> {
        let path = overrides.path.unwrap_or_else(|| ustar_path(block));
        let link = overrides.link.unwrap_or_else(|| cut(&block[157..257]));
        for text in [&path, &link] {
            if text.len() > MAX_PATH_BYTES || text.contains(&0) {
                return Err(malformed("a path is too long or has a zero byte"));
            }
        }
        let kind = match kind {
            b'0' | 0 | b'7' if path.ends_with(b"/") => Kind::Directory,
            b'0' | 0 | b'7' => Kind::File,
            b'1' => Kind::HardLink,
            b'2' => Kind::Symlink,
            b'3' | b'4' => Kind::Device,
            b'5' => Kind::Directory,
            b'6' => Kind::Fifo,
            other => {
                return Err(malformed(&format!(
                    "an entry has the type {:?}, which layers do not have",
                    char::from(other)
                )));
            }
        };
        let size = overrides.size.unwrap_or(size);
        // Only files have content; some writers give links a size and nothing after it.
        let content = if kind == Kind::File { size } else { 0 };
        self.left = content;
        self.padding = content.next_multiple_of(BLOCK as u64) - content;
        let small = |field: &[u8]| {
            u32::try_from(number(field)?).map_err(|_| malformed("a user or group id is too large"))
        };
        Ok(Entry {
            kind,
            path,
            link,
            mode: number(&block[100..108])? as u32 & 0o7777,
            uid: overrides.uid.map_or_else(|| small(&block[108..116]), Ok)?,
            gid: overrides.gid.map_or_else(|| small(&block[116..124]), Ok)?,
            size: content,
            mtime: overrides.mtime.map_or_else(|| number(&block[136..148]).map(|t| t.cast_signed()), Ok)?,
        })
    }

    /// A header whose checksum holds; `None` at the end.
    fn header(&mut self) -> io::Result<Option<[u8; BLOCK]>> {
        let mut block = [0; BLOCK];
        let mut filled = 0;
        while filled < BLOCK {
            match self.source.read(&mut block[filled..])? {
                0 if filled == 0 => return Ok(None),
                0 => return Err(malformed("it ends within a header")),
                count => filled += count,
            }
        }
        if block.iter().all(|byte| *byte == 0) {
            return Ok(None);
        }
        let plain: u64 = block.iter().map(|byte| u64::from(*byte)).sum();
        let field: u64 = block[148..156].iter().map(|byte| u64::from(*byte)).sum();
        match number(&block[148..156])? == plain - field + 8 * u64::from(b' ') {
            true => Ok(Some(block)),
            false => Err(malformed("the checksum of a header does not hold")),
        }
    }

    fn skip_content(&mut self) -> io::Result<()> {
        let skip = self.left + self.padding;
        let skipped = io::copy(&mut (&mut self.source).take(skip), &mut io::sink())?;
        (self.left, self.padding) = (0, 0);
        if skipped == skip { Ok(()) } else { Err(malformed("it ends within an entry")) }
    }

    /// The content of a header that is itself an entry.
    fn special(&mut self, size: u64) -> io::Result<Vec<u8>> {
        if size > MAX_PAX_BYTES {
            return Err(malformed("a pax header or a long name is too large"));
        }
        self.left = size;
        self.padding = size.next_multiple_of(BLOCK as u64) - size;
        let mut bytes = Vec::new();
        self.read_to_end(&mut bytes)?;
        Ok(bytes)
    }
}

impl<R: Read> Read for Tar<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let room = buffer.len().min(usize::try_from(self.left).unwrap_or(usize::MAX));
        if room == 0 {
            return Ok(0);
        }
        let count = self.source.read(&mut buffer[..room])?;
        if count == 0 {
            return Err(malformed("it ends within an entry"));
        }
        self.left -= count as u64;
        Ok(count)
    }
}

pub(crate) fn malformed(reason: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, reason)
}

/// Up to the first zero byte.
fn cut(field: &[u8]) -> Vec<u8> {
    field.split(|byte| *byte == 0).next().unwrap_or_default().to_vec()
}

fn ustar_path(block: &[u8; BLOCK]) -> Vec<u8> {
    let name = cut(&block[..100]);
    let is_posix = &block[257..263] == b"ustar\0";
    match cut(&block[345..500]) {
        prefix if is_posix && !prefix.is_empty() => [&prefix[..], b"/", &name].concat(),
        _ => name,
    }
}

/// Octal digits, or, with the highest bit set, a number of base 256 (GNU). Negative ones are refused.
fn number(field: &[u8]) -> io::Result<u64> {
    let bad = || malformed("a number in a header cannot be read");
    if field[0] & 0x80 != 0 {
        let digits = field[1..].iter().try_fold(u64::from(field[0] & 0x7f), |sum, byte| {
            (sum < 1 << 55).then_some(sum << 8 | u64::from(*byte))
        });
        return digits.filter(|_| field[0] & 0x40 == 0).ok_or_else(bad);
    }
    let digits: Vec<u8> = field.iter().copied().filter(|byte| !matches!(byte, b' ' | 0)).collect();
    digits.iter().try_fold(0u64, |sum, digit| match digit {
        b'0'..=b'7' => Ok(sum << 3 | u64::from(digit - b'0')),
        _ => Err(bad()),
    })
}

/// Records of the form `length key=value\n` (POSIX.1-2001, "pax Header Block").
fn pax(mut text: &[u8], overrides: &mut Overrides) -> io::Result<()> {
    let bad = || malformed("a pax header cannot be read");
    while !text.is_empty() {
        let space = text.iter().position(|byte| *byte == b' ').ok_or_else(bad)?;
        let length: usize =
            std::str::from_utf8(&text[..space]).ok().and_then(|n| n.parse().ok()).ok_or_else(bad)?;
        let record =
            text.get(space + 1..length).and_then(|record| record.strip_suffix(b"\n")).ok_or_else(bad)?;
        text = &text[length..];
        let equals = record.iter().position(|byte| *byte == b'=').ok_or_else(bad)?;
        let (key, value) = (&record[..equals], &record[equals + 1..]);
        let integer = || {
            std::str::from_utf8(value)
                .ok()
                .and_then(|n| n.split('.').next()?.parse::<i64>().ok())
                .ok_or_else(bad)
        };
        let id = || u32::try_from(integer()?).map_err(|_| bad());
        match key {
            b"path" => overrides.path = Some(value.to_vec()),
            b"linkpath" => overrides.link = Some(value.to_vec()),
            b"size" => overrides.size = Some(u64::try_from(integer()?).map_err(|_| bad())?),
            b"uid" => overrides.uid = Some(id()?),
            b"gid" => overrides.gid = Some(id()?),
            b"mtime" => overrides.mtime = Some(integer()?),
            key if key.starts_with(b"GNU.sparse.") => {
                return Err(malformed("it has sparse files, which layers do not have"));
            }
            // Extended attributes, access times and comments are nothing that a layer needs.
            _ => {}
        }
    }
    Ok(())
}
