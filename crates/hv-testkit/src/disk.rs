//! A small file system of its own, to be filled up: a tmpfs that is unmounted when it is dropped.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use tempfile::TempDir;

/// What the source of every mount begins with; the process id follows.
const PREFIX: &str = "hvt-disk-";
/// The file that takes the room.
const FILLER: &str = "filler";

/// A disk of a known size.
#[derive(Debug)]
pub struct SmallDisk {
    dir: TempDir,
}

impl SmallDisk {
    /// A disk of so many bytes. `None`, reported by [`crate::skip`] for `suite`, where nothing can be mounted here.
    ///
    /// # Errors
    /// The directory cannot be made.
    pub fn create(suite: &str, bytes: u64) -> Result<Option<Self>> {
        sweep();
        let dir = tempfile::Builder::new().prefix("hvdisk").tempdir()?;
        let source = format!("{PREFIX}{}", std::process::id());
        let size = format!("size={bytes}");
        let mounted =
            Command::new("mount").args(["-t", "tmpfs", "-o", &size, &source]).arg(dir.path()).output();
        match mounted {
            Ok(output) if output.status.success() => Ok(Some(Self { dir })),
            Ok(output) => {
                let why = String::from_utf8_lossy(&output.stderr).trim().to_owned();
                crate::skip(suite, &format!("a tmpfs cannot be mounted here ({why}); run as root"));
                Ok(None)
            }
            Err(error) => {
                crate::skip(suite, &format!("mount cannot be run ({error})"));
                Ok(None)
            }
        }
    }

    /// Where it is mounted.
    #[must_use]
    pub fn path(&self) -> &Path {
        self.dir.path()
    }

    /// Takes all the room but so many bytes.
    ///
    /// # Errors
    /// There is less than that already.
    pub fn fill(&self, leave_bytes: u64) -> Result<()> {
        let statistics = rustix::fs::statvfs(self.path())?;
        let free = statistics.f_bavail * statistics.f_frsize;
        let take = free.checked_sub(leave_bytes).with_context(|| format!("only {free} bytes are free"))?;
        let file = File::create(self.path().join(FILLER))?;
        Ok(rustix::fs::fallocate(&file, rustix::fs::FallocateFlags::empty(), 0, take)?)
    }

    /// Gives the room back.
    ///
    /// # Errors
    /// It was not filled.
    pub fn free(&self) -> Result<()> {
        Ok(std::fs::remove_file(self.path().join(FILLER))?)
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        // The next run sweeps what cannot be unmounted now.
        let _ = unmount(self.path());
    }
}

/// Unmounts what runs that have died left behind.
fn sweep() {
    for line in std::fs::read_to_string("/proc/mounts").unwrap_or_default().lines() {
        let mut words = line.split(' ');
        let (Some(source), Some(target)) = (words.next(), words.next()) else { continue };
        let owner = source.strip_prefix(PREFIX).and_then(|pid| pid.parse::<u32>().ok());
        if owner.is_some_and(|pid| !Path::new(&format!("/proc/{pid}")).exists()) {
            // Another run may sweep at the same time.
            let _ = unmount(&PathBuf::from(target));
        }
    }
}

fn unmount(path: &Path) -> Result<()> {
    // Lazily: a process that is just ending may have a file open.
    let output = Command::new("umount").arg("-l").arg(path).output()?;
    ensure!(output.status.success(), "umount: {}", String::from_utf8_lossy(&output.stderr));
    Ok(())
}
