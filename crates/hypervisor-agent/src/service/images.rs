//! The images of this node: fetched, uploaded and removed on request.

use futures::{Stream, StreamExt as _};
use hv_image::{ImageError, ImportRequest, Progress, PullRequest, Reference, Store, StoredImage};
use hv_proto::{convert, v1};
use hv_telemetry::error_chain;
use hv_types::{ErrorCode, InstanceType, Invalid, ServiceError};
use pbjson_types::Empty;
use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status, Streaming};

use super::{Answer, Outgoing, Service, refuse};

/// How often the caller of a fetch is told how far it is.
const TELL_EVERY: std::time::Duration = std::time::Duration::from_millis(500);
/// How many messages wait for a slow caller.
const QUEUE: usize = 8;

impl Service {
    fn store(&self) -> Result<Store, Status> {
        self.instances.context().images.store().cloned().ok_or_else(|| {
            let message = "this node keeps no images; set images.enabled in its agent's configuration";
            refuse(&ServiceError::new(ErrorCode::Unsupported, message))
        })
    }

    pub(super) async fn pull_image(
        &self,
        request: Request<v1::PullImageRequest>,
    ) -> Answer<Outgoing<v1::PullImageProgress>> {
        let store = self.store()?;
        let request = request.into_inner();
        let reference: Reference = request.image_ref.parse().map_err(|e| refused(&e))?;
        let name = if request.name.is_empty() { request.image_ref } else { request.name };
        let wanted = PullRequest {
            reference,
            name,
            instance_type: type_of(request.r#type)?,
            digest: (!request.digest.is_empty()).then_some(request.digest),
        };
        let (sender, receiver) = mpsc::channel(QUEUE);
        let images = std::sync::Arc::clone(&self.instances.context().images);
        tokio::spawn(async move {
            let (progress, seen) = watch::channel(Progress::default());
            let cancel = CancellationToken::new();
            let tell = tell(seen, &sender);
            let outcome = tokio::select! {
                outcome = store.pull(&wanted, &progress, &cancel) => outcome,
                // The caller is gone; what has arrived stays for the next one.
                () = tell => return,
            };
            images.have_changed();
            let last = match outcome {
                Ok(image) => Ok(v1::PullImageProgress {
                    status: "done".into(),
                    current: size(image.info.size_bytes),
                    total: size(image.info.size_bytes),
                    completed: true,
                    ..v1::PullImageProgress::default()
                }),
                Err(error) => Err(refused(&error)),
            };
            // Nobody may be listening any more.
            let _ = sender.send(last).await;
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(receiver))))
    }

    pub(super) async fn delete_image(&self, request: Request<v1::DeleteImageRequest>) -> Answer<Empty> {
        let name = request.into_inner().name;
        self.store()?.delete(&name).await.map_err(|e| refused(&e))?;
        self.instances.context().images.have_changed();
        Ok(Response::new(Empty {}))
    }

    pub(super) async fn upload_image(
        &self,
        request: Request<Streaming<v1::UploadImageRequest>>,
    ) -> Answer<v1::Image> {
        let store = self.store()?;
        let mut parts = request.into_inner();
        let expected = "must begin with `start`, which names the image";
        let first = parts.message().await?.and_then(|message| message.part);
        let Some(v1::upload_image_request::Part::Start(start)) = first else {
            return Err(refuse(&Invalid::new("part", "another message", expected).into()));
        };
        let wanted = ImportRequest {
            name: start.name,
            instance_type: type_of(start.r#type)?,
            size_bytes: start.size_bytes,
            digest: (!start.digest.is_empty()).then_some(start.digest),
        };
        let (progress, _) = watch::channel(Progress::default());
        let cancel = CancellationToken::new();
        let image = store.import(data_of(parts), &wanted, &progress, &cancel).await;
        let image = image.map_err(|e| refused(&e))?;
        self.instances.context().images.have_changed();
        Ok(Response::new(shown(&image)))
    }

    pub(super) async fn collect_image(
        &self,
        request: Request<v1::CollectImagesRequest>,
    ) -> Answer<v1::CollectImagesResponse> {
        let request = request.into_inner();
        let unused_for = std::time::Duration::from_secs(request.unused_seconds);
        let gone = self.store()?.collect(unused_for, 0, request.dry_run).await.map_err(|e| refused(&e))?;
        self.instances.context().images.have_changed();
        let node_id = self.instances.context().node_id.to_string();
        let images = gone.into_iter().map(|image| v1::CollectedImage {
            node_id: node_id.clone(),
            name: image.name,
            size_bytes: size(image.size_bytes),
        });
        Ok(Response::new(v1::CollectImagesResponse { images: images.collect() }))
    }
}

/// Tells how far it is until nobody listens.
async fn tell(
    mut seen: watch::Receiver<Progress>,
    sender: &mpsc::Sender<Result<v1::PullImageProgress, Status>>,
) {
    loop {
        let progress = *seen.borrow_and_update();
        let message = v1::PullImageProgress {
            status: progress.phase.name().into(),
            current: size(progress.done_bytes),
            total: size(progress.total_bytes),
            ..v1::PullImageProgress::default()
        };
        if sender.send(Ok(message)).await.is_err() {
            return;
        }
        tokio::select! {
            () = sender.closed() => return,
            () = tokio::time::sleep(TELL_EVERY) => {}
        }
    }
}

/// The bytes of an upload. A caller that breaks off ends it with an error, so that nothing half is taken for whole.
fn data_of(
    parts: Streaming<v1::UploadImageRequest>,
) -> impl Stream<Item = std::io::Result<bytes::Bytes>> + Send + Unpin {
    Box::pin(parts.map(|part| match part.map(|message| message.part) {
        Ok(Some(v1::upload_image_request::Part::Data(data))) => Ok(data),
        Ok(_) => Err(std::io::Error::new(std::io::ErrorKind::InvalidData, "data was expected")),
        Err(status) => Err(std::io::Error::new(std::io::ErrorKind::UnexpectedEof, status)),
    }))
}

fn type_of(value: i32) -> Result<InstanceType, Status> {
    let missing = || Invalid::new("type", "", "must be `vm`, `container` or `microvm`");
    convert::instance_type_from(value).and_then(|of| of.ok_or_else(missing)).map_err(|e| refuse(&e.into()))
}

fn shown(image: &StoredImage) -> v1::Image {
    let instances = u32::try_from(image.users.len()).unwrap_or(u32::MAX);
    v1::Image { instances, ..convert::image_to(&image.info) }
}

fn size(bytes: u64) -> i64 {
    i64::try_from(bytes).unwrap_or(i64::MAX)
}

fn refused(error: &ImageError) -> Status {
    let code = match error {
        ImageError::InvalidReference { .. } | ImageError::Invalid(_) => ErrorCode::InvalidArgument,
        ImageError::NotFound { .. } | ImageError::NotAtSource { .. } => ErrorCode::NotFound,
        ImageError::InUse { .. }
        | ImageError::NotAllowed { .. }
        | ImageError::Denied { .. }
        | ImageError::Refused { .. }
        | ImageError::DigestMismatch { .. }
        | ImageError::TooLarge { .. }
        | ImageError::Unsupported { .. }
        | ImageError::Damaged { .. } => ErrorCode::FailedPrecondition,
        ImageError::NoSpace { .. } => ErrorCode::ResourceExhausted,
        ImageError::Transport { .. } | ImageError::Cancelled { .. } | ImageError::Locked { .. } => {
            ErrorCode::Unavailable
        }
        ImageError::Tool { .. } | ImageError::Newer { .. } | ImageError::Io { .. } => ErrorCode::Internal,
    };
    refuse(&ServiceError::new(code, error_chain(error)))
}
