//! Makes the node known to the control plane and keeps it alive there.
//!
//! # Theory of operation
//! Each accepted answer says that the node's lease lives for so long from the moment at which its question was *sent*,
//! which is what the guard counts from. A registration begins a session; if the lease ends the session does, and the
//! node registers anew. Nothing else is waited for between two heartbeats: the inventory and the usage are taken as
//! other tasks left them.
//!
//! # Failure and recovery
//! A server that is away is dialled again with growing pauses, for ever; instances do not notice. A server that
//! belongs to another cluster than the one this node was first registered with is refused: nothing is taken from it,
//! and nothing is touched, until an operator decides.

use std::sync::Arc;
use std::time::Duration;

use hv_client::explain;
use hv_proto::convert;
use hv_proto::v1::{FencingStatus, HeartbeatRequest, NodeStatus, NodeUsage, RegisterNodeRequest};
use hv_telemetry::health::Check;
use hv_types::{ErrorCode, NodeRole, ServiceError};
use tokio::sync::watch;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::backoff::Backoff;
use crate::context::Context;
use crate::fencing::{Gate, Lease, Renewal};
use crate::inventory::Inventory;
use crate::journal::NodeFile;
use crate::servers::Servers;

/// How much of the time between two heartbeats is left to chance, so that nodes spread.
const JITTER: f64 = 0.1;
/// How long a heartbeat waits for the guard to have taken over the last one.
const GUARD_TIMEOUT: Duration = Duration::from_secs(1);
/// Longest wait for a registration's answer while there are other servers to be asked.
const TURN_TIMEOUT: Duration = Duration::from_secs(5);
/// The least that the node stops before its lease can end.
const LEAST_MARGIN: Duration = Duration::from_secs(1);
/// The part of the lease's time that it stops before its end.
const MARGIN_PART: u32 = 10;

/// What the node is to the control plane.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Registered {
    /// The cluster.
    pub(crate) cluster: String,
    /// The registration's number; 0 where the server does not say how long the lease lives.
    pub(crate) session: u64,
}

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
    pub(crate) servers: Arc<Servers>,
    pub(crate) inventory: watch::Receiver<Option<Inventory>>,
    /// What is in use, as it was read last.
    pub(crate) usage: watch::Receiver<NodeUsage>,
    /// How it stands with fencing.
    pub(crate) fencing: watch::Receiver<FencingStatus>,
    /// Whether the lease lives.
    pub(crate) gate: watch::Receiver<Gate>,
    /// How long before the lease can end the node stops what may run elsewhere; `None`: a part of the lease's time.
    pub(crate) margin: Option<Duration>,
    /// Set once the node is known to the control plane.
    pub(crate) registered: watch::Sender<Option<Registered>>,
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
        let mut tried = 0;
        loop {
            match self.register().await {
                Ok((interval, session)) => {
                    tried = 0;
                    self.backoff.reset();
                    self.health.ready();
                    self.heartbeats(interval, session).await;
                }
                Err(error) => {
                    tried += 1;
                    // Every server is asked once before there is a pause.
                    let pause =
                        if tried % self.servers.count() == 0 { self.backoff.pause() } else { self.turn() };
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

    /// The short pause before the next server is asked.
    fn turn(&self) -> Duration {
        const PART: f64 = 0.1;
        self.retry_interval.mul_f64(PART * rand::random_range(0.5..1.5))
    }

    /// Registers; answers how often heartbeats are wanted, and the session.
    async fn register(&mut self) -> Result<(Duration, u64), ServiceError> {
        let servers = Arc::clone(&self.servers);
        let server = servers.current();
        let inventory = self.inventory.borrow_and_update().clone();
        let request = self.request(inventory.as_ref());
        let said_armed = request.fencing.as_ref().is_some_and(|fencing| fencing.armed);
        let timeout = if servers.count() > 1 { self.timeout.min(TURN_TIMEOUT) } else { self.timeout };
        let sent = self.context.guard.now();
        let mut client = server.clients.cluster();
        let answer = match tokio::time::timeout(timeout, client.register_node(request)).await {
            Ok(Ok(answer)) => answer.into_inner(),
            Ok(Err(status)) => {
                let error = explain(&server.options, &status);
                servers.failed(server, error.code());
                return Err(match (&self.cluster_id, error.code()) {
                    (Some(own), ErrorCode::FailedPrecondition) => self.foreign(own, error.message()),
                    _ => error,
                });
            }
            Err(_) => {
                servers.failed(server, ErrorCode::DeadlineExceeded);
                return Err(self.no_answer(timeout));
            }
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
        let lease = period(answer.lease_ttl_ms, answer.lease_ttl_seconds);
        let session = match lease {
            Some(lease) => {
                let renewed = Lease {
                    what: Renewal::Registration,
                    until: sent.after(self.until_lapse(lease)),
                    held: answer.failover_held,
                    said_armed,
                };
                self.context.guard.renewed(renewed).await.ok_or_else(|| {
                    ServiceError::unavailable(
                        "the server's answer came so late that the lease may have ended",
                    )
                })?
            }
            None => 0,
        };
        tracing::info!(node = answer.node_id, cluster = answer.cluster_id, ?lease, session, "registered");
        self.registered.send_replace(Some(Registered { cluster: answer.cluster_id, session }));
        self.known = inventory;
        let interval = period(answer.heartbeat_interval_ms, answer.heartbeat_interval_seconds);
        Ok((interval.unwrap_or(self.interval), session))
    }

    /// How long after a renewal was sent the node stops what may run elsewhere, if nothing follows.
    fn until_lapse(&self, lease: Duration) -> Duration {
        let margin = self.margin.unwrap_or_else(|| LEAST_MARGIN.max(lease / MARGIN_PART));
        // A lease that is shorter than the margin would never live.
        lease - margin.min(lease / 2)
    }

    fn foreign(&self, own: &str, said: &str) -> ServiceError {
        let dir = self.state_dir.display();
        ServiceError::precondition(format!(
            "this node belongs to cluster {own}, and {} refused it: {said}. Nothing on the node is touched. Set \
             agent.server_addr to a server of its own cluster; or, to move the node, delete its instances and remove \
             {dir}/journal/node.json",
            self.servers.current().options.endpoint
        ))
    }

    fn no_answer(&self, within: Duration) -> ServiceError {
        let server = &self.servers.current().options.endpoint;
        let text = format!("the server does not answer within {within:?}; trying {server}");
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
            fencing: Some(self.fencing.borrow().clone()),
            ..RegisterNodeRequest::default()
        };
        if let Some(inventory) = inventory {
            request.capacity = Some(convert::resources_to(inventory.capacity));
            request.allocatable = Some(convert::resources_to(inventory.allocatable));
            request.drivers = inventory.drivers.iter().map(convert::driver_to).collect();
            request.images = inventory.images.iter().map(convert::image_to).collect();
            request.devices = convert::inventory_to(&inventory.devices);
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

    /// Sends heartbeats until the server does not know the node any more, or the session has ended.
    async fn heartbeats(&mut self, mut interval: Duration, session: u64) {
        let mut next = Instant::now() + spread(interval);
        let mut retry = Backoff::new(self.retry_interval, interval.max(self.retry_interval));
        let mut tried = 0;
        loop {
            let ended = self.gate.wait_for(|gate| session != 0 && gate.session != session);
            tokio::select! {
                () = tokio::time::sleep_until(next) => {}
                Ok(()) = self.inventory.changed() => {}
                Ok(()) = self.fencing.changed() => {}
                Ok(_) = ended => {
                    self.health.not_ready("the node's lease has ended");
                    return;
                }
            }
            match self.beat(interval, session).await {
                Ok(Some(wanted)) => {
                    interval = wanted;
                    tried = 0;
                    retry.reset();
                    self.health.ready();
                    next = Instant::now() + spread(interval);
                }
                Ok(None) => return,
                Err(error) => {
                    tried += 1;
                    let pause = if tried % self.servers.count() == 0 { retry.pause() } else { self.turn() };
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

    /// Sends one heartbeat; answers when the next is wanted. `None`: the node must register.
    async fn beat(&mut self, interval: Duration, session: u64) -> Result<Option<Duration>, ServiceError> {
        let servers = Arc::clone(&self.servers);
        let server = servers.current();
        let inventory = self.inventory.borrow_and_update().clone();
        let request = self.heartbeat(inventory.as_ref());
        let said_armed = request.fencing.as_ref().is_some_and(|fencing| fencing.armed);
        let timeout = self.timeout.min(interval);
        let sent = self.context.guard.now();
        let mut client = server.clients.cluster();
        let outcome = match tokio::time::timeout(timeout, client.heartbeat(request)).await {
            Ok(Ok(answer)) => Ok(answer.into_inner()),
            Ok(Err(status)) => Err(explain(&server.options, &status)),
            Err(_) => Err(ServiceError::new(
                ErrorCode::DeadlineExceeded,
                format!("{} does not answer within {timeout:?}", server.options.endpoint),
            )),
        };
        metrics::counter!("hypervisor_agent_heartbeats_total", "ok" => if outcome.is_ok() { "true" } else { "false" })
            .increment(1);
        let answer = outcome.inspect_err(|error| servers.failed(server, error.code()))?;
        if !answer.accepted {
            tracing::info!("the server does not know this node any more, registering again");
            return Ok(None);
        }
        if session != 0
            && let Some(lease) = period(answer.lease_ttl_ms, 0)
        {
            let renewal = self.context.guard.renewed(Lease {
                what: Renewal::Heartbeat(session),
                until: sent.after(self.until_lapse(lease)),
                held: answer.failover_held,
                said_armed,
            });
            // Queued in any case; a guard that is busy must not hold up the next heartbeat.
            if let Ok(None) = tokio::time::timeout(GUARD_TIMEOUT, renewal).await {
                tracing::info!("the lease had ended before this heartbeat was answered, registering again");
                return Ok(None);
            }
        }
        self.known = inventory;
        let wanted = period(answer.next_heartbeat_ms, answer.next_heartbeat_seconds);
        Ok(Some(wanted.unwrap_or(interval)))
    }

    fn heartbeat(&mut self, inventory: Option<&Inventory>) -> HeartbeatRequest {
        let mut request = HeartbeatRequest {
            node_id: self.context.node_id.to_string(),
            status: NodeStatus::Ready.into(),
            cluster_id: self.cluster_id.clone().unwrap_or_default(),
            usage: Some(*self.usage.borrow()),
            // Always: what the server has recorded may be from before failover was held.
            fencing: Some(self.fencing.borrow_and_update().clone()),
            ..HeartbeatRequest::default()
        };
        // Until a heartbeat with it was answered: one that was lost must not lose a change.
        if let Some(inventory) = inventory.filter(|inventory| self.known.as_ref() != Some(inventory)) {
            request.inventory_changed = true;
            request.conditions = inventory.conditions.iter().map(convert::condition_to).collect();
            request.drivers = inventory.drivers.iter().map(convert::driver_to).collect();
            request.images = inventory.images.iter().map(convert::image_to).collect();
            request.devices = convert::inventory_to(&inventory.devices);
        }
        request
    }
}

/// What the server said, in milliseconds if it did so, else in seconds; `None` where it said nothing.
fn period(milliseconds: u64, seconds: i64) -> Option<Duration> {
    /// The longest period that a server can ask for.
    const MOST: Duration = Duration::from_hours(1);
    let said = match milliseconds {
        0 => Duration::from_secs(u64::try_from(seconds).unwrap_or(0)),
        milliseconds => Duration::from_millis(milliseconds),
    };
    (!said.is_zero()).then_some(said.min(MOST))
}

/// A bit earlier than asked for, by chance.
fn spread(interval: Duration) -> Duration {
    interval.mul_f64(1.0 - rand::random_range(0.0..JITTER))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn milliseconds_count_where_the_server_says_them() {
        for (milliseconds, seconds, expected) in [
            (0, 0, None),
            (0, -1, None),
            (0, 3, Some(3000)),
            (250, 3, Some(250)),
            (u64::MAX, 0, Some(3_600_000)),
        ] {
            assert_eq!(period(milliseconds, seconds), expected.map(Duration::from_millis));
        }
    }
}
