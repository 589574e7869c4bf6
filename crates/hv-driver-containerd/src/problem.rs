//! What can go wrong below the driver contract.

use std::path::{Path, PathBuf};

use containerd_client::tonic::{Code, Status};
use hv_driver::DriverError;
use hv_machine::files::FileProblem;
use hv_types::InstanceId;

use crate::NAME;

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
    #[error("containerd refused {call}")]
    Call {
        call: &'static str,
        #[source]
        status: Box<Status>,
    },
    #[error("containerd did not answer {call} within {timeout_ms} ms")]
    Timeout { call: &'static str, timeout_ms: u64 },
    #[error("{tool} failed: {message}")]
    Tool { tool: String, message: String },
    #[error("its image cannot be used: {0}")]
    Image(String),
    #[error("{0} is damaged")]
    Damaged(PathBuf, #[source] serde_json::Error),
    #[error("the runtime specification cannot be made: {0}")]
    Spec(String),
    #[error("a system call on the container's process failed")]
    Process(#[source] std::io::Error),
    #[error("{0}")]
    State(String),
    /// What this node can never run.
    #[error("{0}")]
    Invalid(String),
}

impl Problem {
    pub(crate) fn file<'a>(
        action: &'static str,
        path: &'a Path,
    ) -> impl FnOnce(std::io::Error) -> Self + use<'a> {
        move |source| Self::File { action, path: path.to_owned(), source }
    }

    fn code(&self) -> Option<Code> {
        match self {
            Self::Call { status, .. } => Some(status.code()),
            _ => None,
        }
    }

    /// There is no such thing.
    pub(crate) fn is_not_found(&self) -> bool {
        self.code() == Some(Code::NotFound)
    }

    /// It is there already.
    pub(crate) fn is_there(&self) -> bool {
        match self {
            // A task that is being cleared away is reported by its directory, which is there still, or just was.
            Self::Call { status, .. } => {
                let remains = ["file exists", "open shim log pipe", "getwd: no such file or directory"];
                status.code() == Code::AlreadyExists
                    || remains.iter().any(|text| status.message().contains(text))
            }
            _ => false,
        }
    }

    /// containerd itself could not be reached, or went away during the call.
    pub(crate) fn is_down(&self) -> bool {
        match self {
            Self::Call { status, .. } => match status.code() {
                Code::Unavailable => true,
                // Both are made by the client when a connection breaks.
                Code::Unknown | Code::Cancelled | Code::Internal => {
                    std::error::Error::source(status.as_ref()).is_some()
                }
                _ => false,
            },
            Self::Timeout { .. } => true,
            _ => false,
        }
    }

    /// As the contract says it.
    pub(crate) fn told(self, id: &InstanceId, operation: &'static str) -> DriverError {
        match self {
            Self::Invalid(reason) => DriverError::invalid(id, reason),
            // The same bytes will not do better.
            Self::Image(_) => DriverError::invalid(id, self.to_string()),
            problem if problem.is_down() => {
                DriverError::Unavailable { driver: NAME, reason: problem.remedy() }
            }
            problem => DriverError::failed(id, operation, problem),
        }
    }

    /// What to do where containerd is not there.
    pub(crate) fn remedy(&self) -> String {
        let cause = match self {
            Self::Call { status, .. } => chain(status.as_ref()),
            other => chain(other),
        };
        format!(
            "containerd does not answer ({cause}); install it (apt-get install containerd runc) and start it, or set the \
             driver's address to its socket"
        )
    }
}

/// An error with all its causes, on one line.
fn chain(error: &(dyn std::error::Error + 'static)) -> String {
    let mut text = String::new();
    let mut next: Option<&(dyn std::error::Error + 'static)> = Some(error);
    while let Some(error) = next {
        let part = match error.downcast_ref::<Status>() {
            Some(status) => status.message().to_owned(),
            None => error.to_string(),
        };
        if !part.is_empty() && !text.ends_with(&part) {
            text = if text.is_empty() { part } else { format!("{text}: {part}") };
        }
        next = error.source();
    }
    text
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

/// What is gone already need not be removed.
pub(crate) trait Gone {
    fn or_gone(self) -> Outcome<()>;
}

impl<T> Gone for Outcome<T> {
    fn or_gone(self) -> Outcome<()> {
        match self {
            Ok(_) => Ok(()),
            Err(problem) if problem.is_not_found() => Ok(()),
            Err(problem) => Err(problem),
        }
    }
}
