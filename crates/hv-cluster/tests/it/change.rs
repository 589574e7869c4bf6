//! Claims about changes of what is wanted.

use std::collections::BTreeMap;
use std::time::Duration;

use hv_cluster::{ClusterConfig, Mutation};
use hv_store::record::Record;
use hv_store::{Op, StoreExt, Txn};
use hv_types::instance::{Binding, Request, StopOptions};
use hv_types::node::Schedulability;
use hv_types::{ErrorCode, InstanceId, InstanceRecord, InstanceState, Metadata, NodeId, Revision, Wanted};

use crate::world::{Server, asked, code, config, disk, gone, node, report, until};

#[tokio::test(flavor = "multi_thread")]
async fn every_request_in_every_state_leaves_a_consistent_record() {
    let disk = disk();
    let server = Server::idle(&disk.store, config("a")).await;
    let home = server.add_node(node("n1", 1000)).await;
    for wanted in [Wanted::Running, Wanted::Stopped, Wanted::Paused, Wanted::Deleted] {
        for state in InstanceState::ALL {
            for request in Request::ALL {
                for bound in [true, false] {
                    let seed = InstanceRecord { wanted, state, generation: 3, ..asked("web") };
                    let binding = bound.then(|| Binding { node_id: home.clone(), release: false });
                    one_request(&server, &InstanceRecord { binding, ..seed }, request).await;
                }
            }
        }
    }
}

async fn one_request(server: &Server, before: &InstanceRecord, request: Request) {
    let what =
        format!("{request:?} of {:?}/{} bound: {}", before.wanted, before.state, before.binding.is_some());
    let keys = server.cluster.keys();
    let (key, name) = (keys.instance(&before.id), keys.instance_name(&before.project, &before.name));
    let seed = vec![Op::put(key.clone(), before.encode()), Op::put(name.clone(), before.id.to_string())];
    server.cluster.store().txn(Txn { then: seed, ..Txn::default() }).await.unwrap();
    let outcome = server.change(&before.id, request).await;
    match server.cluster.instance(&before.id).await {
        Err(error) => {
            assert_eq!(error.code(), ErrorCode::NotFound);
            assert!(request == Request::Delete && before.binding.is_none(), "{what}: it vanished");
            assert!(
                server.cluster.store().get(name).await.unwrap().is_none(),
                "{what}: its name is still taken"
            );
            outcome.unwrap();
            return;
        }
        Ok(after) if outcome.is_err() => {
            assert_eq!(after.generation, before.generation, "{what}: refused, and changed");
            assert_eq!(code(outcome), ErrorCode::FailedPrecondition);
        }
        Ok(after) => {
            let changed = after.generation > before.generation;
            assert_eq!(after.generation - before.generation, u64::from(changed), "{what}");
            assert_eq!(
                after.wanted == Wanted::Deleted,
                before.wanted == Wanted::Deleted || request == Request::Delete
            );
            assert_eq!((&after.binding, after.epoch), (&before.binding, before.epoch), "{what}");
            if changed && after.binding.is_some() {
                assert!(!after.is_settled(), "{what}: it looks done before its node knows");
            } else if changed {
                // Nobody else would ever bring it further.
                let to_run = matches!(after.wanted, Wanted::Running | Wanted::Paused);
                let placer_has_it = to_run && after.state == InstanceState::Pending;
                assert!(placer_has_it || after.is_settled(), "{what}: {:?}/{}", after.wanted, after.state);
            }
            assert_eq!(
                after.restart_generation == after.generation,
                changed && request == Request::Restart,
                "{what}"
            );
            assert_eq!(
                outcome.unwrap().revision == 0,
                changed,
                "{what}: 0 stands for the revision of the change"
            );
        }
    }
    let both = vec![Op::delete(key), Op::delete(name)];
    server.cluster.store().txn(Txn { then: both, ..Txn::default() }).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn parallel_requests_for_one_instance_are_all_answered_and_none_is_lost() {
    let disk = disk();
    let server = Server::idle(&disk.store, config("a")).await;
    let record = asked("web");
    server.create(record.clone()).await.unwrap();
    let mut calls = tokio::task::JoinSet::new();
    for n in 0..8 {
        let (cluster, id) = (server.cluster.clone(), record.id.clone());
        calls.spawn(async move {
            let label = [(format!("k{n}"), "v".to_owned())].into();
            let metadata = Metadata { labels: label, ..Metadata::default() };
            cluster.update_metadata(&Mutation::once("label"), &id, metadata, None).await.unwrap().revision
        });
    }
    let revisions: std::collections::BTreeSet<_> = calls.join_all().await.into_iter().collect();
    assert_eq!(revisions.len(), 8, "each change has a revision of its own");
    let now = server.get(&record.id).await;
    assert_eq!(Some(&now.revision), revisions.last());

    let once = Mutation::once("label");
    let first = revisions.first().copied();
    let refusal =
        server.cluster.update_metadata(&once, &record.id, Metadata::default(), first).await.unwrap_err();
    assert_eq!(refusal.code(), ErrorCode::Conflict);
    let expected =
        format!("instance web is at revision {}, not at {}; ", now.revision, revisions.first().unwrap());
    assert!(refusal.to_string().starts_with(&expected), "{refusal}");
    let current = server
        .cluster
        .update_metadata(&Mutation::once("label"), &record.id, Metadata::default(), Some(now.revision))
        .await
        .unwrap();
    assert!(current.revision > now.revision && current.reply.revision == Revision::default().0);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_on_a_dead_node_goes_by_force_only() {
    let disk = disk();
    let short = ClusterConfig { heartbeat_timeout: Duration::from_secs(1), ..config("a") };
    let server = Server::start(&disk.store, short).await;
    let home = server.add_node(node("n1", 4)).await;
    let (id, _) = server.running(asked("web")).await;
    until("the node to be lost", async || {
        (!server.cluster.cache().read(|state| state.node(&home).unwrap().is_live())).then_some(())
    })
    .await;
    server.change(&id, Request::Delete).await.unwrap();
    let there = server.get(&id).await;
    assert_eq!((there.state, there.wanted), (InstanceState::Deleting, Wanted::Deleted));
    let by_force = StopOptions { force: true, ..StopOptions::default() };
    let once = Mutation::once("delete");
    server.cluster.change_instance(&once, &id, Request::Delete, by_force).await.unwrap();
    assert_eq!(code(server.cluster.instance(&id).await), ErrorCode::NotFound);
    // The node that comes back is told to give it up.
    server.add_node(node("n1", 4)).await;
    assert_eq!(
        server.report_one(&home, report(&there, InstanceState::Running)).await,
        hv_cluster::reports::Verdict::Release
    );
}

async fn drain(server: &Server, id: &NodeId, wanted: Schedulability) {
    let once = Mutation::once("drain");
    server.cluster.update_node_status(&once, id, Some(wanted), &[]).await.unwrap();
}

async fn told_to_leave(server: &Server, id: &InstanceId) -> bool {
    server.get(id).await.binding.as_ref().is_some_and(|binding| binding.release)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_drain_moves_what_it_can_and_names_what_stays() {
    let disk = disk();
    let server = Server::start(&disk.store, config("a")).await;
    server.add_node(node("n1", 10)).await;
    let (movable, n1) = server.running(asked("movable")).await;
    let mut pinned = asked("pinned");
    std::sync::Arc::make_mut(&mut pinned.placement).preferred_node = Some(n1.clone());
    let (pinned, _) = server.running(pinned).await;
    let mut disks = asked("disks");
    std::sync::Arc::make_mut(&mut disks.spec).disks =
        vec![hv_types::DiskSpec { name: "data".into(), size_bytes: 1, ..hv_types::DiskSpec::default() }];
    let (disks, _) = server.running(disks).await;

    drain(&server, &n1, Schedulability::Draining).await;
    let (moving, blockers) = server.cluster.cache().read(|state| {
        let node = state.node(&n1).unwrap().record.clone().unwrap();
        hv_cluster::nodes::outlook(state, &node)
    });
    assert_eq!(moving, std::slice::from_ref(&movable));
    let reasons: BTreeMap<_, _> = blockers.iter().map(|b| (b.id.clone(), b.reason.as_str())).collect();
    assert!(reasons[&pinned].contains("may only run on this node"));
    assert!(reasons[&disks].contains("--discard-local-disks"));
    until("the movable one to be told", async || told_to_leave(&server, &movable).await.then_some(())).await;

    // The operator thinks better of it. What was told to leave leaves, and comes back here as there is no other node.
    drain(&server, &n1, Schedulability::Open).await;
    assert!(!told_to_leave(&server, &disks).await);
    let leaving = server.get(&movable).await;
    server.report_one(&n1, report(&leaving, InstanceState::Running)).await;
    server.report_one(&n1, gone(&leaving)).await;
    assert_eq!(server.bound(&movable).await, n1);
    let back = server.get(&movable).await;
    assert!(back.epoch > leaving.epoch && !told_to_leave(&server, &movable).await);
    // A late word of its former life changes nothing.
    assert_eq!(server.report_one(&n1, gone(&leaving)).await, hv_cluster::reports::Verdict::Release);
    assert_eq!(server.get(&movable).await.binding, back.binding);

    // It can be deleted while it is told to leave.
    drain(&server, &n1, Schedulability::Draining).await;
    until("it to be told again", async || told_to_leave(&server, &movable).await.then_some(())).await;
    server.change(&movable, Request::Delete).await.unwrap();
    let leaving = server.get(&movable).await;
    server.report_one(&n1, gone(&leaving)).await;
    assert_eq!(code(server.cluster.instance(&movable).await), ErrorCode::NotFound);
}
