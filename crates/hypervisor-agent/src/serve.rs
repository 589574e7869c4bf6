//! The ports of the agent: gRPC, and HTTP for health and metrics; and the file that says where they are.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use axum::middleware::from_fn;
use hv_config::ListenAddress;
use hv_proto::v1::agent_service_server::AgentServiceServer;
use hv_proto::{DESCRIPTORS, MAX_MESSAGE_BYTES};
use hv_telemetry::health::Health;
use hv_telemetry::{Shutdown, request_id};
use serde::Serialize;
use tokio::net::TcpListener;
use tonic::service::Routes;
use tonic::transport::server::TcpIncoming;
use tonic::transport::{Certificate, Identity, Server, ServerTlsConfig};
use tonic_health::ServingStatus;

use crate::AgentError;
use crate::config::Tls;
use crate::journal::{JournalError, write};
use crate::service::Service;

/// The file in the state directory that says where the agent listens.
pub const READY_FILE: &str = "agent.json";

/// What the ready file says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, serde::Deserialize)]
pub struct ReadyFile {
    /// The agent's process.
    pub pid: u32,
    /// The node.
    pub node_id: String,
    /// Where gRPC listens: `ip:port`, on loopback where all interfaces are listened on.
    pub grpc: String,
    /// Where HTTP listens.
    pub http: String,
}

/// Binds the first of the addresses that can be.
pub(crate) async fn listen(key: &'static str, address: &ListenAddress) -> Result<TcpListener, AgentError> {
    let failed = |source| AgentError::Listen { key, address: address.to_string(), source };
    let addresses = address.resolve().map_err(|e| failed(std::io::Error::other(e)))?;
    TcpListener::bind(&addresses[..]).await.map_err(failed)
}

/// Where a listener is reached from this machine.
pub(crate) fn reachable(listener: &TcpListener) -> std::io::Result<SocketAddr> {
    let mut address = listener.local_addr()?;
    if address.ip().is_unspecified() {
        address.set_ip(std::net::Ipv4Addr::LOCALHOST.into());
    }
    Ok(address)
}

/// Removes what an earlier process said: whoever waits for the file must not read that.
pub(crate) fn withdraw(state_dir: &Path) -> Result<(), JournalError> {
    let path = state_dir.join(READY_FILE);
    match std::fs::remove_file(&path) {
        Err(source) if source.kind() != std::io::ErrorKind::NotFound => {
            Err(JournalError::Io { action: "remove", path, source })
        }
        _ => Ok(()),
    }
}

/// Says where the agent listens.
pub(crate) fn announce(state_dir: &Path, ready: &ReadyFile) -> Result<(), AgentError> {
    let text = serde_json::to_vec_pretty(ready).unwrap_or_default();
    write(state_dir, READY_FILE, &text).map_err(AgentError::Journal)
}

/// Serves gRPC until the agent stops.
pub(crate) async fn grpc(
    listener: TcpListener,
    service: Service,
    tls: &Tls,
    health: &Health,
    shutdown: &Shutdown,
) -> Result<(), AgentError> {
    let (reporter, health_service) = tonic_health::server::health_reporter();
    let reflection = tonic_reflection::server::Builder::configure()
        .register_encoded_file_descriptor_set(DESCRIPTORS)
        .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
        .build_v1()
        .map_err(|e| AgentError::Serve { what: "reflection", source: e.into() })?;
    let agent = AgentServiceServer::new(service)
        .max_decoding_message_size(MAX_MESSAGE_BYTES)
        .max_encoding_message_size(MAX_MESSAGE_BYTES);
    let routes = Routes::new(agent).add_service(health_service).add_service(reflection);
    let routes = Routes::from(routes.prepare().into_axum_router().layer(from_fn(request_id::propagate)));
    let mut server = Server::builder();
    if tls.enabled {
        let config = tls_config(tls)?;
        server =
            server.tls_config(config).map_err(|e| AgentError::Serve { what: "TLS", source: e.into() })?;
    }
    let incoming = TcpIncoming::from(listener).with_nodelay(Some(true));
    let serving = server.add_routes(routes).serve_with_incoming_shutdown(incoming, shutdown.triggered());
    let failing = shutdown.clone();
    shutdown.spawn("gRPC", async move {
        if let Err(error) = serving.await {
            tracing::error!(error = hv_telemetry::error_chain(&error), "gRPC ended");
            failing.trigger();
        }
    });

    // The agent serves while the control plane is away; only its readiness says that it is.
    let name = <AgentServiceServer<Service> as tonic::server::NamedService>::NAME;
    reporter.set_service_status(name, ServingStatus::Serving).await;
    let (mut ready, stopping) = (health.subscribe(), shutdown.token());
    shutdown.spawn("gRPC health", async move {
        let follow = async {
            loop {
                let is_ready = *ready.borrow_and_update();
                let status = if is_ready { ServingStatus::Serving } else { ServingStatus::NotServing };
                reporter.set_service_status("readiness", status).await;
                if ready.changed().await.is_err() {
                    return;
                }
            }
        };
        stopping.run_until_cancelled(follow).await;
    });
    Ok(())
}

fn tls_config(tls: &Tls) -> Result<ServerTlsConfig, AgentError> {
    let read = |path: &Option<PathBuf>| {
        let path = path.clone().unwrap_or_default();
        std::fs::read(&path).map_err(|source| AgentError::TlsFile { path, source })
    };
    let identity = Identity::from_pem(read(&tls.cert_file)?, read(&tls.key_file)?);
    let config = ServerTlsConfig::new().identity(identity);
    Ok(if tls.client_auth {
        config.client_ca_root(Certificate::from_pem(read(&tls.ca_file)?))
    } else {
        config
    })
}

/// Serves health and metrics until the agent stops.
pub(crate) fn http(listener: TcpListener, router: axum::Router, shutdown: &Shutdown) {
    let stopping = shutdown.triggered();
    let failing = shutdown.clone();
    shutdown.spawn("HTTP", async move {
        if let Err(error) = axum::serve(listener, router).with_graceful_shutdown(stopping).await {
            tracing::error!(%error, "HTTP ended");
            failing.trigger();
        }
    });
}
