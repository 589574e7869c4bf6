//! What may go when nobody needs it: by age, and by what is free on the disk.

use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::time::{Duration, SystemTime};

use hv_types::InstanceType;

use crate::layout::{self, Layout};
use crate::reference::Digest;
use crate::state::State;
use crate::store::Collected;
use crate::{Result, StoreOptions};

/// An image used within this time is not removed for want of space: an instance may be about to start from
/// it.
const FRESH: Duration = Duration::from_secs(600);

/// Sweeps away old partial downloads and blobs that no form has.
pub(crate) fn sweep_leftovers(state: &State, layout: &Layout, age: Duration) -> Result<()> {
    for path in layout::entries(&layout.partial())? {
        let key = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
        let is_pinned = state.is_pinned(&key) || state.is_pinned(&format!("sha256:{key}"));
        if !is_pinned && is_older(&path, age) {
            layout::remove_file(&path)?;
        }
    }
    for path in layout::entries(&layout.blobs())? {
        let unlinked = fs::metadata(&path).is_ok_and(|metadata| metadata.nlink() == 1);
        let digest = path
            .file_name()
            .and_then(|hex| format!("sha256:{}", hex.to_string_lossy()).parse::<Digest>().ok());
        if let Some(digest) = digest.filter(|_| unlinked && is_older(&path, age)) {
            state.remove_blob(&digest)?;
        }
    }
    Ok(())
}

fn is_older(path: &Path, age: Duration) -> bool {
    let modified = fs::metadata(path).and_then(|metadata| metadata.modified());
    modified.is_ok_and(|modified| idle_since(modified) >= age)
}

fn idle_since(time: SystemTime) -> Duration {
    SystemTime::now().duration_since(time).unwrap_or_default()
}

/// See [`Store::collect`](crate::Store::collect).
pub(crate) fn collect(
    state: &mut State,
    layout: &Layout,
    options: &StoreOptions,
    (unused_for, keep_free): (Duration, u64),
    dry_run: bool,
) -> Result<Vec<Collected>> {
    let mut free = layout.free_bytes()?;
    if !dry_run {
        // Under pressure what a pull might still have gone on with goes first.
        let age = if free < keep_free { options.partial_age.min(FRESH) } else { options.partial_age };
        sweep_leftovers(state, layout, age)?;
        free = layout.free_bytes()?;
    }
    let mut unused: Vec<_> = state
        .images()
        .map(|image| (image.last_used, state.describe(image)))
        .filter(|(_, image)| image.users.is_empty())
        .collect();
    unused.sort_by(|a, b| a.0.cmp(&b.0).then_with(|| a.1.info.name.cmp(&b.1.info.name)));
    let mut collected = Vec::new();
    for (last_used, image) in unused {
        let idle = idle_since(last_used);
        let lacks_space = free < keep_free && idle >= FRESH;
        if idle < unused_for && !lacks_space {
            continue;
        }
        let (name, instance_type, size_bytes) =
            (image.info.name, image.info.instance_type, image.info.size_bytes);
        if dry_run {
            free = free.saturating_add(size_bytes);
        } else {
            remove(state, &name, instance_type)?;
            free = layout.free_bytes()?;
        }
        collected.push(Collected { name, instance_type, size_bytes });
    }
    Ok(collected)
}

fn remove(state: &mut State, name: &str, instance_type: InstanceType) -> Result<()> {
    state.forget(name, instance_type)?;
    state.sweep_forms()
}
