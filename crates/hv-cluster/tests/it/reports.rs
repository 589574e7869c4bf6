//! Claims about what nodes report.

use hv_cluster::reports::{Report, Verdict};
use hv_store::{Op, Txn};
use hv_types::instance::Request;
use hv_types::{ErrorCode, InstanceId, InstanceState, NodeId, Wanted};

use crate::world::{Disk, Server, asked, at_epoch, code, config, disk, dump, gone, node, report, until};

async fn one_running() -> (Disk, Server, InstanceId, NodeId) {
    let disk = disk();
    let server = Server::start(&disk.store, config("a")).await;
    server.add_node(node("n1", 40)).await;
    let (id, node) = server.running(asked("web")).await;
    (disk, server, id, node)
}

#[tokio::test(flavor = "multi_thread")]
async fn only_the_epoch_and_the_node_of_the_record_count() {
    let (disk, server, id, node) = one_running().await;
    let record = server.get(&id).await;
    let before = dump(&disk.store).await;
    let failed = || report(&record, InstanceState::Failed);
    let other: NodeId = "n2".parse().unwrap();
    let unknown = Report { id: InstanceId::generate(), ..failed() };
    assert_eq!(server.report_one(&node, at_epoch(failed(), 0)).await, Verdict::Release, "a stale epoch");
    assert_eq!(server.report_one(&other, failed()).await, Verdict::Release, "another node");
    assert_eq!(server.report_one(&node, unknown).await, Verdict::Release, "an unknown instance");
    assert_eq!(server.report_one(&node, at_epoch(failed(), 2)).await, Verdict::Retry, "an epoch never given");
    assert_eq!(
        server.report_one(&node, gone(&record)).await,
        Verdict::Retry,
        "gone, but nobody asked for it"
    );
    assert_eq!(dump(&disk.store).await, before);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_record_that_cannot_be_read_costs_no_instance_its_life() {
    let (disk, server, id, node) = one_running().await;
    let record = server.get(&id).await;
    let newer = Op::put(server.cluster.keys().instance(&id), "\u{7f}not ours");
    disk.store.txn(Txn { then: vec![newer], ..Txn::default() }).await.unwrap();
    assert_eq!(server.report_one(&node, report(&record, InstanceState::Running)).await, Verdict::Retry);
    // Also by a server that never saw what it was before.
    let fresh = Server::idle(&disk.store, config("b")).await;
    assert_eq!(fresh.report_one(&node, report(&record, InstanceState::Running)).await, Verdict::Retry);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_report_of_before_the_latest_request_does_not_hide_it() {
    let (_disk, server, id, node) = one_running().await;
    let before = server.get(&id).await;
    server.change(&id, Request::Stop).await.unwrap();
    let late = Report { ip_address: "10.0.0.7".into(), ..report(&before, InstanceState::Running) };
    assert_eq!(server.report_one(&node, late).await, Verdict::Accepted);
    let now = server.get(&id).await;
    assert_eq!((now.state, now.state_reason.as_str()), (InstanceState::Stopping, "stop asked for"));
    assert_eq!(now.ip_address, "10.0.0.7");
    assert!(!now.is_settled());
    server.report_one(&node, report(&now, InstanceState::Stopped)).await;
    // And one that claims to know more than was ever asked is cut down to what was.
    let now = server.get(&id).await;
    assert!(now.is_settled());
    let ahead =
        Report { observed_generation: 99, reason: "other".into(), ..report(&now, InstanceState::Stopped) };
    server.report_one(&node, ahead).await;
    assert_eq!(server.get(&id).await.observed_generation, now.generation);
}

#[tokio::test(flavor = "multi_thread")]
async fn while_it_is_being_deleted_it_stays_so_until_it_is_gone() {
    let (disk, server, id, node) = one_running().await;
    server.change(&id, Request::Delete).await.unwrap();
    let record = server.get(&id).await;
    assert_eq!(record.state, InstanceState::Deleting);
    server.report_one(&node, report(&record, InstanceState::Running)).await;
    assert_eq!(server.get(&id).await.state, InstanceState::Deleting);
    server.report_one(&node, report(&record, InstanceState::Failed)).await;
    assert_eq!(server.get(&id).await.state, InstanceState::Failed, "a deletion that fails is seen");
    assert_eq!(server.report_one(&node, gone(&record)).await, Verdict::Accepted);
    assert_eq!(code(server.cluster.instance(&id).await), ErrorCode::NotFound);
    assert_eq!(server.report_one(&node, gone(&record)).await, Verdict::Release, "said again");
    let left = dump(&disk.store).await;
    assert!(left.iter().all(|kv| !kv.key.starts_with(b"/hypervisor/names/")), "its name is free again");
}

#[tokio::test(flavor = "multi_thread")]
async fn many_reports_of_one_call_each_get_their_verdict() {
    let disk = disk();
    let server = Server::start(&disk.store, config("a")).await;
    let node = server.add_node(node("n1", 100)).await;
    let mut ids = Vec::new();
    for n in 0..70 {
        let record = asked(&format!("i{n}"));
        ids.push(record.id.clone());
        server.create(record).await.unwrap();
    }
    for id in &ids {
        server.bound(id).await;
    }
    let mut reports = Vec::new();
    for id in &ids {
        reports.push(report(&*server.get(id).await, InstanceState::Running));
    }
    // The same instance twice: one of them has to come again.
    reports.insert(1, Report { state: InstanceState::Starting, ..reports[0].clone() });
    let mut expected = vec![Verdict::Accepted; 71];
    expected[1] = Verdict::Retry;
    assert_eq!(server.report(&node, &reports).await, expected);
    for id in &ids {
        assert_eq!(server.get(id).await.state, InstanceState::Running);
    }
    let many = vec![reports[0].clone(); 101];
    assert_eq!(
        code(server.cluster.report(&server.cluster.id(), &node, &many).await),
        ErrorCode::InvalidArgument
    );
    let other = hv_types::ClusterId::generate();
    assert_eq!(code(server.cluster.report(&other, &node, &[]).await), ErrorCode::FailedPrecondition);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_stopped_before_it_was_moved_is_settled_without_a_node() {
    let (_disk, server, id, node) = one_running().await;
    server.change(&id, Request::Stop).await.unwrap();
    server.drain(&node).await;
    let leaving = until("the node to be told", async || {
        Some(server.get(&id).await).filter(|record| record.binding.as_ref().is_some_and(|b| b.release))
    })
    .await;
    assert_eq!(server.report_one(&node, gone(&leaving)).await, Verdict::Accepted);
    let now = server.get(&id).await;
    assert_eq!((now.state, now.wanted, now.node_id()), (InstanceState::Stopped, Wanted::Stopped, None));
    assert!(now.is_settled(), "nobody would ever finish the stop");
    server.change(&id, Request::Start).await.unwrap();
    assert_eq!(server.get(&id).await.state, InstanceState::Pending);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_restored_store_may_not_know_of_is_left_alone_and_told_of_once() {
    let (disk, server, id, node) = one_running().await;
    let known = server.get(&id).await;
    let unknown = |id: InstanceId| Report { id, ..report(&known, InstanceState::Running) };
    let (before, odd) = (InstanceId::generate(), "no-uuid".parse::<InstanceId>().unwrap());
    assert_eq!(server.report_one(&node, unknown(InstanceId::generate())).await, Verdict::Release);
    let key = server.cluster.keys().cluster();
    let kv = hv_store::StoreExt::get(&*disk.store, key.clone()).await.unwrap().unwrap();
    let mut record: hv_proto::store::ClusterRecord = hv_store::record::decode_message(&kv).unwrap();
    let restored_at = std::time::SystemTime::now() + std::time::Duration::from_millis(2);
    record.restored_at = Some(hv_proto::convert::to_timestamp(restored_at));
    hv_store::StoreExt::put(&*disk.store, key, hv_store::record::encode_message(&record)).await.unwrap();
    server.cluster.sync().await.unwrap();
    tokio::time::sleep(std::time::Duration::from_millis(10)).await;
    for _ in 0..3 {
        assert_eq!(server.report_one(&node, unknown(before.clone())).await, Verdict::Retry);
    }
    assert_eq!(server.report_one(&node, unknown(odd)).await, Verdict::Retry, "its age is not known");
    // What was made afterwards would be in the records.
    assert_eq!(server.report_one(&node, unknown(InstanceId::generate())).await, Verdict::Release);
    let told = crate::world::until("the events", async || {
        let told = server.cluster.cache().read(|state| {
            let events = state.events_before(None).filter(|event| event.reason == "OrphanInstance");
            events.map(|event| event.message.clone()).collect::<Vec<_>>()
        });
        (told.len() >= 2).then_some(told)
    })
    .await;
    assert_eq!(told.iter().filter(|message| message.contains(before.as_str())).count(), 1, "{told:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_that_reports_while_it_reports_is_told_to_come_again() {
    let (_disk, server, id, node) = one_running().await;
    let record = server.get(&id).await;
    let mut calls = tokio::task::JoinSet::new();
    for n in 0..50 {
        let (cluster, node) = (server.cluster.clone(), node.clone());
        // Each has something to write, so that it takes a while.
        let reports = vec![Report { reason: format!("{n}"), ..report(&record, InstanceState::Running) }];
        calls.spawn(async move { cluster.report(&cluster.id(), &node, &reports).await.unwrap()[0] });
    }
    let verdicts = calls.join_all().await;
    assert!(verdicts.contains(&Verdict::Accepted) && verdicts.contains(&Verdict::Retry), "{verdicts:?}");
    assert!(!verdicts.contains(&Verdict::Release));
}
