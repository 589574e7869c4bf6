//! What all requests have in common: who repeats what, and how failures are told.

use hv_cluster::Mutation;
use hv_types::{RequestKey, ServiceError};
use prost::Message;
use sha2::{Digest, Sha256};
use tonic::Status;
use tracing::{info, warn};

/// The mutation that a request asks for. `request` must have its key cleared: the same key may come in another attempt
/// of the same request, and the key itself is no part of what is asked.
pub(crate) fn mutation(method: &'static str, key: &str, request: &impl Message) -> Result<Mutation, Status> {
    let key = if key.is_empty() { None } else { Some(key.parse::<RequestKey>().map_err(refuse)?) };
    let digest = Sha256::digest(request.encode_to_vec()).to_vec();
    Ok(Mutation { method, key, digest })
}

/// A failure as the caller sees it; the cause goes to the log.
pub(crate) fn refuse(error: impl Into<ServiceError>) -> Status {
    let error = error.into();
    match error.code() {
        hv_types::ErrorCode::Internal | hv_types::ErrorCode::Unavailable => {
            warn!(code = error.code().name(), error = hv_telemetry::error_chain(&error), "a call failed");
        }
        code => info!(code = code.name(), error = error.message(), "a call was refused"),
    }
    hv_proto::status::to_status(&error)
}

/// A failure of the cluster as the caller sees it.
pub(crate) fn failed(error: hv_cluster::Error) -> Status {
    refuse(error.into_service())
}

/// An id from a request.
pub(crate) fn id<T: std::str::FromStr<Err = hv_types::Invalid>>(text: &str) -> Result<T, Status> {
    text.parse().map_err(refuse)
}
