//! Makes the node known to the control plane and keeps it alive there.
//!
//! # Failure and recovery
//! A server that is away is dialled again with growing pauses, for ever; instances do not notice. A server that
//! belongs to another cluster than the one this node was first registered with is refused: nothing is taken from it,
//! and nothing is touched, until an operator decides.

use std::sync::Arc;
use std::time::Duration;

use hv_client::{ClientOptions, ClusterClient, explain};
use hv_proto::convert;
use hv_proto::v1::{HeartbeatRequest, NodeStatus, RegisterNodeRequest};
use hv_telemetry::health::Check;
use hv_types::{ErrorCode, NodeRole, ServiceError};
use tokio::sync::watch;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::backoff::Backoff;
use crate::context::Context;
use crate::inventory::{Inventory, Usage};
use crate::journal::NodeFile;

/// What the node says of itself that never changes while it runs.
#[derive(Clone, Debug)]
pub(crate) struct Identity {
    pub(crate) hostname: String,
    pub(crate) ip: String,
    pub(crate) port: u16,
    pub(crate) role: NodeRole,
    pub(crate) region: String,
    pub(crate) zone: String,
    pub(crate) metadata: hv_types::Metadata,
}

/// Registers the node and sends its heartbeats.
pub(crate) struct Registration {
    pub(crate) context: Arc<Context>,
    pub(crate) identity: Identity,
    pub(crate) state_dir: std::path::PathBuf,
    pub(crate) client: ClusterClient,
    pub(crate) options: ClientOptions,
    pub(crate) inventory: watch::Receiver<Option<Inventory>>,
    /// Set to the cluster once the node is known there.
    pub(crate) registered: watch::Sender<Option<String>>,
    /// The cluster that the node belongs to, as the journal has it.
    pub(crate) cluster_id: Option<String>,
    /// The inventory that the server has.
    pub(crate) known: Option<Inventory>,
    pub(crate) health: Check,
    /// How often, where the server does not say.
    pub(crate) interval: Duration,
    pub(crate) timeout: Duration,
    pub(crate) retry_interval: Duration,
    pub(crate) backoff: Backoff,
}

impl Registration {
    /// Keeps the node known until the agent stops.
    pub(crate) async fn run(mut self, stopping: CancellationToken) {
        tokio::select! {
            () = stopping.cancelled() => {}
            () = self.keep() => {}
        }
    }

    async fn keep(&mut self) {
        if self.inventory.wait_for(Option::is_some).await.is_err() {
            return;
        }
        let mut usage = Usage::new();
        loop {
            match self.register().await {
                Ok(interval) => {
                    self.backoff.reset();
                    self.health.ready();
                    self.heartbeats(interval, &mut usage).await;
                }
                Err(error) => {
                    let pause = self.backoff.pause();
                    tracing::warn!(
                        code = error.code().name(),
                        error = error.message(),
                        ?pause,
                        "the node is not registered, trying again"
                    );
                    self.health.not_ready(error.message());
                    tokio::time::sleep(pause).await;
                }
            }
        }
    }

    /// Registers; answers how often heartbeats are wanted.
    async fn register(&mut self) -> Result<Duration, ServiceError> {
        let inventory = self.inventory.borrow_and_update().clone();
        let request = self.request(inventory.as_ref());
        let call = self.client.register_node(request);
        let answer = match tokio::time::timeout(self.timeout, call).await {
            Ok(Ok(answer)) => answer.into_inner(),
            Ok(Err(status)) => {
                let error = explain(&self.options, &status);
                return Err(match (&self.cluster_id, error.code()) {
                    (Some(own), ErrorCode::FailedPrecondition) => self.foreign(own, error.message()),
                    _ => error,
                });
            }
            Err(_) => return Err(self.no_answer()),
        };
        match &self.cluster_id {
            Some(own) if !answer.cluster_id.is_empty() && *own != answer.cluster_id => {
                return Err(self.foreign(own, &format!("the server's cluster is {}", answer.cluster_id)));
            }
            Some(_) => {}
            None => self.belong_to(&answer.cluster_id).await?,
        }
        if answer.node_id != self.context.node_id.as_str() {
            let text = format!(
                "the server calls this node {}; is the server older than this agent?",
                answer.node_id
            );
            return Err(ServiceError::precondition(text));
        }
        tracing::info!(
            node = answer.node_id,
            cluster = answer.cluster_id,
            lease_seconds = answer.lease_ttl_seconds,
            "registered"
        );
        self.registered.send_replace(Some(answer.cluster_id));
        self.known = inventory;
        Ok(seconds(answer.heartbeat_interval_seconds).unwrap_or(self.interval))
    }

    fn foreign(&self, own: &str, said: &str) -> ServiceError {
        let dir = self.state_dir.display();
        ServiceError::precondition(format!(
            "this node belongs to cluster {own}, and {} refused it: {said}. Nothing on the node is touched. Set \
             agent.server_addr to a server of its own cluster; or, to move the node, delete its instances and remove \
             {dir}/journal/node.json",
            self.options.endpoint
        ))
    }

    fn no_answer(&self) -> ServiceError {
        let text = format!("{} does not answer within {:?}", self.options.endpoint, self.timeout);
        ServiceError::new(ErrorCode::DeadlineExceeded, text)
    }

    /// Remembers the cluster before anything is taken from it.
    async fn belong_to(&mut self, cluster_id: &str) -> Result<(), ServiceError> {
        if cluster_id.is_empty() {
            return Ok(());
        }
        let node = NodeFile {
            node_id: Some(self.context.node_id.to_string()),
            cluster_id: Some(cluster_id.to_owned()),
        };
        self.context.with_journal(move |journal| journal.save_node(&node)).await.map_err(|error| {
            let text = format!("the node's journal cannot be written: {}", hv_telemetry::error_chain(&error));
            ServiceError::unavailable(text)
        })?;
        self.cluster_id = Some(cluster_id.to_owned());
        Ok(())
    }

    fn request(&self, inventory: Option<&Inventory>) -> RegisterNodeRequest {
        let identity = &self.identity;
        let mut request = RegisterNodeRequest {
            hostname: identity.hostname.clone(),
            ip: identity.ip.clone(),
            port: i32::from(identity.port),
            role: convert::role_to(identity.role).into(),
            region: identity.region.clone(),
            zone: identity.zone.clone(),
            metadata: Some(convert::metadata_to(&identity.metadata)),
            node_id: self.context.node_id.to_string(),
            cluster_id: self.cluster_id.clone().unwrap_or_default(),
            agent_version: env!("CARGO_PKG_VERSION").to_owned(),
            ..RegisterNodeRequest::default()
        };
        if let Some(inventory) = inventory {
            request.capacity = Some(convert::resources_to(inventory.capacity));
            request.allocatable = Some(convert::resources_to(inventory.allocatable));
            request.drivers = inventory.drivers.iter().map(convert::driver_to).collect();
            request.images = inventory.images.iter().map(convert::image_to).collect();
            request.conditions = inventory.conditions.iter().map(convert::condition_to).collect();
            let healthy = inventory.drivers.iter().filter(|driver| driver.healthy);
            let mut types: Vec<String> =
                healthy.map(|driver| driver.instance_type.name().to_owned()).collect();
            types.sort();
            types.dedup();
            request.supported_instance_types = types;
        }
        request
    }

    /// Sends heartbeats until the server does not know the node any more.
    async fn heartbeats(&mut self, mut interval: Duration, usage: &mut Usage) {
        let mut next = Instant::now() + interval;
        let mut retry = Backoff::new(self.retry_interval, interval.max(self.retry_interval));
        loop {
            tokio::select! {
                () = tokio::time::sleep_until(next) => {}
                Ok(()) = self.inventory.changed() => {}
            }
            let inventory = self.inventory.borrow_and_update().clone();
            let request = self.heartbeat(inventory.as_ref(), usage);
            let call = self.client.heartbeat(request);
            let outcome = match tokio::time::timeout(self.timeout.min(interval), call).await {
                Ok(Ok(answer)) => Ok(answer.into_inner()),
                Ok(Err(status)) => Err(explain(&self.options, &status)),
                Err(_) => Err(self.no_answer()),
            };
            metrics::counter!("hypervisor_agent_heartbeats_total", "ok" => if outcome.is_ok() { "true" } else { "false" })
                .increment(1);
            match outcome {
                Ok(answer) if !answer.accepted => {
                    tracing::info!("the server does not know this node any more, registering again");
                    return;
                }
                Ok(answer) => {
                    interval = seconds(answer.next_heartbeat_seconds).unwrap_or(interval);
                    self.known = inventory;
                    retry.reset();
                    self.health.ready();
                    next = Instant::now() + interval;
                }
                Err(error) => {
                    let pause = retry.pause();
                    tracing::warn!(
                        code = error.code().name(),
                        error = error.message(),
                        ?pause,
                        "no heartbeat"
                    );
                    self.health.not_ready(error.message());
                    if matches!(error.code(), ErrorCode::NotFound | ErrorCode::FailedPrecondition) {
                        return;
                    }
                    next = Instant::now() + pause;
                    tokio::time::sleep_until(next).await;
                }
            }
        }
    }

    fn heartbeat(&self, inventory: Option<&Inventory>, usage: &mut Usage) -> HeartbeatRequest {
        let mut request = HeartbeatRequest {
            node_id: self.context.node_id.to_string(),
            status: NodeStatus::Ready.into(),
            cluster_id: self.cluster_id.clone().unwrap_or_default(),
            usage: Some(usage.read(&self.state_dir)),
            ..HeartbeatRequest::default()
        };
        // Until a heartbeat with it was answered: one that was lost must not lose a change.
        if let Some(inventory) = inventory.filter(|inventory| self.known.as_ref() != Some(inventory)) {
            request.inventory_changed = true;
            request.conditions = inventory.conditions.iter().map(convert::condition_to).collect();
            request.drivers = inventory.drivers.iter().map(convert::driver_to).collect();
            request.images = inventory.images.iter().map(convert::image_to).collect();
        }
        request
    }
}

fn seconds(said: i64) -> Option<Duration> {
    /// The longest interval that a server can ask for, in seconds.
    const MOST: u64 = 3600;
    u64::try_from(said).ok().filter(|said| *said > 0).map(|said| Duration::from_secs(said.min(MOST)))
}
