//! What an instance is made of changes: live, at the next start, or not at all.

use hv_driver_fake::{LedgerEvent, read_record};
use hv_proto::v1;
use hv_proto::v1::{InstanceState, InstanceWanted};
use hv_types::InstanceSpec;

use crate::control::{Control, assignment, scripted};
use crate::node::{Node, eventually};

/// What the driver has made of it.
fn made(node: &Node, id: &str) -> InstanceSpec {
    read_record(&node.fake_dir(), &id.parse().unwrap()).unwrap().unwrap().config.spec
}

fn of_cores(assignment: &mut v1::Assignment, cores: i32) {
    assignment.spec.get_or_insert_default().cpu_cores = cores;
}

#[tokio::test]
async fn what_runs_is_changed_without_a_stop() {
    let control = Control::start().await;
    let node = Node::started(&control).await;
    control.assign(assignment("a"));
    control.settled("a", InstanceState::Running).await;
    control.change("a", |assignment| {
        of_cores(assignment, 4);
        assignment.name = "other".into();
    });
    let report = control.settled("a", InstanceState::Running).await;
    assert_eq!((report.update_note.as_str(), made(&node, "a").cpu_cores), ("", 4));
    assert_eq!(node.count("a", LedgerEvent::Started), 1);
}

#[tokio::test]
async fn what_has_to_wait_is_told_and_done_before_the_next_start() {
    let control = Control::start().await;
    let mut node = Node::started(&control).await;
    control.assign(scripted("a", &[("update-waits", "true")]));
    control.settled("a", InstanceState::Running).await;
    control.change("a", |assignment| of_cores(assignment, 4));
    let report = control.settled("a", InstanceState::Running).await;
    assert!(report.update_note.contains("cores"), "{report:?}");
    assert_eq!(made(&node, "a").cpu_cores, 1);
    // It is not forgotten with the process.
    node.kill();
    node.start().await;
    control.want("a", InstanceWanted::Stopped);
    control.settled("a", InstanceState::Stopped).await;
    control.want("a", InstanceWanted::Running);
    let report = control.settled("a", InstanceState::Running).await;
    assert_eq!((report.update_note.as_str(), made(&node, "a").cpu_cores), ("", 4));
    assert_eq!(node.count("a", LedgerEvent::Started), 2);
}

#[tokio::test]
async fn what_the_driver_refuses_leaves_what_runs_alone() {
    let control = Control::start().await;
    let node = Node::started(&control).await;
    control.assign(assignment("a"));
    control.settled("a", InstanceState::Running).await;
    control.change("a", |assignment| assignment.spec.get_or_insert_default().image = "big".into());
    let report = control.settled("a", InstanceState::Running).await;
    assert!(report.update_note.starts_with("not done: "), "{report:?}");
    assert_eq!(node.count("a", LedgerEvent::Ended), 0);
    // What can be done again is done, and nothing is said any more.
    control.change("a", |assignment| assignment.spec = crate::control::assignment("a").spec);
    let report = control.settled("a", InstanceState::Running).await;
    assert_eq!(report.update_note, "");
}

#[tokio::test]
async fn failures_that_pass_are_tried_again_and_others_are_told_in_the_end() {
    let control = Control::start().await;
    let node = Node::started(&control).await;
    control.assign(scripted("a", &[("fail-update", "2")]));
    control.assign(scripted("b", &[("fail-update", "100")]));
    for id in ["a", "b"] {
        control.settled(id, InstanceState::Running).await;
        control.change(id, |assignment| of_cores(assignment, 2));
    }
    assert_eq!(control.settled("a", InstanceState::Running).await.update_note, "");
    assert_eq!(made(&node, "a").cpu_cores, 2);
    let report = control.settled("b", InstanceState::Running).await;
    assert!(report.update_note.starts_with("not done after 3 attempts"), "{report:?}");
    assert_eq!(made(&node, "b").cpu_cores, 1);
}

#[tokio::test]
async fn what_is_changed_before_it_is_made_is_made_so() {
    let control = Control::start().await;
    let node = Node::started(&control).await;
    control.assign(scripted("a", &[("delay-create", "300ms")]));
    eventually("it is being made", || node.fake_dir().join("a.json").exists().then_some(())).await;
    control.change("a", |assignment| of_cores(assignment, 5));
    control.settled("a", InstanceState::Running).await;
    assert_eq!(made(&node, "a").cpu_cores, 5);
}

fn rescue_from(assignment: &mut v1::Assignment, image: &str) {
    assignment.spec.get_or_insert_default().rescue = image.into();
    assignment.restart_generation = assignment.generation;
}

#[tokio::test]
async fn into_rescue_and_out_of_it_are_one_start_each() {
    let control = Control::start().await;
    let mut node = Node::started(&control).await;
    control.assign(assignment("a"));
    control.settled("a", InstanceState::Running).await;
    for (image, starts) in [("tiny", 2), ("", 3)] {
        control.change("a", |assignment| rescue_from(assignment, image));
        let report = control.settled("a", InstanceState::Running).await;
        assert_eq!((report.update_note.as_str(), made(&node, "a").rescue.as_str()), ("", image));
        assert_eq!(node.count("a", LedgerEvent::Started), starts);
        node.kill();
        node.start().await;
        control.settled("a", InstanceState::Running).await;
        assert_eq!(node.count("a", LedgerEvent::Started), starts);
    }
}

#[tokio::test]
async fn a_rescue_that_cannot_be_is_told_and_starts_nothing() {
    let control = Control::start().await;
    let node = Node::started(&control).await;
    control.assign(assignment("a"));
    control.settled("a", InstanceState::Running).await;
    control.change("a", |assignment| rescue_from(assignment, "none"));
    let report = control.settled("a", InstanceState::Running).await;
    assert!(report.update_note.contains("no image `none`"), "{report:?}");
    assert_eq!(node.count("a", LedgerEvent::Ended), 0);
    control.want("a", InstanceWanted::Stopped);
    control.settled("a", InstanceState::Stopped).await;
    control.change("a", |assignment| rescue_from(assignment, ""));
    control.settled("a", InstanceState::Stopped).await;
    control.change("a", |assignment| {
        assignment.wanted = InstanceWanted::Running.into();
        rescue_from(assignment, "none");
    });
    let report = control.settled("a", InstanceState::Failed).await;
    assert!(report.state_reason.contains("no image `none`"), "{report:?}");
    assert_eq!(node.count("a", LedgerEvent::Started), 1);
}
