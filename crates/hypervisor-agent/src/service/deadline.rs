//! How long a call may take: what its caller says, within what the agent allows.

use std::time::Duration;

use hv_driver::DriverError;
use hv_types::{ErrorCode, ServiceError};
use tonic::metadata::MetadataMap;
use tonic::{Request, Status};

use super::{driver_error, refuse};

/// Where callers say how long they wait (gRPC over HTTP/2, "Timeout").
const TIMEOUT_KEY: &str = "grpc-timeout";
/// What is kept of the caller's time for the way back; at most half of it.
const WAY_BACK: Duration = Duration::from_millis(100);

/// How long this call may take, at most `bound`. A caller that has given up needs no answer, so it is told in time.
pub(super) fn budget<T>(request: &Request<T>, bound: Duration) -> Duration {
    let Some(waits) = timeout(request.metadata()) else { return bound };
    bound.min(waits - WAY_BACK.min(waits / 2))
}

fn timeout(metadata: &MetadataMap) -> Option<Duration> {
    const MOST_DIGITS: usize = 8;
    let text = metadata.get(TIMEOUT_KEY)?.to_str().ok()?;
    let (digits, unit) = text.split_at_checked(text.len().checked_sub(1)?)?;
    let number: u64 = digits.parse().ok().filter(|_| digits.len() <= MOST_DIGITS)?;
    match unit {
        "H" => Some(Duration::from_secs(number * 3600)),
        "M" => Some(Duration::from_secs(number * 60)),
        "S" => Some(Duration::from_secs(number)),
        "m" => Some(Duration::from_millis(number)),
        "u" => Some(Duration::from_micros(number)),
        "n" => Some(Duration::from_nanos(number)),
        _ => None,
    }
}

/// A driver's answer, if it comes in time. One that does not is given up.
pub(super) async fn ask<T>(
    budget: Duration,
    call: impl Future<Output = Result<T, DriverError>>,
) -> Result<T, Status> {
    match tokio::time::timeout(budget, call).await {
        Ok(answer) => answer.map_err(|e| driver_error(&e)),
        Err(_) => {
            let text = format!("the driver did not answer within {budget:?}");
            Err(refuse(&ServiceError::new(ErrorCode::DeadlineExceeded, text)))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(timeout: Option<&str>) -> Request<()> {
        let mut request = Request::new(());
        if let Some(timeout) = timeout {
            request.metadata_mut().insert(TIMEOUT_KEY, timeout.parse().unwrap());
        }
        request
    }

    #[test]
    fn a_caller_s_deadline_shortens_the_bound_and_never_lengthens_it() {
        let bound = Duration::from_secs(10);
        for (timeout, expected_ms) in [
            (None, 10_000),
            (Some("1S"), 900),
            (Some("500m"), 400),
            (Some("100m"), 50),
            (Some("1H"), 10_000),
            (Some("99999999H"), 10_000),
            (Some("nonsense"), 10_000),
            (Some("m"), 10_000),
            (Some("123456789m"), 10_000),
        ] {
            assert_eq!(budget(&request(timeout), bound).as_millis(), expected_ms, "{timeout:?}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_driver_that_hangs_is_given_up_in_time() {
        let hangs = std::future::pending::<Result<(), DriverError>>();
        let refused = ask(budget(&request(Some("1S")), Duration::from_secs(60)), hangs).await.unwrap_err();
        assert_eq!(refused.code(), tonic::Code::DeadlineExceeded);
    }
}
