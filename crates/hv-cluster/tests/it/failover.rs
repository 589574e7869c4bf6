//! Claims about nodes that are lost: what is started elsewhere, when, and what is not and why.

use std::time::Duration;

use hv_cluster::nodes::{Settings, Sign};
use hv_cluster::reports::Verdict;
use hv_cluster::{ClusterConfig, Mutation};
use hv_proto::{convert, v1};
use hv_store::SharedStore;
use hv_types::instance::{FailoverPolicy, Request};
use hv_types::node::{Fencing, Schedulability};
use hv_types::{ErrorCode, InstanceId, InstanceRecord, InstanceState, NodeId, Wanted};
use tokio::task::JoinHandle;
use tokio::time::Instant;

use crate::world::{Mute, Server, asked, at_epoch, code, config, disk, gone, keyed, node, report, until};

const TTL: Duration = Duration::from_secs(1);
const GRACE: Duration = Duration::from_millis(400);

fn quick(server_id: &str) -> ClusterConfig {
    ClusterConfig { heartbeat_timeout: TTL, failover_grace: GRACE, ..config(server_id) }
}

fn fences(id: &str) -> v1::RegisterNodeRequest {
    let fencing = Some(v1::FencingStatus { armed: true, message: "a fencer".into() });
    v1::RegisterNodeRequest { fencing, ..node(id, 4) }
}

fn movable(name: &str) -> InstanceRecord {
    InstanceRecord { failover_policy: FailoverPolicy::Restart, ..asked(name) }
}

fn once() -> Mutation {
    Mutation::once("test")
}

/// Beats for a node until it is aborted.
fn beats(server: &Server, id: &NodeId) -> JoinHandle<()> {
    let (cluster, id) = (server.cluster.clone(), id.clone());
    tokio::spawn(async move {
        loop {
            let _ = cluster.heartbeat(None, &id, Sign::default()).await;
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    })
}

async fn lost(server: &Server, id: &NodeId) {
    until("the node to be lost", async || {
        (!server.cluster.cache().read(|state| state.node(id).unwrap().is_live())).then_some(())
    })
    .await;
}

async fn note(server: &Server, id: &InstanceId, expected: &str) {
    until(expected, async || server.get(id).await.recovery_note.contains(expected).then_some(())).await;
}

async fn event(server: &Server, reason: &str) {
    until(reason, async || {
        let found = |state: &hv_cluster::cache::State| state.events_before(None).any(|e| e.reason == reason);
        server.cluster.cache().read(found).then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_may_run_elsewhere_does_after_lease_and_grace_and_not_before() {
    let disk = disk();
    let server = Server::start(&disk.store, quick("a")).await;
    let n1 = server.add_node(fences("n1")).await;
    let keeps_n1 = beats(&server, &n1);
    let (id, _) = server.running(movable("web")).await;
    let before = server.get(&id).await;
    let n2 = server.add_node(fences("n2")).await;
    let keeps_n2 = beats(&server, &n2);
    keeps_n1.abort();
    let cut_off = Instant::now();
    lost(&server, &n1).await;
    let vanished = Instant::now();
    until("it to be bound elsewhere", async || (server.bound(&id).await == n2).then_some(())).await;
    // Seen by polls of 10 ms on a machine that is shared.
    let took = vanished.elapsed();
    assert!(took >= GRACE - Duration::from_millis(50), "it was started elsewhere after {took:?}");
    assert!(cut_off.elapsed() < TTL + GRACE + Duration::from_secs(3), "{:?}", cut_off.elapsed());
    let after = server.get(&id).await;
    assert!(after.epoch > before.epoch && after.generation > before.generation);
    event(&server, "FailedOver").await;
    // The old node comes back, and is told to give it up.
    server.add_node(fences("n1")).await;
    let old = at_epoch(report(&before, InstanceState::Running), before.epoch.0);
    assert_eq!(server.report_one(&n1, old).await, Verdict::Release);
    assert_eq!(server.get(&id).await.node_id(), Some(&n2));
    keeps_n2.abort();
}

#[tokio::test(flavor = "multi_thread")]
async fn each_reason_not_to_restart_is_in_the_record_once_and_goes_when_the_node_is_back() {
    let disk = disk();
    let server = Server::start(&disk.store, quick("a")).await;
    let n1 = server.add_node(fences("n1")).await;
    let keeps = beats(&server, &n1);
    let (stays, _) = server.running(asked("stays")).await;
    let mut pinned = movable("pinned");
    std::sync::Arc::make_mut(&mut pinned.placement).preferred_node = Some(n1.clone());
    let (pinned, _) = server.running(pinned).await;
    let (stopped, _) = server.running(movable("stopped")).await;
    server.change(&stopped, Request::Stop).await.unwrap();
    keeps.abort();
    note(&server, &stays, "its failover policy is never").await;
    note(&server, &pinned, "it may only run on node host-n1").await;
    note(&server, &stopped, "it is to be stopped").await;
    event(&server, "NotRestarted").await;
    let written = server.get(&stays).await.revision;
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert_eq!(server.get(&stays).await.revision, written, "it is written again and again");
    // It is to run after all: what was in the way is not.
    server.change(&stopped, Request::Start).await.unwrap();
    until("it to be unbound", async || server.get(&stopped).await.node_id().is_none().then_some(())).await;
    server.add_node(fences("n1")).await;
    until("the notes to go", async || {
        let noted = [&stays, &pinned];
        let mut left = 0;
        for id in noted {
            left += usize::from(!server.get(id).await.recovery_note.is_empty());
        }
        (left == 0).then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn without_fencing_it_takes_an_operators_word_which_a_living_node_refutes() {
    let disk = disk();
    let server = Server::start(&disk.store, quick("a")).await;
    let n1 = server.add_node(node("n1", 4)).await;
    let keeps = beats(&server, &n1);
    let (id, _) = server.running(movable("web")).await;
    assert_eq!(
        code(server.cluster.confirm_node_down(&once(), &n1).await),
        ErrorCode::FailedPrecondition,
        "it lives"
    );
    keeps.abort();
    note(&server, &id, "its agent does not say that it fences").await;
    let doomed = server.get(&id).await;
    assert_eq!(doomed.node_id(), Some(&n1));
    let confirmed = server.cluster.confirm_node_down(&keyed("down", 1), &n1).await.unwrap().reply;
    assert!(confirmed.confirmed_down);
    until("it to be unbound", async || server.get(&id).await.node_id().is_none().then_some(())).await;
    let again = server.cluster.confirm_node_down(&keyed("down", 1), &n1).await.unwrap().reply;
    assert_eq!(again, confirmed, "the same request has the same answer");
    server.add_node(node("n1", 4)).await;
    assert!(!server.cluster.node(&n1).await.unwrap().0.confirmed_down, "it is back");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hold_keeps_everything_and_withdraws_the_nodes_word() {
    let disk = disk();
    let server = Server::start(&disk.store, quick("a")).await;
    let n1 = server.add_node(fences("n1")).await;
    let keeps = beats(&server, &n1);
    let (id, _) = server.running(movable("web")).await;
    let held = server.cluster.set_node_failover(&once(), &n1, true).await.unwrap().reply;
    assert!(held.failover_held && !held.fencing.unwrap().armed);
    let says = || Sign { fencing: Some(Fencing { armed: true, message: "late".into() }), ..Sign::default() };
    let beat = server.cluster.heartbeat(None, &n1, says()).await.unwrap().unwrap();
    assert!(beat.failover_held && beat.lease_ttl == TTL);
    assert!(!server.cluster.node(&n1).await.unwrap().0.fencing.armed, "it may cease to fence at any moment");
    keeps.abort();
    note(&server, &id, "is held by the operator").await;
    // Released while it is lost: it has not said again that it fences.
    server.cluster.set_node_failover(&once(), &n1, false).await.unwrap();
    note(&server, &id, "has to say again that it fences").await;
    assert_eq!(server.get(&id).await.node_id(), Some(&n1));
    let registered = convert::node_from_registration(fences("n1")).unwrap();
    assert!(!server.cluster.register_node(None, registered).await.unwrap().beat.failover_held);
    assert!(server.cluster.node(&n1).await.unwrap().0.fencing.armed);
    // Held and released between two heartbeats: the node is asked to say it again.
    server.cluster.set_node_failover(&once(), &n1, true).await.unwrap();
    server.cluster.set_node_failover(&once(), &n1, false).await.unwrap();
    assert!(server.cluster.heartbeat(None, &n1, Sign::default()).await.unwrap().is_none());
    server.add_node(fences("n1")).await;
    assert!(server.cluster.heartbeat(None, &n1, Sign::default()).await.unwrap().is_some());
}

/// The failover is decided, and waits for the store while `meanwhile` happens.
async fn late(meanwhile: impl AsyncFnOnce(&Server, &NodeId, &InstanceId)) -> (Server, InstanceId, NodeId) {
    let disk = Box::leak(Box::new(disk()));
    let mute = Mute::over(&disk.store);
    let store: SharedStore = mute.clone();
    let server = Server::start(&store, quick("a")).await;
    let n1 = server.add_node(fences("n1")).await;
    let keeps = beats(&server, &n1);
    let (id, _) = server.running(movable("web")).await;
    keeps.abort();
    lost(&server, &n1).await;
    let gate = mute.leader_gate.write().await;
    let before = mute.leader_waits.load(std::sync::atomic::Ordering::SeqCst);
    until("the failover to be under way", async || {
        (mute.leader_waits.load(std::sync::atomic::Ordering::SeqCst) > before).then_some(())
    })
    .await;
    meanwhile(&server, &n1, &id).await;
    drop(gate);
    (server, id, n1)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_failover_that_arrives_after_its_node_is_back_is_refused() {
    let (server, id, n1) = late(async |server, n1, _| {
        server.add_node(fences("n1")).await;
        let keeps = beats(server, n1);
        // It beats to the end of the test.
        drop(keeps);
    })
    .await;
    tokio::time::sleep(TTL + GRACE + GRACE).await;
    assert_eq!(server.get(&id).await.node_id(), Some(&n1), "it runs there");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_failover_that_arrives_after_its_node_was_back_and_is_lost_again_is_refused() {
    let (server, id, n1) = late(async |server, n1, _| {
        server.add_node(fences("n1")).await;
        lost(server, n1).await;
    })
    .await;
    let again = Instant::now();
    // Counted from the second loss, which this test saw before it let the transaction go.
    while again.elapsed() < GRACE - Duration::from_millis(150) {
        assert_eq!(server.get(&id).await.node_id(), Some(&n1), "after {:?}", again.elapsed());
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    until("it to be unbound", async || server.get(&id).await.node_id().is_none().then_some(())).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_failover_that_arrives_after_a_stop_or_a_hold_is_refused() {
    let (server, id, n1) = late(async |server, _, id| {
        server.change(id, Request::Stop).await.unwrap();
    })
    .await;
    note(&server, &id, "it is to be stopped").await;
    assert_eq!(server.get(&id).await.node_id(), Some(&n1));
    let (server, id, n1) = late(async |server, n1, _| {
        server.cluster.set_node_failover(&once(), n1, true).await.unwrap();
    })
    .await;
    note(&server, &id, "is held by the operator").await;
    assert_eq!(server.get(&id).await.node_id(), Some(&n1));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_new_leader_counts_afresh_and_then_does_it() {
    let disk = disk();
    let first = Server::start(&disk.store, quick("a")).await;
    let n1 = first.add_node(fences("n1")).await;
    let (id, _) = first.running(movable("web")).await;
    first.kill().await;
    // Nobody saw the lease vanish.
    tokio::time::sleep(TTL + GRACE).await;
    let second = Server::start(&disk.store, quick("b")).await;
    until("it to lead", async || second.leads().then_some(())).await;
    let begin = Instant::now();
    until("it to be unbound", async || second.get(&id).await.node_id().is_none().then_some(())).await;
    let took = begin.elapsed();
    assert!(
        took >= TTL + GRACE - Duration::from_millis(200),
        "{took:?}: the node may have just been answered"
    );
    assert_ne!(second.cluster.node(&n1).await.unwrap().1.lost_since, None);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_that_is_lost_for_good_leaves_nothing_behind() {
    let disk = disk();
    let server = Server::start(&disk.store, quick("a")).await;
    let n1 = server.add_node(fences("n1")).await;
    let keeps = beats(&server, &n1);
    let (moves, _) = server.running(movable("moves")).await;
    let (stays, _) = server.running(asked("stays")).await;
    let (leaves, _) = server.running(asked("leaves")).await;
    server.change(&leaves, Request::Delete).await.unwrap();
    let remove = async |force| server.cluster.deregister_node(&keyed("remove", 2), &n1, force).await;
    assert_eq!(code(remove(true).await), ErrorCode::FailedPrecondition, "it answers");
    server.cluster.set_node_failover(&once(), &n1, true).await.unwrap();
    keeps.abort();
    lost(&server, &n1).await;
    assert_eq!(code(remove(false).await), ErrorCode::FailedPrecondition);
    let refusal = remove(true).await.unwrap_err();
    assert!(refusal.to_string().contains("instance moves may still run on node host-n1"), "{refusal}");
    assert_eq!(server.cluster.node(&n1).await.unwrap().0.schedulability, Schedulability::Open);
    server.cluster.confirm_node_down(&once(), &n1).await.unwrap();
    remove(true).await.unwrap();
    remove(true).await.unwrap();
    assert_eq!(code(server.cluster.node(&n1).await.map(drop)), ErrorCode::NotFound);
    assert_eq!(code(server.cluster.instance(&leaves).await), ErrorCode::NotFound);
    let lost = server.get(&stays).await;
    assert_eq!((lost.state, lost.node_id(), lost.is_settled()), (InstanceState::Failed, None, true));
    assert!(lost.state_reason.contains("was removed for good"), "{}", lost.state_reason);
    server.change(&stays, Request::Start).await.unwrap();
    let n2 = server.add_node(fences("n2")).await;
    assert_eq!((server.bound(&stays).await, server.bound(&moves).await), (n2.clone(), n2));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_deletion_ends_once_it_is_certain_that_nothing_runs() {
    let disk = disk();
    let server = Server::start(&disk.store, quick("a")).await;
    let n1 = server.add_node(fences("n1")).await;
    let (id, _) = server.running(movable("web")).await;
    lost(&server, &n1).await;
    server.change(&id, Request::Delete).await.unwrap();
    until("its record to go", async || server.cluster.instance(&id).await.err()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_an_operator_decided_survives_a_registration() {
    let disk = disk();
    let server = Server::idle(&disk.store, quick("a")).await;
    let said = |status: &str| v1::NodeCondition {
        r#type: "DriverQemu".into(),
        status: status.into(),
        ..v1::NodeCondition::default()
    };
    let request = v1::RegisterNodeRequest { conditions: vec![said("True")], ..fences("n1") };
    let n1 = server.add_node(request.clone()).await;
    let settings = Settings {
        taints: Some(vec![
            convert::taint_from(v1::Taint { key: "gpu".into(), effect: 1, ..v1::Taint::default() }).unwrap(),
        ]),
        reserved: Some(hv_types::Resources { cpu_cores: 1, ..hv_types::Resources::default() }),
        ..Settings::default()
    };
    let updated = server.cluster.update_node_settings(&keyed("s", 1), &n1, &settings).await.unwrap().reply;
    assert_eq!((updated.taints.len(), updated.schedulable.unwrap().cpu_cores), (1, 3));
    let condition = convert::condition_from(v1::NodeCondition {
        r#type: "Cable".into(),
        status: "False".into(),
        ..v1::NodeCondition::default()
    })
    .unwrap();
    server.cluster.update_node_status(&once(), &n1, None, &[condition]).await.unwrap();
    server.cluster.set_node_failover(&once(), &n1, true).await.unwrap();
    server.add_node(v1::RegisterNodeRequest { conditions: vec![said("False")], ..request }).await;
    let now = server.cluster.node(&n1).await.unwrap().0;
    let kinds: Vec<_> = now.conditions.iter().map(|c| (c.kind.as_str(), c.status.as_str())).collect();
    assert_eq!(kinds, [("DriverQemu", "False"), ("Cable", "False")]);
    assert!(now.failover_held && !now.fencing.armed && now.taints.len() == 1 && now.reserved.cpu_cores == 1);
    let again = server.cluster.update_node_settings(&keyed("s", 1), &n1, &settings).await.unwrap().reply;
    assert_eq!(again, updated);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stop_that_the_lost_node_had_done_is_believed_when_it_is_back() {
    let disk = disk();
    let server = Server::start(&disk.store, quick("a")).await;
    let n1 = server.add_node(node("n1", 4)).await;
    let (id, _) = server.running(asked("web")).await;
    server.change(&id, Request::Stop).await.unwrap();
    note(&server, &id, "it is to be stopped").await;
    server.add_node(node("n1", 4)).await;
    let record = server.get(&id).await;
    assert_eq!(server.report_one(&n1, report(&record, InstanceState::Stopped)).await, Verdict::Accepted);
    let now = server.get(&id).await;
    assert_eq!(
        (now.wanted, now.state, now.recovery_note.as_str()),
        (Wanted::Stopped, InstanceState::Stopped, "")
    );
    let _ = gone(&now);
}
