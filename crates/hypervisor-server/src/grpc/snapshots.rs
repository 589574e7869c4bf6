//! Snapshots of instances.

use hv_proto::v1;
use tonic::{Request, Response, Status};

use super::Shared;

pub(super) async fn create(
    shared: &Shared,
    request: Request<v1::CreateInstanceSnapshotRequest>,
) -> Result<Response<v1::Operation>, Status> {
    let _ = (shared, request);
    Err(Status::unimplemented("not served"))
}

pub(super) async fn list(
    shared: &Shared,
    request: Request<v1::ListInstanceSnapshotsRequest>,
) -> Result<Response<v1::ListInstanceSnapshotsResponse>, Status> {
    let _ = (shared, request);
    Err(Status::unimplemented("not served"))
}

pub(super) async fn delete(
    shared: &Shared,
    request: Request<v1::DeleteInstanceSnapshotRequest>,
) -> Result<Response<v1::Operation>, Status> {
    let _ = (shared, request);
    Err(Status::unimplemented("not served"))
}

pub(super) async fn revert(
    shared: &Shared,
    request: Request<v1::RevertInstanceRequest>,
) -> Result<Response<v1::Operation>, Status> {
    let _ = (shared, request);
    Err(Status::unimplemented("not served"))
}
