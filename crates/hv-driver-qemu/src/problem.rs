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
    #[error("qemu ended while starting: {0}")]
    DiedStarting(String),
    #[error("qemu refused {command}: {reason}")]
    Refused { command: String, reason: String },
    #[error("qemu closed its monitor during {0}")]
    Disconnected(String),
    #[error("qemu's monitor said something that is no QMP: {0}")]
    Garbled(String),
    #[error("{what} was not done within {timeout_ms} ms")]
    Timeout { what: String, timeout_ms: u64 },
    #[error("the other node cannot be reached at {0}")]
    Unreachable(std::net::SocketAddr, #[source] std::io::Error),
    #[error("its lock is held, but no process of it was found; look with `fuser {0}`")]
    Unfindable(PathBuf),
    #[error("a system call on the qemu process failed")]
    Process(#[source] std::io::Error),
    #[error("{0} is damaged")]
    Damaged(PathBuf, #[source] serde_json::Error),
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
