//! What can go wrong below the driver contract.

use std::path::{Path, PathBuf};

use hv_machine::files::FileProblem;

/// Why something below the driver contract failed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Problem {
    #[error("{action} {path}")]
    File {
        action: &'static str,
        path: PathBuf,
        #[source]
        source: std::io::Error,
    },
    #[error("{tool} could not be run; {remedy}")]
    Spawn {
        tool: String,
        remedy: &'static str,
        #[source]
        source: std::io::Error,
    },
    #[error("{tool} ended with {status}: {stderr}")]
    Tool { tool: String, status: String, stderr: String },
    #[error("firecracker ended while starting: {0}")]
    DiedStarting(String),
    #[error("firecracker refused {request} ({status}): {reason}")]
    Refused { request: String, status: u16, reason: String },
    #[error("firecracker could not be asked: {request}")]
    Unreachable {
        request: String,
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    #[error("{what} was not done within {timeout_ms} ms")]
    Timeout { what: String, timeout_ms: u64 },
    #[error("its lock is held, but no process of it was found; look with `fuser {0}`")]
    Unfindable(PathBuf),
    #[error("a system call on the firecracker process failed")]
    Process(#[source] std::io::Error),
    #[error("{0} is damaged")]
    Damaged(PathBuf, #[source] serde_json::Error),
    #[error("all {0} user ids of drivers.firecracker.uid_base are in use")]
    NoUid(u32),
}

impl Problem {
    pub(crate) fn file<'a>(
        action: &'static str,
        path: &'a Path,
    ) -> impl FnOnce(std::io::Error) -> Self + use<'a> {
        move |source| Self::File { action, path: path.to_owned(), source }
    }
}

impl FileProblem for Problem {
    fn failed(action: &'static str, path: &Path, source: std::io::Error) -> Self {
        Self::file(action, path)(source)
    }

    fn damaged(path: PathBuf, source: serde_json::Error) -> Self {
        Self::Damaged(path, source)
    }
}

pub(crate) type Outcome<T> = std::result::Result<T, Problem>;
