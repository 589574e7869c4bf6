//! Moves to another node.

use hv_cluster::operations::migrate::MigrateOptions;
use hv_proto::v1;
use tonic::{Request, Response, Status};

use super::Shared;
use super::request::{failed, id, mutation, refuse};

pub(super) async fn migrate(
    shared: &Shared,
    request: Request<v1::MigrateInstanceRequest>,
) -> Result<Response<v1::Operation>, Status> {
    let mut request = request.into_inner();
    let key = std::mem::take(&mut request.request_key);
    let mutation = mutation("ComputeService/MigrateInstance", &key, &request)?;
    let instance = id(&request.instance_id)?;
    let options = MigrateOptions::try_from(&request).map_err(refuse)?;
    let done = shared.cluster.migrate_instance(&mutation, &instance, &options).await.map_err(failed)?;
    Ok(Response::new(done.reply))
}
