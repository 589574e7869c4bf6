//! Snapshots: what a microVM's disks, and its memory if it runs, were at a moment.
//!
//! # Theory of operation
//! A snapshot is a directory `snapshots/<name>/` with copies of the disks, `state` and `memory` of the VMM if memory is in
//! it, and `meta.json`. It is made as `.<name>.partial` and renamed when all of it is on disk, so what is listed is whole.
//! The machine stands still while the VMM writes and the disks are copied (shared where the file system can).
//!
//! The first snapshot of a run has all memory. Later ones have the VMM write what changed since the one before
//! (`Diff`), which is laid over a copy of that one's memory after the machine goes on: each snapshot is complete by itself
//! and can be deleted alone.
//!
//! Returning to one, or a clone's first start, is a note (`restore.json`) that the next start follows: so a crash at any
//! point leaves an instance that does not run and whose start does what was asked. Memory is never copied for that: the
//! VMM maps the snapshot's file privately, and a fleet of clones shares it.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use hv_driver::SnapshotInfo;
use hv_types::InstanceId;
use serde::{Deserialize, Serialize};

use crate::boot::After;
use crate::disks;
use crate::files::{
    INITRD, InstanceDir, KERNEL, LOAD_MEMORY, LOAD_STATE, RESTORE, SNAPSHOTS, Stored, StoredDisk,
    remove_file, remove_tree, root_of, settle,
};
use crate::problem::{Outcome, Problem};

mod operations;
mod take;

/// What a snapshot says of itself; written last.
const META: &str = "meta.json";
/// The VMM's state, and the guest's memory.
const STATE: &str = "state";
const MEMORY: &str = "memory";
/// Longest name.
const MAX_NAME_BYTES: usize = 63;

/// A snapshot as it is kept.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Meta {
    pub(crate) version: u32,
    pub(crate) name: String,
    pub(crate) created_ms: u64,
    pub(crate) memory: bool,
    /// Whether the machine stood still when it was taken.
    pub(crate) was_paused: bool,
    pub(crate) disks: Vec<StoredDisk>,
    /// What was written of the memory: all, or what had changed.
    pub(crate) is_diff: bool,
    /// What the machine was: it can only be loaded into the same.
    pub(crate) cpu_cores: u32,
    pub(crate) memory_bytes: u64,
    pub(crate) has_interface: bool,
    pub(crate) cmdline: String,
    pub(crate) has_initrd: bool,
}

impl Meta {
    const VERSION: u32 = 1;

    fn info(&self, dir: &Path) -> SnapshotInfo {
        use std::os::unix::fs::MetadataExt as _;
        let entries = fs::read_dir(dir).into_iter().flatten().filter_map(Result::ok);
        let size_bytes = entries.filter_map(|entry| Some(entry.metadata().ok()?.blocks() * 512)).sum();
        let created_at: SystemTime = UNIX_EPOCH + Duration::from_millis(self.created_ms);
        SnapshotInfo { name: self.name.clone(), created_at, memory: self.memory, size_bytes }
    }
}

/// What the next start is to go on from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Restore {
    /// The snapshot of this instance; `None`: memory and state lie in the root already, from another's.
    name: Option<String>,
    was_paused: bool,
}

impl Restore {
    pub(crate) fn after(&self) -> After {
        if self.was_paused { After::Stand } else { After::Run }
    }

    /// The snapshot of this instance, since which its memory is tracked.
    pub(crate) fn own_name(&self) -> Option<String> {
        self.name.clone()
    }
}

/// The note, carried out as far as files go. `None`: the next start boots.
pub(crate) fn pending(dir: &InstanceDir, stored: &Stored) -> Outcome<Option<Restore>> {
    let Some(restore) = dir.read::<Restore>(RESTORE)? else {
        let root = root_of(dir, &stored.config.id);
        remove_file(&root.join(LOAD_MEMORY))?;
        remove_file(&root.join(LOAD_STATE))?;
        return Ok(None);
    };
    let Some(name) = &restore.name else { return Ok(Some(restore)) };
    let Some(meta) = read(dir, name)? else {
        dir.remove(RESTORE)?;
        return Ok(None);
    };
    lay_out(&path_of(dir, name), &meta, &root_of(dir, &stored.config.id))?;
    if meta.memory {
        return Ok(Some(restore));
    }
    dir.remove(RESTORE)?;
    Ok(None)
}

/// Makes a root what a snapshot says: disks copied, memory and state linked.
fn lay_out(snapshot: &Path, meta: &Meta, root: &Path) -> Outcome<()> {
    for disk in &meta.disks {
        let partial = root.join(format!("{}.partial", disk.file));
        disks::copy(&snapshot.join(&disk.file), &partial, 0)?;
        settle(&partial, &root.join(&disk.file))?;
    }
    for (from, to) in [(MEMORY, LOAD_MEMORY), (STATE, LOAD_STATE)] {
        let to = root.join(to);
        remove_file(&to)?;
        if meta.memory {
            fs::hard_link(snapshot.join(from), &to).map_err(Problem::file("link", &to))?;
        }
    }
    Ok(())
}

fn path_of(dir: &InstanceDir, name: &str) -> PathBuf {
    dir.file(SNAPSHOTS).join(name)
}

fn partial_of(dir: &InstanceDir, name: &str) -> PathBuf {
    dir.file(SNAPSHOTS).join(format!(".{name}.partial"))
}

/// Whether it is 1 to 63 lower-case letters, digits and `-`: then it is a plain name of a directory too.
pub(crate) fn is_name(name: &str) -> bool {
    let is_letter = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-';
    !name.is_empty() && name.len() <= MAX_NAME_BYTES && name.bytes().all(is_letter)
}

/// A whole snapshot; `None` if there is none of that name.
pub(crate) fn read(dir: &InstanceDir, name: &str) -> Outcome<Option<Meta>> {
    if !is_name(name) {
        return Ok(None);
    }
    let path = path_of(dir, name);
    if !path.is_dir() {
        return Ok(None);
    }
    InstanceDir::at(path).read::<Meta>(META)
}

/// Whole ones, oldest first.
pub(crate) fn list(dir: &InstanceDir) -> Outcome<Vec<SnapshotInfo>> {
    let path = dir.file(SNAPSHOTS);
    let entries = match fs::read_dir(&path) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        other => other.map_err(Problem::file("read", &path))?,
    };
    let mut found = Vec::new();
    for entry in entries {
        let entry = entry.map_err(Problem::file("read", &path))?;
        let Some(name) = entry.file_name().to_str().map(str::to_owned) else { continue };
        if let Some(meta) = read(dir, &name)? {
            found.push(meta.info(&entry.path()));
        }
    }
    found.sort_by(|a, b| (a.created_at, &a.name).cmp(&(b.created_at, &b.name)));
    Ok(found)
}

/// Forgets one. What is being removed is none any more, whatever happens.
fn remove(dir: &InstanceDir, name: &str) -> Outcome<()> {
    let (path, trash) = (path_of(dir, name), dir.file(SNAPSHOTS).join(format!(".{name}.deleting")));
    remove_tree(&trash)?;
    match fs::rename(&path, &trash) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        other => other.map_err(Problem::file("rename", &path))?,
    }
    crate::files::sync_dir(&dir.file(SNAPSHOTS))?;
    remove_tree(&trash)
}

/// Takes away what an agent that died in the middle left: half a snapshot, half a deletion.
pub(crate) fn sweep(dir: &InstanceDir, root: &Path) -> Outcome<()> {
    for entry in fs::read_dir(dir.file(SNAPSHOTS)).into_iter().flatten().filter_map(Result::ok) {
        if entry.file_name().as_encoded_bytes().starts_with(b".") {
            remove_tree(&entry.path())?;
        }
    }
    remove_file(&root.join(take::TAKEN_STATE))?;
    remove_file(&root.join(take::TAKEN_MEMORY))
}

/// Prepares a new instance to go on from another's snapshot.
pub(crate) fn lay_out_clone(
    source: (&InstanceDir, &InstanceId),
    meta: &Meta,
    target: (&InstanceDir, &InstanceId),
) -> Outcome<()> {
    let root = crate::jail::make_root(target.0, target.1)?;
    let source_root = root_of(source.0, source.1);
    disks::copy(&source_root.join(KERNEL), &root.join(KERNEL), 0)?;
    if meta.has_initrd {
        disks::copy(&source_root.join(INITRD), &root.join(INITRD), 0)?;
    }
    lay_out(&path_of(source.0, &meta.name), meta, &root)?;
    if meta.memory {
        target.0.write(RESTORE, &Restore { name: None, was_paused: false })?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_plain() {
        for name in ["a", "before-update-2", &"x".repeat(63)] {
            assert!(is_name(name), "{name}");
        }
        for name in ["", ".", "..", "a/b", "A", "ü", ".a.partial", &"x".repeat(64)] {
            assert!(!is_name(name), "{name}");
        }
    }
}
