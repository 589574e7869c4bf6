//! Images: which nodes have which, and what is passed on to nodes to fetch, take and remove them.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt as _;
use hv_cluster::cache::State;
use hv_cluster::page::Page;
use hv_proto::{convert, v1};
use hv_types::validate::excerpt;
use hv_types::{ErrorCode, InstanceType, Invalid, NodeRecord, NodeStatus, ServiceError};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

use super::interactive::agent_of;
use super::request::{failed, refuse};
use super::{ReplyStream, Shared};

/// How many nodes are asked at once.
const PARALLEL: usize = 16;
/// How many messages wait for a slow caller.
const QUEUE: usize = 64;
/// How long a node may take to report an image that it has taken; it sends a heartbeat at once. The answer does not
/// depend on it.
const REPORT_TIMEOUT: Duration = Duration::from_secs(3);

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
async fn nodes(
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

pub(super) async fn pull(
    shared: &Shared,
    request: Request<v1::PullImageRequest>,
) -> Result<Response<ReplyStream<v1::PullImageProgress>>, Status> {
    let request = request.into_inner();
    let missing = || Invalid::new("type", "", "must be `vm`, `container` or `microvm`");
    let wanted =
        convert::instance_type_from(request.r#type).and_then(|t| t.ok_or_else(missing)).map_err(refuse)?;
    if !hv_types::image::is_reference(&request.image_ref) {
        let expected = "must say where from: `oci://registry/name:tag`, `https://…` or `file://…`";
        return Err(refuse(Invalid::new("image_ref", &request.image_ref, expected)));
    }
    let fetches = |node: &NodeRecord| {
        node.drivers.iter().any(|d| d.instance_type == wanted && d.healthy && d.takes_fetched_images())
    };
    let nodes = nodes(shared, &request.node_ids, fetches).await?;
    if nodes.is_empty() {
        let message = format!(
            "no node that is ready fetches images for the type {wanted}; see `hypervisor-ctl node describe`"
        );
        return Err(refuse(ServiceError::precondition(message)));
    }
    let (sender, receiver) = mpsc::channel(QUEUE);
    tokio::spawn(pull_on_all(shared.clone(), nodes, request, sender));
    Ok(shared.until_stop(ReceiverStream::new(receiver)))
}

/// Waits until a node has reported an image that it has just taken: whoever asked for it may use it at once.
async fn until_reported(shared: &Shared, node: &NodeRecord, name: &str, instance_type: InstanceType) {
    let has = |state: &State| {
        let record = state.node(&node.id).and_then(|entry| entry.record.as_ref());
        record.is_none_or(|record| {
            record.images.iter().any(|image| image.name == name && image.instance_type == instance_type)
        })
    };
    let cache = shared.cluster.cache();
    let (is_there, mut changes) = cache.subscribe(has);
    if is_there {
        return;
    }
    let reported = async {
        while let Ok(Some(_)) = changes.next().await {
            if cache.read(has) {
                return;
            }
        }
    };
    // Later than that it still is there; it is only not known yet.
    let _ = tokio::time::timeout(REPORT_TIMEOUT, reported).await;
}

type Told = mpsc::Sender<Result<v1::PullImageProgress, Status>>;

/// Ends early when nobody listens any more; nodes keep what has arrived.
async fn pull_on_all(
    shared: Shared,
    nodes: Vec<Arc<NodeRecord>>,
    request: v1::PullImageRequest,
    sender: Told,
) {
    let total = nodes.len();
    let pulls = futures::stream::iter(nodes).map(|node| {
        let (shared, request, sender) = (&shared, request.clone(), sender.clone());
        async move { pull_on(shared, &node, request, &sender).await.err() }
    });
    let failed: Vec<Status> = pulls.buffer_unordered(PARALLEL).filter_map(std::future::ready).collect().await;
    let error = match failed.first() {
        None => String::new(),
        Some(first) if total == 1 => first.message().to_owned(),
        Some(first) => format!("{} of {total} nodes could not fetch it: {}", failed.len(), first.message()),
    };
    let status = if failed.is_empty() { "done" } else { "failed" };
    let last = v1::PullImageProgress {
        status: status.into(),
        current: (total - failed.len()) as i64,
        total: total as i64,
        completed: failed.is_empty(),
        error,
        ..v1::PullImageProgress::default()
    };
    // Nobody may be listening any more.
    let _ = sender.send(Ok(last)).await;
}

async fn pull_on(
    shared: &Shared,
    node: &NodeRecord,
    request: v1::PullImageRequest,
    sender: &Told,
) -> Result<(), Status> {
    let node_id = node.id.to_string();
    let kept_as = if request.name.is_empty() { &request.image_ref } else { &request.name }.clone();
    let instance_type = convert::instance_type_from(request.r#type).ok().flatten();
    let outcome = async {
        let mut agent = agent_of(shared, node)?;
        let mut progress = agent.pull_image(request).await?.into_inner();
        while let Some(message) = progress.message().await? {
            let message = v1::PullImageProgress { node_id: node_id.clone(), ..message };
            if sender.send(Ok(message)).await.is_err() {
                return Err(Status::cancelled("nobody listens any more"));
            }
        }
        if let Some(instance_type) = instance_type {
            until_reported(shared, node, &kept_as, instance_type).await;
        }
        Ok(())
    };
    let outcome = outcome.await;
    if let Err(error) = &outcome {
        let told = v1::PullImageProgress {
            status: "failed".into(),
            error: error.message().to_owned(),
            node_id: node_id.clone(),
            ..v1::PullImageProgress::default()
        };
        let _ = sender.send(Ok(told)).await;
    }
    outcome
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
        until_reported(shared, node, &name, instance_type).await;
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
