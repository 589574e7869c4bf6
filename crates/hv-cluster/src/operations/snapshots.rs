//! Snapshots as operations: what is kept, what is forgotten, and what an instance returns to.
//!
//! # Theory of operation
//! The operation names the instance, the binding it had, and the snapshot. The leader asks the agent of the bound node,
//! again and again until it has an answer: the snapshot's name is the key by which the node knows a repetition. Operations
//! on one instance take turns in the order in which they were asked for.
//!
//! # Failure and recovery
//! That the node is about to be asked is written before it is: whoever leads next asks again, and does not take the
//! snapshot that was made meanwhile for somebody else's. What was not begun can be cancelled; what was begun ends as it
//! ends, or is given up where the node does not answer.

mod drive;
mod tasks;

use std::collections::BTreeMap;
use std::time::{Duration, SystemTime};

use hv_proto::v1;
use hv_store::record::Record;
use hv_store::{Compare, Op};
use hv_types::{
    ErrorCode, InstanceId, InstanceRecord, NodeId, OperationKind, OperationRecord, OperationState, Revision,
    ServiceError, Wanted, validate,
};

use super::{migrate, shown};
use crate::Cluster;
use crate::cache::State;
use crate::error::{Error, Result};
use crate::requests::{Done, Mutation, Plan};

/// Parameter: the snapshot's name.
const NAME: &str = "snapshot";
/// Parameter: whether memory is kept.
const MEMORY: &str = "memory";
/// Note: the binding that the instance had when it was asked for.
const EPOCH: &str = ".epoch";
/// Note: the node is being asked, or was.
const BEGUN: &str = ".begun";
/// How many operations of this kind may wait for one instance.
const MAX_WAITING: usize = 16;
/// How long a request waits for a node to say which snapshots there are.
pub(crate) const LOOK_LIMIT: Duration = Duration::from_secs(3);

/// What is to be done with the snapshots of an instance.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SnapshotTask {
    /// Keep what it is under this name.
    Create {
        /// The name.
        name: String,
        /// Whether the memory of a running instance is kept too.
        memory: bool,
    },
    /// Forget the one of this name.
    Delete(String),
    /// Return to the one of this name.
    Revert(String),
}

impl SnapshotTask {
    fn kind(&self) -> OperationKind {
        match self {
            Self::Create { .. } => OperationKind::SnapshotInstance,
            Self::Delete(_) => OperationKind::DeleteSnapshot,
            Self::Revert(_) => OperationKind::RevertInstance,
        }
    }

    fn name(&self) -> &str {
        match self {
            Self::Create { name, .. } | Self::Delete(name) | Self::Revert(name) => name,
        }
    }

    fn asked(&self) -> &'static str {
        match self {
            Self::Create { .. } => "take a snapshot",
            Self::Delete(_) => "delete a snapshot",
            Self::Revert(_) => "return to a snapshot",
        }
    }

    /// What an operation's record asks for; none if it is of another kind.
    fn of(operation: &OperationRecord) -> Option<Self> {
        let name = operation.parameters.get(NAME).cloned().unwrap_or_default();
        Some(match operation.kind {
            OperationKind::SnapshotInstance => {
                let memory = operation.parameters.get(MEMORY).is_some_and(|memory| memory == "true");
                Self::Create { name, memory }
            }
            OperationKind::DeleteSnapshot => Self::Delete(name),
            OperationKind::RevertInstance => Self::Revert(name),
            OperationKind::DrainNode | OperationKind::MigrateInstance | OperationKind::PullImage => {
                return None;
            }
        })
    }

    fn parameters(&self, record: &InstanceRecord) -> BTreeMap<String, String> {
        let mut parameters = BTreeMap::from([
            (NAME.to_owned(), self.name().to_owned()),
            (EPOCH.to_owned(), record.epoch.0.to_string()),
        ]);
        if let Self::Create { memory, .. } = self {
            parameters.insert(MEMORY.to_owned(), memory.to_string());
        }
        parameters
    }
}

fn exists(record: &InstanceRecord, name: &str) -> Error {
    let message = format!(
        "instance {} has a snapshot {name} already; choose another name or delete that one",
        record.name
    );
    ServiceError::new(ErrorCode::AlreadyExists, message).into()
}

/// The node that has the instance, if something can be asked of it there.
pub(crate) fn on_node<'a>(record: &'a InstanceRecord, asked: &str) -> Result<&'a NodeId> {
    migrate::refuse_while_migrating(record, asked)?;
    crate::instances::refuse_in_rescue(record, asked)?;
    if record.wanted == Wanted::Deleted {
        return Err(Error::precondition(format!("instance {} is being deleted", record.name)));
    }
    let binding = record.binding.as_ref().filter(|binding| !binding.release);
    binding.map(|binding| &binding.node_id).ok_or_else(|| {
        Error::precondition(format!("instance {} is not on a node: {}", record.name, record.state_reason))
    })
}

impl Cluster {
    /// Records what is to be done with the snapshots of an instance; the leader does it.
    ///
    /// # Errors
    /// There is no such instance, it is on no node, is being moved or deleted, or the name is taken.
    pub async fn begin_snapshot_task(
        &self,
        mutation: &Mutation,
        id: &InstanceId,
        task: &SnapshotTask,
    ) -> Result<Done<v1::Operation>> {
        validate::name("name", task.name())?;
        if let Some(done) = self.recorded(mutation).await? {
            return Ok(done);
        }
        let record = self.instance(id).await?;
        let node = on_node(&record, task.asked())?;
        if let SnapshotTask::Create { name, .. } = task
            && let Some(agents) = self.agents.get()
            // Where the node does not answer the leader looks again before it begins.
            && let Ok(Ok(known)) = tokio::time::timeout(LOOK_LIMIT, agents.snapshots(node, id)).await
            && known.iter().any(|snapshot| snapshot.name == *name)
        {
            return self.recorded(mutation).await?.ok_or_else(|| exists(&record, name));
        }
        let mut done = self
            .mutate(mutation, &format!("instance {id}"), || {
                self.cache.read(|state| self.plan_snapshot_task(state, id, task))
            })
            .await?;
        if done.reply.revision == 0 {
            done.reply.revision = done.revision.0;
        }
        self.cache.wait_for(done.revision).await?;
        Ok(done)
    }

    fn plan_snapshot_task(
        &self,
        state: &State,
        id: &InstanceId,
        task: &SnapshotTask,
    ) -> Result<Plan<v1::Operation>> {
        let record = state.instance(id).ok_or_else(|| Error::no_instance(id))?;
        on_node(record, task.asked())?;
        let is_its = |operation: &&std::sync::Arc<OperationRecord>| {
            operation.object_id == id.as_str() && !operation.state.is_final()
        };
        let waiting: Vec<_> = state
            .operations_before(None)
            .filter(is_its)
            .filter_map(|operation| SnapshotTask::of(operation))
            .collect();
        if let SnapshotTask::Create { name, .. } = task
            && waiting.iter().any(|other| other.kind() == task.kind() && other.name() == name)
        {
            return Err(exists(record, name));
        }
        if waiting.len() >= MAX_WAITING {
            let message = format!(
                "{MAX_WAITING} operations on snapshots of instance {} wait already; see `hypervisor-ctl operation list`",
                record.name
            );
            return Err(ServiceError::new(ErrorCode::ResourceExhausted, message).into());
        }
        let operation = begun(record, task);
        let key = self.keys.operation(&operation.id);
        let compares = vec![Compare::Present(self.keys.instance(id)), Compare::Absent(key.clone())];
        Ok(Plan { compares, then: vec![Op::put(key, operation.encode())], reply: shown(&operation) })
    }

    /// The snapshots of an instance, oldest first, as its node has them.
    ///
    /// # Errors
    /// There is no such instance, it is on no node, or its node does not answer.
    pub async fn instance_snapshots(&self, id: &InstanceId) -> Result<Vec<v1::InstanceSnapshot>> {
        let record = self.instance(id).await?;
        let Some(node) = record.node_id() else {
            return Err(Error::precondition(format!(
                "instance {} is not on a node: {}",
                record.name, record.state_reason
            )));
        };
        let agents =
            self.agents.get().ok_or_else(|| ServiceError::unavailable("this server reaches no nodes"))?;
        Ok(agents.snapshots(node, id).await?)
    }
}

fn begun(record: &InstanceRecord, task: &SnapshotTask) -> OperationRecord {
    let now = SystemTime::now();
    OperationRecord {
        id: uuid::Uuid::now_v7().to_string(),
        kind: task.kind(),
        object_kind: "instance".into(),
        object_id: record.id.to_string(),
        object_name: record.name.clone(),
        state: OperationState::Pending,
        phase: "waiting".into(),
        message: "waits for the leader".into(),
        done: 0,
        total: 0,
        blockers: Vec::new(),
        parameters: task.parameters(record),
        cancel_requested: false,
        created_at: now,
        updated_at: now,
        finished_at: None,
        actor: String::new(),
        request_id: hv_telemetry::RequestId::current().map(|id| id.as_str().to_owned()).unwrap_or_default(),
        revision: Revision::default(),
    }
}
