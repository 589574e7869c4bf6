//! The gRPC port. Handlers translate and nothing else: decisions lie in `hv-cluster`.

mod assignments;
mod cluster;
mod compute;
mod images;
mod interactive;
mod migration;
mod nodes;
mod operations;
mod pulls;
mod request;
mod snapshots;
mod store;
mod updates;
mod watch;

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, bail};
use axum::extract::Request;
use axum::http::{StatusCode, Version};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response as HttpResponse};
use futures::{Stream, StreamExt};
use hv_client::{AgentPool, AgentPoolOptions, ClientTls};
use hv_cluster::{Cluster, Election};
use hv_proto::v1::assignment_service_server::AssignmentServiceServer;
use hv_proto::v1::cluster_service_server::ClusterServiceServer;
use hv_proto::v1::compute_service_server::ComputeServiceServer;
use hv_proto::v1::operation_service_server::OperationServiceServer;
use hv_proto::v1::store_service_server::StoreServiceServer;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;
use tonic::service::{Routes, RoutesBuilder};
use tonic::transport::server::TcpIncoming;
use tonic::transport::{Certificate, Identity, ServerTlsConfig};
use tonic::{Response, Status};
use tracing::error;

use crate::limits::{self, Limits};
use crate::settings::TlsSettings;

/// How often an idle connection is checked, and how long the answer may take: a peer that vanished must not hold a
/// stream for ever.
const KEEP_ALIVE: (Duration, Duration) = (Duration::from_secs(20), Duration::from_secs(10));
/// Most calls at once on one connection.
const MAX_STREAMS: u32 = 1024;

/// What every handler shares.
#[derive(Clone)]
pub(crate) struct Shared {
    pub(crate) cluster: Arc<Cluster>,
    pub(crate) election: Arc<Election>,
    pub(crate) agents: AgentPool,
    /// Cancelled when the server stops.
    pub(crate) stop: CancellationToken,
}

impl Shared {
    /// A stream that tells its receiver to go elsewhere when the server stops.
    pub(crate) fn until_stop<T: Send + 'static>(
        &self,
        stream: impl Stream<Item = Result<T, Status>> + Send + 'static,
    ) -> Response<ReplyStream<T>> {
        until_stop(&self.stop, stream)
    }
}

/// A stream that tells its receiver to go elsewhere when the server stops.
fn until_stop<T: Send + 'static>(
    stop: &CancellationToken,
    stream: impl Stream<Item = Result<T, Status>> + Send + 'static,
) -> Response<ReplyStream<T>> {
    let begin = Some((Box::pin(stream), stop.clone()));
    let until_stop = futures::stream::unfold(begin, |state| async move {
        let (mut stream, stop) = state?;
        tokio::select! {
            item = stream.next() => item.map(|item| (item, Some((stream, stop)))),
            () = stop.cancelled() => Some((Err(Status::unavailable("the server is stopping")), None)),
        }
    });
    Response::new(Box::pin(until_stop))
}

/// The platform's own services. Streams end with `stop`: they would keep the port open for ever.
pub(crate) fn services(
    cluster: &Arc<Cluster>,
    election: &Arc<Election>,
    tls: &TlsSettings,
    stop: CancellationToken,
) -> RoutesBuilder {
    let context = Shared {
        cluster: cluster.clone(),
        election: election.clone(),
        stop,
        agents: AgentPool::new(AgentPoolOptions { tls: client_tls(tls), ..AgentPoolOptions::default() }),
    };
    cluster.set_nodes(nodes::AgentNodes::new(cluster, context.agents.clone()));
    let bound = hv_proto::MAX_MESSAGE_BYTES;
    let cluster_service = ClusterServiceServer::new(cluster::Service(context.clone()));
    let compute_service = ComputeServiceServer::new(compute::Service(context.clone()));
    let assignment_service = AssignmentServiceServer::new(assignments::Service(context.clone()));
    let operation_service = OperationServiceServer::new(operations::Service(context));
    let mut routes = Routes::builder();
    routes
        .add_service(cluster_service.max_decoding_message_size(bound).max_encoding_message_size(bound))
        .add_service(compute_service.max_decoding_message_size(bound).max_encoding_message_size(bound))
        .add_service(assignment_service.max_decoding_message_size(bound).max_encoding_message_size(bound))
        .add_service(operation_service.max_decoding_message_size(bound).max_encoding_message_size(bound));
    routes
}

/// Every service, behind the request id.
pub(crate) fn router(
    cluster: &Arc<Cluster>,
    election: &Arc<Election>,
    tls: &TlsSettings,
    limits: &Arc<Limits>,
    spool_dir: &std::path::Path,
    stop: CancellationToken,
) -> anyhow::Result<Routes> {
    let mut routes = services(cluster, election, tls, stop.clone());
    let store_service =
        StoreServiceServer::new(store::Service::new(cluster.clone(), spool_dir.to_owned(), stop));
    let (reporter, health) = tonic_health::server::health_reporter();
    // Serving starts with the port: until the cache is filled calls wait for it, and `/readyz` says so.
    drop(reporter);
    let reflection = tonic_reflection::server::Builder::configure()
        .register_encoded_file_descriptor_set(hv_proto::DESCRIPTORS)
        .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
        .build_v1()
        .context("the descriptors cannot be served")?;
    let bound = hv_proto::MAX_MESSAGE_BYTES;
    routes
        .add_service(store_service.max_decoding_message_size(bound).max_encoding_message_size(bound))
        .add_service(health)
        .add_service(reflection);
    let router = routes
        .routes()
        .into_axum_router()
        .layer(axum::middleware::from_fn_with_state(limits.clone(), limits::enforce))
        .layer(axum::middleware::from_fn(hv_telemetry::request_id::propagate))
        .layer(axum::middleware::from_fn(refuse_http1));
    Ok(router.into())
}

/// Somebody with a browser or `curl` on the gRPC port is told so, instead of a connection that just closes.
async fn refuse_http1(request: Request, next: Next) -> HttpResponse {
    if request.version() == Version::HTTP_2 {
        return next.run(request).await;
    }
    let text =
        "this port speaks gRPC over HTTP/2; health and metrics are on the HTTP port (8080 by default)\n";
    (StatusCode::HTTP_VERSION_NOT_SUPPORTED, text).into_response()
}

/// The port's certificate, if it has one. What cannot be used is refused here, never served without.
fn tls(settings: &TlsSettings) -> anyhow::Result<Option<ServerTlsConfig>> {
    if !settings.enabled {
        return Ok(None);
    }
    let (Some(cert), Some(key)) = (&settings.cert_file, &settings.key_file) else {
        bail!("tls.enabled: needs tls.cert_file and tls.key_file");
    };
    if settings.client_auth && settings.ca_file.is_none() {
        bail!("tls.client_auth: needs tls.ca_file, the authority that signed the clients' certificates");
    }
    let read = |path: &std::path::Path, name: &str| {
        std::fs::read(path).with_context(|| format!("tls.{name}: {} cannot be read", path.display()))
    };
    let mut config =
        ServerTlsConfig::new().identity(Identity::from_pem(read(cert, "cert_file")?, read(key, "key_file")?));
    if let Some(ca) = &settings.ca_file {
        config = config
            .client_ca_root(Certificate::from_pem(read(ca, "ca_file")?))
            .client_auth_optional(!settings.client_auth);
    }
    Ok(Some(config))
}

/// Agents are called with this server's own certificate.
fn client_tls(settings: &TlsSettings) -> Option<ClientTls> {
    let ca = settings.ca_file.clone().filter(|_| settings.enabled)?;
    Some(ClientTls { ca, cert: settings.cert_file.clone(), key: settings.key_file.clone(), domain: None })
}

/// The port as the settings want it.
///
/// # Errors
/// The certificate cannot be read or used.
pub(crate) fn port(settings: &TlsSettings) -> anyhow::Result<tonic::transport::Server> {
    let builder = tonic::transport::Server::builder()
        .accept_http1(true)
        .http2_keepalive_interval(Some(KEEP_ALIVE.0))
        .http2_keepalive_timeout(Some(KEEP_ALIVE.1))
        .max_concurrent_streams(Some(MAX_STREAMS));
    match tls(settings)? {
        None => Ok(builder),
        Some(tls) => {
            builder.tls_config(tls).context("tls.cert_file, tls.key_file or tls.ca_file cannot be used")
        }
    }
}

/// Serves until `stop`, then lets running calls end.
pub(crate) async fn serve(
    mut port: tonic::transport::Server,
    routes: Routes,
    listener: TcpListener,
    stop: CancellationToken,
) {
    let incoming = TcpIncoming::from(listener).with_nodelay(Some(true));
    let served = port.add_routes(routes).serve_with_incoming_shutdown(incoming, stop.cancelled_owned()).await;
    if let Err(cause) = served {
        error!(error = hv_telemetry::error_chain(&cause), "the gRPC port failed");
    }
}

/// The empty reply.
pub(crate) fn empty() -> pbjson_types::Empty {
    pbjson_types::Empty {}
}

/// The version that the API shows.
pub(crate) const VERSION: &str = env!("CARGO_PKG_VERSION");

/// A stream of replies.
pub(crate) type ReplyStream<T> = futures::stream::BoxStream<'static, Result<T, tonic::Status>>;
