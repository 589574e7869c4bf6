//! Snapshots through the agent's own service: one thing at a time, for the right binding.

use hv_driver_fake::LedgerEvent;
use hv_proto::v1;
use hv_proto::v1::{InstanceState, InstanceWanted};
use tonic::Code;

use crate::control::{Control, assignment, scripted};
use crate::node::Node;

fn named(name: &str, memory: bool) -> v1::AgentSnapshotRequest {
    v1::AgentSnapshotRequest { instance_id: "a".into(), epoch: 1, name: name.into(), memory }
}

async fn names(node: &Node) -> Vec<String> {
    let request = v1::AgentInstanceRequest { instance_id: "a".into() };
    let listed = node.client().list_snapshots(request).await.unwrap().into_inner();
    listed.snapshots.into_iter().map(|snapshot| snapshot.name).collect()
}

#[tokio::test]
async fn a_snapshot_is_made_once_however_often_it_is_asked_for() {
    let control = Control::start().await;
    let node = Node::started(&control).await;
    control.assign(assignment("a"));
    control.settled("a", InstanceState::Running).await;
    let first = node.client().create_snapshot(named("one", false)).await.unwrap().into_inner();
    let second = node.client().create_snapshot(named("one", false)).await.unwrap().into_inner();
    assert_eq!(first, second);
    node.client().create_snapshot(named("two", true)).await.unwrap();
    assert_eq!(names(&node).await, ["one", "two"]);
    for _ in 0..2 {
        node.client().delete_snapshot(named("one", false)).await.unwrap();
    }
    assert_eq!(names(&node).await, ["two"]);
}

#[tokio::test]
async fn what_is_to_run_runs_after_a_return_to_disks_alone() {
    let control = Control::start().await;
    let node = Node::started(&control).await;
    control.assign(assignment("a"));
    control.settled("a", InstanceState::Running).await;
    node.client().create_snapshot(named("one", false)).await.unwrap();
    node.client().revert_instance(named("one", false)).await.unwrap();
    crate::node::eventually("it was started again", || {
        (node.count("a", LedgerEvent::Started) == 2).then_some(())
    })
    .await;
    control.settled("a", InstanceState::Running).await;
    control.want("a", InstanceWanted::Stopped);
    control.settled("a", InstanceState::Stopped).await;
    node.client().revert_instance(named("one", false)).await.unwrap();
    control.settled("a", InstanceState::Stopped).await;
    assert_eq!(node.count("a", LedgerEvent::Started), 2);
}

#[tokio::test]
async fn memory_is_not_returned_to_where_nothing_is_to_run() {
    let control = Control::start().await;
    let node = Node::started(&control).await;
    control.assign(assignment("a"));
    control.settled("a", InstanceState::Running).await;
    node.client().create_snapshot(named("warm", true)).await.unwrap();
    node.client().revert_instance(named("warm", true)).await.unwrap();
    assert_eq!(node.count("a", LedgerEvent::Started), 1, "it runs on from its memory");
    control.want("a", InstanceWanted::Stopped);
    control.settled("a", InstanceState::Stopped).await;
    let refused = node.client().revert_instance(named("warm", true)).await.unwrap_err();
    assert_eq!(refused.code(), Code::FailedPrecondition, "{refused}");
    let refused = node.client().revert_instance(named("never", true)).await.unwrap_err();
    assert_eq!(refused.code(), Code::NotFound, "{refused}");
}

#[tokio::test]
async fn another_binding_than_the_caller_knows_is_not_touched() {
    let control = Control::start().await;
    let node = Node::started(&control).await;
    control.assign(assignment("a"));
    control.settled("a", InstanceState::Running).await;
    let stale = v1::AgentSnapshotRequest { epoch: 7, ..named("one", false) };
    let refused = node.client().create_snapshot(stale).await.unwrap_err();
    assert_eq!(refused.code(), Code::Aborted, "{refused}");
    assert!(names(&node).await.is_empty());
}

#[tokio::test]
async fn a_snapshot_waits_for_the_step_that_is_under_way() {
    let control = Control::start().await;
    let node = Node::started(&control).await;
    control.assign(scripted("a", &[("delay-stop", "300ms")]));
    control.settled("a", InstanceState::Running).await;
    control.want("a", InstanceWanted::Stopped);
    crate::node::eventually("it is being stopped", || {
        control.last("a").filter(|report| report.state() == InstanceState::Stopping)
    })
    .await;
    let made = node.client().create_snapshot(named("one", true)).await.unwrap().into_inner();
    assert!(!made.memory, "it was taken while the driver was stopping it");
}

/// An instance that is to be made from a snapshot of `a`.
fn clone_of_a(id: &str, snapshot: &str, script: &[(&str, &str)]) -> v1::Assignment {
    let origin = v1::CloneOrigin { instance_id: "a".into(), snapshot: snapshot.into() };
    let made = scripted(id, script);
    let spec = v1::InstanceSpec { clone_of: Some(origin), ..made.spec.clone().unwrap_or_default() };
    v1::Assignment { spec: Some(spec), ..made }
}

#[tokio::test]
async fn a_clone_is_made_from_the_snapshot_and_does_not_need_its_source() {
    let control = Control::start().await;
    let node = Node::started(&control).await;
    control.assign(assignment("a"));
    control.settled("a", InstanceState::Running).await;
    node.client().create_snapshot(named("warm", true)).await.unwrap();
    control.assign(clone_of_a("b", "warm", &[("fail-clone", "2")]));
    control.assign(clone_of_a("c", "warm", &[]));
    for id in ["b", "c"] {
        control.settled(id, InstanceState::Running).await;
        assert_eq!((node.count(id, LedgerEvent::Created), node.count(id, LedgerEvent::Started)), (1, 1));
    }
    control.want("a", InstanceWanted::Deleted);
    control.gone("a").await;
    control.want("b", InstanceWanted::Stopped);
    control.settled("b", InstanceState::Stopped).await;
    control.want("b", InstanceWanted::Running);
    control.settled("b", InstanceState::Running).await;
    assert_eq!(node.count("b", LedgerEvent::Created), 1);
}

#[tokio::test]
async fn a_clone_of_what_is_not_there_fails_and_leaves_nothing() {
    let control = Control::start().await;
    let node = Node::started(&control).await;
    control.assign(assignment("a"));
    control.settled("a", InstanceState::Running).await;
    control.assign(clone_of_a("b", "never", &[]));
    let failed = control.settled("b", InstanceState::Failed).await;
    assert!(failed.state_reason.contains("never"), "{failed:?}");
    assert_eq!(node.count("b", LedgerEvent::Created), 0);
    control.want("b", InstanceWanted::Deleted);
    control.gone("b").await;
    control.settled("a", InstanceState::Running).await;
}
