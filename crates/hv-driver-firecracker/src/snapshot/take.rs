//! Taking a snapshot.

use std::fs::{self, File};
use std::os::unix::fs::{DirBuilderExt as _, PermissionsExt as _};
use std::path::Path;
use std::sync::Arc;

use rustix::fs::OFlags;
use rustix::process::{Gid, Uid};

use super::{MEMORY, META, Meta, STATE, partial_of, path_of, read};
use crate::api::types::{SnapshotCreate, SnapshotType};
use crate::disks;
use crate::files::{
    HELD, InstanceDir, OfRun, RUN, SNAPSHOTS, Stored, StoredRun, now_ms, open_in_root, remove_file,
    remove_tree, settle,
};
use crate::machine::{Live, Machine};
use crate::problem::{Outcome, Problem};

/// What the VMM writes, in its root.
pub(super) const TAKEN_STATE: &str = "taken.state";
pub(super) const TAKEN_MEMORY: &str = "taken.memory";

impl Machine {
    /// Takes a snapshot that is not there yet. `change` is held; `live` is the running machine.
    pub(super) async fn take(
        self: &Arc<Self>,
        name: &str,
        live: Option<&Arc<Live>>,
        memory: bool,
    ) -> Outcome<Meta> {
        let (stored, root) = (self.stored(), self.root());
        let partial = partial_of(&self.dir, name);
        make_dir(&self.dir, &partial)?;
        let mut meta = blank(name, &stored);
        let mut base = None;
        if let Some(live) = live {
            meta.was_paused = live.is_paused().await;
            meta.memory = memory;
            base = self.base()?.filter(|_| memory);
            meta.is_diff = base.is_some();
            if !meta.was_paused {
                self.dir.note(HELD, &OfRun { run: live.run.number })?;
                live.set_paused(true).await?;
            }
        }
        let taken = self.take_still(live, &meta, &stored, &partial).await;
        if let Some(live) = live.filter(|_| !meta.was_paused) {
            live.set_paused(false).await?;
            self.dir.remove(HELD)?;
        }
        taken?;
        let (dir, finished) = (self.dir.clone(), meta.clone());
        let finishing = tokio::task::spawn_blocking(move || finish(&dir, &root, &finished, base.as_ref()));
        finishing.await.map_err(|e| Problem::Process(std::io::Error::other(e)))??;
        if meta.memory {
            self.track_since(Some(name.to_owned()))?;
        }
        Ok(meta)
    }

    /// What must happen while the machine stands still.
    async fn take_still(
        &self,
        live: Option<&Arc<Live>>,
        meta: &Meta,
        stored: &Stored,
        partial: &Path,
    ) -> Outcome<()> {
        let root = self.root();
        if let Some(live) = live.filter(|_| meta.memory) {
            remove_file(&root.join(TAKEN_STATE))?;
            remove_file(&root.join(TAKEN_MEMORY))?;
            // Whatever comes of it, the VMM tracks from here on.
            self.track_since(None)?;
            let request = SnapshotCreate {
                snapshot_type: if meta.is_diff { SnapshotType::Diff } else { SnapshotType::Full },
                snapshot_path: TAKEN_STATE.to_owned(),
                mem_file_path: TAKEN_MEMORY.to_owned(),
            };
            live.api().await?.create_snapshot(&request).await?;
        }
        let (disks, partial) = (stored.disks.clone(), partial.to_owned());
        let copying = tokio::task::spawn_blocking(move || {
            disks
                .iter()
                .try_for_each(|disk| disks::copy(&root.join(&disk.file), &partial.join(&disk.file), 0))
        });
        copying.await.map_err(|e| Problem::Process(std::io::Error::other(e)))?
    }

    /// The snapshot since which the VMM tracks memory, if it is still there.
    fn base(&self) -> Outcome<Option<Meta>> {
        let since = self.dir.read::<StoredRun>(RUN)?.and_then(|run| run.tracked_since);
        let base = since.map(|name| read(&self.dir, &name)).transpose()?.flatten();
        Ok(base.filter(|meta| meta.memory && self.shared.options.diff_snapshots))
    }

    pub(super) fn track_since(&self, tracked_since: Option<String>) -> Outcome<()> {
        match self.dir.read::<StoredRun>(RUN)? {
            Some(run) => self.dir.note(RUN, &StoredRun { tracked_since, ..run }),
            None => Ok(()),
        }
    }
}

fn blank(name: &str, stored: &Stored) -> Meta {
    let spec = &stored.config.spec;
    Meta {
        version: Meta::VERSION,
        name: name.to_owned(),
        created_ms: now_ms(),
        memory: false,
        was_paused: false,
        disks: stored.disks.clone(),
        is_diff: false,
        cpu_cores: spec.cpu_cores,
        memory_bytes: spec.memory_bytes,
        has_interface: stored.has_interface(),
        cmdline: stored.cmdline.clone(),
        has_initrd: stored.has_initrd,
    }
}

fn make_dir(dir: &InstanceDir, partial: &Path) -> Outcome<()> {
    remove_tree(partial)?;
    let made = fs::DirBuilder::new().recursive(true).mode(0o700).create(partial);
    made.map_err(Problem::file("make", partial))?;
    crate::files::sync_dir(&dir.path)
}

/// Takes what the VMM wrote out of its root, and makes the snapshot whole.
fn finish(dir: &InstanceDir, root: &Path, meta: &Meta, base: Option<&Meta>) -> Outcome<()> {
    let partial = partial_of(dir, &meta.name);
    if meta.memory {
        take_over(&root.join(TAKEN_STATE), &partial.join(STATE))?;
        let memory = partial.join(MEMORY);
        match base {
            None => take_over(&root.join(TAKEN_MEMORY), &memory)?,
            Some(base) => {
                let changes = partial.join("changes");
                take_over(&root.join(TAKEN_MEMORY), &changes)?;
                disks::copy(&path_of(dir, &base.name).join(MEMORY), &memory, 0)?;
                lay_over(&changes, &memory)?;
                remove_file(&changes)?;
            }
        }
        readable(&partial.join(STATE))?;
        readable(&memory)?;
    }
    InstanceDir::at(&partial).write(META, meta)?;
    settle(&partial, &path_of(dir, &meta.name))?;
    crate::files::sync_dir(&dir.file(SNAPSHOTS))
}

/// Out of the VMM's reach, and ours; what is no plain file is refused.
fn take_over(from: &Path, to: &Path) -> Outcome<()> {
    fs::rename(from, to).map_err(Problem::file("take", from))?;
    let take = || {
        let file = open_in_root(to, OFlags::RDONLY)?;
        if rustix::process::geteuid().is_root() {
            rustix::fs::fchown(&file, Some(Uid::ROOT), Some(Gid::ROOT))?;
        }
        file.sync_all()
    };
    take().map_err(Problem::file("take over", to))
}

fn lay_over(changes: &Path, memory: &Path) -> Outcome<()> {
    let lay = || {
        let target = fs::OpenOptions::new().write(true).open(memory)?;
        disks::overlay(&File::open(changes)?, &target)?;
        target.sync_all()
    };
    lay().map_err(Problem::file("lay changes over", memory))
}

/// The VMMs that load it share the file, each as a user of its own; nobody writes it any more.
fn readable(path: &Path) -> Outcome<()> {
    fs::set_permissions(path, fs::Permissions::from_mode(0o444)).map_err(Problem::file("close", path))
}
