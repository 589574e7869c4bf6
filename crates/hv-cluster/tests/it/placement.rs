//! Claims about placement.

use std::collections::BTreeMap;

use hv_cluster::reports::Verdict;
use hv_cluster::{Cluster, Mutation};
use hv_proto::{convert, v1};
use hv_store::SharedStore;
use hv_store::conformance::etcd_server::{EtcdServer, EtcdVersion};
use hv_store::etcd::EtcdStore;
use hv_types::instance::Request;
use hv_types::{InstanceRecord, InstanceState, NodeId, Wanted};

use crate::world::{Mute, Server, asked, config, disk, gone, node, report, until, wish};

fn bound_per_node(cluster: &Cluster) -> BTreeMap<String, u32> {
    let mut cores = BTreeMap::new();
    cluster.cache().read(|state| {
        for record in state.instances_after(None) {
            if let Some(node) = record.node_id() {
                *cores.entry(node.to_string()).or_default() += record.spec.cpu_cores;
            }
        }
    });
    cores
}

/// Waits until everything is either bound or says why not.
async fn settled(server: &Server, bound: usize, waiting: usize) -> Vec<InstanceRecord> {
    until("all to be bound or explained", async || {
        server.cluster.sync().await.unwrap();
        server.cluster.cache().read(|state| {
            let explained = |r: &&std::sync::Arc<InstanceRecord>| r.state_reason.starts_with("none of ");
            let unbound: Vec<_> =
                state.unbound().filter(explained).map(|r| InstanceRecord::clone(r)).collect();
            let there = state.instances_after(None).filter(|r| r.binding.is_some()).count();
            (there == bound && unbound.len() == waiting).then_some(unbound)
        })
    })
    .await
}

async fn parallel_creates_fill_the_nodes_and_no_more(store: &SharedStore) {
    let servers = [Server::start(store, config("a")).await, Server::start(store, config("b")).await];
    for n in 0..5 {
        servers[0].add_node(node(&format!("n{n}"), 30)).await;
    }
    let mut creates = tokio::task::JoinSet::new();
    for n in 0..200 {
        let cluster = servers[n % 2].cluster.clone();
        creates.spawn(async move {
            cluster.create_instance(&Mutation::once("create"), asked(&format!("i{n}"))).await.map(|_| ())
        });
    }
    assert!(creates.join_all().await.iter().all(Result::is_ok));

    let waiting = settled(&servers[1], 150, 50).await;
    assert_eq!(bound_per_node(&servers[1].cluster), (0..5).map(|n| (format!("n{n}"), 30)).collect());
    for record in &waiting {
        assert_eq!((record.state, record.wanted), (InstanceState::Pending, Wanted::Running));
        let expected = "none of 5 nodes can take it: 5 with fewer than 1 free cores; free room, ask for less, or add a node";
        assert_eq!(record.state_reason, expected);
    }

    // Room that becomes free is taken without a nudge: 30 by deletions, the rest by a new node.
    let server = &servers[0];
    server.cluster.sync().await.unwrap();
    let victim: NodeId = "n0".parse().unwrap();
    let there: Vec<_> = server.cluster.cache().read(|state| state.instances_on(&victim).cloned().collect());
    for record in &there {
        server.change(&record.id, Request::Delete).await.unwrap();
    }
    for chunk in there.chunks(100) {
        let reports: Vec<_> = chunk.iter().map(|record| gone(record)).collect();
        assert_eq!(server.report(&victim, &reports).await, vec![Verdict::Accepted; reports.len()]);
    }
    settled(server, 150, 20).await;
    server.add_node(node("n9", 20)).await;
    settled(server, 170, 0).await;
    assert!(bound_per_node(&server.cluster).values().all(|cores| *cores <= 30));
    for server in servers {
        server.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn of_200_parallel_creates_through_two_servers_150_are_bound_and_50_wait_with_the_reason() {
    parallel_creates_fill_the_nodes_and_no_more(&disk().store).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn of_200_parallel_creates_150_are_bound_on_etcd() {
    let Some(etcd) = EtcdServer::start(EtcdVersion::V3_5).await else { return };
    let store: SharedStore = EtcdStore::connect(etcd.options()).await.unwrap();
    parallel_creates_fill_the_nodes_and_no_more(&store).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn large_records_are_bound_in_several_transactions() {
    let disk = disk();
    let server = Server::start(&disk.store, config("a")).await;
    for n in 0..12 {
        let mut request = wish(&format!("i{n}"));
        request.spec.as_mut().unwrap().user_data = "#".repeat(250 << 10);
        server.create(convert::create_request_from(request).unwrap()).await.unwrap();
    }
    settled_without_nodes(&server, 12).await;
    server.add_node(node("n1", 12)).await;
    settled(&server, 12, 0).await;
}

async fn settled_without_nodes(server: &Server, count: usize) {
    until("all to say that there is no node", async || {
        server.cluster.sync().await.unwrap();
        let told = server.cluster.cache().read(|state| {
            state.unbound().filter(|r| r.state_reason.starts_with("no node is registered")).count()
        });
        (told == count).then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn each_rule_is_counted_in_the_reason() {
    let disk = disk();
    let server = Server::start(&disk.store, config("a")).await;
    server.add_node(node("n1", 4)).await;
    server.add_node(v1::RegisterNodeRequest { zone: "west".into(), ..node("n2", 4) }).await;
    let cordoned = server.add_node(v1::RegisterNodeRequest { zone: "west".into(), ..node("n3", 4) }).await;
    server.cluster.cordon_node(&Mutation::once("cordon"), &cordoned).await.unwrap();
    let mut request = v1::CreateInstanceRequest { zone: "west".into(), ..wish("web") };
    request.node_selector.insert("disk".into(), "ssd".into());
    let record = convert::create_request_from(request).unwrap();
    server.create(record.clone()).await.unwrap();
    settled(&server, 0, 1).await;
    let reason = server.get(&record.id).await.state_reason.clone();
    let counts = "none of 3 nodes can take it: 1 cordoned or draining, 1 not in zone west, 1 without the labels asked for";
    assert!(reason.starts_with(counts), "{reason}");

    // A node that could help comes.
    let labels = [("disk".to_owned(), "ssd".to_owned())].into();
    let metadata = Some(v1::Metadata { labels, ..v1::Metadata::default() });
    server.add_node(v1::RegisterNodeRequest { zone: "west".into(), metadata, ..node("n4", 4) }).await;
    assert_eq!(server.bound(&record.id).await.as_str(), "n4");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_new_leader_finds_waiting_is_placed() {
    let disk = disk();
    let first = Server::start(&disk.store, config("a")).await;
    let waiting = asked("web");
    first.create(waiting.clone()).await.unwrap();
    settled_without_nodes(&first, 1).await;
    first.kill().await;
    // Nobody leads while the node comes.
    let idle = Server::idle(&disk.store, config("b")).await;
    idle.add_node(node("n1", 1)).await;
    let second = Server::start(&disk.store, config("c")).await;
    assert_eq!(second.bound(&waiting.id).await.as_str(), "n1");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_instance_that_stood_still_is_placed_again_after_a_drain() {
    let disk = disk();
    let server = Server::start(&disk.store, config("a")).await;
    server.add_node(node("n1", 1)).await;
    let (id, first) = server.running(asked("web")).await;
    server.change(&id, Request::Pause).await.unwrap();
    server.report_one(&first, report(&*server.get(&id).await, InstanceState::Paused)).await;
    server.drain(&first).await;
    let leaving = until("the node to be told", async || {
        Some(server.get(&id).await).filter(|record| record.binding.as_ref().is_some_and(|b| b.release))
    })
    .await;
    server.add_node(node("n2", 1)).await;
    assert_eq!(server.report_one(&first, gone(&leaving)).await, Verdict::Accepted);
    assert_eq!(server.bound(&id).await.as_str(), "n2");
    assert_eq!(server.get(&id).await.wanted, Wanted::Paused);
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_bound_to_a_node_that_is_deregistered_meanwhile() {
    let disk = disk();
    let server = Server::start(&disk.store, config("a")).await;
    for round in 0..20 {
        let id = server.add_node(node("n1", 100)).await;
        let (cluster, node) = (server.cluster.clone(), id.clone());
        let creates = tokio::spawn(async move {
            for n in 0..4 {
                let record = asked(&format!("i{round}-{n}"));
                cluster.create_instance(&Mutation::once("create"), record).await.unwrap();
                tokio::task::yield_now().await;
            }
        });
        let cluster = server.cluster.clone();
        let deregistered = cluster.deregister_node(&Mutation::once("deregister"), &node, false).await;
        creates.await.unwrap();
        server.cluster.sync().await.unwrap();
        let there: Vec<_> = server.cluster.cache().read(|state| state.instances_on(&id).cloned().collect());
        match deregistered {
            Ok(()) => assert!(there.is_empty(), "{} instances are bound to no node", there.len()),
            Err(refusal) => {
                assert!(!there.is_empty(), "{refusal}");
                let open = server.cluster.node(&id).await.unwrap().0.schedulability;
                assert_eq!(
                    open,
                    hv_types::node::Schedulability::Open,
                    "a refused deregistration left its mark"
                );
            }
        }
        // Empty the cluster for the next round.
        let all: Vec<_> = server.cluster.cache().read(|state| state.instances_after(None).cloned().collect());
        for record in all {
            let _ = server.change(&record.id, Request::Delete).await;
            let now = server.cluster.instance(&record.id).await;
            if let Ok(now) = now {
                server.report_one(&id, gone(&now)).await;
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_binding_that_arrives_after_its_node_was_deregistered_is_refused() {
    let disk = disk();
    let mute = Mute::over(&disk.store);
    let store: SharedStore = mute.clone();
    let server = Server::start(&store, config("a")).await;
    until("a leader", async || server.leads().then_some(())).await;
    let id = server.add_node(node("n1", 4)).await;
    let gate = mute.leader_gate.write().await;
    let before = mute.txns.load(std::sync::atomic::Ordering::SeqCst);
    let record = asked("web");
    let (cluster, wanted) = (server.cluster.clone(), record.clone());
    let create =
        tokio::spawn(async move { cluster.create_instance(&Mutation::once("create"), wanted).await });
    // The create binds at once, and waits at the gate.
    until("the binding to be under way", async || {
        (mute.txns.load(std::sync::atomic::Ordering::SeqCst) > before).then_some(())
    })
    .await;
    server.cluster.deregister_node(&Mutation::once("deregister"), &id, false).await.unwrap();
    drop(gate);
    assert_eq!(create.await.unwrap().unwrap().reply.node_id, "");
    settled_without_nodes(&server, 1).await;
    assert_eq!(server.get(&record.id).await.node_id(), None);
}
