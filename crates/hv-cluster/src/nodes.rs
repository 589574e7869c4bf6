//! Nodes: registration, liveness, maintenance.
//!
//! # Theory of operation
//! A registration writes the node's record and, attached to a lease, its sign of life. A heartbeat renews the lease,
//! through any server, and writes nothing else unless the node's inventory changed. When the lease ends the store
//! deletes the sign of life, every server's cache sees it, and the node is NOT_READY everywhere at once.

mod hold;
mod liveness;
mod maintenance;
mod registration;
mod removal;
mod settings;

use std::sync::Arc;

use hv_proto::convert::{self, NodeView};
use hv_proto::v1;
use hv_store::record::Record;
use hv_store::{Compare, Op, Txn, TxnOutcome};
use hv_types::node::Schedulability;
use hv_types::{NodeId, NodeRecord, NodeRole, NodeStatus, Revision, Selector};

use crate::Cluster;
use crate::cache::{NodeEntry, State};
use crate::error::{Error, Result};
use crate::page::Page;
use crate::requests::{Done, Mutation, Plan};

pub(crate) use hold::Hold;
pub use liveness::{Liveness, Lost};
pub use maintenance::{Blocker, DrainOptions, outlook};
pub(crate) use maintenance::{active_drain, keeps, stays};
pub(crate) use registration::Gates;
pub use registration::{Beat, Inventory, Registered, Sign};
pub use settings::Settings;

/// How often a registration is tried when others change the node at the same time.
const ATTEMPTS: usize = 8;

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

/// What a change of a node does beside it, in the same transaction.
#[derive(Default)]
struct Beside {
    compares: Vec<Compare>,
    then: Vec<Op>,
}

/// A change of a node that this call has made.
struct Change {
    before: Arc<NodeRecord>,
    after: NodeRecord,
}

fn found<'a>(state: &'a State, id: &NodeId) -> Result<(&'a NodeEntry, Arc<NodeRecord>)> {
    let entry = state.node(id).ok_or_else(|| Error::no_node(id))?;
    let record = entry.record.clone().ok_or_else(|| Error::no_node(id))?;
    Ok((entry, record))
}

/// A node with what the API shows beside its record.
pub type Shown = (Arc<NodeRecord>, NodeView);

impl Cluster {
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
        let view = self.view_of(entry, &record);
        Some((record, view))
    }

    /// What the API shows of a node beside `record`, which may be what is about to be written.
    fn view_of(&self, entry: &NodeEntry, record: &NodeRecord) -> NodeView {
        let seen = self.liveness.of(&record.id);
        let status = match record.schedulability {
            _ if !entry.is_live() => NodeStatus::NotReady,
            Schedulability::Open => NodeStatus::Ready,
            Schedulability::Cordoned => NodeStatus::Maintenance,
            Schedulability::Draining => NodeStatus::Draining,
        };
        let lost = self.liveness.lost(&record.id).filter(|_| !entry.is_live());
        NodeView {
            status,
            allocated: entry.allocated,
            devices: entry.devices.clone(),
            instance_count: entry.instances.len(),
            last_seen: seen.map(|(at, _)| at),
            usage: seen.and_then(|(_, usage)| usage),
            lost_since: lost.map(|lost| lost.at),
        }
    }

    /// Changes a node's record for a user, once per request key, and answers with the node.
    ///
    /// `change` works on a copy of the record; with it go the conditions and the changes of other records that it adds.
    async fn change_node(
        &self,
        mutation: &Mutation,
        id: &NodeId,
        change: impl FnMut(&State, &NodeEntry, &mut NodeRecord, &mut Beside) -> Result<()>,
    ) -> Result<(Done<v1::Node>, Option<Change>)> {
        let (mut done, made) = self.change_node_as(mutation, id, change, |_, _, node| node).await?;
        if done.reply.revision == 0 {
            done.reply.revision = done.revision.0;
        }
        Ok((done, made))
    }

    /// As [`change_node`](Self::change_node), with an answer of another form. The node's revision in it is 0 where it was
    /// changed.
    async fn change_node_as<M: prost::Message + Default + Clone>(
        &self,
        mutation: &Mutation,
        id: &NodeId,
        mut change: impl FnMut(&State, &NodeEntry, &mut NodeRecord, &mut Beside) -> Result<()>,
        answer: impl Fn(&State, &NodeRecord, v1::Node) -> M,
    ) -> Result<(Done<M>, Option<Change>)> {
        let mut made = None;
        let done = self
            .mutate(mutation, &format!("node {id}"), || {
                self.cache.read(|state| {
                    let (entry, before) = found(state, id)?;
                    let mut after = NodeRecord::clone(&before);
                    let mut beside = Beside::default();
                    change(state, entry, &mut after, &mut beside)?;
                    let view = self.view_of(entry, &after);
                    if after == *before && beside.then.is_empty() {
                        made = None;
                        return Ok(Plan::unchanged(answer(
                            state,
                            &before,
                            convert::node_to(&before, &view, false),
                        )));
                    }
                    let key = self.keys.node(id);
                    beside.compares.push(Compare::ModRevision(key.clone(), before.revision));
                    beside.then.push(Op::put(key, after.encode()));
                    after.revision = Revision::default();
                    let reply = answer(state, &after, convert::node_to(&after, &view, false));
                    made = Some(Change { before, after });
                    Ok(Plan { compares: beside.compares, then: beside.then, reply })
                })
            })
            .await?;
        self.cache.wait_for(done.revision).await?;
        let made = made.filter(|_| done.fresh);
        Ok((done, made))
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
}
