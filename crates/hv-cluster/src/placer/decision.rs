//! What is decided about instances that exist: bindings, reasons, and orders to give way, many in one transaction.

use std::collections::BTreeMap;
use std::sync::Arc;

use hv_proto::store::InstanceSetRecord;
use hv_store::record::decode_message;
use hv_store::{Compare, Op, StoreExt, Txn, TxnOutcome};
use hv_telemetry::crash::{self, Point};
use hv_types::instance::Binding;
use hv_types::{Epoch, InstanceId, InstanceRecord, InstanceState, NodeId, NodeRecord, Revision};
use tracing::{debug, warn};

use super::flight::may_have_been_applied;
use crate::election::Leadership;
use crate::error::Result;
use crate::events::About;
use crate::{Cluster, TXN_BYTES, op_bytes};

/// Decisions per transaction: each takes an operation and up to two compares (its own record, its node's), and there are
/// two compares more.
pub(super) const BATCH: usize = 60;

/// What is decided.
pub(crate) enum Kind {
    /// It goes to this node, whose record was read at this revision.
    Bind(NodeId, Revision),
    /// It is told why it waits; whether it is the first time.
    Tell(bool),
    /// It gives way to the instance of this name.
    GiveWay(String),
    /// It is to move to this node while it runs; the operation that does it is written beside.
    Reserve {
        /// Where to.
        node: NodeId,
        /// At what revision that node's record was read.
        seen: Revision,
        /// The operation's condition and write.
        beside: Box<(Compare, Op)>,
    },
}

/// One instance with what is decided about it.
pub(crate) struct Decision {
    pub(crate) before: Arc<InstanceRecord>,
    pub(crate) after: InstanceRecord,
    pub(crate) kind: Kind,
}

/// What became of decisions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// They are written.
    Committed(Revision),
    /// A record changed in between, or this server does not lead any more. What was done instead is in the cache.
    Refused,
    /// The store did not take them.
    Failed,
    /// They may be written, or be written yet.
    Unknown,
}

/// Binds a record to a node.
pub(crate) fn bind(record: &mut InstanceRecord, node: &NodeRecord) {
    record.binding = Some(Binding { node_id: node.id.clone(), release: false });
    record.epoch = record.epoch.next();
    record.state = InstanceState::Creating;
    record.state_reason = format!("bound to node {}; waits for its agent", node.hostname);
}

/// Takes a binding that was not written out of a new record again.
pub(crate) fn unbind(record: &mut InstanceRecord) {
    record.binding = None;
    record.epoch = Epoch::default();
    record.state = InstanceState::Pending;
    record.state_reason = "waits for a node".into();
}

/// Has a record give way: its node is told to give it up, as in a drain, and it is placed again.
pub(crate) fn give_way(record: &mut InstanceRecord, to: &InstanceRecord) {
    if let Some(binding) = &mut record.binding {
        binding.release = true;
    }
    // A node takes only an order that is newer than the one it has.
    record.generation += 1;
    record.state_reason =
        format!("gives way to instance {} ({}), whose priority is {}", to.name, to.id, to.placement.priority);
}

impl Cluster {
    /// Writes decisions. Of those that do not fit into one transaction the last are given back.
    pub(crate) async fn decide(
        &self,
        leadership: &Leadership,
        mut decisions: Vec<Decision>,
    ) -> (Vec<Decision>, Outcome, Vec<Decision>) {
        let Ok(unfrozen) = self.unfrozen() else { return (decisions, Outcome::Failed, Vec::new()) };
        let mut txn = Txn { compares: vec![leadership.guard(), unfrozen], ..Txn::default() };
        let (mut bytes, mut count, mut nodes) = (0, 0, BTreeMap::new());
        for decision in &decisions {
            let (compare, op) = self.replace_instance(&decision.before, &decision.after);
            bytes += op_bytes(&op);
            if count == BATCH || (count > 0 && bytes > TXN_BYTES) {
                break;
            }
            count += 1;
            txn.compares.push(compare);
            txn.then.push(op);
            match &decision.kind {
                Kind::Bind(node, seen) => {
                    nodes.insert(node.clone(), *seen);
                }
                Kind::Reserve { node, seen, beside } => {
                    nodes.insert(node.clone(), *seen);
                    txn.compares.push(beside.0.clone());
                    txn.then.push(beside.1.clone());
                }
                Kind::Tell(_) | Kind::GiveWay(_) => {}
            }
        }
        let rest = decisions.split_off(count);
        txn.compares.extend(nodes.iter().map(|(id, seen)| Compare::ModRevision(self.keys.node(id), *seen)));
        crash::reach(Point::ServerScheduleBeforeBind);
        let outcome = match self.store.txn(txn).await {
            Ok(TxnOutcome::Committed(revision)) => Outcome::Committed(revision),
            Ok(TxnOutcome::Refused(_)) => {
                debug!("a placement was overtaken by another change");
                let _ = self.sync().await;
                Outcome::Refused
            }
            Err(error) => {
                warn!(
                    error = hv_telemetry::error_chain(&error),
                    "placements were not written; they are tried again"
                );
                if may_have_been_applied(&error) { Outcome::Unknown } else { Outcome::Failed }
            }
        };
        crash::reach(Point::ServerScheduleAfterBind);
        if matches!(outcome, Outcome::Committed(_)) {
            decisions.iter().for_each(|decision| self.tell_of(decision));
        }
        (decisions, outcome, rest)
    }

    fn tell_of(&self, decision: &Decision) {
        let about = About::Instance(&decision.after);
        match &decision.kind {
            Kind::Bind(node, _) => {
                metrics::counter!("hypervisor_placements_total").increment(1);
                let hostname = self.cache.read(|state| {
                    let record = state.node(node).and_then(|entry| entry.record.clone());
                    record.map_or_else(|| node.to_string(), |record| record.hostname.clone())
                });
                self.events.record(about, "Scheduled", format!("bound to node {hostname}"), "scheduler");
            }
            Kind::Tell(true) => {
                self.events.warn(about, "Unschedulable", decision.after.state_reason.clone(), "scheduler");
            }
            Kind::Tell(false) => {}
            Kind::Reserve { node, .. } => {
                self.events.record(about, "Migrating", format!("moves to node {node}"), "operations");
            }
            Kind::GiveWay(to) => {
                let message = format!("{} gives way to {to}, whose priority is higher", decision.after.name);
                self.events.warn(about, "Preempted", message, "scheduler");
            }
        }
    }

    /// Whether a binding whose outcome was lost is in the store.
    pub(crate) async fn is_bound(&self, id: &InstanceId, node: &NodeId) -> Result<bool> {
        let kv = self.store.get(self.keys.instance(id)).await?;
        let record = kv.map(|kv| hv_store::record::Record::decode(&kv)).transpose()?;
        Ok(record.is_some_and(|record: InstanceRecord| record.node_id() == Some(node)))
    }

    /// Removes the key of a set that has no members any more, so that its names are free.
    pub(crate) async fn sweep_set(&self, leadership: &Leadership, project: &str, set: &str) -> Result<()> {
        let key = self.keys.instance_set(project, set);
        let Some(kv) = self.store.get(key.clone()).await? else { return Ok(()) };
        let count = decode_message::<InstanceSetRecord>(&kv)?.count;
        self.cache.wait_for(kv.mod_revision).await?;
        if !self.set_is_empty(project, set, count) {
            return Ok(());
        }
        let compares =
            vec![leadership.guard(), self.unfrozen()?, Compare::ModRevision(key.clone(), kv.mod_revision)];
        // Refused: the set was created again, or this server does not lead any more. Either way it is not ours.
        self.store.txn(Txn { compares, then: vec![Op::delete(key)], ..Txn::default() }).await?;
        Ok(())
    }
}
