//! The one place where a service error becomes a gRPC status, and a status a service error.
//!
//! The gRPC code tells what clients of any kind need; the metadata `x-error-code` carries our own, finer code.

use hv_types::{ErrorCode, ServiceError};
use tonic::metadata::{Ascii, MetadataValue};
use tonic::{Code, Status};

/// The metadata key that carries the stable error code.
pub const ERROR_CODE_KEY: &str = "x-error-code";

/// The metadata key that says after how many milliseconds a call may be sent again (gRPC proposal A6).
pub const RETRY_PUSHBACK_KEY: &str = "grpc-retry-pushback-ms";

fn grpc_code(code: ErrorCode) -> Code {
    match code {
        ErrorCode::InvalidArgument => Code::InvalidArgument,
        ErrorCode::NotFound => Code::NotFound,
        ErrorCode::AlreadyExists => Code::AlreadyExists,
        ErrorCode::FailedPrecondition => Code::FailedPrecondition,
        ErrorCode::Conflict => Code::Aborted,
        ErrorCode::ResourceExhausted => Code::ResourceExhausted,
        ErrorCode::PermissionDenied => Code::PermissionDenied,
        ErrorCode::Unauthenticated => Code::Unauthenticated,
        ErrorCode::Expired => Code::OutOfRange,
        ErrorCode::Unavailable => Code::Unavailable,
        ErrorCode::DeadlineExceeded => Code::DeadlineExceeded,
        ErrorCode::Unsupported => Code::Unimplemented,
        ErrorCode::Cancelled => Code::Cancelled,
        ErrorCode::Internal => Code::Internal,
    }
}

/// The status that the caller sees. The cause stays behind.
#[must_use]
pub fn to_status(error: &ServiceError) -> Status {
    let mut status = Status::new(grpc_code(error.code()), error.message());
    let name = MetadataValue::<Ascii>::from_static(error.code().name());
    status.metadata_mut().insert(ERROR_CODE_KEY, name);
    status
}

/// The service error that a status stands for.
#[must_use]
pub fn from_status(status: &Status) -> ServiceError {
    let named = status.metadata().get(ERROR_CODE_KEY).and_then(|value| value.to_str().ok());
    let code = ErrorCode::ALL
        .into_iter()
        .find(|code| Some(code.name()) == named)
        .or_else(|| ErrorCode::ALL.into_iter().find(|code| grpc_code(*code) == status.code()))
        .unwrap_or(ErrorCode::Internal);
    ServiceError::new(code, status.message())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_code_survives_the_wire() {
        for code in ErrorCode::ALL {
            let back = from_status(&to_status(&ServiceError::new(code, "why")));
            assert_eq!((back.code(), back.message()), (code, "why"));
        }
    }

    #[test]
    fn the_cause_is_not_sent() {
        let error = ServiceError::internal("try again").caused_by("password=hunter2");
        let status = to_status(&error);
        assert!(!format!("{status:?}").contains("hunter2"));
    }
}
