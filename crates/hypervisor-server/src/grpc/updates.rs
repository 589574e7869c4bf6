//! Changes of what an instance is made of.

use hv_proto::v1;
use tonic::{Request, Response, Status};

use super::Shared;

pub(super) async fn update(
    shared: &Shared,
    request: Request<v1::UpdateInstanceRequest>,
) -> Result<Response<v1::Instance>, Status> {
    let _ = (shared, request);
    Err(Status::unimplemented("not served"))
}
