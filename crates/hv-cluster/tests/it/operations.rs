//! Claims about operations: drains with a limit, progress, cancellation, and leaders that die.

use std::time::{Duration, SystemTime};

use hv_cluster::nodes::DrainOptions;
use hv_cluster::operations::OperationFilter;
use hv_cluster::page::Page;
use hv_cluster::reports::Verdict;
use hv_cluster::{ClusterConfig, Mutation};
use hv_store::record::Record;
use hv_store::{Op, Txn};
use hv_types::node::Schedulability;
use hv_types::{ErrorCode, InstanceId, InstanceState, NodeId, OperationRecord, OperationState};

use crate::world::{Server, asked, code, config, disk, gone, keyed, node, report, until};

fn once() -> Mutation {
    Mutation::once("test")
}

async fn several(server: &Server, count: usize) -> (Vec<InstanceId>, NodeId) {
    let n1 = server.add_node(node("n1", 64)).await;
    let mut ids = Vec::new();
    for n in 0..count {
        ids.push(server.running(asked(&format!("i{n}"))).await.0);
    }
    (ids, n1)
}

fn leaving(server: &Server, node: &NodeId) -> Vec<InstanceId> {
    server.cluster.cache().read(|state| {
        let there = state.instances_on(node);
        there.filter(|r| r.binding.as_ref().is_some_and(|b| b.release)).map(|r| r.id.clone()).collect()
    })
}

async fn operation(server: &Server, id: &str) -> OperationRecord {
    OperationRecord::clone(&*server.cluster.operation(id).await.unwrap())
}

async fn in_state(server: &Server, id: &str, state: OperationState) -> OperationRecord {
    until(state.name(), async || Some(operation(server, id).await).filter(|o| o.state == state)).await
}

/// Lets go on the old node, and run on the new one, whatever is on the move.
async fn carry(server: &Server, from: &NodeId) {
    for id in leaving(server, from) {
        let record = server.get(&id).await;
        assert_eq!(server.report_one(from, gone(&record)).await, Verdict::Accepted);
        let to = server.bound(&id).await;
        let record = server.get(&id).await;
        assert_eq!(server.report_one(&to, report(&record, InstanceState::Running)).await, Verdict::Accepted);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_drain_moves_no_more_at_once_than_it_may_and_ends_when_nothing_is_left() {
    let disk = disk();
    let server = Server::start(&disk.store, config("a")).await;
    let (_, n1) = several(&server, 5).await;
    server.add_node(node("n2", 64)).await;
    let options = DrainOptions::new(false, 2).unwrap();
    let answer = server.cluster.drain_node(&keyed("d", 1), &n1, options).await.unwrap().reply;
    assert_eq!((answer.moving_instance_ids.len(), answer.blockers.len()), (5, 0));
    let id = answer.operation_id.clone();
    let mut rounds = 0;
    loop {
        until("the next two to be told", async || {
            let at_most = leaving(&server, &n1).len();
            assert!(at_most <= 2, "{at_most} are on the move");
            let ended = operation(&server, &id).await.state.is_final();
            (at_most > 0 || ended).then_some(())
        })
        .await;
        if operation(&server, &id).await.state.is_final() {
            break;
        }
        let moving = operation(&server, &id).await;
        assert_eq!((moving.phase.as_str(), moving.total), ("moving", 5));
        // One that has left and does not run elsewhere yet is still on the move.
        let first = leaving(&server, &n1)[0].clone();
        let record = server.get(&first).await;
        server.report_one(&n1, gone(&record)).await;
        let to = server.bound(&first).await;
        tokio::time::sleep(Duration::from_millis(50)).await;
        assert!(leaving(&server, &n1).len() <= 1, "it does not run elsewhere yet");
        let record = server.get(&first).await;
        server.report_one(&to, report(&record, InstanceState::Running)).await;
        carry(&server, &n1).await;
        rounds += 1;
    }
    assert!(rounds >= 2, "{rounds}");
    let ended = in_state(&server, &id, OperationState::Succeeded).await;
    assert_eq!((ended.done, ended.total, ended.finished_at.is_some()), (5, 5, true));
    let node = server.cluster.node(&n1).await.unwrap().0;
    assert_eq!((node.schedulability, &node.drain_operation_id), (Schedulability::Cordoned, &id));
    let again = server.cluster.drain_node(&keyed("d", 1), &n1, options).await.unwrap().reply;
    assert_eq!(again, answer, "the same request has the same answer");
    assert_eq!(code(server.cluster.cancel_operation(&once(), &id).await), ErrorCode::FailedPrecondition);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_blocked_drain_says_by_what_and_a_cancellation_brings_back_what_the_node_was() {
    let disk = disk();
    let server = Server::start(&disk.store, config("a")).await;
    let (ids, n1) = several(&server, 2).await;
    let mut pinned = asked("pinned");
    std::sync::Arc::make_mut(&mut pinned.placement).preferred_node = Some(n1.clone());
    server.running(pinned).await;
    server.cluster.cordon_node(&once(), &n1).await.unwrap();
    let id = server.drain(&n1).await.operation_id;
    // There is no other node, so what is told to leave waits for one.
    until("both to be told", async || (leaving(&server, &n1).len() == 2).then_some(())).await;
    for instance in &ids {
        let record = server.get(instance).await;
        server.report_one(&n1, gone(&record)).await;
    }
    let blocked = until("it to be blocked", async || {
        Some(operation(&server, &id).await).filter(|o| o.phase == "blocked" && o.blockers.len() == 3)
    })
    .await;
    assert_eq!((blocked.state, blocked.done, blocked.total), (OperationState::Running, 0, 3));
    let about = |name: &str| blocked.blockers.iter().find(|b| b.object_name == name).unwrap().reason.clone();
    assert!(about("pinned").contains("may only run on this node"));
    assert!(about("i0").contains("it has left and waits for a node"), "{}", about("i0"));
    // Other options: the same operation goes on.
    let options = DrainOptions::new(true, 7).unwrap();
    let answer = server.cluster.drain_node(&once(), &n1, options).await.unwrap().reply;
    assert_eq!(answer.operation_id, id);
    assert_eq!(operation(&server, &id).await.parameters["max_parallel"], "7");
    let cancelled = server.cluster.cancel_operation(&keyed("c", 1), &id).await.unwrap().reply;
    assert_eq!(cancelled.state(), hv_proto::v1::OperationState::Cancelling);
    assert!(cancelled.parameters.keys().all(|name| !name.starts_with('.')), "{:?}", cancelled.parameters);
    in_state(&server, &id, OperationState::Cancelled).await;
    let node = server.cluster.node(&n1).await.unwrap().0;
    assert_eq!(node.schedulability, Schedulability::Cordoned, "as it was before");
    let again = server.cluster.cancel_operation(&keyed("c", 1), &id).await.unwrap().reply;
    assert_eq!(again, cancelled);
}

#[tokio::test(flavor = "multi_thread")]
async fn uncordoning_ends_a_drain_and_the_next_one_is_another() {
    let disk = disk();
    let server = Server::start(&disk.store, config("a")).await;
    let (_, n1) = several(&server, 1).await;
    let first = server.drain(&n1).await.operation_id;
    server.cluster.uncordon_node(&once(), &n1).await.unwrap();
    let ended = operation(&server, &first).await;
    assert_eq!(ended.state, OperationState::Cancelled);
    assert!(ended.message.contains("uncordoned"), "{}", ended.message);
    let second = server.drain(&n1).await.operation_id;
    assert_ne!(first, second);
    let page = Page::new(1, "", &"operations").unwrap();
    let all = OperationFilter::default();
    let (newest, token, _) = server.cluster.operations(&all, &page).await.unwrap();
    assert_eq!((newest[0].id.as_str(), token.is_empty()), (second.as_str(), false));
    let active = OperationFilter { active_only: true, ..OperationFilter::default() };
    let page = Page::new(10, "", &"operations").unwrap();
    assert_eq!(server.cluster.operations(&active, &page).await.unwrap().0.len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_drain_goes_on_under_the_next_leader() {
    let disk = disk();
    let first = Server::start(&disk.store, config("a")).await;
    let (_, n1) = several(&first, 4).await;
    first.add_node(node("n2", 64)).await;
    let options = DrainOptions::new(false, 1).unwrap();
    let id = first.cluster.drain_node(&once(), &n1, options).await.unwrap().reply.operation_id;
    until("the first to be told", async || (leaving(&first, &n1).len() == 1).then_some(())).await;
    first.kill().await;
    let second = Server::start(&disk.store, config("b")).await;
    until("the end", async || {
        assert!(leaving(&second, &n1).len() <= 1);
        carry(&second, &n1).await;
        operation(&second, &id).await.state.is_final().then_some(())
    })
    .await;
    let ended = operation(&second, &id).await;
    assert_eq!((ended.state, ended.done), (OperationState::Succeeded, 4));
}

#[tokio::test(flavor = "multi_thread")]
async fn ended_operations_are_kept_up_to_a_number_and_an_age() {
    let disk = disk();
    let few = ClusterConfig { operation_limit: 2, ..config("a") };
    let server = Server::idle(&disk.store, few).await;
    let (n1, mut ids) = (server.add_node(node("n1", 4)).await, Vec::new());
    for _ in 0..4 {
        ids.push(server.drain(&n1).await.operation_id);
        server.cluster.uncordon_node(&once(), &n1).await.unwrap();
    }
    let old = OperationRecord {
        finished_at: Some(SystemTime::now() - Duration::from_secs(8 * 24 * 3600)),
        ..operation(&server, &ids[3]).await
    };
    let put = Op::put(server.cluster.keys().operation(&ids[3]), old.encode());
    disk.store.txn(Txn { then: vec![put], ..Txn::default() }).await.unwrap();
    server.cluster.sync().await.unwrap();
    let doomed: Vec<_> =
        server.cluster.kept_no_longer(SystemTime::now()).into_iter().map(|(id, _)| id).collect();
    assert_eq!(doomed, [ids[0].clone(), ids[1].clone(), ids[3].clone()]);
}
