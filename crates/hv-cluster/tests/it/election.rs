//! Claims about who leads.

use hv_store::conformance::etcd_server::{EtcdServer, EtcdVersion};
use hv_store::etcd::EtcdStore;
use hv_store::{Op, SharedStore, Txn, TxnOutcome};

use crate::world::{Server, asked, config, disk, node, until};

async fn exactly_one_leads_and_the_other_takes_over(store: &SharedStore, killed: bool) {
    let mut servers = vec![Server::start(store, config("a")).await, Server::start(store, config("b")).await];
    until("a leader", async || servers.iter().any(Server::leads).then_some(())).await;
    assert_eq!(servers.iter().filter(|server| server.leads()).count(), 1);

    let first = servers.iter().position(Server::leads).unwrap();
    let deposed = servers.remove(first);
    let guard = deposed.election.leadership().borrow().clone().unwrap().guard();
    let name = deposed.cluster.config().server_id.clone();
    assert_eq!(servers[0].election.leader().await.unwrap(), Some(name));
    if killed {
        deposed.kill().await;
    } else {
        deposed.stop().await;
    }
    until("the other to lead", async || servers[0].leads().then_some(())).await;

    let late = Txn { compares: vec![guard], then: vec![Op::put("late", "x")], otherwise_get: Vec::new() };
    assert!(matches!(store.txn(late).await.unwrap(), TxnOutcome::Refused(_)), "a deposed leader wrote");

    // And it does a leader's work.
    servers[0].add_node(node("n1", 4)).await;
    let record = asked("web");
    servers[0].create(record.clone()).await.unwrap();
    servers[0].bound(&record.id).await;
    for server in servers {
        server.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_leader_that_resigns_is_followed_by_the_other() {
    exactly_one_leads_and_the_other_takes_over(&disk().store, false).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_leader_that_is_killed_is_followed_once_its_lease_has_run_out() {
    exactly_one_leads_and_the_other_takes_over(&disk().store, true).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_same_holds_on_etcd() {
    for version in [EtcdVersion::V3_4, EtcdVersion::V3_5] {
        let Some(etcd) = EtcdServer::start(version).await else { continue };
        let store: SharedStore = EtcdStore::connect(etcd.options()).await.unwrap();
        exactly_one_leads_and_the_other_takes_over(&store, true).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_leader_whose_renewals_hang_steps_down_before_its_lease_can_have_ended() {
    let disk = disk();
    let mute = crate::world::Mute::over(&disk.store);
    let store: SharedStore = mute.clone();
    let server = Server::start(&store, config("a")).await;
    until("a leader", async || server.leads().then_some(())).await;
    mute.hang_leases.store(true, std::sync::atomic::Ordering::SeqCst);
    let begin = tokio::time::Instant::now();
    until("it to step down", async || (!server.leads()).then_some(())).await;
    assert!(begin.elapsed() < server.cluster.config().leader_ttl, "{:?}", begin.elapsed());
}
