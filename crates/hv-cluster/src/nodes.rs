//! Nodes: registration, liveness, maintenance.
//!
//! # Theory of operation
//! A registration writes the node's record and, attached to a lease, its sign of life. A heartbeat renews the lease,
//! through any server, and writes nothing else unless the node's inventory changed. When the lease ends the store
//! deletes the sign of life, every server's cache sees it, and the node is NOT_READY everywhere at once.

mod maintenance;

use std::collections::HashMap;
use std::sync::Arc;
use std::time::SystemTime;

use hv_proto::convert::{NodeView, RECORD_SCHEMA};
use hv_proto::store::NodeLease;
use hv_proto::v1;
use hv_store::record::{Record, encode_message};
use hv_store::{Compare, LeaseId, Op, StoreError, Txn, TxnOutcome};
use hv_types::node::Schedulability;
use hv_types::{
    ClusterId, DriverInfo, ImageInfo, NodeCondition, NodeId, NodeRecord, NodeRole, NodeStatus, Resources,
    Revision, Selector,
};
use parking_lot::Mutex;

use crate::Cluster;
use crate::cache::{NodeEntry, State};
use crate::error::{Error, Result};
use crate::events::About;
use crate::page::Page;

pub use maintenance::Blocker;
pub(crate) use maintenance::stays;

/// How often a registration is tried when others change the node at the same time.
const ATTEMPTS: usize = 8;

/// What heartbeats said last, in memory only.
#[derive(Default)]
pub struct Liveness(Mutex<HashMap<NodeId, (SystemTime, Option<v1::NodeUsage>)>>);

impl Liveness {
    fn seen(&self, id: &NodeId, usage: Option<v1::NodeUsage>) {
        let mut nodes = self.0.lock();
        let entry = nodes.entry(id.clone()).or_insert((SystemTime::now(), None));
        entry.0 = SystemTime::now();
        if usage.is_some() {
            entry.1 = usage;
        }
    }

    fn of(&self, id: &NodeId) -> Option<(SystemTime, Option<v1::NodeUsage>)> {
        self.0.lock().get(id).copied()
    }

    fn forget(&self, id: &NodeId) {
        self.0.lock().remove(id);
    }
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
}

/// Which nodes a list or watch is about. All must hold; `None` and empty accept any.
#[derive(Clone, Debug, Default)]
pub struct NodeFilter {
    /// Only this role.
    pub role: Option<NodeRole>,
    /// Only in this status.
    pub status: Option<NodeStatus>,
    /// Only this region.
    pub region: String,
    /// Only this zone.
    pub zone: String,
    /// Only with these labels.
    pub selector: Selector,
    /// Only whose id or host name is this, or whose id starts with it.
    pub reference: String,
}

impl NodeFilter {
    /// Whether a node is meant, whatever its status.
    #[must_use]
    pub fn matches(&self, node: &NodeRecord) -> bool {
        self.role.is_none_or(|wanted| wanted == node.role)
            && (self.region.is_empty() || self.region == node.region)
            && (self.zone.is_empty() || self.zone == node.zone)
            && (self.reference.is_empty()
                || node.hostname == self.reference
                || node.id.as_str().starts_with(&self.reference))
            && self.selector.matches(&node.metadata.labels)
    }
}

/// A node with what the API shows beside its record.
pub type Shown = (Arc<NodeRecord>, NodeView);

impl Cluster {
    /// Makes a node known, or renews what is known of it, and starts its lease.
    ///
    /// # Errors
    /// It belongs to another cluster, or its id is in use by another host.
    pub async fn register_node(&self, claims: Option<&ClusterId>, node: NodeRecord) -> Result<NodeId> {
        self.check_cluster(claims)?;
        for _ in 0..ATTEMPTS {
            self.sync().await?;
            let known = self.cache.read(|state| state.node(&node.id).cloned());
            if let Some(entry) = &known {
                check_host(entry, &node)?;
            }
            if self.write_registration(known.as_ref(), &node).await? {
                self.liveness.seen(&node.id, None);
                if known.is_none_or(|entry| !entry.is_live()) {
                    self.events.record(About::Node(&node), "NodeReady", "registered", "server");
                }
                return Ok(node.id);
            }
        }
        Err(Error::conflict(format!("node {}", node.id)))
    }

    fn check_cluster(&self, claims: Option<&ClusterId>) -> Result<()> {
        match claims {
            Some(other) if other != self.id() => Err(Error::precondition(format!(
                "the node belongs to cluster {other}, this is cluster {}; point it at its own servers, or, if the old \
                 cluster is gone, remove the node's state directory to start afresh",
                self.id()
            ))),
            _ => Ok(()),
        }
    }

    /// Writes the record and the sign of life; false if somebody else changed the node in between.
    async fn write_registration(&self, known: Option<&NodeEntry>, node: &NodeRecord) -> Result<bool> {
        let key = self.keys.node(&node.id);
        let record = known.and_then(|entry| entry.record.as_ref());
        let (compare, node) = match record {
            None => (Compare::Absent(key.clone()), node.clone()),
            Some(old) => {
                let renewed = NodeRecord {
                    created_at: old.created_at,
                    schedulability: old.schedulability,
                    drain_discards_disks: old.drain_discards_disks,
                    ..node.clone()
                };
                (Compare::ModRevision(key.clone(), old.revision), renewed)
            }
        };
        let lease = self.renew_or_grant(known.and_then(|entry| entry.lease)).await?;
        let sign = NodeLease { schema: RECORD_SCHEMA, lease_id: lease.0 };
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
                Ok(true)
            }
            Ok(TxnOutcome::Refused(_)) | Err(StoreError::LeaseNotFound(_)) => Ok(false),
            Err(error) => Err(error.into()),
        }
    }

    async fn renew_or_grant(&self, lease: Option<LeaseId>) -> Result<LeaseId> {
        if let Some(lease) = lease {
            match self.store.lease_keep_alive(lease).await {
                Ok(()) => return Ok(lease),
                Err(StoreError::LeaseNotFound(_)) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(self.store.lease_grant(self.config.heartbeat_timeout).await?)
    }

    /// Renews a node's lease; false if the node must register again.
    ///
    /// # Errors
    /// It belongs to another cluster, or the store does not answer.
    pub async fn heartbeat(
        &self,
        claims: Option<&ClusterId>,
        id: &NodeId,
        inventory: Option<Inventory>,
        usage: Option<v1::NodeUsage>,
    ) -> Result<bool> {
        self.check_cluster(claims)?;
        let lease = || self.cache.read(|state| state.node(id).and_then(|entry| entry.lease));
        let mut known = lease();
        if known.is_none() {
            // It may have registered through another server just now.
            self.sync().await?;
            known = lease();
        }
        let Some(lease) = known else { return Ok(false) };
        match self.store.lease_keep_alive(lease).await {
            Ok(()) => {}
            Err(StoreError::LeaseNotFound(_)) => return Ok(false),
            Err(error) => return Err(error.into()),
        }
        self.liveness.seen(id, usage);
        if let Some(inventory) = inventory {
            self.update_node(id, |node| {
                node.conditions.clone_from(&inventory.conditions);
                node.drivers.clone_from(&inventory.drivers);
                node.images.clone_from(&inventory.images);
            })
            .await?;
        }
        Ok(true)
    }

    /// Changes a node's record by compare-and-set; nothing is written if nothing changes.
    pub(crate) async fn update_node(
        &self,
        id: &NodeId,
        change: impl Fn(&mut NodeRecord),
    ) -> Result<Arc<NodeRecord>> {
        for _ in 0..ATTEMPTS {
            let record = self.node_record(id)?;
            let mut after = NodeRecord::clone(&record);
            change(&mut after);
            if after == *record {
                return Ok(record);
            }
            after.validate()?;
            let key = self.keys.node(id);
            let txn = Txn {
                compares: vec![Compare::ModRevision(key.clone(), record.revision)],
                then: vec![Op::put(key, after.encode())],
                otherwise_get: Vec::new(),
            };
            if let TxnOutcome::Committed(revision) = self.store.txn(txn).await? {
                self.cache.wait_for(revision).await?;
                return self.node_record(id);
            }
            self.sync().await?;
        }
        Err(Error::conflict(format!("node {id}")))
    }

    fn node_record(&self, id: &NodeId) -> Result<Arc<NodeRecord>> {
        self.cache
            .read(|state| state.node(id).and_then(|entry| entry.record.clone()))
            .ok_or_else(|| Error::no_node(id))
    }

    /// One node.
    ///
    /// # Errors
    /// There is none, or the store does not answer.
    pub async fn node(&self, id: &NodeId) -> Result<Shown> {
        self.sync().await?;
        self.cache.read(|state| self.show(state, id)).ok_or_else(|| Error::no_node(id))
    }

    /// A node as the API shows it.
    #[must_use]
    pub fn show(&self, state: &State, id: &NodeId) -> Option<Shown> {
        let entry = state.node(id)?;
        let record = entry.record.clone()?;
        let seen = self.liveness.of(id);
        let view = NodeView {
            status: entry.status(),
            allocated: entry.allocated,
            instance_count: entry.instances.len(),
            last_seen: seen.map(|(at, _)| at),
            usage: seen.and_then(|(_, usage)| usage),
        };
        Some((record, view))
    }

    /// Nodes that match, in the order of their ids: a page, the token for the next, how many in all, the revision.
    ///
    /// # Errors
    /// The store does not answer.
    pub async fn nodes(
        &self,
        filter: &NodeFilter,
        page: &Page,
    ) -> Result<(Vec<Shown>, String, usize, Revision)> {
        self.sync().await?;
        Ok(self.cache.read(|state| {
            let matching: Vec<_> = state
                .nodes()
                .filter(|(record, entry)| {
                    filter.matches(record) && filter.status.is_none_or(|status| status == entry.status())
                })
                .map(|(record, _)| &record.id)
                .collect();
            let begin = page
                .after
                .as_ref()
                .map_or(0, |after| matching.partition_point(|id| id.as_str() <= after.as_str()));
            let rest = &matching[begin..];
            let taken = &rest[..rest.len().min(page.size)];
            let last = taken.last().filter(|_| rest.len() > taken.len());
            let token = last.map(|id| page.token_after(id.as_str())).unwrap_or_default();
            let shown = taken.iter().filter_map(|id| self.show(state, id)).collect();
            (shown, token, matching.len(), state.revision())
        }))
    }

    /// Forgets a node that no instance is bound to.
    ///
    /// It is cordoned first: a binding compares the node's record, so that after this nothing more can be bound to it,
    /// and what was bound before is seen.
    ///
    /// # Errors
    /// There is none, or instances are bound to it.
    pub async fn deregister_node(&self, id: &NodeId) -> Result<()> {
        self.sync().await?;
        let before = self.empty_node(id)?;
        if before.schedulability == Schedulability::Open {
            self.update_node(id, |node| node.schedulability = Schedulability::Cordoned).await?;
            self.sync().await?;
        }
        let record = match self.empty_node(id) {
            Ok(record) => record,
            Err(refusal) => {
                if before.schedulability == Schedulability::Open {
                    self.update_node(id, |node| node.schedulability = Schedulability::Open).await?;
                }
                return Err(refusal);
            }
        };
        let txn = Txn {
            compares: vec![Compare::ModRevision(self.keys.node(id), record.revision)],
            then: vec![Op::delete(self.keys.node(id)), Op::delete(self.keys.node_lease(id))],
            otherwise_get: Vec::new(),
        };
        match self.store.txn(txn).await? {
            TxnOutcome::Committed(revision) => {
                self.liveness.forget(id);
                self.events.record(About::Node(&record), "NodeRemoved", "deregistered", "user");
                self.cache.wait_for(revision).await
            }
            TxnOutcome::Refused(_) => Err(Error::conflict(format!("node {id}"))),
        }
    }

    /// The record of a node that no instance is bound to.
    fn empty_node(&self, id: &NodeId) -> Result<Arc<NodeRecord>> {
        let record = self.node_record(id)?;
        let count = self.cache.read(|state| state.instances_on(id).count());
        if count > 0 {
            let (hostname, plural) = (&record.hostname, if count == 1 { "" } else { "s" });
            let message =
                format!("node {hostname} still has {count} instance{plural}; drain it or delete them first");
            return Err(Error::precondition(message));
        }
        Ok(record)
    }

    /// What all nodes have, and what instances were promised of it.
    #[must_use]
    pub fn totals(state: &State) -> (Resources, Resources) {
        let capacity = state.nodes().map(|(record, _)| record.allocatable).sum();
        let allocated = state.nodes().map(|(_, entry)| entry.allocated).sum();
        (capacity, allocated)
    }
}

/// Two machines with the same id, cloned from one image say, must not fight over one record.
fn check_host(entry: &NodeEntry, node: &NodeRecord) -> Result<()> {
    match &entry.record {
        Some(old) if entry.is_live() && old.hostname != node.hostname => Err(Error::precondition(format!(
            "node id {} is in use by host {}; give host {} an id of its own by removing its state directory",
            node.id, old.hostname, node.hostname
        ))),
        _ => Ok(()),
    }
}
