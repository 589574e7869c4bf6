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

/// A variable of the environment that holds a path.
fn path_var(name: &str) -> Option<PathBuf> {
    std::env::var_os(name).map(PathBuf::from).filter(|path| !path.as_os_str().is_empty())
}

/// Where the set-up script puts what it fetches and builds.
fn cache_dir() -> Option<PathBuf> {
    path_var("HYPERVISOR_CACHE").or_else(|| {
        let base = path_var("XDG_CACHE_HOME").or_else(|| path_var("HOME").map(|home| home.join(".cache")))?;
        Some(base.join("hypervisor"))
    })
}

/// The directory with the guest images, if they were made (`hack/setup.sh images`).
#[must_use]
pub fn image_dir() -> Option<PathBuf> {
    Some(cache_dir()?.join("images")).filter(|dir| dir.join("tiny/kernel").is_file())
}

/// The program `firecracker`: `FIRECRACKER_BIN`, or what the set-up script fetched.
///
/// # Errors
/// What keeps it from running microVMs here.
pub fn firecracker() -> Result<PathBuf, &'static str> {
    let fetched = || Some(cache_dir()?.join("tools/firecracker-1.12.1/firecracker"));
    let program = path_var("FIRECRACKER_BIN").or_else(fetched).filter(|path| path.is_file());
    let program = program.ok_or("firecracker is not installed; run hack/setup.sh tools")?;
    if !cfg!(target_arch = "x86_64") {
        return Err("the guest of microVMs is for x86-64");
    }
    let kvm = std::fs::OpenOptions::new().read(true).write(true).open("/dev/kvm");
    kvm.map(|_| program).map_err(|_| "/dev/kvm cannot be used")
}
