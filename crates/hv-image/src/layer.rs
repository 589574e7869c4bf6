//! Layers of OCI images (image-spec 1.1, "Image Layer Filesystem Changeset"): decompressed within bounds,
//! held against the digest of
//! their uncompressed form, and every entry checked, whatever becomes of it.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Read};
use std::path::Path;

use flate2::bufread::MultiGzDecoder;
use ruzstd::decoding::StreamingDecoder;
use sha2::{Digest as _, Sha256};
use tokio_util::sync::CancellationToken;

use crate::progress::Reporter;
use crate::reference::Digest;
use crate::tar::{Entry, Kind, Tar, malformed};

/// Most entries of all layers of an image.
const MAX_ENTRIES: u64 = 1_000_000;
/// Deepest directory.
const MAX_DEPTH: usize = 200;
/// Longest name in a directory, in bytes: `NAME_MAX`.
const MAX_NAME_BYTES: usize = 255;
/// Largest window of a zstd frame, in bytes: what `zstd` itself accepts without being told otherwise.
const MAX_ZSTD_WINDOW: u64 = 128 << 20;
/// The first four bytes of a skippable zstd frame are these, the lowest half-byte being free (RFC 8878,
/// section 3.1.2).
const ZSTD_SKIPPABLE: u32 = 0x184D_2A50;

/// Why a layer was not read to its end.
#[derive(Debug)]
pub(crate) enum Fault {
    /// It is the image's fault.
    Refused(String),
    /// It unpacks to too much.
    TooLarge(String),
    /// It is this machine's fault.
    Io(io::Error),
    /// The disk is nearly full.
    NoSpace(u64),
    Cancelled,
}

impl From<io::Error> for Fault {
    /// For errors of reading: what cannot be decoded is the image's fault.
    fn from(error: io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::InvalidData
            | io::ErrorKind::InvalidInput
            | io::ErrorKind::UnexpectedEof
            | io::ErrorKind::Other => Self::Refused(format!("a layer cannot be read: {error}")),
            _ => Self::Io(error),
        }
    }
}

/// What is done with the entries of layers.
pub(crate) trait Sink {
    fn begin_layer(&mut self);
    /// `path` has no empty, `.` or `..` component; it is empty for the root itself.
    fn entry(&mut self, entry: &Entry, path: &[&[u8]], data: &mut dyn Read) -> Result<(), Fault>;
}

/// Only looks.
pub(crate) struct Inspect;

impl Sink for Inspect {
    fn begin_layer(&mut self) {}

    fn entry(&mut self, entry: &Entry, path: &[&[u8]], _: &mut dyn Read) -> Result<(), Fault> {
        match entry.kind {
            Kind::HardLink => clean(&entry.link).map(drop),
            Kind::Symlink if entry.link.is_empty() => {
                Err(Fault::Refused(format!("the symbolic link {} leads nowhere", shown(path))))
            }
            _ => Ok(()),
        }
    }
}

/// Reads the layers of one image, in order.
pub(crate) struct Layers<'a> {
    pub(crate) left_bytes: u64,
    pub(crate) left_entries: u64,
    pub(crate) cancel: &'a CancellationToken,
    pub(crate) progress: &'a Reporter,
}

impl<'a> Layers<'a> {
    pub(crate) fn new(max_bytes: u64, cancel: &'a CancellationToken, progress: &'a Reporter) -> Self {
        Self { left_bytes: max_bytes, left_entries: MAX_ENTRIES, cancel, progress }
    }

    /// Reads one layer into `sink`; its uncompressed form must have the digest `diff_id`.
    pub(crate) fn read(&mut self, file: &Path, diff_id: &Digest, sink: &mut dyn Sink) -> Result<(), Fault> {
        let counted = Counted { source: File::open(file).map_err(Fault::Io)?, progress: self.progress };
        let mut hashed = Bounded {
            source: decompress(BufReader::with_capacity(64 << 10, counted))?,
            hasher: Sha256::new(),
            left: &mut self.left_bytes,
            exceeded: false,
            cancel: self.cancel,
        };
        sink.begin_layer();
        let result = walk(&mut hashed, &mut self.left_entries, sink).and_then(|()| {
            // Whatever lies behind the archive belongs to what was hashed.
            io::copy(&mut hashed, &mut io::sink()).map(drop).map_err(Fault::from)
        });
        if hashed.exceeded {
            return Err(Fault::TooLarge("its unpacked size".to_owned()));
        }
        if self.cancel.is_cancelled() {
            return Err(Fault::Cancelled);
        }
        result?;
        let actual = Digest::from_hash(&hashed.hasher.finalize());
        match actual == *diff_id {
            true => Ok(()),
            false => Err(Fault::Refused(format!(
                "a layer unpacks to {actual} instead of {diff_id}, which its configuration promises"
            ))),
        }
    }
}

fn walk(source: &mut dyn Read, left_entries: &mut u64, sink: &mut dyn Sink) -> Result<(), Fault> {
    let mut tar = Tar::new(source);
    while let Some(entry) = tar.next()? {
        *left_entries = left_entries
            .checked_sub(1)
            .ok_or_else(|| Fault::Refused(format!("it has more than {MAX_ENTRIES} files in its layers")))?;
        let path = clean(&entry.path)?;
        if entry.kind == Kind::Device {
            return Err(Fault::Refused(format!(
                "{} is a device node; images must not have any",
                shown(&path)
            )));
        }
        sink.entry(&entry, &path, &mut tar)?;
    }
    Ok(())
}

/// The components of a path below the image's root. A leading `/` is that root.
pub(crate) fn clean(path: &[u8]) -> Result<Vec<&[u8]>, Fault> {
    let parts: Vec<_> =
        path.split(|byte| *byte == b'/').filter(|part| !part.is_empty() && *part != b".").collect();
    if parts.contains(&&b".."[..]) {
        return Err(Fault::Refused(format!("{} leads out of the image", shown(&parts))));
    }
    if parts.len() > MAX_DEPTH || parts.iter().any(|part| part.len() > MAX_NAME_BYTES) {
        return Err(Fault::Refused(format!("the path {} is too long or too deep", shown(&parts))));
    }
    Ok(parts)
}

/// A path for a message.
pub(crate) fn shown(path: &[&[u8]]) -> String {
    hv_types::validate::excerpt(&String::from_utf8_lossy(&path.join(&b'/')))
}

/// By its first bytes, as media types are not always right.
fn decompress<'a>(mut source: impl BufRead + 'a) -> Result<Box<dyn Read + 'a>, Fault> {
    let head = source.fill_buf().map_err(Fault::Io)?;
    if head.starts_with(b"\x1f\x8b") {
        return Ok(Box::new(MultiGzDecoder::new(source)));
    }
    if head.starts_with(b"\x28\xb5\x2f\xfd") || is_skippable(head) {
        return Ok(Box::new(Zstd { source: Some(source), frame: None }));
    }
    Ok(Box::new(source))
}

fn is_skippable(head: &[u8]) -> bool {
    let magic = head.get(..4).and_then(|magic| magic.try_into().ok()).map(u32::from_le_bytes);
    magic.is_some_and(|magic| magic & !0xf == ZSTD_SKIPPABLE)
}

/// All frames of a zstd file, one after the other.
struct Zstd<R: BufRead> {
    source: Option<R>,
    frame: Option<StreamingDecoder<R, ruzstd::decoding::FrameDecoder>>,
}

impl<R: BufRead> Read for Zstd<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if buffer.is_empty() {
            return Ok(0);
        }
        loop {
            if let Some(frame) = &mut self.frame {
                match frame.read(buffer)? {
                    0 => self.source = self.frame.take().map(StreamingDecoder::into_inner),
                    count => return Ok(count),
                }
            }
            let Some(mut source) = self.source.take() else { return Ok(0) };
            let head = source.fill_buf()?;
            if head.is_empty() {
                return Ok(0);
            }
            let mut magic = [0; 4];
            if head.len() >= 4 && is_skippable(head) {
                source.read_exact(&mut magic)?;
                source.read_exact(&mut magic)?;
                let length = u64::from(u32::from_le_bytes(magic));
                if io::copy(&mut (&mut source).take(length), &mut io::sink())? < length {
                    return Err(malformed("a zstd frame is truncated"));
                }
                self.source = Some(source);
                continue;
            }
            let decoder = StreamingDecoder::new_with_max_window_size(source, MAX_ZSTD_WINDOW);
            self.frame = Some(decoder.map_err(|e| malformed(&format!("it is no zstd frame: {e}")))?);
        }
    }
}

/// Tells how much was read.
struct Counted<'a> {
    source: File,
    progress: &'a Reporter,
}

impl Read for Counted<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.source.read(buffer)?;
        self.progress.add(count as u64);
        Ok(count)
    }
}

/// Hashes what it hands on, and ends when it was too much.
struct Bounded<'a> {
    source: Box<dyn Read + 'a>,
    hasher: Sha256,
    left: &'a mut u64,
    exceeded: bool,
    cancel: &'a CancellationToken,
}

impl Read for Bounded<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.cancel.is_cancelled() {
            return Err(malformed("cancelled"));
        }
        let count = self.source.read(buffer)?;
        let Some(left) = self.left.checked_sub(count as u64) else {
            self.exceeded = true;
            return Err(malformed("too large"));
        };
        *self.left = left;
        self.hasher.update(&buffer[..count]);
        Ok(count)
    }
}
