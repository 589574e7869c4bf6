//! Copying files of which much is empty: shared where the file system can (reflink), else only what is written.

use std::fs::{self, File};
use std::io::{self, Read as _, Seek as _, SeekFrom, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;

use rustix::fs::OFlags;
use rustix::io::Errno;

use crate::files::open_in_root;
use crate::problem::{Outcome, Problem};

/// How much is copied at a time.
const PIECE_BYTES: usize = 1 << 20;

/// Copies a file to a new one, which is on disk when this returns. It has at least `min_bytes`.
pub(crate) fn copy(from: &Path, to: &Path, min_bytes: u64) -> Outcome<()> {
    let source = open_in_root(from, OFlags::RDONLY).map_err(Problem::file("open", from))?;
    let make = || {
        let target = make_new(to)?;
        let length = source.metadata()?.len();
        if rustix::fs::ioctl_ficlone(&target, &source).is_err() {
            target.set_len(length)?;
            overlay(&source, &target)?;
        }
        if length < min_bytes {
            target.set_len(min_bytes)?;
        }
        target.sync_all()
    };
    make().map_err(Problem::file("copy to", to))
}

/// A new file in place of whatever is there; a symbolic link that a VMM left is not followed.
fn make_new(path: &Path) -> io::Result<File> {
    match fs::remove_file(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
        _ => {}
    }
    fs::OpenOptions::new().create_new(true).read(true).write(true).mode(0o600).open(path)
}

/// Writes what is in one file, and not a hole, over another.
pub(crate) fn overlay(mut source: &File, mut target: &File) -> io::Result<()> {
    let mut piece = vec![0; PIECE_BYTES];
    let length = source.metadata()?.len();
    let mut at = 0;
    while at < length {
        let data = match rustix::fs::seek(source, rustix::fs::SeekFrom::Data(at)) {
            Ok(data) => data,
            // Nothing but holes from here on.
            Err(Errno::NXIO) => break,
            // A file system that does not tell holes.
            Err(Errno::INVAL) => at,
            Err(e) => return Err(e.into()),
        };
        let end = rustix::fs::seek(source, rustix::fs::SeekFrom::Hole(data)).unwrap_or(length);
        source.seek(SeekFrom::Start(data))?;
        target.seek(SeekFrom::Start(data))?;
        let mut left = end.saturating_sub(data);
        while left > 0 {
            let want = usize::try_from(left).unwrap_or(usize::MAX).min(piece.len());
            let got = source.read(&mut piece[..want])?;
            if got == 0 {
                break;
            }
            target.write_all(&piece[..got])?;
            left -= got as u64;
        }
        at = end.max(data + 1);
    }
    Ok(())
}

/// A new disk of nothing.
pub(crate) fn make_empty(path: &Path, size_bytes: u64) -> Outcome<()> {
    let make = || {
        let file = make_new(path)?;
        file.set_len(size_bytes.next_multiple_of(512))?;
        file.sync_all()
    };
    make().map_err(Problem::file("make", path))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn holes_stay_holes_and_a_difference_covers_only_what_it_has() {
        let dir = std::env::temp_dir().join(format!("hv-fc-disks-{}", std::process::id()));
        fs::create_dir_all(&dir).unwrap();
        let (base, other, diff) = (dir.join("base"), dir.join("other"), dir.join("diff"));
        let write = |path: &Path, at: u64, byte: u8| {
            let mut file =
                fs::OpenOptions::new().create(true).truncate(false).write(true).open(path).unwrap();
            file.set_len(8 << 20).unwrap();
            file.seek(SeekFrom::Start(at)).unwrap();
            file.write_all(&[byte; 8192]).unwrap();
        };
        write(&base, 0, 1);
        write(&base, 4 << 20, 2);
        write(&diff, 4 << 20, 3);
        copy(&base, &other, 9 << 20).unwrap();
        let target = fs::OpenOptions::new().write(true).open(&other).unwrap();
        overlay(&File::open(&diff).unwrap(), &target).unwrap();
        let bytes = fs::read(&other).unwrap();
        assert_eq!((bytes.len(), bytes[0], bytes[8192], bytes[4 << 20]), (9 << 20, 1, 0, 3));
        use std::os::unix::fs::MetadataExt as _;
        assert!(fs::metadata(&other).unwrap().blocks() * 512 < 1 << 20, "holes were written");
        fs::remove_dir_all(&dir).unwrap();
    }
}
