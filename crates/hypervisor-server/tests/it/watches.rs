//! Claims about watches.

use hv_proto::v1;
use tonic::Code;

use crate::world::{World, node, world};

type Events = tonic::Streaming<v1::InstanceEvent>;

async fn watch(world: &World, from_revision: u64) -> Result<Events, tonic::Status> {
    let request = v1::WatchInstancesRequest { from_revision, ..Default::default() };
    world.compute().watch_instances(request).await.map(tonic::Response::into_inner)
}

async fn next(events: &mut Events) -> v1::InstanceEvent {
    tokio::time::timeout(crate::world::LIMIT, events.message()).await.unwrap().unwrap().unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn instances_are_sent_then_a_bookmark_then_each_change() {
    let world = world().await;
    let first = world.create("first").await;
    world.settled_revision().await;
    let mut events = watch(&world, 0).await.unwrap();
    let initial = next(&mut events).await;
    assert_eq!(
        (initial.r#type(), initial.revision),
        (v1::EventType::Added, 0),
        "not resumable before the bookmark"
    );
    assert_eq!(initial.instance.unwrap().id, first.id);
    let bookmark = next(&mut events).await;
    assert_eq!((bookmark.r#type(), bookmark.instance), (v1::EventType::Bookmark, None));

    world.add_node(node("n1", 4)).await;
    let placed = next(&mut events).await;
    assert_eq!((placed.r#type(), placed.instance.unwrap().node_id.as_str()), (v1::EventType::Modified, "n1"));
    let second = world.create("second").await;
    let added = next(&mut events).await;
    assert_eq!((added.r#type(), added.revision), (v1::EventType::Added, second.revision));
    assert_eq!(added.instance.unwrap().node_id, "n1", "it was bound with its creation");
    let request = v1::DeleteInstanceRequest { instance_id: second.id.clone(), ..Default::default() };
    world.compute().delete_instance(request).await.unwrap();
    let deleting = next(&mut events).await;
    assert_eq!(
        (deleting.r#type(), deleting.instance.unwrap().state()),
        (v1::EventType::Modified, v1::InstanceState::Deleting)
    );

    // Resumed after the first placement: the second instance's whole story, once.
    let mut resumed = watch(&world, placed.revision + 1).await.unwrap();
    let again = next(&mut resumed).await;
    assert_eq!((again.r#type(), again.instance.unwrap().id), (v1::EventType::Added, second.id.clone()));
    assert_eq!(next(&mut resumed).await.r#type(), v1::EventType::Modified);

    for too_old_or_too_new in [1, u64::MAX] {
        let refusal = watch(&world, too_old_or_too_new).await.unwrap_err();
        assert_eq!(refusal.code(), Code::OutOfRange);
        assert!(refusal.message().contains("list again and watch from there"), "{refusal}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn who_resumes_in_the_middle_of_a_revision_misses_nothing_of_it() {
    let world = world().await;
    let mut ids = Vec::new();
    for n in 0..20 {
        ids.push(world.create(&format!("i{n}")).await.id);
    }
    let begin = world.settled_revision().await;
    world.add_node(node("n1", 20)).await;
    for id in &ids {
        world.bound(id).await;
    }
    // All are bound in one transaction; take one event at a time and break off after each.
    let (mut from, mut bound) = (begin + 1, std::collections::BTreeSet::new());
    for _ in 0..200 {
        let mut events = watch(&world, from).await.unwrap();
        let event = next(&mut events).await;
        bound.extend(event.instance.map(|instance| instance.id));
        if event.revision + 1 == from {
            // Not past the revision yet: read on in this stream.
            let rest = next(&mut events).await;
            bound.extend(rest.instance.map(|instance| instance.id));
            while bound.len() < ids.len() {
                bound.extend(next(&mut events).await.instance.map(|instance| instance.id));
            }
        }
        from = event.revision + 1;
        if bound.len() == ids.len() {
            return;
        }
    }
    panic!("only {} of {} were seen", bound.len(), ids.len());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_watch_of_one_instance_is_about_no_other_and_ends_with_it() {
    let world = world().await;
    let one = world.create("one").await;
    // Somebody else's instance is called as the first one's id.
    let other = world.create(&one.id).await;
    let request = v1::WatchInstanceRequest { instance_id: one.id.clone(), from_revision: 0 };
    let mut events = world.compute().watch_instance(request).await.unwrap().into_inner();
    assert_eq!(next(&mut events).await.instance.unwrap().name, "one");
    for id in [&other.id, &one.id] {
        let request = v1::DeleteInstanceRequest { instance_id: id.clone(), ..Default::default() };
        world.compute().delete_instance(request).await.unwrap();
    }
    loop {
        let event = next(&mut events).await;
        assert_eq!(event.instance.unwrap().id, one.id);
        if event.r#type == i32::from(v1::EventType::Deleted) {
            break;
        }
    }
    assert!(events.message().await.unwrap().is_none(), "it is over");
    let request = v1::WatchInstanceRequest { instance_id: one.id, from_revision: 0 };
    assert_eq!(world.compute().watch_instance(request).await.unwrap_err().code(), Code::NotFound);
}

#[tokio::test(flavor = "multi_thread")]
async fn nodes_and_events_can_be_watched() {
    let world = world().await;
    let mut nodes = world.cluster().watch_nodes(v1::WatchNodesRequest::default()).await.unwrap().into_inner();
    let mut events =
        world.cluster().watch_events(v1::WatchEventsRequest::default()).await.unwrap().into_inner();
    assert_eq!(nodes.message().await.unwrap().unwrap().r#type(), v1::EventType::Bookmark);
    world.add_node(node("n1", 4)).await;
    let added = nodes.message().await.unwrap().unwrap();
    assert_eq!((added.r#type(), added.node.unwrap().id.as_str()), (v1::EventType::Added, "n1"));
    assert_eq!(events.message().await.unwrap().unwrap().reason, "NodeReady");
    world
        .cluster()
        .deregister_node(v1::DeregisterNodeRequest { node_id: "n1".into(), ..Default::default() })
        .await
        .unwrap();
    loop {
        let event = nodes.message().await.unwrap().unwrap();
        if event.r#type == i32::from(v1::EventType::Deleted) {
            assert_eq!(event.node.unwrap().id, "n1");
            break;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn events_are_resumed_and_bookmarks_come_to_those_who_asked_while_nothing_happens() {
    let world = world().await;
    let request = v1::WatchEventsRequest { bookmarks: true, ..Default::default() };
    let mut events = world.cluster().watch_events(request).await.unwrap().into_inner();
    let begin = events.message().await.unwrap().unwrap();
    assert_eq!(begin.r#type(), v1::EventType::Bookmark);
    world.add_node(node("n1", 4)).await;
    let told = events.message().await.unwrap().unwrap();
    assert_eq!((told.reason.as_str(), told.r#type()), ("NodeReady", v1::EventType::Unspecified));
    assert!(told.revision > begin.revision);

    let request = v1::WatchEventsRequest { from_revision: begin.revision + 1, ..Default::default() };
    let mut resumed = world.cluster().watch_events(request).await.unwrap().into_inner();
    assert_eq!(resumed.message().await.unwrap().unwrap().id, told.id, "what was missed");

    let bookmark = tokio::time::timeout(crate::world::LIMIT, async {
        loop {
            let event = events.message().await.unwrap().unwrap();
            if event.r#type == i32::from(v1::EventType::Bookmark) {
                return event;
            }
        }
    });
    assert!(bookmark.await.unwrap().revision >= told.revision);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_comes_in_pieces_is_each_instance_once() {
    const COUNT: usize = 2500;
    let world = world().await;
    for n in 0..COUNT / 100 {
        let request =
            v1::CreateInstancesRequest { template: Some(crate::world::wish(&format!("set{n}"))), count: 100 };
        world.compute().create_instances(request).await.unwrap();
    }
    let mut events = watch(&world, 0).await.unwrap();
    let mut seen = std::collections::BTreeSet::new();
    loop {
        let event = next(&mut events).await;
        match event.instance {
            Some(instance) => assert!(seen.insert(instance.id), "an instance came twice"),
            None => break,
        }
    }
    assert_eq!(seen.len(), COUNT);
}
