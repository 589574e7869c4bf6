//! The images of this node.

use hv_proto::v1;
use pbjson_types::Empty;
use tonic::{Request, Status, Streaming};

use super::{Answer, Outgoing, Service};

impl Service {
    pub(super) async fn pull_image(
        &self,
        request: Request<v1::PullImageRequest>,
    ) -> Answer<Outgoing<v1::PullImageProgress>> {
        let _ = request;
        Err(Status::unimplemented("not served"))
    }

    pub(super) async fn delete_image(&self, request: Request<v1::DeleteImageRequest>) -> Answer<Empty> {
        let _ = request;
        Err(Status::unimplemented("not served"))
    }

    pub(super) async fn upload_image(
        &self,
        request: Request<Streaming<v1::UploadImageRequest>>,
    ) -> Answer<v1::Image> {
        let _ = request;
        Err(Status::unimplemented("not served"))
    }

    pub(super) async fn collect_image(
        &self,
        request: Request<v1::CollectImagesRequest>,
    ) -> Answer<v1::CollectImagesResponse> {
        let _ = request;
        Err(Status::unimplemented("not served"))
    }
}
