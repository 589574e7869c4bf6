//! Images: which nodes have which, and what is passed on to nodes to fetch, take and remove them.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use futures::StreamExt as _;
use hv_cluster::cache::State;
use hv_cluster::page::Page;
use hv_proto::{convert, v1};
use hv_types::validate::excerpt;
use hv_types::{ErrorCode, InstanceType, Invalid, NodeRecord, NodeStatus, ServiceError};
use tonic::{Request, Response, Status, Streaming};

use super::Shared;
use super::interactive::agent_of;
use super::request::{failed, refuse};

/// How many nodes are asked at once.
const PARALLEL: usize = 16;

pub(super) async fn list(
    shared: &Shared,
    request: Request<v1::ListImagesRequest>,
) -> Result<Response<v1::ListImagesResponse>, Status> {
    let request = request.into_inner();
    let wanted = convert::instance_type_from(request.r#type).map_err(refuse)?;
    let page =
        Page::new(request.page_size, &request.page_token, &("images", request.r#type)).map_err(refuse)?;
    shared.cluster.sync().await.map_err(failed)?;
    let mut images = shared.cluster.cache().read(|state| images(state, wanted));
    if let Some(after) = &page.after {
        images.retain(|image| image_key(image) > *after);
    }
    let more = images.len() > page.size;
    images.truncate(page.size);
    let last = images.last().filter(|_| more);
    let next_page_token = last.map(|image| page.token_after(&image_key(image))).unwrap_or_default();
    Ok(Response::new(v1::ListImagesResponse { images, next_page_token }))
}

/// The images that nodes report, each once, with the nodes that have it.
fn images(state: &State, wanted: Option<InstanceType>) -> Vec<v1::Image> {
    let mut found: BTreeMap<String, v1::Image> = BTreeMap::new();
    for (node, _) in state.nodes() {
        for image in
            node.images.iter().filter(|image| wanted.is_none_or(|wanted| wanted == image.instance_type))
        {
            let shown = convert::image_to(image);
            let entry = found.entry(image_key(&shown)).or_insert(shown);
            entry.node_ids.push(node.id.to_string());
        }
    }
    found.into_values().collect()
}

/// What orders images in a list, and what a page token holds: the name, then the type.
fn image_key(image: &v1::Image) -> String {
    format!("{}:{}", image.name, image.r#type)
}

pub(super) async fn get(
    shared: &Shared,
    request: Request<v1::GetImageRequest>,
) -> Result<Response<v1::Image>, Status> {
    let name = request.into_inner().name;
    shared.cluster.sync().await.map_err(failed)?;
    let found = shared.cluster.cache().read(|state| {
        let mut image = images(state, None).into_iter().find(|image| image.name == name)?;
        let users = state.instances_after(None).filter(|record| record.spec.image == name);
        image.instances = u32::try_from(users.count()).unwrap_or(u32::MAX);
        Some(image)
    });
    let absent = || {
        let message = format!("no node has an image {}; see `hypervisor-ctl image list`", excerpt(&name));
        refuse(ServiceError::new(ErrorCode::NotFound, message))
    };
    found.map(Response::new).ok_or_else(absent)
}

/// The nodes that are named, or all that answer and that `take` likes.
pub(super) async fn nodes(
    shared: &Shared,
    named: &[String],
    take: impl Fn(&NodeRecord) -> bool,
) -> Result<Vec<Arc<NodeRecord>>, Status> {
    shared.cluster.sync().await.map_err(failed)?;
    let named: BTreeSet<&str> = named.iter().map(String::as_str).collect();
    let found = shared.cluster.cache().read(|state| {
        let is_named = |node: &NodeRecord| named.contains(node.id.as_str());
        let all = state.nodes().filter(|(node, entry)| {
            if named.is_empty() { entry.status() == NodeStatus::Ready && take(node) } else { is_named(node) }
        });
        all.map(|(node, entry)| (Arc::clone(node), entry.is_live())).collect::<Vec<_>>()
    });
    let unknown = |id: &&&str| !found.iter().any(|(node, _)| node.id.as_str() == **id);
    if let Some(id) = named.iter().find(unknown) {
        let message = format!("there is no node {}; see `hypervisor-ctl node list`", excerpt(id));
        return Err(refuse(ServiceError::new(ErrorCode::NotFound, message)));
    }
    if let Some((node, _)) = found.iter().find(|(_, is_live)| !is_live) {
        let message = format!("node {} does not answer; see `hypervisor-ctl node get`", node.hostname);
        return Err(refuse(ServiceError::unavailable(message)));
    }
    Ok(found.into_iter().map(|(node, _)| node).collect())
}

pub(super) async fn delete(
    shared: &Shared,
    request: Request<v1::DeleteImageRequest>,
) -> Result<Response<v1::DeleteImageResponse>, Status> {
    let request = request.into_inner();
    let has = |node: &NodeRecord| node.images.iter().any(|image| image.name == request.name);
    let nodes = nodes(shared, &request.node_ids, has).await?;
    let deletions = futures::stream::iter(nodes).map(|node| {
        let request = request.clone();
        async move {
            let outcome = async { agent_of(shared, &node)?.delete_image(request).await }.await;
            (node.id.to_string(), outcome)
        }
    });
    let mut answer = v1::DeleteImageResponse::default();
    let mut done = deletions.buffer_unordered(PARALLEL);
    while let Some((node, outcome)) = done.next().await {
        match outcome {
            Ok(_) => answer.node_ids.push(node),
            Err(error) => drop(answer.failed.insert(node, error.message().to_owned())),
        }
    }
    answer.node_ids.sort();
    Ok(Response::new(answer))
}

pub(super) async fn upload(
    shared: &Shared,
    request: Request<Streaming<v1::UploadImageRequest>>,
) -> Result<Response<v1::Image>, Status> {
    let mut parts = request.into_inner();
    let expected = "must begin with `start`, which names the image and the node";
    let first = parts.message().await?;
    let Some(v1::upload_image_request::Part::Start(start)) = first.as_ref().and_then(|f| f.part.as_ref())
    else {
        return Err(refuse(Invalid::new("part", "another message", expected)));
    };
    if start.node_id.is_empty() {
        return Err(refuse(Invalid::new("node_id", "", "must name the node that takes the image")));
    }
    if start.size_bytes == 0 {
        // Without it an upload that broke off could not be told from one that is complete.
        return Err(refuse(Invalid::new("size_bytes", 0, "must say how many bytes come")));
    }
    let found = nodes(shared, std::slice::from_ref(&start.node_id), |_| true).await?;
    let node = found.first().ok_or_else(|| refuse(Invalid::new("node_id", &start.node_id, expected)))?;
    let mut agent = agent_of(shared, node)?;
    // What breaks off here breaks off there: the agent sees the stream end without its last bytes, and keeps nothing.
    let (name, instance_type) =
        (start.name.clone(), convert::instance_type_from(start.r#type).ok().flatten());
    let rest = parts.take_while(|part| std::future::ready(part.is_ok()));
    let rest = rest.filter_map(|part| std::future::ready(part.ok()));
    let image = agent.upload_image(futures::stream::iter(first).chain(rest)).await?.into_inner();
    if let Some(instance_type) = instance_type {
        shared.cluster.until_image_reported(&node.id, &name, instance_type).await;
    }
    Ok(Response::new(v1::Image { node_ids: vec![node.id.to_string()], ..image }))
}

pub(super) async fn collect(
    shared: &Shared,
    request: Request<v1::CollectImagesRequest>,
) -> Result<Response<v1::CollectImagesResponse>, Status> {
    let request = request.into_inner();
    let nodes = nodes(shared, &request.node_ids, |_| true).await?;
    let collections = futures::stream::iter(nodes).map(|node| {
        let request = request.clone();
        async move { agent_of(shared, &node)?.collect_images(request).await }
    });
    let mut images = Vec::new();
    let mut done = collections.buffer_unordered(PARALLEL);
    while let Some(answer) = done.next().await {
        match answer {
            Ok(answer) => images.extend(answer.into_inner().images),
            // Some nodes keep no images.
            Err(error) if error.code() == tonic::Code::Unimplemented && request.node_ids.is_empty() => {}
            Err(error) => return Err(error),
        }
    }
    images.sort_by(|a, b| (&a.node_id, &a.name).cmp(&(&b.node_id, &b.name)));
    Ok(Response::new(v1::CollectImagesResponse { images }))
}
