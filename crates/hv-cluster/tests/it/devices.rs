//! Claims about what only one instance can have of its node: it is promised once, whatever becomes of node and server.

use std::time::Duration;

use hv_cluster::ClusterConfig;
use hv_cluster::nodes::Sign;
use hv_proto::v1;
use hv_types::device::{Kind, Model};
use hv_types::instance::{FailoverPolicy, Request};
use hv_types::{DeviceNeeds, InstanceId, InstanceRecord, InstanceState, InstanceType, NodeId};

use crate::world::{Server, asked, config, disk, gone, node, until};

const CARD: Model = Model { vendor: 0x10de, device: 0x2204 };

/// A node with one card that is known to stop its instances when it is cut off.
fn with_card(id: &str) -> v1::RegisterNodeRequest {
    let card = v1::NodePciDevice {
        address: "0000:65:00.0".into(),
        model: CARD.to_string(),
        ..v1::NodePciDevice::default()
    };
    v1::RegisterNodeRequest {
        fencing: Some(v1::FencingStatus { armed: true, message: "a fencer".into() }),
        devices: Some(v1::NodeDevices { pci: vec![card], ..v1::NodeDevices::default() }),
        ..node(id, 8)
    }
}

/// A machine that may run elsewhere and needs a card.
fn needs_card(name: &str) -> InstanceRecord {
    let mut record = InstanceRecord {
        instance_type: InstanceType::Vm,
        failover_policy: FailoverPolicy::Restart,
        ..asked(name)
    };
    std::sync::Arc::make_mut(&mut record.spec).devices =
        DeviceNeeds { pci: [(CARD, 1)].into(), ..DeviceNeeds::default() };
    record
}

fn promised(server: &Server, node: &NodeId) -> u64 {
    let of =
        |state: &hv_cluster::cache::State| state.node(node).map(|entry| entry.devices.of(Kind::Pci(CARD)));
    server.cluster.cache().read(of).unwrap_or(0)
}

async fn waits(server: &Server, id: &InstanceId) {
    until("it to wait for a card", async || {
        server.get(id).await.state_reason.contains("PCI device 10de:2204").then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_card_is_promised_once_and_free_when_its_node_says_that_it_is_gone() {
    let disk = disk();
    let server = Server::start(&disk.store, config("a")).await;
    let plain = server.add_node(node("plain", 8)).await;
    let n1 = server.add_node(with_card("n1")).await;
    let (first, bound) = server.running(needs_card("first")).await;
    assert_eq!((&bound, promised(&server, &n1), promised(&server, &plain)), (&n1, 1, 0));
    let second = needs_card("second");
    let id = second.id.clone();
    server.create(second).await.unwrap();
    waits(&server, &id).await;
    // A server that begins with this store knows it too.
    server.stop().await;
    let server = Server::start(&disk.store, config("b")).await;
    until("it to know of the card", async || (promised(&server, &n1) == 1).then_some(())).await;
    server.change(&first, Request::Delete).await.unwrap();
    assert_eq!(promised(&server, &n1), 1, "its node has not given it back");
    let record = server.get(&first).await;
    server.report_one(&n1, gone(&record)).await;
    assert_eq!(server.bound(&id).await, n1);
    assert_eq!(promised(&server, &n1), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_started_elsewhere_has_the_card_of_that_node_alone() {
    let disk = disk();
    let quick = ClusterConfig {
        heartbeat_timeout: Duration::from_secs(1),
        failover_grace: Duration::from_millis(400),
        ..config("a")
    };
    let server = Server::start(&disk.store, quick).await;
    // Without heartbeats it is lost after a second.
    let n1 = server.add_node(with_card("n1")).await;
    let (id, bound) = server.running(needs_card("web")).await;
    assert_eq!(bound, n1);
    let n2 = server.add_node(with_card("n2")).await;
    let beats = {
        let (cluster, n2) = (server.cluster.clone(), n2.clone());
        tokio::spawn(async move {
            loop {
                let _ = cluster.heartbeat(None, &n2, Sign::default()).await;
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        })
    };
    until("it to be bound elsewhere", async || (server.bound(&id).await == n2).then_some(())).await;
    assert_eq!((promised(&server, &n1), promised(&server, &n2)), (0, 1));
    let other = needs_card("other");
    let other_id = other.id.clone();
    server.create(other).await.unwrap();
    until("the other to wait", async || {
        let record = server.get(&other_id).await;
        (record.state == InstanceState::Pending && !record.state_reason.is_empty()).then_some(())
    })
    .await;
    server.add_node(with_card("n1")).await;
    assert_eq!(server.bound(&other_id).await, n1);
    assert_eq!((promised(&server, &n1), promised(&server, &n2)), (1, 1));
    beats.abort();
}
