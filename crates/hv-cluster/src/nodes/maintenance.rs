//! Cordon, uncordon, drain: what the operator wants of a node, and the operation that goes with a drain.
//!
//! # Invariants
//! A node is draining exactly while it has a drain that has not ended: both are written in one transaction. (A node that
//! an older release left draining gets its operation from the leader.)

use hv_proto::v1;
use hv_store::record::Record;
use hv_store::{Compare, Op};
use hv_types::node::{DEFAULT_DRAIN_PARALLEL, MAX_DRAIN_PARALLEL, Schedulability};
use hv_types::{
    InstanceId, InstanceRecord, InstanceType, Invalid, NodeCondition, NodeId, NodeRecord, OperationRecord,
    OperationState,
};

use super::settings::add_conditions;
use super::{Beside, Change};
use crate::Cluster;
use crate::cache::{NodeEntry, State};
use crate::error::Result;
use crate::events::About;
use crate::operations::drain;
use crate::requests::{Done, Mutation};

/// Most instances that the answer to a drain names; the operation counts them all.
const MAX_NAMED: usize = 1000;

/// An instance that stays on a node being drained.
#[derive(Clone, Debug)]
pub struct Blocker {
    /// Which one.
    pub id: InstanceId,
    /// Its name.
    pub name: String,
    /// Why it stays, and what to do.
    pub reason: String,
}

/// How a node is emptied.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DrainOptions {
    /// Also move instances whose disks lie on the node; they start afresh elsewhere.
    pub discard_disks: bool,
    /// How many instances are on the move at once.
    pub max_parallel: u32,
}

impl Default for DrainOptions {
    fn default() -> Self {
        Self { discard_disks: false, max_parallel: DEFAULT_DRAIN_PARALLEL }
    }
}

impl DrainOptions {
    /// Options as a user gives them; 0 stands for the usual number.
    ///
    /// # Errors
    /// `max_parallel` is beyond its bound.
    pub fn new(discard_disks: bool, max_parallel: u32) -> std::result::Result<Self, Invalid> {
        if max_parallel > MAX_DRAIN_PARALLEL {
            let expected = format!("must be at most {MAX_DRAIN_PARALLEL}");
            return Err(Invalid::new("max_parallel", max_parallel, expected));
        }
        let usual = Self::default();
        Ok(Self {
            discard_disks,
            max_parallel: if max_parallel == 0 { usual.max_parallel } else { max_parallel },
        })
    }
}

impl Cluster {
    /// Lets a node take no new instances; what runs there stays. Ends a drain.
    ///
    /// # Errors
    /// There is no such node.
    pub async fn cordon_node(&self, mutation: &Mutation, id: &NodeId) -> Result<Done<v1::Node>> {
        self.update_node_status(mutation, id, Some(Schedulability::Cordoned), &[]).await
    }

    /// Lets a node take instances again. Ends a drain.
    ///
    /// # Errors
    /// There is no such node.
    pub async fn uncordon_node(&self, mutation: &Mutation, id: &NodeId) -> Result<Done<v1::Node>> {
        self.update_node_status(mutation, id, Some(Schedulability::Open), &[]).await
    }

    /// Sets what the operator wants of a node, and conditions that they add beside those of its agent.
    ///
    /// # Errors
    /// There is no such node, or there are too many conditions.
    pub async fn update_node_status(
        &self,
        mutation: &Mutation,
        id: &NodeId,
        wanted: Option<Schedulability>,
        conditions: &[NodeCondition],
    ) -> Result<Done<v1::Node>> {
        let change = |state: &State, _: &NodeEntry, node: &mut NodeRecord, beside: &mut Beside| {
            add_conditions(node, conditions)?;
            self.plan_schedule(state, node, wanted, DrainOptions::default(), beside);
            Ok(())
        };
        let (done, made) = self.change_node(mutation, id, change).await?;
        self.tell_scheduled(made.as_ref());
        Ok(done)
    }

    /// Cordons a node and moves away what can be moved; the operation tells how far it is. A node that is being drained
    /// already goes on with the options of the last call.
    ///
    /// # Errors
    /// There is no such node.
    pub async fn drain_node(
        &self,
        mutation: &Mutation,
        id: &NodeId,
        options: DrainOptions,
    ) -> Result<Done<v1::DrainNodeResponse>> {
        let change = |state: &State, _: &NodeEntry, node: &mut NodeRecord, beside: &mut Beside| {
            self.plan_schedule(state, node, Some(Schedulability::Draining), options, beside);
            Ok(())
        };
        let (mut done, made) = self.change_node_as(mutation, id, change, drain_answer).await?;
        if let Some(node) = done.reply.node.as_mut().filter(|node| node.revision == 0) {
            node.revision = done.revision.0;
        }
        self.tell_scheduled(made.as_ref());
        Ok(done)
    }

    fn tell_scheduled(&self, made: Option<&Change>) {
        let Some(change) = made.filter(|made| made.before.schedulability != made.after.schedulability) else {
            return;
        };
        let (reason, message) = match change.after.schedulability {
            Schedulability::Open => ("NodeUncordoned", "takes instances again"),
            Schedulability::Cordoned => ("NodeCordoned", "takes no new instances"),
            Schedulability::Draining => ("NodeDraining", "gives up its instances"),
        };
        self.events.record(About::Node(&change.after), reason, message, "user");
    }

    fn plan_schedule(
        &self,
        state: &State,
        node: &mut NodeRecord,
        wanted: Option<Schedulability>,
        options: DrainOptions,
        beside: &mut Beside,
    ) {
        let Some(wanted) = wanted else { return };
        let active = active_drain(state, node);
        match wanted {
            Schedulability::Draining => self.plan_drain(state, node, active, options, beside),
            Schedulability::Open | Schedulability::Cordoned => {
                if let Some(active) = active {
                    beside.replace_operation(self, active, &drain::given_up(active, wanted));
                }
                node.schedulability = wanted;
                node.drain_discards_disks = false;
            }
        }
    }

    /// A drain of a node: one that is under way with other options, or a new one.
    fn plan_drain(
        &self,
        state: &State,
        node: &mut NodeRecord,
        active: Option<&OperationRecord>,
        options: DrainOptions,
        beside: &mut Beside,
    ) {
        if let Some(active) = active {
            let with_options = drain::with_options(active, options);
            if with_options.parameters != active.parameters {
                beside.replace_operation(self, active, &with_options);
            }
        } else {
            let last = state.operation(&node.drain_operation_id).map(AsRef::as_ref);
            let count = state.instances_on(&node.id).count();
            let operation = drain::begun(node, last, options, count);
            let key = self.keys.operation(&operation.id);
            beside.compares.push(Compare::Absent(key.clone()));
            beside.then.push(Op::put(key, operation.encode()));
            node.drain_operation_id = operation.id;
        }
        node.schedulability = Schedulability::Draining;
        node.drain_discards_disks = options.discard_disks;
        node.drain_max_parallel = options.max_parallel;
    }
}

/// The answer to a drain: the node with what moves and what stays, both cut at a number.
fn drain_answer(state: &State, record: &NodeRecord, node: v1::Node) -> v1::DrainNodeResponse {
    let (moving, blockers) = outlook(state, record);
    let blocker =
        |b: Blocker| v1::DrainBlocker { instance_id: b.id.to_string(), name: b.name, reason: b.reason };
    v1::DrainNodeResponse {
        operation_id: node.drain_operation_id.clone(),
        node: Some(node),
        moving_instance_ids: moving.iter().take(MAX_NAMED).map(ToString::to_string).collect(),
        blockers: blockers.into_iter().take(MAX_NAMED).map(blocker).collect(),
    }
}

/// Which instances of a draining node are moved, and which stay and why.
#[must_use]
pub fn outlook(state: &State, node: &NodeRecord) -> (Vec<InstanceId>, Vec<Blocker>) {
    let live = state.node(&node.id).is_some_and(NodeEntry::is_live);
    let (mut moving, mut blockers) = (Vec::new(), Vec::new());
    for record in state.instances_on(&node.id) {
        match keeps(record, node, live) {
            None => moving.push(record.id.clone()),
            Some(reason) => {
                blockers.push(Blocker { id: record.id.clone(), name: record.name.clone(), reason });
            }
        }
    }
    (moving, blockers)
}

impl Beside {
    fn replace_operation(&mut self, cluster: &Cluster, before: &OperationRecord, after: &OperationRecord) {
        let key = cluster.keys.operation(&before.id);
        self.compares.push(Compare::ModRevision(key.clone(), before.revision));
        self.then.push(Op::put(key, after.encode()));
    }
}

/// The drain of a node that has not ended.
pub(crate) fn active_drain<'a>(state: &'a State, node: &NodeRecord) -> Option<&'a OperationRecord> {
    state
        .operation(&node.drain_operation_id)
        .map(AsRef::as_ref)
        .filter(|operation| !operation.state.is_final() && operation.state != OperationState::Cancelling)
}

/// Why an instance stays on its draining node, if it does.
pub(crate) fn keeps(record: &InstanceRecord, node: &NodeRecord, live: bool) -> Option<String> {
    if let Some(reason) = stays(record, node.drain_discards_disks) {
        return Some(reason);
    }
    (!live).then(|| {
        "its node does not answer, so nothing can tell that it has stopped; it moves once the node is back".to_owned()
    })
}

/// Why an instance cannot be moved off its node.
pub(crate) fn stays(record: &InstanceRecord, discard_disks: bool) -> Option<String> {
    if record.placement.preferred_node.is_some() {
        return Some("it may only run on this node; delete it, or create it anew without --node".into());
    }
    let has_disks = !record.spec.disks.is_empty()
        || (record.instance_type != InstanceType::Container && !record.spec.image.is_empty());
    if has_disks && !discard_disks {
        return Some(
            "its disks lie on this node; drain with --discard-local-disks to start it afresh elsewhere, or delete it"
                .into(),
        );
    }
    None
}
