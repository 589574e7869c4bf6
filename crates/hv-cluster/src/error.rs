//! How failures below become the service error that callers see.

use std::fmt;

use hv_store::StoreError;
use hv_types::{ErrorCode, InstanceId, Invalid, NodeId, ServiceError};

/// What an operation of the cluster returns.
pub type Result<T> = std::result::Result<T, Error>;

/// A service error. A type of its own so that `?` turns a store's failure into one, with the remedy.
#[derive(Debug)]
pub struct Error(ServiceError);

impl Error {
    /// A fault of our own.
    pub fn internal(message: impl Into<String>) -> Self {
        Self(ServiceError::internal(message))
    }

    /// The object's state does not allow it.
    pub fn precondition(message: impl Into<String>) -> Self {
        Self(ServiceError::precondition(message))
    }

    /// Somebody else changed the object in between, more often than we cared to try again.
    pub fn conflict(what: impl fmt::Display) -> Self {
        Self(ServiceError::new(
            ErrorCode::Conflict,
            format!("{what} is being changed by somebody else; try again"),
        ))
    }

    /// No such instance.
    pub fn no_instance(id: &InstanceId) -> Self {
        Self(ServiceError::not_found(format!(
            "instance {id} does not exist; see `hypervisor-ctl instance list`"
        )))
    }

    /// No such node.
    pub fn no_node(id: &NodeId) -> Self {
        Self(ServiceError::not_found(format!("node {id} does not exist; see `hypervisor-ctl node list`")))
    }

    /// The position in a list or watch is no longer kept.
    pub fn expired(message: impl Into<String>) -> Self {
        Self(ServiceError::new(ErrorCode::Expired, message))
    }

    /// The stable code.
    #[must_use]
    pub fn code(&self) -> ErrorCode {
        self.0.code()
    }

    /// The service error itself.
    #[must_use]
    pub fn into_service(self) -> ServiceError {
        self.0
    }

    /// The service error itself.
    #[must_use]
    pub fn service(&self) -> &ServiceError {
        &self.0
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.0.source()
    }
}

impl From<ServiceError> for Error {
    fn from(error: ServiceError) -> Self {
        Self(error)
    }
}

impl From<Invalid> for Error {
    fn from(invalid: Invalid) -> Self {
        Self(invalid.into())
    }
}

impl From<StoreError> for Error {
    fn from(error: StoreError) -> Self {
        let (code, message) = match &error {
            StoreError::Unavailable { .. } | StoreError::Timeout { .. } | StoreError::Closed => (
                ErrorCode::Unavailable,
                "the store does not answer; the change may or may not have been made: \
                 repeat it with the same request key",
            ),
            StoreError::Full(_) => (
                ErrorCode::ResourceExhausted,
                "the store has no room left; nothing was changed: free disk space or raise its quota",
            ),
            StoreError::InvalidRequest(_) => {
                (ErrorCode::InvalidArgument, "the request is too large for the store")
            }
            StoreError::Compacted { .. } => {
                (ErrorCode::Expired, "that revision is no longer kept; start again from a fresh list")
            }
            StoreError::LeaseNotFound(_) => {
                (ErrorCode::Conflict, "a lease ended in the middle of it; try again")
            }
            StoreError::NewerSchema { .. } => (
                ErrorCode::FailedPrecondition,
                "a newer release wrote this record; upgrade this server, or ask one that is upgraded",
            ),
            StoreError::Io { .. } | StoreError::Corrupt { .. } => {
                (ErrorCode::Internal, "the store cannot be read or written; see the server's log")
            }
        };
        Self(ServiceError::new(code, message).caused_by(error))
    }
}
