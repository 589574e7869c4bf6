//! One operation on a snapshot, driven by its leader from record to record.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use hv_proto::v1;
use hv_store::record::Record;
use hv_store::{Compare, Op, Txn, TxnOutcome};
use hv_types::operation::Blocker;
use hv_types::{ErrorCode, InstanceRecord, NodeId, OperationRecord, OperationState, ServiceError, Wanted};
use tokio::sync::{Notify, Semaphore};
use tracing::{info, warn};

use super::{BEGUN, EPOCH, SnapshotTask};
use crate::Cluster;
use crate::cache::State;
use crate::election::Leadership;
use crate::error::Result;
use crate::events::About;
use crate::operations::Nodes;

/// The first pause after a node did not do it; it doubles.
const RETRY_BASE: Duration = Duration::from_millis(500);
/// The longest such pause.
const RETRY_MAX: Duration = Duration::from_secs(30);
/// How often a node that says that it failed is asked again.
const MAX_FAULTS: u32 = 5;
/// How long is waited where nothing changes.
const SLOW: Duration = Duration::from_secs(30);

/// What is to be done next.
enum Act {
    /// It has ended.
    Over,
    /// Nothing, until something changes; why, and what stands in the way.
    Wait(Blocker),
    /// Write that it ends so.
    End(OperationState, String),
    /// Ask this node.
    Ask(NodeId),
}

/// One operation and who drives it.
pub(super) struct Drive<'a> {
    cluster: &'a Cluster,
    leadership: &'a Leadership,
    nodes: Arc<dyn Nodes>,
    calls: &'a Semaphore,
    id: String,
    changed: Arc<Notify>,
    failures: u32,
}

impl<'a> Drive<'a> {
    pub(super) fn new(
        cluster: &'a Cluster,
        leadership: &'a Leadership,
        nodes: Arc<dyn Nodes>,
        calls: &'a Semaphore,
        id: String,
        changed: Arc<Notify>,
    ) -> Self {
        Self { cluster, leadership, nodes, calls, id, changed, failures: 0 }
    }

    /// Drives it to its end.
    pub(super) async fn run(mut self) {
        loop {
            let pause = match self.step().await {
                Ok(None) => return,
                Ok(Some(pause)) => pause,
                Err(error) => {
                    let error = hv_telemetry::error_chain(error.service());
                    warn!(operation = self.id, error, "a step of an operation failed; it is tried again");
                    RETRY_BASE
                }
            };
            if pause > Duration::ZERO {
                let _ = tokio::time::timeout(pause, self.changed.notified()).await;
            }
        }
    }

    /// Does one step; says how long to wait for a change before the next. None: it has ended.
    async fn step(&mut self) -> Result<Option<Duration>> {
        if self.cluster.is_frozen() {
            return Ok(Some(RETRY_MAX));
        }
        let found = self.cluster.cache.read(|state| {
            let operation = state.operation(&self.id)?.clone();
            let record = operation.object_id.parse().ok().and_then(|id| state.instance(&id).cloned());
            let act = judge(state, &operation, record.as_deref(), self.failures > 0);
            Some((operation, record, act))
        });
        let Some((operation, record, act)) = found else { return Ok(None) };
        match (act, record) {
            (Act::Over, _) => Ok(None),
            (Act::End(state, message), record) => {
                self.end(&operation, record.as_deref(), state, message).await
            }
            (Act::Wait(blocker), _) => {
                let mut after = noted(&operation, blocker.reason.clone());
                after.phase = "blocked".into();
                after.blockers = vec![blocker];
                self.write(&operation, after).await?;
                Ok(Some(SLOW))
            }
            (Act::Ask(node), Some(record)) => self.ask(&operation, &record, &node).await,
            (Act::Ask(_), None) => Ok(Some(Duration::ZERO)),
        }
    }

    async fn ask(
        &mut self,
        operation: &OperationRecord,
        record: &InstanceRecord,
        node: &NodeId,
    ) -> Result<Option<Duration>> {
        let Some(task) = SnapshotTask::of(operation) else { return Ok(None) };
        // It is never closed.
        let _turn = self.calls.acquire().await.ok();
        if !operation.parameters.contains_key(BEGUN) {
            return self.begin(operation, record, node, &task).await;
        }
        let request = v1::AgentSnapshotRequest {
            instance_id: record.id.to_string(),
            epoch: record.epoch.0,
            name: task.name().to_owned(),
            memory: matches!(task, SnapshotTask::Create { memory: true, .. }),
        };
        info!(operation = self.id, instance = %record.id, %node, ?task, "asking the node");
        let name = task.name();
        let answer = match &task {
            SnapshotTask::Create { .. } => self.nodes.create_snapshot(node, request).await.map(|made| {
                let what = if made.memory { "disks and memory" } else { "disks" };
                format!("snapshot {name} of {what} is there")
            }),
            SnapshotTask::Delete(_) => {
                self.nodes.delete_snapshot(node, request).await.map(|()| format!("snapshot {name} is gone"))
            }
            SnapshotTask::Revert(_) => {
                self.nodes.revert_instance(node, request).await.map(|()| format!("it is as it was at {name}"))
            }
        };
        match answer {
            Ok(message) => {
                let late = operation.cancel_requested || self.was_cancelled();
                let late = if late { ", which was done before it could be cancelled" } else { "" };
                let message = format!("{message}{late}");
                self.end(operation, Some(record), OperationState::Succeeded, message).await
            }
            Err(error) if self.may_pass(&error) => self.retry(operation, &error).await,
            Err(error) => {
                let message = error.message().to_owned();
                self.end(operation, Some(record), OperationState::Failed, message).await
            }
        }
    }

    /// Whether to ask again can help. A fault of the runtime may pass, or may not.
    fn may_pass(&self, error: &ServiceError) -> bool {
        error.code().retryable() || (error.code() == ErrorCode::Internal && self.failures < MAX_FAULTS)
    }

    fn was_cancelled(&self) -> bool {
        let read = |state: &State| state.operation(&self.id).is_some_and(|now| now.cancel_requested);
        self.cluster.cache.read(read)
    }

    /// Notes that the node is asked from now on. A new snapshot must not be one that somebody else has made.
    async fn begin(
        &mut self,
        operation: &OperationRecord,
        record: &InstanceRecord,
        node: &NodeId,
        task: &SnapshotTask,
    ) -> Result<Option<Duration>> {
        if let SnapshotTask::Create { name, .. } = task {
            match self.nodes.snapshots(node, &record.id).await {
                Ok(known) if known.iter().any(|snapshot| snapshot.name == *name) => {
                    let message = format!("instance {} has a snapshot {name} already", record.name);
                    return self.end(operation, Some(record), OperationState::Failed, message).await;
                }
                Ok(_) => {}
                Err(error) if self.may_pass(&error) => return self.retry(operation, &error).await,
                Err(error) => {
                    let message = error.message().to_owned();
                    return self.end(operation, Some(record), OperationState::Failed, message).await;
                }
            }
        }
        let mut after = noted(operation, "its node is at it".into());
        after.state = OperationState::Running;
        after.phase = "working".into();
        after.blockers.clear();
        after.parameters.insert(BEGUN.into(), node.to_string());
        self.write(operation, after).await?;
        Ok(Some(Duration::ZERO))
    }

    async fn retry(&mut self, operation: &OperationRecord, error: &ServiceError) -> Result<Option<Duration>> {
        self.failures = self.failures.saturating_add(1);
        let doublings = self.failures.saturating_sub(1).min(16);
        let pause = (RETRY_BASE * (1 << doublings)).min(RETRY_MAX);
        let after =
            noted(operation, format!("its node did not do it, and is asked again: {}", error.message()));
        self.write(operation, after).await?;
        Ok(Some(pause))
    }

    async fn end(
        &mut self,
        operation: &OperationRecord,
        record: Option<&InstanceRecord>,
        state: OperationState,
        message: String,
    ) -> Result<Option<Duration>> {
        let mut before = operation.clone();
        loop {
            let now = SystemTime::now();
            let after = OperationRecord {
                state,
                phase: "ended".into(),
                message: message.clone(),
                blockers: Vec::new(),
                updated_at: now,
                finished_at: Some(now),
                ..before.clone()
            };
            if self.write(&before, after).await? {
                self.tell(operation, record, state, &message);
                return Ok(None);
            }
            // Cancelled meanwhile, say: what was done was done.
            match self.cluster.cache.read(|state| state.operation(&self.id).cloned()) {
                Some(known) if !known.state.is_final() && state != OperationState::Cancelled => {
                    before = OperationRecord::clone(&known);
                }
                _ => return Ok(Some(Duration::ZERO)),
            }
        }
    }

    fn tell(
        &self,
        operation: &OperationRecord,
        record: Option<&InstanceRecord>,
        state: OperationState,
        message: &str,
    ) {
        let (Some(record), Some(task)) = (record, SnapshotTask::of(operation)) else { return };
        let about = About::Instance(record);
        let events = &self.cluster.events;
        match (state, task) {
            (OperationState::Succeeded, SnapshotTask::Create { .. }) => {
                events.record(about, "SnapshotTaken", message, "operations");
            }
            (OperationState::Succeeded, SnapshotTask::Delete(_)) => {
                events.record(about, "SnapshotDeleted", message, "operations");
            }
            (OperationState::Succeeded, SnapshotTask::Revert(_)) => {
                events.record(about, "Reverted", message, "operations");
            }
            (OperationState::Failed, task) => {
                events.warn(about, "SnapshotFailed", format!("to {}: {message}", task.asked()), "operations");
            }
            _ => {}
        }
    }

    /// Writes a step; false if the record changed in between or this server does not lead any more.
    async fn write(&self, before: &OperationRecord, after: OperationRecord) -> Result<bool> {
        if (OperationRecord { updated_at: before.updated_at, ..after.clone() }) == *before {
            return Ok(true);
        }
        let key = self.cluster.keys.operation(&before.id);
        let txn = Txn {
            compares: vec![
                self.leadership.guard(),
                self.cluster.unfrozen()?,
                Compare::ModRevision(key.clone(), before.revision),
            ],
            then: vec![Op::put(key, after.encode())],
            ..Txn::default()
        };
        match self.cluster.store.txn(txn).await? {
            TxnOutcome::Committed(revision) => {
                self.cluster.cache.wait_for(revision).await?;
                Ok(true)
            }
            TxnOutcome::Refused(_) => {
                self.cluster.sync().await?;
                Ok(false)
            }
        }
    }
}

fn noted(operation: &OperationRecord, message: String) -> OperationRecord {
    OperationRecord { message, updated_at: SystemTime::now(), ..operation.clone() }
}

/// What an operation comes to next; `failed`: its node was asked and did not do it.
fn judge(state: &State, operation: &OperationRecord, record: Option<&InstanceRecord>, failed: bool) -> Act {
    if operation.state.is_final() {
        return Act::Over;
    }
    let begun = operation.parameters.contains_key(BEGUN);
    let Some(record) = record else {
        return Act::End(OperationState::Failed, "the instance was deleted, with its snapshots".into());
    };
    if operation.cancel_requested && !begun {
        return Act::End(OperationState::Cancelled, "cancelled before it was begun".into());
    }
    if record.wanted == Wanted::Deleted {
        return Act::End(OperationState::Failed, "the instance is being deleted".into());
    }
    let epoch = operation.parameters.get(EPOCH).and_then(|epoch| epoch.parse::<u64>().ok());
    let node = record.node_id().filter(|_| epoch.is_none_or(|epoch| epoch == record.epoch.0));
    let Some(node) = node else {
        let message = "the instance left the node that it was on; snapshots stay behind".to_owned();
        return Act::End(OperationState::Failed, message);
    };
    let live = state.node(node).is_some_and(|entry| entry.is_live());
    if operation.cancel_requested && (failed || !live) {
        let message = "given up; its node may have done it all the same".to_owned();
        return Act::End(OperationState::Cancelled, message);
    }
    let blocked = |reason: &str| {
        Act::Wait(Blocker {
            object_id: record.id.to_string(),
            object_name: record.name.clone(),
            reason: reason.to_owned(),
        })
    };
    if record.migration.is_some() {
        return blocked("the instance is being moved; it is done afterwards if it stays");
    }
    if !live {
        return blocked("its node does not answer; it is done once the node is back");
    }
    Act::Ask(node.clone())
}
