//! From an assignment to an instance, and back.

use hv_driver::{Driver as _, Exit};
use hv_driver_fake::LedgerEvent;
use hv_proto::v1::{InstanceState, InstanceWanted};

use crate::control::{Control, assignment, scripted};
use crate::node::{Node, eventually};

#[tokio::test]
async fn an_assigned_instance_is_created_started_and_reported() {
    let control = Control::start().await;
    let node = Node::started(&control).await;
    control.assign(scripted("a", &[("delay-create", "50ms"), ("delay-start", "50ms")]));
    let report = control.settled("a", InstanceState::Running).await;
    assert_eq!((report.epoch, report.observed_generation, report.gone), (1, 1, false));
    assert_eq!(report.ip_address, "192.0.2.15");
    assert!(report.started_at.is_some());
    let states: Vec<_> =
        control.state.lock().reports.iter().map(|r| (r.state(), r.observed_generation)).collect();
    let expected = [(InstanceState::Creating, 0), (InstanceState::Starting, 0), (InstanceState::Running, 1)];
    assert_eq!(states, expected);
    assert_eq!(node.count("a", LedgerEvent::Started), 1);
}

#[tokio::test]
async fn every_change_of_what_is_wanted_is_followed_and_nothing_is_left_after_delete() {
    let control = Control::start().await;
    let node = Node::started(&control).await;
    control.assign(assignment("a"));
    control.settled("a", InstanceState::Running).await;
    control.want("a", InstanceWanted::Paused);
    control.settled("a", InstanceState::Paused).await;
    control.want("a", InstanceWanted::Running);
    control.settled("a", InstanceState::Running).await;
    control.want("a", InstanceWanted::Stopped);
    control.settled("a", InstanceState::Stopped).await;
    control.want("a", InstanceWanted::Running);
    control.settled("a", InstanceState::Running).await;
    assert_eq!(node.count("a", LedgerEvent::Started), 2);

    control.change("a", |assignment| assignment.restart_generation = assignment.generation);
    control.settled("a", InstanceState::Running).await;
    assert_eq!((node.count("a", LedgerEvent::Started), node.count("a", LedgerEvent::Ended)), (3, 2));

    control.want("a", InstanceWanted::Deleted);
    control.gone("a").await;
    eventually("the journal is empty", || node.journalled().is_empty().then_some(())).await;
    assert!(node.driver().list().await.unwrap().is_empty());
    let mut client = node.client();
    let shown = async {
        while !client.list_instances(pbjson_types::Empty {}).await.unwrap().into_inner().instances.is_empty()
        {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(std::time::Duration::from_secs(10), shown).await.expect("it is not shown any more");
}

#[tokio::test]
async fn an_older_order_changes_nothing() {
    let control = Control::start().await;
    let node = Node::started(&control).await;
    let first = assignment("a");
    control.assign(first.clone());
    control.settled("a", InstanceState::Running).await;
    control.change("a", |assignment| assignment.epoch = 2);
    control.settled("a", InstanceState::Running).await;
    let stale = [(1, 9), (2, 1)].map(|(epoch, generation)| hv_proto::v1::Assignment {
        epoch,
        generation,
        wanted: InstanceWanted::Deleted.into(),
        ..first.clone()
    });
    let assignments = stale.to_vec();
    let seen = control.state.lock().reports.len();
    control.send(hv_proto::v1::AssignmentsUpdate { assignments, ..Default::default() });
    eventually("it is reported again", || (control.state.lock().reports.len() > seen).then_some(())).await;
    assert_eq!(control.last("a").unwrap().state(), InstanceState::Running);
    assert_eq!((node.count("a", LedgerEvent::Deleted), node.count("a", LedgerEvent::Started)), (0, 1));
}

#[tokio::test]
async fn a_guest_that_ends_by_itself_is_reported_and_not_started_again() {
    let control = Control::start().await;
    let node = Node::started(&control).await;
    control.assign(scripted("off", &[("exit-after", "300ms")]));
    control.assign(scripted("bad", &[("exit-after", "300ms"), ("exit-code", "3")]));
    control.assign(assignment("lost"));
    control.settled("lost", InstanceState::Running).await;
    node.driver().end_guest(&"lost".parse().unwrap(), Exit::Lost).unwrap();

    let off = control.settled("off", InstanceState::Stopped).await;
    assert_eq!(off.state_reason, "the guest powered off");
    let bad = control.settled("bad", InstanceState::Failed).await;
    assert_eq!(bad.state_reason, "exit code 3");
    let lost = control.settled("lost", InstanceState::Failed).await;
    assert!(lost.state_reason.contains("nobody knows how it ended"), "{}", lost.state_reason);
    for id in ["off", "bad", "lost"] {
        assert_eq!(node.count(id, LedgerEvent::Started), 1, "{id}");
    }
    control.want("off", InstanceWanted::Running);
    eventually("it is started again", || (node.count("off", LedgerEvent::Started) == 2).then_some(())).await;
}

#[tokio::test]
async fn instances_outlive_the_agent_and_are_taken_over_untouched() {
    let control = Control::start().await;
    let mut node = Node::started(&control).await;
    control.assign(assignment("a"));
    control.assign(assignment("b"));
    control.settled("a", InstanceState::Running).await;
    control.settled("b", InstanceState::Running).await;
    for round in 0..2 {
        if round == 0 {
            node.stop().await;
        } else {
            node.kill();
        }
        node.driver_less_end("b");
        control.state.lock().reports.clear();
        node.start().await;
        control.settled("a", InstanceState::Running).await;
    }
    assert_eq!((node.count("a", LedgerEvent::Started), node.count("a", LedgerEvent::Ended)), (1, 0));
    control.settled("b", InstanceState::Stopped).await;
    assert_eq!(node.count("b", LedgerEvent::Started), 1);
}

#[tokio::test]
async fn after_a_boot_of_the_node_what_ran_is_started_again() {
    let control = Control::start().await;
    let mut node = Node::started(&control).await;
    control.assign(assignment("a"));
    control.settled("a", InstanceState::Running).await;
    node.stop().await;
    let id = "a".parse().unwrap();
    node.other_driver().end_guest(&id, Exit::Lost).unwrap();
    let path = node.state_dir().join("journal/instances/a.json");
    let mut entry: serde_json::Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    entry["boot_id"] = "the boot before".into();
    std::fs::write(&path, entry.to_string()).unwrap();
    node.start().await;
    eventually("it is started again", || (node.count("a", LedgerEvent::Started) == 2).then_some(())).await;
    control.settled("a", InstanceState::Running).await;
}

#[tokio::test]
async fn a_node_without_a_server_finishes_what_its_journal_says() {
    let mut control = Control::start().await;
    let mut node = Node::started(&control).await;
    control.assign(scripted("a", &[("delay-create", "500ms")]));
    eventually("it is in the journal", || (!node.journalled().is_empty()).then_some(())).await;
    control.down();
    node.kill();
    node.start().await;
    eventually("it is started", || (node.count("a", LedgerEvent::Started) == 1).then_some(())).await;
    control.up().await;
    control.settled("a", InstanceState::Running).await;
    assert_eq!(node.count("a", LedgerEvent::Started), 1);
}

#[tokio::test]
async fn an_agent_that_is_killed_again_and_again_ends_up_with_one_of_each() {
    let control = Control::start().await;
    let mut node = Node::started(&control).await;
    let ids = ["a", "b", "c"];
    let delays =
        [("delay-create", "30ms"), ("delay-start", "30ms"), ("delay-stop", "20ms"), ("delay-delete", "30ms")];
    for id in ids {
        control.assign(scripted(id, &delays));
    }
    for round in 0u64..12 {
        // Any moment will do; these spread over the steps.
        tokio::time::sleep(std::time::Duration::from_millis(7 * round)).await;
        node.kill();
        node.start().await;
    }
    for id in ids {
        control.settled(id, InstanceState::Running).await;
        let (started, ended) = (node.count(id, LedgerEvent::Started), node.count(id, LedgerEvent::Ended));
        assert_eq!(started - ended, 1, "{id} was started {started} times and ended {ended} times");
        control.want(id, InstanceWanted::Deleted);
    }
    node.kill();
    node.start().await;
    for id in ids {
        control.gone(id).await;
    }
    eventually("nothing is left", || node.journalled().is_empty().then_some(())).await;
    assert!(node.driver().list().await.unwrap().is_empty());
}
