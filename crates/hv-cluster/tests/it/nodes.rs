//! Claims about nodes.

use std::time::Duration;

use hv_cluster::ClusterConfig;
use hv_cluster::Mutation;
use hv_cluster::instances::{Filter, Seen};
use hv_cluster::nodes::{Inventory, NodeFilter, Sign};
use hv_cluster::page::Page;
use hv_proto::{convert, v1};
use hv_types::{ClusterId, ErrorCode, InstanceState, NodeId, NodeStatus};

use crate::world::{Server, asked, code, config, disk, dump, node, until};

async fn status(server: &Server, id: &NodeId) -> NodeStatus {
    server.cluster.node(id).await.unwrap().1.status
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_lives_by_its_heartbeats_and_its_instances_look_lost_without() {
    let disk = disk();
    let short = ClusterConfig { heartbeat_timeout: Duration::from_secs(2), ..config("a") };
    let server = Server::start(&disk.store, short).await;
    let id = server.add_node(node("n1", 4)).await;
    let (instance, _) = server.running(asked("web")).await;
    let begin = tokio::time::Instant::now();
    while begin.elapsed() < Duration::from_secs(4) {
        assert!(server.cluster.heartbeat(None, &id, Sign::default()).await.unwrap().is_some());
        assert_eq!(status(&server, &id).await, NodeStatus::Ready, "it beats, and is taken for dead");
        tokio::time::sleep(Duration::from_millis(200)).await;
    }

    let ((), mut changes) = server.cluster.cache().subscribe(|_| ());
    until("the node to be lost", async || (status(&server, &id).await == NodeStatus::NotReady).then_some(()))
        .await;
    let seen = server.get(&instance).await;
    assert_eq!(seen.state, InstanceState::Unknown);
    assert_eq!(seen.state_reason, "node host-n1 (n1) does not answer; last seen RUNNING: RUNNING it is");
    let filter = Filter::default();
    let told = until("a watcher to be told", async || {
        let batch = changes.next().await.unwrap().unwrap();
        (0..batch.deltas.len()).find_map(|at| filter.see(&batch, at))
    })
    .await;
    assert!(matches!(told, Seen::Modified(record) if record.state == InstanceState::Unknown));
    until("the loss to be recorded", async || {
        server.cluster.cache().read(|state| {
            state
                .events_before(None)
                .any(|event| event.reason == "NodeNotReady" && event.warning)
                .then_some(())
        })
    })
    .await;

    assert!(
        server.cluster.heartbeat(None, &id, Sign::default()).await.unwrap().is_none(),
        "it has to register again"
    );
    server.add_node(node("n1", 4)).await;
    assert_eq!(status(&server, &id).await, NodeStatus::Ready);
    assert_eq!(server.get(&instance).await.state, InstanceState::Running);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_id_is_not_shared_by_two_hosts_nor_a_node_by_two_clusters() {
    let disk = disk();
    let server = Server::start(&disk.store, config("a")).await;
    let id = server.add_node(node("n1", 4)).await;
    let before = dump(&disk.store).await;
    let clone = v1::RegisterNodeRequest { hostname: "copy".into(), ..node("n1", 4) };
    let clone = convert::node_from_registration(clone).unwrap();
    let refusal = server.cluster.register_node(None, clone).await.unwrap_err();
    assert_eq!(refusal.code(), ErrorCode::FailedPrecondition);
    assert!(refusal.to_string().contains("in use by host host-n1"), "{refusal}");

    let other = ClusterId::generate();
    let same = || convert::node_from_registration(node("n1", 4)).unwrap();
    assert_eq!(code(server.cluster.register_node(Some(&other), same()).await), ErrorCode::FailedPrecondition);
    assert_eq!(
        code(server.cluster.heartbeat(Some(&other), &id, Sign::default()).await),
        ErrorCode::FailedPrecondition
    );
    assert_eq!(
        code(server.cluster.assignments(&other, id.clone()).await.map(|_| ())),
        ErrorCode::FailedPrecondition
    );
    assert_eq!(dump(&disk.store).await, before);
    server.cluster.register_node(Some(&server.cluster.id()), same()).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_registration_renews_what_the_agent_says_and_keeps_what_the_operator_said() {
    let disk = disk();
    let server = Server::start(&disk.store, config("a")).await;
    let id = server.add_node(node("n1", 4)).await;
    let first = server.cluster.node(&id).await.unwrap().0;
    server.cluster.cordon_node(&Mutation::once("cordon"), &id).await.unwrap();
    server.add_node(node("n1", 8)).await;
    let (again, view) = server.cluster.node(&id).await.unwrap();
    assert_eq!((again.allocatable.cpu_cores, view.status), (8, NodeStatus::Maintenance));
    assert_eq!(again.created_at, first.created_at);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_heartbeat_writes_only_what_changed_and_through_any_server() {
    let disk = disk();
    let server = Server::idle(&disk.store, config("a")).await;
    let other = Server::idle(&disk.store, config("b")).await;
    let id = server.add_node(node("n1", 4)).await;
    assert!(
        other.cluster.heartbeat(None, &id, Sign::default()).await.unwrap().is_some(),
        "the other server has not heard of it"
    );
    let before = disk.store.revision().await.unwrap();
    let same = Inventory {
        conditions: Vec::new(),
        drivers: convert_drivers(),
        images: Vec::new(),
        devices: Default::default(),
    };
    assert!(server.cluster.heartbeat(None, &id, with(same.clone())).await.unwrap().is_some());
    assert_eq!(disk.store.revision().await.unwrap(), before, "a heartbeat without news was written");
    let image = hv_types::ImageInfo::file("tiny", hv_types::InstanceType::Vm, 1, std::time::UNIX_EPOCH);
    let news = Inventory { images: vec![image.clone()], ..same.clone() };
    assert!(server.cluster.heartbeat(None, &id, with(news)).await.unwrap().is_some());
    assert_eq!(server.cluster.node(&id).await.unwrap().0.images.len(), 1);
    let flood = Inventory { images: vec![image; 5000], ..same };
    assert_eq!(code(server.cluster.heartbeat(None, &id, with(flood)).await), ErrorCode::InvalidArgument);
}

fn with(inventory: Inventory) -> Sign {
    Sign { inventory: Some(inventory), ..Sign::default() }
}

fn convert_drivers() -> Vec<hv_types::DriverInfo> {
    convert::node_from_registration(node("n1", 4)).unwrap().drivers
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_with_instances_is_not_deregistered_and_one_without_is_forgotten() {
    let disk = disk();
    let server = Server::start(&disk.store, config("a")).await;
    server.add_node(node("n1", 4)).await;
    let (instance, id) = server.running(asked("web")).await;
    let refusal =
        server.cluster.deregister_node(&Mutation::once("deregister"), &id, false).await.unwrap_err();
    assert_eq!(refusal.to_string(), "node host-n1 still has 1 instance; drain it or delete them first");
    assert_eq!(status(&server, &id).await, NodeStatus::Ready);
    server.change(&instance, hv_types::instance::Request::Delete).await.unwrap();
    let leaving = server.get(&instance).await;
    server.report_one(&id, crate::world::gone(&leaving)).await;
    server.cluster.deregister_node(&Mutation::once("deregister"), &id, false).await.unwrap();
    assert_eq!(code(server.cluster.node(&id).await.map(|_| ())), ErrorCode::NotFound);
    assert_eq!(
        code(server.cluster.deregister_node(&Mutation::once("deregister"), &id, false).await),
        ErrorCode::NotFound
    );
    assert!(server.cluster.heartbeat(None, &id, Sign::default()).await.unwrap().is_none());
}

#[tokio::test(flavor = "multi_thread")]
async fn nodes_are_listed_once_each_page_by_page() {
    let disk = disk();
    let server = Server::idle(&disk.store, config("a")).await;
    for n in 0..25 {
        server.add_node(node(&format!("n{n:02}"), 1)).await;
    }
    let (mut token, mut listed) = (String::new(), Vec::new());
    loop {
        let page = Page::new(10, &token, &"nodes").unwrap();
        let (nodes, next, total, _) = server.cluster.nodes(&NodeFilter::default(), &page).await.unwrap();
        assert_eq!(total, 25);
        listed.extend(nodes.iter().map(|(record, _)| record.id.to_string()));
        if next.is_empty() {
            break;
        }
        token = next;
    }
    assert_eq!(listed, (0..25).map(|n| format!("n{n:02}")).collect::<Vec<_>>());
}
