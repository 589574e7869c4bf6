//! Unpacks layers into a directory, so that nothing outside of it is touched, whatever the layers say.
//!
//! # Invariants
//! - Every parent directory is opened with `openat2` beneath the root and without following a symbolic link;
//!   every name is then
//!   used relative to that descriptor. A symbolic link is content: it is made, and never followed.
//! - The directory above it is its owner's only (0700), so that set-user-id files in it are of no use to
//!   anybody before they are in the image.
//! - No device nodes, no extended attributes.

use std::collections::{BTreeSet, HashMap};
use std::fs::{self, File};
use std::io::{self, Read, Write as _};
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::path::Path;

use rustix::fs::{
    AtFlags, FileType, Gid, Mode, OFlags, ResolveFlags, Timespec, Timestamps, Uid, chmodat, chownat, fchmod,
    fchown, futimens, linkat, mkdirat, mkfifoat, openat2, statat, symlinkat, unlinkat, utimensat,
};
use rustix::io::Errno;

use crate::layer::{Fault, Sink, clean, shown};
use crate::layout::Layout;
use crate::tar::{Entry, Kind};

/// How often the disk is looked at, in bytes written.
const LOOK_EVERY_BYTES: u64 = 16 << 20;
/// Longest target of a symbolic link, in bytes: what Linux takes.
const MAX_TARGET_BYTES: usize = 4095;
/// A whiteout removes what lower layers have under the name behind the prefix.
const WHITEOUT: &[u8] = b".wh.";
/// Removes all that lower layers have in the directory.
const OPAQUE: &[u8] = b".wh..wh..opq";
/// Other names with this prefix are notes of a file system of old.
const NOTE: &[u8] = b".wh..wh.";

/// What a directory gets when everything is in it.
#[derive(Clone, Copy)]
struct Attributes {
    mode: u32,
    uid: u32,
    gid: u32,
    mtime: i64,
}

/// See the module.
pub(crate) struct Unpacker<'a> {
    root: OwnedFd,
    layout: &'a Layout,
    min_free_bytes: u64,
    keeps_owners: bool,
    /// What the layer that is being read has made, so that its whiteouts spare it.
    made: BTreeSet<Vec<u8>>,
    directories: HashMap<Vec<u8>, Attributes>,
    unlooked_bytes: u64,
    /// Bytes of files, each rounded up to a block of a file system.
    pub(crate) bytes: u64,
    /// Files, directories and links.
    pub(crate) inodes: u64,
}

impl<'a> Unpacker<'a> {
    pub(crate) const BLOCK_BYTES: u64 = 4096;

    /// Unpacks into `root`, which is there and empty.
    pub(crate) fn new(root: &Path, layout: &'a Layout, min_free_bytes: u64) -> io::Result<Self> {
        Ok(Self {
            root: File::open(root)?.into(),
            layout,
            min_free_bytes,
            keeps_owners: rustix::process::geteuid().is_root(),
            made: BTreeSet::new(),
            // Unless a layer says otherwise. It is the directory above that keeps everybody out.
            directories: HashMap::from([(Vec::new(), Attributes { mode: 0o755, uid: 0, gid: 0, mtime: 0 })]),
            unlooked_bytes: 0,
            bytes: 0,
            inodes: 0,
        })
    }

    /// Gives the directories their owners, modes and times, deepest first.
    pub(crate) fn finish(mut self) -> Result<(u64, u64), Fault> {
        let mut directories: Vec<_> = std::mem::take(&mut self.directories).into_iter().collect();
        directories.sort_by(|a, b| b.0.cmp(&a.0));
        for (path, attributes) in directories {
            // One that a later layer removed or made something else of is none any more.
            let Ok(directory) = self.open(&path, OFlags::DIRECTORY) else { continue };
            if self.keeps_owners {
                let (uid, gid) = (Uid::from_raw(attributes.uid), Gid::from_raw(attributes.gid));
                fchown(&directory, Some(uid), Some(gid)).map_err(host)?;
            }
            fchmod(&directory, Mode::from_raw_mode(attributes.mode)).map_err(host)?;
            futimens(&directory, &times(attributes.mtime)).map_err(host)?;
        }
        Ok((self.bytes, self.inodes))
    }

    fn open(&self, path: &[u8], flags: OFlags) -> Result<OwnedFd, Errno> {
        let path = if path.is_empty() { b"." } else { path };
        let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_XDEV;
        openat2(&self.root, path, flags | OFlags::CLOEXEC, Mode::empty(), resolve)
    }

    /// Opens a directory; makes it, and those above it, where nothing is there.
    fn directory(&mut self, path: &[&[u8]]) -> Result<OwnedFd, Fault> {
        match self.open(&path.join(&b'/'), OFlags::DIRECTORY) {
            Ok(directory) => return Ok(directory),
            Err(Errno::NOENT) => {}
            Err(errno) => return Err(through(path, errno)),
        }
        let Some((name, above)) = path.split_last() else { return Err(Fault::Io(Errno::NOENT.into())) };
        let parent = self.directory(above)?;
        mkdirat(&parent, *name, Mode::from_raw_mode(0o755)).map_err(host)?;
        self.inodes += 1;
        self.made.insert(path.join(&b'/'));
        self.open(&path.join(&b'/'), OFlags::DIRECTORY).map_err(|errno| through(path, errno))
    }

    fn whiteout(&mut self, name: &[u8], above: &[&[u8]]) -> Result<(), Fault> {
        let full = |name: &[u8]| [above, &[name]].concat().join(&b'/');
        if name == OPAQUE {
            let Ok(directory) = self.open(&above.join(&b'/'), OFlags::DIRECTORY) else { return Ok(()) };
            for child in children(&directory).map_err(Fault::Io)? {
                self.remove_lower(&directory, &child, &full(&child))?;
            }
            return Ok(());
        }
        if name.starts_with(NOTE) {
            return Ok(());
        }
        let hidden = &name[WHITEOUT.len()..];
        if matches!(hidden, b"" | b"." | b"..") {
            return Err(Fault::Refused(format!(
                "the whiteout {} leads out of its directory",
                shown(&[name])
            )));
        }
        match self.open(&above.join(&b'/'), OFlags::DIRECTORY) {
            Ok(directory) => self.remove_lower(&directory, hidden, &full(hidden)),
            Err(Errno::NOENT | Errno::NOTDIR) => Ok(()),
            Err(errno) => Err(through(above, errno)),
        }
    }

    /// Removes what lower layers have under a name, and leaves what this layer made, also below it.
    fn remove_lower(&mut self, parent: &OwnedFd, name: &[u8], path: &[u8]) -> Result<(), Fault> {
        if !self.made.contains(path) {
            let below = [path, b"/"].concat();
            if !self.made.range(below.clone()..).next().is_some_and(|made| made.starts_with(&below)) {
                return remove(parent, name);
            }
        }
        let Ok(directory) = self.open(path, OFlags::DIRECTORY) else { return Ok(()) };
        for child in children(&directory).map_err(Fault::Io)? {
            self.remove_lower(&directory, &child, &[path, b"/", &child].concat())?;
        }
        Ok(())
    }

    fn file(
        &mut self,
        parent: &OwnedFd,
        name: &[u8],
        entry: &Entry,
        data: &mut dyn Read,
    ) -> Result<(), Fault> {
        let flags = OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS;
        let file = openat2(parent, name, flags, Mode::from_raw_mode(0o600), resolve).map_err(host)?;
        let mut file = File::from(file);
        let mut buffer = vec![0; 64 << 10];
        loop {
            let count = data.read(&mut buffer)?;
            if count == 0 {
                break;
            }
            file.write_all(&buffer[..count]).map_err(Fault::Io)?;
            self.look(count as u64)?;
        }
        self.bytes += entry.size.next_multiple_of(Self::BLOCK_BYTES);
        if self.keeps_owners {
            fchown(&file, Some(Uid::from_raw(entry.uid)), Some(Gid::from_raw(entry.gid))).map_err(host)?;
        }
        // After the owner, as a change of that takes the set-user-id bit away.
        fchmod(&file, Mode::from_raw_mode(entry.mode)).map_err(host)?;
        futimens(&file, &times(entry.mtime)).map_err(host)
    }

    fn look(&mut self, written: u64) -> Result<(), Fault> {
        self.unlooked_bytes += written;
        if self.unlooked_bytes >= LOOK_EVERY_BYTES {
            self.unlooked_bytes = 0;
            let free = self.layout.free_bytes().map_err(|e| Fault::Io(io::Error::other(e)))?;
            if free < self.min_free_bytes {
                return Err(Fault::NoSpace(free));
            }
        }
        Ok(())
    }

    fn hard_link(&mut self, parent: &OwnedFd, name: &[u8], entry: &Entry) -> Result<(), Fault> {
        let target = clean(&entry.link)?;
        let missing =
            || Fault::Refused(format!("a hard link leads to {}, which is not there", shown(&target)));
        let (last, above) = target.split_last().ok_or_else(missing)?;
        let directory = self.open(&above.join(&b'/'), OFlags::DIRECTORY).map_err(|errno| match errno {
            Errno::NOENT => missing(),
            errno => through(above, errno),
        })?;
        let stat = statat(&directory, *last, AtFlags::SYMLINK_NOFOLLOW).map_err(|_| missing())?;
        if FileType::from_raw_mode(stat.st_mode) == FileType::Directory {
            return Err(Fault::Refused(format!("a hard link leads to the directory {}", shown(&target))));
        }
        linkat(&directory, *last, parent, name, AtFlags::empty()).map_err(host)
    }

    /// Makes room for an entry. A directory stays where the entry is one.
    fn clear(&self, parent: &OwnedFd, name: &[u8], kind: Kind) -> Result<bool, Fault> {
        match statat(parent, name, AtFlags::SYMLINK_NOFOLLOW) {
            Err(Errno::NOENT) => Ok(false),
            Err(errno) => Err(host(errno)),
            Ok(stat) => {
                if kind == Kind::Directory && FileType::from_raw_mode(stat.st_mode) == FileType::Directory {
                    return Ok(true);
                }
                remove(parent, name).map(|()| false)
            }
        }
    }
}

impl Sink for Unpacker<'_> {
    fn begin_layer(&mut self) {
        self.made.clear();
    }

    fn entry(&mut self, entry: &Entry, path: &[&[u8]], data: &mut dyn Read) -> Result<(), Fault> {
        let full = path.join(&b'/');
        let attributes = Attributes { mode: entry.mode, uid: entry.uid, gid: entry.gid, mtime: entry.mtime };
        if entry.uid == u32::MAX || entry.gid == u32::MAX {
            return Err(Fault::Refused(format!("{} belongs to an id that means nobody", shown(path))));
        }
        let Some((name, above)) = path.split_last() else {
            // The root itself.
            if entry.kind != Kind::Directory {
                return Err(Fault::Refused("its root is no directory".to_owned()));
            }
            self.directories.insert(full, attributes);
            return Ok(());
        };
        if name.starts_with(WHITEOUT) {
            return self.whiteout(name, above);
        }
        let parent = self.directory(above)?;
        // A link to itself would otherwise remove what it leads to.
        if entry.kind == Kind::HardLink && clean(&entry.link)? == path {
            return Err(Fault::Refused(format!("the hard link {} leads to itself", shown(path))));
        }
        let was_there = self.clear(&parent, name, entry.kind)?;
        match entry.kind {
            Kind::Directory => {
                if !was_there {
                    mkdirat(&parent, *name, Mode::from_raw_mode(0o700)).map_err(host)?;
                    self.bytes += Self::BLOCK_BYTES;
                }
                self.directories.insert(full.clone(), attributes);
            }
            Kind::File => self.file(&parent, name, entry, data)?,
            Kind::HardLink => self.hard_link(&parent, name, entry)?,
            Kind::Symlink => {
                if entry.link.is_empty() || entry.link.len() > MAX_TARGET_BYTES {
                    return Err(Fault::Refused(format!("the symbolic link {} leads nowhere", shown(path))));
                }
                symlinkat(&entry.link[..], &parent, *name).map_err(host)?;
                self.bytes += Self::BLOCK_BYTES;
                self.own(&parent, name, entry)?;
            }
            Kind::Fifo => {
                mkfifoat(&parent, *name, Mode::from_raw_mode(0o600)).map_err(host)?;
                self.own(&parent, name, entry)?;
                chmodat(&parent, *name, Mode::from_raw_mode(entry.mode), AtFlags::empty()).map_err(host)?;
            }
            Kind::Device => return Err(Fault::Refused(format!("{} is a device node", shown(path)))),
        }
        self.inodes += u64::from(!was_there);
        self.made.insert(full);
        Ok(())
    }
}

impl Unpacker<'_> {
    fn own(&self, parent: &OwnedFd, name: &[u8], entry: &Entry) -> Result<(), Fault> {
        if self.keeps_owners {
            let (uid, gid) = (Uid::from_raw(entry.uid), Gid::from_raw(entry.gid));
            chownat(parent, name, Some(uid), Some(gid), AtFlags::SYMLINK_NOFOLLOW).map_err(host)?;
        }
        utimensat(parent, name, &times(entry.mtime), AtFlags::SYMLINK_NOFOLLOW).map_err(host)
    }
}

fn host(errno: Errno) -> Fault {
    match errno {
        Errno::LOOP | Errno::XDEV | Errno::NAMETOOLONG | Errno::MLINK | Errno::INVAL => {
            Fault::Refused(format!("a layer cannot be unpacked: {}", io::Error::from(errno)))
        }
        errno => Fault::Io(errno.into()),
    }
}

fn through(path: &[&[u8]], errno: Errno) -> Fault {
    match errno {
        Errno::LOOP => Fault::Refused(format!("{} goes through a symbolic link", shown(path))),
        Errno::NOTDIR => Fault::Refused(format!("{} goes through a file that is no directory", shown(path))),
        Errno::XDEV => Fault::Refused(format!("{} leads out of the image", shown(path))),
        errno => host(errno),
    }
}

fn times(mtime: i64) -> Timestamps {
    let time = Timespec { tv_sec: mtime.clamp(0, i64::from(u32::MAX)), tv_nsec: 0 };
    Timestamps { last_access: time, last_modification: time }
}

fn children(directory: &OwnedFd) -> io::Result<Vec<Vec<u8>>> {
    use std::os::unix::ffi::OsStringExt as _;
    let path = format!("/proc/self/fd/{}", directory.as_raw_fd());
    fs::read_dir(path)?.map(|entry| Ok(entry?.file_name().into_vec())).collect()
}

/// Removes a name with what is below it; follows nothing.
fn remove(parent: &OwnedFd, name: &[u8]) -> Result<(), Fault> {
    use std::os::unix::ffi::OsStrExt as _;
    match unlinkat(parent, name, AtFlags::empty()) {
        Ok(()) | Err(Errno::NOENT) => Ok(()),
        Err(Errno::ISDIR | Errno::PERM) => {
            let path = Path::new("/proc/self/fd").join(parent.as_raw_fd().to_string());
            fs::remove_dir_all(path.join(std::ffi::OsStr::from_bytes(name))).map_err(Fault::Io)
        }
        Err(errno) => Err(host(errno)),
    }
}
