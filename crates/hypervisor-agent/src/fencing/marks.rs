//! What the fencer and the agent leave on disk for whoever comes after: which instances were killed, and whether the
//! control plane believes that this node fences.

use std::fs::{self, File};
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};

use hv_types::InstanceId;
use serde::{Deserialize, Serialize};

/// The files of one state directory.
#[derive(Clone, Debug)]
pub(crate) struct Marks {
    dir: PathBuf,
}

/// What the control plane may believe of this node's fencing.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Belief {
    /// The boot during which it was written.
    boot_id: String,
    /// It was told that the node fences, and not told otherwise since.
    armed: bool,
}

const BELIEF: &str = "belief.json";

impl Marks {
    /// The files in the `fencing` directory of a state directory, which is made when needed.
    pub(crate) fn of(state_dir: &Path) -> Self {
        Self { dir: state_dir.join(super::DIRECTORY) }
    }

    fn path(&self, id: &InstanceId) -> PathBuf {
        self.dir.join("fenced").join(id.as_str())
    }

    pub(crate) fn is_marked(&self, id: &InstanceId) -> bool {
        self.path(id).exists()
    }

    /// Durable when it returns.
    pub(crate) fn mark(&self, id: &InstanceId, by: &str) -> io::Result<()> {
        let path = self.path(id);
        // Not with its parents: a state directory that was removed is not made anew.
        match fs::create_dir(self.dir.join("fenced")) {
            Err(e) if e.kind() != io::ErrorKind::AlreadyExists => return Err(e),
            _ => {}
        }
        let mut file = File::create(&path)?;
        file.write_all(by.as_bytes())?;
        file.sync_all()?;
        File::open(self.dir.join("fenced"))?.sync_all()
    }

    pub(crate) fn unmark(&self, id: &InstanceId) {
        // One that stays is taken for what it says once more, which does no harm: it does not run then either.
        let _ = fs::remove_file(self.path(id));
    }

    /// Whether the control plane may believe, since this boot, that this node fences. A file that cannot be read says
    /// that it may.
    pub(crate) fn is_believed(&self, boot_id: &str) -> bool {
        match fs::read(self.dir.join(BELIEF)) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => false,
            Err(_) => true,
            Ok(bytes) => serde_json::from_slice::<Belief>(&bytes)
                .map_or(true, |belief| belief.armed && belief.boot_id == boot_id),
        }
    }

    /// Durable when it returns.
    pub(crate) fn believe(&self, boot_id: &str, armed: bool) -> io::Result<()> {
        fs::create_dir_all(&self.dir)?;
        let belief = Belief { boot_id: boot_id.to_owned(), armed };
        let text = serde_json::to_vec(&belief).map_err(io::Error::from)?;
        let partial = self.dir.join("belief.json.tmp");
        let mut file = File::create(&partial)?;
        file.write_all(&text)?;
        file.sync_all()?;
        fs::rename(&partial, self.dir.join(BELIEF))?;
        File::open(&self.dir)?.sync_all()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_control_plane_believes_counts_for_one_boot_and_in_doubt_it_believes() {
        let dir = tempfile::tempdir().unwrap();
        let marks = Marks::of(dir.path());
        assert!(!marks.is_believed("b"));
        marks.believe("b", true).unwrap();
        assert!(marks.is_believed("b") && !marks.is_believed("c"));
        marks.believe("b", false).unwrap();
        assert!(!marks.is_believed("b"));
        fs::write(dir.path().join("fencing/belief.json"), b"{").unwrap();
        assert!(marks.is_believed("b"));
    }

    #[test]
    fn a_mark_stays_until_it_is_taken_away() {
        let dir = tempfile::tempdir().unwrap();
        let (marks, id) = (Marks::of(dir.path()), "i-1".parse().unwrap());
        assert!(marks.mark(&id, "test").is_err() && !dir.path().join("fencing").exists());
        fs::create_dir(dir.path().join("fencing")).unwrap();
        assert!(!marks.is_marked(&id));
        marks.mark(&id, "test").unwrap();
        assert!(Marks::of(dir.path()).is_marked(&id));
        marks.unmark(&id);
        assert!(!marks.is_marked(&id));
    }
}
