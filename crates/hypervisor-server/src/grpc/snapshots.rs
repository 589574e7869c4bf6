//! Snapshots of instances.

use hv_cluster::Mutation;
use hv_cluster::instances::CloneRequest;
use hv_cluster::operations::SnapshotTask;
use hv_proto::v1;
use hv_types::InstanceId;
use tonic::{Request, Response, Status};

use super::Shared;
use super::request::{failed, id, mutation};

async fn begin(
    shared: &Shared,
    mutation: Mutation,
    instance: &str,
    task: SnapshotTask,
) -> Result<Response<v1::Operation>, Status> {
    let instance: InstanceId = id(instance)?;
    let done = shared.cluster.begin_snapshot_task(&mutation, &instance, &task).await.map_err(failed)?;
    Ok(Response::new(done.reply))
}

pub(super) async fn create(
    shared: &Shared,
    request: Request<v1::CreateInstanceSnapshotRequest>,
) -> Result<Response<v1::Operation>, Status> {
    let mut request = request.into_inner();
    let key = std::mem::take(&mut request.request_key);
    let mutation = mutation("ComputeService/CreateInstanceSnapshot", &key, &request)?;
    let task = SnapshotTask::Create { name: request.name, memory: request.memory };
    begin(shared, mutation, &request.instance_id, task).await
}

pub(super) async fn list(
    shared: &Shared,
    request: Request<v1::ListInstanceSnapshotsRequest>,
) -> Result<Response<v1::ListInstanceSnapshotsResponse>, Status> {
    let instance: InstanceId = id(&request.into_inner().instance_id)?;
    let snapshots = shared.cluster.instance_snapshots(&instance).await.map_err(failed)?;
    Ok(Response::new(v1::ListInstanceSnapshotsResponse { snapshots }))
}

pub(super) async fn delete(
    shared: &Shared,
    request: Request<v1::DeleteInstanceSnapshotRequest>,
) -> Result<Response<v1::Operation>, Status> {
    let mut request = request.into_inner();
    let key = std::mem::take(&mut request.request_key);
    let mutation = mutation("ComputeService/DeleteInstanceSnapshot", &key, &request)?;
    begin(shared, mutation, &request.instance_id, SnapshotTask::Delete(request.name)).await
}

pub(super) async fn clone(
    shared: &Shared,
    request: Request<v1::CloneInstanceRequest>,
) -> Result<Response<v1::CloneInstanceResponse>, Status> {
    let mut request = request.into_inner();
    let key = std::mem::take(&mut request.request_key);
    let mutation = mutation("ComputeService/CloneInstance", &key, &request)?;
    let instance: InstanceId = id(&request.instance_id)?;
    let asked = CloneRequest {
        snapshot: request.snapshot,
        name: request.name,
        count: usize::try_from(request.count).ok().filter(|count| *count > 0),
    };
    let done = shared.cluster.clone_instance(&mutation, &instance, &asked).await.map_err(failed)?;
    metrics::counter!("hypervisor_creates_total").increment(done.reply.instances.len() as u64);
    Ok(Response::new(done.reply))
}

pub(super) async fn revert(
    shared: &Shared,
    request: Request<v1::RevertInstanceRequest>,
) -> Result<Response<v1::Operation>, Status> {
    let mut request = request.into_inner();
    let key = std::mem::take(&mut request.request_key);
    let mutation = mutation("ComputeService/RevertInstance", &key, &request)?;
    begin(shared, mutation, &request.instance_id, SnapshotTask::Revert(request.name)).await
}
