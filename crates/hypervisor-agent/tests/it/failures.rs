//! Drivers that fail, hang, and come back.

use std::time::Duration;

use hv_driver_fake::LedgerEvent;
use hv_proto::v1::{InstanceState, InstanceWanted};

use crate::control::{Control, assignment, scripted};
use crate::node::{Node, eventually};

#[tokio::test]
async fn a_failure_that_may_pass_is_tried_again_and_says_so() {
    let control = Control::start().await;
    let node = Node::started(&control).await;
    control.assign(scripted("a", &[("fail-create", "1"), ("fail-start", "2")]));
    control.settled("a", InstanceState::Running).await;
    let reasons: Vec<_> =
        control.state.lock().reports.iter().map(|report| report.state_reason.clone()).collect();
    let said = |text: &str| reasons.iter().any(|reason| reason.contains(text));
    assert!(
        said(
            "starting failed (attempt 1 of 3): start of instance a failed: scripted failure; next attempt in"
        ),
        "{reasons:#?}"
    );
    assert_eq!(node.count("a", LedgerEvent::Started), 1);
}

#[tokio::test]
async fn a_start_that_is_wrongly_reported_as_failed_is_not_repeated() {
    let control = Control::start().await;
    let node = Node::started(&control).await;
    control.assign(scripted("a", &[("fail-late-create", "1"), ("fail-late-start", "2")]));
    control.settled("a", InstanceState::Running).await;
    assert_eq!(node.count("a", LedgerEvent::Started), 1);
}

#[tokio::test]
async fn after_the_last_attempt_it_is_failed_until_something_new_is_wanted() {
    let control = Control::start().await;
    let node = Node::started(&control).await;
    control.assign(scripted("a", &[("fail-start", "3")]));
    let report = control.settled("a", InstanceState::Failed).await;
    assert!(report.state_reason.starts_with("starting failed after 3 attempts: "), "{}", report.state_reason);
    assert_eq!(node.count("a", LedgerEvent::Started), 0);
    control.want("a", InstanceWanted::Running);
    control.settled("a", InstanceState::Running).await;
}

#[tokio::test]
async fn what_can_never_work_fails_at_once_and_can_be_deleted() {
    let control = Control::start().await;
    let mut node = Node::started(&control).await;
    control.assign(scripted("a", &[("fail-permanently-create", "true")]));
    let mut unknown = assignment("b");
    unknown.spec.as_mut().unwrap().image = "nonsense".into();
    control.assign(unknown);
    let mut container = assignment("c");
    container.r#type = hv_proto::v1::InstanceType::Container.into();
    control.assign(container);
    for (id, text) in
        [("a", "cannot be made"), ("b", "no image `nonsense`"), ("c", "no driver for the type container")]
    {
        let report = control.settled(id, InstanceState::Failed).await;
        assert!(report.state_reason.contains(text), "{}", report.state_reason);
    }
    node.stop().await;
    node.start().await;
    for id in ["a", "b", "c"] {
        control.want(id, InstanceWanted::Deleted);
        control.gone(id).await;
    }
    eventually("the journal is empty", || node.journalled().is_empty().then_some(())).await;
}

#[tokio::test]
async fn a_driver_that_hangs_holds_up_its_instance_only() {
    let control = Control::start().await;
    let mut node = Node::new(&control);
    node.tuning.create_deadline = Duration::from_millis(1500);
    node.start().await;
    control.assign(scripted("stuck", &[("hang-create", "1")]));
    eventually("it is being created", || control.last("stuck")).await;
    for index in 0..5 {
        control.assign(assignment(&format!("free-{index}")));
    }
    for index in 0..5 {
        control.settled(&format!("free-{index}"), InstanceState::Running).await;
    }
    let heartbeats = control.state.lock().heartbeats.len();
    eventually("heartbeats go on", || (control.state.lock().heartbeats.len() > heartbeats).then_some(()))
        .await;
    // Its own deadline passes, and the second attempt works.
    control.settled("stuck", InstanceState::Running).await;
}

#[tokio::test]
async fn pulling_the_plug_does_not_wait_for_a_guest_that_was_asked() {
    let control = Control::start().await;
    let _node = Node::started(&control).await;
    control.assign(scripted("a", &[("ignore-shutdown", "true")]));
    control.settled("a", InstanceState::Running).await;
    control.change("a", |assignment| {
        assignment.wanted = InstanceWanted::Stopped.into();
        assignment.stop_timeout_seconds = 3600;
    });
    eventually("it is asked", || control.last("a").filter(|r| r.state() == InstanceState::Stopping)).await;
    control.change("a", |assignment| assignment.stop_force = true);
    control.settled("a", InstanceState::Stopped).await;
}

#[tokio::test]
async fn a_removal_is_tried_until_it_works() {
    let control = Control::start().await;
    let node = Node::started(&control).await;
    control.assign(scripted("a", &[("fail-delete", "5")]));
    control.settled("a", InstanceState::Running).await;
    control.want("a", InstanceWanted::Deleted);
    control.gone("a").await;
    let reports = control.state.lock().reports.clone();
    assert!(reports.iter().any(|r| r.state_reason.contains("deleting failed (attempt 4)")), "{reports:#?}");
    assert_eq!(node.count("a", LedgerEvent::Deleted), 1);
}
