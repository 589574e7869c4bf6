//! `image …`.

use std::time::SystemTime;

use bytes::Bytes;
use futures::{StreamExt as _, stream};
use hv_proto::convert::instance_type_to;
use hv_proto::v1;
use tokio::io::AsyncReadExt as _;

use super::Context;
use crate::cli::{ImageCommand, ImageDeleteArgs, ImageGcArgs, ImageListArgs, ImagePullArgs, ImagePushArgs};
use crate::error::{CtlError, exit_code};
use crate::output::OutputFormat;
use crate::output::text::escape;
use crate::reference;
use crate::show::node::{collected_table, image_page, image_table};

/// Objects per page.
const PAGE_SIZE: i32 = 500;
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
    let server = &context.server;
    let request = v1::PullImageRequest {
        image_ref: args.reference.clone(),
        r#type: instance_type_to(args.r#type).into(),
        node_ids: ids(context, &args.nodes).await?,
        name: args.name.unwrap_or_default(),
        digest: args.digest.unwrap_or_default(),
        request_key: String::new(),
    };
    let mut steps = server.call(async || server.compute().pull_image(request.clone()).await).await?;
    let mut progress = context.progress();
    let mut last = v1::PullImageProgress::default();
    while let Some(step) = steps.message().await.map_err(|status| server.error(&status))? {
        if step.node_id.is_empty() {
            last = step;
        } else if !step.completed {
            progress.update(&told(&step));
        }
    }
    progress.clear();
    if !last.completed {
        let why = if last.error.is_empty() { "the server broke off; pull it again" } else { &last.error };
        return Err(CtlError::Precondition(format!("image {} was not fetched: {why}", args.reference)));
    }
    if context.output.format.is_for_people() {
        let nodes = if last.total == 1 { "1 node".to_owned() } else { format!("{} nodes", last.total) };
        context.output.confirm(format!("image {} is on {nodes}", escape(&args.reference)))?;
    } else {
        context.output.message("the image", &last)?;
    }
    Ok(exit_code::OK)
}

/// How far a node is, for people.
fn told(step: &v1::PullImageProgress) -> String {
    const MIB: i64 = 1 << 20;
    let node = &step.node_id;
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
