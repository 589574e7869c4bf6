//! Where the programs under test and the guest image are.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};

/// A program of this project.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Program {
    /// `hypervisor-server`
    Server,
    /// `hypervisor-agent`
    Agent,
    /// `hypervisor-ctl`
    Ctl,
}

impl Program {
    /// The file's name.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Server => "hypervisor-server",
            Self::Agent => "hypervisor-agent",
            Self::Ctl => "hypervisor-ctl",
        }
    }

    /// The program that was built beside the running test, or in the directory that `TESTKIT_PROGRAMS` names.
    ///
    /// # Errors
    /// It was not built.
    pub fn path(self) -> Result<PathBuf> {
        let dir = match std::env::var_os("TESTKIT_PROGRAMS") {
            Some(dir) => PathBuf::from(dir),
            None => profile_dir()?,
        };
        let path = dir.join(self.name());
        ensure!(path.is_file(), "{} is missing: run `cargo build --workspace` first", path.display());
        Ok(path)
    }
}

/// `target/debug` for a test in `target/debug/deps`.
fn profile_dir() -> Result<PathBuf> {
    let test = std::env::current_exe().context("the test does not know its own path")?;
    let dir = test.parent().and_then(Path::parent).context("the test is not in a target directory")?;
    Ok(dir.to_path_buf())
}

/// The directory with the guest images, if they were made (`hack/setup.sh images`).
#[must_use]
pub fn image_dir() -> Option<PathBuf> {
    let set = |name| {
        std::env::var_os(name).map(PathBuf::from).filter(|path: &PathBuf| !path.as_os_str().is_empty())
    };
    let cache = set("HYPERVISOR_CACHE").or_else(|| {
        let base = set("XDG_CACHE_HOME").or_else(|| set("HOME").map(|home| home.join(".cache")))?;
        Some(base.join("hypervisor"))
    })?;
    Some(cache.join("images")).filter(|dir| dir.join("tiny/kernel").is_file())
}
