//! Claims about instances made from snapshots: on the node that has it or not at all, once for each request.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use hv_cluster::Mutation;
use hv_cluster::instances::CloneRequest;
use hv_proto::v1;
use hv_types::instance::{FailoverPolicy, Request};
use hv_types::{ErrorCode, InstanceId, InstanceState, NodeId};

use crate::snapshots::Keeper;
use crate::world::{Disk, Server, asked, code, config, disk, dump, gone, keyed, node, until};

fn able(id: &str, cores: i32, capabilities: &[&str]) -> v1::RegisterNodeRequest {
    let driver = v1::DriverInfo {
        name: "fake".into(),
        r#type: v1::InstanceType::Container.into(),
        healthy: true,
        capabilities: capabilities.iter().map(|known| (*known).to_owned()).collect(),
        ..v1::DriverInfo::default()
    };
    v1::RegisterNodeRequest { drivers: vec![driver], ..node(id, cores) }
}

fn of(name: &str, count: Option<usize>) -> CloneRequest {
    CloneRequest { snapshot: "warm".into(), name: name.into(), count }
}

/// A server, an instance that runs on a node of 4 cores with the snapshot `warm`, and then a node that is empty.
struct Set {
    disk: Disk,
    server: Server,
    keeper: Arc<Keeper>,
    source: InstanceId,
    home: NodeId,
}

impl Set {
    async fn new(capabilities: &[&str]) -> Self {
        let disk = disk();
        let server = Server::start(&disk.store, config("a")).await;
        until("it to lead", async || server.leads().then_some(())).await;
        let keeper = Keeper::new(100);
        keeper.kept.lock().insert("warm".into());
        server.cluster.set_nodes(keeper.clone());
        server.add_node(able("n1", 4, capabilities)).await;
        let (source, home) = server.running(asked("golden")).await;
        server.add_node(able("n2", 64, capabilities)).await;
        Self { disk, server, keeper, source, home }
    }

    async fn clone_as(
        &self,
        mutation: &Mutation,
        asked: &CloneRequest,
    ) -> Result<v1::CloneInstanceResponse, hv_cluster::Error> {
        self.server.cluster.clone_instance(mutation, &self.source, asked).await.map(|done| done.reply)
    }
}

fn once() -> Mutation {
    Mutation::once("clone")
}

#[tokio::test(flavor = "multi_thread")]
async fn a_fleet_goes_to_the_node_that_has_the_snapshot_and_waits_where_that_is_full() {
    let set = Set::new(&["clone"]).await;
    let made = set.clone_as(&once(), &of("web", Some(3))).await.unwrap().instances;
    let names: Vec<_> = made.iter().map(|made| made.name.as_str()).collect();
    assert_eq!(names, ["web-1", "web-2", "web-3"]);
    for made in &made {
        let id = made.id.parse().unwrap();
        assert_eq!(set.server.bound(&id).await, set.home);
        let record = set.server.get(&id).await;
        let origin = record.spec.clone_of.clone().expect("it is a clone");
        assert_eq!((&origin.instance, origin.snapshot.as_str()), (&set.source, "warm"));
        assert_eq!(record.failover_policy, FailoverPolicy::Never);
        assert_eq!(record.spec.cpu_cores, set.server.get(&set.source).await.spec.cpu_cores);
    }
    // The source and three clones fill its four cores; there is room elsewhere, but no snapshot.
    let waits = set.clone_as(&once(), &of("late", None)).await.unwrap().instances.remove(0);
    let waits: InstanceId = waits.id.parse().unwrap();
    let is_explained = async || {
        let record = set.server.get(&waits).await;
        assert_eq!(record.state, InstanceState::Pending, "{record:?}");
        record.state_reason.contains("cores").then_some(())
    };
    until("it to be explained", is_explained).await;
    // Once one of them is gone there is room.
    let first: InstanceId = made[0].id.parse().unwrap();
    set.server.change(&first, Request::Delete).await.unwrap();
    let record = set.server.get(&first).await;
    set.server.report_one(&set.home, gone(&record)).await;
    assert_eq!(set.server.bound(&waits).await, set.home);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_cloned_is_refused_before_anything_is_written() {
    let unable = Set::new(&["snapshot"]).await;
    let before = dump(&unable.disk.store).await;
    let refused = unable.clone_as(&keyed("k", 1), &of("web", None)).await.unwrap_err();
    assert_eq!(refused.code(), ErrorCode::Unsupported);
    let why = refused.to_string();
    assert!(why.contains("fake on node host-n1 cannot do `clone`"), "{why}");
    assert_eq!(dump(&unable.disk.store).await, before);

    let set = Set::new(&["clone"]).await;
    let before = dump(&set.disk.store).await;
    let cold = CloneRequest { snapshot: "cold".into(), ..of("web", None) };
    assert_eq!(code(set.clone_as(&keyed("k", 1), &cold).await), ErrorCode::NotFound);
    let nameless = of("No Name", None);
    assert_eq!(code(set.clone_as(&once(), &nameless).await), ErrorCode::InvalidArgument);
    let none = of("web", Some(0));
    assert_eq!(code(set.clone_as(&once(), &none).await), ErrorCode::InvalidArgument);
    let taken = of("golden", None);
    assert_eq!(code(set.clone_as(&once(), &taken).await), ErrorCode::AlreadyExists);
    set.keeper.is_away.store(true, Ordering::SeqCst);
    assert_eq!(code(set.clone_as(&keyed("k", 1), &of("web", None)).await), ErrorCode::Unavailable);
    assert_eq!(dump(&set.disk.store).await, before);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_repetition_is_the_same_clones_even_after_the_source_is_gone() {
    let set = Set::new(&["clone"]).await;
    let fleet = set.clone_as(&keyed("k", 1), &of("web", Some(2))).await.unwrap();
    let single = set.clone_as(&keyed("l", 2), &of("one", None)).await.unwrap();
    set.server.change(&set.source, Request::Delete).await.unwrap();
    let record = set.server.get(&set.source).await;
    set.server.report_one(&set.home, gone(&record)).await;
    set.keeper.kept.lock().clear();
    assert_eq!(set.clone_as(&keyed("k", 1), &of("web", Some(2))).await.unwrap(), fleet);
    assert_eq!(set.clone_as(&keyed("l", 2), &of("one", None)).await.unwrap(), single);
    assert_eq!(code(set.clone_as(&once(), &of("two", None)).await), ErrorCode::NotFound);
}
