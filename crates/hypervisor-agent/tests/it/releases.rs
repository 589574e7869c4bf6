//! Reports, verdicts, and what may be removed.

use hv_driver::{Driver as _, InstanceConfig};
use hv_driver_fake::LedgerEvent;
use hv_proto::v1::{AssignmentsUpdate, InstanceState, InstanceWanted};
use hv_types::InstanceSpec;

use crate::control::{Control, assignment};
use crate::node::{Node, eventually};

#[tokio::test]
async fn a_report_that_could_not_be_recorded_is_sent_again() {
    let control = Control::start().await;
    let _node = Node::started(&control).await;
    control.state.lock().retries = 4;
    control.assign(assignment("a"));
    control.settled("a", InstanceState::Running).await;
    eventually("it is accepted", || (control.state.lock().retries == 0).then_some(())).await;
    let reports = control.state.lock().reports.len();
    assert!(reports >= 4, "{reports}");
}

#[tokio::test]
async fn an_instance_that_is_bound_elsewhere_by_now_is_removed_on_release() {
    let mut control = Control::start().await;
    let mut node = Node::started(&control).await;
    control.assign(assignment("a"));
    control.assign(assignment("b"));
    control.settled("a", InstanceState::Running).await;
    control.settled("b", InstanceState::Running).await;
    node.stop().await;
    control.down();
    control.state.lock().assignments.remove("a");
    control.up().await;
    node.start().await;
    eventually("it is removed", || (node.count("a", LedgerEvent::Deleted) == 1).then_some(())).await;
    eventually("it is forgotten", || (node.journalled() == ["b.json"]).then_some(())).await;
    control.settled("b", InstanceState::Running).await;
    assert_eq!(node.count("b", LedgerEvent::Ended), 0);
}

#[tokio::test]
async fn an_order_to_release_is_followed() {
    let control = Control::start().await;
    let node = Node::started(&control).await;
    control.assign(assignment("a"));
    control.settled("a", InstanceState::Running).await;
    control.state.lock().assignments.remove("a");
    control.send(AssignmentsUpdate {
        released_instance_ids: vec!["a".into(), "nobody".into()],
        ..Default::default()
    });
    eventually("it is removed", || (node.count("a", LedgerEvent::Deleted) == 1).then_some(())).await;
    eventually("it is forgotten", || node.journalled().is_empty().then_some(())).await;
}

async fn stray(node: &Node, id: &str) {
    let driver = node.other_driver();
    let spec = InstanceSpec {
        image: "tiny".into(),
        cpu_cores: 1,
        memory_bytes: 64 << 20,
        ..InstanceSpec::default()
    };
    let id = id.parse().unwrap();
    let config = InstanceConfig {
        id,
        name: "stray".into(),
        spec,
        metadata: Default::default(),
        image: None,
        rescue_image: None,
        devices: None,
    };
    driver.create(&config).await.unwrap();
    driver.start(&config.id).await.unwrap();
}

#[tokio::test]
async fn what_nobody_knows_is_shown_and_removed_only_on_release() {
    let control = Control::start().await;
    let mut node = Node::new(&control);
    stray(&node, "stray").await;
    control.state.lock().is_lenient = true;
    node.start().await;
    let report = eventually("it is shown", || control.last("stray")).await;
    assert_eq!((report.epoch, report.state()), (0, InstanceState::Running));
    assert_eq!(node.count("stray", LedgerEvent::Ended), 0);

    node.stop().await;
    control.state.lock().is_lenient = false;
    node.start().await;
    eventually("it is removed", || (node.count("stray", LedgerEvent::Deleted) == 1).then_some(())).await;
    eventually("it is forgotten", || node.driver_list_is_empty().then_some(())).await;
}

#[tokio::test]
async fn a_node_that_lost_its_journal_takes_over_what_is_bound_to_it() {
    let control = Control::start().await;
    let mut node = Node::started(&control).await;
    control.assign(assignment("a"));
    control.settled("a", InstanceState::Running).await;
    node.stop().await;
    std::fs::remove_file(node.state_dir().join("journal/instances/a.json")).unwrap();
    control.state.lock().reports.clear();
    node.start().await;
    control.settled("a", InstanceState::Running).await;
    assert_eq!((node.count("a", LedgerEvent::Started), node.count("a", LedgerEvent::Ended)), (1, 0));
    assert!(control.state.lock().reports.iter().all(|report| report.epoch == 1));
}

#[tokio::test]
async fn an_instance_whose_journal_is_damaged_is_not_given_away() {
    let control = Control::start().await;
    let mut node = Node::started(&control).await;
    control.assign(assignment("a"));
    control.settled("a", InstanceState::Running).await;
    node.stop().await;
    std::fs::write(node.state_dir().join("journal/instances/a.json"), b"{").unwrap();
    control.state.lock().assignments.clear();
    control.state.lock().reports.clear();
    control.state.lock().registrations.clear();
    node.start().await;
    let request = eventually("it registers", || control.state.lock().registrations.first().cloned()).await;
    let condition = request.conditions.iter().find(|condition| condition.r#type == "Journal").unwrap();
    assert!(condition.status == "False" && condition.message.contains("a.json"), "{condition:?}");
    control.assign(assignment("b"));
    control.settled("b", InstanceState::Running).await;
    assert_eq!(control.last("a"), None);
    assert_eq!(node.count("a", LedgerEvent::Ended), 0);
}

#[tokio::test]
async fn that_it_is_gone_is_said_until_it_is_known() {
    let mut control = Control::start().await;
    let mut node = Node::started(&control).await;
    control.assign(assignment("a"));
    control.settled("a", InstanceState::Running).await;
    control.state.lock().retries = u32::MAX;
    control.want("a", InstanceWanted::Deleted);
    control.gone("a").await;
    assert_eq!(node.journalled(), ["a.json"]);
    control.down();
    node.kill();
    node.start().await;
    control.state.lock().retries = 0;
    control.up().await;
    eventually("it is forgotten", || node.journalled().is_empty().then_some(())).await;
    assert!(control.state.lock().assignments.is_empty());
}

#[tokio::test]
async fn an_instance_that_comes_back_begins_afresh() {
    let control = Control::start().await;
    let node = Node::started(&control).await;
    control.assign(crate::control::scripted("a", &[("delay-delete", "200ms")]));
    control.settled("a", InstanceState::Running).await;
    control.want("a", InstanceWanted::Deleted);
    eventually("it goes", || control.last("a").filter(|r| r.state() == InstanceState::Deleting)).await;
    control.change("a", |assignment| {
        assignment.epoch = 2;
        assignment.wanted = InstanceWanted::Running.into();
    });
    control.settled("a", InstanceState::Running).await;
    assert_eq!((node.count("a", LedgerEvent::Deleted), node.count("a", LedgerEvent::Created)), (1, 2));
}

#[tokio::test]
async fn many_instances_are_reported_in_batches() {
    let control = Control::start().await;
    let mut node = Node::new(&control);
    for index in 0..250 {
        let id = format!("i-{index}");
        control.state.lock().assignments.insert(id.clone(), assignment(&id));
    }
    node.start().await;
    for index in 0..250 {
        control.settled(&format!("i-{index}"), InstanceState::Running).await;
    }
}
