//! What of Firecracker is on this node: found, asked for its version, and checked.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, SystemTime};

use hv_machine::kvm;
use tokio::process::Command;

use crate::FirecrackerOptions;

/// The oldest version that can load a snapshot with another tap interface (`network_overrides`).
const MIN_VERSION: (u32, u32) = (1, 12);
/// How long it may take to tell its version.
const VERSION_TIMEOUT: Duration = Duration::from_secs(10);
/// What to do where it is not there.
const INSTALL: &str = "install firecracker and jailer of one release below the agent's PATH, or name them in \
                       drivers.firecracker.binary and drivers.firecracker.jailer";

/// What this node runs microVMs with.
#[derive(Clone, Debug)]
pub(crate) struct Platform {
    /// Where it really is.
    pub(crate) binary: PathBuf,
    /// `None`: VMMs are not jailed.
    pub(crate) jailer: Option<PathBuf>,
    pub(crate) version: String,
    pub(crate) message: String,
    changed_at: Option<SystemTime>,
}

impl Platform {
    /// The error says what is missing, with the remedy.
    pub(crate) async fn inspect(options: &FirecrackerOptions) -> Result<Self, String> {
        let found = options.binary.clone().or_else(|| find("firecracker"));
        let found = found.ok_or_else(|| format!("firecracker is not on this node; {INSTALL}"))?;
        let binary = found
            .canonicalize()
            .map_err(|e| format!("firecracker is not at {}: {e}; {INSTALL}", found.display()))?;
        kvm::check(&options.kvm)?;
        let version = version(&binary).await?;
        let is_root = rustix::process::geteuid().is_root();
        let (jailer, message) = match (options.use_jailer, is_root) {
            (true, true) => (Some(jailer(options, &binary)?), "jailed".to_owned()),
            (true, false) => (None, "not jailed, because the agent does not run as root".to_owned()),
            (false, _) => (None, "not jailed, as configured".to_owned()),
        };
        let changed_at = modified(&binary);
        Ok(Self { binary, jailer, version, message, changed_at })
    }

    /// Whether what was found is still what is there.
    pub(crate) fn is_current(&self) -> bool {
        self.changed_at.is_some() && modified(&self.binary) == self.changed_at
    }

    /// What the jailer calls the directory of VMMs of this name.
    pub(crate) fn exec_name(&self) -> &str {
        self.binary.file_name().and_then(|name| name.to_str()).unwrap_or("firecracker")
    }
}

fn modified(path: &Path) -> Option<SystemTime> {
    fs::metadata(path).ok()?.modified().ok()
}

fn find(program: &str) -> Option<PathBuf> {
    let is_program =
        |path: &Path| fs::metadata(path).is_ok_and(|f| f.is_file() && f.permissions().mode() & 0o111 != 0);
    std::env::split_paths(&std::env::var_os("PATH")?)
        .map(|dir| dir.join(program))
        .find(|path| is_program(path))
}

fn jailer(options: &FirecrackerOptions, binary: &Path) -> Result<PathBuf, String> {
    let beside = || {
        let name = binary.file_name()?.to_str()?.replacen("firecracker", "jailer", 1);
        Some(binary.with_file_name(name)).filter(|path| path.is_file())
    };
    let found = options.jailer.clone().or_else(beside).or_else(|| find("jailer"));
    match found {
        Some(path) if path.is_file() => Ok(path),
        Some(path) => Err(format!("the jailer is not at {}; {INSTALL}", path.display())),
        None => Err(format!(
            "there is no jailer; {INSTALL}; drivers.firecracker.use_jailer: false runs VMMs unconfined"
        )),
    }
}

/// Fails if it does not start, or is too old.
async fn version(binary: &Path) -> Result<String, String> {
    let broken = |why: String| format!("{} does not run: {why}; {INSTALL}", binary.display());
    let mut command = Command::new(binary);
    command.arg("--version").stdin(Stdio::null()).kill_on_drop(true);
    let output = tokio::time::timeout(VERSION_TIMEOUT, command.output()).await;
    let output = output.map_err(|_| broken("it does not tell its version".to_owned()))?;
    let output = output.map_err(|e| broken(e.to_string()))?;
    let text = String::from_utf8_lossy(&output.stdout);
    let version = text.split_ascii_whitespace().find_map(|word| word.strip_prefix('v'));
    let version =
        version.ok_or_else(|| broken(format!("it says {:?} instead of its version", text.trim())))?;
    let mut numbers = version.split(['.', '-']).map(|part| part.parse::<u32>().unwrap_or(0));
    let told = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
    match told >= MIN_VERSION {
        true => Ok(version.to_owned()),
        false => Err(format!(
            "firecracker {version} at {} is too old; it takes {}.{} or newer",
            binary.display(),
            MIN_VERSION.0,
            MIN_VERSION.1
        )),
    }
}
