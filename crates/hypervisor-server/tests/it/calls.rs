//! Claims about each call.

use hv_proto::v1;
use tonic::Code;

use crate::world::{VM, node, until, wish, world};

fn labels(count: u32) -> Option<v1::Metadata> {
    let labels = (0..count).map(|n| (format!("k{n}"), "v".to_owned())).collect();
    Some(v1::Metadata { labels, ..v1::Metadata::default() })
}

#[tokio::test(flavor = "multi_thread")]
async fn an_instance_lives_through_every_call_of_the_compute_service() {
    let world = world().await;
    world.add_node(node("n1", 4)).await;
    let running = world.running("web").await;
    let (id, mut compute) = (running.id.clone(), world.compute());
    assert_eq!(
        (running.state(), running.wanted()),
        (v1::InstanceState::Running, v1::InstanceWanted::Running)
    );
    assert_eq!((running.node_id.as_str(), running.epoch), ("n1", 1));

    let request = v1::PauseInstanceRequest { instance_id: id.clone(), ..Default::default() };
    let pausing = compute.pause_instance(request).await.unwrap().into_inner();
    world.report(&pausing, v1::InstanceState::Paused, false).await;
    assert_eq!(world.get(&id).await.state(), v1::InstanceState::Paused);
    let start = v1::StartInstanceRequest { instance_id: id.clone(), ..Default::default() };
    let refusal = compute.start_instance(start.clone()).await.unwrap_err();
    assert_eq!(refusal.code(), Code::FailedPrecondition);
    let text = "instance web cannot be asked to start: it is paused; resume it instead (it is PAUSED)";
    assert_eq!(refusal.message(), text);
    let request = v1::ResumeInstanceRequest { instance_id: id.clone(), ..Default::default() };
    let resuming = compute.resume_instance(request).await.unwrap().into_inner();
    world.report(&resuming, v1::InstanceState::Running, false).await;

    let request = v1::RestartInstanceRequest { instance_id: id.clone(), ..Default::default() };
    let restarting = compute.restart_instance(request).await.unwrap().into_inner();
    world.report(&restarting, v1::InstanceState::Running, false).await;
    let mut request =
        v1::StopInstanceRequest { instance_id: id.clone(), timeout_seconds: 3601, ..Default::default() };
    let refusal = compute.stop_instance(request.clone()).await.unwrap_err();
    assert_eq!(refusal.message(), "timeout_seconds must be between 0 and 3600; got \"3601\"");
    request.timeout_seconds = 1;
    let stopping = compute.stop_instance(request).await.unwrap().into_inner();
    assert_eq!(stopping.state(), v1::InstanceState::Stopping);
    world.report(&stopping, v1::InstanceState::Stopped, false).await;
    let starting = compute.start_instance(start).await.unwrap().into_inner();
    assert_eq!(starting.state(), v1::InstanceState::Starting);
    world.report(&starting, v1::InstanceState::Running, false).await;

    let update = v1::UpdateInstanceMetadataRequest {
        instance_id: id.clone(),
        metadata: labels(2),
        ..Default::default()
    };
    let updated = compute.update_instance_metadata(update.clone()).await.unwrap().into_inner();
    assert_eq!(
        updated.revision,
        world.get(&id).await.revision,
        "the answer's revision is that of the change"
    );
    let stale = v1::UpdateInstanceMetadataRequest { if_revision: 1, metadata: labels(1), ..update };
    assert_eq!(compute.update_instance_metadata(stale).await.unwrap_err().code(), Code::Aborted);

    // Nobody answers at the node's address.
    let request = v1::GetInstanceStatsRequest { instance_id: id.clone() };
    assert_eq!(compute.get_instance_stats(request).await.unwrap_err().code(), Code::Unavailable);
    let request = v1::AttachConsoleRequest { instance_id: id.clone(), ..Default::default() };
    assert_eq!(compute.attach_console(request).await.unwrap_err().code(), Code::Unavailable);
    let request = v1::GetInstanceLogsRequest { instance_id: id.clone(), ..Default::default() };
    assert_eq!(compute.get_instance_logs(request).await.unwrap_err().code(), Code::Unavailable);
    let nothing = || futures::stream::empty();
    assert_eq!(compute.console(nothing()).await.unwrap_err().code(), Code::InvalidArgument);
    assert_eq!(compute.exec(futures::stream::empty()).await.unwrap_err().code(), Code::InvalidArgument);
    let request = v1::PullImageRequest { image_ref: "x".into(), r#type: VM, ..Default::default() };
    assert_eq!(compute.pull_image(request).await.unwrap_err().code(), Code::InvalidArgument);
    // The node of this test fetches nothing.
    let request = v1::PullImageRequest { image_ref: "oci://r/x".into(), r#type: VM, ..Default::default() };
    assert_eq!(compute.pull_image(request).await.unwrap_err().code(), Code::FailedPrecondition);
    let request = v1::GetImageRequest { name: "absent".into() };
    assert_eq!(compute.get_image(request).await.unwrap_err().code(), Code::NotFound);
    let request = v1::DeleteImageRequest { node_ids: vec!["absent".into()], ..Default::default() };
    assert_eq!(compute.delete_image(request).await.unwrap_err().code(), Code::NotFound);

    let delete = v1::DeleteInstanceRequest { instance_id: id.clone(), ..Default::default() };
    compute.delete_instance(delete.clone()).await.unwrap();
    compute.delete_instance(delete).await.unwrap();
    let leaving = world.get(&id).await;
    assert_eq!(leaving.state(), v1::InstanceState::Deleting);
    world.report(&leaving, v1::InstanceState::Deleting, true).await;
    let request = v1::GetInstanceRequest { instance_id: id };
    assert_eq!(compute.get_instance(request).await.unwrap_err().code(), Code::NotFound);
}

#[tokio::test(flavor = "multi_thread")]
async fn nodes_and_events_are_served() {
    let world = world().await;
    let cluster_id = world.add_node(node("n1", 4)).await;
    let mut cluster = world.cluster();
    let named = || "n1".to_owned();
    let request =
        v1::HeartbeatRequest { node_id: named(), cluster_id: cluster_id.clone(), ..Default::default() };
    assert!(cluster.heartbeat(request).await.unwrap().into_inner().accepted);
    let request = v1::HeartbeatRequest { node_id: "n9".into(), ..Default::default() };
    assert!(!cluster.heartbeat(request).await.unwrap().into_inner().accepted);

    let cordoned =
        cluster.cordon_node(v1::CordonNodeRequest { node_id: named(), ..Default::default() }).await.unwrap();
    assert_eq!(cordoned.into_inner().status(), v1::NodeStatus::Maintenance);
    let open = cluster
        .uncordon_node(v1::UncordonNodeRequest { node_id: named(), ..Default::default() })
        .await
        .unwrap();
    assert_eq!(open.into_inner().status(), v1::NodeStatus::Ready);
    let instance = world.running("web").await;
    let drained =
        cluster.drain_node(v1::DrainNodeRequest { node_id: named(), ..Default::default() }).await.unwrap();
    let drained = drained.into_inner();
    assert_eq!(drained.node.unwrap().status(), v1::NodeStatus::Draining);
    assert_eq!(
        (drained.moving_instance_ids.len(), drained.blockers[0].instance_id.as_str()),
        (0, &*instance.id)
    );
    let request = v1::UpdateNodeStatusRequest { node_id: named(), status: 1, ..Default::default() };
    assert_eq!(
        cluster.update_node_status(request).await.unwrap().into_inner().status(),
        v1::NodeStatus::Ready
    );

    let shown = cluster.get_node(v1::GetNodeRequest { node_id: named() }).await.unwrap().into_inner();
    assert_eq!((shown.instance_count, shown.allocated.unwrap().cpu_cores, shown.images.len()), (1, 1, 4));
    let listed = cluster.list_nodes(v1::ListNodesRequest { status: 1, ..Default::default() }).await.unwrap();
    assert_eq!(listed.into_inner().total_count, 1);
    let info = world.info().await;
    assert_eq!((info.total_nodes, info.ready_nodes, info.running_instances), (1, 1, 1));
    assert_eq!((info.store_backend.as_str(), info.leader.is_empty()), ("embedded", false));

    let request = v1::DeregisterNodeRequest { node_id: named(), ..Default::default() };
    assert_eq!(cluster.deregister_node(request).await.unwrap_err().code(), Code::FailedPrecondition);
    let events = until("the events to be written", async || {
        let request = v1::ListEventsRequest { object_kind: "node".into(), ..Default::default() };
        let events = world.cluster().list_events(request).await.unwrap().into_inner().events;
        (events.len() >= 5).then_some(events)
    })
    .await;
    let reasons: Vec<_> = events.iter().rev().map(|event| event.reason.as_str()).collect();
    assert_eq!(reasons, ["NodeReady", "NodeCordoned", "NodeUncordoned", "NodeDraining", "NodeUncordoned"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_key_is_known_again_however_the_request_is_encoded() {
    let world = world().await;
    world.add_node(node("n1", 4)).await;
    let request = v1::CreateInstanceRequest { request_key: "k".into(), metadata: labels(30), ..wish("web") };
    let mut calls = tokio::task::JoinSet::new();
    for _ in 0..100 {
        // Each is encoded with its labels in another order.
        let copy = v1::CreateInstanceRequest { metadata: labels(30), ..request.clone() };
        let mut compute = world.compute();
        calls.spawn(async move { compute.create_instance(copy).await });
    }
    let answers: Vec<_> =
        calls.join_all().await.into_iter().map(|answer| answer.unwrap().into_inner()).collect();
    assert!(answers.iter().all(|answer| *answer == answers[0]), "all get the same answer");
    let listed =
        world.compute().list_instances(v1::ListInstancesRequest::default()).await.unwrap().into_inner();
    assert_eq!(listed.total_count, 1);
    let other = v1::CreateInstanceRequest { name: "db".into(), ..request };
    assert_eq!(world.compute().create_instance(other).await.unwrap_err().code(), Code::FailedPrecondition);
}

#[tokio::test(flavor = "multi_thread")]
async fn assignments_are_told_whole_and_then_as_they_change() {
    let world = world().await;
    let cluster_id = world.add_node(node("n1", 40)).await;
    let mut many = Vec::new();
    for n in 0..20 {
        let mut request = wish(&format!("i{n}"));
        request.spec.as_mut().unwrap().user_data = "#".repeat(250 << 10);
        many.push(world.compute().create_instance(request).await.unwrap().into_inner().id);
    }
    for id in &many {
        world.bound(id).await;
    }
    let request = v1::WatchAssignmentsRequest { node_id: "n1".into(), cluster_id };
    let mut stream = world.assignment().watch_assignments(request).await.unwrap().into_inner();
    let mut told = Vec::new();
    loop {
        let update = stream.message().await.unwrap().unwrap();
        told.extend(update.assignments.into_iter().map(|assignment| assignment.instance_id));
        if update.complete {
            break;
        }
    }
    told.sort();
    many.sort();
    assert_eq!(told, many, "5 MB of assignments come in pieces");
    // They do not fit into one page either.
    let (mut token, mut listed) = (String::new(), Vec::new());
    loop {
        let request = v1::ListInstancesRequest { page_size: 1000, page_token: token, ..Default::default() };
        let page = world.compute().list_instances(request).await.unwrap().into_inner();
        listed.extend(page.instances.into_iter().map(|instance| instance.id));
        token = page.next_page_token;
        if token.is_empty() {
            break;
        }
    }
    assert_eq!(listed, many);

    let gone = world.get(&many[0]).await;
    let request = v1::DeleteInstanceRequest { instance_id: gone.id.clone(), ..Default::default() };
    world.compute().delete_instance(request).await.unwrap();
    let update = stream.message().await.unwrap().unwrap();
    assert_eq!(update.assignments[0].wanted(), v1::InstanceWanted::Deleted);
    world.report(&world.get(&gone.id).await, v1::InstanceState::Deleting, true).await;
    assert_eq!(stream.message().await.unwrap().unwrap().released_instance_ids, [gone.id]);
}

#[tokio::test(flavor = "multi_thread")]
async fn open_streams_do_not_hold_the_server_up_when_it_stops() {
    let mut world = world().await;
    let mut stream =
        world.compute().watch_instances(v1::WatchInstancesRequest::default()).await.unwrap().into_inner();
    assert_eq!(stream.message().await.unwrap().unwrap().r#type(), v1::EventType::Bookmark);
    world.shutdown.trigger();
    assert_eq!(stream.message().await.unwrap_err().code(), Code::Unavailable);
    drop(stream);
    world.shutdown.wait(std::time::Duration::from_secs(5)).await.unwrap();
    world.server.take().unwrap().close().await;
}
