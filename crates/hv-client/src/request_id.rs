//! Attaches the request id that travels from the command line through the server to the agent.

use hv_telemetry::RequestId;
use hv_telemetry::request_id::HEADER;
use tonic::metadata::{Ascii, MetadataValue};
use tonic::service::Interceptor;
use tonic::{Request, Status};

/// Attaches the current request's id ([`RequestId::current`]) to every call, or a new one. One that the call has
/// already stays.
#[derive(Clone, Copy, Debug, Default)]
pub struct AttachRequestId;

impl Interceptor for AttachRequestId {
    fn call(&mut self, mut request: Request<()>) -> Result<Request<()>, Status> {
        if request.metadata().get(HEADER).is_none()
            && let Ok(value) = MetadataValue::<Ascii>::try_from(RequestId::current_or_generate().as_str())
        {
            request.metadata_mut().insert(HEADER, value);
        }
        Ok(request)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn attached(request: Request<()>) -> Option<String> {
        let request = AttachRequestId.call(request).unwrap();
        request.metadata().get(HEADER).map(|value| value.to_str().unwrap().to_owned())
    }

    #[tokio::test]
    async fn the_current_request_travels_on() {
        let id: RequestId = "abc".parse().unwrap();
        assert_eq!(id.scope(async { attached(Request::new(())) }).await.as_deref(), Some("abc"));
    }

    #[tokio::test]
    async fn without_a_current_request_every_call_gets_its_own() {
        let (first, second) = (attached(Request::new(())), attached(Request::new(())));
        assert!(first.is_some() && second.is_some() && first != second);
    }

    #[tokio::test]
    async fn an_id_that_the_call_has_stays() {
        let mut request = Request::new(());
        request.metadata_mut().insert(HEADER, MetadataValue::from_static("mine"));
        let id: RequestId = "abc".parse().unwrap();
        assert_eq!(id.scope(async { attached(request) }).await.as_deref(), Some("mine"));
    }
}
