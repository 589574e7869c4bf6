//! The fetching of images: an operation is begun, and the caller is told of it until it ends.
//!
//! A caller that goes away changes nothing: the operation goes on, and the same request with the same key follows it again.

use std::collections::BTreeMap;
use std::sync::Arc;

use hv_cluster::cache::{Delta, Subscription, SubscriptionError};
use hv_cluster::operations::images::{ImagePull, Standing, standings};
use hv_proto::{convert, v1};
use hv_types::{Invalid, NodeId, NodeRecord, OperationRecord, OperationState, ServiceError};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status};

use super::request::{failed, mutation, refuse};
use super::{ReplyStream, Shared, images};

/// How many messages wait for a slow caller.
const QUEUE: usize = 64;

pub(super) async fn pull(
    shared: &Shared,
    request: Request<v1::PullImageRequest>,
) -> Result<Response<ReplyStream<v1::PullImageProgress>>, Status> {
    let mut request = request.into_inner();
    let key = std::mem::take(&mut request.request_key);
    let mutation = mutation("ComputeService/PullImage", &key, &request)?;
    let operation = match shared.cluster.image_pull_begun(&mutation).await.map_err(failed)? {
        Some(begun) => begun,
        None => {
            let pull = wanted(shared, request).await?;
            shared.cluster.begin_image_pull(&mutation, &pull).await.map_err(failed)?.reply
        }
    };
    shared.cluster.sync().await.map_err(failed)?;
    let (sender, receiver) = mpsc::channel(QUEUE);
    tokio::spawn(follow(shared.clone(), operation.id, sender));
    Ok(shared.until_stop(ReceiverStream::new(receiver)))
}

/// What is asked for, with the nodes that it concerns.
async fn wanted(shared: &Shared, request: v1::PullImageRequest) -> Result<ImagePull, Status> {
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
    let nodes = images::nodes(shared, &request.node_ids, fetches).await?;
    if nodes.is_empty() {
        let message = format!(
            "no node that is ready fetches images for the type {wanted}; see `hypervisor-ctl node describe`"
        );
        return Err(refuse(ServiceError::precondition(message)));
    }
    Ok(ImagePull {
        reference: request.image_ref,
        name: request.name,
        instance_type: wanted,
        digest: request.digest,
        nodes: nodes.iter().map(|node| node.id.clone()).collect(),
        max_parallel: request.max_parallel,
    })
}

/// Tells of an operation until it has ended, or nobody listens any more.
async fn follow(shared: Shared, id: String, sender: mpsc::Sender<Result<v1::PullImageProgress, Status>>) {
    let mut told = BTreeMap::new();
    loop {
        let cache = shared.cluster.cache();
        let (mut operation, mut changes) = cache.subscribe(|state| state.operation(&id).cloned());
        loop {
            let messages = match &operation {
                Some(operation) => {
                    let name = |node: &NodeId| {
                        let record = cache.read(|state| state.node(node)?.record.clone());
                        record.map(|record| record.hostname.clone()).unwrap_or_default()
                    };
                    messages(operation, &mut told, name)
                }
                None => vec![Err(Status::not_found("the operation is not kept any more"))],
            };
            for message in messages {
                if sender.send(message).await.is_err() {
                    return;
                }
            }
            if operation.is_none_or(|operation| operation.state.is_final()) {
                return;
            }
            let changed = tokio::select! {
                () = sender.closed() => return,
                changed = next(&mut changes, &id) => changed,
            };
            match changed {
                Ok(Some(after)) => operation = after,
                Ok(None) => return,
                // Too slow: looked at afresh.
                Err(SubscriptionError::Lagged | SubscriptionError::Expired) => break,
            }
        }
    }
}

/// The operation after its next change; none once there are no changes any more.
async fn next(
    changes: &mut Subscription,
    id: &str,
) -> Result<Option<Option<Arc<OperationRecord>>>, SubscriptionError> {
    while let Some(batch) = changes.next().await? {
        let about = |delta: &Delta| match delta {
            Delta::Operation { id: of, after, .. } if of == id => Some(after.clone()),
            _ => None,
        };
        if let Some(after) = batch.deltas.iter().rev().find_map(about) {
            return Ok(Some(after));
        }
    }
    Ok(None)
}

type Told = Result<v1::PullImageProgress, Status>;

/// What is new of an operation: a message for each node that stands otherwise than was told, and the end.
fn messages(
    operation: &OperationRecord,
    told: &mut BTreeMap<NodeId, Standing>,
    name: impl Fn(&NodeId) -> String,
) -> Vec<Told> {
    let mut messages = Vec::new();
    let message =
        || v1::PullImageProgress { operation_id: operation.id.clone(), ..v1::PullImageProgress::default() };
    let count = |bytes: u64| i64::try_from(bytes).unwrap_or(i64::MAX);
    for (node, standing) in standings(operation) {
        if told.get(&node) == Some(&standing) {
            continue;
        }
        let mut step =
            v1::PullImageProgress { node_id: node.to_string(), node_name: name(&node), ..message() };
        match &standing {
            Standing::Waiting => step.status = "waiting".into(),
            Standing::Working { phase, done, total } => {
                step.status.clone_from(phase);
                (step.current, step.total) = (count(*done), count(*total));
            }
            Standing::Done => (step.status, step.completed) = ("done".into(), true),
            Standing::Failed(why) => (step.status, step.error) = ("failed".into(), why.clone()),
            Standing::Cancelled => (step.status, step.error) = ("cancelled".into(), "cancelled".into()),
        }
        told.insert(node, standing);
        messages.push(Ok(step));
    }
    if operation.state.is_final() {
        let completed = operation.state == OperationState::Succeeded;
        messages.push(Ok(v1::PullImageProgress {
            status: if completed { "done".into() } else { operation.state.name().to_lowercase() },
            current: count(operation.done),
            total: count(operation.total),
            completed,
            error: if completed { String::new() } else { operation.message.clone() },
            ..message()
        }));
    }
    messages
}
