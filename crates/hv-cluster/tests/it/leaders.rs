//! Claims about placement where leaders change, nodes are closed, and instances give way.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use hv_cluster::{Cluster, ClusterConfig, Mutation};
use hv_proto::{convert, v1};
use hv_types::InstanceRecord;
use hv_types::instance::Request;

use crate::world::{Mute, Server, asked, config, disk, gone, node, until, wish};

fn cores_per_node(cluster: &Cluster) -> BTreeMap<String, u32> {
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

fn ranked(name: &str, priority: i32) -> InstanceRecord {
    let mut record = asked(name);
    Arc::make_mut(&mut record.placement).priority = priority;
    record
}

#[tokio::test(flavor = "multi_thread")]
async fn a_deposed_leader_that_does_not_know_it_never_overcommits() {
    let disk = disk();
    let mute = Mute::over(&disk.store);
    let store: hv_store::SharedStore = mute.clone();
    let old = Server::start(&store, config("old")).await;
    until("a leader", async || old.leads().then_some(())).await;
    for id in ["n1", "n2"] {
        old.add_node(node(id, 10)).await;
    }
    // The old leader's decisions hang on the way until somebody else leads.
    let gate = mute.leader_gate.write().await;
    let mut creates = tokio::task::JoinSet::new();
    for n in 0..15 {
        let cluster = old.cluster.clone();
        creates.spawn(async move {
            cluster.create_instance(&Mutation::once("create"), asked(&format!("old{n}"))).await.map(|_| ())
        });
    }
    tokio::time::sleep(Duration::from_millis(200)).await;
    // Its key goes as if its lease had run out.
    disk.store
        .txn(hv_store::Txn {
            then: vec![hv_store::Op::delete(old.cluster.keys().leader("scheduler"))],
            ..hv_store::Txn::default()
        })
        .await
        .unwrap();
    let new = Server::start(&disk.store, config("new")).await;
    until("the new leader", async || new.leads().then_some(())).await;
    for n in 0..15 {
        new.create(asked(&format!("new{n}"))).await.unwrap();
    }
    drop(gate);
    assert!(creates.join_all().await.iter().all(Result::is_ok), "a create was refused");
    until("the nodes to be full", async || {
        new.cluster.sync().await.unwrap();
        (cores_per_node(&new.cluster).values().sum::<u32>() == 20).then_some(())
    })
    .await;
    assert!(cores_per_node(&new.cluster).values().all(|cores| *cores == 10));
    let waiting = new.cluster.cache().read(|state| state.unbound().count());
    assert_eq!(waiting, 10);
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_lands_on_a_node_after_its_cordon_was_acknowledged() {
    let disk = disk();
    let server = Server::start(&disk.store, config("a")).await;
    server.add_node(node("n1", 10_000)).await;
    let id = "n1".parse().unwrap();
    for round in 0..20 {
        let mut creates = tokio::task::JoinSet::new();
        for n in 0..20 {
            let cluster = server.cluster.clone();
            creates.spawn(async move {
                let name = format!("i{round}-{n}");
                cluster.create_instance(&Mutation::once("create"), asked(&name)).await.unwrap();
            });
        }
        let closed = Some(hv_types::node::Schedulability::Cordoned);
        server
            .cluster
            .update_node_status(&hv_cluster::Mutation::once("schedule"), &id, closed, &[])
            .await
            .unwrap();
        let at = server.cluster.node(&id).await.unwrap().0.revision;
        creates.join_all().await;
        server.cluster.sync().await.unwrap();
        let late: Vec<_> = server
            .cluster
            .cache()
            .read(|state| state.instances_on(&id).filter(|record| record.revision > at).cloned().collect());
        assert!(late.is_empty(), "{} instances were bound after the cordon", late.len());
        let open = Some(hv_types::node::Schedulability::Open);
        server
            .cluster
            .update_node_status(&hv_cluster::Mutation::once("schedule"), &id, open, &[])
            .await
            .unwrap();
        until("all to be bound", async || {
            server.cluster.sync().await.unwrap();
            server.cluster.cache().read(|state| state.unbound().next().is_none()).then_some(())
        })
        .await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_next_placement_comes_within_the_leaders_ttl_and_a_second() {
    let disk = disk();
    let ttl = Duration::from_secs(5);
    let config = |name: &str| ClusterConfig { leader_ttl: ttl, ..config(name) };
    let leader = Server::start(&disk.store, config("a")).await;
    until("a leader", async || leader.leads().then_some(())).await;
    let follower = Server::start(&disk.store, config("b")).await;
    follower.add_node(node("n1", 100)).await;
    // A create through the one that does not lead is placed by the one that does.
    let first = asked("first");
    follower.create(first.clone()).await.unwrap();
    follower.bound(&first.id).await;
    leader.kill().await;
    let killed = tokio::time::Instant::now();
    let waiting = asked("waiting");
    let answer = follower.create(waiting.clone()).await.unwrap();
    assert_eq!(answer.node_id, "", "nobody leads yet");
    assert!(killed.elapsed() < ttl / 2, "a create waited for a leader");
    follower.bound(&waiting.id).await;
    let took = killed.elapsed();
    assert!(took <= ttl + Duration::from_secs(1), "the next placement took {took:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn ten_thousand_nodes_take_what_is_asked_for_where_it_may_go() {
    let disk = disk();
    // Nobody sends heartbeats here.
    let heartbeat_timeout = Duration::from_secs(3600);
    let server = Server::start(&disk.store, ClusterConfig { heartbeat_timeout, ..config("a") }).await;
    let mut adds = tokio::task::JoinSet::new();
    for worker in 0..16 {
        let cluster = server.cluster.clone();
        adds.spawn(async move {
            for n in (worker..10_000).step_by(16) {
                let zone = format!("z{}", n % 100);
                let one = v1::RegisterNodeRequest { zone, ..node(&format!("n{n:05}"), 4) };
                let record = convert::node_from_registration(one).unwrap();
                cluster.register_node(None, record).await.unwrap();
            }
        });
    }
    adds.join_all().await;
    until("a leader", async || server.leads().then_some(())).await;
    server.cluster.sync().await.unwrap();
    let request = v1::CreateInstanceRequest { zone: "z42".into(), ..wish("web") };
    let template = convert::create_request_from(request).unwrap();
    for round in 0..5 {
        let template = InstanceRecord { name: format!("web{round}"), ..template.clone() };
        server.cluster.create_instances(&Mutation::once("creates"), template, 100).await.unwrap();
    }
    // A hundred nodes of four cores each.
    until("400 to be bound and 100 to say why not", async || {
        server.cluster.sync().await.unwrap();
        server.cluster.cache().read(|state| {
            let explained = |r: &&Arc<InstanceRecord>| r.state_reason.starts_with("none of 10000 nodes");
            let bound = state.instances_after(None).filter(|r| r.binding.is_some()).count();
            (bound == 400 && state.unbound().filter(explained).count() == 100).then_some(())
        })
    })
    .await;
    let used = cores_per_node(&server.cluster);
    assert!(used.len() == 100 && used.values().all(|cores| *cores == 4), "{used:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_lower_priority_gives_way_only_where_the_operator_allows_it() {
    for allowed in [false, true] {
        let disk = disk();
        let server = Server::start(&disk.store, ClusterConfig { preemption: allowed, ..config("a") }).await;
        server.add_node(node("n1", 2)).await;
        let (low, n1) = server.running(ranked("low", 1)).await;
        let (high, _) = server.running(ranked("high", 9)).await;
        let urgent = ranked("urgent", 5);
        server.create(urgent.clone()).await.unwrap();
        if !allowed {
            until("the reason", async || {
                Some(server.get(&urgent.id).await).filter(|r| r.state_reason.starts_with("none of 1 nodes"))
            })
            .await;
            assert!(!server.get(&low).await.binding.as_ref().unwrap().release);
            continue;
        }
        let leaving = until("the lowest to be told to go", async || {
            Some(server.get(&low).await).filter(|r| r.binding.as_ref().is_some_and(|b| b.release))
        })
        .await;
        assert!(leaving.state_reason.contains("urgent"), "{}", leaving.state_reason);
        assert_eq!(server.get(&urgent.id).await.node_id(), None, "bound before there is room");
        server.report_one(&n1, gone(&leaving)).await;
        assert_eq!(server.bound(&urgent.id).await, n1);
        assert!(server.get(&low).await.binding.is_none());
        assert!(!server.get(&high).await.binding.as_ref().unwrap().release);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_that_comes_and_goes_does_not_have_all_that_waits_written_anew() {
    let disk = disk();
    let mute = Mute::over(&disk.store);
    let store: hv_store::SharedStore = mute.clone();
    let server = Server::start(&store, config("a")).await;
    until("a leader", async || server.leads().then_some(())).await;
    server.add_node(node("n1", 1)).await;
    server.running(asked("there")).await;
    for set in 0..20 {
        let template = asked(&format!("wait{set}"));
        server.cluster.create_instances(&Mutation::once("creates"), template, 100).await.unwrap();
    }
    until("all to say why they wait", async || {
        server.cluster.sync().await.unwrap();
        let explained = |r: &&Arc<InstanceRecord>| r.state_reason.starts_with("none of 1 nodes");
        let count = server.cluster.cache().read(|state| state.unbound().filter(explained).count());
        (count == 2000).then_some(())
    })
    .await;
    let before = server.cluster.sync().await.unwrap();
    let id = "n1".parse().unwrap();
    for _ in 0..5 {
        for wanted in [hv_types::node::Schedulability::Cordoned, hv_types::node::Schedulability::Open] {
            server
                .cluster
                .update_node_status(&hv_cluster::Mutation::once("schedule"), &id, Some(wanted), &[])
                .await
                .unwrap();
        }
    }
    tokio::time::sleep(Duration::from_secs(1)).await;
    server.cluster.sync().await.unwrap();
    let written = server
        .cluster
        .cache()
        .read(|state| state.unbound().filter(|record| record.revision > before).count());
    assert!(written <= 200, "{written} records were written for a node that came and went");
    let one = server.cluster.cache().read(|state| state.unbound().next().map(|r| r.id.clone())).unwrap();
    server.change(&one, Request::Delete).await.unwrap();
}
