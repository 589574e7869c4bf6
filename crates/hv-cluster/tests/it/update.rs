//! Claims about changes of what an instance is made of: room, keys, names.

use std::sync::Arc;

use hv_cluster::instances::Update;
use hv_cluster::{Error, Mutation};
use hv_proto::v1;
use hv_types::instance::{DiskSpec, Request};
use hv_types::{ErrorCode, InstanceId, InstanceRecord, InstanceState, InstanceType, NodeId, Resources};
use tokio::task::JoinSet;

use crate::world::{Server, asked, code, config, disk, keyed, node, report, until};

fn rescue(image: &str) -> Update {
    Update { rescue: Some(image.into()), ..Update::default() }
}

/// A node whose driver of virtual machines can do this.
fn able(id: &str, capability: &str) -> v1::RegisterNodeRequest {
    let driver = v1::DriverInfo {
        name: "fake".into(),
        r#type: v1::InstanceType::Vm.into(),
        healthy: true,
        capabilities: vec![capability.into()],
        ..v1::DriverInfo::default()
    };
    v1::RegisterNodeRequest { drivers: vec![driver], ..node(id, 8) }
}

fn machine(name: &str) -> InstanceRecord {
    InstanceRecord { instance_type: InstanceType::Vm, ..asked(name) }
}

fn cores(count: u32) -> Update {
    Update { cpu_cores: Some(count), ..Update::default() }
}

async fn update(server: &Server, id: &InstanceId, update: Update) -> Result<v1::Instance, Error> {
    server.cluster.update_instance(&Mutation::once("update"), id, &update).await.map(|done| done.reply)
}

/// How many cores of a node are promised.
fn promised(server: &Server, node: &NodeId) -> u32 {
    server.cluster.cache().read(|state| state.node(node).unwrap().allocated.cpu_cores)
}

#[tokio::test(flavor = "multi_thread")]
async fn updates_that_race_take_exactly_the_room_there_is() {
    let disk = disk();
    let (a, b) =
        (Server::start(&disk.store, config("a")).await, Server::start(&disk.store, config("b")).await);
    let n1 = a.add_node(node("n1", 16)).await;
    let mut ids = Vec::new();
    for n in 0..8 {
        ids.push(a.running(asked(&format!("i{n}"))).await.0);
    }
    // 8 of 16 are taken; each wants three more: exactly two can have them.
    let mut racing = JoinSet::new();
    for (index, id) in ids.into_iter().enumerate() {
        let cluster = if index % 2 == 0 { a.cluster.clone() } else { b.cluster.clone() };
        racing.spawn(async move {
            cluster.update_instance(&Mutation::once("update"), &id, &cores(4)).await.map_err(|e| e.code())
        });
    }
    let outcomes = racing.join_all().await;
    let granted = outcomes.iter().filter(|outcome| outcome.is_ok()).count();
    let refused = outcomes.iter().filter(|o| matches!(o, Err(ErrorCode::ResourceExhausted))).count();
    assert_eq!((granted, refused), (2, 6), "{outcomes:?}");
    a.cluster.sync().await.unwrap();
    assert_eq!(promised(&a, &n1), 14);
}

#[tokio::test(flavor = "multi_thread")]
async fn updates_that_race_with_creates_never_promise_more_than_there_is() {
    let disk = disk();
    let (a, b) =
        (Server::start(&disk.store, config("a")).await, Server::start(&disk.store, config("b")).await);
    let n1 = a.add_node(node("n1", 12)).await;
    let mut ids = Vec::new();
    for n in 0..4 {
        ids.push(a.running(asked(&format!("i{n}"))).await.0);
    }
    let mut racing = JoinSet::new();
    for (index, id) in ids.into_iter().enumerate() {
        let cluster = if index % 2 == 0 { a.cluster.clone() } else { b.cluster.clone() };
        racing.spawn(async move {
            let updated = cluster.update_instance(&Mutation::once("update"), &id, &cores(3)).await;
            assert!(updated.is_ok() || code(updated) == ErrorCode::ResourceExhausted);
        });
    }
    for n in 0..12 {
        let cluster = if n % 2 == 0 { a.cluster.clone() } else { b.cluster.clone() };
        racing.spawn(async move {
            cluster.create_instance(&Mutation::once("create"), asked(&format!("c{n}"))).await.unwrap();
        });
    }
    let watched = a.cluster.clone();
    let watching = tokio::spawn(async move {
        let mut most = 0;
        loop {
            let now = watched.cache().read(|state| state.node(&n1).unwrap().allocated.cpu_cores);
            most = most.max(now);
            assert!(most <= 12, "{most} cores of 12 are promised");
            if most == 12 {
                return;
            }
            tokio::task::yield_now().await;
        }
    });
    racing.join_all().await;
    // In the end all of it is used: what could not be bound waits.
    tokio::time::timeout(std::time::Duration::from_secs(20), watching).await.unwrap().unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn an_update_that_is_repeated_has_one_effect_and_one_answer() {
    let disk = disk();
    let server = Server::start(&disk.store, config("a")).await;
    server.add_node(node("n1", 8)).await;
    let (id, _) = server.running(asked("web")).await;
    let ask = async |digest| server.cluster.update_instance(&keyed("k", digest), &id, &cores(2)).await;
    let (first, second) = (ask(1).await.unwrap(), ask(1).await.unwrap());
    assert_eq!(first.reply, second.reply);
    assert_eq!((first.fresh, second.fresh), (true, false));
    assert_eq!(server.get(&id).await.generation, 2);
    assert_eq!(code(ask(2).await), ErrorCode::FailedPrecondition);
    // The same again without a key changes nothing.
    assert_eq!(update(&server, &id, cores(2)).await.unwrap().generation, 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_name_moves_with_its_instance_and_is_never_anybody_else_s() {
    let disk = disk();
    let server = Server::start(&disk.store, config("a")).await;
    server.add_node(node("n1", 8)).await;
    let (id, _) = server.running(asked("web")).await;
    server.running(asked("db")).await;
    let called = |name: &str| Update { name: Some(name.into()), ..Update::default() };
    assert_eq!(code(update(&server, &id, called("db")).await), ErrorCode::AlreadyExists);
    assert_eq!(code(update(&server, &id, called("No!")).await), ErrorCode::InvalidArgument);
    assert_eq!(update(&server, &id, called("www")).await.unwrap().name, "www");
    assert_eq!(code(server.create(asked("www")).await), ErrorCode::AlreadyExists);
    server.create(asked("web")).await.unwrap();
    let set = Mutation::once("create");
    let members = server.cluster.create_instances(&set, asked("set"), 2).await.unwrap().reply.instances;
    assert_eq!(code(update(&server, &id, called("set-7")).await), ErrorCode::AlreadyExists);
    let member: InstanceId = members[0].id.parse().unwrap();
    assert_eq!(code(update(&server, &member, called("free")).await), ErrorCode::FailedPrecondition);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_given_up_is_there_for_others_once_the_node_has_taken_it_away() {
    let disk = disk();
    let server = Server::start(&disk.store, config("a")).await;
    server.add_node(node("n1", 4)).await;
    let (id, n1) = server.running(asked("web")).await;
    update(&server, &id, cores(4)).await.unwrap();
    let waits = asked("waits");
    let waiting = waits.id.clone();
    server.create(waits).await.unwrap();
    assert_eq!(server.get(&waiting).await.node_id(), None);
    update(&server, &id, cores(1)).await.unwrap();
    let shrunk = server.get(&id).await;
    assert_eq!((shrunk.spec.cpu_cores, shrunk.resources().cpu_cores), (1, 4));
    let mut said = report(&shrunk, InstanceState::Running);
    said.update_note = "cores wait".into();
    server.report_one(&n1, said.clone()).await;
    let noted = until("the note", async || {
        Some(server.get(&id).await).filter(|record| !record.update_note.is_empty())
    });
    // Its guest has four cores until it starts anew.
    assert_eq!(noted.await.resources().cpu_cores, 4);
    assert_eq!(server.get(&waiting).await.node_id(), None);
    said.update_note.clear();
    server.report_one(&n1, said).await;
    server.bound(&waiting).await;
    assert_eq!(server.get(&id).await.resources().cpu_cores, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_made_smaller_and_as_large_again_needs_no_room() {
    let disk = disk();
    let server = Server::start(&disk.store, config("a")).await;
    server.add_node(node("n1", 4)).await;
    let (id, n1) = server.running(asked("web")).await;
    update(&server, &id, cores(4)).await.unwrap();
    let waits = asked("waits");
    let waiting = waits.id.clone();
    server.create(waits).await.unwrap();
    update(&server, &id, cores(1)).await.unwrap();
    update(&server, &id, cores(4)).await.unwrap();
    assert_eq!(server.get(&id).await.holds, Resources::default());
    assert_eq!(server.get(&waiting).await.node_id(), None);
    update(&server, &id, cores(1)).await.unwrap();
    let mut said = report(&*server.get(&id).await, InstanceState::Stopped);
    said.update_note = "cores wait".into();
    server.report_one(&n1, said).await;
    // What does not run takes nothing away from others beyond what it is to have.
    server.bound(&waiting).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn disks_are_added_grown_and_removed_and_never_shrink() {
    let disk = disk();
    let server = Server::start(&disk.store, config("a")).await;
    server.add_node(node("n1", 4)).await;
    let (id, _) = server.running(asked("web")).await;
    let set = |bytes: u64| {
        let disk = DiskSpec { name: "data".into(), size_bytes: bytes, ..DiskSpec::default() };
        Update { set_disks: vec![disk], ..Update::default() }
    };
    let remove = |name: &str| Update { remove_disks: vec![name.into()], ..Update::default() };
    update(&server, &id, set(1 << 30)).await.unwrap();
    update(&server, &id, set(2 << 30)).await.unwrap();
    assert_eq!(server.get(&id).await.resources().disk_bytes, 2 << 30);
    assert_eq!(code(update(&server, &id, set(1 << 30)).await), ErrorCode::InvalidArgument);
    assert_eq!(code(update(&server, &id, set(2 << 40)).await), ErrorCode::ResourceExhausted);
    assert_eq!(code(update(&server, &id, remove("other")).await), ErrorCode::InvalidArgument);
    update(&server, &id, remove("data")).await.unwrap();
    assert!(server.get(&id).await.spec.disks.is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_leaving_is_not_changed_and_what_ended_by_itself_is_not_started() {
    let disk = disk();
    let server = Server::start(&disk.store, config("a")).await;
    server.add_node(node("n1", 8)).await;
    let (ended, n1) = server.running(asked("ended")).await;
    server.report_one(&n1, report(&*server.get(&ended).await, InstanceState::Stopped)).await;
    assert_eq!(update(&server, &ended, cores(2)).await.unwrap().wanted(), v1::InstanceWanted::Stopped);
    let (id, _) = server.running(asked("web")).await;
    server.change(&id, Request::Delete).await.unwrap();
    assert_eq!(code(update(&server, &id, cores(2)).await), ErrorCode::FailedPrecondition);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_the_node_says_of_an_update_is_shown_until_it_says_otherwise() {
    let disk = disk();
    let server = Server::start(&disk.store, config("a")).await;
    server.add_node(node("n1", 8)).await;
    let (id, n1) = server.running(asked("web")).await;
    update(&server, &id, cores(2)).await.unwrap();
    let mut said = report(&*server.get(&id).await, InstanceState::Running);
    said.update_note = "cores wait".into();
    server.report_one(&n1, said.clone()).await;
    assert_eq!(server.get(&id).await.update_note, "cores wait");
    said.update_note.clear();
    server.report_one(&n1, said).await;
    let settled = until("the note to go", async || {
        Some(server.get(&id).await).filter(|record| record.update_note.is_empty())
    });
    assert!(settled.await.is_settled());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_rescue_is_a_restart_and_meanwhile_nothing_but_the_name_changes() {
    let disk = disk();
    let server = Server::start(&disk.store, config("a")).await;
    server.add_node(able("n1", "rescue")).await;
    let (id, n1) = server.running(machine("web")).await;
    let before = server.get(&id).await;
    let rescued = update(&server, &id, rescue("saver")).await.unwrap();
    let record = server.get(&id).await;
    assert_eq!(rescued.spec.unwrap().rescue, "saver");
    assert_eq!(record.restart_generation, before.generation + 1);
    // Asked for again it changes nothing.
    assert_eq!(update(&server, &id, rescue("saver")).await.unwrap().generation, record.generation);
    server.report_one(&n1, report(&record, InstanceState::Running)).await;
    for refused in [cores(2), rescue("other"), Update { cpu_cores: Some(2), ..rescue("") }] {
        let refused = update(&server, &id, refused).await;
        assert!([ErrorCode::FailedPrecondition, ErrorCode::InvalidArgument].contains(&code(refused)));
    }
    let named = Update { name: Some("www".into()), ..Update::default() };
    assert_eq!(update(&server, &id, named).await.unwrap().name, "www");
    update(&server, &id, rescue("")).await.unwrap();
    let after = server.get(&id).await;
    assert_eq!((after.spec.rescue.as_str(), after.restart_generation), ("", after.generation));
    assert_eq!(update(&server, &id, cores(2)).await.unwrap().spec.unwrap().cpu_cores, 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_rescue_that_its_node_cannot_do_is_refused() {
    let disk = disk();
    let server = Server::start(&disk.store, config("a")).await;
    server.add_node(able("n1", "pause")).await;
    let (id, _) = server.running(machine("web")).await;
    assert_eq!(code(update(&server, &id, rescue("saver")).await), ErrorCode::Unsupported);
    assert!(!server.get(&id).await.spec.is_in_rescue());
    let mut record = asked("made");
    Arc::make_mut(&mut record.spec).rescue = "saver".into();
    assert!(record.validate().unwrap_err().to_string().contains("containers"));
}
