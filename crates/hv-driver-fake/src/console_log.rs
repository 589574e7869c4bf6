//! What a guest has printed, and when: pieces, each with its time and length before it.

use std::fs;
use std::io::{self, Write as _};
use std::path::Path;

/// How much of a console is kept, in bytes; the older half is dropped beyond it.
pub const MAX_LOG_BYTES: u64 = 256 << 10;
/// Time (8 bytes) and length (4 bytes), the most significant byte first.
const HEAD: usize = 12;
/// The longest piece; more is kept in several.
const MAX_PIECE: usize = 32 << 10;

pub(crate) fn append(path: &Path, at_ms: u64, text: &[u8]) -> io::Result<()> {
    let mut framed = Vec::with_capacity(text.len() + HEAD);
    for piece in text.chunks(MAX_PIECE) {
        framed.extend_from_slice(&at_ms.to_be_bytes());
        framed.extend_from_slice(&u32::try_from(piece.len()).unwrap_or(u32::MAX).to_be_bytes());
        framed.extend_from_slice(piece);
    }
    let mut file = fs::OpenOptions::new().create(true).append(true).open(path)?;
    file.write_all(&framed)?;
    if file.metadata()?.len() > MAX_LOG_BYTES {
        let log = fs::read(path)?;
        let kept_from = usize::try_from(MAX_LOG_BYTES / 2).unwrap_or(usize::MAX);
        let dropped = pieces(&log).map(|piece| piece.end).find(|end| log.len() - end <= kept_from);
        let partial = path.with_extension("log-partial");
        fs::write(&partial, &log[dropped.unwrap_or(log.len())..])?;
        fs::rename(&partial, path)?;
    }
    Ok(())
}

/// What was printed since then, as far as it is kept.
pub(crate) fn read(path: &Path, since_ms: u64) -> io::Result<Vec<u8>> {
    let log = match fs::read(path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        other => other?,
    };
    Ok(pieces(&log).filter(|piece| piece.at_ms >= since_ms).flat_map(|piece| piece.text.to_vec()).collect())
}

struct Piece<'a> {
    at_ms: u64,
    text: &'a [u8],
    /// Where it ends in the log.
    end: usize,
}

/// The pieces of a log. A last one that was not written completely is none.
fn pieces(log: &[u8]) -> impl Iterator<Item = Piece<'_>> {
    let mut from = 0;
    std::iter::from_fn(move || {
        let (at_ms, rest) = log.get(from..)?.split_first_chunk::<8>()?;
        let (length, rest) = rest.split_first_chunk::<4>()?;
        let text = rest.get(..usize::try_from(u32::from_be_bytes(*length)).ok()?)?;
        from += HEAD + text.len();
        Some(Piece { at_ms: u64::from_be_bytes(*at_ms), text, end: from })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_log_is_cut_at_its_older_half_and_read_by_time() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.log");
        for at_ms in 0..600u64 {
            append(&path, at_ms, format!("{at_ms:1023}\n").as_bytes()).unwrap();
        }
        assert!(fs::metadata(&path).unwrap().len() <= MAX_LOG_BYTES);
        let all = read(&path, 0).unwrap();
        assert!(all.ends_with(b" 599\n") && all.len() as u64 > MAX_LOG_BYTES / 4);
        assert_eq!(read(&path, 598).unwrap().len(), 2 * 1024);
        assert!(read(&path, 600).unwrap().is_empty());
    }

    #[test]
    fn a_piece_that_was_not_written_completely_is_none() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.log");
        append(&path, 1, b"one").unwrap();
        append(&path, 2, b"two").unwrap();
        let log = fs::read(&path).unwrap();
        fs::write(&path, &log[..log.len() - 1]).unwrap();
        assert_eq!(read(&path, 0).unwrap(), b"one");
    }
}
