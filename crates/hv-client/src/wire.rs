//! What carries a call: an HTTP/2 channel, or whatever a caller puts in its place.

use std::pin::Pin;
use std::task::{Context, Poll};

use http::{Request, Response};
use tonic::body::Body;
use tonic::transport::Channel;
use tower::util::BoxCloneSyncService;
use tower::{BoxError, Service};

/// Carries calls. Cheap to clone; clones share the connection.
#[derive(Clone, Debug)]
pub enum Wire {
    /// A channel over HTTP/2.
    Http2(Channel),
    /// Anything else that takes a call's request to a server and brings the answer: a network made up for tests, say.
    Custom(BoxCloneSyncService<Request<Body>, Response<Body>, BoxError>),
}

impl From<Channel> for Wire {
    fn from(channel: Channel) -> Self {
        Self::Http2(channel)
    }
}

impl Service<Request<Body>> for Wire {
    type Response = Response<Body>;
    type Error = BoxError;
    type Future = Pin<Box<dyn Future<Output = Result<Response<Body>, BoxError>> + Send>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        match self {
            Self::Http2(channel) => channel.poll_ready(context).map_err(BoxError::from),
            Self::Custom(service) => service.poll_ready(context),
        }
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        match self {
            Self::Http2(channel) => {
                let answer = channel.call(request);
                Box::pin(async move { answer.await.map_err(BoxError::from) })
            }
            Self::Custom(service) => service.call(request),
        }
    }
}
