//! What agents say: registration and heartbeats.
//!
//! # Invariants
//! - Whatever time of life an answer promises, the lease lives at least as long from the moment the request was sent: the
//!   answer carries the time of the lease that was renewed, not this server's setting.
//! - A record says that a node fences only if the node said so after the last time failover was held: holding it withdraws
//!   the word, and only the node gives it again.
//! - What an operator decided survives each registration; what an agent owns is replaced by what it says.
//!
//! # Scale
//! A heartbeat is one renewal of a lease and two short looks at memory; the store is written only where something
//! changed. Heartbeats under way and registrations that wait are bounded: beyond, the answer is UNAVAILABLE at once,
//! which an agent takes as a reason to come again a little later. Each node's interval differs a little from the others',
//! so that nodes that came back together do not stay in step.

use std::time::Duration;

use hv_proto::convert::RECORD_SCHEMA;
use hv_proto::store::NodeLease;
use hv_proto::v1;
use hv_store::record::{Record, encode_message};
use hv_store::{Compare, LeaseId, Op, StoreError, Txn, TxnOutcome};
use hv_types::node::Fencing;
use hv_types::{
    ClusterId, DeviceInventory, DriverInfo, ImageInfo, NodeCondition, NodeId, NodeRecord, ServiceError,
};
use tokio::sync::{Semaphore, SemaphorePermit};

use super::ATTEMPTS;
use super::liveness::spread;
use crate::Cluster;
use crate::cache::NodeEntry;
use crate::error::{Error, Result};
use crate::events::About;

/// Most heartbeats under way at once: with a store that answers in 10 ms these are 400,000 in a second.
const MAX_HEARTBEATS: usize = 4096;
/// Most registrations, and changes that heartbeats bring, that are written at once.
const MAX_WRITES: usize = 256;
/// Most registrations that wait or are written: all nodes of the largest cluster at once, twice.
const MAX_REGISTRATIONS: usize = 20_000;

/// What stands in the record of a node whose failover is or was held, until the node says otherwise.
pub(super) const HELD: &str =
    "failover is held by the operator; once it is released, the node has to say again that it fences";

/// Bounds what nodes do at once.
pub(crate) struct Gates {
    heartbeats: Semaphore,
    registrations: Semaphore,
    writes: Semaphore,
}

impl Default for Gates {
    fn default() -> Self {
        Self {
            heartbeats: Semaphore::new(MAX_HEARTBEATS),
            registrations: Semaphore::new(MAX_REGISTRATIONS),
            writes: Semaphore::new(MAX_WRITES),
        }
    }
}

/// A place, or the answer that there is none.
fn enter(gate: &Semaphore) -> Result<SemaphorePermit<'_>> {
    gate.try_acquire().map_err(|_| {
        ServiceError::unavailable("this server has more nodes waiting for the store than it takes; try again")
            .into()
    })
}

/// What a heartbeat may change of a node.
#[derive(Clone, Debug)]
pub struct Inventory {
    /// How it is doing.
    pub conditions: Vec<NodeCondition>,
    /// What it can run.
    pub drivers: Vec<DriverInfo>,
    /// The images it has.
    pub images: Vec<ImageInfo>,
    /// What it has to give to one instance at a time.
    pub devices: DeviceInventory,
}

/// What a heartbeat says beside that the node lives.
#[derive(Clone, Debug, Default)]
pub struct Sign {
    /// What the node has, where that changed.
    pub inventory: Option<Inventory>,
    /// What is in use.
    pub usage: Option<v1::NodeUsage>,
    /// Whether it would stop its instances if it were cut off, where that changed.
    pub fencing: Option<Fencing>,
}

/// The answer to a heartbeat that was taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Beat {
    /// How long the lease lives from the moment the request was sent, at least.
    pub lease_ttl: Duration,
    /// When the next heartbeat is wanted.
    pub next: Duration,
    /// Whether the operator holds failover of the node.
    pub failover_held: bool,
}

/// The answer to a registration.
#[derive(Clone, Debug)]
pub struct Registered {
    /// The node.
    pub id: NodeId,
    /// As for a heartbeat.
    pub beat: Beat,
}

/// How the write of a registration went.
enum Written {
    Done { failover_held: bool },
    Overtaken,
}

impl Cluster {
    /// Makes a node known, or renews what is known of it, and starts its lease.
    ///
    /// # Errors
    /// It belongs to another cluster, its id is in use by another host, or too many wait already.
    pub async fn register_node(&self, claims: Option<&ClusterId>, node: NodeRecord) -> Result<Registered> {
        self.check_cluster(claims)?;
        let _place = enter(&self.gates.registrations)?;
        // The semaphore is never closed.
        let _turn = self.gates.writes.acquire().await.ok();
        for _ in 0..ATTEMPTS {
            self.sync().await?;
            let known = self.cache.read(|state| state.node(&node.id).and_then(Known::of));
            if let Some(known) = &known {
                known.check_host(&node)?;
            }
            if let Written::Done { failover_held } = self.write_registration(known.as_ref(), &node).await? {
                self.liveness.seen(&node.id, None);
                if known.is_none_or(|known| !known.live) {
                    self.events.record(About::Node(&node), "NodeReady", "registered", "server");
                }
                let lease_ttl = self.config.heartbeat_timeout;
                // Nodes that registered together beat apart from the first time on.
                let part = (256 + u32::from(spread(&node.id))) as f64 / 512.0;
                let next = self.config.heartbeat_interval.mul_f64(part);
                return Ok(Registered { id: node.id, beat: Beat { lease_ttl, next, failover_held } });
            }
        }
        Err(Error::conflict(format!("node {}", node.id)))
    }

    fn check_cluster(&self, claims: Option<&ClusterId>) -> Result<()> {
        match claims {
            Some(other) if *other != self.id() => Err(Error::precondition(format!(
                "the node belongs to cluster {other}, this is cluster {}; point it at its own servers, or, if the old \
                 cluster is gone, remove the node's state directory to start afresh",
                self.id()
            ))),
            _ => Ok(()),
        }
    }

    /// Writes the record and the sign of life.
    async fn write_registration(&self, known: Option<&Known>, node: &NodeRecord) -> Result<Written> {
        let key = self.keys.node(&node.id);
        let (compare, node) = match known {
            None => (Compare::Absent(key.clone()), node.clone()),
            Some(known) => {
                (Compare::ModRevision(key.clone(), known.record.revision), renewed(&known.record, node))
            }
        };
        let ttl = self.config.heartbeat_timeout;
        let ttl_ms = u64::try_from(ttl.as_millis()).unwrap_or(u64::MAX);
        // One that lives for another time than is answered must not be kept.
        let lease = known.and_then(|known| known.lease).filter(|(_, lives_ms)| *lives_ms == ttl_ms);
        let lease = self.renew_or_grant(lease.map(|(lease, _)| lease), ttl).await?;
        let sign = NodeLease { schema: RECORD_SCHEMA, lease_id: lease.0, ttl_ms };
        let txn = Txn {
            compares: vec![compare],
            then: vec![
                Op::put(key, node.encode()),
                Op::put_leased(self.keys.node_lease(&node.id), encode_message(&sign), lease),
            ],
            otherwise_get: Vec::new(),
        };
        match self.store.txn(txn).await {
            Ok(TxnOutcome::Committed(revision)) => {
                self.cache.wait_for(revision).await?;
                Ok(Written::Done { failover_held: node.failover_held })
            }
            Ok(TxnOutcome::Refused(_)) | Err(StoreError::LeaseNotFound(_)) => Ok(Written::Overtaken),
            Err(error) => Err(error.into()),
        }
    }

    async fn renew_or_grant(&self, lease: Option<LeaseId>, ttl: Duration) -> Result<LeaseId> {
        if let Some(lease) = lease {
            match self.store.lease_keep_alive(lease).await {
                Ok(()) => return Ok(lease),
                Err(StoreError::LeaseNotFound(_)) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(self.store.lease_grant(ttl).await?)
    }

    /// Renews a node's lease; `None` if the node must register again.
    ///
    /// # Errors
    /// It belongs to another cluster, the store does not answer, or too many heartbeats wait for it already.
    pub async fn heartbeat(
        &self,
        claims: Option<&ClusterId>,
        id: &NodeId,
        sign: Sign,
    ) -> Result<Option<Beat>> {
        self.check_cluster(claims)?;
        let _place = enter(&self.gates.heartbeats)?;
        let mut known = self.pulse(id);
        if known.is_none() {
            // It may have registered through another server just now.
            self.sync().await?;
            known = self.pulse(id);
        }
        let Some(pulse) = known.filter(|pulse| !pulse.unsaid || sign.fencing.is_some()) else {
            return Ok(None);
        };
        match self.store.lease_keep_alive(pulse.lease).await {
            Ok(()) => {}
            Err(StoreError::LeaseNotFound(_)) => return Ok(None),
            Err(error) => return Err(error.into()),
        }
        self.liveness.seen(id, sign.usage);
        if sign.inventory.is_some() || sign.fencing.is_some() {
            let _turn = self.gates.writes.acquire().await.ok();
            self.update_node(id, |node| {
                if let Some(inventory) = &sign.inventory {
                    node.conditions = conditions(&node.conditions, &inventory.conditions);
                    node.drivers.clone_from(&inventory.drivers);
                    node.images.clone_from(&inventory.images);
                    node.devices.clone_from(&inventory.devices);
                }
                if let Some(fencing) = &sign.fencing {
                    node.fencing = fencing_of(node.failover_held, fencing);
                }
            })
            .await?;
        }
        let lease_ttl = match pulse.ttl_ms {
            // It was granted by a release before fencing; its node does not fence either.
            0 => self.config.heartbeat_timeout,
            ttl_ms => Duration::from_millis(ttl_ms),
        };
        let interval = self.config.heartbeat_interval;
        let next = interval - interval.mul_f64(f64::from(spread(id)) / 2048.0);
        // As it is now: it may have been held while the store was asked.
        let failover_held = self.pulse(id).map_or(pulse.held, |now| now.held);
        Ok(Some(Beat { lease_ttl, next, failover_held }))
    }

    fn pulse(&self, id: &NodeId) -> Option<Pulse> {
        self.cache.read(|state| {
            let entry = state.node(id)?;
            let record = entry.record.as_ref()?;
            let held = record.failover_held;
            let unsaid = !held && !record.fencing.armed && record.fencing.message == HELD;
            Some(Pulse { lease: entry.lease?, ttl_ms: entry.lease_ttl_ms, held, unsaid })
        })
    }
}

/// What a heartbeat needs to know of its node.
struct Pulse {
    lease: LeaseId,
    ttl_ms: u64,
    held: bool,
    /// Failover was held for so short that the node has not noticed, and so does not say by itself that it fences.
    unsaid: bool,
}

/// What a registration needs to know of its node.
struct Known {
    record: std::sync::Arc<NodeRecord>,
    lease: Option<(LeaseId, u64)>,
    live: bool,
}

impl Known {
    fn of(entry: &NodeEntry) -> Option<Self> {
        Some(Self {
            record: entry.record.clone()?,
            lease: entry.lease.map(|lease| (lease, entry.lease_ttl_ms)),
            live: entry.is_live(),
        })
    }

    /// Two machines with the same id, cloned from one image say, must not fight over one record.
    fn check_host(&self, node: &NodeRecord) -> Result<()> {
        if self.live && self.record.hostname != node.hostname {
            return Err(Error::precondition(format!(
                "node id {} is in use by host {}; give host {} an id of its own by removing its state directory",
                node.id, self.record.hostname, node.hostname
            )));
        }
        Ok(())
    }
}

/// What an agent says of its node, with what operators have decided about it.
fn renewed(old: &NodeRecord, said: &NodeRecord) -> NodeRecord {
    NodeRecord {
        created_at: old.created_at,
        schedulability: old.schedulability,
        drain_discards_disks: old.drain_discards_disks,
        drain_max_parallel: old.drain_max_parallel,
        drain_operation_id: old.drain_operation_id.clone(),
        taints: old.taints.clone(),
        overcommit: old.overcommit,
        reserved: old.reserved,
        failover_held: old.failover_held,
        confirmed_down: false,
        fencing: fencing_of(old.failover_held, &said.fencing),
        conditions: conditions(&old.conditions, &said.conditions),
        ..said.clone()
    }
}

/// What a node says of its fencing, as it counts: while failover is held it may cease at any moment.
fn fencing_of(held: bool, said: &Fencing) -> Fencing {
    if held && said.armed {
        return Fencing { armed: false, message: HELD.into() };
    }
    said.clone()
}

/// The conditions of a node: those that its agent says now, and those that others have added.
fn conditions(old: &[NodeCondition], said: &[NodeCondition]) -> Vec<NodeCondition> {
    let added =
        old.iter().filter(|old| !is_agents(&old.kind) && said.iter().all(|said| said.kind != old.kind));
    said.iter().chain(added).cloned().collect()
}

/// Whether a condition of this kind is an agent's, which then goes with the agent's word. A kind that an agent may cease
/// to name must be among these.
fn is_agents(kind: &str) -> bool {
    kind.starts_with("Driver") || matches!(kind, "Journal" | "Fencing" | "Fencer")
}
