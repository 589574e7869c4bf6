//! The store's upkeep as operators do it: through a server that runs.

use hv_proto::v1;
use tonic::Code;

use crate::world::{World, node, until, wish, world};

async fn bytes_of(mut stream: tonic::Streaming<v1::StoreChunk>) -> Vec<u8> {
    let mut bytes = Vec::new();
    while let Some(chunk) = stream.message().await.unwrap() {
        bytes.extend_from_slice(&chunk.data);
    }
    bytes
}

async fn backup(world: &World) -> Vec<u8> {
    let mut store = world.clients.store();
    bytes_of(store.backup_store(v1::BackupStoreRequest {}).await.unwrap().into_inner()).await
}

async fn restore(world: &World, file: &[u8]) -> Result<v1::RestoreStoreResponse, tonic::Status> {
    let chunks: Vec<_> =
        file.chunks(1000).map(|part| v1::StoreChunk { data: part.to_vec().into() }).collect();
    let answer = world.clients.store().restore_store(futures::stream::iter(chunks)).await;
    answer.map(tonic::Response::into_inner)
}

async fn freeze(world: &World, frozen: bool) -> v1::StoreStatus {
    world.clients.store().freeze_store(v1::FreezeStoreRequest { frozen }).await.unwrap().into_inner()
}

#[tokio::test]
async fn a_backup_moves_a_cluster_with_its_identity_to_another_server() {
    let old = world().await;
    let id = old.add_node(node("n1", 8)).await;
    let made = old.running("web").await;
    let file = backup(&old).await;

    let new = world().await;
    assert_ne!(new.info().await.cluster_id, id);
    let answer = restore(&new, &file).await.unwrap();
    assert!(answer.records >= 4, "{answer:?}");
    assert_eq!(new.info().await.cluster_id, id);
    let moved = new.get(&made.id).await;
    assert_eq!((moved.name.as_str(), moved.node_id.as_str(), moved.epoch), ("web", "n1", made.epoch));
    // Its node does not answer here yet, and is let in when it does: it belongs to this cluster.
    assert_eq!(moved.state(), v1::InstanceState::Unknown);
    let mut registration = node("n1", 8);
    registration.cluster_id = id;
    new.add_node(registration).await;
    assert_eq!(new.get(&made.id).await.state(), v1::InstanceState::Running);
    // The name is taken here too.
    let taken = new.compute().create_instance(wish("web")).await.unwrap_err();
    assert_eq!(taken.code(), Code::AlreadyExists);
}

#[tokio::test]
async fn what_is_no_whole_backup_or_comes_to_a_server_with_records_changes_nothing() {
    let world = world().await;
    let mut file = backup(&world).await;
    world.add_node(node("n1", 8)).await;
    let before = world.settled_revision().await;
    let refused = restore(&world, &file).await.unwrap_err();
    assert_eq!(refused.code(), Code::FailedPrecondition, "{refused:?}");
    assert!(refused.message().contains("nodes/n1"), "{refused:?}");
    file.truncate(file.len() - 1);
    assert_eq!(restore(&world, &file).await.unwrap_err().code(), Code::InvalidArgument);
    assert_eq!(restore(&world, &vec![7; 1 << 20]).await.unwrap_err().code(), Code::InvalidArgument);
    assert_eq!(restore(&world, b"").await.unwrap_err().code(), Code::InvalidArgument);
    assert_eq!(world.settled_revision().await, before);
}

#[tokio::test]
async fn a_frozen_store_refuses_users_and_leaders_and_takes_signs_of_life() {
    let world = world().await;
    let cluster_id = world.add_node(node("n1", 8)).await;
    let made = world.running("web").await;
    assert!(freeze(&world, true).await.is_frozen);
    let frozen_at = world.settled_revision().await;

    let refused = world.compute().create_instance(wish("db")).await.unwrap_err();
    assert_eq!(refused.code(), Code::FailedPrecondition);
    assert!(refused.message().contains("unfreeze"), "{refused:?}");
    let request = v1::StopInstanceRequest { instance_id: made.id.clone(), ..Default::default() };
    assert_eq!(world.compute().stop_instance(request).await.unwrap_err().code(), Code::FailedPrecondition);
    let request = v1::CordonNodeRequest { node_id: "n1".into(), ..Default::default() };
    assert_eq!(world.cluster().cordon_node(request).await.unwrap_err().code(), Code::FailedPrecondition);
    let verdict = world.report(&made, v1::InstanceState::Failed, false).await;
    assert_eq!(verdict, v1::ReportVerdict::Retry);
    let heartbeat = v1::HeartbeatRequest { node_id: "n1".into(), cluster_id, ..Default::default() };
    assert!(world.cluster().heartbeat(heartbeat).await.unwrap().into_inner().accepted);
    assert_eq!(world.settled_revision().await, frozen_at);

    assert!(!freeze(&world, false).await.is_frozen);
    let made = world.create("db").await;
    world.bound(&made.id).await;
}

#[tokio::test]
async fn the_status_counts_and_a_compaction_and_a_dump_run_through() {
    let world = world().await;
    world.add_node(node("n1", 8)).await;
    world.running("web").await;
    let status = world.clients.store().get_store_status(v1::GetStoreStatusRequest {}).await;
    let status = status.unwrap().into_inner();
    assert_eq!((status.records["nodes"], status.records["instances"]), (1, 1));
    assert_eq!(status.backend, "embedded");
    assert!(status.size_bytes > 0 && !status.is_full && !status.is_frozen, "{status:?}");

    let request = v1::CompactStoreRequest { defragment: true };
    let mut steps = world.clients.store().compact_store(request).await.unwrap().into_inner();
    let mut seen = 0;
    while steps.message().await.unwrap().is_some() {
        seen += 1;
    }
    assert!(seen >= 2, "{seen}");

    let request = v1::DumpStoreRequest { key_prefix: "instances/".into() };
    let dump = bytes_of(world.clients.store().dump_store(request).await.unwrap().into_inner()).await;
    let text = String::from_utf8(dump).unwrap();
    assert_eq!(text.lines().count(), 1);
    assert!(text.contains("\"name\":\"web\""), "{text}");
    let request = v1::DumpStoreRequest { key_prefix: "/etc".into() };
    assert_eq!(world.clients.store().dump_store(request).await.unwrap_err().code(), Code::InvalidArgument);
    until("the server to be well", async || {
        let info = world.info().await;
        (info.total_instances == 1).then_some(())
    })
    .await;
}
