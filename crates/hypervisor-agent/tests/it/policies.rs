//! What is started again by itself, and what waits for the fencer or another server; with the fencer as a task.

use std::sync::Arc;
use std::time::Duration;

use hv_driver_fake::LedgerEvent;
use hv_proto::v1;
use hv_proto::v1::{InstanceState, RestartPolicy};
use hypervisor_agent::fencing::clock::BootClock;
use hypervisor_agent::fencing::local::LocalFencer;
use hypervisor_agent::fencing::{Fencers, Seam};

use crate::control::{Control, guarded, scripted};
use crate::node::{Node, eventually};

/// A node with a fencer that lives as long as the test.
fn with_fencer(control: &Control) -> (Node, Arc<LocalFencer>) {
    {
        let mut state = control.state.lock();
        state.lease_ttl_ms = 3000;
        state.heartbeat_ms = 100;
    }
    let clock = Arc::new(BootClock);
    let fencer = LocalFencer::new(clock.clone(), || panic!("the agent does not hang here"));
    tokio::spawn(Arc::clone(&fencer).run());
    let mut node = Node::new(control);
    node.tuning.fencing = Seam { clock, fencers: Fencers::Local(Arc::clone(&fencer)) };
    (node, fencer)
}

#[tokio::test]
async fn what_fails_is_started_again_and_counted_across_the_agent_s_life() {
    let control = Control::start().await;
    let mut node = Node::started(&control).await;
    let script = [("exit-after", "20ms"), ("exit-code", "3"), ("exits", "2")];
    let policy = RestartPolicy::OnFailure.into();
    control.assign(v1::Assignment { restart_policy: policy, ..scripted("a", &script) });
    let waits = eventually("it is to be started again", || {
        control.last("a").filter(|report| report.state() == InstanceState::Failed)
    });
    assert_eq!(waits.await.state_reason, "failed with exit code 3; started again after 1 s (1st time)");
    node.kill();
    node.start().await;
    let runs = |count| control.last("a").filter(|report| report.restart_count == count);
    eventually("it was started again", || runs(1)).await;
    let report = eventually("it was started once more", || {
        runs(2).filter(|report| report.state() == InstanceState::Running)
    });
    assert_eq!(report.await.observed_generation, 1);
    assert_eq!(node.count("a", LedgerEvent::Started), 3);
}

#[tokio::test]
async fn what_ends_without_a_policy_stays_as_it_is() {
    let control = Control::start().await;
    let node = Node::started(&control).await;
    control.assign(scripted("a", &[("exit-after", "20ms"), ("exit-code", "3")]));
    control.settled("a", InstanceState::Failed).await;
    tokio::time::sleep(Duration::from_millis(1500)).await;
    assert_eq!(node.count("a", LedgerEvent::Started), 1);
}

#[tokio::test]
async fn a_stop_ends_the_starting_again() {
    let control = Control::start().await;
    let node = Node::started(&control).await;
    let policy = RestartPolicy::Always.into();
    control.assign(v1::Assignment { restart_policy: policy, ..scripted("a", &[("exit-after", "20ms")]) });
    eventually("it ended", || (node.count("a", LedgerEvent::Ended) == 1).then_some(())).await;
    control.want("a", v1::InstanceWanted::Stopped);
    control.settled("a", InstanceState::Stopped).await;
    let starts = node.count("a", LedgerEvent::Started);
    tokio::time::sleep(Duration::from_millis(1500)).await;
    assert_eq!(node.count("a", LedgerEvent::Started), starts);
}

#[tokio::test]
async fn nothing_that_may_run_elsewhere_starts_while_the_fencer_does_not_answer() {
    let control = Control::start().await;
    let (mut node, fencer) = with_fencer(&control);
    node.start().await;
    eventually("it is armed", || {
        let state = control.state.lock();
        state.heartbeats.last()?.fencing.as_ref().filter(|fencing| fencing.armed).map(drop)
    })
    .await;
    fencer.freeze(true);
    control.assign(guarded("f"));
    let report = eventually("it waits", || {
        control.last("f").filter(|report| report.state_reason.contains("waits for the fencer"))
    })
    .await;
    assert_ne!(report.state(), InstanceState::Failed);
    assert_eq!(node.count("f", LedgerEvent::Started), 0);
    fencer.freeze(false);
    control.settled("f", InstanceState::Running).await;
    assert_eq!(fencer.standing().watched.len(), 1);
}

#[tokio::test]
async fn where_the_fencer_hangs_the_agent_does_its_work() {
    let mut control = Control::start().await;
    let (mut node, fencer) = with_fencer(&control);
    node.start().await;
    control.assign(guarded("f"));
    control.settled("f", InstanceState::Running).await;
    fencer.freeze(true);
    control.down();
    let renewed = control.state.lock().renewed_at.unwrap();
    let ends = || {
        let ledger = hv_driver_fake::read_ledger(&node.fake_dir()).unwrap();
        ledger.iter().find(|entry| entry.what == LedgerEvent::Ended).map(|entry| entry.at_us)
    };
    let end = std::time::UNIX_EPOCH + Duration::from_micros(eventually("f is stopped", ends).await);
    assert!(end.duration_since(renewed).unwrap() < Duration::from_secs(3));
}

#[tokio::test]
async fn a_fencer_that_forgot_everything_is_told_again() {
    let control = Control::start().await;
    let (mut node, fencer) = with_fencer(&control);
    node.start().await;
    control.assign(guarded("f"));
    control.settled("f", InstanceState::Running).await;
    fencer.crash();
    eventually("it knows", || (fencer.standing().watched.len() == 1).then_some(())).await;
    assert_eq!(node.count("f", LedgerEvent::Ended), 0);
}

#[tokio::test]
async fn a_start_under_way_is_given_up_when_the_lease_ends() {
    let mut control = Control::start().await;
    let (mut node, _fencer) = with_fencer(&control);
    node.start().await;
    let slow = scripted("f", &[("delay-start", "4s")]);
    control.assign(v1::Assignment { fence: true, ..slow });
    eventually("it is being started", || {
        control.last("f").filter(|report| report.state() == InstanceState::Starting)
    })
    .await;
    control.down();
    eventually("it waits", || {
        let views = node.count("f", LedgerEvent::Created);
        (views == 1 && !node.agent().health.is_ready()).then_some(())
    })
    .await;
    tokio::time::sleep(Duration::from_secs(5)).await;
    assert_eq!(node.count("f", LedgerEvent::Started), 0, "it was started without a lease");
    control.up().await;
    control.settled("f", InstanceState::Running).await;
}

#[tokio::test]
async fn a_hundred_instances_are_stopped_in_time() {
    let mut control = Control::start().await;
    let (mut node, _fencer) = with_fencer(&control);
    // Long enough to start them all on a busy machine.
    let lease = Duration::from_secs(10);
    control.state.lock().lease_ttl_ms = 10_000;
    node.start().await;
    let ids: Vec<String> = (0..100).map(|index| format!("f-{index:03}")).collect();
    for id in &ids {
        control.assign(guarded(id));
    }
    for id in &ids {
        control.settled(id, InstanceState::Running).await;
    }
    control.down();
    let renewed = control.state.lock().renewed_at.unwrap();
    let ended = |id: &String| node.count(id, LedgerEvent::Ended) == 1;
    eventually("all are stopped", || ids.iter().all(ended).then_some(())).await;
    let ledger = hv_driver_fake::read_ledger(&node.fake_dir()).unwrap();
    let last = ledger.iter().filter(|entry| entry.what == LedgerEvent::Ended).map(|entry| entry.at_us).max();
    let last = std::time::UNIX_EPOCH + Duration::from_micros(last.unwrap());
    assert!(last.duration_since(renewed).unwrap() < lease);
}

#[tokio::test]
async fn the_next_server_is_taken_when_one_is_gone() {
    let mut first = Control::start().await;
    let second = Control::start().await;
    let mut node = Node::new(&first);
    node.also(&second);
    node.start().await;
    eventually("it registers", || (!first.state.lock().registrations.is_empty()).then_some(())).await;
    first.down();
    second.assign(crate::control::assignment("a"));
    second.settled("a", InstanceState::Running).await;
    eventually("heartbeats go there too", || (!second.state.lock().heartbeats.is_empty()).then_some(()))
        .await;
}
