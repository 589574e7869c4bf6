//! Claims about creating many instances alike.

use hv_cluster::{Done, Error, Mutation};
use hv_proto::v1;
use hv_store::SharedStore;
use hv_store::conformance::etcd_server::{EtcdServer, EtcdVersion};
use hv_store::etcd::EtcdStore;
use hv_types::instance::Request;
use hv_types::{ErrorCode, InstanceId, InstanceRecord};

use crate::world::{Mute, Server, asked, code, config, disk, dump, gone, keyed, node, until};

type Created = Done<v1::CreateInstancesResponse>;

async fn set(server: &Server, name: &str, count: usize) -> Result<Created, Error> {
    server.cluster.create_instances(&Mutation::once("creates"), asked(name), count).await
}

async fn leading(store: &SharedStore) -> Server {
    let server = Server::start(store, config("a")).await;
    until("a leader that places", async || server.leads().then_some(())).await;
    server
}

fn ids(created: &Created) -> Vec<InstanceId> {
    created.reply.instances.iter().map(|made| made.id.parse().unwrap()).collect()
}

async fn forget(server: &Server, id: &InstanceId) {
    server.change(id, Request::Delete).await.unwrap();
    if let Ok(record) = server.cluster.instance(id).await
        && let Some(node) = record.node_id()
    {
        server.report_one(node, gone(&record)).await;
    }
}

async fn a_set_of_100(store: &SharedStore) {
    let server = leading(store).await;
    for n in 0..5 {
        server.add_node(node(&format!("n{n}"), 30)).await;
    }
    let first = until("a set that is bound at once", async || {
        let created = set(&server, &format!("s{}", hv_types::RequestKey::generate()), 1).await.unwrap();
        Some(created).filter(|created| !created.reply.instances[0].node_id.is_empty())
    })
    .await;
    assert!(first.fresh);
    let created = set(&server, "web", 100).await.unwrap();
    let names: Vec<_> = created.reply.instances.iter().map(|made| made.name.clone()).collect();
    assert_eq!(names, (1..=100).map(|n| format!("web-{n}")).collect::<Vec<_>>());
    server.cluster.sync().await.unwrap();
    server.cluster.cache().read(|state| {
        for (id, made) in ids(&created).iter().zip(&created.reply.instances) {
            let record = state.instance(id).unwrap();
            assert_eq!((&*record.set, record.revision), ("web", created.revision));
            assert_eq!(record.node_id().map(ToString::to_string).unwrap_or_default(), made.node_id);
        }
    });
    assert!(
        created.reply.instances.iter().all(|made| !made.node_id.is_empty()),
        "room for 150, bound at once"
    );
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_set_of_100_is_recorded_and_bound_in_one_revision() {
    a_set_of_100(&disk().store).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_set_of_100_is_one_transaction_of_etcd_too() {
    let Some(etcd) = EtcdServer::start(EtcdVersion::V3_5).await else { return };
    let store: SharedStore = EtcdStore::connect(etcd.options()).await.unwrap();
    a_set_of_100(&store).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_set_owns_its_numbered_names_and_finds_them_taken_both_ways() {
    let disk = disk();
    let server = leading(&disk.store).await;
    server.create(asked("web-7")).await.unwrap();
    let before = dump(&disk.store).await;
    let refusal = set(&server, "web", 3).await.unwrap_err();
    assert_eq!(refusal.code(), ErrorCode::AlreadyExists);
    assert!(refusal.to_string().starts_with("name web-7 is taken"), "{refusal}");
    assert_eq!(dump(&disk.store).await, before, "a refused set left something");

    set(&server, "db", 3).await.unwrap();
    let refusal = server.create(asked("db-9")).await.unwrap_err();
    assert_eq!(refusal.code(), ErrorCode::AlreadyExists);
    assert!(refusal.to_string().starts_with("name db-9 belongs to the set db"), "{refusal}");
    assert_eq!(code(server.create(asked("db-2")).await), ErrorCode::AlreadyExists);
    assert_eq!(code(set(&server, "db", 1).await), ErrorCode::AlreadyExists);
    // What only looks like it is not meant; nor is another project.
    server.create(asked("db")).await.unwrap();
    server.create(asked("db-x")).await.unwrap();
    server.create(InstanceRecord { project: "other".into(), ..asked("db-9") }).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn the_names_of_a_set_are_free_once_its_last_member_is_gone() {
    let disk = disk();
    let server = leading(&disk.store).await;
    let members = ids(&set(&server, "web", 3).await.unwrap());
    forget(&server, &members[1]).await;
    assert_eq!(code(server.create(asked("web-2")).await), ErrorCode::AlreadyExists);
    forget(&server, &members[0]).await;
    assert_eq!(code(set(&server, "web", 3).await), ErrorCode::AlreadyExists);
    forget(&server, &members[2]).await;
    // At once, whether the leader has swept the name yet or not.
    let again = set(&server, "web", 2).await.unwrap();
    for id in ids(&again) {
        forget(&server, &id).await;
    }
    server.create(asked("web-1")).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_set_without_members_is_swept_also_by_the_next_leader() {
    let disk = disk();
    let server = leading(&disk.store).await;
    let swept = async |server: &Server, name: &str| {
        until("the set to be swept", async || {
            server.cluster.sync().await.unwrap();
            server.cluster.cache().read(|state| !state.has_set("default", name)).then_some(())
        })
        .await;
    };
    for id in ids(&set(&server, "web", 5).await.unwrap()) {
        forget(&server, &id).await;
    }
    swept(&server, "web").await;
    let members = ids(&set(&server, "db", 5).await.unwrap());
    server.kill().await;
    let idle = Server::idle(&disk.store, config("b")).await;
    for id in &members {
        forget(&idle, id).await;
    }
    let next = Server::start(&disk.store, config("c")).await;
    swept(&next, "db").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_set_with_a_key_sent_100_times_to_two_servers_has_one_effect_and_one_answer() {
    let disk = disk();
    let servers =
        [Server::start(&disk.store, config("a")).await, Server::start(&disk.store, config("b")).await];
    servers[0].add_node(node("n1", 1000)).await;
    let mut calls = tokio::task::JoinSet::new();
    for n in 0..100 {
        let cluster = servers[n % 2].cluster.clone();
        calls.spawn(async move { cluster.create_instances(&keyed("k", 1), asked("web"), 10).await });
    }
    let answers: Vec<_> = calls.join_all().await.into_iter().map(Result::unwrap).collect();
    assert_eq!(answers.iter().filter(|done| done.fresh).count(), 1);
    for answer in &answers {
        assert_eq!((&answer.reply, answer.revision), (&answers[0].reply, answers[0].revision));
    }
    servers[0].cluster.sync().await.unwrap();
    assert_eq!(servers[0].cluster.cache().read(|state| state.instances_after(None).count()), 10);
    let other = servers[0].cluster.create_instances(&keyed("k", 2), asked("web"), 11).await;
    assert_eq!(code(other), ErrorCode::FailedPrecondition);
}

#[tokio::test(flavor = "multi_thread")]
async fn of_two_servers_that_create_the_same_set_exactly_one_wins() {
    let disk = disk();
    let servers =
        [Server::start(&disk.store, config("a")).await, Server::start(&disk.store, config("b")).await];
    servers[0].add_node(node("n1", 10_000)).await;
    for round in 0..20 {
        let mut calls = tokio::task::JoinSet::new();
        for n in 0..4 {
            let cluster = servers[n % 2].cluster.clone();
            calls.spawn(async move {
                let name = format!("web{round}");
                if n < 2 {
                    cluster.create_instances(&Mutation::once("creates"), asked(&name), 3).await.map(|_| ())
                } else {
                    let single = asked(&format!("{name}-2"));
                    cluster.create_instance(&Mutation::once("create"), single).await.map(|_| ())
                }
            });
        }
        let outcomes = calls.join_all().await;
        let won = outcomes.iter().filter(|outcome| outcome.is_ok()).count();
        assert_eq!(won, 1, "{outcomes:?}");
        let lost = outcomes.into_iter().filter_map(Result::err);
        assert!(lost.into_iter().all(|error| error.code() == ErrorCode::AlreadyExists));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_set_whose_outcome_was_lost_is_found_and_not_done_twice() {
    let disk = disk();
    let mute = Mute::over(&disk.store);
    let store: SharedStore = mute.clone();
    let server = Server::start(&store, config("a")).await;
    server.add_node(node("n1", 1000)).await;
    until("a leader", async || server.leads().then_some(())).await;
    for round in 0..10 {
        mute.lose_next.store(true, std::sync::atomic::Ordering::SeqCst);
        let name = format!("web{round}");
        let mutation = keyed(&name, 1);
        let first = server.cluster.create_instances(&mutation, asked(&name), 5).await.unwrap();
        let again = server.cluster.create_instances(&mutation, asked(&name), 5).await.unwrap();
        assert!(!again.fresh);
        assert_eq!(first.reply, again.reply);
    }
    server.cluster.sync().await.unwrap();
    assert_eq!(server.cluster.cache().read(|state| state.instances_after(None).count()), 50);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_set_out_of_bounds_is_refused_by_name() {
    let disk = disk();
    let server = Server::idle(&disk.store, config("a")).await;
    for count in [0, 101] {
        let refusal = set(&server, "web", count).await.unwrap_err();
        assert!(refusal.to_string().starts_with("count must be between 1 and 100"), "{refusal}");
    }
    let refusal = set(&server, &"w".repeat(60), 1).await.unwrap_err();
    assert!(refusal.to_string().starts_with("template.name must have at most 59"), "{refusal}");
    let mut bulky = asked("web");
    std::sync::Arc::make_mut(&mut bulky.spec).user_data = "#".repeat(200 << 10);
    let refusal = server.cluster.create_instances(&Mutation::once("creates"), bulky, 6).await.unwrap_err();
    assert!(refusal.to_string().contains("ask for fewer"), "{refusal}");
}
