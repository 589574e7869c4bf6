//! Claims about explanations and previews.

use hv_proto::{convert, v1};
use hv_types::instance::Request;
use hv_types::{InstanceId, NodeId};

use crate::world::{Server, asked, code, config, disk, node, until, wish};

#[tokio::test(flavor = "multi_thread")]
async fn a_waiting_instance_is_explained_by_rules_and_remedies_on_any_server() {
    let disk = disk();
    let leader = Server::start(&disk.store, config("a")).await;
    until("a leader", async || leader.leads().then_some(())).await;
    let follower = Server::start(&disk.store, config("b")).await;
    leader.add_node(node("n1", 2)).await;
    leader.add_node(v1::RegisterNodeRequest { zone: "west".into(), ..node("n2", 8) }).await;
    let mut big = asked("big");
    std::sync::Arc::make_mut(&mut big.spec).cpu_cores = 4;
    std::sync::Arc::make_mut(&mut big.placement).zone = "east".into();
    leader.create(big.clone()).await.unwrap();
    for server in [&leader, &follower] {
        let why = server.cluster.explain_instance(&big.id).await.unwrap();
        assert_eq!((why.total_nodes, why.fitting_nodes, why.node_id.as_str()), (2, 0, ""));
        assert_eq!(why.rejections.iter().map(|rejection| rejection.nodes).sum::<u32>(), 2);
        assert_eq!(why.rejections[0].rule, "Zone");
        assert!(why.rejections[0].examples.contains(&"host-n1".to_owned()));
        assert!(!why.remedies.is_empty());
    }
    // What changes is seen by a fleet that is kept.
    follower.add_node(v1::RegisterNodeRequest { zone: "east".into(), ..node("n3", 8) }).await;
    assert_eq!(leader.bound(&big.id).await.as_str(), "n3");
    for server in [&leader, &follower] {
        let why = server.cluster.explain_instance(&big.id).await.unwrap();
        assert_eq!((why.node_id.as_str(), why.hostname.as_str(), why.fitting_nodes), ("n3", "host-n3", 1));
        assert!(why.summary.contains("as things are now"), "{}", why.summary);
        assert!(why.summary.contains("it would be chosen again"), "{}", why.summary);
    }
    let nobody: InstanceId = "nobody".parse().unwrap();
    assert_eq!(code(leader.cluster.explain_instance(&nobody).await), hv_types::ErrorCode::NotFound);
    leader.change(&big.id, Request::Stop).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_preview_places_as_far_as_there_is_room_and_records_nothing() {
    let disk = disk();
    let server = Server::idle(&disk.store, config("a")).await;
    for id in ["n1", "n2", "n3"] {
        server.add_node(node(id, 4)).await;
    }
    let template = || convert::create_request_from(wish("preview")).unwrap();
    for _ in 0..3 {
        let preview = server.cluster.preview_placement(template(), 15).await.unwrap();
        assert_eq!(preview.unplaced, 3);
        let counts: Vec<_> = preview.nodes.iter().map(|n| (n.hostname.as_str(), n.count)).collect();
        assert_eq!(counts, [("host-n1", 4), ("host-n2", 4), ("host-n3", 4)]);
        let why = preview.explanation.unwrap();
        assert!(why.summary.starts_with("none of 3 nodes can take it"), "{}", why.summary);
    }
    let one = server.cluster.preview_placement(template(), 1).await.unwrap();
    assert_eq!((one.unplaced, one.nodes.len()), (0, 1));
    assert_eq!(one.explanation.unwrap().node_id, one.nodes[0].node_id);
    let none: Vec<NodeId> = Vec::new();
    let there = server.cluster.cache().read(|state| {
        state.instances_after(None).filter_map(|record| record.node_id().cloned()).collect::<Vec<_>>()
    });
    assert_eq!(there, none);
    assert_eq!(
        code(server.cluster.preview_placement(template(), 1001).await),
        hv_types::ErrorCode::InvalidArgument
    );
}
