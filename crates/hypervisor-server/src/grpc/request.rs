//! What all requests have in common: who repeats what, and how failures are told.

use hv_cluster::Mutation;
use hv_types::{RequestKey, ServiceError};
use serde::Serialize;
use sha2::{Digest, Sha256};
use tonic::Status;
use tracing::{info, warn};

/// The mutation that a request asks for. `request` must have its key cleared: the same key may come in another attempt
/// of the same request, and the key itself is no part of what is asked.
pub(crate) fn mutation(
    method: &'static str,
    key: &str,
    request: &impl Serialize,
) -> Result<Mutation, Status> {
    if key.is_empty() {
        return Ok(Mutation::once(method));
    }
    let key = key.parse::<RequestKey>().map_err(refuse)?;
    Ok(Mutation { method, key: Some(key), digest: digest(request).map_err(refuse)? })
}

/// What tells two requests apart. Not over their bytes: maps have no order there, so that a repetition may differ.
fn digest(request: &impl Serialize) -> Result<Vec<u8>, ServiceError> {
    let unreadable =
        |cause| ServiceError::internal("the request cannot be compared with earlier ones").caused_by(cause);
    let sorted = serde_json::to_value(request).map_err(unreadable)?;
    Ok(Sha256::digest(sorted.to_string()).to_vec())
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

#[cfg(test)]
mod tests {
    use hv_proto::v1;
    use prost::Message;

    use super::*;

    #[test]
    fn a_request_is_told_apart_by_what_it_says_and_not_by_the_order_of_its_maps() {
        let labels = |count: u32| (0..count).map(|n| (format!("k{n}"), format!("v{n}"))).collect();
        let request = |count| v1::CreateInstanceRequest {
            name: "web".into(),
            metadata: Some(v1::Metadata { labels: labels(count), ..v1::Metadata::default() }),
            ..v1::CreateInstanceRequest::default()
        };
        let first = request(20);
        let decoded = v1::CreateInstanceRequest::decode(&first.encode_to_vec()[..]).unwrap();
        assert_eq!(digest(&first).unwrap(), digest(&decoded).unwrap());
        assert_ne!(digest(&first).unwrap(), digest(&request(19)).unwrap());
    }
}
