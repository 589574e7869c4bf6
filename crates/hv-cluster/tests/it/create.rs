//! Claims about creating instances.

use std::sync::atomic::Ordering;

use hv_cluster::Mutation;
use hv_proto::{convert, v1};
use hv_store::SharedStore;
use hv_store::conformance::etcd_server::{EtcdServer, EtcdVersion};
use hv_store::etcd::EtcdStore;
use hv_types::instance::{Request, StopOptions};
use hv_types::{ErrorCode, InstanceRecord};

use crate::world::{Mute, Server, asked, code, config, disk, dump, keyed, node, wish};

#[tokio::test(flavor = "multi_thread")]
async fn a_name_is_taken_once_and_free_again_after_the_deletion() {
    let disk = disk();
    let server = Server::start(&disk.store, config("a")).await;
    let first = asked("web");
    server.create(first.clone()).await.unwrap();
    let refusal = server.create(asked("web")).await.unwrap_err();
    assert_eq!(refusal.code(), ErrorCode::AlreadyExists);
    assert!(refusal.to_string().contains(first.id.as_str()), "{refusal}");

    let elsewhere = InstanceRecord { project: "other".into(), ..asked("web") };
    server.create(elsewhere).await.unwrap();

    // No node has it: it is gone at once, with its name.
    server.change(&first.id, Request::Delete).await.unwrap();
    assert_eq!(code(server.cluster.instance(&first.id).await), ErrorCode::NotFound);
    server.create(asked("web")).await.unwrap();
}

async fn one_key_sent_100_times_has_one_effect(store: &SharedStore) {
    let servers = [Server::start(store, config("a")).await, Server::start(store, config("b")).await];
    let mut calls = tokio::task::JoinSet::new();
    for n in 0..100 {
        let cluster = servers[n % 2].cluster.clone();
        // Each repetition comes with another id, as each request that arrives gets one.
        calls.spawn(async move { cluster.create_instance(&keyed("k", 1), asked("web")).await });
    }
    let answers: Vec<_> = calls.join_all().await.into_iter().map(Result::unwrap).collect();
    assert_eq!(answers.iter().filter(|done| done.fresh).count(), 1);
    for answer in &answers {
        assert_eq!((&answer.reply, answer.revision), (&answers[0].reply, answers[0].revision));
    }
    servers[0].cluster.sync().await.unwrap();
    assert_eq!(servers[0].cluster.cache().read(|state| state.instances_after(None).count()), 1);
    for server in servers {
        server.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn one_key_sent_100_times_in_parallel_to_two_servers_has_one_effect_and_one_answer() {
    one_key_sent_100_times_has_one_effect(&disk().store).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn one_key_sent_100_times_has_one_effect_on_etcd() {
    let Some(etcd) = EtcdServer::start(EtcdVersion::V3_4).await else { return };
    let store: SharedStore = EtcdStore::connect(etcd.options()).await.unwrap();
    one_key_sent_100_times_has_one_effect(&store).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_key_answers_for_its_own_request_only() {
    let disk = disk();
    let server = Server::idle(&disk.store, config("a")).await;
    server.cluster.create_instance(&keyed("k", 1), asked("web")).await.unwrap();
    let before = dump(&disk.store).await;
    let other = server.cluster.create_instance(&keyed("k", 2), asked("db")).await;
    assert_eq!(code(other), ErrorCode::FailedPrecondition);
    let method = Mutation { method: "other", ..keyed("k", 1) };
    assert_eq!(
        code(server.cluster.create_instance(&method, asked("db")).await),
        ErrorCode::FailedPrecondition
    );
    assert_eq!(dump(&disk.store).await, before);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_change_with_a_key_is_answered_alike_also_after_the_instance_went_on_or_away() {
    let disk = disk();
    let server = Server::start(&disk.store, config("a")).await;
    let record = asked("web");
    server.create(record.clone()).await.unwrap();
    let ask = async |key: &str, request| {
        let (mutation, stop) = (keyed(key, 1), StopOptions::default());
        server.cluster.change_instance(&mutation, &record.id, request, stop).await.unwrap()
    };
    let stopped = ask("stop", Request::Stop).await;
    assert!(stopped.fresh);
    // It changes nothing, and that too is an answer to keep.
    let again = ask("again", Request::Stop).await;
    assert!(!again.fresh);
    assert_eq!(again.reply.revision, stopped.revision.0, "an unchanged instance keeps its revision");
    ask("start", Request::Start).await;
    let deleted = ask("delete", Request::Delete).await;
    for (key, first) in [("stop", &stopped), ("again", &again)] {
        let repeated = ask(key, Request::Stop).await;
        assert_eq!(
            (&repeated.reply, repeated.revision, repeated.fresh),
            (&first.reply, first.revision, false)
        );
    }
    assert_eq!(ask("delete", Request::Delete).await.revision, deleted.revision);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_create_whose_outcome_was_lost_is_looked_up_and_not_done_twice() {
    let disk = disk();
    let mute = Mute::over(&disk.store);
    let store: SharedStore = mute.clone();
    let server = Server::idle(&store, config("a")).await;
    mute.lose_next.store(true, Ordering::SeqCst);
    let lost = server.cluster.create_instance(&keyed("k", 1), asked("web")).await.unwrap();
    assert!(lost.fresh);
    let repeated = server.cluster.create_instance(&keyed("k", 1), asked("web")).await.unwrap();
    assert_eq!((&repeated.reply, repeated.revision, repeated.fresh), (&lost.reply, lost.revision, false));
    server.cluster.sync().await.unwrap();
    let ids: Vec<_> =
        server.cluster.cache().read(|s| s.instances_after(None).map(|r| r.id.to_string()).collect());
    assert_eq!(ids, [repeated.reply.id]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lease_of_request_keys_that_ended_is_replaced() {
    let disk = disk();
    let mute = Mute::over(&disk.store);
    let store: SharedStore = mute.clone();
    let server = Server::idle(&store, config("a")).await;
    server.cluster.create_instance(&keyed("k1", 1), asked("web")).await.unwrap();
    mute.lease_ended.store(true, Ordering::SeqCst);
    let done = server.cluster.create_instance(&keyed("k2", 1), asked("db")).await.unwrap();
    assert!(done.fresh);
    assert!(!server.cluster.create_instance(&keyed("k2", 1), asked("db")).await.unwrap().fresh);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_no_node_could_take_is_refused_with_the_field_and_changes_nothing() {
    let disk = disk();
    let server = Server::start(&disk.store, config("a")).await;
    let local = v1::DriverInfo {
        name: "qemu".into(),
        r#type: v1::InstanceType::Vm.into(),
        healthy: true,
        images_are_local: true,
        ..v1::DriverInfo::default()
    };
    let image =
        v1::Image { name: "tiny".into(), r#type: v1::InstanceType::Vm.into(), ..v1::Image::default() };
    server
        .add_node(v1::RegisterNodeRequest { drivers: vec![local], images: vec![image], ..node("n1", 4) })
        .await;
    let before = dump(&disk.store).await;

    let vm = |change: fn(&mut v1::CreateInstanceRequest, &mut v1::InstanceSpec)| {
        let mut request = v1::CreateInstanceRequest { r#type: v1::InstanceType::Vm.into(), ..wish("web") };
        let mut spec = request.spec.take().unwrap();
        change(&mut request, &mut spec);
        request.spec = Some(spec);
        convert::create_request_from(request).unwrap()
    };
    let cases = [
        ("spec.image must be an image that a node has (tiny)", vm(|_, s| s.image = "huge".into())),
        ("spec.cpu_cores must be at most 4", vm(|_, s| s.cpu_cores = 5)),
        (
            "spec.memory_bytes must be at most 1099511627776 (1048576 MiB)",
            vm(|_, s| s.memory_bytes = 2 << 40),
        ),
        ("preferred_node_id must be the id of a node", vm(|r, _| r.preferred_node_id = "n9".into())),
    ];
    for (expected, record) in cases {
        let refusal = server.create(record).await.unwrap_err();
        assert_eq!(refusal.code(), ErrorCode::InvalidArgument);
        assert!(refusal.to_string().starts_with(expected), "{refusal}");
    }
    let mut bulky = vm(|_, _| {});
    std::sync::Arc::make_mut(&mut bulky.spec).network = Some(hv_types::NetworkSpec {
        security_groups: vec!["g".repeat(700 << 10)],
        ..hv_types::NetworkSpec::default()
    });
    let refusal = server.create(bulky).await.unwrap_err();
    assert!(refusal.to_string().starts_with("spec and the metadata must together take at most"), "{refusal}");
    assert_eq!(dump(&disk.store).await, before);
}
