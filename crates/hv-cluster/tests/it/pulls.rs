//! Claims about pulls of images as operations: a result for each node, in parallel within a bound, through leaders that die.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use async_trait::async_trait;
use hv_cluster::Mutation;
use hv_cluster::operations::images::{ImagePull, Standing, standings};
use hv_cluster::operations::{Answer, Nodes, PullProgress};
use hv_proto::v1;
use hv_types::{ErrorCode, InstanceId, InstanceType, NodeId, OperationRecord, OperationState, ServiceError};
use parking_lot::Mutex;
use tokio::sync::Semaphore;

use crate::world::{Server, code, config, disk, keyed, node, until};

/// Nodes that fetch images when they may.
struct Fetchers {
    /// Who has the image.
    have: Mutex<BTreeSet<NodeId>>,
    /// What a node says that has no way to the image.
    barred: Option<(NodeId, ServiceError)>,
    /// Who is asked now, and how many were asked at once at most.
    busy: AtomicUsize,
    most: AtomicUsize,
    /// A node that comes to its end takes one of these.
    may_end: Semaphore,
}

impl Fetchers {
    fn new(ends: usize) -> Self {
        Self {
            have: Mutex::default(),
            barred: None,
            busy: AtomicUsize::new(0),
            most: AtomicUsize::new(0),
            may_end: Semaphore::new(ends),
        }
    }

    fn busy(&self) -> usize {
        self.busy.load(Ordering::SeqCst)
    }
}

/// Counts a call out again, also where it is dropped.
struct Busy<'a>(&'a AtomicUsize);

impl Drop for Busy<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

#[async_trait]
impl Nodes for Fetchers {
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

    async fn pull_image(
        &self,
        node: &NodeId,
        request: v1::PullImageRequest,
        progress: &PullProgress<'_>,
    ) -> Answer<()> {
        assert_eq!((request.image_ref.as_str(), request.name.as_str()), ("oci://r/tiny:1", "tiny"));
        let now = self.busy.fetch_add(1, Ordering::SeqCst) + 1;
        let _busy = Busy(&self.busy);
        self.most.fetch_max(now, Ordering::SeqCst);
        progress("downloading", 5, 10);
        if let Some((_, error)) = self.barred.as_ref().filter(|(barred, _)| barred == node) {
            return Err(ServiceError::new(error.code(), error.message()));
        }
        self.may_end.acquire().await.unwrap().forget();
        self.have.lock().insert(node.clone());
        Ok(())
    }
}

fn pull(nodes: &[NodeId], max_parallel: u32) -> ImagePull {
    ImagePull {
        reference: "oci://r/tiny:1".into(),
        name: "tiny".into(),
        instance_type: InstanceType::Container,
        digest: String::new(),
        nodes: nodes.to_vec(),
        max_parallel,
    }
}

async fn begin(server: &Server, pull: &ImagePull) -> String {
    server.cluster.begin_image_pull(&Mutation::once("pull"), pull).await.unwrap().reply.id
}

async fn operation(server: &Server, id: &str) -> OperationRecord {
    OperationRecord::clone(&*server.cluster.operation(id).await.unwrap())
}

async fn ended(server: &Server, id: &str) -> OperationRecord {
    until("the operation to end", async || Some(operation(server, id).await).filter(|o| o.state.is_final()))
        .await
}

async fn nodes(server: &Server, count: usize) -> Vec<NodeId> {
    let mut nodes = Vec::new();
    for index in 0..count {
        nodes.push(server.add_node(node(&format!("n{index}"), 8)).await);
    }
    nodes
}

#[tokio::test(flavor = "multi_thread")]
async fn nodes_fetch_in_parallel_within_the_bound_and_each_has_a_result() {
    let disk = disk();
    let server = Server::start(&disk.store, config("a")).await;
    let nodes = nodes(&server, 5).await;
    let barred = (nodes[3].clone(), ServiceError::not_found("the registry does not have it"));
    let fetchers = Arc::new(Fetchers { barred: Some(barred), ..Fetchers::new(0) });
    server.cluster.set_nodes(fetchers.clone());
    let id = begin(&server, &pull(&nodes, 2)).await;
    until("two nodes to be asked", async || (fetchers.busy() == 2).then_some(())).await;
    let working = Standing::Working { phase: "downloading".into(), done: 5, total: 10 };
    until("the record to say how far they are", async || {
        let operation = operation(&server, &id).await;
        (standings(&operation).filter(|(_, standing)| *standing == working).count() == 2).then_some(())
    })
    .await;
    fetchers.may_end.add_permits(10);
    let ended = ended(&server, &id).await;
    assert_eq!((ended.state, ended.done, ended.total), (OperationState::Failed, 4, 5), "{ended:?}");
    assert!(
        ended.message.contains("1 of 5 nodes could not fetch it: host-n3: the registry does not have it"),
        "{ended:?}"
    );
    for (node, standing) in standings(&ended) {
        let failed = Standing::Failed("the registry does not have it".into());
        assert_eq!(standing, if node == nodes[3] { failed } else { Standing::Done });
    }
    assert_eq!(fetchers.most.load(Ordering::SeqCst), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pull_goes_on_under_the_next_leader_without_the_nodes_that_have_it() {
    let disk = disk();
    let a = Server::start(&disk.store, config("a")).await;
    let nodes = nodes(&a, 3).await;
    let fetchers = Arc::new(Fetchers::new(1));
    a.cluster.set_nodes(fetchers.clone());
    let id = begin(&a, &pull(&nodes, 0)).await;
    until("one node to have it", async || (operation(&a, &id).await.done == 1).then_some(())).await;
    a.kill().await;
    until("the calls to be dropped", async || (fetchers.busy() == 0).then_some(())).await;
    let had = fetchers.have.lock().clone();
    let b = Server::start(&disk.store, config("b")).await;
    b.cluster.set_nodes(fetchers.clone());
    until("the others to be asked", async || (fetchers.busy() == 2).then_some(())).await;
    assert_eq!(*fetchers.have.lock(), had);
    fetchers.may_end.add_permits(2);
    let ended = ended(&b, &id).await;
    assert_eq!((ended.state, ended.done), (OperationState::Succeeded, 3), "{ended:?}");
    assert_eq!(fetchers.have.lock().len(), 3);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cancelled_pull_drops_what_is_under_way_and_keeps_the_results() {
    let disk = disk();
    let server = Server::start(&disk.store, config("a")).await;
    let nodes = nodes(&server, 3).await;
    let fetchers = Arc::new(Fetchers::new(1));
    server.cluster.set_nodes(fetchers.clone());
    let id = begin(&server, &pull(&nodes, 0)).await;
    until("one node to have it", async || (operation(&server, &id).await.done == 1).then_some(())).await;
    server.cluster.cancel_operation(&Mutation::once("cancel"), &id).await.unwrap();
    let ended = ended(&server, &id).await;
    assert_eq!((ended.state, ended.done), (OperationState::Cancelled, 1), "{ended:?}");
    let cancelled = standings(&ended).filter(|(_, standing)| *standing == Standing::Cancelled);
    assert_eq!(cancelled.count(), 2);
    until("the calls to be dropped", async || (fetchers.busy() == 0).then_some(())).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_repetition_is_the_same_pull_and_one_without_nodes_is_refused() {
    let disk = disk();
    let server = Server::start(&disk.store, config("a")).await;
    server.cluster.set_nodes(Arc::new(Fetchers::new(10)));
    let nodes = nodes(&server, 1).await;
    let ask = async || server.cluster.begin_image_pull(&keyed("k", 1), &pull(&nodes, 0)).await;
    let first = ask().await.unwrap().reply.id;
    assert_eq!(ended(&server, &first).await.state, OperationState::Succeeded);
    assert_eq!(ask().await.unwrap().reply.id, first);
    let none = server.cluster.begin_image_pull(&Mutation::once("pull"), &pull(&[], 0)).await;
    assert_eq!(code(none), ErrorCode::InvalidArgument);
}
