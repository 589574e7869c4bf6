//! Why a command did not succeed, and the exit code that says so to scripts.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

use hv_config::{ConfigError, HumanDuration};
use hv_types::{ErrorCode, ServiceError};

/// The exit codes. They are part of the interface.
pub mod exit_code {
    /// Done.
    pub const OK: u8 = 0;
    /// It failed for another reason than those below.
    pub const FAILED: u8 = 1;
    /// The command, a flag, a file or a value in it is wrong.
    pub const USAGE: u8 = 2;
    /// The object does not exist.
    pub const NOT_FOUND: u8 = 3;
    /// The object exists already, or somebody else changed it in between.
    pub const CONFLICT: u8 = 4;
    /// The object's state does not allow it now.
    pub const PRECONDITION: u8 = 5;
    /// The server does not answer, or cannot now.
    pub const UNAVAILABLE: u8 = 6;
    /// It did not happen in time; it may still happen.
    pub const TIMED_OUT: u8 = 7;
    /// The instance failed while it was waited for.
    pub const INSTANCE_FAILED: u8 = 8;
    /// Interrupted from the keyboard: 128 + SIGINT.
    pub const INTERRUPTED: u8 = 130;
}

/// Why a command did not succeed.
#[derive(Debug, thiserror::Error)]
pub enum CtlError {
    /// The command line asks for something that makes no sense.
    #[error("{0}")]
    Usage(String),
    /// The settings are wrong.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// A file's content is wrong. The text begins with `file:line:column`.
    #[error("{0}")]
    Document(String),
    /// The server refused, or was not reached.
    #[error("{}", .0.message())]
    Service(ServiceError),
    /// No object has this name or id.
    #[error(
        "no {kind} is called {reference:?}, and no {kind}'s id starts with it; see `hypervisor-ctl {kind} list`"
    )]
    NotFound {
        /// `instance`, `vm`, `node`, …
        kind: &'static str,
        /// As typed.
        reference: String,
    },
    /// Several objects have this name or id prefix.
    #[error("{reference:?} fits several {kind}s, give more of the id:\n{candidates}")]
    Ambiguous {
        /// `instance`, `vm`, `node`, …
        kind: &'static str,
        /// As typed.
        reference: String,
        /// One line each: id, name.
        candidates: String,
    },
    /// The object's state does not allow it.
    #[error("{0}")]
    Precondition(String),
    /// Somebody else asked for something else in between.
    #[error("{0}")]
    Overtaken(String),
    /// It did not happen in time.
    #[error("{what} after {}{}", HumanDuration::new(*.after), .hint)]
    TimedOut {
        /// What is the case instead.
        what: String,
        /// How long it was waited for.
        after: Duration,
        /// How to go on; begins with its own punctuation.
        hint: String,
    },
    /// The instance failed.
    #[error("instance {name} {what}: {reason}")]
    InstanceFailed {
        /// Which one.
        name: String,
        /// `failed`, or what it settled in.
        what: String,
        /// The server's reason.
        reason: String,
    },
    /// A file or directory cannot be read or written.
    #[error("cannot {action} {}", path.display())]
    File {
        /// `read`, `write`, …
        action: &'static str,
        /// Which one.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The terminal or a standard stream does not work.
    #[error("cannot {action}")]
    Stream {
        /// What was attempted.
        action: &'static str,
        /// What the system said.
        source: io::Error,
    },
    /// What the server sent cannot be shown.
    #[error("cannot write {what} as {format}")]
    Render {
        /// What it is.
        what: &'static str,
        /// `json` or `yaml`.
        format: &'static str,
        /// Why not.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The server's stream ended before what was waited for came.
    #[error("{0}")]
    Ended(String),
    /// A signal ended the command.
    #[error("interrupted by signal {0}")]
    Signal(u8),
}

impl CtlError {
    /// The stable code, as `-o json` shows it.
    pub fn code(&self) -> ErrorCode {
        match self {
            Self::Usage(_) | Self::Config(_) | Self::Document(_) | Self::Ambiguous { .. } => {
                ErrorCode::InvalidArgument
            }
            Self::Service(error) => error.code(),
            Self::NotFound { .. } => ErrorCode::NotFound,
            Self::Precondition(_) | Self::InstanceFailed { .. } => ErrorCode::FailedPrecondition,
            Self::Overtaken(_) => ErrorCode::Conflict,
            Self::TimedOut { .. } => ErrorCode::DeadlineExceeded,
            Self::Signal(_) => ErrorCode::Cancelled,
            Self::File { .. } | Self::Stream { .. } | Self::Render { .. } | Self::Ended(_) => {
                ErrorCode::Internal
            }
        }
    }

    /// What the process exits with.
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::InstanceFailed { .. } => exit_code::INSTANCE_FAILED,
            Self::Signal(signal) => 128u8.saturating_add(*signal),
            Self::File { .. } => exit_code::USAGE,
            Self::Service(_)
            | Self::Usage(_)
            | Self::Config(_)
            | Self::Document(_)
            | Self::NotFound { .. }
            | Self::Ambiguous { .. }
            | Self::Precondition(_)
            | Self::Overtaken(_)
            | Self::TimedOut { .. }
            | Self::Stream { .. }
            | Self::Render { .. }
            | Self::Ended(_) => exit_code_of(self.code()),
        }
    }

    /// Whether the reader of our output has gone away, as with `| head`: no failure of ours.
    pub fn is_broken_pipe(&self) -> bool {
        matches!(self, Self::Stream { source, .. } if source.kind() == io::ErrorKind::BrokenPipe)
    }

    /// Whether the server took part, so that its log can be searched for the request id.
    pub fn has_request_id(&self) -> bool {
        matches!(
            self,
            Self::Service(_) | Self::InstanceFailed { .. } | Self::TimedOut { .. } | Self::Ended(_)
        )
    }
}

impl From<ServiceError> for CtlError {
    fn from(error: ServiceError) -> Self {
        Self::Service(error)
    }
}

fn exit_code_of(code: ErrorCode) -> u8 {
    match code {
        ErrorCode::InvalidArgument => exit_code::USAGE,
        ErrorCode::NotFound => exit_code::NOT_FOUND,
        ErrorCode::AlreadyExists | ErrorCode::Conflict => exit_code::CONFLICT,
        ErrorCode::FailedPrecondition => exit_code::PRECONDITION,
        ErrorCode::Unavailable => exit_code::UNAVAILABLE,
        ErrorCode::DeadlineExceeded => exit_code::TIMED_OUT,
        ErrorCode::Cancelled => exit_code::INTERRUPTED,
        ErrorCode::ResourceExhausted
        | ErrorCode::PermissionDenied
        | ErrorCode::Unauthenticated
        | ErrorCode::Expired
        | ErrorCode::Unsupported
        | ErrorCode::Internal => exit_code::FAILED,
    }
}
