//! Images of nodes.

use hv_proto::v1;
use tonic::{Request, Response, Status, Streaming};

use super::ReplyStream;
use super::Shared;

pub(super) async fn pull(
    shared: &Shared,
    request: Request<v1::PullImageRequest>,
) -> Result<Response<ReplyStream<v1::PullImageProgress>>, Status> {
    let _ = (shared, request);
    Err(Status::unimplemented("not served"))
}

pub(super) async fn get(
    shared: &Shared,
    request: Request<v1::GetImageRequest>,
) -> Result<Response<v1::Image>, Status> {
    let _ = (shared, request);
    Err(Status::unimplemented("not served"))
}

pub(super) async fn delete(
    shared: &Shared,
    request: Request<v1::DeleteImageRequest>,
) -> Result<Response<v1::DeleteImageResponse>, Status> {
    let _ = (shared, request);
    Err(Status::unimplemented("not served"))
}

pub(super) async fn upload(
    shared: &Shared,
    request: Request<Streaming<v1::UploadImageRequest>>,
) -> Result<Response<v1::Image>, Status> {
    let _ = (shared, request);
    Err(Status::unimplemented("not served"))
}

pub(super) async fn collect(
    shared: &Shared,
    request: Request<v1::CollectImagesRequest>,
) -> Result<Response<v1::CollectImagesResponse>, Status> {
    let _ = (shared, request);
    Err(Status::unimplemented("not served"))
}
