//! The leader's work on operations: started by what changes, and by a timer.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::time::{Duration, SystemTime};

use hv_store::record::Record;
use hv_store::{Compare, Op, Txn, TxnOutcome};
use hv_types::node::Schedulability;
use hv_types::{InstanceId, NodeId, OperationKind, OperationRecord, OperationState};
use tokio::time::Instant;
use tracing::warn;

use super::drain::{self, Step};
use crate::cache::{Batch, Delta, State, Subscription, SubscriptionError};
use crate::election::Leadership;
use crate::error::{Error, Result};
use crate::events::About;
use crate::nodes::{DrainOptions, active_drain};
use crate::{Cluster, TXN_BYTES, op_bytes};

/// How often how far an operation is may be written, where nothing else changes.
const PROGRESS_INTERVAL: Duration = Duration::from_secs(1);
/// How long a pass may be delayed at most when nothing happens.
const SLOW_TIMER: Duration = Duration::from_secs(30);
/// How often in a row a step may be overtaken before it is given up for a pause.
const OVERTAKEN_LIMIT: usize = 8;
/// The pause after a step that failed.
const RETRY_PAUSE: Duration = Duration::from_millis(500);

/// What a leader keeps in mind of the operations that have not ended.
#[derive(Default)]
struct Work {
    /// When each was last written by this leader.
    active: BTreeMap<String, Option<Instant>>,
    /// Which of them are to be looked at.
    due: BTreeSet<String>,
    /// Nodes whose changes matter.
    nodes: HashSet<NodeId>,
    /// Instances whose changes matter, wherever they are.
    instances: HashSet<InstanceId>,
    /// Nodes that are draining without an operation.
    orphans: BTreeSet<NodeId>,
}

impl Work {
    fn of(state: &State) -> Self {
        let mut work = Self::default();
        for operation in state.operations_before(None).filter(|operation| is_worked_on(operation)) {
            work.add(operation);
        }
        work.orphans = state
            .nodes()
            .filter(|(node, _)| is_orphan(state, &node.id))
            .map(|(node, _)| node.id.clone())
            .collect();
        work
    }

    fn add(&mut self, operation: &OperationRecord) {
        self.active.entry(operation.id.clone()).or_default();
        self.due.insert(operation.id.clone());
        self.nodes.extend(operation.object_id.parse::<NodeId>());
        self.instances.extend(drain::waits_for(operation));
    }

    fn take(&mut self, state: &State, batch: &Batch) {
        for delta in &batch.deltas {
            match delta {
                Delta::Operation { id, after, .. } => match after {
                    Some(operation) if is_worked_on(operation) => self.add(operation),
                    _ => {
                        self.active.remove(id);
                        self.due.remove(id);
                        self.forget_what_ended(state);
                    }
                },
                Delta::Node { id, .. } => {
                    if self.nodes.contains(id) {
                        self.due.extend(self.active.keys().cloned());
                    }
                    if is_orphan(state, id) {
                        self.orphans.insert(id.clone());
                    }
                }
                Delta::Instance { id, before, after } => {
                    let on = |record: &Option<std::sync::Arc<hv_types::InstanceRecord>>| {
                        let nodes = record.iter().flat_map(|record| [record.node_id(), record.moves_to()]);
                        nodes.flatten().any(|node| self.nodes.contains(node))
                    };
                    if self.instances.contains(id) || on(before) || on(after) {
                        self.due.extend(self.active.keys().cloned());
                    }
                }
                Delta::Event(_) | Delta::Hold { .. } => {}
            }
        }
    }

    fn forget_what_ended(&mut self, state: &State) {
        let active: Vec<_> = self.active.keys().filter_map(|id| state.operation(id)).collect();
        self.nodes = active.iter().filter_map(|operation| operation.object_id.parse().ok()).collect();
        self.instances = active.iter().flat_map(|operation| drain::waits_for(operation)).collect();
    }
}

/// Whether an operation is one of those that are worked on here, from records alone.
fn is_worked_on(operation: &OperationRecord) -> bool {
    operation.kind == OperationKind::DrainNode && !operation.state.is_final()
}

/// Whether a node is being drained and no operation tells of it, as an older release left it.
fn is_orphan(state: &State, id: &NodeId) -> bool {
    let node = state.node(id).and_then(|entry| entry.record.as_ref());
    node.is_some_and(|node| {
        let operation = state.operation(&node.drain_operation_id);
        node.schedulability == Schedulability::Draining
            && active_drain(state, node).is_none()
            && operation.is_none_or(|operation| operation.state.is_final())
    })
}

impl Cluster {
    /// Works on operations while this server leads.
    pub(crate) async fn operate_while_leading(&self, leadership: &Leadership) {
        loop {
            if let Err(error) = self.cache.wait_for(leadership.since).await {
                warn!(error = hv_telemetry::error_chain(error.service()), "operations wait for the cache");
                continue;
            }
            let (work, changes) = self.cache.subscribe(Work::of);
            self.operate(leadership, work, changes).await;
        }
    }

    /// Until changes were missed.
    async fn operate(&self, leadership: &Leadership, mut work: Work, mut changes: Subscription) {
        loop {
            let mut wake = Instant::now() + SLOW_TIMER;
            for id in std::mem::take(&mut work.orphans) {
                if let Err(error) = self.adopt_drain(leadership, &id).await {
                    warn!(error = hv_telemetry::error_chain(error.service()), node = %id, "a drain was not taken up");
                    work.orphans.insert(id);
                    wake = wake.min(Instant::now() + RETRY_PAUSE);
                }
            }
            for id in std::mem::take(&mut work.due) {
                match self.advance(leadership, &mut work, &id).await {
                    Ok(None) => {}
                    Ok(Some(again)) => {
                        wake = wake.min(again);
                        work.due.insert(id);
                    }
                    Err(error) => {
                        warn!(
                            error = hv_telemetry::error_chain(error.service()),
                            operation = id,
                            "a step of an operation failed; it is tried again"
                        );
                        wake = wake.min(Instant::now() + RETRY_PAUSE);
                        work.due.insert(id);
                    }
                }
            }
            let waiting = std::mem::take(&mut work.due);
            while work.due.is_empty() && work.orphans.is_empty() {
                tokio::select! {
                    biased;
                    batch = changes.next() => match batch {
                        Ok(Some(batch)) => self.cache.read(|state| work.take(state, &batch)),
                        Ok(None) => std::future::pending().await,
                        Err(SubscriptionError::Lagged | SubscriptionError::Expired) => return,
                    },
                    () = tokio::time::sleep_until(wake) => {
                        // Whichever it is, it is looked at afresh.
                        work.due.extend(work.active.keys().cloned());
                        if work.active.is_empty() {
                            wake = Instant::now() + SLOW_TIMER;
                        }
                    }
                }
            }
            work.due.extend(waiting);
        }
    }

    /// Does steps of one operation until there is nothing to do now; says when to look again, if not by a change.
    async fn advance(&self, leadership: &Leadership, work: &mut Work, id: &str) -> Result<Option<Instant>> {
        for _ in 0..OVERTAKEN_LIMIT {
            if self.is_frozen() {
                return Ok(Some(Instant::now() + PROGRESS_INTERVAL));
            }
            let Some(before) = self.cache.read(|state| state.operation(id).cloned()) else { return Ok(None) };
            if before.state.is_final() {
                return Ok(None);
            }
            let step = match before.kind {
                OperationKind::DrainNode => {
                    self.cache.read(|state| drain::step(state, &before, SystemTime::now()))
                }
                // These wait for nodes, and have tasks of their own.
                OperationKind::MigrateInstance
                | OperationKind::SnapshotInstance
                | OperationKind::DeleteSnapshot
                | OperationKind::RevertInstance
                | OperationKind::PullImage => return Ok(None),
            };
            if step.operation == *before && step.released.is_empty() {
                return Ok(None);
            }
            let written = work.active.get(id).copied().flatten();
            if let Some(again) = written.map(|at| at + PROGRESS_INTERVAL).filter(|at| *at > Instant::now())
                && !step.is_pressing(&before)
            {
                return Ok(Some(again));
            }
            if self.commit_step(leadership, &before, step).await? {
                work.active.insert(id.to_owned(), Some(Instant::now()));
            } else {
                self.sync().await?;
            }
        }
        Err(Error::conflict(format!("what operation {id} is about")))
    }

    /// Writes a step; false if one of the records changed in between or this server does not lead any more.
    async fn commit_step(
        &self,
        leadership: &Leadership,
        before: &OperationRecord,
        step: Step,
    ) -> Result<bool> {
        let key = self.keys.operation(&before.id);
        let mut txn = Txn {
            compares: vec![
                leadership.guard(),
                self.unfrozen()?,
                Compare::ModRevision(key.clone(), before.revision),
            ],
            then: vec![Op::put(key, step.operation.encode())],
            ..Txn::default()
        };
        // What a step was computed from must still be so: an operator may want something else of the node by now.
        let node = before.object_id.parse::<NodeId>()?;
        let known = self.cache.read(|state| state.node(&node).and_then(|entry| entry.record.clone()));
        let revision = step.node.as_ref().or(known.as_deref()).map(|node| node.revision);
        txn.compares.extend(revision.map(|at| Compare::ModRevision(self.keys.node(&node), at)));
        txn.then.extend(step.node.as_ref().map(|after| Op::put(self.keys.node(&node), after.encode())));
        let mut bytes = 0;
        for (count, (record, after)) in step.released.iter().enumerate() {
            let (compare, op) = self.replace_instance(record, after);
            bytes += op_bytes(&op);
            if count > 0 && bytes > TXN_BYTES {
                // Noted as on the move and not told yet: the next step finds them on the node and tells them.
                break;
            }
            txn.compares.push(compare);
            txn.then.push(op);
        }
        let TxnOutcome::Committed(revision) = self.store.txn(txn).await? else { return Ok(false) };
        self.cache.wait_for(revision).await?;
        for (_, after) in &step.released {
            self.events.record(About::Instance(after), "Moving", after.state_reason.clone(), "operations");
        }
        if let Some(node) = &step.node {
            self.tell_ended(node, &step.operation);
        }
        Ok(true)
    }

    fn tell_ended(&self, node: &hv_types::NodeRecord, operation: &OperationRecord) {
        let reason = match operation.state {
            OperationState::Succeeded => "NodeDrained",
            OperationState::Cancelled => "DrainCancelled",
            OperationState::Failed => "DrainFailed",
            OperationState::Pending | OperationState::Running | OperationState::Cancelling => return,
        };
        self.events.record(About::Node(node), reason, operation.message.clone(), "operations");
    }

    /// Gives a node that is being drained without one an operation.
    async fn adopt_drain(&self, leadership: &Leadership, id: &NodeId) -> Result<()> {
        let found = self.cache.read(|state| {
            if !is_orphan(state, id) {
                return None;
            }
            let node = state.node(id)?.record.clone()?;
            Some((state.instances_on(id).count(), node))
        });
        let Some((count, node)) = found.filter(|_| !self.is_frozen()) else { return Ok(()) };
        let options =
            DrainOptions { discard_disks: node.drain_discards_disks, max_parallel: node.drain_max_parallel };
        let operation = drain::begun(&node, None, options, count);
        let mut after = hv_types::NodeRecord::clone(&node);
        after.drain_operation_id.clone_from(&operation.id);
        let (key, node_key) = (self.keys.operation(&operation.id), self.keys.node(id));
        let txn = Txn {
            compares: vec![
                leadership.guard(),
                self.unfrozen()?,
                Compare::ModRevision(node_key.clone(), node.revision),
            ],
            then: vec![Op::put(key, operation.encode()), Op::put(node_key, after.encode())],
            ..Txn::default()
        };
        match self.store.txn(txn).await? {
            TxnOutcome::Committed(revision) => self.cache.wait_for(revision).await,
            TxnOutcome::Refused(_) => Err(Error::conflict(format!("node {id}"))),
        }
    }
}
