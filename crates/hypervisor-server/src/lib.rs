//! The control plane as a library, so that tests can run the real server inside their own process.
//!
//! [`start`] opens the store, starts the cluster's parts and serves; everything stops with the [`Shutdown`] it is given.

mod grpc;
mod http;
mod limits;
mod methods;
mod settings;
mod store;

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::Context;
use hv_cluster::cache::State;
use hv_cluster::{Cluster, ClusterConfig, Election};
use hv_telemetry::Shutdown;
use hv_telemetry::health::Health;
use hv_telemetry::metrics::Metrics;
use tokio::net::TcpListener;
use tracing::{info, warn};

pub use settings::{
    ClusterSettings, EtcdSettings, EventSettings, HeartbeatSettings, LimitSettings, OperationSettings,
    SchedulerSettings, ServerSettings, Settings, TlsSettings,
};

/// A server that serves.
pub struct Server {
    /// Where gRPC is served.
    pub grpc_address: SocketAddr,
    /// Where health and metrics are served.
    pub http_address: SocketAddr,
    store: store::Opened,
    ready_file: PathBuf,
}

impl Server {
    /// Closes the store; call it after the shutdown is complete.
    pub async fn close(self) {
        // It says where a server that runs is found; this one does not any more.
        if let Err(error) = std::fs::remove_file(&self.ready_file) {
            warn!(%error, file = %self.ready_file.display(), "the ready file was not removed");
        }
        self.store.close().await;
    }
}

/// Starts the server.
///
/// # Errors
/// An address is taken, the store cannot be opened, or a certificate cannot be read.
pub async fn start(settings: Settings, shutdown: &Shutdown) -> anyhow::Result<Server> {
    // Every TLS user of the process shares one provider; that another part was first is no error.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let grpc_listener = bind(&settings.server.grpc_address, "server.grpc_address").await?;
    let http_listener = bind(&settings.server.http_address, "server.http_address").await?;
    let (grpc_address, http_address) = (grpc_listener.local_addr()?, http_listener.local_addr()?);

    let port = grpc::port(&settings.tls)?;
    let metrics = Metrics::install()?;
    let health = Health::new();
    let store = store::open(&settings).await?;
    let cluster = Cluster::open(store.shared(), cluster_config(&settings)?)
        .await
        .map_err(hv_cluster::Error::into_service)
        .context("the cluster's record cannot be read")?;
    info!(cluster = %cluster.id(), store = store.backend(), "the cluster is open");
    let election = run_parts(&cluster, shutdown);
    run_upkeep(&cluster, &health, metrics.clone(), shutdown);

    let routes = grpc::router(
        &cluster,
        &election,
        &settings.tls,
        &limits::Limits::new(&settings.limits),
        &settings.server.data_dir,
        shutdown.token(),
    )?;
    shutdown.spawn("grpc", grpc::serve(port, routes, grpc_listener, shutdown.token()));
    shutdown.spawn("http", http::serve(health.router(metrics), http_listener, shutdown.token()));

    let ready_file = settings.server.data_dir.join("server.json");
    write_ready_file(&ready_file, grpc_address, http_address)?;
    let stop = shutdown.token();
    let look = move || {
        cluster.cache().read(State::revision);
    };
    shutdown.spawn("service manager", hv_telemetry::supervisor::tell(look, stop));
    Ok(Server { grpc_address, http_address, store, ready_file })
}

/// Starts a server's parts over a store that is open, without ports, for simulations: whoever has the returned services
/// carries the calls to them.
///
/// # Errors
/// The store cannot be read.
pub async fn start_portless(
    store: hv_store::SharedStore,
    config: ClusterConfig,
    shutdown: &Shutdown,
) -> anyhow::Result<(Arc<Cluster>, tonic::service::Routes)> {
    let cluster = Cluster::open(store, config)
        .await
        .map_err(hv_cluster::Error::into_service)
        .context("the cluster's record cannot be read")?;
    let election = run_parts(&cluster, shutdown);
    let routes = grpc::services(&cluster, &election, &TlsSettings::default(), shutdown.token()).routes();
    Ok((cluster, routes))
}

async fn bind(address: &hv_config::ListenAddress, key: &str) -> anyhow::Result<TcpListener> {
    let addresses = address.resolve()?;
    TcpListener::bind(&addresses[..])
        .await
        .with_context(|| format!("{key}: {address} cannot be listened on; is another server running?"))
}

fn cluster_config(settings: &Settings) -> anyhow::Result<ClusterConfig> {
    Ok(ClusterConfig {
        name: settings.cluster.name.clone(),
        server_id: settings.server.id.clone().unwrap_or_else(hostname),
        key_prefix: settings.etcd.prefix.clone(),
        heartbeat_interval: settings.heartbeat.interval.get(),
        heartbeat_timeout: settings.heartbeat.timeout.get(),
        strategy: settings.scheduler.strategy.parse()?,
        leader_ttl: settings.server.leader_ttl.get(),
        preemption: settings.scheduler.preemption,
        failover_grace: settings.heartbeat.failover_grace.get(),
        event_limit: settings.events.keep,
        event_max_age: settings.events.max_age.get(),
        operation_limit: settings.operations.keep,
        operation_max_age: settings.operations.max_age.get(),
        ..ClusterConfig::default()
    })
}

fn hostname() -> String {
    let name = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    let name = name.trim();
    format!("{}-{}", if name.is_empty() { "server" } else { name }, std::process::id())
}

/// The cache, the election, and what only a leader does.
fn run_parts(cluster: &Arc<Cluster>, shutdown: &Shutdown) -> Arc<Election> {
    let config = cluster.config();
    let key = cluster.keys().leader("scheduler");
    let election = Election::new(cluster.store().clone(), key, &config.server_id, config.leader_ttl);
    let token = || shutdown.token();
    let spawn = |name, part: std::pin::Pin<Box<dyn Future<Output = ()> + Send>>| {
        shutdown.spawn(name, part);
    };
    let (c, t) = (cluster.clone(), token());
    spawn("cache", Box::pin(async move { c.cache().run(t).await }));
    let (e, t) = (election.clone(), token());
    spawn("election", Box::pin(async move { e.run(t).await }));
    let (c, l, t) = (cluster.clone(), election.leadership(), token());
    spawn("placer", Box::pin(async move { c.run_placer(l, t).await }));
    let (c, l, t) = (cluster.clone(), election.leadership(), token());
    spawn("reconciler", Box::pin(async move { c.run_reconciler(l, t).await }));
    let (c, l, t) = (cluster.clone(), election.leadership(), token());
    spawn("store upkeep", Box::pin(async move { c.run_store_upkeep(l, t).await }));
    let (c, t) = (cluster.clone(), token());
    spawn("events", Box::pin(async move { c.events().run(c.cache(), t).await }));
    election
}

/// How often gauges and readiness are brought up to date.
const UPKEEP_INTERVAL: std::time::Duration = std::time::Duration::from_secs(1);

/// Readiness and gauges, from the cache.
fn run_upkeep(cluster: &Arc<Cluster>, health: &Health, metrics: Metrics, shutdown: &Shutdown) {
    let (cluster, check, token) = (cluster.clone(), health.check("store"), shutdown.token());
    shutdown.spawn("upkeep", async move {
        let mut tick = tokio::time::interval(UPKEEP_INTERVAL);
        while !token.is_cancelled() {
            tokio::select! {
                () = token.cancelled() => return,
                _ = tick.tick() => {}
            }
            if cluster.cache().is_fresh() {
                check.ready();
            } else {
                check.not_ready("the cache does not follow the store");
            }
            let counts = cluster.cache().read(State::counts);
            let gauges = [
                ("nodes", counts.nodes),
                ("nodes_ready", counts.ready),
                ("instances", counts.instances),
                ("instances_unbound", counts.unbound),
            ];
            for (name, value) in gauges {
                metrics::gauge!(format!("hypervisor_{name}")).set(value as f64);
            }
            metrics.upkeep();
        }
    });
}

/// Tells scripts and tests where a server that took port 0 is found.
fn write_ready_file(path: &Path, grpc: SocketAddr, http: SocketAddr) -> anyhow::Result<()> {
    let content =
        serde_json::json!({ "pid": std::process::id(), "grpc": grpc.to_string(), "http": http.to_string() });
    let partial = path.with_extension("json.partial");
    std::fs::write(&partial, format!("{content}\n"))
        .and_then(|()| std::fs::rename(&partial, path))
        .with_context(|| format!("server.data_dir: {} cannot be written", path.display()))
}
