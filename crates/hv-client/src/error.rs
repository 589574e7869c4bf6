//! What can go wrong before a call is answered, said so that the user can mend it.

use std::error::Error as StdError;
use std::io;
use std::path::PathBuf;

use hv_proto::status;
use hv_types::ServiceError;
use tonic::Status;

use crate::endpoint::{ClientOptions, Peer};

/// Why there is no channel.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// The address is not one.
    #[error("the address {endpoint:?} cannot be used: {problem}")]
    Endpoint {
        /// As given.
        endpoint: String,
        /// What is wrong, and what is expected.
        problem: &'static str,
    },
    /// A certificate or key file cannot be read.
    #[error("cannot read the {what} {}", path.display())]
    TlsFile {
        /// `CA certificate`, …
        what: &'static str,
        /// As given.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The certificates or the key cannot be used.
    #[error("the TLS settings for {endpoint} cannot be used")]
    Tls {
        /// Where to.
        endpoint: String,
        /// What is wrong with them.
        source: tonic::transport::Error,
    },
    /// Nothing answers there. The last cause is part of the text: the ones between say only "transport error".
    #[error("cannot reach {} at {endpoint}: {problem}; {}", peer.name(), peer.remedy())]
    Unreachable {
        /// What should be there.
        peer: Peer,
        /// Where.
        endpoint: String,
        /// The last cause, as "connection refused".
        problem: String,
    },
}

impl From<ClientError> for ServiceError {
    fn from(error: ClientError) -> Self {
        match error {
            ClientError::Unreachable { .. } => Self::unavailable(error.to_string()),
            ClientError::Endpoint { .. } | ClientError::TlsFile { .. } | ClientError::Tls { .. } => {
                Self::invalid(error.to_string()).caused_by(error)
            }
        }
    }
}

/// The service error of a failed call. Where the call did not even arrive, it says what to do about that.
#[must_use]
pub fn explain(options: &ClientOptions, failed: &Status) -> ServiceError {
    // Statuses that a peer sent have no source; those that the transport made have its error.
    let Some(cause) = failed.source() else { return status::from_status(failed) };
    let transport =
        std::iter::successors(Some(cause), |e| (*e).source()).any(|e| e.is::<tonic::transport::Error>());
    if !transport {
        return status::from_status(failed);
    }
    let (peer, endpoint) = (options.peer, options.shown());
    ClientError::Unreachable { peer, endpoint, problem: last_cause(cause) }.into()
}

/// The innermost cause in a few words.
pub(crate) fn last_cause(error: &(dyn StdError + 'static)) -> String {
    let chain = std::iter::successors(Some(error), |e| (*e).source());
    let mut text = String::new();
    for cause in chain {
        text = match cause.downcast_ref::<io::Error>().map(io::Error::kind) {
            Some(io::ErrorKind::ConnectionRefused) => return "connection refused".into(),
            Some(io::ErrorKind::ConnectionReset) => {
                return "the connection was reset; does it speak gRPC".into();
            }
            Some(io::ErrorKind::TimedOut) => return "no answer in time".into(),
            _ => cause.to_string(),
        };
    }
    match text.as_str() {
        "deadline has elapsed" => "no answer in time".into(),
        _ => text,
    }
}
