//! `image …`.

use std::time::{Duration, SystemTime};

use bytes::Bytes;
use futures::{StreamExt as _, stream};
use hv_proto::convert::instance_type_to;
use hv_proto::v1;
use hv_types::{ErrorCode, ServiceError};
use tokio::io::AsyncReadExt as _;

use super::Context;
use crate::cli::{ImageCommand, ImageDeleteArgs, ImageGcArgs, ImageListArgs, ImagePullArgs, ImagePushArgs};
use crate::error::{CtlError, exit_code};
use crate::output::OutputFormat;
use crate::output::text::escape;
use crate::reference;
use crate::server::RequestKeys;
use crate::show::node::{collected_table, image_page, image_table};

/// Objects per page.
const PAGE_SIZE: i32 = 500;
/// How often a pull is followed again after its stream broke off.
const MAX_BROKEN: u32 = 60;
/// The pause before that.
const BROKEN_PAUSE: Duration = Duration::from_secs(1);
/// Bytes of one message of an upload.
const CHUNK_BYTES: usize = 256 << 10;

pub(super) async fn run(context: &Context, command: ImageCommand) -> Result<u8, CtlError> {
    match command {
        ImageCommand::List(args) => list(context, &args).await,
        ImageCommand::Pull(args) => pull(context, args).await,
        ImageCommand::Push(args) => push(context, args).await,
        ImageCommand::Inspect(args) => inspect(context, args.name).await,
        ImageCommand::Delete(args) => delete(context, args).await,
        ImageCommand::Gc(args) => gc(context, args).await,
    }
}

async fn list(context: &Context, args: &ImageListArgs) -> Result<u8, CtlError> {
    let server = &context.server;
    let kind = args.r#type.map_or(0, |kind| instance_type_to(kind) as i32);
    let mut all = v1::ListImagesResponse::default();
    loop {
        let page_token = all.next_page_token.clone();
        let request = v1::ListImagesRequest { r#type: kind, page_size: PAGE_SIZE, page_token };
        let page = server.call(async || server.compute().list_images(request.clone()).await).await?;
        all.images.extend(page.images);
        all.next_page_token = page.next_page_token;
        if all.next_page_token.is_empty() {
            break;
        }
    }
    match context.output.format {
        OutputFormat::Json | OutputFormat::Yaml => context.output.message("the images", &all)?,
        OutputFormat::Name => {
            for image in &all.images {
                context.output.line(format!("image/{}", escape(&image.name)))?;
            }
        }
        OutputFormat::Table | OutputFormat::Wide if all.images.is_empty() => {
            context.note("no images; `hypervisor-ctl image pull` fetches one");
        }
        OutputFormat::Table | OutputFormat::Wide => {
            context.output.print(&image_table(&all.images, context.output, SystemTime::now()))?;
        }
    }
    Ok(exit_code::OK)
}

/// The ids of nodes that are named.
async fn ids(context: &Context, names: &[String]) -> Result<Vec<String>, CtlError> {
    let mut ids = Vec::new();
    for name in names {
        ids.push(reference::node(&context.server, name).await?.id);
    }
    Ok(ids)
}

async fn pull(context: &Context, args: ImagePullArgs) -> Result<u8, CtlError> {
    let request = v1::PullImageRequest {
        image_ref: args.reference.clone(),
        r#type: instance_type_to(args.r#type).into(),
        node_ids: ids(context, &args.nodes).await?,
        name: args.name.unwrap_or_default(),
        digest: args.digest.unwrap_or_default(),
        request_key: RequestKeys::new(&args.key).next(),
        max_parallel: args.max_parallel.unwrap_or_default(),
    };
    let last = follow(context, &request, args.wait.no_wait).await?;
    if args.wait.no_wait && !last.operation_id.is_empty() {
        if context.output.format.is_for_people() {
            let (image, id) = (escape(&args.reference), escape(&last.operation_id));
            context.output.confirm(format!(
                "image {image} is being fetched; follow it with `hypervisor-ctl operation watch {id}`"
            ))?;
        } else {
            context.output.message("how far it is", &last)?;
        }
        return Ok(exit_code::OK);
    }
    if !last.completed {
        return Err(CtlError::Precondition(format!(
            "image {} was not fetched: {}",
            args.reference, last.error
        )));
    }
    if context.output.format.is_for_people() {
        let nodes = if last.total == 1 { "1 node".to_owned() } else { format!("{} nodes", last.total) };
        context.output.confirm(format!("image {} is on {nodes}", escape(&args.reference)))?;
    } else {
        context.output.message("the image", &last)?;
    }
    Ok(exit_code::OK)
}

/// Begins a pull and follows it to its end, or to its first message. That a server goes away in between is no error until
/// it has stayed away for a while: the pull goes on, and the same key follows it again through whichever server answers.
async fn follow(
    context: &Context,
    request: &v1::PullImageRequest,
    only_begin: bool,
) -> Result<v1::PullImageProgress, CtlError> {
    let server = &context.server;
    let mut progress = context.progress();
    let mut begun = String::new();
    let mut broken = 0;
    let outcome = loop {
        let opened = server.call(async || server.compute().pull_image(request.clone()).await).await;
        let error = match opened {
            Err(error) => error,
            Ok(mut steps) => loop {
                match steps.message().await {
                    Ok(Some(step)) => {
                        broken = 0;
                        begun.clone_from(&step.operation_id);
                        if only_begin || step.node_id.is_empty() {
                            progress.clear();
                            return Ok(step);
                        }
                        if !step.completed {
                            progress.update(&told(&step));
                        }
                    }
                    Ok(None) => break CtlError::Service(ServiceError::unavailable("the server broke off")),
                    Err(status) => break server.error(&status),
                }
            },
        };
        let may_pass = matches!(&error, CtlError::Service(error) if is_break(error.code()));
        if begun.is_empty() || !may_pass || broken >= MAX_BROKEN {
            break error;
        }
        broken += 1;
        progress.update("the server does not answer; the pull goes on without it");
        tokio::time::sleep(BROKEN_PAUSE).await;
    };
    progress.clear();
    if !begun.is_empty() {
        context.note(&format!(
            "the pull may go on; follow it with `hypervisor-ctl operation watch {}`",
            escape(&begun)
        ));
    }
    Err(outcome)
}

/// Whether an error may come of a connection that broke, or of a server that went away.
fn is_break(code: ErrorCode) -> bool {
    code.retryable() || matches!(code, ErrorCode::Internal | ErrorCode::Cancelled)
}

/// How far a node is, for people.
fn told(step: &v1::PullImageProgress) -> String {
    const MIB: i64 = 1 << 20;
    let node = if step.node_name.is_empty() { &step.node_id } else { &step.node_name };
    match (step.total, &step.error) {
        (_, error) if !error.is_empty() => format!("{node}: {error}"),
        (total, _) if total > 0 => {
            let percent = step.current.saturating_mul(100) / total;
            format!("{node}: {} {percent} % of {} MiB", step.status, (total + MIB - 1) / MIB)
        }
        _ => format!("{node}: {}", step.status),
    }
}

async fn push(context: &Context, args: ImagePushArgs) -> Result<u8, CtlError> {
    let server = &context.server;
    let node_id = reference::node(server, &args.node).await?.id;
    let unreadable = |source| CtlError::File { action: "read", path: args.file.clone(), source };
    let file = tokio::fs::File::open(&args.file).await.map_err(unreadable)?;
    let size_bytes = file.metadata().await.map_err(unreadable)?.len();
    let start = v1::UploadImageStart {
        name: args.name.clone(),
        r#type: instance_type_to(args.r#type).into(),
        node_id,
        size_bytes,
        digest: args.digest.unwrap_or_default(),
    };
    let message = |part| v1::UploadImageRequest { part: Some(part) };
    let first = message(v1::upload_image_request::Part::Start(start));
    // A file that cannot be read to its end ends the stream early, which the node refuses.
    let data = stream::unfold(file, |mut file| async move {
        let mut chunk = vec![0; CHUNK_BYTES];
        let count = file.read(&mut chunk).await.ok().filter(|count| *count > 0)?;
        chunk.truncate(count);
        Some((Bytes::from(chunk), file))
    });
    let data = data.map(move |chunk| message(v1::upload_image_request::Part::Data(chunk)));
    let mut progress = context.progress();
    progress.update(&format!("sending {}", args.file.display()));
    let parts = stream::iter([first]).chain(data);
    let answer = server.compute().upload_image(parts).await.map_err(|status| server.error(&status))?;
    progress.clear();
    let image = answer.into_inner();
    if context.output.format.is_for_people() {
        context.output.confirm(format!("image {} is on node {}", escape(&args.name), escape(&args.node)))?;
    } else {
        context.output.message("the image", &image)?;
    }
    Ok(exit_code::OK)
}

async fn inspect(context: &Context, name: String) -> Result<u8, CtlError> {
    let server = &context.server;
    let request = v1::GetImageRequest { name };
    let image = server.call(async || server.compute().get_image(request.clone()).await).await?;
    match context.output.format {
        OutputFormat::Json | OutputFormat::Yaml => context.output.message("the image", &image)?,
        OutputFormat::Name => context.output.line(format!("image/{}", escape(&image.name)))?,
        OutputFormat::Table | OutputFormat::Wide => {
            context.output.print(&image_page(&image, SystemTime::now()).text())?;
        }
    }
    Ok(exit_code::OK)
}

async fn delete(context: &Context, args: ImageDeleteArgs) -> Result<u8, CtlError> {
    let server = &context.server;
    let request = v1::DeleteImageRequest {
        name: args.name.clone(),
        node_ids: ids(context, &args.nodes).await?,
        request_key: String::new(),
    };
    let answer = server.call(async || server.compute().delete_image(request.clone()).await).await?;
    if !context.output.format.is_for_people() {
        context.output.message("what became of the image", &answer)?;
    } else if answer.failed.is_empty() {
        let count = answer.node_ids.len();
        let nodes = if count == 1 { "1 node".to_owned() } else { format!("{count} nodes") };
        context.output.confirm(format!("image {} is removed from {nodes}", escape(&args.name)))?;
    }
    if let Some((node, why)) = answer.failed.iter().min() {
        let count = answer.failed.len();
        let text = format!("image {} stays on {count} nodes; on {node}: {why}", args.name);
        return Err(CtlError::Precondition(text));
    }
    Ok(exit_code::OK)
}

async fn gc(context: &Context, args: ImageGcArgs) -> Result<u8, CtlError> {
    let server = &context.server;
    let request = v1::CollectImagesRequest {
        node_ids: ids(context, &args.nodes).await?,
        unused_seconds: args.unused_for.get().as_secs(),
        dry_run: args.dry_run,
    };
    let answer = server.call(async || server.compute().collect_images(request.clone()).await).await?;
    match context.output.format {
        OutputFormat::Json | OutputFormat::Yaml => context.output.message("the images", &answer)?,
        OutputFormat::Name => {
            for image in &answer.images {
                context.output.line(format!("image/{}", escape(&image.name)))?;
            }
        }
        OutputFormat::Table | OutputFormat::Wide if answer.images.is_empty() => {
            context.note("nothing to remove");
        }
        OutputFormat::Table | OutputFormat::Wide => {
            context.output.print(&collected_table(&answer.images, context.output))?;
        }
    }
    Ok(exit_code::OK)
}
