//! What etcd's errors mean.
//!
//! etcd has no error codes of its own: the gRPC code is shared by several errors, and its text tells them apart (the list
//! is `api/v3rpc/rpctypes/error.go` in etcd's source).

use std::error::Error as _;
use std::io;

use etcd_client::Error;
use tonic::Code;

use crate::{LeaseId, Revision, StoreError};

/// The revision or lease of an error is filled in by who asked, and knows it.
pub(super) fn store_error(error: Error, endpoint: &str) -> StoreError {
    let unavailable =
        |error: Error| StoreError::Unavailable { endpoint: endpoint.to_owned(), source: error.into() };
    match error {
        Error::GRpcStatus(status) => {
            let text = status.message();
            match status.code() {
                _ if text.contains("has been compacted") => {
                    StoreError::Compacted { requested: Revision(0), oldest: Revision(0) }
                }
                _ if text.contains("future revision") => {
                    StoreError::InvalidRequest("the revision is in the future".to_owned())
                }
                _ if text.contains("lease not found") => StoreError::LeaseNotFound(LeaseId(0)),
                _ if text.contains("database space exceeded") => StoreError::Full(format!(
                    "etcd at {endpoint} has used up its quota; compact, defragment and disarm the alarm"
                )),
                Code::InvalidArgument | Code::FailedPrecondition => {
                    StoreError::InvalidRequest(format!("etcd at {endpoint} refused it: {text}"))
                }
                Code::PermissionDenied | Code::Unauthenticated => StoreError::InvalidRequest(format!(
                    "etcd at {endpoint} refused the user: {text}; check the user, its password and its role"
                )),
                _ => unavailable(Error::GRpcStatus(status)),
            }
        }
        Error::LeaseKeepAliveError(text) if text.contains("lease not found") => {
            StoreError::LeaseNotFound(LeaseId(0))
        }
        Error::InvalidArgs(text) => StoreError::InvalidRequest(format!("etcd endpoint {endpoint}: {text}")),
        Error::InvalidUri(source) => {
            StoreError::InvalidRequest(format!("etcd endpoint {endpoint} is not an address: {source}"))
        }
        error => unavailable(error),
    }
}

/// Whether the answer was larger than this side takes.
pub(super) fn answer_too_large(error: &Error) -> bool {
    match error {
        Error::GRpcStatus(status) => {
            matches!(status.code(), Code::OutOfRange | Code::ResourceExhausted)
                && status.message().contains("message length too large")
        }
        _ => false,
    }
}

/// Whether the request certainly never left this machine: the connection was refused or could not be made.
pub(super) fn never_sent(error: &Error) -> bool {
    let mut cause: Option<&(dyn std::error::Error + 'static)> = match error {
        Error::GRpcStatus(status) => status.source(),
        Error::TransportError(error) => Some(error),
        _ => None,
    };
    while let Some(error) = cause {
        if let Some(error) = error.downcast_ref::<io::Error>() {
            return matches!(
                error.kind(),
                io::ErrorKind::ConnectionRefused
                    | io::ErrorKind::HostUnreachable
                    | io::ErrorKind::NetworkUnreachable
            );
        }
        cause = error.source();
    }
    false
}
