//! Being known to the control plane, losing it, and finding it again.

use std::time::Duration;

use hv_driver_fake::LedgerEvent;
use hv_proto::v1::InstanceState;

use crate::control::{Control, assignment};
use crate::node::{Node, eventually};

#[tokio::test]
async fn a_node_says_what_it_has() {
    let control = Control::start().await;
    let node = Node::started(&control).await;
    let request = eventually("it registers", || control.state.lock().registrations.first().cloned()).await;
    assert_eq!(request.node_id, node.agent().node_id.as_str());
    assert_eq!((request.ip.as_str(), request.port), ("127.0.0.1", i32::from(node.agent().grpc.port())));
    let capacity = request.capacity.unwrap();
    assert!(capacity.cpu_cores > 0 && capacity.memory_bytes > 0 && capacity.disk_bytes > 0);
    assert_eq!(request.supported_instance_types, ["vm"]);
    assert_eq!((request.drivers[0].name.as_str(), request.drivers[0].healthy), ("fake", true));
    assert_eq!(request.images[0].name, "tiny");
    assert_eq!(
        (request.conditions[0].r#type.as_str(), request.conditions[0].status.as_str()),
        ("DriverFake", "True")
    );
    assert_eq!(request.metadata.unwrap().labels["disk"], "ssd");
    let heartbeat = eventually("heartbeats", || control.state.lock().heartbeats.first().cloned()).await;
    assert_eq!(heartbeat.cluster_id, "cluster-1");
    assert!(heartbeat.usage.unwrap().memory_used_bytes > 0);
    assert!(!heartbeat.inventory_changed);
    assert!(node.agent().health.is_ready());
}

#[tokio::test]
async fn a_node_keeps_its_id_and_tells_tools_where_it_is() {
    let control = Control::start().await;
    let mut node = Node::started(&control).await;
    let id = node.agent().node_id.clone();
    node.stop().await;
    node.start().await;
    assert_eq!(node.agent().node_id, id);
    let text = std::fs::read(node.state_dir().join(hypervisor_agent::READY_FILE)).unwrap();
    let ready: hypervisor_agent::ReadyFile = serde_json::from_slice(&text).unwrap();
    assert_eq!((ready.node_id.as_str(), ready.grpc), (id.as_str(), node.agent().grpc.to_string()));
    assert_eq!((ready.pid, ready.http), (std::process::id(), node.agent().http.to_string()));

    node.stop().await;
    node.config.agent.node_id = Some("another".into());
    let refusal = node.try_start().await.unwrap_err().to_string();
    assert!(refusal.contains("belongs to node") && refusal.contains("another"), "{refusal}");
}

#[tokio::test]
async fn a_node_that_is_not_known_any_more_registers_again() {
    let control = Control::start().await;
    let _node = Node::started(&control).await;
    eventually("it registers", || (control.state.lock().registrations.len() == 1).then_some(())).await;
    control.state.lock().forget_node = true;
    eventually("it registers again", || (control.state.lock().registrations.len() == 2).then_some(())).await;
    assert_eq!(control.state.lock().registrations[1].cluster_id, "cluster-1");
}

#[tokio::test]
async fn a_server_that_comes_back_finds_everything_as_it_is() {
    let mut control = Control::start().await;
    let node = Node::started(&control).await;
    control.assign(assignment("a"));
    control.settled("a", InstanceState::Running).await;
    control.down();
    eventually("it is seen", || (!node.agent().health.is_ready()).then_some(())).await;
    control.state.lock().assignments.insert("b".into(), assignment("b"));
    control.state.lock().reports.clear();
    control.up().await;
    control.settled("a", InstanceState::Running).await;
    control.settled("b", InstanceState::Running).await;
    eventually("it is ready", || node.agent().health.is_ready().then_some(())).await;
    assert_eq!(node.count("a", LedgerEvent::Started), 1);
}

#[tokio::test]
async fn an_agent_starts_without_a_server() {
    let mut control = Control::start().await;
    control.down();
    let node = Node::started(&control).await;
    let failing = eventually("it says why", || {
        let failing = node.agent().health.failing();
        failing.first().filter(|failing| failing.reason != "starting").cloned()
    })
    .await;
    assert!(failing.reason.contains("cannot reach hypervisor-server"), "{}", failing.reason);
    assert!(failing.reason.contains("--server-addr"), "{}", failing.reason);
    control.up().await;
    eventually("it registers", || (!control.state.lock().registrations.is_empty()).then_some(())).await;
}

#[tokio::test]
async fn nothing_is_taken_from_a_foreign_cluster() {
    let mut control = Control::start().await;
    let mut node = Node::started(&control).await;
    control.assign(assignment("a"));
    control.settled("a", InstanceState::Running).await;
    node.stop().await;
    control.down();
    {
        let mut state = control.state.lock();
        state.cluster_id = "cluster-2".into();
        state.assignments.clear();
        state.assignments.insert("b".into(), assignment("b"));
    }
    control.up().await;
    control.state.lock().reports.clear();
    node.start().await;
    let failing = eventually("it says why", || {
        let failing = node.agent().health.failing();
        failing.first().filter(|failing| failing.reason != "starting").cloned()
    })
    .await;
    assert!(failing.reason.contains("belongs to cluster cluster-1"), "{}", failing.reason);
    assert!(failing.reason.contains("Nothing on the node is touched"), "{}", failing.reason);
    let list = node.client().list_instances(pbjson_types::Empty {}).await.unwrap().into_inner();
    assert_eq!(list.instances.len(), 1);
    assert_eq!((node.count("a", LedgerEvent::Ended), node.count("b", LedgerEvent::Created)), (0, 0));
    assert!(control.state.lock().reports.is_empty());
}

#[tokio::test]
async fn a_driver_whose_health_turns_is_told_at_once() {
    let control = Control::start().await;
    let mut node = Node::new(&control);
    // By themselves neither a look at the node nor a heartbeat would come within the test's patience.
    node.tuning.inventory_every = Duration::from_mins(10);
    {
        let mut state = control.state.lock();
        (state.lease_ttl_ms, state.heartbeat_ms) = (1_200_000, 600_000);
    }
    node.start().await;
    eventually("it registers", || (!control.state.lock().registrations.is_empty()).then_some(())).await;
    for healthy in [false, true, false] {
        node.driver().set_healthy(healthy);
        eventually("the control plane knows", || {
            let state = control.state.lock();
            let told = state.heartbeats.last()?;
            let driver = told.drivers.first()?;
            let condition = told.conditions.iter().find(|condition| condition.r#type == "DriverFake")?;
            let is_told = driver.healthy == healthy
                && condition.status == if healthy { "True" } else { "False" }
                && condition.message == driver.message;
            is_told.then_some(())
        })
        .await;
    }
}
