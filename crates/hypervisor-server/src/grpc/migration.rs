//! Moves to another node.

use hv_proto::v1;
use tonic::{Request, Response, Status};

use super::Shared;

pub(super) async fn migrate(
    shared: &Shared,
    request: Request<v1::MigrateInstanceRequest>,
) -> Result<Response<v1::Operation>, Status> {
    let _ = (shared, request);
    Err(Status::unimplemented("not served"))
}
