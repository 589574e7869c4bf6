//! Claims about snapshots as operations: asked until there is an answer, once for each name, through leaders that die.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use async_trait::async_trait;
use hv_cluster::Mutation;
use hv_cluster::operations::{Answer, Nodes, SnapshotTask};
use hv_proto::v1;
use hv_types::{ErrorCode, InstanceId, NodeId, OperationRecord, OperationState, ServiceError};
use parking_lot::Mutex;
use tokio::sync::Semaphore;

use crate::world::{Server, asked, code, config, disk, keyed, node, until};

/// Nodes that keep the names of snapshots, and answer when they may.
pub(crate) struct Keeper {
    pub(crate) kept: Mutex<BTreeSet<String>>,
    calls: AtomicUsize,
    /// A call that changes something takes one of these.
    may_answer: Semaphore,
    pub(crate) is_away: AtomicBool,
}

impl Keeper {
    pub(crate) fn new(answers: usize) -> Arc<Self> {
        Arc::new(Self {
            kept: Mutex::default(),
            calls: AtomicUsize::new(0),
            may_answer: Semaphore::new(answers),
            is_away: AtomicBool::new(false),
        })
    }

    async fn change(&self, change: impl FnOnce(&mut BTreeSet<String>)) -> Answer<()> {
        if self.is_away.load(Ordering::SeqCst) {
            return Err(ServiceError::unavailable("it is away"));
        }
        self.calls.fetch_add(1, Ordering::SeqCst);
        change(&mut self.kept.lock());
        self.may_answer.acquire().await.unwrap().forget();
        Ok(())
    }
}

#[async_trait]
impl Nodes for Keeper {
    async fn prepare_incoming(
        &self,
        _: &NodeId,
        _: v1::AgentPrepareIncomingRequest,
    ) -> Answer<v1::AgentPrepareIncomingResponse> {
        Err(ServiceError::internal("not asked here"))
    }

    async fn begin_migration(
        &self,
        _: &NodeId,
        _: v1::AgentBeginMigrationRequest,
    ) -> Answer<v1::AgentMigrationStatus> {
        Err(ServiceError::internal("not asked here"))
    }

    async fn migration(&self, _: &NodeId, _: &InstanceId, _: &str) -> Answer<v1::AgentMigrationStatus> {
        Err(ServiceError::internal("not asked here"))
    }

    async fn abort_migration(&self, _: &NodeId, _: &InstanceId, _: &str) -> Answer<()> {
        Err(ServiceError::internal("not asked here"))
    }

    async fn create_snapshot(
        &self,
        _: &NodeId,
        request: v1::AgentSnapshotRequest,
    ) -> Answer<v1::InstanceSnapshot> {
        let name = request.name.clone();
        self.change(|kept| {
            kept.insert(request.name);
        })
        .await?;
        Ok(v1::InstanceSnapshot { name, memory: request.memory, ..Default::default() })
    }

    async fn delete_snapshot(&self, _: &NodeId, request: v1::AgentSnapshotRequest) -> Answer<()> {
        self.change(|kept| {
            kept.remove(&request.name);
        })
        .await
    }

    async fn revert_instance(&self, _: &NodeId, request: v1::AgentSnapshotRequest) -> Answer<()> {
        if !self.kept.lock().contains(&request.name) {
            return Err(ServiceError::not_found("there is no such snapshot"));
        }
        self.change(|_| ()).await
    }

    async fn snapshots(&self, _: &NodeId, _: &InstanceId) -> Answer<Vec<v1::InstanceSnapshot>> {
        if self.is_away.load(Ordering::SeqCst) {
            return Err(ServiceError::unavailable("it is away"));
        }
        let kept = self.kept.lock();
        Ok(kept
            .iter()
            .map(|name| v1::InstanceSnapshot { name: name.clone(), ..Default::default() })
            .collect())
    }
}

fn create(name: &str) -> SnapshotTask {
    SnapshotTask::Create { name: name.into(), memory: false }
}

async fn begin(server: &Server, id: &InstanceId, task: &SnapshotTask) -> v1::Operation {
    server.cluster.begin_snapshot_task(&Mutation::once("snapshot"), id, task).await.unwrap().reply
}

async fn ended(server: &Server, id: &str) -> OperationRecord {
    let operation = async || OperationRecord::clone(&*server.cluster.operation(id).await.unwrap());
    until("the operation to end", async || Some(operation().await).filter(|o| o.state.is_final())).await
}

#[tokio::test(flavor = "multi_thread")]
async fn snapshots_are_taken_returned_to_and_forgotten_in_turn() {
    let disk = disk();
    let server = Server::start(&disk.store, config("a")).await;
    let keeper = Keeper::new(100);
    server.cluster.set_nodes(keeper.clone());
    server.add_node(node("n1", 8)).await;
    let (id, _) = server.running(asked("web")).await;
    let tasks = [create("one"), SnapshotTask::Revert("one".into()), SnapshotTask::Delete("one".into())];
    let mut operations = Vec::new();
    for task in &tasks {
        operations.push(begin(&server, &id, task).await.id);
    }
    for operation in &operations {
        let operation = ended(&server, operation).await;
        assert_eq!(operation.state, OperationState::Succeeded, "{operation:?}");
    }
    assert!(keeper.kept.lock().is_empty());
    let missing = begin(&server, &id, &SnapshotTask::Revert("one".into())).await;
    assert_eq!(ended(&server, &missing.id).await.state, OperationState::Failed);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_name_that_is_taken_is_refused_and_a_repetition_is_not() {
    let disk = disk();
    let server = Server::start(&disk.store, config("a")).await;
    server.cluster.set_nodes(Keeper::new(100));
    server.add_node(node("n1", 8)).await;
    let (id, _) = server.running(asked("web")).await;
    let ask = async || server.cluster.begin_snapshot_task(&keyed("k", 1), &id, &create("one")).await;
    let first = ask().await.unwrap().reply;
    assert_eq!(ended(&server, &first.id).await.state, OperationState::Succeeded);
    assert_eq!(ask().await.unwrap().reply.id, first.id);
    let other = server.cluster.begin_snapshot_task(&Mutation::once("s"), &id, &create("one")).await;
    assert_eq!(code(other), ErrorCode::AlreadyExists);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_leader_that_dies_while_the_node_is_at_it_leaves_it_to_the_next() {
    let disk = disk();
    let a = Server::start(&disk.store, config("a")).await;
    let keeper = Keeper::new(0);
    a.cluster.set_nodes(keeper.clone());
    a.add_node(node("n1", 8)).await;
    let (id, _) = a.running(asked("web")).await;
    let operation = begin(&a, &id, &create("one")).await.id;
    until("the node to be asked", async || (keeper.calls.load(Ordering::SeqCst) > 0).then_some(())).await;
    a.kill().await;
    let b = Server::start(&disk.store, config("b")).await;
    b.cluster.set_nodes(keeper.clone());
    keeper.may_answer.add_permits(10);
    let operation = ended(&b, &operation).await;
    assert_eq!(
        operation.state,
        OperationState::Succeeded,
        "its own snapshot is nobody else's: {operation:?}"
    );
    assert_eq!(keeper.kept.lock().len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_not_begun_can_be_cancelled_and_what_waits_for_its_node_is_done_once_it_is_back() {
    let disk = disk();
    let server = Server::start(&disk.store, config("a")).await;
    let keeper = Keeper::new(100);
    keeper.is_away.store(true, Ordering::SeqCst);
    server.cluster.set_nodes(keeper.clone());
    server.add_node(node("n1", 8)).await;
    let (id, _) = server.running(asked("web")).await;
    let given_up = begin(&server, &id, &create("one")).await.id;
    let waits = begin(&server, &id, &create("two")).await.id;
    server.cluster.cancel_operation(&Mutation::once("cancel"), &given_up).await.unwrap();
    assert_eq!(ended(&server, &given_up).await.state, OperationState::Cancelled);
    keeper.is_away.store(false, Ordering::SeqCst);
    assert_eq!(ended(&server, &waits).await.state, OperationState::Succeeded);
    assert_eq!(keeper.kept.lock().iter().collect::<Vec<_>>(), ["two"]);
}
