//! Request ids: one id follows a call from ctl through the server to the agent, in headers and in every record.

use std::fmt;
use std::str::FromStr;

use axum::extract::Request;
use axum::http::HeaderValue;
use axum::middleware::Next;
use axum::response::Response;
use tracing::Instrument;
use uuid::Uuid;

/// The header (HTTP) and metadata key (gRPC) that carries the id.
pub const HEADER: &str = "x-request-id";

/// The longest id that is accepted from outside, in bytes.
pub const MAX_BYTES: usize = 64;

tokio::task_local! {
    static CURRENT: RequestId;
}

/// The id of one request: 1 to [`MAX_BYTES`] printable ASCII characters without spaces.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct RequestId(String);

/// A foreign id that is not accepted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a request id must be 1 to {MAX_BYTES} printable ASCII characters without spaces")]
pub struct InvalidRequestId;

impl RequestId {
    /// A new id: a UUID of version 7 (it begins with the time, so ids sort) as 32 hexadecimal digits.
    pub fn generate() -> Self {
        Self(Uuid::now_v7().simple().to_string())
    }

    /// The caller's id if it is acceptable, else a new one: a bad id is no reason to refuse a request.
    pub fn accept(foreign: Option<&[u8]>) -> Self {
        let text = foreign.and_then(|bytes| std::str::from_utf8(bytes).ok());
        text.and_then(|text| text.parse().ok()).unwrap_or_else(Self::generate)
    }

    /// The id of the request on whose behalf this task runs, to be forwarded with outgoing calls. A spawned task
    /// inherits none: give it one with [`scope`](Self::scope).
    pub fn current() -> Option<Self> {
        CURRENT.try_with(Self::clone).ok()
    }

    /// The current id, or a new one where there is none.
    pub fn current_or_generate() -> Self {
        Self::current().unwrap_or_else(Self::generate)
    }

    /// Runs a future on behalf of this request: [`current`](Self::current) answers with it inside, and every record
    /// carries it in its span `request`.
    pub async fn scope<F: Future>(self, future: F) -> F::Output {
        let span = tracing::info_span!("request", request_id = %self);
        CURRENT.scope(self, future.instrument(span)).await
    }

    /// The id as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for RequestId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl FromStr for RequestId {
    type Err = InvalidRequestId;

    fn from_str(text: &str) -> Result<Self, InvalidRequestId> {
        let acceptable =
            (1..=MAX_BYTES).contains(&text.len()) && text.bytes().all(|byte| byte.is_ascii_graphic());
        acceptable.then(|| Self(text.to_owned())).ok_or(InvalidRequestId)
    }
}

/// For `axum::middleware::from_fn`, over REST and gRPC routes alike: takes the caller's id or makes one, runs the
/// request in its scope, puts it on the request for handlers and on the response for the caller.
pub async fn propagate(mut request: Request, next: Next) -> Response {
    let id = RequestId::accept(request.headers().get(HEADER).map(HeaderValue::as_bytes));
    let value = HeaderValue::from_str(id.as_str()).ok();
    if let Some(value) = value.clone() {
        request.headers_mut().insert(HEADER, value);
    }
    let mut response = id.scope(next.run(request)).await;
    if let Some(value) = value {
        response.headers_mut().insert(HEADER, value);
    }
    response
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn new_ids_are_distinct_sorted_and_acceptable() {
        let (first, second) = (RequestId::generate(), RequestId::generate());
        assert!(first.as_str() < second.as_str());
        assert_eq!(first.as_str().len(), 32);
        assert_eq!(first.as_str().parse(), Ok(first));
    }

    #[test]
    fn a_foreign_id_is_kept_only_if_it_is_acceptable() {
        assert_eq!(RequestId::accept(Some(b"abc-1")).as_str(), "abc-1");
        let long = [b'a'; MAX_BYTES + 1];
        for foreign in [
            None,
            Some(&b""[..]),
            Some(b"a b"),
            Some(b"a\n"),
            Some(b"\xff"),
            Some("ä".as_bytes()),
            Some(&long),
        ] {
            assert_eq!(RequestId::accept(foreign).as_str().len(), 32, "{foreign:?}");
        }
    }

    #[tokio::test]
    async fn the_current_id_is_that_of_the_innermost_scope() {
        assert_eq!(RequestId::current(), None);
        let id = |text: &str| text.parse::<RequestId>().unwrap();
        id("outer")
            .scope(async {
                assert_eq!(RequestId::current(), Some(id("outer")));
                id("inner").scope(async { assert_eq!(RequestId::current(), Some(id("inner"))) }).await;
                assert_eq!(RequestId::current_or_generate(), id("outer"));
            })
            .await;
        assert_eq!(RequestId::current(), None);
    }

    proptest! {
        #[test]
        fn whatever_is_accepted_fits_into_a_header(foreign: Vec<u8>) {
            let id = RequestId::accept(Some(&foreign));
            prop_assert!(HeaderValue::from_str(id.as_str()).is_ok());
        }
    }
}
