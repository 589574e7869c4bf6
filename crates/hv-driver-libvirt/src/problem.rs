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
    #[error("libvirtd refused {call}: {message} (code {code})")]
    Refused { call: &'static str, code: i32, message: String },
    #[error("the connection to libvirtd ended during {0}")]
    Disconnected(&'static str),
    #[error("libvirtd cannot be reached: {0}")]
    Unreachable(String),
    #[error("the answer to {0} cannot be understood")]
    Garbled(&'static str, #[source] Box<dyn std::error::Error + Send + Sync>),
    #[error("{what} was not done within {timeout_ms} ms")]
    Timeout { what: String, timeout_ms: u64 },
    #[error("{0} is damaged")]
    Damaged(PathBuf, #[source] serde_json::Error),
    #[error("libvirtd took the snapshot {0} and does not know it")]
    Snapshot(String),
    #[error("{0}")]
    Unwanted(String),
    #[error("{0}")]
    Migration(String),
}

/// No such domain (virterror.h: `VIR_ERR_NO_DOMAIN`).
const NO_DOMAIN: i32 = 42;
/// Its state does not allow it (virterror.h: `VIR_ERR_OPERATION_INVALID`).
const OPERATION_INVALID: i32 = 55;
/// No such snapshot (virterror.h: `VIR_ERR_NO_DOMAIN_SNAPSHOT`).
const NO_SNAPSHOT: i32 = 72;
/// The guest agent does not answer (virterror.h: `VIR_ERR_AGENT_UNRESPONSIVE`).
const AGENT_UNRESPONSIVE: i32 = 86;

impl Problem {
    pub(crate) fn file<'a>(
        action: &'static str,
        path: &'a Path,
    ) -> impl FnOnce(std::io::Error) -> Self + use<'a> {
        move |source| Self::File { action, path: path.to_owned(), source }
    }

    fn has_code(&self, wanted: i32) -> bool {
        matches!(self, Self::Refused { code, .. } if *code == wanted)
    }

    pub(crate) fn is_no_domain(&self) -> bool {
        self.has_code(NO_DOMAIN)
    }

    pub(crate) fn is_wrong_state(&self) -> bool {
        self.has_code(OPERATION_INVALID)
    }

    pub(crate) fn is_no_snapshot(&self) -> bool {
        self.has_code(NO_SNAPSHOT)
    }

    pub(crate) fn is_agent_silent(&self) -> bool {
        self.has_code(AGENT_UNRESPONSIVE)
    }

    /// Whether libvirtd itself is away, so that nothing was refused.
    pub(crate) fn is_away(&self) -> bool {
        matches!(self, Self::Disconnected(_) | Self::Unreachable(_))
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
