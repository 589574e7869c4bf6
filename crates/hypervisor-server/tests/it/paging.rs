//! Claims about lists.

use std::collections::BTreeMap;

use hv_proto::v1;
use tonic::Code;

use crate::world::{VM, World, node, wish, world};

async fn page(world: &World, token: &str) -> v1::ListInstancesResponse {
    let request = v1::ListInstancesRequest { page_size: 90, page_token: token.into(), ..Default::default() };
    world.compute().list_instances(request).await.unwrap().into_inner()
}

#[tokio::test(flavor = "multi_thread")]
async fn what_stays_while_others_are_deleted_is_listed_exactly_once() {
    let world = world().await;
    let mut creates = tokio::task::JoinSet::new();
    for n in 0..1100 {
        let mut compute = world.compute();
        creates.spawn(async move {
            let name = format!("i{n:04}");
            (name.clone(), compute.create_instance(wish(&name)).await.unwrap().into_inner().id)
        });
    }
    let ids: BTreeMap<_, _> = creates.join_all().await.into_iter().collect();
    let mut doomed: Vec<_> = ids.values().step_by(3).cloned().collect();
    doomed.sort();
    let (mut token, mut listed) = (String::new(), BTreeMap::<String, usize>::new());
    loop {
        let page = page(&world, &token).await;
        for instance in page.instances {
            *listed.entry(instance.id).or_default() += 1;
        }
        // Some from either end, also the one that the token names.
        for _ in 0..15 {
            for id in [doomed.pop(), (!doomed.is_empty()).then(|| doomed.remove(0))].into_iter().flatten() {
                let request = v1::DeleteInstanceRequest { instance_id: id, ..Default::default() };
                world.compute().delete_instance(request).await.unwrap();
            }
        }
        token = page.next_page_token;
        if token.is_empty() {
            break;
        }
    }
    assert!(listed.values().all(|times| *times == 1));
    let doomed: Vec<_> = ids.values().step_by(3).collect();
    let stayed = ids.values().filter(|id| !doomed.contains(id));
    assert_eq!(stayed.filter(|id| !listed.contains_key(*id)).count(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_token_of_another_list_is_refused() {
    let world = world().await;
    for name in ["a", "b"] {
        world.create(name).await;
    }
    let first = v1::ListInstancesRequest { page_size: 1, ..Default::default() };
    let token = world.compute().list_instances(first.clone()).await.unwrap().into_inner().next_page_token;
    let mut refusals = Vec::new();
    let other = v1::ListInstancesRequest { state: 1, page_token: token.clone(), ..first };
    refusals.push(world.compute().list_instances(other).await.unwrap_err());
    let nodes = v1::ListNodesRequest { page_token: token.clone(), ..Default::default() };
    refusals.push(world.cluster().list_nodes(nodes).await.unwrap_err());
    let events = v1::ListEventsRequest { page_token: token.clone(), ..Default::default() };
    refusals.push(world.cluster().list_events(events).await.unwrap_err());
    let images = v1::ListImagesRequest { page_token: token, ..Default::default() };
    refusals.push(world.compute().list_images(images).await.unwrap_err());
    for refusal in refusals {
        assert_eq!(refusal.code(), Code::InvalidArgument);
        assert!(
            refusal
                .message()
                .starts_with("page_token must be the next_page_token of a list with the same filters")
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn images_with_similar_names_are_listed_once_each() {
    let world = world().await;
    world.add_node(node("n1", 1)).await;
    world.add_node(node("n2", 1)).await;
    let (mut token, mut listed) = (String::new(), Vec::new());
    for _ in 0..10 {
        let request = v1::ListImagesRequest { page_size: 1, page_token: token, r#type: VM };
        let page = world.compute().list_images(request).await.unwrap().into_inner();
        listed.extend(page.images.into_iter().map(|image| (image.name, image.node_ids.join(","))));
        token = page.next_page_token;
        if token.is_empty() {
            break;
        }
    }
    let expected: Vec<_> =
        ["a/b", "a:b", "a_b", "tiny"].map(|name| (name.to_owned(), "n1,n2".to_owned())).into();
    assert_eq!(listed, expected);
}
