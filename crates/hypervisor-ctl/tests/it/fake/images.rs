//! What the fake says of images.

use hv_proto::v1;
use hv_types::ErrorCode;
use tonic::{Response, Streaming};

use super::{Answer, Streamed, status};

pub(super) fn tiny() -> v1::Image {
    v1::Image {
        id: "tiny".into(),
        name: "tiny".into(),
        size_bytes: 5 << 20,
        r#type: v1::InstanceType::Vm as i32,
        node_ids: vec!["node-a-id".into()],
        ..Default::default()
    }
}

/// A reference with `absent` in it is on no node, the server goes away when one with `shaky` is followed for the first time; any
/// other is fetched in two steps.
pub(super) fn pull(request: v1::PullImageRequest, is_known: bool) -> Answer<Streamed<v1::PullImageProgress>> {
    let node_id = "node-a-id".to_owned();
    let step = |status: &str, current| v1::PullImageProgress {
        status: status.into(),
        current,
        total: 10 << 20,
        node_id: node_id.clone(),
        operation_id: "pull-1".into(),
        ..Default::default()
    };
    let last = if request.image_ref.contains("absent") {
        v1::PullImageProgress { error: "the registry does not have it".into(), ..Default::default() }
    } else {
        v1::PullImageProgress { completed: true, current: 2, total: 2, ..Default::default() }
    };
    if request.image_ref.contains("shaky") && !is_known {
        let gone = Err(status(ErrorCode::Unavailable, "the server is stopping"));
        return Ok(Response::new(Box::pin(tokio_stream::iter([Ok(step("downloading", 5 << 20)), gone]))));
    }
    let steps = [step("downloading", 5 << 20), step("converting", 10 << 20), last].map(Ok);
    Ok(Response::new(Box::pin(tokio_stream::iter(steps))))
}

pub(super) fn get(name: &str) -> Answer<v1::Image> {
    match name {
        "tiny" => Ok(Response::new(v1::Image {
            digest: "sha256:0011".into(),
            source: "oci://registry/tiny:1".into(),
            architecture: "amd64".into(),
            form: "disk".into(),
            instances: 3,
            ..tiny()
        })),
        _ => Err(status(ErrorCode::NotFound, "no node has such an image")),
    }
}

/// `used` stays on one node.
pub(super) fn delete(name: &str) -> Answer<v1::DeleteImageResponse> {
    let mut answer = v1::DeleteImageResponse { node_ids: vec!["node-a-id".into()], ..Default::default() };
    if name == "used" {
        answer.failed.insert("node-b-id".into(), "image used is in use by 1 instance".into());
    }
    Ok(Response::new(answer))
}

/// Answers with as many bytes as came, if those were announced.
pub(super) async fn upload(mut parts: Streaming<v1::UploadImageRequest>) -> Answer<v1::Image> {
    let (mut announced, mut came) = (0, 0);
    while let Some(message) = parts.message().await? {
        match message.part {
            Some(v1::upload_image_request::Part::Start(start)) => announced = start.size_bytes,
            Some(v1::upload_image_request::Part::Data(data)) => came += data.len() as u64,
            None => {}
        }
    }
    if came != announced {
        return Err(status(ErrorCode::InvalidArgument, format!("{came} bytes came of {announced}")));
    }
    Ok(Response::new(v1::Image { size_bytes: i64::try_from(came).unwrap_or_default(), ..tiny() }))
}

/// Nothing younger than an hour goes.
pub(super) fn collect(request: &v1::CollectImagesRequest) -> v1::CollectImagesResponse {
    let image = v1::CollectedImage { node_id: "node-a-id".into(), name: "old".into(), size_bytes: 3 << 20 };
    let images = if request.unused_seconds >= 3600 { vec![image] } else { Vec::new() };
    v1::CollectImagesResponse { images }
}
