//! The node agent: makes what the control plane binds to this node so, and says what it sees.
//!
//! # Theory of operation
//! [`start`] opens the journal, starts one worker per instance that is remembered there, and then, side by side:
//! registration and heartbeats, the stream of assignments, the reporter, the look at the node itself, and the ports.
//! No part waits for another: without a server the workers go on with what the journal says; a driver that hangs holds
//! up its own instance only.
//!
//! # Invariants
//! - What is asked for is in the journal before anything is done about it.
//! - An instance is removed only because the control plane said so (or, one that was made here, a user of this node).
//! - Instances outlive the agent. Stopping it, or killing it, touches none.
//! - The agent holds no store credentials and knows no store.

mod assignments;
mod backoff;
pub mod config;
mod context;
pub mod devices;
mod drivers;
mod entry;
pub mod fencing;
mod images;
mod instances;
mod inventory;
mod journal;
mod plan;
mod registration;
mod reporter;
mod serve;
mod servers;
mod service;
mod view;
mod worker;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use hv_client::{ClientError, Clients};
use hv_telemetry::Shutdown;
use hv_telemetry::health::Health;
use hv_telemetry::metrics::Metrics;
use hv_types::{Metadata, NodeId};
use tokio::sync::watch;

use crate::assignments::Assignments;
use crate::backoff::Backoff;
use crate::config::{Config, Refused};
use crate::context::Context;
use crate::drivers::choose;
use crate::fencing::{Fencers, Guard, Keeper};
use crate::images::Images;
use crate::instances::Instances;
use crate::inventory::Inventor;
use crate::journal::{Journal, NodeFile};
use crate::registration::{Identity, Registration};
use crate::reporter::{Reporter, Reports};
use crate::servers::Servers;

pub use context::{DriverSet, Machine, Tuning};
pub use journal::JournalError;
pub use serve::{READY_FILE, ReadyFile};

/// How long tasks may take to end after a shutdown began; what is then cut off goes on after the next start.
const SHUTDOWN_DEADLINE: Duration = Duration::from_secs(10);
/// How many times its first value a pause between calls to the server can grow.
const MOST_PAUSES: u32 = 5;
/// How often observations of histograms are folded.
const UPKEEP_EVERY: Duration = Duration::from_mins(1);

/// Why the agent cannot run.
#[derive(Debug, thiserror::Error)]
pub enum AgentError {
    /// A setting cannot be used.
    #[error(transparent)]
    Config(#[from] Refused),
    /// The state directory cannot be used.
    #[error(transparent)]
    Journal(#[from] JournalError),
    /// The state directory belongs to another node.
    #[error("{} belongs to node {kept}, but agent.node_id is {asked}; use the node's own state directory", dir.display())]
    OtherNode {
        /// The state directory.
        dir: PathBuf,
        /// Whose it is.
        kept: String,
        /// What was asked for.
        asked: String,
    },
    /// The image store cannot be used.
    #[error("the image store cannot be opened; see images in the configuration")]
    Images(#[from] hv_image::ImageError),
    /// The server's address or certificates cannot be used.
    #[error(transparent)]
    Client(#[from] ClientError),
    /// A port cannot be had.
    #[error("cannot listen on {address}; set {key} to another address")]
    Listen {
        /// The setting.
        key: &'static str,
        /// Its value.
        address: String,
        /// What the system said.
        source: std::io::Error,
    },
    /// A certificate or key file cannot be read.
    #[error("cannot read {}; see tls in the configuration", path.display())]
    TlsFile {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A part of the service cannot be set up.
    #[error("cannot set up {what}")]
    Serve {
        /// Which part.
        what: &'static str,
        /// Why.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
}

/// An agent that listens.
#[derive(Clone, Debug)]
pub struct Agent {
    /// The node.
    pub node_id: NodeId,
    /// Where gRPC is reached from this machine.
    pub grpc: SocketAddr,
    /// Where health and metrics are.
    pub http: SocketAddr,
    /// Whether it is registered.
    pub health: Health,
}

/// Runs the agent until the shutdown is triggered, then waits for its tasks.
///
/// # Errors
/// It cannot start. Once it runs, whatever fails is tried again.
pub async fn run(config: Config, shutdown: Shutdown) -> Result<(), AgentError> {
    start(config, shutdown.clone()).await?;
    if let Err(error) = shutdown.wait(SHUTDOWN_DEADLINE).await {
        tracing::warn!(%error, "what was cut off goes on after the next start");
    }
    Ok(())
}

/// Starts the agent with the drivers of its configuration. Returns when it listens.
///
/// # Errors
/// It cannot start.
pub async fn start(config: Config, shutdown: Shutdown) -> Result<Agent, AgentError> {
    let drivers = choose(&config)?;
    let mut tuning = Tuning::default();
    // By this name because the file may have been replaced by a newer release's since this process began.
    tuning.fencing.fencers = Fencers::Process { program: "/proc/self/exe".into() };
    launch(config, drivers, tuning, shutdown).await
}

/// Starts the agent with drivers and bounds of the caller's choice, for tests.
///
/// # Errors
/// It cannot start.
pub async fn start_with(
    config: Config,
    drivers: DriverSet,
    tuning: Tuning,
    shutdown: Shutdown,
) -> Result<Agent, AgentError> {
    launch(config, drivers, tuning, shutdown).await
}

async fn launch(
    config: Config,
    drivers: DriverSet,
    tuning: Tuning,
    shutdown: Shutdown,
) -> Result<Agent, AgentError> {
    config.check()?;
    let Opened { context, keeper, entries, cluster_id } = open(&config, drivers, tuning).await?;
    shutdown.spawn("fencing", Box::pin(keeper.run(shutdown.token())));
    let grpc = serve::listen("agent.grpc_address", &config.grpc_address()).await?;
    let http = serve::listen("agent.http_address", &config.agent.http_address).await?;
    let addresses = (serve::reachable(&grpc), serve::reachable(&http));
    let unknown = |source| AgentError::Serve { what: "the addresses", source: Box::new(source) };
    let (grpc_at, http_at) = (addresses.0.map_err(unknown)?, addresses.1.map_err(unknown)?);

    let health = Health::new();
    let metrics =
        Metrics::install().map_err(|e| AgentError::Serve { what: "metrics", source: Box::new(e) })?;
    let instances = Instances::new(Arc::clone(&context), shutdown.clone());
    let service = service::Service::new(Arc::clone(&instances));
    serve::grpc(grpc, service, &config.tls, &health, &shutdown).await?;
    serve::http(http, health.router(metrics.clone()), &shutdown);
    spawn_upkeep(&instances, metrics, &shutdown);

    tracing::info!(instances = entries.len(), "taking up what the journal says");
    for entry in entries {
        instances.adopt(entry);
    }
    spawn_driver_tasks(&instances, &shutdown);
    let inventory = spawn_inventory(&config, &context, &shutdown);
    let servers = Servers::new(config.client_options())?;
    spawn_control(&config, &instances, servers, inventory, &health, grpc_at.port(), cluster_id, &shutdown)
        .await?;

    let node_id = context.node_id.clone();
    let ready = serve::ReadyFile {
        pid: std::process::id(),
        node_id: node_id.to_string(),
        grpc: grpc_at.to_string(),
        http: http_at.to_string(),
    };
    serve::announce(&config.agent.state_dir, &ready)?;
    let look = move || drop(instances.views());
    shutdown.spawn("service manager", hv_telemetry::supervisor::tell(look, shutdown.token()));
    tracing::info!(node = %node_id, grpc = %grpc_at, http = %http_at, server = ?config.agent.server_addr,
        state_dir = %config.agent.state_dir.display(), "the agent runs");
    Ok(Agent { node_id, grpc: grpc_at, http: http_at, health })
}

/// Starts the agent without ports, for simulations: it talks to the server through `clients`, and nothing is served.
///
/// # Errors
/// It cannot start.
pub async fn start_portless(
    config: Config,
    drivers: DriverSet,
    tuning: Tuning,
    clients: Clients,
    shutdown: Shutdown,
) -> Result<NodeId, AgentError> {
    config.check()?;
    let Opened { context, keeper, entries, cluster_id } = open(&config, drivers, tuning).await?;
    shutdown.spawn("fencing", Box::pin(keeper.run(shutdown.token())));
    let node_id = context.node_id.clone();
    let instances = Instances::new(Arc::clone(&context), shutdown.clone());
    for entry in entries {
        instances.adopt(entry);
    }
    spawn_driver_tasks(&instances, &shutdown);
    let inventory = spawn_inventory(&config, &context, &shutdown);
    let health = Health::new();
    let options = config.client_options().swap_remove(0);
    spawn_control(
        &config,
        &instances,
        Servers::only(options, clients),
        inventory,
        &health,
        1,
        cluster_id,
        &shutdown,
    )
    .await?;
    Ok(node_id)
}

/// What an agent begins with.
struct Opened {
    context: Arc<Context>,
    keeper: Keeper,
    entries: Vec<entry::Entry>,
    cluster_id: Option<String>,
}

/// Opens the journal; settles who this node is before anybody is told, and what may not run any more before anything
/// is started.
async fn open(config: &Config, drivers: DriverSet, mut tuning: Tuning) -> Result<Opened, AgentError> {
    if !config.agent.fencing.enabled {
        tuning.fencing.fencers = Fencers::None;
    }
    let dir = config.agent.state_dir.clone();
    let asked = config.agent.node_id.clone();
    let image_settings = config.images.clone();
    let is_real = matches!(tuning.machine, Machine::Real);
    let opened = tuning.machine.block_on(move || {
        let journal = Journal::open(&dir)?;
        serve::withdraw(&dir)?;
        let node = journal.node()?;
        let id = match (asked, node.node_id.clone()) {
            (Some(asked), Some(kept)) if asked != kept => {
                return Err(AgentError::OtherNode { dir, kept, asked });
            }
            (Some(id), _) | (None, Some(id)) => id,
            (None, None) => NodeId::generate().to_string(),
        };
        if node.node_id.as_ref() != Some(&id) {
            journal
                .save_node(&NodeFile { node_id: Some(id.clone()), cluster_id: node.cluster_id.clone() })?;
        }
        let contents = journal.read_all()?;
        let images = if is_real { Images::open(&image_settings, &dir)? } else { Images::default() };
        Ok((journal, id, node.cluster_id, contents, images))
    });
    let (journal, id, cluster_id, contents, images) = opened.await?;
    if contents.damaged.is_empty() {
        images.release_all_but(&contents.entries.iter().map(|entry| entry.id().clone()).collect()).await;
    }
    for (id, why) in &contents.damaged {
        tracing::error!(instance = %id, why, "its journal is damaged; it is left alone");
    }
    let invalid = |invalid: hv_types::Invalid| Refused { key: "agent.node_id", problem: invalid.to_string() };
    let leftovers = contents.entries.iter().filter_map(|entry| {
        let driver = drivers.named(entry.driver.as_deref().filter(|_| entry.fence && !entry.gone)?)?;
        Some((entry.id().clone(), driver.fence_target(entry.id())?))
    });
    let held =
        contents.entries.iter().filter_map(|entry| Some((entry.id().clone(), entry.config.devices.clone()?)));
    let devices = devices::Devices::new(&config.agent.devices, held.collect(), !contents.damaged.is_empty())?;
    let beginning =
        Guard::begin(&tuning.fencing, &config.agent.state_dir, &tuning.machine, leftovers.collect());
    let (guard, keeper) = beginning.await;
    let context = Context {
        guard,
        node_id: id.parse().map_err(invalid)?,
        boot_id: tuning.machine.boot_id(),
        drivers,
        tuning,
        journal: Arc::new(journal),
        reports: Reports::default(),
        images: Arc::new(images),
        devices: Arc::new(devices),
        damaged: contents.damaged,
    };
    Ok(Opened { context: Arc::new(context), keeper, entries: contents.entries, cluster_id })
}

/// Follows each driver's events, and asks each once what it has.
fn spawn_driver_tasks(instances: &Arc<Instances>, shutdown: &Shutdown) {
    for driver in instances.context().drivers.all() {
        let (instances, stopping) = (Arc::clone(instances), shutdown.token());
        let (name, mut events) = (driver.name(), driver.events());
        shutdown.spawn(format!("events of {name}"), async move {
            let follow = async {
                while let Some(event) = futures::StreamExt::next(&mut events).await {
                    tracing::debug!(instance = %event.id, driver = name, what = event.what, "event");
                    instances.look(&event.id);
                }
            };
            stopping.run_until_cancelled(follow).await;
        });
    }
    let collecting = Arc::clone(&instances.context().images).collect_forever(shutdown.token());
    shutdown.spawn("collection of images", collecting);
    let (instances, stopping) = (Arc::clone(instances), shutdown.token());
    shutdown.spawn("first search", async move {
        stopping.run_until_cancelled(instances.find()).await;
    });
}

fn spawn_inventory(
    config: &Config,
    context: &Arc<Context>,
    shutdown: &Shutdown,
) -> watch::Receiver<Option<inventory::Inventory>> {
    let measured = match &context.tuning.machine {
        Machine::Real => inventory::capacity(&config.agent.state_dir),
        Machine::Simulated { .. } => hv_types::Resources::default(),
    };
    let capacity = config.agent.capacity.over(measured);
    let reserved = &config.agent.reserved;
    let kept_back = hv_types::Resources {
        cpu_cores: reserved.cpu_cores,
        memory_bytes: reserved.memory.bytes(),
        ..hv_types::Resources::default()
    };
    let (sender, receiver) = watch::channel(None);
    let inventor = Inventor {
        context: Arc::clone(context),
        inventory: sender,
        capacity,
        allocatable: capacity.minus(kept_back),
        types: config.agent.supported_instance_types.clone(),
    };
    shutdown.spawn("inventory", Box::pin(inventor.run(shutdown.token())));
    receiver
}

/// Everything that talks to the server.
#[expect(clippy::too_many_arguments, reason = "each is a part of its own, and there are two callers")]
async fn spawn_control(
    config: &Config,
    instances: &Arc<Instances>,
    servers: Servers,
    inventory: watch::Receiver<Option<inventory::Inventory>>,
    health: &Health,
    port: u16,
    cluster_id: Option<String>,
    shutdown: &Shutdown,
) -> Result<(), AgentError> {
    let servers = Arc::new(servers);
    let identity = identity(config, &servers.current().options.url()?, port).await;
    let retry = config.heartbeat.retry_interval.get();
    let backoff = Backoff::new(retry, retry * MOST_PAUSES);
    let timeout = config.heartbeat.timeout.get();
    let context = instances.context();
    let (usage_sender, usage) = watch::channel(hv_proto::v1::NodeUsage::default());
    let every = config.heartbeat.interval.get();
    let state_dir = config.agent.state_dir.clone();
    let reading =
        inventory::follow_usage(Arc::clone(context), state_dir, every, usage_sender, shutdown.token());
    shutdown.spawn("usage", Box::pin(reading));
    let (registered_sender, registered) = watch::channel(None);
    let (synced_sender, synced) = watch::channel(None);
    let registration = Registration {
        context: Arc::clone(context),
        identity,
        state_dir: config.agent.state_dir.clone(),
        servers: Arc::clone(&servers),
        inventory,
        usage,
        fencing: context.guard.status(),
        gate: context.guard.gate(),
        margin: config.agent.fencing.margin.map(hv_config::HumanDuration::get),
        registered: registered_sender,
        cluster_id,
        known: None,
        health: health.check("server"),
        interval: config.heartbeat.interval.get(),
        timeout,
        retry_interval: retry,
        backoff: backoff.clone(),
    };
    let assignments = Assignments {
        instances: Arc::clone(instances),
        servers: Arc::clone(&servers),
        registered,
        synced: synced_sender,
        timeout,
        backoff: backoff.clone(),
    };
    let reporter = Reporter { instances: Arc::clone(instances), servers, synced, timeout, backoff };
    shutdown.spawn("registration", Box::pin(registration.run(shutdown.token())));
    shutdown.spawn("assignments", Box::pin(assignments.run(shutdown.token())));
    shutdown.spawn("reporter", Box::pin(reporter.run(shutdown.token())));
    Ok(())
}

async fn identity(config: &Config, server_url: &str, port: u16) -> Identity {
    let agent = &config.agent;
    let authority = server_url.split_once("://").map_or(server_url, |(_, authority)| authority).to_owned();
    let ip = match &agent.ip {
        Some(ip) => ip.clone(),
        // The resolver may block.
        None => tokio::task::spawn_blocking(move || inventory::own_address(&authority).to_string())
            .await
            .unwrap_or_else(|_| "127.0.0.1".into()),
    };
    Identity {
        hostname: agent.hostname.clone().unwrap_or_else(inventory::hostname),
        ip,
        port,
        role: agent.role,
        region: agent.region.clone(),
        zone: agent.zone.clone(),
        metadata: Metadata { labels: agent.labels.clone(), ..Metadata::default() },
    }
}

fn spawn_upkeep(instances: &Arc<Instances>, recorder: Metrics, shutdown: &Shutdown) {
    let (instances, stopping) = (Arc::clone(instances), shutdown.token());
    shutdown.spawn("metrics", async move {
        let mut ticks = tokio::time::interval(UPKEEP_EVERY);
        loop {
            tokio::select! {
                () = stopping.cancelled() => return,
                _ = ticks.tick() => {}
            }
            let views = instances.views();
            for state in hv_types::InstanceState::ALL {
                let count = views.iter().filter(|view| view.record.state == state).count();
                metrics::gauge!("hypervisor_agent_instances", "state" => state.name()).set(count as f64);
            }
            recorder.upkeep();
        }
    });
}
